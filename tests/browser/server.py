"""JupyterLab as `labs lab` starts it: rooted at a workbook of its own, with settings of its own, gone when the block ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from labsupport import PACKAGE
from labsupport.cli.lab import jupyter_command, jupyter_environment
from labsupport.course import workbook

START_SECONDS = 120
# All cells stay attached to the page, those out of sight as well: what is not attached cannot be looked at.
SETTINGS = {"@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"}}


class NoAnswer(Exception):
    """JupyterLab did not start; one line with the last that it wrote."""


@dataclass(frozen=True)
class Server:
    """A running JupyterLab. address: ends in a slash. log: what it has written so far."""

    address: str
    token: str
    folder: Path
    log: Path

    def page(self, name: str) -> str:
        """The address of JupyterLab with one notebook open and no other."""
        return f"{self.address}lab/tree/{name}?reset&token={self.token}"

    def ask(self, path: str, method: str = "GET") -> bytes:
        request = urllib.request.Request(f"{self.address}api/{path}", method=method)
        request.add_header("Authorization", f"token {self.token}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def stop_kernels(self) -> None:
        for session in json.loads(self.ask("sessions")):
            self.ask(f"sessions/{session['id']}", "DELETE")


@contextmanager
def jupyterlab(notebooks: Path | None = None) -> Iterator[Server]:
    """notebooks: the folder whose notebooks are laid out; by default the course's. Raises NoAnswer."""
    with tempfile.TemporaryDirectory(prefix="labs-browser-", ignore_cleanup_errors=True) as made:
        home = Path(made)
        folder, log = home / "workbook", home / "log.txt"
        workbook.lay_out(folder, notebooks)
        for name, settings in SETTINGS.items():
            path = home / "settings" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings), "utf-8")
        command = jupyter_command(folder, next(iter(workbook.chapters(notebooks).values())).name, browser=False, port=_free_port())
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=_environment(home), cwd=home, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            yield _when_it_answers(process, home, folder, log)
        finally:
            _stop(process)


def _environment(home: Path) -> dict[str, str]:
    """As a learner's, but no settings of the user's are read and none are written."""
    env = {name: value for name, value in jupyter_environment().items() if name != "JUPYTER_TOKEN"}
    places = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    env |= {f"JUPYTER_{name}": str(home / place) for name, place in places.items()}
    env |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    paths = [str(PACKAGE.parent), env.get("PYTHONPATH", "")]
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


def _free_port() -> int:
    """Free now; where another process takes it first, JupyterLab goes on to the next."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _when_it_answers(process: subprocess.Popen, home: Path, folder: Path, log: Path) -> Server:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for path in (home / "runtime").glob("jpserver-*.json"):
            try:
                about = json.loads(path.read_text("utf-8"))
                server = Server(about["url"], about["token"], folder, log)
                server.ask("status")
                return server
            except (ValueError, OSError):
                pass  # half written, or not listening yet
        time.sleep(0.2)
    last = (log.read_text("utf-8", "replace").strip().splitlines() or ["it wrote nothing"])[-1]
    raise NoAnswer(f"JupyterLab does not answer; the last that it wrote: {last}")


def _stop(process: subprocess.Popen) -> None:
    """JupyterLab and its kernels, which are in its process group or end with it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
