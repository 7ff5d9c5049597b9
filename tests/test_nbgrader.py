"""Notebook 02 under nbgrader as an instructor runs it: its own generate_assignment, its own autograder, its own gradebook.

Only the set-up cell and the exercises are kept: answers depend on nothing else, and a submission is run once each.
"""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from nbgrader.coursedir import CourseDirectory
from traitlets.config import Config

from labsupport.course import build as forms
from labsupport.exercises.registry import exercises_of

ROOT = Path(__file__).resolve().parents[1]
CHAPTER, NAME = 2, "02_rounding"
EXERCISES = exercises_of(CHAPTER)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Object of type"),  # SQLAlchemy, about nbgrader's own code
]

MUTANT = """\
from labsupport.exercises.registry import get
{name} = get("{id}").mutants[{number}].answer"""
RAISES = "def {name}(*inputs):\n    raise ValueError('not my day')"
NO_PYTHON = "def {name}(:"
# What stands in the answer cells of the third submission, in turn.
KINDS = ["right", "mutant", "blank", "raises", "right", "last mutant", "no python"]


def exercises_only(notebook: NotebookNode) -> NotebookNode:
    notebook.cells = [c for c in notebook.cells if "nbgrader" in c.metadata or "setup" in c.metadata.get("tags", [])]
    return notebook


def answered(source: NotebookNode, kinds: dict[str, str]) -> NotebookNode:
    """The student form of `source`, as labs build makes it, with an answer of the given kind for each exercise id."""
    notebook = forms.student_form(source)
    solved = {cell.id: cell.source for cell in source.cells}
    for exercise in EXERCISES:
        wanted = f"answer-{exercise.id.replace('.', '-')}"
        (cell,) = [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == wanted]
        about = {"id": exercise.id, "name": exercise.name}
        cell.source = {
            "blank": cell.source,
            "right": solved[cell.id],
            "mutant": MUTANT.format(**about, number=0),
            "last mutant": MUTANT.format(**about, number=-1),
            "raises": RAISES.format(**about),
            "no python": NO_PYTHON.format(**about),
        }[kinds[exercise.id]]
    return notebook


SUBMISSIONS = {
    "blank": {e.id: "blank" for e in EXERCISES},
    "right": {e.id: "right" for e in EXERCISES},
    "mixed": {e.id: KINDS[i % len(KINDS)] for i, e in enumerate(EXERCISES)},
}


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """A course directory in which every submission has been graded."""
    root = tmp_path_factory.mktemp("course")
    source = exercises_only(forms.read(forms.sources(ROOT, [str(CHAPTER)])[0]))
    places = {root / "source" / "lab" / f"{NAME}.ipynb": source}
    for student, kinds in SUBMISSIONS.items():
        places[root / "submitted" / student / "lab" / f"{NAME}.ipynb"] = answered(source, kinds)
    for path, notebook in places.items():
        path.parent.mkdir(parents=True)
        nbformat.write(notebook, path)

    config = Config()
    config.CourseDirectory.root = str(root)
    config.Execute.timeout = 120
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LABS_STRICT", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
        api = NbGraderAPI(CourseDirectory(config=config), config=config)
        results = [api.generate_assignment("lab"), *(api.autograde("lab", student) for student in SUBMISSIONS)]
    for result in results:
        assert result["success"], result.get("error") or result.get("log")
    return root


def marks(course: Path, student: str) -> dict[str, float]:
    """The automatic score of each check cell, by exercise id."""
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        (notebook,) = book.find_submission("lab", student).notebooks
        return {g.name.removeprefix("check-").replace("-", "."): g.auto_score for g in notebook.grades}


def test_a_blank_submission_gets_nothing(course):
    assert marks(course, "blank") == {e.id: 0 for e in EXERCISES}


def test_right_answers_get_all_points(course):
    assert marks(course, "right") == {e.id: e.points for e in EXERCISES}


def test_each_exercise_is_marked_on_its_own(course):
    kinds = SUBMISSIONS["mixed"]
    assert set(kinds.values()) == set(KINDS)
    assert marks(course, "mixed") == {e.id: e.points if kinds[e.id] == "right" else 0 for e in EXERCISES}


def test_the_gradebook_knows_the_points(course):
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        assert book.find_assignment("lab").max_score == sum(e.points for e in EXERCISES)


@pytest.mark.parametrize("student", SUBMISSIONS)
def test_nothing_of_ours_writes_to_standard_error(course, student):
    notebook = nbformat.read(course / "autograded" / student / "lab" / f"{NAME}.ipynb", as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", f"cell {cell.id}: {output.text}"


def test_the_release_of_nbgrader_itself_holds_no_solution(course):
    text = (course / "release" / "lab" / f"{NAME}.ipynb").read_text()
    assert "SOLUTION" not in text
    assert "score(" not in text
