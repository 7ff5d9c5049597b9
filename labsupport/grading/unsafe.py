"""No sandbox: a plain process with limits, for a teacher who trusts the class, or wrote the submissions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from labsupport.grading import watch
from labsupport.grading.records import GradingError
from labsupport.grading.sandbox import ENVIRONMENT, Ended, Limits, check_call

LAUNCH = Path(__file__).with_name("launch.py")


class Unsafe:
    """Runs with all rights of who marks. Kept: the clock, what the limits of the system keep on one process, and the size of /out
    now and then.

    Not kept: the files of this machine, the network, memory of several processes together, their number, a process that leaves
    its group.
    """

    name = "none"

    def run(self, command: Sequence[str], *, folders: Mapping[str, Path], out: Path, limits: Limits) -> Ended:
        """See `Sandbox.run`. A path inside, at the beginning of an argument, becomes the path outside."""
        check_call(folders, out)
        paths = {**folders, "/out": out}
        settings = {"channel": None, "uid": None, "first_is_ours": False, "rlimits": limits.rlimits()}
        with tempfile.TemporaryDirectory() as temporary:
            environment = {**ENVIRONMENT, "HOME": temporary, "TMPDIR": temporary}
            environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), "/usr/bin", "/bin"))
            program = shutil.which(command[0], path=environment["PATH"]) if command[0] != "python" else sys.executable
            if program is None:
                raise GradingError(f"{command[0]} is not installed")
            translated = [outside(each, paths) for each in command[1:]]
            began = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LAUNCH), json.dumps(settings), program, *translated],
                cwd=temporary, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            assert process.stderr is not None

            def end() -> None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)

            return watch.follow(process, watch.Tail(process.stderr), limits, began, lambda: watch.too_much(out, limits), end)


def outside(argument: str, paths: Mapping[str, Path]) -> str:
    for inside, path in paths.items():
        if argument == inside or argument.startswith(inside + "/"):
            return str(path) + argument[len(inside) :]
    return argument
