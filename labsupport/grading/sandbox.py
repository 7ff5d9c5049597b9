"""Where code that somebody handed in may run: its limits, how it ended, and which sandbox this machine has.

A sandbox runs one command. It sees Python, the packages of PACKAGES, the folders it is given (read-only), a small /tmp and /out.
What is left in /out when it ends, however it ends, is then in a directory outside: plain files alone. The module of each kind
says what holds it.
"""

from __future__ import annotations

import math
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field

from labsupport.grading.records import GradingError, Record

# What is imported inside, with what each needs: not what an environment happens to hold, for many a package holds the answers.
PACKAGES = ("torch", "numpy", "safetensors", "tqdm", "transformers", "matplotlib")
ENVIRONMENT = {
    "PATH": "/env/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LOGNAME": "learner",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "MPLBACKEND": "agg",
}
Why = Literal["", "time", "memory", "output", "killed"]


class Limits(Record):
    """How much one submission may use.

    answer_seconds: of one answer on one input; who runs answers keeps it. notebook_seconds: of the whole command, by the wall
    clock. memory_bytes: of all its processes together, and what one may ask for. file_bytes: of one file. output_bytes,
    output_files: of all that lies in /out, and again in /tmp; both are in memory, beside memory_bytes. processes: at the same
    time, threads counted.
    """

    answer_seconds: float = Field(default=20.0, gt=0)
    notebook_seconds: float = Field(default=180.0, gt=0)
    memory_bytes: int = Field(default=2 * 2**30, gt=0)
    file_bytes: int = Field(default=64 * 2**20, gt=0)
    output_bytes: int = Field(default=256 * 2**20, gt=0)
    output_files: int = Field(default=2000, gt=0)
    processes: int = Field(default=64, gt=0)

    @property
    def cpu_seconds(self) -> int:
        """Of one process. Its threads add up, but with OMP_NUM_THREADS=1 an honest one hardly uses more than the wall clock
        shows."""
        return math.ceil(self.notebook_seconds) + 1

    def rlimits(self) -> dict[str, int]:
        """By the names of the module `resource`. RLIMIT_DATA is what a process writes to; RLIMIT_AS leaves room for the code of
        torch."""
        return {
            "RLIMIT_CORE": 0,
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": 256,
            "RLIMIT_DATA": self.memory_bytes,
            "RLIMIT_AS": self.memory_bytes + 16 * 2**30,
        }


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: its exit status, more than 128 for a signal; None where the sandbox ended it, and `why` says for
    what.

    why: "time", "memory", "output" (bytes or files), "killed" (too many processes). seconds: wall clock. said: the last 2000
    characters of stderr.
    """

    code: int | None
    why: Why
    seconds: float
    said: str

    @property
    def last_line(self) -> str:
        """Of what was said."""
        return (self.said.strip().splitlines() or ["it said nothing"])[-1]


class Sandbox(Protocol):
    name: str

    def run(self, command: Sequence[str], *, folders: Mapping[str, Path], out: Path, limits: Limits) -> Ended:
        """Run `command` and come back when none of its processes is left.

        command: "python" is the sandbox's Python. A path in it is written as it is inside, and stands at the beginning of an
        argument. folders: directories to read, by the path that each has inside ("/bench"). out: an empty directory; what the
        command leaves in /out is there afterwards. Raises GradingError where the machine, not the command, is at fault.
        """
        ...


def find(kind: str = "auto", unsafe: bool = False) -> Sandbox:
    """The best sandbox that works here, tried out. kind: "auto", "bubblewrap" or "docker". unsafe: where none works, none.

    Raises GradingError: none works, why, and what to install.
    """
    if sys.platform == "win32":
        raise GradingError("submissions cannot be run on Windows itself: use the Linux that Windows offers (WSL)")
    from labsupport.grading.bubblewrap import Bubblewrap
    from labsupport.grading.docker import Docker
    from labsupport.grading.unsafe import Unsafe

    kinds: dict[str, Callable[[], Sandbox]] = {"bubblewrap": Bubblewrap, "docker": Docker}
    if kind not in ("auto", *kinds):
        raise GradingError(f"sandbox {kind!r} is not known: auto, bubblewrap or docker")
    reasons = []
    for name, make in kinds.items():
        if kind in ("auto", name):
            try:
                return make()
            except GradingError as error:
                reasons.append(f"{name}: {error}")
    if unsafe:
        return Unsafe()
    raise GradingError(
        f"no sandbox works here ({'; '.join(reasons)}). Install bubblewrap (apt install bubblewrap, "
        "dnf install bubblewrap) or start Docker. "
        "--unsafe runs what was handed in with all your rights"
    )


def check_call(folders: Mapping[str, Path], out: Path) -> None:
    """What every sandbox wants of `Sandbox.run`. Raises GradingError."""
    if any(out.iterdir()):
        raise GradingError(f"{out} must be empty")
    for inside, folder in folders.items():
        if not folder.is_dir():
            raise GradingError(f"{folder}, to be seen as {inside}, is not a directory")


def regular(path: Path, limit: int) -> bytes:
    """The content of a file that hostile code may have left. Raises GradingError: no plain file (a link, a pipe, a device), or
    more than `limit` bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise GradingError(f"{path.name} cannot be read as a plain file: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise GradingError(f"{path.name} is not a plain file")
    with open(descriptor, "rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise GradingError(f"{path.name} has more than {limit} bytes")
    return content
