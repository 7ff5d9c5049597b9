"""A class's folder: its settings, its roster, its secret, and where everything of a lab lies in it."""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from labsupport.grading.records import Collected, GradingError, Override, Policy, Record, Release, Result
from labsupport.grading.sandbox import Limits
from labsupport.model import files

SETTINGS, ROSTER, SECRET, GRADEBOOK = "class.json", "roster.csv", ".secret", "gradebook.sqlite"
FOLDERS = ("release", "collected", "results", "overrides", "reports", "feedback")
COLUMNS = ("learner", "name", "email")
SECRET_BYTES = 32

# Safe as the name of a file on Linux, macOS and Windows, as an option's value, and inside a path of nbgrader.
LEARNER = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@-]{0,62}[A-Za-z0-9_-])?")
WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
EMAIL = re.compile(r"[^@\s]+@[^@\s]+")


class Settings(Record):
    """What holds for all labs of a class. sandbox: which one answers run in; "auto" takes the first that works here."""

    name: str
    policy: Policy = Policy.model_validate({})
    limits: Limits = Limits.model_validate({})
    sandbox: Literal["auto", "bubblewrap", "docker"] = "auto"


@dataclass(frozen=True)
class Learner:
    """A row of the roster. name and email may be empty."""

    id: str
    name: str = ""
    email: str = ""


@dataclass(frozen=True)
class Classroom:
    """An open class. roster: by the learner's id, in the order of the file. key: the secret, 32 bytes."""

    folder: Path
    settings: Settings
    roster: dict[str, Learner]
    key: bytes

    @classmethod
    def create(cls, folder: Path, name: str = "") -> Classroom:
        """Make a folder with an empty roster. `name`: of the class, the folder's without one.

        Raises GradingError where the folder is a class already, or not empty, and WriteError; nothing is left behind then.
        """
        folder = folder.absolute()
        if (folder / SETTINGS).exists():
            raise GradingError(f"{folder} is a class already: `labs class init` wants a new folder")
        if folder.exists() and not folder.is_dir():
            raise GradingError(f"{folder} is a file: `labs class init` wants a new folder")
        new = not folder.exists()
        if not new and any(folder.iterdir()):
            raise GradingError(f"{folder} is not empty: `labs class init` wants a new folder or an empty one")
        key, settings = secrets.token_bytes(SECRET_BYTES), Settings(name=name.strip() or folder.name)
        writes = {
            folder / SECRET: lambda path: _write_private(path, key.hex() + "\n"),
            folder / ROSTER: lambda path: path.write_text(",".join(COLUMNS) + "\n", "utf-8"),
            folder / SETTINGS: lambda path: path.write_text(settings.model_dump_json(indent=1) + "\n", "utf-8"),
        }
        try:
            with files.explained(folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # marks are nobody else's business
                for part in FOLDERS:
                    (folder / part).mkdir()
            files.replace_all(writes)
        except BaseException:
            for path in [folder / SETTINGS, folder / ROSTER, folder / SECRET]:
                path.unlink(missing_ok=True)
            for path in [folder / part for part in FOLDERS] + [folder] * new:
                with suppress(OSError):
                    path.rmdir()
            raise
        return cls(folder, settings, {}, key)

    @classmethod
    def open(cls, folder: Path) -> Classroom:
        """Raises GradingError, in one line, for a folder that is no class and for a broken setting, roster or secret."""
        folder = folder.absolute()
        if not (folder / SETTINGS).is_file():
            raise GradingError(f"{folder} is not a class's folder, it has no {SETTINGS}: `labs class init DIR` makes one")
        return cls(folder, Settings.read(folder / SETTINGS), read_roster(folder / ROSTER), _read_secret(folder / SECRET))

    def secret(self, *parts: str) -> bytes:
        """32 bytes that only this class knows, another for each list of parts: HMAC-SHA256 over the parts, joined by "/"."""
        if any("/" in part for part in parts):
            raise ValueError(f"no part may hold '/', got {parts}")
        return hmac.digest(self.key, "/".join(parts).encode(), hashlib.sha256)

    def folder_of(self, kind: str, lab: int) -> Path:
        """Of one lab; `kind`: "release", "collected", "results", "overrides" or "feedback". It need not be there."""
        return self.folder / kind / f"{lab:02d}"

    def release(self, lab: int) -> Release:
        """Raises GradingError where the lab was not handed out."""
        path = self.folder_of("release", lab) / "release.json"
        if not path.is_file():
            raise GradingError(f"lab {lab:02d} has not been released in this class: `labs release {lab:02d}` does it")
        return Release.read(path)

    def released_labs(self) -> list[int]:
        return sorted(int(path.parent.name) for path in self.folder.glob("release/[0-9][0-9]/release.json"))

    def collected(self, lab: int) -> list[Collected]:
        """What was handed in, by learner and time."""
        found = [Collected.read(path) for path in _records(self.folder_of("collected", lab))]
        return sorted(found, key=lambda one: (one.learner, one.handed_in, one.sha256))

    def notebook_path(self, collected: Collected) -> Path:
        return self.folder / collected.file

    def result_path(self, collected: Collected) -> Path:
        return self.folder_of("results", collected.lab) / collected.learner / f"{collected.sha256}.json"

    def results(self, lab: int) -> Iterator[Result]:
        """Raises GradingError for a file that is damaged."""
        for path in _records(self.folder_of("results", lab)):
            try:
                yield Result.read(path)
            except GradingError as error:
                raise GradingError(f"{error}. `labs grade {lab:02d}` makes it anew") from None

    def overrides(self, lab: int) -> list[Override]:
        return [Override.read(path) for path in sorted(self.folder_of("overrides", lab).glob("[!.]*.json"))]

    def override_path(self, override: Override) -> Path:
        return self.folder_of("overrides", override.lab) / f"{override.learner}-{override.exercise}.json"


def _records(folder: Path) -> list[Path]:
    """Temporary files begin with a dot."""
    return sorted(folder.glob("[!.]*/[!.]*.json"))


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)


def _read_secret(path: Path) -> bytes:
    try:
        text = path.read_text("ascii").strip()
        key = bytes.fromhex(text)
        if path.stat().st_mode & 0o077:  # copies, unpacked archives and checkouts are open to everybody
            with suppress(OSError):
                path.chmod(0o600)
    except FileNotFoundError:
        raise GradingError(
            f"{path} is missing: without it inputs and numbers of this class cannot be made again; restore it"
        ) from None
    except (OSError, ValueError):
        key = b""
    if len(key) != SECRET_BYTES:
        raise GradingError(f"{path} is damaged, wanted {2 * SECRET_BYTES} hexadecimal digits: restore it from a copy")
    return key


def read_roster(path: Path) -> dict[str, Learner]:
    """Learners by id. A table with a header and at least the column `learner`, as spreadsheets write it.

    Separated by commas, semicolons or tabs; UTF-8 or UTF-16; other columns are left alone. An empty roster is a class without
    learners yet. Raises GradingError naming the line, the field and what is wanted.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise GradingError(f"{path} is missing: a table with the columns {','.join(COLUMNS)}") from None
    except OSError as error:
        raise GradingError(f"{path} cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise GradingError(f"{path}, line {line}: it is not UTF-8. Save it as CSV with the encoding UTF-8") from None
    if not text.strip():
        raise GradingError(f"{path} is empty, wanted a first line with the columns {','.join(COLUMNS)}")
    first = next(line for line in text.splitlines() if line.strip())
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    header: list[str] | None = None
    roster: dict[str, Learner] = {}
    seen: dict[str, int] = {}
    try:
        for row in reader:
            cells = [" ".join(cell.split()) for cell in row]
            if not any(cells):
                continue
            if header is None:
                header = [cell.lower() for cell in cells]
                _check_header(path, reader.line_num, header)
                continue
            fields = dict(zip(header, cells, strict=False))
            learner = Learner(*(fields.get(column, "") for column in COLUMNS))
            _check_learner(f"{path}, line {reader.line_num}", learner, seen, reader.line_num)
            roster[learner.id] = learner
    except csv.Error as error:
        raise GradingError(f"{path}, line {reader.line_num}: {error}. Wanted columns {','.join(COLUMNS)}") from None
    return roster


def _check_header(path: Path, line: int, header: list[str]) -> None:
    if "learner" not in header:
        raise GradingError(f"{path}, line {line}: wanted the columns {','.join(COLUMNS)}, got {','.join(header)[:80]!r}")
    if twice := [column for column in COLUMNS if header.count(column) > 1]:
        raise GradingError(f"{path}, line {line}: the column {twice[0]} is there twice")


def _check_learner(where: str, learner: Learner, seen: dict[str, int], line: int) -> None:
    """seen: line of each id and address so far, in small letters: names that differ in case alone are one file on many disks."""
    if not LEARNER.fullmatch(learner.id) or WINDOWS.match(learner.id):
        wanted = "up to 64 letters a-z, digits and . _ - @, a letter or digit first and no dot at the end"
        raise GradingError(f"{where}: learner is {learner.id[:80]!r}, wanted {wanted}")
    if learner.email and not EMAIL.fullmatch(learner.email):
        raise GradingError(f"{where}: email is {learner.email[:80]!r}, wanted an address such as a@b.org, or nothing")
    if any(not character.isprintable() for character in learner.name + learner.email):
        raise GradingError(f"{where}: a control character in the name or email of {learner.id}")
    for column, value in (("learner", learner.id), ("email", learner.email)):
        key = f"{column} {value.lower()}"
        if value and key in seen:
            raise GradingError(f"{where}: {column} {value!r} is in line {seen[key]} already")
        seen[key] = line
