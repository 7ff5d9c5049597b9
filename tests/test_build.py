"""labs build, labs build --check and labs badges, on a small notebook that the tests make."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import zmq.asyncio
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.session import Session
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

from labsupport import __version__
from labsupport.cli import build as cli
from labsupport.course import build as forms
from labsupport.course import setup_cell
from labsupport.course.badges import write_badges
from labsupport.course.execute import WIDGET_TEXT
from labsupport.course.kernels import LooksAgain

pytestmark = pytest.mark.slow  # kernels are started

TOOLS = """\
import os
from IPython.display import display

def check(id, answer):
    try:
        answer(1)
    except NotImplementedError:
        if os.environ.get("LABS_STRICT") == "1":
            raise
        print(id, "not attempted")
        return lambda x: 2 * x
    print(id, "pass")
    return answer

def score(id):
    return 1.0"""
ANSWER = """\
def double(x):
    "Twice x."
    ### BEGIN SOLUTION
    twice = x + x
    return twice
    ### END SOLUTION"""
CHECK = """\
double = check("2.1", double)
### BEGIN HIDDEN TESTS
score("2.1")
### END HIDDEN TESTS"""
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PICTURE = f"""\
display({{"image/png": "{PNG}", "text/html": "<img>"}}, metadata={{"image/png": {{"alt": "a dot"}}}}, raw=True)"""
SLIDER = """\
import ipywidgets
ipywidgets.interact(lambda count: print(count), count=(1, 5));"""


def graded(grade_id: str, **kind: object) -> dict:
    facts = {"schema_version": 3, "grade_id": grade_id, "grade": False, "solution": False, "locked": False, "task": False}
    return {"nbgrader": facts | kind}


def small_notebook() -> NotebookNode:
    cells = [
        new_markdown_cell("# A small notebook", id="title"),
        new_code_cell(TOOLS, id="tools", metadata={"tags": ["setup"]}),
        new_code_cell(ANSWER, id="answer", metadata=graded("answer-2-1", solution=True)),
        new_code_cell(CHECK, id="check", metadata=graded("check-2-1", grade=True, locked=True, points=1)),
        new_code_cell("print(double(21))", id="use", metadata={"tags": ["nbval-check-output"]}),
        new_code_cell(SLIDER, id="slider"),
        new_code_cell(PICTURE, id="picture"),
    ]
    return new_notebook(cells=cells)


def cell(notebook: NotebookNode, id: str) -> NotebookNode:
    return next(c for c in notebook.cells if c.id == id)


def edit(path: Path, change: Callable[[NotebookNode], object]) -> None:
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def lay_out(root: Path) -> Path:
    (root / "notebooks" / "solutions").mkdir(parents=True)
    (root / "pyproject.toml").write_text('[tool.labs]\nrepository = ""\n')
    source = root / "notebooks" / "solutions" / "02_small.ipynb"
    nbformat.write(small_notebook(), source)
    return source


@pytest.fixture(scope="module")
def built_once(tmp_path_factory) -> Path:
    source = lay_out(tmp_path_factory.mktemp("built"))
    forms.build(source)
    return source.parents[2]


@pytest.fixture
def source(built_once, tmp_path) -> Path:
    """A source that has been built, in a tree of its own."""
    shutil.copytree(built_once, tmp_path / "course")
    return tmp_path / "course" / "notebooks" / "solutions" / "02_small.ipynb"


def test_built_notebooks_pass_the_check(source):
    assert forms.check(source) == []
    assert forms.orphans(source.parents[2]) == []


def test_the_student_form_has_a_stub_and_no_solution_and_no_hidden_test(source):
    student = nbformat.read(forms.student_path(source), as_version=4)
    stub = "    raise NotImplementedError  # your answer here"
    assert cell(student, "answer").source == f'def double(x):\n    "Twice x."\n{stub}'
    assert cell(student, "check").source == 'double = check("2.1", double)'
    assert "twice" not in str(student)
    assert cell(student, "check").metadata.editable is False
    assert cell(student, "answer").metadata.deletable is False
    assert cell(student, "tools").source == TOOLS
    assert [c.id for c in student.cells] == [c.id for c in small_notebook().cells]


def test_both_forms_ran_to_the_end_and_keep_what_they_showed(source):
    solved = nbformat.read(source, as_version=4)
    student = nbformat.read(forms.student_path(source), as_version=4)
    assert cell(solved, "check").outputs[0].text == "2.1 pass\n"
    assert cell(solved, "check").outputs[1].data["text/plain"] == "1.0"
    assert cell(student, "check").outputs[0].text == "2.1 not attempted\n"
    for notebook in (solved, student):
        assert cell(notebook, "use").outputs[0].text == "42\n"
        assert cell(notebook, "picture").outputs[0].metadata["image/png"]["alt"] == "a dot"
        assert set(cell(notebook, "picture").outputs[0].data) == {"image/png"}  # once, not as HTML again
        assert notebook.metadata.labs.executed_source_sha256 == forms.source_sha256(notebook)


def test_nothing_that_differs_between_runs_is_kept(source):
    for path in (source, forms.student_path(source)):
        notebook = nbformat.read(path, as_version=4)
        (slider,) = cell(notebook, "slider").outputs
        assert slider.data == {"text/plain": WIDGET_TEXT}
        assert slider.metadata.labs.widget
        assert "widgets" not in notebook.metadata
        assert not any("execution" in c.metadata for c in notebook.cells)


def test_building_again_changes_no_byte(source):
    before = {path: path.read_bytes() for path in (source, forms.student_path(source))}
    forms.build(source)
    assert {path: path.read_bytes() for path in before} == before


def test_the_environment_of_the_builder_does_not_reach_the_kernel(source, monkeypatch):
    monkeypatch.setenv("LABS_STRICT", "1")  # would make the blank form fail
    monkeypatch.setenv("LABS_MODEL", "another")
    edit(source, lambda nb: cell(nb, "use").update(source='print(os.environ.get("LABS_MODEL"), os.listdir())'))
    forms.build(source)
    assert cell(nbformat.read(source, as_version=4), "use").outputs[0].text == "None []\n"


CHANGES = {
    "student source": (True, lambda nb: cell(nb, "use").update(source="print(42)"), "cell use: its source"),
    "student prose": (True, lambda nb: cell(nb, "title").update(source="# Another"), "cell title: its source"),
    "student tag": (True, lambda nb: cell(nb, "use").metadata.update(tags=[]), "cell use: its metadata"),
    "student points": (True, lambda nb: cell(nb, "check").metadata.nbgrader.update(points=9), "cell check: its metadata"),
    "student cell gone": (True, lambda nb: nb.cells.pop(), "not those of its source"),
    "student order": (True, lambda nb: nb.cells.reverse(), "not in their order"),
    "student id": (True, lambda nb: nb.cells[0].update(id="other"), "not those of its source"),
    "student answered": (True, lambda nb: cell(nb, "answer").update(source=ANSWER), "cell answer: its source"),
    "source prose": (False, lambda nb: cell(nb, "title").update(source="# Another"), "outputs are older"),
    "source code": (False, lambda nb: cell(nb, "use").update(source="print(42)"), "outputs are older"),
    "source solution": (False, lambda nb: cell(nb, "answer").update(source=ANSWER + "\n"), "outputs are older"),
    "source tag": (False, lambda nb: cell(nb, "use").metadata.update(tags=["x"]), "outputs are older"),
    "source hash gone": (False, lambda nb: nb.metadata.pop("labs"), "never executed"),
    "count gone": (False, lambda nb: cell(nb, "use").update(execution_count=None), "cell use: never ran"),
    "run alone": (False, lambda nb: cell(nb, "use").update(execution_count=9), "cell use: ran out of order"),
    "stderr": (
        True,
        lambda nb: cell(nb, "use").outputs[0].update(name="stderr"),
        "cell use: writes to standard error",
    ),
    "error": (
        True,
        lambda nb: cell(nb, "use").outputs.append(nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])),
        "cell use: holds an error: ValueError: no",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_check_notices(source, name):
    in_student, change, says = CHANGES[name]
    path = forms.student_path(source) if in_student else source
    edit(path, change)
    faults = forms.check(source)
    assert any(says in fault and path.name in fault for fault in faults), faults


def test_the_check_notices_a_missing_form_and_an_orphan(source):
    student = forms.student_path(source)
    student.rename(student.with_name("03_other.ipynb"))
    assert forms.check(source) == ["02_small.ipynb: has not been built"]
    assert forms.orphans(source.parents[2]) == ["03_other.ipynb: has no source"]


def test_the_check_lets_outputs_and_counts_of_no_consequence_be(source):
    student = forms.student_path(source)
    edit(student, lambda nb: cell(nb, "use").outputs[0].update(text="43\n"))
    edit(student, lambda nb: cell(nb, "use").metadata.update(execution={"iopub.status.busy": "now"}, scrolled=True))
    assert forms.check(source) == []


FAILURES = {
    "raises": (lambda nb: cell(nb, "use").update(source="1 / 0"), "cell use: ZeroDivisionError: division by zero"),
    "wrong answer": (
        lambda nb: cell(nb, "answer").update(source=ANSWER.replace("twice = x + x", "raise NotImplementedError")),
        "solutions/02_small.ipynb, cell check: NotImplementedError",
    ),
    "only the blank form fails": (
        lambda nb: cell(nb, "use").update(source='assert "LABS_STRICT" in os.environ, "blank"'),
        "02_small.ipynb, cell use: AssertionError: blank",
    ),
    "stderr": (
        lambda nb: cell(nb, "use").update(source='import warnings\nwarnings.warn("hm")'),
        "cell use: writes to standard error",
    ),
    "a slider raises": (
        lambda nb: cell(nb, "slider").update(source=SLIDER.replace("print(count)", "1 / 0")),
        "a widget's function: ZeroDivisionError: division by zero",
    ),
    "kernel dies": (lambda nb: cell(nb, "use").update(source="os._exit(1)"), "cell use: the kernel died"),
    "no markers": (lambda nb: cell(nb, "answer").update(source="x = 1"), "cell answer: a solution cell without"),
    "no end": (
        lambda nb: cell(nb, "answer").update(source="### BEGIN SOLUTION"),
        "nbgrader refuses it: no end solution statement found",
    ),
    "solution outside": (lambda nb: cell(nb, "use").update(source=ANSWER), "nbgrader refuses it: Solution region"),
    "same grade id": (
        lambda nb: cell(nb, "check").metadata.nbgrader.update(grade_id="answer-2-1"),
        "nbgrader refuses it: Notebook failed to validate",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_clear_line_and_writes_nothing(source, name):
    change, says = FAILURES[name]
    edit(source, change)
    before = {path: path.read_bytes() for path in source.parents[1].rglob("*") if path.is_file()}
    with pytest.raises(forms.BuildError) as caught:
        forms.build(source)
    assert says in str(caught.value)
    assert "02_small.ipynb" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in source.parents[1].rglob("*") if path.is_file()} == before


def test_a_write_that_fails_leaves_both_files_as_they_were(source, monkeypatch):
    before = {path: path.read_bytes() for path in source.parents[1].rglob("*") if path.is_file()}
    good, bad = nbformat.read(source, as_version=4), nbformat.read(source, as_version=4)
    good.cells[0].source = "# New"
    bad.cells[0].cell_type = "nonsense"
    with pytest.raises(nbformat.ValidationError):
        forms.write({source: good, forms.student_path(source): bad})
    assert {path: path.read_bytes() for path in source.parents[1].rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not a notebook"),
        ("[]", "not a notebook"),
        ('{"nbformat": 4, "cells": 3}', "not a notebook"),
        ('{"cells": [{"cell_type": "markdown", "metadata": {}, "source": ""}]}', "not a notebook"),
        (
            '{"cells": [{"cell_type": "markdown", "metadata": {}, "source": ""}], '
            '"metadata": {}, "nbformat": 4, "nbformat_minor": 4}',
            "every cell needs an id",
        ),
    ],
)
def test_a_file_that_is_no_notebook_is_named(source, content, says):
    source.write_text(content)
    with pytest.raises(forms.BuildError, match=says):
        forms.build(source)
    assert "02_small.ipynb" in forms.check(source)[0]


def test_no_run_keeps_the_outputs_of_unchanged_cells_and_the_check_calls_them_old(source):
    edit(source, lambda nb: cell(nb, "title").update(source="# Another title"))
    forms.generate(source)
    student = nbformat.read(forms.student_path(source), as_version=4)
    assert cell(student, "title").source == "# Another title"
    assert cell(student, "use").outputs[0].text == "42\n"
    assert "02_small.ipynb: its outputs are older than its source" in forms.check(source)


def test_command_line(source, monkeypatch):
    monkeypatch.chdir(source.parents[2])
    run = CliRunner().invoke
    assert run(cli.app, ["build", "--check"]).exit_code == 0
    edit(forms.student_path(source), lambda nb: cell(nb, "use").metadata.update(tags=[]))
    result = run(cli.app, ["build", "2", "--check"])
    assert result.exit_code == 1
    assert "02_small.ipynb: cell use: its metadata" in result.output
    assert run(cli.app, ["build", "--no-run"]).exit_code == 0
    assert run(cli.app, ["build", "02", "--check"]).exit_code == 0  # the change was only in the student form
    result = run(cli.app, ["build", "7"])
    assert result.exit_code == 1
    assert "there is no notebook '7', there are 02" in result.output
    assert run(cli.app, ["build", "--check", "--no-run"]).exit_code == 1


def test_badges(source):
    root, student = source.parents[2], forms.student_path(source)
    readme = root / "README.md"

    def as_built(notebook: NotebookNode) -> None:
        cell(notebook, "tools").source = setup_cell.setup()
        notebook.metadata.labs.executed_source_sha256 = forms.source_sha256(notebook)

    for path in (source, student):
        edit(path, as_built)
    assert forms.check(source) == []
    built = [path.read_bytes() for path in (source, student)]
    readme.write_text("# Course\n<!-- badges -->\nold\n<!-- /badges -->\nThe end.\n")
    assert "the address is not set" in write_badges(root)[0]
    assert readme.read_text() == "# Course\n<!-- badges -->\n<!-- /badges -->\nThe end.\n"

    (root / "pyproject.toml").write_text('[tool.labs]\nrepository = "https://github.com/some/course.git"\n')
    assert write_badges(root)[1:] == ["set-up cell changed, in both forms, in 02_small.ipynb"]
    text = readme.read_text()
    assert f"https://colab.research.google.com/github/some/course/blob/v{__version__}/notebooks/02_small.ipynb" in text
    assert f"https://mybinder.org/v2/gh/some/course/v{__version__}?urlpath=lab/tree/notebooks/02_small.ipynb" in text
    assert text.startswith("# Course\n")
    assert text.endswith("<!-- /badges -->\nThe end.\n")
    for path in (source, student):
        prepared = cell(nbformat.read(path, as_version=4), "tools")
        assert f"-b v{__version__} https://github.com/some/course course" in prepared.source
        assert prepared.execution_count == 1
    assert forms.check(source) == []  # nothing is older than its source
    assert len(write_badges(root)) == 1  # a second time there is nothing to do
    edit(student, lambda nb: cell(nb, "tools").update(source=setup_cell.setup()))
    assert write_badges(root)[1:] == ["set-up cell changed, in both forms, in 02_small.ipynb"]
    assert forms.check(source) == []

    edit(source, lambda nb: cell(nb, "tools").update(source=setup_cell.setup("https://github.com/some/course") + "\nx = 1"))
    assert "solutions/02_small.ipynb: its outputs are older than its source" in forms.check(source)
    (root / "pyproject.toml").write_text('[tool.labs]\nrepository = ""\n')
    write_badges(root)
    assert [path.read_bytes() for path in (source, student)] == built


def test_badges_refuse_what_they_cannot_do(source):
    root = source.parents[2]
    with pytest.raises(forms.BuildError, match=r"README\.md needs one <!-- badges -->"):
        write_badges(root)
    (root / "README.md").write_text("<!-- badges --><!-- /badges -->")
    (root / "pyproject.toml").write_text('[tool.labs]\nrepository = "git@github.com:some/course"\n')
    with pytest.raises(forms.BuildError, match="wanted https://github"):
        write_badges(root)
    (root / "pyproject.toml").write_text("")
    edit(source, lambda nb: cell(nb, "tools").metadata.update(tags=[]))
    with pytest.raises(forms.BuildError, match="0 cells have the tag setup"):
        write_badges(root)


async def reply_while_sending(kind: type[AsyncZMQSocketChannel]) -> dict | None:
    """Wait for a message on a channel whose wake-up is consumed by something else on the same socket, as nbclient's sends do."""
    context, session = zmq.asyncio.Context(), Session(key=b"")
    waiting, kernel = context.socket(zmq.DEALER), zmq.Context.shadow(context.underlying).socket(zmq.DEALER)
    port = waiting.bind_to_random_port("tcp://127.0.0.1")
    kernel.connect(f"tcp://127.0.0.1:{port}")
    try:
        reply = asyncio.create_task(kind(waiting, session).get_msg(timeout=10))
        await asyncio.sleep(0.1)
        session.send(kernel, "execute_reply")
        time.sleep(0.2)  # the loop is busy, and the message has come in
        zmq.Socket.shadow(waiting.underlying).getsockopt(zmq.EVENTS)
        done, _ = await asyncio.wait([reply], timeout=3)
        reply.cancel()
        return reply.result() if done else None
    finally:
        waiting.close(linger=0)
        kernel.close(linger=0)
        context.term()


def test_a_reply_that_wakes_nobody_is_found():
    assert asyncio.run(reply_while_sending(AsyncZMQSocketChannel)) is None  # the fault that LooksAgain is there for
    assert asyncio.run(reply_while_sending(LooksAgain))["header"]["msg_type"] == "execute_reply"
