"""A sandbox of Docker, where bubblewrap cannot run. Untested: written where no daemon was at hand; its command line is tested as
data.

What holds it is Docker: a container without network and capabilities, read-only, with limits of cgroups on memory and processes.
/out is a directory of this machine, so what holds its size is the size of one file and a look every 50 ms, which does not see
files without a name.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from labsupport.grading import watch
from labsupport.grading.records import GradingError
from labsupport.grading.sandbox import ENVIRONMENT, PACKAGES, Ended, Limits, check_call


class Docker:
    name = "docker"

    def __init__(self) -> None:
        """Raises GradingError: no docker, no daemon, or no image; how to make the image stands in it."""
        if not (program := shutil.which("docker")):
            raise GradingError("docker is not installed")
        self.program = program
        if _ask([program, "version", "--format", "{{.Server.Version}}"]).returncode:
            raise GradingError("no Docker daemon answers")
        if _ask([program, "image", "inspect", image()]).returncode:
            raise GradingError(f"there is no image {image()}; make it: printf '{dockerfile()}' | docker build -t {image()} -")

    def run(self, command: Sequence[str], *, folders: Mapping[str, Path], out: Path, limits: Limits) -> Ended:
        """See `Sandbox.run`."""
        check_call(folders, out)
        name = f"labs-{secrets.token_hex(8)}"
        with tempfile.TemporaryDirectory() as private:  # others on this machine cannot reach the directory that all may write
            target = Path(private, "out")
            target.mkdir()
            target.chmod(0o777)
            began = time.monotonic()
            process = subprocess.Popen(
                [self.program, *arguments(name, command, folders, target, limits)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            assert process.stderr is not None
            tail = watch.Tail(process.stderr)
            ended = watch.follow(
                process,
                tail,
                limits,
                began,
                lambda: watch.too_much(target, limits),
                lambda: void(_ask([self.program, "rm", "-f", name])),
            )
            if ended.code == 125:  # Docker's own failure, not the command's
                raise GradingError(f"docker run failed: {ended.last_line}")
            source = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
            try:
                unfit = watch.copy_out(source, out, limits)
            finally:
                os.close(source)
            why = ended.why or unfit
            return Ended(None if why else ended.code, why, ended.seconds, ended.said)


def arguments(name: str, command: Sequence[str], folders: Mapping[str, Path], out: Path, limits: Limits) -> list[str]:
    """Of `docker`, for one run."""
    soft = limits.rlimits()
    ulimits = {"core": 0, "cpu": soft["RLIMIT_CPU"], "fsize": soft["RLIMIT_FSIZE"], "nofile": soft["RLIMIT_NOFILE"]}
    shown = (f"type=bind,source={folder.resolve()},target={inside},readonly" for inside, folder in folders.items())
    space = f"size={limits.output_bytes},nr_inodes={limits.output_files}"
    return [
        "run", "--rm", "--init", "--name", name, "--pull", "never", "--log-driver", "none", "--hostname", "sandbox",
        "--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--ipc", "private",
        "--user", "65534:65534", "--pids-limit", str(limits.processes), "--cpus", "1",
        "--memory", str(limits.memory_bytes), "--memory-swap", str(limits.memory_bytes), "--shm-size", str(limits.file_bytes),
        *(part for key, value in ulimits.items() for part in ("--ulimit", f"{key}={value}:{value}")),
        "--tmpfs", f"/tmp:rw,nosuid,nodev,{space},mode=1777", "--workdir", "/tmp",
        *(part for key, value in ENVIRONMENT.items() if key != "PATH" for part in ("--env", f"{key}={value}")),
        *(part for each in shown for part in ("--mount", each)),
        "--mount", f"type=bind,source={out.resolve()},target=/out",
        image(), *command,
    ]  # fmt: skip


def image() -> str:
    return f"labs-sandbox:python{sys.version_info.major}.{sys.version_info.minor}-torch{metadata.version('torch').split('+')[0]}"


def dockerfile() -> str:
    """Of the image: Python and PACKAGES in the versions that are here."""
    wanted = " ".join(f"{name}=={metadata.version(name).split('+')[0]}" for name in PACKAGES)
    return f"FROM python:{sys.version_info.major}.{sys.version_info.minor}-slim\\nRUN pip install --no-cache-dir {wanted}\\n"


def void(_: object) -> None:
    """For a callback whose result nobody needs."""


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
