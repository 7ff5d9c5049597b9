"""A place like Colab's: a published repository that is reached without a network, a folder /content, kernels that start there."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from colab.environment import HERE
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbformat import NotebookNode

from labsupport import __version__
from labsupport.course.badges import write_badges
from labsupport.course.execute import CELL_SECONDS, output_faults
from labsupport.course.kernels import ThisInterpreter

ROOT = HERE.parents[1]
PRETEND = ROOT / "tests" / "pretend_cuda"
ADDRESS = "https://github.com/owner/name"  # of nobody's: git is told to look into a folder instead


def _git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=Colab", "-c", "user.email=colab@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def publish(folder: Path) -> Path:
    """The course as it would be published from this tree: a copy with an address, badges written, committed, tagged."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
            (folder / name).chmod((ROOT / name).stat().st_mode)
    pyproject = folder / "pyproject.toml"
    before = pyproject.read_text("utf-8")
    after = before.replace('repository = ""', f'repository = "{ADDRESS}"')
    if after == before:
        raise ValueError('pyproject.toml has no line repository = "": the simulation is for a tree without an address')
    pyproject.write_text(after, "utf-8")
    write_badges(folder)
    _git(folder, "init", "-q", "-b", "main")
    _git(folder, "add", "-A")
    _git(folder, "commit", "-q", "-m", "The course")
    _git(folder, "tag", f"v{__version__}")
    return folder


@dataclass(frozen=True)
class Run:
    """What a notebook did. cpu_seconds: of its kernel. peak: bytes, the most memory that it held (VmHWM). faults: a line each."""

    notebook: NotebookNode
    seconds: float
    cpu_seconds: float
    peak: int
    faults: list[str]


@dataclass(frozen=True)
class Place:
    """python: of the environment in which kernels run. content: the folder in which they start. repository: where git clones from.
    gpu: whether they have the pretend GPU.
    """

    python: Path
    content: Path
    repository: Path
    gpu: bool = False

    def variables(self) -> Mapping[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("LABS_", "PYTHON", "VIRTUAL_ENV"))}
        env |= {"HOME": str(self.content.parent), "PATH": os.pathsep.join([str(self.python.parent), env.get("PATH", "")])}
        env |= {"COLAB_RELEASE_TAG": "release-colab-simulated", "COLAB_GPU": "1" if self.gpu else ""}
        env |= {"PYTHONPATH": str(HERE / "fake"), "HF_HUB_OFFLINE": "1"}  # nothing of the course asks the hub; here that would show
        if self.gpu:
            env |= {"PYTHONPATH": os.pathsep.join([str(HERE / "fake"), str(PRETEND)]), "PRETEND_CUDA": "1"}
        env |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}  # a kernel's debugger would warn on the terminal
        git = {f"url.{self.repository.as_uri()}.insteadOf": ADDRESS, "safe.directory": "*"}
        env |= {"GIT_CONFIG_COUNT": str(len(git))}
        for place, (key, value) in enumerate(git.items()):
            env |= {f"GIT_CONFIG_KEY_{place}": key, f"GIT_CONFIG_VALUE_{place}": value}
        return env

    def run(self, notebook: NotebookNode) -> Run:
        """Every cell in a new kernel, also after an error. The notebook then holds what they showed."""
        python = self.python

        class Kernel(ThisInterpreter):
            @property
            def kernel_spec(self) -> KernelSpec:
                argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
                return KernelSpec(argv=argv, display_name="Python 3", language="python")

        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_manager_class=Kernel,
            resources={"metadata": {"path": str(self.content)}},
            allow_errors=True,
            store_widget_state=True,
            record_timing=False,
            extra_arguments=["--log-level=ERROR"],
            coalesce_streams=True,
        )
        client.reset_execution_trackers()
        start = time.monotonic()
        with client.setup_kernel(env=dict(self.variables())):
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
            process = psutil.Process(client.km.provisioner.pid)
            seconds, peak, times = time.monotonic() - start, _peak(process.pid), process.cpu_times()
            client.set_widgets_metadata()
        return Run(notebook, seconds, times.user + times.system, peak, list(output_faults(notebook)))


def _peak(pid: int) -> int:
    """The most memory that a process has held, in bytes, as Linux counts it."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
