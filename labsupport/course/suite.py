"""Everything that proves the course: `labs test`. Lint, unit and property tests, and every notebook in both forms."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CLOSING = re.compile(r"^(?:=+ )?((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s", re.MULTILINE)
KINDS = {"errors": "error", "warning": "warnings"}  # pytest's own plurals differ
FAILED = re.compile(r"^(?:FAILED|ERROR) .*", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """One process to run: its name, its command, and what it needs in the environment."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str]


@dataclass(frozen=True)
class Result:
    part: Part
    code: int
    output: str
    seconds: float

    @property
    def counts(self) -> Counter:
        """What pytest's closing line counts: passed, failed, errors, ... Empty for what is not pytest."""
        found = CLOSING.findall(self.output)
        pairs = (piece.split() for piece in found[-1].split(", ")) if found else ()
        return Counter({KINDS.get(kind, kind): int(count) for count, kind in pairs})

    @property
    def failures(self) -> list[str]:
        if self.code == 0:
            return []
        return FAILED.findall(self.output) or [f"FAILED {self.part.name} (exit code {self.code})"]


def parts(root: Path) -> tuple[list[Part], list[Part]]:
    """The quick parts and the long ones of the repository at `root`."""
    python = (sys.executable, "-m")
    pytest = (*python, "pytest")
    nbval = (*pytest, "--nbval-lax", "--nbval-current-env")
    students = sorted(str(p.relative_to(root)) for p in (root / "notebooks").glob("*.ipynb"))
    solutions = sorted(str(p.relative_to(root)) for p in (root / "notebooks" / "solutions").glob("*.ipynb"))
    quick = [
        Part("ruff check", (*python, "ruff", "check", "."), {}),
        Part("ruff format", (*python, "ruff", "format", "--check", "."), {}),
    ]
    # Without notebooks pytest is pointed at the empty folder and fails, as it should.
    long = [
        Part("tests", (*pytest, "tests"), {}),
        Part("notebooks, as a learner gets them", (*nbval, *(students or ["notebooks"])), {}),
        Part("notebooks, solved", (*nbval, *(solutions or ["notebooks/solutions"])), {"LABS_STRICT": "1"}),
    ]
    return quick, long


def run(part: Part, root: Path) -> Result:
    """Run one part to its end. It sees no LABS_ variable but its own, and must not need the network."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("LABS_")}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | part.env
    start = time.monotonic()
    done = subprocess.run(
        part.command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    return Result(part, done.returncode, done.stdout, time.monotonic() - start)


def closing_line(results: list[Result], seconds: float) -> str:
    """One line over all parts, in pytest's form. A part that is not pytest counts only where it fails."""
    counts = sum((r.counts for r in results), Counter())
    counts["failed"] += sum(1 for r in results if r.code and not (r.counts["failed"] or r.counts["error"]))
    order = ("failed", "passed", "skipped", "deselected", "xfailed", "xpassed", "warnings", "error")
    text = ", ".join(f"{counts[kind]} {kind}" for kind in order if counts[kind]) or "no tests ran"
    return f" {text} in {seconds:.2f}s ".center(80, "=")


def run_all(root: Path, show: Callable[[str], None]) -> int:
    """Run everything, `show` each part's output as it ends and what failed at the end. The exit code.

    One part after the other: two at once would share the cores that each of them measures with.
    """
    start = time.monotonic()
    quick, long = parts(root)
    results = []

    def finished(result: Result) -> None:
        results.append(result)
        verdict = "ok" if result.code == 0 else "FAILED"
        show(f"--- {result.part.name}: {verdict} after {result.seconds:.0f} s\n{result.output.strip()}\n")

    for part in quick:
        finished(run(part, root))
    show(f"--- running {', '.join(p.name for p in long)}: some minutes\n")
    for part in long:
        finished(run(part, root))
    failures = [line for r in results for line in r.failures]
    for line in failures:
        show(line)
    show(closing_line(results, time.monotonic() - start))
    return 1 if failures else 0
