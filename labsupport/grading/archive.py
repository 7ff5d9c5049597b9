"""The files of a folder or a zip that others have filled, looked at without trusting a name, a size or a link in it.

Nothing is unpacked: a file is read, up to a limit, into memory, and whoever takes it chooses the name under which it is kept.
"""

from __future__ import annotations

import os
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from labsupport.grading.cells import LARGEST_FILE
from labsupport.grading.records import GradingError

MOST_FILES = 100_000
MOST_BYTES = 4 * 10**9  # of all files that are read, unpacked
DEEPEST = 12  # folders
LARGEST_RATIO = 200  # unpacked over packed; a notebook of text packs to a tenth, and only a file of zeros to a thousandth
SMALL = 10**6  # bytes below which a ratio does not matter
LARGEST_DIRECTORY = 64 * 10**6  # bytes of a zip's list of its files; a name and what is known of it take some hundred
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Unreadable(Exception):
    """Why one file cannot be taken: the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class Entry:
    """A file. path: as it is named there, with / between folders. modified: with a time zone; None where nothing says when."""

    path: PurePosixPath
    size: int
    modified: datetime | None
    read: Callable[[int], bytes]  # at most so many bytes; raises Unreadable


@dataclass
class Archive:
    """entries: what may be read. lines: what is there and was left alone, and why. zipped: whether times come from a zip."""

    entries: list[Entry] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    zipped: bool = False


def shown(name: object) -> str:
    """A name that others chose, on one line, without what steers a terminal or turns text around."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in str(name))
    return text if len(text) <= 160 else f"{text[:100]}...{text[-50:]}"


def contents(source: Path) -> Archive:
    """Of a folder, a zip or a single notebook. Raises GradingError where it is none of them, or has too many files."""
    try:
        status = source.stat()
    except OSError as error:
        raise GradingError(f"{source} cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        archive = Archive()
        _walk(source, PurePosixPath(), archive)
        return archive
    if not stat.S_ISREG(status.st_mode):
        raise GradingError(f"{source} is neither a folder nor a zip file")
    if source.suffix.lower() == ".ipynb":
        return Archive([_file(source, PurePosixPath(source.name), status)])
    return _zip(source)


# Folders --------------------------------------------------------------------------------------------------------------
def _walk(folder: Path, inside: PurePosixPath, archive: Archive) -> None:
    """Links are not followed, and pipes and devices not opened."""
    if len(inside.parts) > DEEPEST:
        archive.lines.append(f"{shown(inside)}: more than {DEEPEST} folders deep, not looked into")
        return
    try:
        with os.scandir(folder) as listed:
            found = sorted(_bounded(listed, archive), key=lambda item: item.name)
    except OSError as error:
        archive.lines.append(f"{shown(inside)}: cannot be read ({error.strerror})")
        return
    for item in found:
        path = inside / item.name
        if _hidden(item.name):
            continue
        try:
            status = item.stat(follow_symlinks=False)
        except OSError as error:
            archive.lines.append(f"{shown(path)}: cannot be read ({error.strerror})")
            continue
        if stat.S_ISDIR(status.st_mode):
            _walk(Path(item.path), path, archive)
        elif problem := _refused(str(path), stat.S_IFMT(status.st_mode)):
            archive.lines.append(f"{shown(path)}: {problem}")
        else:
            archive.entries.append(_file(Path(item.path), path, status))


def _bounded(listed: Iterator[os.DirEntry[str]], archive: Archive) -> Iterator[os.DirEntry[str]]:
    for count, item in enumerate(listed, len(archive.entries) + len(archive.lines)):
        if count >= MOST_FILES:
            raise GradingError(f"there are more than {MOST_FILES} files: name the folder of one lab's submissions")
        yield item


def _file(path: Path, inside: PurePosixPath, status: os.stat_result) -> Entry:
    def read(most: int) -> bytes:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(path, flags)
            with os.fdopen(descriptor, "rb") as stream:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise Unreadable("is not a file any more")
                return stream.read(most)
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror})") from None

    try:
        modified = datetime.fromtimestamp(status.st_mtime, UTC)
    except (OverflowError, OSError, ValueError):
        modified = None
    return Entry(inside, status.st_size, modified, read)


def _hidden(name: str) -> bool:
    """What systems and editors leave behind: .DS_Store, .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def _refused(name: str, kind: int) -> str:
    """Why a file is not taken, by its name and its kind (stat.S_IFMT; 0 where it is not known); "" for none."""
    if kind == stat.S_IFLNK:
        return "a link, not followed"
    if kind not in (0, stat.S_IFREG):
        return "not a file"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "its name holds control characters, not taken"
    return ""


# Zip files ------------------------------------------------------------------------------------------------------------
def _zip(source: Path) -> Archive:
    archive = Archive(zipped=True)
    _check_directory(source)
    try:
        opened = zipfile.ZipFile(source)
        listed = opened.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise GradingError(f"{source} is not a zip file, or damaged ({error})") from None
    if len(listed) > MOST_FILES:
        raise GradingError(f"{source} holds more than {MOST_FILES} files: give it one lab's submissions")
    for info in listed:
        name = _name(info)
        if info.is_dir() or name.endswith("/") or (any(map(_hidden, PurePosixPath(name).parts)) and ".." not in name):
            continue
        if problem := _zip_problem(info, name):
            archive.lines.append(f"{shown(name)}: {problem}")
        else:
            archive.entries.append(Entry(PurePosixPath(name), info.file_size, _time(info), _reader(opened, info)))
    return archive


def _check_directory(source: Path) -> None:
    """Before Python reads the list of files, which takes it some 500 bytes for each: how long does the list say that it is?

    It stands in the record at the end of a zip (APPNOTE.TXT 4.3.16), and for large ones in the record before it (4.3.14).
    """
    with source.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, end - 66_000))
        tail = stream.read()
        at = tail.rfind(b"PK\5\6")
        if at < 0 or len(tail) < at + 22:
            raise GradingError(f"{source} is neither a folder, a notebook nor a zip file, or it was cut off")
        size = int.from_bytes(tail[at + 12 : at + 16], "little")
        far = tail.rfind(b"PK\6\6", 0, at)
        if far >= 0 and len(tail) >= far + 48:
            size = max(size % 0xFFFFFFFF, int.from_bytes(tail[far + 40 : far + 48], "little"))
    if size > LARGEST_DIRECTORY:
        raise GradingError(f"{source} holds more than {MOST_FILES} files: give it one lab's submissions")


def _name(info: zipfile.ZipInfo) -> str:
    """With / between folders. Many systems write UTF-8 without saying so, which Python then reads as the DOS code page."""
    name = info.orig_filename
    if not info.flag_bits & 0x800:
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            name = info.orig_filename
    return name.replace("\\", "/")


def _zip_problem(info: zipfile.ZipInfo, name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or name[1:2] == ":" or not path.name:
        return "its name points out of the zip, not taken"
    if problem := _refused(name, stat.S_IFMT(info.external_attr >> 16)):
        return problem
    if info.flag_bits & 1:
        return "encrypted, not taken"
    if info.compress_type not in METHODS:
        return "packed by a method other than deflate, not taken"
    if info.file_size > SMALL and info.file_size > LARGEST_RATIO * max(1, info.compress_size):
        return f"unpacks to {LARGEST_RATIO} times its size and more, not taken"
    return ""


def _time(info: zipfile.ZipInfo) -> datetime | None:
    """A zip has local time without a zone, and 1980 where it has none."""
    try:
        return datetime(*info.date_time).astimezone() if info.date_time > (1980, 1, 1, 0, 0, 0) else None
    except (ValueError, OverflowError, OSError):
        return None


def _reader(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[int], bytes]:
    def read(most: int) -> bytes:
        try:
            with opened.open(info) as stream:
                return stream.read(most)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, struct.error):
            raise Unreadable("is damaged in the zip") from None

    return read


def read_notebook(entry: Entry) -> bytes:
    """Raises Unreadable, for a file that is too large too, whatever size it says that it has."""
    if entry.size > LARGEST_FILE:
        raise Unreadable(f"has {entry.size / 1e6:.0f} MB, more than {LARGEST_FILE / 1e6:.0f} MB")
    raw = entry.read(LARGEST_FILE + 1)
    if len(raw) > LARGEST_FILE:
        raise Unreadable(f"has more than {LARGEST_FILE / 1e6:.0f} MB")
    return raw
