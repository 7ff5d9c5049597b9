"""Notebook 02 under plain nbgrader as an instructor runs it, by its commands: generate_assignment, autograde, export.

And what it makes of submissions as they come in. INSTRUCTORS.md says the same in words.
"""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import nbformat
import nbgrader_course as course_of
import pytest
from nbgrader_course import LAB, cell, marks, nbgrader, succeeded

from labsupport.exercises.registry import exercises_of

CHAPTER, NAME = 2, "02_rounding"
EXERCISES = exercises_of(CHAPTER)
ALL = sum(exercise.points for exercise in EXERCISES)

pytestmark = pytest.mark.slow

MUTANT = """\
from labsupport.exercises.registry import get
{name} = get("{id}").mutants[{number}].answer"""
RAISES = "def {name}(*inputs):\n    raise ValueError('not my day')"
NO_PYTHON = "def {name}(:"
# What stands in the answer cells of the third submission, in turn.
KINDS = ["right", "mutant", "blank", "raises", "right", "last mutant", "no python"]
SUBMISSIONS = {
    "blank": {e.id: "blank" for e in EXERCISES},
    "right": {e.id: "right" for e in EXERCISES},
    "mixed": {e.id: KINDS[i % len(KINDS)] for i, e in enumerate(EXERCISES)},
}
DELETED = "2.2"  # the exercise whose check cell one learner deletes
# A machine under load is no reason for another mark: the defaults are 30 and 4 seconds.
PATIENT = ("--Execute.timeout=300", "--Execute.iopub_timeout=300")


def answered(kinds: dict[str, str]) -> nbformat.NotebookNode:
    """A submission with an answer of the given kind for each exercise id."""
    names = {e.id: e.name for e in EXERCISES}

    def fill(id: str, stub: str, solution: str) -> str:
        about = {"id": id, "name": names[id]}
        return {
            "blank": stub,
            "right": solution,
            "mutant": MUTANT.format(**about, number=0),
            "last mutant": MUTANT.format(**about, number=-1),
            "raises": RAISES.format(**about),
            "no python": NO_PYTHON.format(**about),
        }[kinds[id]]

    return course_of.answered(course_of.exercises_only(CHAPTER), fill)


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """A course directory in which every submission has been graded and the grades are exported."""
    root = tmp_path_factory.mktemp("course")
    handed_in = {learner: answered(kinds) for learner, kinds in SUBMISSIONS.items()}
    handed_in["deleted"] = answered(SUBMISSIONS["right"])
    handed_in["deleted"].cells.remove(cell(handed_in["deleted"], f"check-{DELETED.replace('.', '-')}"))
    course_of.lay_out(root, NAME, course_of.exercises_only(CHAPTER), handed_in)
    for command in (["generate_assignment", LAB], ["autograde", LAB, *PATIENT], ["export"]):
        succeeded(nbgrader(root, *command))
    return root


def test_a_blank_submission_gets_nothing(course):
    assert marks(course, "blank") == {e.id: 0 for e in EXERCISES}


def test_right_answers_get_all_points(course):
    assert marks(course, "right") == {e.id: e.points for e in EXERCISES}


def test_each_exercise_is_marked_on_its_own(course):
    kinds = SUBMISSIONS["mixed"]
    assert set(kinds.values()) == set(KINDS)
    assert marks(course, "mixed") == {e.id: e.points if kinds[e.id] == "right" else 0 for e in EXERCISES}


def test_the_exported_grades_are_the_marks(course):
    with (course / "grades.csv").open(newline="", encoding="utf-8") as stream:
        rows = {row["student_id"]: row for row in csv.DictReader(stream)}
    right = {"blank": 0, "right": ALL, "mixed": sum(e.points for e in EXERCISES if SUBMISSIONS["mixed"][e.id] == "right")}
    assert {learner: float(rows[learner]["score"]) for learner in right} == right
    assert {float(row["max_score"]) for row in rows.values()} == {ALL}


@pytest.mark.parametrize("student", SUBMISSIONS)
def test_nothing_of_ours_writes_to_standard_error(course, student):
    notebook = nbformat.read(course / "autograded" / student / LAB / f"{NAME}.ipynb", as_version=4)
    for each in notebook.cells:
        for output in each.get("outputs", []):
            assert output.get("name") != "stderr", f"cell {each.id}: {output.text}"


def test_the_release_of_nbgrader_itself_holds_no_solution(course):
    text = (course / "release" / LAB / f"{NAME}.ipynb").read_text()
    assert "SOLUTION" not in text
    assert "score(" not in text


def test_a_deleted_check_cell_costs_its_points(course):
    """Although the answer is there and right."""
    found = marks(course, "deleted")
    assert {id: points or 0 for id, points in found.items()} == {e.id: e.points if e.id != DELETED else 0 for e in EXERCISES}


def test_a_copied_marked_cell_stops_the_whole_command(course):
    """nbgrader empties the metadata of the first of two, and then takes the notebook for one of an older version."""
    notebook = answered(SUBMISSIONS["right"])
    original = cell(notebook, "check-2-1")
    second = copy.deepcopy(original)
    second.id = "another"
    notebook.cells.insert(notebook.cells.index(original), second)
    path = course / "submitted" / "copied" / LAB / f"{NAME}.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(notebook, path)
    done = nbgrader(course, "autograde", LAB, "--student=copied", *PATIENT)
    assert done.returncode != 0
    assert "exists multiple times" in done.stderr
    assert "old version" in done.stderr
    assert set(marks(course, "copied").values()) == {None}


def test_its_own_limit_is_thirty_seconds_a_cell():
    from nbgrader.preprocessors import Execute

    assert Execute().timeout == 30
