"""What a notebook calls: `check`, `score`, `tally`, `revisit`. Prints to standard output only; nbgrader punishes the other."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from labsupport.exercises.base import test
from labsupport.exercises.registry import exercises_of, get

CHECK_SEEDS = range(5)
SCORE_SEEDS = range(1000, 1010)


@dataclass
class Record:
    answer: Callable
    outcome: str  # "pass", "not yet" or "not attempted"


_records: dict[str, Record] = {}


def check(id: str, answer: Callable) -> Callable:
    """Judge an answer, say what was found, and return a function to go on with: the answer, or the reference in its place.

    With LABS_STRICT=1, as when the solutions are tested, anything but a pass raises AssertionError.
    """
    exercise = get(id)
    seeds = CHECK_SEEDS if not exercise.needs_model else CHECK_SEEDS[:1]
    verdict, blank = test(exercise, answer, seeds)
    outcome = "pass" if verdict.passed else "not attempted" if blank else "not yet"
    _records[id] = Record(answer, outcome)
    if verdict.passed:
        line = f"{id} {exercise.name}: {verdict.message}"
    elif blank:
        line = f"{id} {exercise.name}: not attempted, going on with the reference"
    else:
        line = f"{id} {exercise.name}: not yet. {verdict.message}\n    Going on with the reference."
    if not verdict.passed and os.environ.get("LABS_STRICT") == "1":
        raise AssertionError(line)
    print(line)
    return answer if verdict.passed else exercise.reference


def score(id: str) -> float:
    """Points for the answer last given to `check`, on other inputs than `check` used. nbgrader reads the number as a mark."""
    exercise = get(id)
    if id not in _records:
        return 0.0
    seeds = SCORE_SEEDS if not exercise.needs_model else SCORE_SEEDS[:1]
    verdict, _ = test(exercise, _records[id].answer, seeds)
    return float(exercise.points) if verdict.passed else 0.0


def tally(chapter: int) -> None:
    """Print where the learner stands with the exercises of one notebook."""
    exercises = exercises_of(chapter)
    for e in exercises:
        outcome = _records[e.id].outcome if e.id in _records else "not attempted"
        print(f"{e.id:5} {e.title:44} {outcome}")
    done = sum(_records[e.id].outcome == "pass" for e in exercises if e.id in _records)
    print(f"{done} of {len(exercises)} pass")


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
