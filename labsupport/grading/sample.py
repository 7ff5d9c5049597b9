"""A class to try everything on: three learners and what they hand in for lab 02, made from the course's own notebooks.

Each answer is right (the solution's text), wrong in a way that people are, blank, or never ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode

from labsupport.course import workbook
from labsupport.course.carry import answer_key, is_prediction
from labsupport.exercises.registry import exercises_of
from labsupport.grading.classroom import COLUMNS, ROSTER, SETTINGS, Classroom
from labsupport.grading.records import GradingError
from labsupport.model import files

LAB = 2
INBOX = "inbox"
PREDICTED = "predicted_rise"
ANSWER_SECONDS = 5.0  # one answer never ends, and nobody wants to wait for it

# By exercise: what stands in the solution, and what a learner wrote in its place.
WRONG = {
    "2.1": ("(2**bits - 1)", "2**bits"),
    "2.3": ("steps + zero_point", "steps"),
    "2.4": ("(codes.to(scale.dtype) - zero_point.to(scale.dtype)) * scale", "(codes - zero_point) * scale"),
}
ENDLESS = "def best_clip(weight, bits, factors):\n    while True:\n        pass\n"


@dataclass(frozen=True)
class Person:
    """learner: the id. wrong, blank, endless: exercises by id; all others are right. prediction: what PREDICTED is set to."""

    learner: str
    name: str
    wrong: tuple[str, ...] = ()
    blank: tuple[str, ...] = ()
    endless: tuple[str, ...] = ()
    prediction: str = "None"

    @property
    def points(self) -> int:
        """Of its right answers."""
        missed = {*self.wrong, *self.blank, *self.endless}
        return sum(exercise.points for exercise in exercises_of(LAB) if exercise.id not in missed)


PEOPLE = (
    Person("ada", "Ada Right", prediction="15.0"),
    Person("ben", "Ben Partly", wrong=("2.1", "2.3", "2.4"), blank=("2.7",), endless=("2.8",), prediction="3.0"),
    Person("cleo", "Chloé Blank", blank=tuple(exercise.id for exercise in exercises_of(LAB))),
)


def create(folder: Path) -> Classroom:
    """Make the class, with its roster and an inbox that looks like what Moodle lets one download: a folder for each person.

    Raises GradingError, as Classroom.create does, and where the solutions are not there; nothing is left behind then.
    """
    handed_in = {person: notebook(person) for person in PEOPLE}
    classroom = Classroom.create(folder, "A sample class")
    limits = classroom.settings.limits.model_copy(update={"answer_seconds": ANSWER_SECONDS})
    classroom.settings.model_copy(update={"limits": limits}).write(classroom.folder / SETTINGS)
    rows = [",".join(COLUMNS), *(f"{person.learner},{person.name},{person.learner}@example.org" for person in PEOPLE)]
    files.write_text(classroom.folder / ROSTER, "\n".join(rows) + "\n")
    name = workbook.chapter(str(LAB)).name
    for number, (person, made) in enumerate(handed_in.items(), 1001):
        theirs = classroom.folder / INBOX / f"{person.name}_{number}_assignsubmission_file"
        theirs.mkdir(parents=True)
        workbook.write(made, theirs / name)
    return Classroom.open(folder)


def notebook(person: Person) -> NotebookNode:
    """What one of them hands in. Raises GradingError where the solutions are not beside the notebooks (an installed wheel)."""
    blank = workbook.chapter(str(LAB))
    solved = blank.parent / "solutions" / blank.name
    if not solved.is_file():
        raise GradingError(f"{solved} is not there: a sample class is made in a clone of the repository")
    solutions = {key: cell.source for cell in workbook.read(solved).cells if (key := answer_key(cell))}
    handed_in = workbook.learner_copy(workbook.read(blank))
    for cell in handed_in.cells:
        key = answer_key(cell) or ""
        if is_prediction(cell):
            cell.source = cell.source.replace(f"{PREDICTED} = None", f"{PREDICTED} = {person.prediction}")
        elif key:
            cell.source = _answer(person, key.removeprefix("answer-").replace("-", "."), cell.source, solutions[key])
    return handed_in


def _answer(person: Person, id: str, blank: str, solution: str) -> str:
    if id in person.blank:
        return blank
    if id in person.endless:
        return ENDLESS
    if id in person.wrong:
        right, wrong = WRONG[id]
        if right not in solution:
            raise GradingError(f"the solution of {id} has no {right!r}: mend WRONG in labsupport/grading/sample.py")
        return solution.replace(right, wrong)
    return solution
