"""Looking on while a command runs: its time, the end of what it says, and what only counting can limit."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from labsupport.grading.records import GradingError
from labsupport.grading.sandbox import Ended, Limits, Why

EVERY = 0.05  # seconds between two looks: two processors fill some 200 MB of memory in this time
SAID = 2000  # characters kept of what it says
DEPTH = 8  # of folders in /out


class Tail:
    """The end of what a pipe says. The pipe is always read, so that it never fills."""

    def __init__(self, stream: IO[bytes]):
        self.content = b""
        self.stream = stream
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        while more := os.read(self.stream.fileno(), 65536):
            self.content = (self.content + more)[-4 * SAID :]  # a character has up to four bytes

    def text(self) -> str:
        """To be called when the writers are dead. One that got away does not hold us up."""
        self.thread.join(1)
        if not self.thread.is_alive():
            self.stream.close()
        return self.content.decode("utf-8", "replace")[-SAID:]


def follow(
    process: subprocess.Popen[bytes], tail: Tail, limits: Limits, began: float, over: Callable[[], Why], end: Callable[[], None]
) -> Ended:
    """Wait for a process, and end it where a limit is passed.

    over: what was passed, "" for nothing. end: kills all that belongs to it; always called, also when this is interrupted.
    began: by time.monotonic().
    """
    why: Why = ""
    try:
        while not why:
            with suppress(subprocess.TimeoutExpired):
                process.wait(EVERY)
                break
            why = "time" if time.monotonic() - began > limits.notebook_seconds else over()
    finally:
        end()
        process.wait()
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    why = why or over()  # what it filled last, before it ended itself
    return Ended(None if why else code, why, time.monotonic() - began, tail.text())


def space(folder: int, limits: Limits) -> Why:
    """Whether the small file system that an open directory lies in is full. Files without a name count as well."""
    state = os.statvfs(folder)
    return "output" if not state.f_bfree or state.f_files - state.f_ffree > limits.output_files else ""


def memory(processes: int, limits: Limits) -> Why:
    """Whether the processes of an open /proc are too many, or have too much memory together.

    What the kernel's quick counts show is an upper bound: memory shared after a fork counts once for each process. Where the
    bound is passed, the slow count decides, which divides what is shared.
    """
    numbers = [name for name in os.listdir(processes) if name.isdecimal()]
    if len(numbers) > limits.processes + 2:  # and the sandbox's own
        return "killed"
    if sum(_kilobytes(processes, name, "status", r"Rss(?:Anon|Shmem)") for name in numbers) * 1024 <= limits.memory_bytes:
        return ""
    exact = sum(_kilobytes(processes, name, "smaps_rollup", r"Pss_(?:Anon|Shmem)") for name in numbers)
    return "memory" if exact * 1024 > limits.memory_bytes else ""


def _kilobytes(processes: int, name: str, file: str, field: str) -> int:
    with suppress(OSError):  # it has ended meanwhile
        descriptor = os.open(f"{name}/{file}", os.O_RDONLY, dir_fd=processes)
        with open(descriptor, encoding="ascii", errors="replace") as stream:
            return sum(int(found) for found in re.findall(rf"(?m)^{field}:\s+(\d+) kB", stream.read()))
    return 0


def files_of(folder: int, depth: int = DEPTH) -> Iterator[tuple[str, os.stat_result]]:
    """Path and state of all in an open directory, links not followed; folders too, before what is in them.

    What was changed first comes first, so that a flood at the end does not displace what was there before.
    """
    found = list[tuple[int, int, str, os.stat_result]]()
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # removed meanwhile
                state = entry.stat(follow_symlinks=False)
                found.append((state.st_ctime_ns, state.st_ino, entry.name, state))  # the clock has steps of milliseconds
    for _, _, name, state in sorted(found):
        try:
            yield name, state
            if not stat.S_ISDIR(state.st_mode) or not depth:
                continue
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
        except OSError:  # removed meanwhile, or closed to everybody
            continue
        try:
            for path, state in files_of(inner, depth - 1):
                yield f"{name}/{path}", state
        finally:
            os.close(inner)


def too_much(folder: Path, limits: Limits) -> Why:
    """For a directory that is not a file system of its own: whether it holds too many files or bytes. Files without a name are
    not seen."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        total = 0
        for count, (_, state) in enumerate(files_of(descriptor), 1):
            total += max(state.st_size, state.st_blocks * 512)
            if count > limits.output_files or total > limits.output_bytes:
                return "output"
        return ""
    finally:
        os.close(descriptor)


def copy_out(source: int, target: Path, limits: Limits) -> Why:
    """Copy the plain files of an open directory into an empty one. Links, pipes and devices stay behind, as does what does not fit.

    A file with holes counts with its length, for the copy has none. Returns "output" if something did not fit.
    """
    left, why = limits.output_bytes, ""
    for count, (path, state) in enumerate(files_of(source)):
        if count >= limits.output_files:
            return "output"
        if stat.S_ISDIR(state.st_mode):
            (target / path).mkdir()
        elif stat.S_ISREG(state.st_mode):
            if state.st_size > left:
                why = "output"
                continue
            left -= state.st_size
            with suppress(PermissionError):  # closed to us as well
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=source)
                try:
                    with open(descriptor, "rb") as stream, (target / path).open("xb") as copy:
                        while block := stream.read(2**20):
                            copy.write(block)
                except OSError as error:
                    raise GradingError(f"{target} cannot be written: {error.strerror}") from None
    return "output" if why else ""
