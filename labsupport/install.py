"""Make the environment that the course runs in: `python3 labsupport/install.py`. Standard library only.

Creates `.venv` beside this repository's pyproject.toml and installs requirements.lock and the package into it: what a learner
needs, or with `--all` also what tests, graders and the site need. With `--here` everything goes into the Python that runs this
file (Binder, conda, a container). A second run finds its own stamp and does nothing. A virtual environment that is already there is
used as it is and never removed.

Of what the lock names, pip takes only files whose hashes stand there. Two things stand in no lock that serves every machine: the
build of torch for CPUs, which comes from an index of PyTorch's own, and the few packages that other systems and Pythons need in
addition. Both are installed without hashes, in the lock's versions where it has one.

On Linux the build of torch follows the NVIDIA driver that is there. `--torch cpu` or `--torch cuda` chooses it instead, as where an
image is built on a machine without the GPU that it is for; later runs keep to it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)  # the Pythons that requirements.lock can be installed on
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Lists of pyproject.toml: what notebooks and a learner's commands import, and the others. The lock has all of them.
LEARNERS, OTHERS = "lab,fetch,finetune,serve", "dev,hub,cluster,teach,site"
REST = "# Only for those who teach with the course or work on it:"  # the lock's line between the two
# https://docs.nvidia.com/deploy/cuda-compatibility: the oldest driver, by its first number, for each CUDA, by its own.
DRIVER_FOR_CUDA = {11: 450, 12: 525, 13: 580}
PROC_DRIVER = "/proc/driver/nvidia/version"
WSL = "/usr/lib/wsl/lib"  # where Windows keeps its driver for Linux
TORCH_CUDA = 13  # of the lock's torch, as it lies in the package index for Linux
GIB = 2**30
DISK_WANTED = {"cpu": 3 * GIB, "cuda": 8 * GIB}  # what an environment takes, rounded up
STAMP = "labs-installed"
LOG = "labs-install.log"
NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Temporary failure in name resolution"
    r"|Could not find a version|No matching distribution"
)


class InstallError(Exception):
    """One line for the user: what is wrong and what to do."""


def fingerprint(root: Path = ROOT) -> str:
    """SHA-256 over all that decides what gets installed, and where: the lock, pyproject.toml, the repository's place."""
    digest = hashlib.sha256(str(root).encode())
    for name in ("requirements.lock", "pyproject.toml"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def pinned(lock: str, name: str) -> str:
    """The version that the text of a lock file pins `name` at. Raises InstallError without one."""
    found = re.search(rf"^{re.escape(name)}==([^\s;]+)", lock, re.MULTILINE | re.IGNORECASE)
    if not found:
        raise InstallError(f"requirements.lock does not pin {name}: `labs lock` writes it anew")
    return found.group(1)


def without_hashes(lock: str) -> str:
    """The pins of a lock file's text alone: what pip takes for constraints on packages that are found by its resolver."""
    lines = (line.partition(" \\")[0] for line in lock.splitlines() if line and not line.startswith(("#", " ")))
    return "".join(f"{line}\n" for line in lines)


def check_python(version: tuple[int, ...] = sys.version_info[:2], what: str = "this", first: str = "") -> None:
    """Raises InstallError for a Python that the course does not run on. first: what to do before choosing another Python."""
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        raise InstallError(
            f"{what} is Python {version[0]}.{version[1]}, the course runs on Python 3.{OLDEST[1]} to 3.{NEWEST[1]}: {first}"
            "make lab PYTHON=python3.12, or python3.12 labsupport/install.py"
        )


def nvidia_driver() -> int | None:
    """The first number of the NVIDIA driver's version, 0 where there is a driver that does not say it, None without one.

    Looks at files and asks nvidia-smi only, so that it also works before torch is there.
    """
    told, smi = Path(PROC_DRIVER), shutil.which("nvidia-smi", path=os.environ.get("PATH", "") + os.pathsep + WSL)
    text = told.read_text(encoding="utf-8", errors="replace") if told.is_file() else ""
    if not text and smi:
        try:
            asked = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
            text = run_quietly(asked, timeout=20).stdout
        except (OSError, subprocess.TimeoutExpired):
            text = ""
    found = re.search(r"\b(\d{3,4})\.\d+", text)
    if found:
        return int(found.group(1))
    return 0 if told.is_file() or smi or os.path.exists(f"{WSL}/libcuda.so.1") else None


def which_torch(asked: str | None = None, platform: str = sys.platform) -> tuple[str, str]:
    """The build of torch, "cpu" or "cuda", and why. On macOS and Windows the package index has one build, the small one: "cpu".

    asked: what the user chose. Raises InstallError where there is no such build.
    """
    if not platform.startswith("linux"):
        if asked == "cuda":
            raise InstallError(
                "--torch cuda is for Linux, where the package index has it: elsewhere install without it, then PyTorch by its own "
                "instructions, https://pytorch.org/get-started/locally"
            )
        return "cpu", "the only one here"
    driver, wanted = nvidia_driver(), DRIVER_FOR_CUDA[TORCH_CUDA]
    if asked:
        return asked, "as asked for"
    if driver is None:
        return "cpu", "no NVIDIA driver here"
    if 0 < driver < wanted:
        return "cpu", f"the NVIDIA driver here is {driver}, and CUDA {TORCH_CUDA} needs {wanted}: update it for the GPU"
    return "cuda", "there is an NVIDIA driver"


def check_disk(folder: Path, build: str) -> None:
    """Raises InstallError where an environment will not fit into the file system of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < DISK_WANTED[build]:
        raise InstallError(
            f"{folder} has {free / GIB:.1f} GiB free, and the environment takes up to {DISK_WANTED[build] / GIB:.0f}: make room, "
            "or clone the course to another disk"
        )


def get_extra(extra: str) -> str:
    """What to type where a package of this list of pyproject.toml is missing."""
    if not (ROOT / "requirements.lock").is_file():
        return f"pip install 'labsupport[{extra}]'"
    in_venv = Path(sys.prefix) == ROOT / ".venv"
    python = "python" if not in_venv else "py" if os.name == "nt" else "python3"
    return f"`{python} labsupport/install.py{'' if in_venv else ' --here'} --all` in the course's folder"


def venv_python(directory: Path) -> Path:
    return directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(directory: Path) -> Path:
    """The Python of the virtual environment at `directory`, which is created if missing. Raises InstallError."""
    python = venv_python(directory)
    if not directory.exists():
        check_python()
        if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
            raise InstallError(
                f"this Python has no venv module: on Debian or Ubuntu, sudo apt install python3.{sys.version_info[1]}-venv"
            )
        if not os.access(directory.parent, os.W_OK):
            raise InstallError(
                f"{directory.parent} cannot be written to, so no .venv can be made there. Make one elsewhere and install into it: "
                f"python3 -m venv ~/labs; ~/labs/bin/python {shlex.quote(str(Path(__file__).resolve()))} --here; "
                "~/labs/bin/labs lab --dir ~/workbook"
            )
        say(f"creating {directory.name} with Python {sys.version_info[0]}.{sys.version_info[1]}")
        made = run_quietly([sys.executable, "-m", "venv", str(directory)])
        if made.returncode:
            raise InstallError(f"python -m venv failed: {last_line(made.stdout + made.stderr)}")
    try:
        asked = run_quietly([str(python), "-c", "import sys; print(*sys.version_info[:2])"])
        version = tuple(map(int, asked.stdout.split()))
    except (OSError, ValueError):
        version = ()
    if not version:
        raise InstallError(f"{directory} is there but holds no working Python: move it away, then run this again")
    check_python(version, f"the environment {directory}", "move it away, then ")
    return python


def run_quietly(command: list[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout)


def say(line: str) -> None:
    print(f"labs: {line}", flush=True)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no output"])[-1]


def pip(python: Path, log: Path, *arguments: str) -> None:
    """Run pip with its output in `log`, and on a terminal also on one line that overwrites itself. Raises InstallError."""
    options = ["--disable-pip-version-check", "--no-input", "--no-compile", "--progress-bar", "off"]
    command = [str(python), "-m", "pip", "install", *options]
    width = shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else 0
    kept = []
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        for line in process.stdout:
            file.write(line)
            kept.append(line)
            if width > 20:
                print("\r" + f"  {line.strip()}"[:width].ljust(width), end="", flush=True)
    if width > 20:
        print("\r" + " " * width, end="\r", flush=True)
    if process.wait():
        text = "".join(kept)
        if "No space left on device" in text:
            raise InstallError(
                f"the disk is full: an environment takes 3 GB or more, and pip needs room beside it in {tempfile.gettempdir()} "
                f"and in its cache (pip cache dir); make room, then run this again; all of pip's output is in {log}"
            )
        if NO_NETWORK.search(text):
            raise InstallError(
                f"pip found no package index with what is needed ({last_line(text)[:160]}): connect to a network or "
                f"configure a mirror (pip config), then run this again; all of pip's output is in {log}"
            )
        raise InstallError(f"pip failed: {last_line(text)[:300]}; all of its output is in {log}")


def install_torch(python: Path, log: Path, version: str, *options: str) -> None:
    """torch alone, the CPU build if PyTorch's index or pip's own configuration has it, otherwise the plain one."""
    # Few retries, and no dependencies: those are in the lock, and asking an index that does not answer for each takes minutes.
    asked = ["--no-deps", *options, f"torch=={version}"]
    try:
        pip(python, log, *asked, "--retries", "1", "--timeout", "20", "--extra-index-url", CPU_INDEX)
    except InstallError:
        say("PyTorch's own index did not serve; trying pip's configured one")
        pip(python, log, *asked)


def compile_all(python: Path, log: Path) -> None:
    """Bytecode for all that was installed, on all cores: pip would use one, and the first import would wait for it."""
    asked = run_quietly([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    done = run_quietly([str(python), "-m", "compileall", "-q", "-j", "0", asked.stdout.strip(), str(ROOT / "labsupport")])
    with log.open("a", encoding="utf-8") as file:  # packages hold a few files for other Pythons, which do not compile
        file.write(done.stdout + done.stderr)


def part_of(lock: str, everything: bool) -> str:
    """The text of the lock's part that is wanted: all of it, or what learners need."""
    return lock if everything else lock.partition(REST)[0]


def install(python: Path, prefix: Path, torch: str | None = None, everything: bool = False) -> bool:
    """Install what is wanted into the environment of `python`. False if its stamp says that this was done before.

    torch: "cpu" or "cuda" where the user chose. everything: also what only teachers and those who work on the course need. What an
    earlier run was asked for holds on.
    """
    stamp, log = prefix / STAMP, prefix / LOG
    wanted = fingerprint()
    before = [*(stamp.read_text(encoding="utf-8").split() if stamp.is_file() else []), "", "", ""]
    everything = everything or before[2] == "all"
    build, why = (before[1], "as before") if before[1] and not torch else which_torch(torch)
    now = [wanted, build, "all" if everything else "learners"]
    if before[:3] == now:
        return False
    check_writable(prefix)
    if not log.is_file():  # the first time; later ones go on with what is there
        check_disk(prefix, build)
    log.write_text("", encoding="utf-8")
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    version, anew = pinned(lock, "torch"), ["--force-reinstall"] if torch and torch != before[1] else []
    say(f"1/4 torch {version}, {build.upper()} build ({why})")
    if build == "cpu" and sys.platform.startswith("linux"):
        install_torch(python, log, version, *anew)
    elif anew:
        of_torch = re.search(r"^torch==.*?(?=^\S|\Z)", lock, re.MULTILINE | re.DOTALL)
        pip(python, log, "--no-deps", "--require-hashes", *anew, "-r", kept(prefix / "labs-torch.txt", of_torch.group()))
    asked = part_of(lock, everything)
    pins = without_hashes(asked)
    say(f"2/4 {len(pins.splitlines())} packages of requirements.lock: a few minutes the first time")
    pip(python, log, "--no-deps", "--require-hashes", "-r", kept(prefix / "labs-requirements.txt", asked))
    say("3/4 the course's own package, and what it needs on this system alone")
    extras = f"{LEARNERS},{OTHERS}" if everything else LEARNERS
    constraints = kept(prefix / "labs-constraints.txt", without_hashes(lock))
    pip(python, log, "--no-build-isolation", "--constraint", constraints, "-e", f"{ROOT}[{extras}]")
    say("4/4 bytecode, so that the first cell is quick")
    compile_all(python, log)
    os.replace(kept(stamp.with_suffix(".new"), " ".join(now) + "\n"), stamp)
    return True


def kept(path: Path, text: str) -> str:
    """Write a file for pip, and say where it is."""
    path.write_text(text, encoding="utf-8")
    return str(path)


def check_writable(prefix: Path) -> None:
    """Raises InstallError where nothing can be installed, as into a system's own Python."""
    if not os.access(prefix, os.W_OK):
        raise InstallError(
            f"{prefix} cannot be written to: without --here, an environment of its own is made in the course's folder; or make one "
            "(python3 -m venv ~/labs) and run this with its Python"
        )


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the environment that the course runs in.")
    parser.add_argument("--here", action="store_true", help="install into the Python that runs this, without .venv")
    parser.add_argument("--all", action="store_true", help="also what tests, graders and the site need")
    parser.add_argument("--torch", choices=("cpu", "cuda"), help="which build of PyTorch; without it, the NVIDIA driver decides")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a folder's name may have letters that this terminal has not
    start = time.monotonic()
    try:
        if not (ROOT / "requirements.lock").is_file():
            raise InstallError(f"{ROOT} has no requirements.lock: run this from a clone of the course's repository")
        if options.here:
            check_python()
            python, prefix = Path(sys.executable), Path(sys.prefix)
        else:
            prefix = ROOT / ".venv"
            python = make_venv(prefix)
        if install(python, prefix, options.torch, options.all):
            say(f"ready after {time.monotonic() - start:.0f} s")
    except (InstallError, OSError) as error:
        print(f"labs: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nlabs: stopped; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
