"""A sandbox of bubblewrap: namespaces of its own, a file system that holds what it needs and nothing else, no rights.

What holds it: a network without interfaces but its own loopback; process, IPC, host-name, cgroup and mount namespaces of its own;
/usr, the C library, Python and PACKAGES, read-only; /tmp, /out and /dev/shm small file systems in memory, which are gone with it;
no capability; the filter of seccomp.py; the limits of `Limits.rlimits`; a look at memory, processes and files every 50 ms. When
its first process dies the kernel kills all others.

A fork bomb: RLIMIT_NPROC counts by user, and never for the real root. Started by root, each sandbox therefore gets a user id that
nobody else has, and no user namespace, which could only map back to root. Started by a plain user it has a user namespace, where
Linux counts apart (from 5.14).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path

from labsupport.grading import seccomp, watch
from labsupport.grading.records import GradingError
from labsupport.grading.sandbox import ENVIRONMENT, PACKAGES, Ended, Limits, Why, check_call

LAUNCH = Path(__file__).with_name("launch.py")
REPOSITORY = Path(__file__).resolve().parents[2]
STARTS = 60.0  # seconds until the first program runs, on a cold disk
# User ids for sandboxes that root starts: the first, and how many. They are not given to people or containers.
FIRST_USER, USERS = 1_900_000_000, 100_000_000
ETC = ("ld.so.cache", "alternatives", "localtime")


class Bubblewrap:
    name = "bubblewrap"

    def __init__(self) -> None:
        """Raises GradingError where bubblewrap is missing or cannot run; tried with a short command."""
        if not (program := shutil.which("bwrap")):
            raise GradingError("bwrap is not installed")
        self.program = program
        with tempfile.TemporaryDirectory() as out:
            ended = self.run(
                ["python", "-c", "from importlib.util import find_spec as find; raise SystemExit(not find('torch'))"],
                folders={},
                out=Path(out),
                limits=Limits(),
            )
        if ended.code != 0:
            raise GradingError(f"Python with torch cannot be started in it: {ended.last_line}")

    def run(self, command: Sequence[str], *, folders: Mapping[str, Path], out: Path, limits: Limits) -> Ended:
        """See `Sandbox.run`."""
        check_call(folders, out)
        user = FIRST_USER + secrets.randbelow(USERS) if os.geteuid() == 0 else None
        with ExitStack() as stack:
            if user is not None:
                folders = stack.enter_context(_readable(folders))
            inner, ours = _sockets(stack)
            told, tells = os.pipe()
            info = stack.enter_context(open(told, "rb"))
            files = {"tells": tells, "seccomp": _content(seccomp.program() or b""), "config": _content(_config())}
            options = [
                *_isolation(user, files), *_system(files["config"]), *_writable(limits),
                *(part for inside, folder in folders.items() for part in _shown(inside, folder)),
                "--ro-bind", str(LAUNCH), "/launch.py", "--remount-ro", "/", "--chdir", "/tmp",
            ]  # fmt: skip
            # hundreds of them, which nobody wants to see in a list of processes
            files["options"] = _content("".join(f"{option}\0" for option in options).encode(errors="surrogateescape"))
            settings = {
                "channel": inner.fileno(),
                "uid": user,
                "first_is_ours": user is None,
                "rlimits": limits.rlimits() | {"RLIMIT_NPROC": limits.processes},
            }
            arguments = [
                self.program, "--args", str(files["options"]),
                "--", "/env/bin/python", "-I", "-S", "/launch.py", json.dumps(settings), *command,
            ]  # fmt: skip
            try:
                process = subprocess.Popen(
                    arguments,
                    env=ENVIRONMENT,  # of bwrap too: its own can be read in /proc/1/environ inside
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                    pass_fds=(inner.fileno(), *files.values()),
                )  # fmt: skip
            finally:
                inner.close()
                for descriptor in files.values():
                    os.close(descriptor)
            assert process.stderr is not None
            tail = watch.Tail(process.stderr)
            first = None  # a descriptor of the first process inside: its number may soon be another's
            try:
                ours.settimeout(STARTS)
                _, shown, _, _ = socket.recv_fds(ours, 1, 3)
                for descriptor in shown:
                    stack.callback(os.close, descriptor)
                if len(shown) == 3:
                    first = os.pidfd_open(json.loads(info.read())["child-pid"])
                    stack.callback(os.close, first)
            except (TimeoutError, ProcessLookupError):
                shown = []
            finally:
                if first is None:
                    process.kill()
                    process.wait()
            if first is None:
                raise GradingError(f"bubblewrap could not start: {Ended(None, '', 0.0, tail.text()).last_line}")
            began = time.monotonic()
            output, temporary, processes = shown

            def over() -> Why:
                return watch.space(output, limits) or watch.space(temporary, limits) or watch.memory(processes, limits)

            ended = watch.follow(process, tail, limits, began, over, lambda: _kill(first))
            unfit = watch.copy_out(output, out, limits)
            why = ended.why or unfit
            return Ended(None if why else ended.code, why, ended.seconds, ended.said)


def _isolation(user: int | None, files: Mapping[str, int]) -> list[str]:
    """What it is cut off from."""
    if user is None:
        identity = ["--unshare-user", "--uid", "1000", "--gid", "1000"]
        rights = []
    else:  # root makes the namespaces itself; launch.py becomes the user, which takes both capabilities and leaves none
        identity = []
        rights = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return [
        *identity, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
        "--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL", *rights,
        "--info-fd", str(files["tells"]), *(("--seccomp", str(files["seccomp"])) if seccomp.program() else ()),
    ]  # fmt: skip


@cache
def _layout() -> tuple[str, ...]:
    """The read-only part: system, Python, packages."""
    base, python = Path(sys.base_prefix).resolve(), Path(sys.executable).resolve()
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "nix/store"):
        path = Path("/", name)
        if path.is_symlink():
            arguments += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    for name in ETC:
        arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    if not base.is_relative_to("/usr"):
        arguments += [*_above(base), "--ro-bind", str(base), str(base)]
    roots = {Path("/usr"), base}
    hidden = {
        found for root in roots for place in ("lib", "lib64", "local/lib") for found in (root / place).glob("python*/*-packages")
    }
    hidden |= {REPOSITORY} if any(REPOSITORY.is_relative_to(root) for root in roots) else set()
    for path in sorted(hidden):
        arguments += ["--tmpfs", str(path), "--remount-ro", str(path)]
    site = f"/env/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    arguments += [*_above(Path(site, "package")), *_above(Path("/env/bin/python"))]
    for path in sorted(_packages()):
        arguments += ["--ro-bind", str(path), f"{site}/{path.name}"]
    for name in ("python", "python3", python.name):
        arguments += ["--symlink", str(python), f"/env/bin/{name}"]
    return tuple(arguments)


def _above(path: Path) -> Iterator[str]:
    """Makes the folders above a path. bubblewrap would make them as well, at times for their owner alone."""
    for folder in reversed(path.parents[:-1]):
        yield from ("--perms", "0755", "--dir", str(folder))


def _shown(inside: str, folder: Path) -> list[str]:
    return [*_above(Path(inside)), "--ro-bind", str(folder.resolve()), inside]


def _system(config: int) -> list[str]:
    return [*_layout(), "--perms", "0644", "--ro-bind-data", str(config), "/env/pyvenv.cfg"]


def _writable(limits: Limits) -> list[str]:
    """Small file systems in memory, and what a process needs of /dev and /proc."""
    arguments = ["--proc", "/proc", "--dev", "/dev"]
    for path, size in (("/dev/shm", limits.file_bytes), ("/tmp", limits.output_bytes), ("/out", limits.output_bytes)):
        arguments += ["--perms", "1777", "--size", str(size), "--tmpfs", path]
    return [*arguments, "--remount-ro", "/dev"]


def _config() -> bytes:
    """Makes /env a virtual environment, so that Python finds its packages there and nothing else."""
    return f"home = {Path(sys.executable).resolve().parent}\ninclude-system-site-packages = false\n".encode()


def _packages() -> set[Path]:
    """Files and folders of PACKAGES and of all that they require, by what pip wrote down. What an editable package points to is
    not followed."""
    from packaging.requirements import Requirement

    seen: set[str] = set()
    paths: set[Path] = set()
    to_see = list(PACKAGES)
    while to_see:
        name = re.sub(r"[-_.]+", "-", to_see.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for line in found.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                to_see.append(requirement.name)
        tops = {line.split(",", 1)[0].split("/", 1)[0].strip('"') for line in (found.read_text("RECORD") or "").splitlines()}
        tops = tops or {str(file).split("/", 1)[0] for file in found.files or ()}
        folder = Path(str(found.locate_file("")))
        paths |= {folder / top for top in tops if top and top not in ("..", "__pycache__") and not top.endswith(".pth")}
    return {path for path in paths if path.exists()}


def _sockets(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    inner, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    stack.callback(ours.close)
    return inner, ours


def _content(content: bytes) -> int:
    """A descriptor from which `content` is read."""
    descriptor = os.memfd_create("sandbox")
    with open(descriptor, "wb", closefd=False) as stream:
        stream.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


@contextmanager
def _readable(folders: Mapping[str, Path]) -> Iterator[Mapping[str, Path]]:
    """The folders, or copies of them, so that every user may read them: inside nobody is their owner. Only root may look into the
    copies' parent."""
    with tempfile.TemporaryDirectory() as private:
        result = {}
        for number, (inside, folder) in enumerate(folders.items()):
            paths = [folder, *folder.rglob("*")]
            if not all(path.stat().st_mode & (0o001 if path.is_dir() else 0o004) for path in paths):
                folder = Path(shutil.copytree(folder, Path(private, str(number))))
                for path in [folder, *folder.rglob("*")]:
                    path.chmod(0o755 if path.is_dir() else 0o644)
            result[inside] = folder
        yield result


def _kill(first: int) -> None:
    """End the first process inside, and with it all others; come back when they are gone."""
    try:
        signal.pidfd_send_signal(first, signal.SIGKILL)
    except ProcessLookupError:
        return
    gone = select.poll()
    gone.register(first, select.POLLIN)
    if not gone.poll(10_000):
        raise GradingError("a process in the sandbox cannot be ended: the kernel holds it")
