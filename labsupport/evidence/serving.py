"""How fast a served model answers and how much memory its server takes, asked through the OpenAI client: `labs serve --measure`."""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from labsupport.evidence import bench, machine, measurements
from labsupport.install import get_extra
from labsupport.model import models

PATH = "serving.json"
PROMPTS = (
    "def read(path):\n    ", "import os\n\n\nclass ", "The for statement is used to iterate over ", "    for name in sorted(",
    "A function is called with ", "try:\n    value = int(text)\nexcept ", "if __name__ == ", "An exception is raised when ",
)  # fmt: skip
EVERY = 0.02  # seconds between two looks at the memory
NOTE = (
    "tokens: of all answers, greedy, without the prompts. seconds: of the requests one after another, the reading of the prompts "
    "in them, after one that is not counted. peak: bytes of memory of the server's processes together, "
    "pages of mapped files among them, while they answered. cpu_seconds: that those processes computed meanwhile, which a machine "
    "that is shared changes less than the seconds. load: of the machine in the last minute; above the cores it was shared."
)


class NoClient(ValueError):
    """The package openai is not installed."""


@dataclass
class Peak:
    """bytes: the most that was seen. None before the first look."""

    nbytes: int | None = None


@dataclass(frozen=True)
class Served:
    """tokens, seconds: of all answers. peak: bytes of the server's processes at most; cpu_seconds: what they computed.

    Both are None where no process was named.
    """

    prompts: int
    tokens: int
    seconds: float
    peak: int | None = None
    cpu_seconds: float | None = None
    answers: list[str] = field(default_factory=list, repr=False)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def _of_all(pid: int, value: Callable[[psutil.Process], float]) -> float:
    """Something of a process and of all that it started, added up; of those that have ended, nothing."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += value(process)
    return total


def resident(pid: int) -> int:
    """Bytes of memory of a process and of all that it started: resident sets added up, so that what they share counts twice."""
    return int(_of_all(pid, lambda process: process.memory_info().rss))


def cpu_seconds(pid: int) -> float:
    """Seconds that a process and all that it started have computed so far, on all cores together."""
    return _of_all(pid, lambda process: sum(process.cpu_times()[:2]))


@contextmanager
def watched(pid: int | None) -> Iterator[Peak]:
    """Inside, the memory of a process and its children is looked at every EVERY seconds. pid: None to look at nothing."""
    peak, done = Peak(), threading.Event()

    def look() -> None:
        while pid is not None:
            peak.nbytes = max(peak.nbytes or 0, resident(pid))
            if done.wait(EVERY):
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def check_client() -> None:
    """Raises NoClient where there is no OpenAI client."""
    if find_spec("openai") is None:
        raise NoClient(f"the OpenAI client is not installed: {get_extra('serve')}")


def measure(base_url: str, prompts: Sequence[str] = PROMPTS, max_tokens: int = 64, pid: int | None = None) -> Served:
    """Ask the server at base_url, such as http://127.0.0.1:8000/v1, each prompt in turn for its greedy answer.

    Tokens are those that the server counts; an answer that comes to its end has fewer than max_tokens. pid: the server's process,
    whose memory is watched. No proxy is asked. Raises NoClient, and what the client raises.
    """
    check_client()
    import openai

    if not prompts:
        raise ValueError("prompts is empty, wanted at least one")
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, http_client=http) as client:
        model = client.models.list().data[0].id

        def ask(prompt: str) -> Any:
            return client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0)

        ask(prompts[0])  # what is set up once is set up now
        with watched(pid) as peak:
            start, computed = time.perf_counter(), cpu_seconds(pid) if pid is not None else 0.0
            said = [ask(prompt) for prompt in prompts]
            seconds = time.perf_counter() - start
            cpu = cpu_seconds(pid) - computed if pid is not None else None
    tokens = sum(answer.usage.completion_tokens for answer in said)
    return Served(len(prompts), tokens, seconds, peak.nbytes, cpu, [answer.choices[0].text for answer in said])


def row(served: Served, **about: Any) -> dict[str, Any]:
    """A row of the file: what was measured, on what, when. about: what the caller knows, such as model, layout, engine, nbytes."""
    here = machine.describe()
    return {
        **about,
        "prompts": served.prompts,
        "tokens": served.tokens,
        "seconds": served.seconds,
        "rate": served.rate,
        "peak": served.peak,
        "cpu_seconds": served.cpu_seconds,
        "date": datetime.date.today().isoformat(),
        "device": here.device,
        "machine": here.name,
        "instructions": bench.instructions(here.device),
        "cores": here.cores,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": here.versions | about.get("versions", {}),
    }


def default_path() -> Path:
    return models.data_dir() / "measurements" / PATH


KEY = ("model", "layout", "engine", "device", "machine", "instructions")  # a row replaces the one that is equal in these


def store(path: Path, new: dict[str, Any]) -> None:
    """Add a row to a file, in place of an older one of the same model, engine and machine. Raises OSError, ValueError."""
    rows = measurements.read(path)[1] if path.exists() else []
    kept = [row for row in rows if any(row.get(name) != new.get(name) for name in KEY)]
    measurements.write(path, {"note": NOTE}, [*kept, new])


def read(path: Path | None = None) -> list[dict[str, Any]]:
    """The rows, by default those of the course. Raises ValueError for another file."""
    return measurements.read(path or default_path())[1]
