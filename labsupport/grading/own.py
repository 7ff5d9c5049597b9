"""Numbers of each learner's own: drawn, asked for, and looked at.

With `labs release --own-numbers` each learner has a copy of their own. After the check of an exercise a cell holds a constant that
makes inputs which no other learner has; the learner writes down one number that comes from their answer on them (how: see
labsupport/exercises/own.py). One more item is a prediction: a question of the chapter with numbers of the learner's own.

A constant comes from HMAC-SHA256 over the learner and the exercise under the class's secret: who sees constants of their own, or of
half the class, can neither find the secret nor the constants of others. It stands in the learner's notebook for all to see, and
whoever has that notebook can compute its number.

What it shows: a number that is another learner's and not one's own was hardly found by oneself. The numbers of a class are drawn so
that any two lie further apart than the exercise's tolerance and rounding can explain. What it does not show: that a number that is
right was made by the learner. Whoever hands the answer's code on, or runs the course's own function, has a right number, as has
whoever asks another to run their notebook. A number that is missing or wrong shows nothing by itself. So it is evidence for a
conversation, not for a mark, and no points hang on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pydantic import Field

from labsupport.grading.classroom import Classroom
from labsupport.grading.items import PREDICTION, QUESTIONS
from labsupport.grading.records import GradingError, Record, Release, Submission

SLOW = {"9.4"}  # the reference takes seconds for one input: hours for a class
TRIES = 12  # new constants before one more input is added to an exercise that has few different numbers
MOST_CONSTANTS = 5
WRITTEN_DIGITS = 6  # significant digits that are enough to write down
GUESS = 0.05  # a prediction is right within 5 %: it is made in the head


class Item(Record):
    """What one learner is asked. number: the right one; within: how far one that is right may lie from it.

    apart: a number of somebody else's that lies this near is this one.
    """

    constants: tuple[int, ...]
    number: float
    within: float = Field(ge=0)
    apart: float = Field(ge=0)


class Drawn(Record):
    """All items of a lab by learner, and by exercise or PREDICTION. It stays in the class's folder."""

    items: dict[str, dict[str, Item]] = {}


def path_of(classroom: Classroom, lab: int) -> Path:
    """Not beside the notebooks, which are handed out: the right numbers of all learners are in it."""
    return classroom.folder_of("own", lab) / "numbers.json"


def load(classroom: Classroom, lab: int) -> Drawn:
    path = path_of(classroom, lab)
    return Drawn.read(path) if path.exists() else Drawn()


def draw(
    classroom: Classroom, lab: int, exercises: Iterable[str], before: Drawn, on_item: Callable[[], None] = lambda: None
) -> tuple[Drawn, list[str]]:
    """Items for all learners of the roster; those of `before` stay. Also a line for each exercise that gets none, and why.

    An exercise gets numbers where only one set of outputs is right, they hold numbers, and they differ enough between inputs.
    """
    from labsupport.exercises.own import can_be_asked, expected
    from labsupport.exercises.registry import get

    items = {learner: dict(before.items.get(learner, {})) for learner in {*classroom.roster, *before.items}}
    lines = []

    def compute(id: str) -> Callable[[tuple[int, ...]], tuple[float, float]]:
        exercise = get(id)
        return lambda constants: expected(exercise, constants)

    kinds: dict[str, Callable[[tuple[int, ...]], tuple[float, float]]] = {}
    for id in exercises:
        if id in SLOW or not can_be_asked(get(id)):
            lines.append(f"{id}: no numbers of one's own, {'it takes too long' if id in SLOW else 'many answers are right'}")
            continue
        kinds[id] = compute(id)
    kinds[PREDICTION] = lambda constants: (QUESTIONS[lab].number(constants[0]), 0.0)
    for id, number_of in kinds.items():
        taken = [(mine[id].number, mine[id].apart) for mine in items.values() if id in mine]
        for learner in classroom.roster:
            if id not in items[learner]:
                found = _draw(classroom, lab, learner, id, number_of, taken)
                if found is None:
                    if any(id in mine for mine in before.items.values()):  # the others have their copies
                        lines.append(f"{id}: no number for {learner}, none is left that nobody has")
                        continue
                    lines.append(f"{id}: no numbers of one's own, its outputs differ too little between learners")
                    for mine in items.values():
                        mine.pop(id, None)
                    break
                items[learner][id] = found
                taken.append((found.number, found.apart))
            on_item()
    return Drawn(items=items), lines


def _draw(
    classroom: Classroom,
    lab: int,
    learner: str,
    id: str,
    number_of: Callable[[tuple[int, ...]], tuple[float, float]],
    taken: list[tuple[float, float]],
) -> Item | None:
    """The first constants whose number is nobody else's; None where there are none."""
    for count in range(1, MOST_CONSTANTS + 1 if id != PREDICTION else 2):
        for turn in range(TRIES if id != PREDICTION else 100 * TRIES):
            drawn = classroom.secret("own", str(lab), learner, id, str(count), str(turn))
            constants = tuple(_constant(drawn[4 * place : 4 * place + 4]) for place in range(count))
            number, within = number_of(constants)
            apart = within + _rounding(number)
            if not math.isfinite(number) or not math.isfinite(apart):
                return None
            if all(abs(number - other) > apart + near for other, near in taken):
                return Item(constants=constants, number=number, within=max(apart, _guess(id, number)), apart=apart)
            if not number and not turn and count == 1 and id != PREDICTION and _nothing(number_of):
                return None
    return None


def _nothing(number_of: Callable[[tuple[int, ...]], tuple[float, float]]) -> bool:
    """Whether the outputs hold no numbers: two more inputs give 0 as well."""
    return all(number_of((constant,))[0] == 0 for constant in (10_000_001, 10_000_002))


def _constant(drawn: bytes) -> int:
    """Eight digits: easy to read out, and no seed that `check` or `score` use."""
    return 10_000_000 + int.from_bytes(drawn) % 90_000_000


def _rounding(number: float) -> float:
    """Half a unit of the last digit that has to be written down."""
    return 0.5 * 10.0 ** (math.floor(math.log10(abs(number))) + 1 - WRITTEN_DIGITS) if number else 0.0


def _guess(id: str, number: float) -> float:
    return GUESS * abs(number) if id == PREDICTION else 0.0


def judge(classroom: Classroom, release: Release, learner: str, submission: Submission) -> dict[str, str]:
    """For each item of a learner: "right", "wrong", "blank", or "as <learner>" where the number is somebody else's.

    Raises GradingError where the class's folder has lost what was drawn.
    """
    drawn = load(classroom, release.lab)
    mine = drawn.items.get(learner)
    if mine is None:
        if not drawn.items:
            raise GradingError(f"{path_of(classroom, release.lab)} is missing: restore it, or release the lab with --again")
        return {}
    return {id: _judged(drawn.items, learner, id, item, submission.own.get(id)) for id, item in mine.items()}


def _judged(items: Mapping[str, Mapping[str, Item]], learner: str, id: str, item: Item, value: float | None) -> str:
    if value is None:
        return "blank"
    if abs(value - item.number) <= item.apart:
        return "right"
    if id == PREDICTION and (abs(value - item.number) <= item.within or value == float(f"{value:.3g}")):
        return "right" if abs(value - item.number) <= item.within else "wrong"  # a round guess is nobody's
    theirs = {other: its[id] for other, its in items.items() if other != learner and id in its}
    others = [other for other, its in theirs.items() if abs(value - its.number) <= its.apart]
    return f"as {others[0]}" if len(others) == 1 else "wrong"
