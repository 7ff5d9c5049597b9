"""Kernels for notebooks that are run without a browser: of this interpreter, and safe to start beside each other."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from queue import Empty
from typing import Any

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager, KernelManager
from traitlets import Type, default

LOOK_AGAIN = 1.0  # seconds


class LooksAgain(AsyncZMQSocketChannel):
    """A channel that does not rely on being woken.

    nbclient answers an Output widget on the shell channel while it waits there for the reply to a cell. Sending consumes the
    socket's edge-triggered event, so a reply that comes in at that moment wakes nobody, and nbclient would wait for ever.
    """

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = LOOK_AGAIN if deadline is None else min(LOOK_AGAIN, max(0.0, deadline - time.monotonic()))
            try:
                return await super().get_msg(left)
            except Empty:
                if deadline is not None and time.monotonic() >= deadline:
                    raise


class Client(AsyncKernelClient):
    shell_channel_class = Type(LooksAgain)


class OwnSockets:
    """A manager whose kernel is reached through socket files in a folder of its own.

    By default a manager looks for five free ports, lets go of them and has the kernel take them again a second later. A kernel
    that another process starts in that second may be given the same ones. Windows has no such files and keeps to ports.
    """

    @default("transport")
    def _transport_default(self) -> str:
        return "ipc" if os.name == "posix" else "tcp"

    def _ip_default(self) -> str:
        if self.transport == "tcp":
            return super()._ip_default()
        self._folder = tempfile.TemporaryDirectory(prefix="labs-kernel-")
        return str(Path(self._folder.name) / "socket")


class ThisInterpreter(OwnSockets, AsyncKernelManager):
    """A kernel of the interpreter that asks for it: a "python3" that a user installed elsewhere would otherwise come first."""

    client_factory = Type(Client)

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())


class ForNbval(OwnSockets, KernelManager):
    """What nbval starts its kernels with under `pytest -p labsupport.course.kernels`. Which interpreter is nbval's own setting."""


def pytest_configure() -> None:
    import nbval.kernel

    nbval.kernel.KernelManager = ForNbval
