"""Everything that proves the course: `labs test`. Lint, types, unit and property tests, and every notebook in both forms.

`labs test --quick` proves what a small change can break most often: lint, imports and types in full, every file of tests that works
on one tensor, a tiny model or a page of text, each exercise with all its known mistakes on one seed, the rules that all notebooks
keep, and the notebooks whose cells have changed. It leaves out what is marked `slow`: checkpoints written and read in all layouts,
killed, or handed to transformers; the matrix of models; what notebooks show when they are built; whether words in figures lie over
each other; nbgrader and widgets; odd return values; the pretended GPU; the same test in more settings. And it leaves out the other
49 seeds, and unchanged notebooks.
"""

from __future__ import annotations

import codecs
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

from labsupport.course import warm
from labsupport.course.build import read, sources, student_path
from labsupport.course.execute import CELL_SECONDS, source_sha256
from labsupport.model import files, memory
from labsupport.model import quick as quick_mode

CLOSING = re.compile(r"^(?:=+ )?((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s", re.MULTILINE)
KINDS = {"errors": "error", "warning": "warnings"}  # pytest's own plurals differ
FAILED = re.compile(r"^(?:FAILED|ERROR) .*", re.MULTILINE)
PYTHON = (sys.executable, "-m")
PYTEST = (*PYTHON, "pytest")
Write = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """One process to run: its name, its command, and what it needs in the environment. forked: see warm.py."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    forked: bool = False


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

    @property
    def verdict(self) -> str:
        counted = ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if kind != "warnings")
        return f"{self.part.name}: {'ok' if self.code == 0 else 'FAILED'}{counted and f', {counted}'} after {self.seconds:.0f} s"


def lint() -> list[Part]:
    return [
        Part("ruff check", (*PYTHON, "ruff", "check", ".")),
        Part("ruff format", (*PYTHON, "ruff", "format", "--check", ".")),
        Part("imports", (str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo")),
    ]


def types() -> Part:
    return Part("types", (*PYTHON, "mypy"))


def tests(workers: int, quick: bool = False) -> Part:
    """Whatever is in tests/. quick: without those that are marked slow, and exercises on one seed."""
    spread = ("-n", str(workers)) if workers > 1 else ()
    command = (*PYTEST, "tests", "-p", "no:nbval", *spread)
    return Part("tests", (*command, "-m", "not slow"), {"SEEDS": "1"}) if quick else Part("tests", command)


def notebook(root: Path, path: Path) -> Part:
    """One form of a notebook from top to bottom. In a solved one a wrong or blank answer raises. The student form runs on little
    text: it differs from the solved one only in that references stand in for the answers.
    """
    name = path.relative_to(root).as_posix()
    nbval = ("-p", "labsupport.course.kernels", "--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={CELL_SECONDS}")
    settings = {"LABS_STRICT": "1"} if path.parent.name == "solutions" else {quick_mode.VARIABLE: "1"}
    return Part(name, (*PYTEST, *nbval, name), settings, warm.is_possible())


def notebooks(root: Path, numbers: list[str] | None = None) -> list[Path]:
    """Both forms of all notebooks, or of those with these numbers. The late chapters, which take longest, come first."""
    return [path for source in reversed(sources(root, numbers)) for path in (source, student_path(source))]


def changed(root: Path, paths: Sequence[Path]) -> list[Path]:
    """Those of the notebooks whose cells are not the last commit's; without git, those that were edited since they were built."""
    known = committed if _under_git(root) else executed
    return [path for path in paths if source_sha256(read(path)) != known(root, path)]


def committed(root: Path, path: Path) -> str | None:
    """The hash of the notebook that the last commit holds at `path`, None where it holds none."""
    show = ("git", "show", f"HEAD:{path.relative_to(root).as_posix()}")
    done = subprocess.run(show, cwd=root, capture_output=True, encoding="utf-8")
    return None if done.returncode else source_sha256(nbformat.reads(done.stdout, as_version=4))


def executed(root: Path, path: Path) -> str | None:
    """The hash of what was executed when the outputs in `path` were stored, None where that never happened."""
    return read(path).metadata.get("labs", {}).get("executed_source_sha256")


def _under_git(root: Path) -> bool:
    try:
        return subprocess.run(("git", "rev-parse", "HEAD"), cwd=root, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def workers() -> int:
    """How many processes run beside each other: one a core that this process may use, as long as each has a notebook's memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(memory.here().free / memory.A_NOTEBOOK)))


def run(part: Part, root: Path, write: Write = lambda text: None) -> Result:
    """Run one part to its end and `write` what it prints as it comes; what a forked one prints is shown where it fails.

    It sees no LABS_ variable but its own and the run's cache, must not need the network, and keeps to one thread, since others run
    beside it.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("LABS_") or k == files.CACHE}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | part.env
    start = time.monotonic()
    if part.forked:
        code, output = warm.run(part.command[len(PYTEST) :], root, env)
        return Result(part, code, output, time.monotonic() - start)
    decoder, printed = codecs.getincrementaldecoder("utf-8")("replace"), []
    with subprocess.Popen(part.command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while chunk := process.stdout.read1():
            printed.append(decoder.decode(chunk))
            write(printed[-1])
    return Result(part, process.returncode, "".join(printed), time.monotonic() - start)


def run_beside(parts: Sequence[Part], root: Path, count: int, write: Write) -> list[Result]:
    """Run parts, `count` at a time. A line for each as it ends, and all that it printed where it failed."""
    results = []
    with ThreadPoolExecutor(count) as pool:
        try:
            for done in as_completed([pool.submit(run, part, root) for part in parts]):
                result = done.result()
                results.append(result)
                write(f"[{len(results):2}/{len(parts)}] {result.verdict}\n")
                if result.code:
                    write(f"{result.output.strip()}\n")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def closing_line(results: list[Result], seconds: float) -> str:
    """One line over all parts, in pytest's form. A part that is not pytest counts only where it fails."""
    counts = sum((r.counts for r in results), Counter())
    counts["failed"] += sum(1 for r in results if r.code and not (r.counts["failed"] or r.counts["error"]))
    order = ("failed", "passed", "skipped", "deselected", "xfailed", "xpassed", "warnings", "error")
    text = ", ".join(f"{counts[kind]} {kind}" for kind in order if counts[kind]) or "no tests ran"
    return f" {text} in {seconds:.2f}s ".center(80, "=")


@contextmanager
def own_cache() -> Iterator[None]:
    """Inside, what is cached lies in a folder of its own, which is removed: a run shows what a fresh machine would."""
    before = os.environ.get(files.CACHE)
    with tempfile.TemporaryDirectory(prefix="labs-cache-", ignore_cleanup_errors=True) as folder:
        os.environ[files.CACHE] = folder
        try:
            yield
        finally:
            os.environ.pop(files.CACHE) if before is None else os.environ.update({files.CACHE: before})


@own_cache()
def run_all(root: Path, write: Write, numbers: list[str] | None = None, quick: bool = False) -> int:
    """Run everything, or only the notebooks with these numbers, and `write` what happens meanwhile. The exit code.

    quick: tests that are not marked slow, and notebooks only where their cells have changed since the last commit.
    At the end stand what failed and one line that counts it all.
    """
    start, results, count = time.monotonic(), [], workers()
    paths = notebooks(root, numbers)
    if quick:
        paths = changed(root, paths)
    if not numbers:
        for part in lint():
            results.append(run(part, root))
            write(f"--- {results[-1].verdict}\n{results[-1].output.strip() if results[-1].code else ''}".rstrip() + "\n")
        write(f"--- tests, {count} at a time, and types beside them\n")
        with ThreadPoolExecutor(1) as pool:
            checking = pool.submit(run, types(), root)
            results.append(run(tests(count, quick), root, write))
            write(f"--- {results[-1].verdict}\n")
            results.append(checking.result())
        write(f"--- {results[-1].verdict}\n{results[-1].output.strip() if results[-1].code else ''}".rstrip() + "\n")
    write(f"--- {len(paths)} notebooks{' that changed' * quick}, {count} at a time\n")
    results += run_beside([notebook(root, path) for path in paths], root, count, write)
    failures = [line for r in results for line in r.failures]
    for line in failures:
        write(f"{line}\n")
    write(f"{closing_line(results, time.monotonic() - start)}\n")
    return 1 if failures else 0
