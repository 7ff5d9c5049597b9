"""Notebooks tested in processes that are forked from one which has loaded torch and transformers: ten seconds less for each form.

`run` has a server of forks (Python's own, multiprocessing.forkserver) start pytest in a new process, and there nbval's kernel is
forked as well, before anything has run. Such a kernel differs from a newly started one only in libraries that are loaded already.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

LOADED = (  # nothing that looks at its environment (matplotlib) or at the kernel it is in (labsupport.exercises)
    "bitsandbytes", "ipykernel.kernelapp", "nbval.plugin", "pytest", "torch", "transformers.models.llama.modeling_llama",
)  # fmt: skip


def is_possible() -> bool:
    """On Linux with PyTorch for CPUs. A process in which CUDA has been looked for cannot be forked."""
    return sys.platform == "linux" and metadata.version("torch").endswith("+cpu")


def run(pytest_arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run pytest in `folder` with nothing but `environment`: exit code, and all that was printed. May be called from threads."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # read when the libraries are loaded, by the server of forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    with tempfile.TemporaryDirectory(prefix="labs-test-") as temporary:
        output = Path(temporary) / "output"
        process = context.Process(target=_pytest, args=(list(pytest_arguments), folder, dict(environment), output))
        process.start()
        process.join()
        printed = output.read_text("utf-8", "replace") if output.exists() else ""
    return process.exitcode or 0, printed


def _become(folder: Path | str, environment: Mapping[str, str], output: Path | str) -> None:
    """Make this process one that was started in `folder` with `environment`, and that writes to `output`."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open(os.devnull, "rb") as nothing, open(output, "wb") as stream:
        os.dup2(nothing.fileno(), 0)
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


def _pytest(arguments: list[str], folder: Path, environment: Mapping[str, str], output: Path) -> None:
    _become(folder, environment, output)
    import pytest
    from jupyter_client.provisioning import local_provisioner

    local_provisioner.launch_kernel = ForkedKernel
    sys.exit(int(pytest.main(arguments)))


class ForkedKernel:
    """A kernel in a process forked from this one, in place of jupyter_client's subprocess.Popen of `command`."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], *, env: Mapping[str, str], cwd: str, **_: Any) -> None:
        connection = command[command.index("-f") + 1]
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_kernel, args=(connection, env, cwd), daemon=True)  # it ends with its parent
        self._process.start()
        self.pid = self._process.pid
        # jupyter_client signals the whole group of a kernel. The kernel makes one as well: whoever comes first.
        with suppress(PermissionError, ProcessLookupError):
            os.setpgid(self.pid, self.pid)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _kernel(connection: str, environment: Mapping[str, str], folder: str) -> None:
    os.setpgid(0, 0)
    _become(folder, {**environment, "JPY_PARENT_PID": str(os.getppid())}, os.devnull)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not what pytest captures
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asyncio._set_running_loop(None)  # jupyter_client starts kernels from inside a loop, which is running in its process only
    asyncio.set_event_loop(asyncio.new_event_loop())
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(["-f", connection])
