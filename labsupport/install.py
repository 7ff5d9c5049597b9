"""Make the environment that the course runs in: `python3 labsupport/install.py`. Standard library only.

Creates `.venv` beside this repository's pyproject.toml and installs requirements.lock and the package into it. With `--here`
everything goes into the Python that runs this file (Binder, conda). A second run finds its own stamp and does nothing.
A virtual environment that is already there is used as it is and never removed. `--missing` is for a Python that has most of it
already and whose other programs rely on that (Colab): only what is missing is added, and torch, for one, is never replaced.

Of what the lock names, pip takes only files whose hashes stand there. Two things stand in no lock that serves every machine: the
build of torch for CPUs, which comes from an index of PyTorch's own, and the few packages that other systems and Pythons need in
addition. Both are installed without hashes, in the lock's versions where it has one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)  # the Pythons that requirements.lock can be installed on
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = "lab,dev,fetch,finetune,hub,serve,cluster,teach,site"  # of pyproject.toml, all of which the lock holds
STAMP = "labs-installed"
LOG = "labs-install.log"
KEPT = ("torch", "triton", "numpy", "ipywidgets")  # what `--missing` never replaces: other programs there are built on them
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


def has_nvidia_driver() -> bool:
    """Whether a CUDA build of torch would find a driver. Looks at files only, so that it also works before torch is there."""
    places = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1")
    return any(os.path.exists(p) for p in places) or shutil.which("nvidia-smi") is not None


def wants_cpu_build(platform: str = sys.platform) -> bool:
    """On Linux the plain torch carries gigabytes of CUDA libraries; elsewhere the plain one is already the small one."""
    return platform.startswith("linux") and not has_nvidia_driver()


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
        say(f"creating {directory.name} with Python {sys.version_info[0]}.{sys.version_info[1]}")
        made = subprocess.run([sys.executable, "-m", "venv", str(directory)], capture_output=True, text=True)
        if made.returncode:
            raise InstallError(f"python -m venv failed: {last_line(made.stdout + made.stderr)}")
    code = "import sys; print(*sys.version_info[:2])"
    try:
        asked = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
        version = tuple(map(int, asked.stdout.split()))
    except (OSError, ValueError):
        version = ()
    if not version:
        raise InstallError(f"{directory} is there but holds no working Python: move it away, then run this again")
    check_python(version, f"the environment {directory}", "move it away, then ")
    return python


def say(line: str) -> None:
    print(f"labs: {line}", flush=True)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no output"])[-1]


def pip(python: Path, log: Path, *arguments: str) -> None:
    """Run pip with its output in `log`, and on a terminal also on one line that overwrites itself. Raises InstallError."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    width = shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else 0
    kept = []
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT
        )
        for line in process.stdout:
            file.write(line)
            kept.append(line)
            if width > 20:
                print("\r" + f"  {line.strip()}"[:width].ljust(width), end="", flush=True)
    if width > 20:
        print("\r" + " " * width, end="\r", flush=True)
    if process.wait():
        text = "".join(kept)
        if NO_NETWORK.search(text):
            raise InstallError(
                f"pip found no package index with what is needed ({last_line(text)[:160]}): connect to a network or "
                f"configure a mirror (pip config), then run this again; all of pip's output is in {log}"
            )
        raise InstallError(f"pip failed: {last_line(text)[:300]}; all of its output is in {log}")


def install_torch(python: Path, log: Path, version: str) -> None:
    """torch alone, the CPU build if PyTorch's index or pip's own configuration has it, otherwise the plain one."""
    # Few retries, and no dependencies: those are in the lock, and asking an index that does not answer for each takes minutes.
    asked = ["--no-deps", f"torch=={version}"]
    try:
        pip(python, log, *asked, "--retries", "1", "--timeout", "20", "--extra-index-url", CPU_INDEX)
    except InstallError:
        say("PyTorch's own index did not serve; trying pip's configured one")
        pip(python, log, *asked)


def install(python: Path, prefix: Path) -> bool:
    """Install everything into the environment of `python`. False if its stamp says that this was done before."""
    stamp = prefix / STAMP
    wanted = fingerprint()
    if stamp.is_file() and stamp.read_text().strip() == wanted:
        return False
    log = prefix / LOG
    log.write_text("", encoding="utf-8")
    lock = ROOT / "requirements.lock"
    pins = without_hashes(lock.read_text())
    if wants_cpu_build():
        version = pinned(pins, "torch")
        say(f"1/3 torch {version}, CPU build (no NVIDIA driver here)")
        install_torch(python, log, version)
    else:
        say("1/3 torch comes with the rest")
    say(f"2/3 {len(pins.splitlines())} packages of requirements.lock: a few minutes the first time")
    pip(python, log, "--no-deps", "--require-hashes", "-r", str(lock))
    say("3/3 the course's own package, and what it needs on this system alone")
    constraints = prefix / "labs-constraints.txt"
    constraints.write_text(pins, encoding="utf-8")
    pip(python, log, "--no-build-isolation", "--constraint", str(constraints), "-e", f"{ROOT}[{EXTRAS}]")
    waiting = stamp.with_suffix(".new")
    waiting.write_text(wanted + "\n")
    os.replace(waiting, stamp)
    return True


def canonical(name: str) -> str:
    """The name of a distribution as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parsed(requirement: str) -> tuple[str, str]:
    """Canonical name and range of a requirement: ("triton", ">=3.4"). The range is None if its marker says: not on this system."""
    found = re.match(r"(\w[\w.-]*)\s*(?:\[[^]]*\])?\s*\(?([^;)]*)\)?\s*(?:;\s*(.*))?$", requirement.strip())
    if not found:
        raise InstallError(f"{requirement!r} is not a requirement that labsupport/install.py can read")
    name, wanted, marker = found.groups()
    system = re.fullmatch(r"""sys_platform == ['"](\w+)['"]""", marker or "")
    return canonical(name), None if system and system.group(1) != sys.platform else wanted.replace(" ", "")


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version lies in a range like ">=7.7,<9". Only the numbers of the release count, not what follows, as +cu128."""

    def numbers(text: str) -> list[int]:
        release = [int(n) for n in re.match(r"\d*(?:\.\d+)*", text).group().split(".") if n]
        return release + [0] * (8 - len(release))

    compare = {"<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}
    compare.update({"==": lambda a, b: a == b, "!=": lambda a, b: a != b})
    for part in filter(None, wanted.split(",")):
        found = re.fullmatch(r"(<=|>=|==|!=|<|>)(\d[\w.]*)", part)
        if not found:
            raise InstallError(f"{part!r} is not a range that labsupport/install.py can read: it knows < <= > >= == and !=")
        if not compare[found.group(1)](numbers(version), numbers(found.group(2))):
            return False
    return True


def stays(installed: dict[str, str], wanted: list[str], asks: dict[str, list[str]]) -> dict[str, str]:
    """Which of the `installed` distributions, name to version, must stay as they are so that `wanted` can be added.

    All but those out of range, and what those ask for, by `asks`, and so on: pip may move that to where the new versions want it.
    Of these, KEPT stay nevertheless. Raises InstallError if one of KEPT is out of range.
    """
    free = set()
    for requirement in wanted:
        name, needed = parsed(requirement)
        if needed is None or name not in installed or satisfies(installed[name], needed):
            continue
        if name in KEPT:
            raise InstallError(
                f"{name} {installed[name]} is installed here, the course needs {requirement.split(';')[0].strip()}, and it is not "
                "replaced, since other programs here rely on it: choose a newer runtime (Colab: Runtime, Change runtime type)"
            )
        free.add(name)
    waiting = list(free)
    while waiting:
        found = {parsed(requirement)[0] for requirement in asks.get(waiting.pop(), []) if "extra ==" not in requirement}
        waiting += found - free
        free |= found
    return {name: version for name, version in installed.items() if name in KEPT or name not in free}


def install_missing() -> None:
    """Install the course from this clone into the Python that runs this, with what it needs and that is missing or too old.

    pip must keep everything else at the version that is there. Afterwards `import labsupport` works, in the running process too.
    Raises InstallError.
    """
    from importlib import invalidate_caches

    check_python()
    start, log = time.monotonic(), Path(tempfile.mkdtemp(prefix="labs-")) / LOG
    before, asks = _installed()
    constraints = log.with_name("labs-constraints.txt")
    wanted = _core(ROOT / "pyproject.toml")
    kept = stays(before, wanted, asks)
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in kept.items()), encoding="utf-8")
    say("installing the course and what is missing here: about a minute")
    try:
        pip(Path(sys.executable), log, "--constraint", str(constraints), "-e", str(ROOT))
    except InstallError as error:
        raise _conflict(log.read_text(encoding="utf-8")) or error from None
    invalidate_caches()
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # a running Python does not look for what pip adds to its path
    after, _ = _installed()
    moved = {name: version for name, version in after.items() if before.get(name) not in (None, version)}
    added = [f"{name} {version}" for name, version in after.items() if name not in before]
    say(f"ready after {time.monotonic() - start:.0f} s; added {', '.join(added) or 'nothing'}")
    if moved:
        say(f"replaced, as too old: {', '.join(f'{name} {before[name]} by {version}' for name, version in moved.items())}")
    loaded = [name for name, _ in map(parsed, wanted) if name in moved and name.replace("-", "_") in sys.modules]
    if loaded:
        raise InstallError(f"{', '.join(loaded)} had been imported before: restart the runtime, then run the notebook from the top")


def _installed() -> tuple[dict[str, str], dict[str, list[str]]]:
    """The distributions that this Python finds: name to version, and name to what it asks for."""
    from importlib import metadata

    versions, asks = {}, {}
    for found in metadata.distributions():
        name, version = canonical(found.metadata["Name"] or ""), found.metadata["Version"] or ""
        # Where two folders hold one, the first is imported. What pip cannot read as a version it cannot keep either.
        if name not in versions and re.fullmatch(r"\d[\w.!]*(\+[\w.]+)?", version):
            versions[name], asks[name] = version, found.requires or []
    return versions, asks


def _core(pyproject: Path) -> list[str]:
    import tomllib

    return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]


def _conflict(text: str) -> InstallError | None:
    """What pip says of packages that do not go together, without the advice that follows it."""
    found = re.search(r"The conflict is caused by:\n(.*?)\n\s*\n", text, re.DOTALL)
    if not found:
        return None
    causes = "; ".join(" ".join(line.split()) for line in found.group(1).splitlines())
    return InstallError(f"what is installed here and what the course needs do not go together: {causes}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the environment that the course runs in.")
    parser.add_argument("--here", action="store_true", help="install into the Python that runs this, without .venv")
    parser.add_argument("--missing", action="store_true", help="add to the Python that runs this only what is missing (Colab)")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        if not (ROOT / "requirements.lock").is_file():
            raise InstallError(f"{ROOT} has no requirements.lock: run this from a clone of the course's repository")
        if options.missing:
            install_missing()
            return 0
        if options.here:
            check_python()
            python, prefix = Path(sys.executable), Path(sys.prefix)
        else:
            prefix = ROOT / ".venv"
            python = make_venv(prefix)
        if install(python, prefix):
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
