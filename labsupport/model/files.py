"""Files and directories that appear under their names whole or not at all.

Each is written under a temporary name in the same folder (hidden, ending in .tmp, never the same twice) and gets its real name when
it is complete. A process that is killed may leave a temporary file behind, never half a file under the real name.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:
    import torch  # what writes notebooks starts without it

SUFFIX = ".tmp"
CACHE = "LABS_CACHE"


def cache_dir() -> Path:
    """Where what can be made again is kept: the directory LABS_CACHE, or else this user's folder for caches."""
    from platformdirs import user_cache_path

    return Path(os.environ.get(CACHE) or user_cache_path("labsupport", appauthor=False))


class WriteError(OSError):
    """A file or directory could not be written. The message is one line that names it. disk_full: whether that is why."""

    def __init__(self, path: Path, reason: str, disk_full: bool = False):
        message = f"the disk is full: {path.name} could not be written" if disk_full else f"{path} cannot be written: {reason}"
        super().__init__(message)
        self.disk_full = disk_full


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Inside, what the operating system or safetensors raises while `path` is being written becomes a WriteError."""
    try:
        yield
    except WriteError:
        raise
    except SafetensorError as error:
        raise WriteError(path, str(error), f"os error {errno.ENOSPC}" in str(error)) from error
    except OSError as error:
        raise WriteError(path, error.strerror or str(error), error.errno in (errno.ENOSPC, errno.EDQUOT)) from error


def temporary_name(path: Path) -> Path:
    """A name in the folder of `path` that nothing has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{SUFFIX}")


def replace_all(writes: Mapping[Path, Callable[[Path], object]], sync: bool = False) -> None:
    """Write several files: none gets its name before all are complete. What had a name before is replaced.

    writes: for each path what writes its content to the path that it is given. sync: the content is on the disk before the file
    has its name, so that a computer that loses power keeps the old file or the new one. Raises WriteError, and what `writes` raise.
    """
    temporary = {path: temporary_name(path) for path in writes}
    try:
        for path, write in writes.items():
            with explained(path):
                write(temporary[path])
                if sync:
                    with temporary[path].open("r+b") as stream:  # Windows flushes only what may be written
                        os.fsync(stream.fileno())
        for path in writes:
            with explained(path):
                os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            with suppress(OSError):  # most often it has its name by now
                path.unlink()


def replace(path: Path, write: Callable[[Path], object], sync: bool = False) -> None:
    """Write one file, see `replace_all`."""
    replace_all({path: write}, sync)


def check_writable(path: Path) -> None:
    """Before work that takes long: make the folder of `path`, and raise WriteError where no file can be written in it."""
    probe = temporary_name(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Write a file of UTF-8 text, see `replace_all`."""
    replace(path, lambda temporary: temporary.write_text(text, "utf-8"), sync)


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, sync: bool = False
) -> None:
    """Write a safetensors file that others may read as well, see `replace_all`. tensors: by name, on any device."""
    from safetensors.torch import save_file

    def write(temporary: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata or {}) or None)
        temporary.chmod(0o644)  # safetensors makes files that only their owner may read

    replace(path, write, sync)


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Inside, an empty directory to fill; afterwards it is `path`, and what `path` was before is removed.

    Where an exception is raised, inside or while names are changed, `path` is what it was before. Raises WriteError.
    """
    new, old = temporary_name(path), temporary_name(path)
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
        yield new
        with explained(path):
            if path.exists():
                os.replace(path, old)
            os.replace(new, path)
            if old.exists():
                shutil.rmtree(old)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        if new.exists():
            shutil.rmtree(new)
