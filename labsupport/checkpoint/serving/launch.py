"""A server as a child process: started, waited for until it answers, stopped; its last lines where it dies."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from labsupport.checkpoint.serving.choose import Choice

LINES = 8  # of a dead server's that are shown
PATIENCE = 20  # seconds that a server may take to stop before it is killed
POLL = 0.1
START = 600  # seconds


class ServerError(RuntimeError):
    """A server could not be started, or died. The message may have several lines: what it said last."""


def free_port(host: str, port: int) -> int:
    """`port`, if a server can listen there; for 0 one that is free. Raises ServerError with why not."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ServerError(f"--host is {host!r}, which is no address: {error}") from error
    with socket.socket(family, kind) as probe:
        if os.name == "posix":  # as servers do: a port is free although old connections to it are not yet forgotten
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServerError(f"port {port} on {host} is taken: choose another --port, or 0 for one that is free") from error
            if error.errno == errno.EADDRNOTAVAIL:
                raise ServerError(f"--host is {host!r}, which is no address of this machine") from error
            raise ServerError(f"port {port} on {host} cannot be listened on: {error.strerror}") from error
        return int(probe.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """Where a client on this machine asks a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


@dataclass
class Running:
    """A server that answers at url. last: the lines that it wrote last."""

    choice: Choice
    process: subprocess.Popen[str]
    url: str
    last: deque[str]
    reader: threading.Thread

    @property
    def pid(self) -> int:
        return self.process.pid

    def died(self) -> ServerError:
        """What to say of a server that ended by itself."""
        self.reader.join(1)
        code = self.process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        said = "; it said last:" + "".join(f"\n  {line}" for line in self.last) if self.last else " without a word"
        return ServerError(f"the server ({self.choice.engine}) {how}{said}")

    def wait(self) -> None:
        """Until it ends. Raises ServerError then: a server does not end by itself."""
        self.process.wait()
        raise self.died()

    def stop(self) -> None:
        """As Ctrl-C would; a server that does not go is killed, with all that it started."""
        if self.process.poll() is None:
            self._signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
        self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))  # what is left of its group
        self.process.wait()

    def _signal(self, number: int) -> None:
        if os.name != "posix":
            self.process.terminate()
            return
        with suppress(ProcessLookupError):
            # Its own process alone is asked to stop, and stops what it started; a group is killed as a whole.
            os.kill(self.pid, number) if number == signal.SIGINT else os.killpg(self.pid, number)


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands before this machine itself
    try:
        with opener.open(f"{url}/models", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


@contextmanager
def running(
    choice: Choice, host: str, port: int, show: Callable[[str], object] = lambda line: None, patience: float = START
) -> Iterator[Running]:
    """Inside, the server that was chosen, which answers; it is stopped afterwards. show: called with each line that it writes.

    Raises ServerError where it cannot be started, dies first, or does not answer within `patience` seconds.
    """
    environment = {**choice.variables, **os.environ}  # who has set one of the variables means it
    try:
        process = subprocess.Popen(
            choice.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="utf-8", errors="replace", env=environment, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise ServerError(f"{choice.command[0]} cannot be started: {error.strerror}") from error
    last: deque[str] = deque(maxlen=LINES)

    def read() -> None:
        assert process.stdout
        for line in process.stdout:
            if line.strip():
                last.append(line.rstrip())
                show(line.rstrip())

    reader = threading.Thread(target=read, daemon=True)
    server = Running(choice, process, url_of(host, port), last, reader)
    try:
        reader.start()
        end = time.monotonic() + patience
        while not _answers(server.url):
            if process.poll() is not None:
                raise server.died()
            if time.monotonic() > end:
                raise ServerError(f"the server ({choice.engine}) does not answer after {patience:.0f} seconds")
            time.sleep(POLL)
        yield server
    finally:
        server.stop()
