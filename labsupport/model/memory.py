"""Memory: how much of it this process may take, and how what is freed is given back to the system.

A container has less than its machine: a cgroup limits it, and the kernel ends what goes beyond, without a word.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

GIB = 2**30
A_NOTEBOOK = 1.5 * GIB  # bytes: what the largest notebook takes
M_MMAP_THRESHOLD = -3  # malloc.h of glibc
# The files of a cgroup: its limit, what it holds, and in memory.stat what of that is cached files, which make room when asked.
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


class Memory(NamedTuple):
    """Bytes. total: of the machine, or of the container that this process is in. free: what may still be taken, at most.

    limited: whether a container's limit is below what the machine has.
    """

    total: int
    free: int
    limited: bool = False

    def __str__(self) -> str:
        whose = "that this container may take" if self.limited else "of this machine"
        return f"{self.free / GIB:.1f} GiB free of the {self.total / GIB:.1f} {whose}"

    @property
    def todo(self) -> str:
        """What to do where a notebook may not fit, "" where it does. What this process holds counts as free: it may be a kernel."""
        import psutil

        if self.free + psutil.Process().memory_info().rss >= A_NOTEBOOK:
            return ""
        more = "give the container more memory" if self.limited else "close other programs"
        return f"a notebook takes up to {A_NOTEBOOK / GIB:.1f} GiB, and with less its kernel may die without a word: {more}"


def here(root: Path = Path("/")) -> Memory:
    """The memory that this process can have. root: where the system's files lie (/proc, /sys)."""
    import psutil

    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for limit, used in _cgroups(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return Memory(total, free, total < machine.total)


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each cgroup around this process that has a limit; nothing where there are no cgroups."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, names = (root / "sys/fs/cgroup/memory", VERSION_1) if controllers else (root / "sys/fs/cgroup", VERSION_2)
            inside = top / path.strip("/")
            # In a container without a cgroup namespace the path is the machine's, and its own group lies at the top.
            for folder in (inside, *inside.parents):
                with suppress(OSError, ValueError):  # "max", or a file that is not there: no limit
                    yield _limit_and_use(folder, *names)
                if folder == top:
                    break


def _limit_and_use(folder: Path, limit: str, use: str, cached: str) -> tuple[int, int]:
    most, held = (int((folder / name).read_text("utf-8")) for name in (limit, use))
    stat = dict(line.split() for line in (folder / "memory.stat").read_text("utf-8").splitlines())
    return most, held - int(stat.get(cached, 0))


def warning() -> str:
    """A sentence where a notebook may not fit, "" where it does."""
    memory = here()
    return f"Memory is short: {memory}. {memory.todo[0].upper()}{memory.todo[1:]}." if memory.todo else ""


def return_freed(least: int) -> None:
    """Have glibc give back what is freed, if it has `least` bytes or more. Otherwise it keeps some, a little more each time."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, least)
