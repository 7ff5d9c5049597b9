"""What a notebook calls: `check`, `score`, `tally`, `revisit`. Prints to standard output only; nbgrader gives 0 for the other."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labsupport.exercises.attempts import is_reference
from labsupport.exercises.form import Exercise, Verdict, wrong
from labsupport.exercises.judging import test
from labsupport.exercises.registry import exercises_of, get
from labsupport.model import memory

CHECK_SEEDS = range(5)
SCORE_SEEDS = range(1000, 1010)


@dataclass
class Record:
    """answer: what was last given to `check`. outcome: "pass", "not yet" or "not attempted". line: what was printed about it."""

    answer: Callable
    outcome: str
    line: str


_records: dict[str, Record] = {}


def check(id: str, answer: Callable) -> Callable:
    """Judge an answer, say what was found, and return a function to go on with: the answer, or the reference in its place.

    The reference that an earlier check of the same exercise returned is no answer: what was said then is said again.
    With LABS_STRICT=1, as when the solutions are tested, anything but a pass raises AssertionError.
    """
    exercise, before = get(id), _records.get(id)
    if answer is exercise.reference and before is not None and before.outcome != "pass":
        print(before.line)
        return answer
    verdict, blank, printed = _judged(exercise, answer, CHECK_SEEDS)
    outcome = "pass" if verdict.passed else "not attempted" if blank else "not yet"
    if verdict.passed:
        line = f"{id} {exercise.name}: {verdict.message}"
    elif blank:
        line = f"{id} {exercise.name}: not attempted, going on with the reference"
    else:
        line = f"{id} {exercise.name}: not yet. {verdict.message}\n    Going on with the reference."
    _records[id] = Record(answer, outcome, line)
    if not verdict.passed and os.environ.get("LABS_STRICT") == "1":
        raise AssertionError(line)
    if printed:
        print(f"{exercise.name} printed:\n{printed.rstrip()}")
    print(line)
    return answer if verdict.passed else exercise.reference


def _judged(exercise: Exercise, answer: Callable, seeds: range) -> tuple[Verdict, bool, str]:
    """The verdict, whether the answer is the untouched stub, and what it printed the first time."""
    if is_reference(exercise, answer):
        return wrong("it is labsupport's own version. Write it out: the point is to have built it"), False, ""
    verdict, tried = test(exercise, answer, seeds if not exercise.needs_model else seeds[:1])
    return verdict, tried[0].status == "blank", tried[0].printed


def score(id: str) -> float:
    """Points for the answer last given to `check`, on other inputs than `check` used. nbgrader reads the number as a mark."""
    exercise = get(id)
    if id not in _records:
        return 0.0
    verdict, *_ = _judged(exercise, _records[id].answer, SCORE_SEEDS)
    return float(exercise.points) if verdict.passed else 0.0


def passed_answer(id: str) -> Callable | None:
    """The answer last given to `check`, where it passed."""
    record = _records.get(id)
    return record.answer if record is not None and record.outcome == "pass" else None


def tally(chapter: int) -> None:
    """Print where the learner stands with the exercises of one notebook."""
    for line in tally_lines(chapter, {id: record.outcome for id, record in _records.items()}):
        print(line)


def tally_lines(chapter: int, outcome_of: Mapping[str, str]) -> Iterator[str]:
    """A line for each exercise of a chapter, and how many pass. outcome_of: by id; what is missing was not attempted."""
    exercises = exercises_of(chapter)
    outcomes = [outcome_of.get(e.id, "not attempted") for e in exercises]
    for e, outcome in zip(exercises, outcomes, strict=True):
        yield f"{e.id:5} {e.title:44} {outcome}"
    yield f"{outcomes.count('pass')} of {len(exercises)} pass"


def report_to(path: str) -> None:
    """Have the kernel that this runs in write outcomes by id to a file of JSON after each cell; `exit()` then only raises.

    For `labs check`: what a notebook prints, and what its hooks print, says nothing about its exercises.
    """
    import sys

    shell = sys.modules["IPython"].get_ipython()

    def write(result: Any) -> None:
        Path(path).write_text(json.dumps({id: record.outcome for id, record in _records.items()}), "utf-8")

    shell.events.register("post_run_cell", write)
    shell.user_ns.update(exit=sys.exit, quit=sys.exit)  # Jupyter's own end the kernel, and every later verdict with it


def revisit(prediction: float | str | None, measured: float | str, what: str) -> None:
    """Set a prediction beside what was measured. A prediction may be left out; it is never scored."""
    if prediction is None:
        print(f"{what}: measured {_text(measured)}; no prediction was made")
        return
    line = f"{what}: predicted {_text(prediction)}, measured {_text(measured)}"
    if isinstance(measured, str):
        line += ", as predicted" if str(prediction).strip().lower() == measured.lower() else ""
    elif float(prediction) > 0 and measured > 0:
        line += f", a factor {max(float(prediction) / measured, measured / float(prediction)):.2g} apart"
    print(line)


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


OURS = {"check": check, "score": score, "tally": tally, "revisit": revisit}
_CALLS = re.compile(r"^(?:\w+ = )?(check|score|tally|revisit)\(", re.MULTILINE)


class KeepNames:
    """A notebook's cells call `check`, `score`, `tally` and `revisit` by name, and a learner may have used one for a number.

    Before a cell that calls one of them at the beginning of a line, the name means ours again; after the cell, it is the learner's.
    """

    def __init__(self, names: dict) -> None:
        self.names = names
        self.borrowed: dict[str, Any] = {}

    def before(self, info: Any) -> None:
        for name in set(_CALLS.findall(info.raw_cell or "")):
            if self.names.get(name, OURS[name]) is not OURS[name]:
                self.borrowed[name] = self.names[name]
                self.names[name] = OURS[name]

    def after(self, result: Any) -> None:
        for name, value in self.borrowed.items():
            if self.names.get(name) is OURS[name]:
                self.names[name] = value
        self.borrowed = {}


def prepare_kernel() -> None:
    """In Jupyter's kernel: keep the course's four names working (see KeepNames), and say where memory is short."""
    import sys

    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        keeper = KeepNames(shell.user_ns)
        shell.events.register("pre_run_cell", keeper.before)
        shell.events.register("post_run_cell", keeper.after)
        if short := memory.warning():
            print(short)
