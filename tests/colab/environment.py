"""An environment with the versions that Colab publishes, of what the course and its dependencies use; and a copy of it to spend.

packages.txt holds all names that Colab has and those versions. A version that this Python or this machine cannot get is replaced by
the next one that can be had, and named. Each Python has an environment in tests/colab/.venv, which git ignores.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from labsupport import install
from labsupport.course import lock, missing

HERE = Path(__file__).resolve().parent
PACKAGES = HERE / "packages.txt"
STAMP = "pins-installed"
# What a Python says of its packages. Names are as package indexes compare them.
ASK = """\
import json, re
from importlib import metadata
print(json.dumps({re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in metadata.distributions()}))"""


def published() -> dict[str, str]:
    """Colab's packages, by canonical name: the version where the course or what it needs uses the package, elsewhere ""."""
    lines = [line for line in PACKAGES.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    pairs = (line.partition("==") for line in lines)
    return {missing.canonical(name): version for name, _, version in pairs}


def origin() -> dict[str, str]:
    """Where the list is from, as its head says: source, date, python."""
    return {key.lower(): value for key, value in re.findall(r"^# (Source|Date): (.*)$", PACKAGES.read_text("utf-8"), re.MULTILINE)}


def versions(python: Path) -> dict[str, str]:
    """The packages of an environment by canonical name."""
    return json.loads(subprocess.run([str(python), "-c", ASK], capture_output=True, text=True, check=True).stdout)


@dataclass(frozen=True)
class Environment:
    """folder: a virtual environment. version: its Python's. replaced: package to Colab's version and the one taken in its place."""

    folder: Path
    version: str
    replaced: dict[str, tuple[str, str]]

    @property
    def python(self) -> Path:
        return install.venv_python(self.folder)

    @contextmanager
    def copy(self) -> Iterator[Environment]:
        """The same environment in a folder of its own, to install into. Made of links to the same files: pip writes new ones."""
        folder = self.folder.with_name(f"{self.folder.name}-{os.getpid()}")
        shutil.copytree(self.folder, folder, symlinks=True, copy_function=os.link)
        try:
            yield Environment(folder, self.version, self.replaced)
        finally:
            shutil.rmtree(folder)


def make(python: str, torch: str | None = None) -> Environment:
    """Colab's environment for the interpreter `python`, made if it is not there. torch: a version in place of Colab's.

    Raises install.InstallError.
    """
    try:
        ask = [python, "-c", "import sys; print(*sys.version_info[:3])"]
        asked = subprocess.run(ask, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise install.InstallError(f"--python {python} is not a Python that runs ({error})") from None
    version = tuple(map(int, asked.stdout.split()))
    install.check_python(version, python)
    pins = {name: number for name, number in published().items() if number}
    folder = HERE / ".venv" / "{}.{}".format(*version)
    wanted = hashlib.sha256(f"{version} {torch} {sorted(pins.items())}".encode()).hexdigest()
    found = Environment(folder, ".".join(map(str, version)), {})
    if not (folder / STAMP).is_file() or (folder / STAMP).read_text().strip() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        _fill(found, python, pins, torch or pins["torch"].partition("+")[0])
        (folder / STAMP).write_text(f"{wanted}\n")
    has = versions(found.python)
    return replace(
        found, replaced={name: (number, has.get(name, "none")) for name, number in pins.items() if has.get(name) != number}
    )


def _fill(made: Environment, python: str, pins: dict[str, str], torch: str) -> None:
    install.say(f"making {made.folder.relative_to(HERE.parents[1])}, an environment like Colab's: a few minutes, up to 6 GB")
    done = subprocess.run([python, "-m", "venv", str(made.folder)], capture_output=True, text=True)
    if done.returncode:
        raise install.InstallError(f"python -m venv failed: {install.last_line(done.stdout + done.stderr)}")
    # Of each package the first version from Colab's on that has a wheel for this Python: uv finds it, pip would take the last.
    asked = [f"{name}>={number}" for name, number in pins.items() if name != "torch"]
    _uv(made, "--no-deps", "--only-binary", ":all:", "--resolution", "lowest", "--upgrade", *asked)
    log = made.folder / install.LOG
    log.write_text("", encoding="utf-8")
    install.install_torch(made.python, log, torch, "--compile")
    _uv(made, f"torch=={torch}")  # what this build needs: CUDA's libraries where PyTorch's own index is out of reach


def _uv(made: Environment, *arguments: str) -> None:
    command = [sys.executable, "-m", "uv", "pip", "install", "--no-config", "--python", str(made.python), *lock.index_options()]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    if done.returncode:
        raise install.InstallError(f"uv cannot make the environment: {' '.join(done.stderr.split())[-500:]}")
