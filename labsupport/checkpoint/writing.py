"""Files that appear whole or not at all, and what a system says against them in one line."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from labsupport.checkpoint.weights import CheckpointError


class WriteError(CheckpointError):
    """What is to be written cannot be, for now: what is finished is worth keeping."""


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What the operating system says of a file as a CheckpointError; a full disk in words of its own."""
    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise _full(path) from error
        raise WriteError(f"{path} cannot be written: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path) from error
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error


def _full(path: Path) -> WriteError:
    return WriteError(f"the disk is full: {path.name} could not be written. Make room and run again; finished blocks are kept")


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let a file appear whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with told(path):
        try:
            write(temporary)
            with temporary.open("r+b") as stream:  # Windows flushes only what may be written
                os.fsync(stream.fileno())
            temporary.chmod(0o644)  # safetensors makes files that only their owner may read
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A file of tensors, by name."""
    replace(
        path,
        lambda temporary: save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, {"format": "pt"}),
    )


def lock(path: Path):
    """Held until the process ends. None where the system has no such locks. Raises CheckpointError where another holds it."""
    path.touch()
    try:
        import fcntl
    except ImportError:
        return None
    stream = path.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise CheckpointError(f"another run is writing to {path.parent.parent}") from None
    return stream


def remove(folder: Path) -> None:
    """With all that is in it."""
    with told(folder):
        shutil.rmtree(folder)
