"""Run a learner's notebook without a browser and find out which exercises pass: `labs check`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from labsupport import PACKAGE
from labsupport.course import carry

LONGEST_CHECK = 4_000  # characters of what a cell with a check prints that are shown
CHECK = re.compile(r"\bcheck\(\s*[\"'](\d+\.\d+)[\"']")
ANSWER = re.compile(r"answer-(\d+)-(\d+)")
# Runs before the learner's first cell, and leaves no name behind.
REPORT = "__import__('labsupport.exercises.session', fromlist=['report_to']).report_to({path!r})"
INTERRUPTED, DIED = "stopped", "the kernel died, perhaps for lack of memory,"


@dataclass(frozen=True)
class Outcome:
    """How the exercises of one notebook stand.

    checks: what each check printed, in order. tally: the closing table. errors: a line for each exercise and each other cell that
    raised. outcomes: exercise id to "pass", "not yet" or "not attempted". stopped: why and where the run ended before its end, ""
    where it did not. interrupted: whether Ctrl-C was why.
    """

    checks: tuple[str, ...]
    tally: str
    outcomes: dict[str, str]
    errors: tuple[str, ...]
    stopped: str = ""
    interrupted: bool = False

    @property
    def wrong(self) -> bool:
        """Whether something is wrong; what was not attempted is not."""
        return bool(self.errors or self.stopped) or "not yet" in self.outcomes.values()


def check_notebook(
    notebook: NotebookNode,
    chapter: int,
    folder: Path,
    on_cell: Callable[[int], None] = lambda index: None,
    timeout: int | None = None,
) -> Outcome:
    """Execute a copy of `notebook` in a clean kernel started in `folder`. The notebook's file is neither read nor written.

    timeout: seconds after which a cell is interrupted, as by Jupyter's stop button; the next one then starts.
    on_cell(index) is called as each of its cells starts. A cell that raises is reported, and the cells after it still run. After
    Ctrl-C, and where the kernel dies, what was found so far is returned.
    """
    with tempfile.TemporaryDirectory(prefix="labs-check-") as own:
        report = Path(own) / "outcomes.json"  # not what the kernel prints: a learner's hooks print there as well
        cells, reached, reason = _run(notebook, report, folder, on_cell, timeout)
        outcomes: dict[str, str] = json.loads(report.read_text("utf-8")) if report.exists() else {}
    raised = _raised(cells)
    if reason == DIED:
        raised.setdefault(_place(cells, reached), "the kernel died")
    errors = []
    for place, message in raised.items():
        if place.startswith("cell "):
            errors.append(f"{place} raised {message}")
        elif outcomes.get(place) != "pass":
            outcomes[place] = "not yet"
            errors.append(f"{place}: not yet. Its cell raised {message}")
    checks = [_cut(_text(cell).strip()) for cell in cells if _is_check(cell)]
    stopped = f"{reason} at {_place(cells, reached)}" if reason else ""
    return Outcome(tuple(filter(None, checks)), _tally(chapter, outcomes), outcomes, tuple(errors), stopped, reason == INTERRUPTED)


def _run(
    notebook: NotebookNode, report: Path, folder: Path, on_cell: Callable[[int], None], timeout: int | None
) -> tuple[list[NotebookNode], int, str]:
    """The cells with their outputs, the index of the one that was reached, and why that is not the last one, "" where it is."""
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    from labsupport.course.kernels import ThisInterpreter

    copy = deepcopy(notebook)
    copy.cells.insert(0, nbformat.v4.new_code_cell(REPORT.format(path=str(report))))
    reached, reason = 0, ""

    def started(cell: NotebookNode, cell_index: int) -> None:
        nonlocal reached
        with suppress(NotImplementedError):  # Windows raises KeyboardInterrupt right here
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop)
        reached = max(0, cell_index - 1)
        if cell_index:
            on_cell(reached)

    def stop() -> None:
        nonlocal reason
        reason = INTERRUPTED
        stopping.append(asyncio.ensure_future(client.km.shutdown_kernel(now=True)))

    quiet = logging.Logger("labs check")  # a kernel that died is said in our own words
    quiet.addHandler(logging.NullHandler())
    stopping: list[asyncio.Future] = []  # held, or it might be collected before it is done
    client = NotebookClient(
        copy,
        timeout=timeout,
        interrupt_on_timeout=True,
        allow_errors=True,
        kernel_manager_class=ThisInterpreter,
        resources={"metadata": {"path": str(folder)}},
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],
        coalesce_streams=False,  # nbclient's patterns take minutes on a long line; `_text` joins the pieces
        on_cell_start=started,
        log=quiet,
    )
    env = {k: v for k, v in os.environ.items() if k != "LABS_STRICT"}  # a wrong answer is to be counted, not raised
    path = [str(PACKAGE.parent), env.get("PYTHONPATH", "")]
    try:
        client.execute(env=env | {"PYTHONPATH": os.pathsep.join(filter(None, path))})
    except KeyboardInterrupt:
        reason = INTERRUPTED
    except (DeadKernelError, RuntimeError) as error:  # nbclient raises the second where a kernel dies as it starts
        if not reason and not isinstance(error, DeadKernelError):
            raise
        reason = reason or DIED
    return copy.cells[1:], reached, reason


def _text(cell: NotebookNode) -> str:
    return "".join(o.text for o in cell.get("outputs", []) if o.output_type == "stream" and o.name == "stdout")


def _cut(text: str) -> str:
    """The beginning and the end, where the verdict stands, of a text that is too long to read."""
    half = LONGEST_CHECK // 2
    if len(text) <= LONGEST_CHECK:
        return text
    return f"{text[:half]}\n... {len(text) - 2 * half} characters are left out ...\n{text[-half:]}"


def _is_check(cell: NotebookNode) -> bool:
    return bool(carry.table(cell.metadata, "nbgrader").get("grade") or re.search(r"\bcheck\(", cell.source))


def _exercise(cell: NotebookNode) -> str | None:
    """The id of the exercise that a cell answers or checks."""
    if answer := ANSWER.fullmatch(carry.answer_key(cell) or ""):
        return ".".join(answer.groups())
    asked = CHECK.search(cell.source)
    return asked.group(1) if asked else None


def _place(cells: Sequence[NotebookNode], index: int) -> str:
    """The id of a cell's exercise; for a cell of none, "cell" and its number from 1."""
    return (_exercise(cells[index]) if index < len(cells) else None) or f"cell {index + 1}"


def _raised(cells: Sequence[NotebookNode]) -> dict[str, str]:
    """The first error at each place (see `_place`), in one line."""
    found: dict[str, str] = {}
    for index, cell in enumerate(cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                reason = (output.evalue.strip().splitlines() or [""])[0]
                found.setdefault(_place(cells, index), f"{output.ename}: {reason}")
    return found


def _tally(chapter: int, outcomes: dict[str, str]) -> str:
    """The closing table, "" for a chapter without exercises."""
    from labsupport.exercises import registry, session

    return "\n".join(session.tally_lines(chapter, outcomes)) if chapter in registry.CHAPTERS else ""
