"""The peers' own environment, beside the course's: made once, in tests/interop/.venv, which git ignores."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from labsupport import install

HERE = Path(__file__).resolve().parent
PINS = HERE / "legacy.txt"
FOLDER = HERE / ".venv" / "legacy"
STAMP = "pins-installed"
PYTHON = (3, 11)  # the last for which there is a wheel of AutoGPTQ
# Built from source, against what is installed before them.
BUILT = ("autoawq",)


def _python() -> str:
    """A Python of the version that the peers need. Raises install.InstallError where there is none."""
    if sys.version_info[:2] == PYTHON:
        return sys.executable
    name = "python{}.{}".format(*PYTHON)
    found = shutil.which(name)
    if found is None:
        raise install.InstallError(f"AutoGPTQ needs {name}, and there is none on the PATH: this is {sys.version.split()[0]}")
    return found


def versions() -> dict[str, str]:
    """What the peers' environment was made from: the packages that can change a result, and its Python."""
    pins = PINS.read_text()
    named = ("auto-gptq", "autoawq", "torch", "transformers", "numpy")
    asked = subprocess.run([str(build()), "-V"], capture_output=True, text=True)
    return {name: install.pinned(pins, name) for name in named} | {"python": asked.stdout.split()[-1]}


def build() -> Path:
    """The Python of the peers' environment, which is made or brought up to the pins first. Raises install.InstallError."""
    wanted = hashlib.sha256(PINS.read_bytes()).hexdigest()
    python, stamp = install.venv_python(FOLDER), FOLDER / STAMP
    if stamp.is_file() and stamp.read_text().strip() == wanted:
        return python
    install.say(f"making {FOLDER.relative_to(HERE.parents[1])} for AutoGPTQ and AutoAWQ: a few minutes, 1.5 GB")
    if not python.exists():
        made = subprocess.run([_python(), "-m", "venv", str(FOLDER)], capture_output=True, text=True)
        if made.returncode:
            raise install.InstallError(f"python -m venv failed: {install.last_line(made.stdout + made.stderr)}")
    log = FOLDER / install.LOG
    log.write_text("", encoding="utf-8")
    pins = [line for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    late = [line for line in pins if line.startswith(BUILT)]
    install.install_torch(python, log, install.pinned(PINS.read_text(), "torch"))
    install.pip(python, log, "--no-deps", *(line for line in pins if line not in late))
    install.pip(python, log, "--no-deps", "--no-build-isolation", *late)
    waiting = stamp.with_suffix(".new")
    waiting.write_text(wanted + "\n")
    os.replace(waiting, stamp)
    return python


def run(module: str, *arguments: str, threads: int = 1) -> None:
    """Run one of this folder's modules in the peers' environment; it may print, and is heard on standard error only if it fails.

    Raises install.InstallError with what it said there.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DEBUG")}  # AutoGPTQ reads DEBUG
    env |= {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(build()), "-m", f"interop.{module}", *arguments], env=env, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise install.InstallError(f"{done.stderr}\ninterop.{module} failed in the peers' environment; what it said is above")
