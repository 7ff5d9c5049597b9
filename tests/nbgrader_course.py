"""A course of nbgrader in a folder, run by its own commands: notebooks handed out, handed in, marked, and the marks read.

Only the set-up cell and the exercises of a notebook are kept: answers depend on nothing else, and a submission is run once each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from labsupport.course import build as forms

ROOT = Path(__file__).resolve().parents[1]
LAB = "lab"


def exercises_only(chapter: int) -> NotebookNode:
    """The source of a chapter, without what is between its exercises."""
    notebook = forms.read(forms.sources(ROOT, [str(chapter)])[0])
    notebook.cells = [c for c in notebook.cells if "nbgrader" in c.metadata or "setup" in c.metadata.get("tags", [])]
    return notebook


def cell(notebook: NotebookNode, grade_id: str) -> NotebookNode:
    (found,) = [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == grade_id]
    return found


def answered(source: NotebookNode, fill: Callable[[str, str, str], str]) -> NotebookNode:
    """The student form of `source`, as labs build makes it; fill(exercise id, stub, solution) gives the text of each answer."""
    notebook = forms.student_form(source)
    solved = {c.id: c.source for c in source.cells}
    for each in notebook.cells:
        name = each.metadata.get("nbgrader", {}).get("grade_id", "")
        if name.startswith("answer-"):
            each.source = fill(name.removeprefix("answer-").replace("-", "."), each.source, solved[each.id])
    return notebook


def lay_out(root: Path, name: str, source: NotebookNode, handed_in: dict[str, NotebookNode]) -> None:
    """Write the course's source and what its learners hand in, as `nbgrader` looks for them."""
    places = {root / "source" / LAB / f"{name}.ipynb": source}
    places |= {root / "submitted" / learner / LAB / f"{name}.ipynb": notebook for learner, notebook in handed_in.items()}
    for path, notebook in places.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)


def nbgrader(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run one command of nbgrader in a course, as somebody at a terminal would."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # A setting of this process's own, such as LABS_STRICT, is not the instructor's.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LABS_STRICT")}
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # nbgrader calls `alembic`
    environment |= {"PYTHONPATH": path, "PATH": programs, "JUPYTER_PREFER_ENV_PATH": "1"}
    return subprocess.run(
        [sys.executable, "-m", "nbgrader", *command], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def marks(root: Path, learner: str) -> dict[str, float | None]:
    """The automatic score of each check cell that nbgrader found, by exercise id."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{root / 'gradebook.db'}") as book:
        (notebook,) = book.find_submission(LAB, learner).notebooks
        return {g.name.removeprefix("check-").replace("-", "."): g.auto_score for g in notebook.grades}


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that must succeed printed."""
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
