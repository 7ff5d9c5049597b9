"""The learner's copies: nothing a learner wrote is ever lost, and updates arrive where they can."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from labsupport.course import workbook

STUB = "def f(x):\n    raise NotImplementedError  # your answer here"


def code(id: str, source: str, shown: str = "", tags: tuple[str, ...] = (), grade_id: str = "") -> NotebookNode:
    cell = new_code_cell(source, id=id, execution_count=1)
    cell.outputs = [new_output("stream", name="stdout", text=shown)] if shown else []
    cell.metadata["tags"] = list(tags)
    if grade_id:
        facts = {"schema_version": 3, "grade_id": grade_id, "solution": True, "grade": False, "locked": False, "task": False}
        cell.metadata["nbgrader"] = facts
    return cell


def course(folder: Path, text: str = "first", stub: str = STUB, answers: tuple[str, ...] = ("answer-2-1",)) -> Path:
    """A folder of notebooks with one chapter."""
    folder.mkdir(exist_ok=True)
    cells = [
        new_markdown_cell(text, id="intro"),
        code("above", "print(1)", "1\n"),
        code("guess", "prediction = None  # your guess", "", ("prediction",)),
        code("below", "print(42)", "42\n"),
        *(code(f"cell-{a}", stub, grade_id=a) for a in answers),
    ]
    nbformat.write(new_notebook(cells=cells), folder / "02_rounding.ipynb")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return course(tmp_path / "notebooks")


@pytest.fixture
def book(tmp_path: Path, source: Path) -> Path:
    assert workbook.lay_out(tmp_path / "workbook", source) == []
    return tmp_path / "workbook"


def mine(book: Path) -> Path:
    return book / "02_rounding.ipynb"


def edit(book: Path, id: str, text: str) -> None:
    notebook = nbformat.read(mine(book), as_version=4)
    next(c for c in notebook.cells if c.id == id).source = text
    nbformat.write(notebook, mine(book))


def sources(path: Path) -> dict[str, str]:
    return {c.id: c.source for c in nbformat.read(path, as_version=4).cells}


def backups(book: Path) -> list[Path]:
    return sorted((book / "backups").glob("*"))


def test_a_copy_shows_nothing_from_the_first_prediction_on(book: Path) -> None:
    cells = {c.id: c for c in nbformat.read(mine(book), as_version=4).cells}
    assert cells["above"].outputs[0].text == "1\n"
    assert cells["above"].execution_count == 1
    for id in ("guess", "below", "cell-answer-2-1"):
        assert cells[id].outputs == []
        assert cells[id].execution_count is None


def test_a_copy_records_the_hash_of_its_source_which_outputs_do_not_enter(book: Path, source: Path) -> None:
    original = workbook.read(source / "02_rounding.ipynb")
    copy = workbook.read(mine(book))
    assert copy.metadata.labs.source_sha256 == workbook.source_hash(original) == workbook.source_hash(copy)


def test_laying_out_again_touches_nothing(book: Path, source: Path) -> None:
    edit(book, "cell-answer-2-1", "def f(x): return x")
    before = mine(book).read_bytes(), mine(book).stat().st_mtime_ns
    assert workbook.lay_out(book, source) == []
    assert (mine(book).read_bytes(), mine(book).stat().st_mtime_ns) == before


def test_a_copy_that_was_only_run_is_updated_silently(book: Path, source: Path) -> None:
    notebook = nbformat.read(mine(book), as_version=4)
    notebook.cells[3].outputs = [new_output("stream", name="stdout", text="42, mine\n")]
    nbformat.write(notebook, mine(book))
    course(source, "second")
    assert workbook.lay_out(book, source) == []
    assert sources(mine(book))["intro"] == "second"


@pytest.mark.parametrize("id", ["cell-answer-2-1", "guess", "intro", "below"])
def test_a_copy_that_was_edited_is_left_alone_by_an_update_and_the_learner_is_told(book: Path, source: Path, id: str) -> None:
    edit(book, id, "mine")
    before = mine(book).read_bytes()
    course(source, "second")
    (line,) = workbook.lay_out(book, source)
    assert "labs reset 02 --keep-answers" in line
    assert "\n" not in line
    assert mine(book).read_bytes() == before


def test_a_cell_that_the_learner_added_counts_as_an_edit(book: Path, source: Path) -> None:
    notebook = nbformat.read(mine(book), as_version=4)
    notebook.cells.append(new_code_cell("scratch = 1"))
    nbformat.write(notebook, mine(book))
    course(source, "second")
    assert len(workbook.lay_out(book, source)) == 1
    assert "scratch = 1" in mine(book).read_text()


def test_a_copy_without_our_record_is_never_overwritten(book: Path, source: Path) -> None:
    notebook = nbformat.read(mine(book), as_version=4)
    del notebook.metadata["labs"]
    nbformat.write(notebook, mine(book))
    before = mine(book).read_bytes()
    course(source, "second")
    assert len(workbook.lay_out(book, source)) == 1
    assert mine(book).read_bytes() == before


def test_reset_keeps_a_backup_always_even_twice_in_a_second(book: Path, source: Path) -> None:
    for text in ("one", "two", "three"):
        edit(book, "cell-answer-2-1", text)
        workbook.reset(book, "2", source=source)
        assert sources(mine(book))["cell-answer-2-1"] == STUB
    assert {sources(p)["cell-answer-2-1"] for p in backups(book)} == {"one", "two", "three"}


def test_reset_with_keep_answers_carries_answers_and_predictions_into_the_new_text(book: Path, source: Path) -> None:
    edit(book, "cell-answer-2-1", "def f(x): return x")
    edit(book, "guess", "prediction = 7")
    edit(book, "below", "print('scratch')")
    course(source, "second")
    lines = workbook.reset(book, "02", keep_answers=True, source=source)
    now = sources(mine(book))
    assert now["cell-answer-2-1"] == "def f(x): return x"
    assert now["guess"] == "prediction = 7"
    assert now["intro"] == "second"
    assert now["below"] == "print(42)"
    assert "2 answers and predictions were carried over" in lines
    assert workbook.lay_out(book, source) == []


def test_an_answer_is_carried_by_its_grade_id_and_not_by_its_cell(book: Path, source: Path) -> None:
    edit(book, "cell-answer-2-1", "def f(x): return x")
    notebook = nbformat.read(source / "02_rounding.ipynb", as_version=4)
    notebook.cells[-1].id = "another"
    nbformat.write(notebook, source / "02_rounding.ipynb")
    workbook.reset(book, "2", keep_answers=True, source=source)
    assert sources(mine(book))["another"] == "def f(x): return x"


def test_a_stub_that_was_never_filled_in_is_replaced_by_the_new_stub(book: Path, source: Path) -> None:
    course(source, stub="def f(x, group_size):\n    raise NotImplementedError  # your answer here")
    workbook.reset(book, "2", keep_answers=True, source=source)
    assert "group_size" in sources(mine(book))["cell-answer-2-1"]


def test_an_answer_without_a_place_any_more_is_named_and_in_the_backup(book: Path, source: Path) -> None:
    edit(book, "cell-answer-2-1", "def f(x): return x")
    course(source, answers=("answer-2-9",))
    lines = workbook.reset(book, "2", keep_answers=True, source=source)
    assert any(line.startswith("answer-2-1 is no longer in this notebook") for line in lines)
    assert sources(backups(book)[0])["cell-answer-2-1"] == "def f(x): return x"


def test_of_an_answer_cell_that_was_copied_the_last_is_carried_and_the_learner_told(book: Path, source: Path) -> None:
    edit(book, "cell-answer-2-1", "def f(x): return 1")
    notebook = nbformat.read(mine(book), as_version=4)
    notebook.cells += [code("copied", "def f(x): return 2", grade_id="answer-2-1"), code("blank", STUB, grade_id="answer-2-1")]
    nbformat.write(notebook, mine(book))
    lines = workbook.reset(book, "2", keep_answers=True, source=source)
    assert sources(mine(book))["cell-answer-2-1"] == "def f(x): return 2"
    assert "answer-2-1 had 2 cells: the last was carried over, the others are in the backup" in lines


def test_a_solution_cell_whose_name_was_deleted_is_not_an_error(book: Path, source: Path) -> None:
    notebook = nbformat.read(mine(book), as_version=4)
    del notebook.cells[-1].metadata["nbgrader"]["grade_id"]
    nbformat.write(notebook, mine(book))
    assert workbook.lay_out(book, source) == []
    workbook.reset(book, "2", keep_answers=True, source=source)


@pytest.mark.parametrize(
    "damage", ['{"cells": [', "", "[]", '{"cells": 3}', '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}']
)
def test_a_damaged_copy_gives_one_clear_line_and_is_not_lost(book: Path, source: Path, damage: str) -> None:
    mine(book).write_text(damage)
    (line,) = workbook.lay_out(book, source)
    assert "cannot be read as a notebook" in line
    assert "labs reset 02" in line
    assert "\n" not in line
    with pytest.raises(workbook.WorkbookError, match="nothing was changed"):
        workbook.reset(book, "2", keep_answers=True, source=source)
    assert mine(book).read_text() == damage
    assert backups(book) == []
    workbook.reset(book, "2", source=source)
    assert [p.read_text() for p in backups(book)] == [damage]
    assert sources(mine(book))["cell-answer-2-1"] == STUB


@pytest.mark.parametrize("number", ["7", "two", "02_grouping", "", "../02_rounding", "002"])
def test_what_is_not_a_chapter_is_refused_with_the_list(book: Path, source: Path, number: str) -> None:
    with pytest.raises(workbook.WorkbookError, match=r"there is no chapter .*; the chapters are 02_rounding"):
        workbook.reset(book, number, source=source)


@pytest.mark.parametrize("number", ["2", "02", "02_rounding", "02_rounding.ipynb"])
def test_a_chapter_can_be_named_in_these_ways(source: Path, number: str) -> None:
    assert workbook.chapter(number, source).stem == "02_rounding"


def test_a_failed_write_leaves_the_copy_as_it_was(book: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = mine(book).read_bytes()
    course(source, "second")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        workbook.lay_out(book, source)
    assert mine(book).read_bytes() == before
    assert [p.name for p in book.iterdir()] == ["02_rounding.ipynb"]


STEPS = st.sampled_from(["answer", "prediction", "prose", "update", "rename", "lay out", "reset", "keep", "damage"])


@given(st.lists(STEPS, min_size=1, max_size=8))
@pytest.mark.slow
def test_whatever_a_learner_saved_is_still_in_the_workbook_or_its_backups(steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, book = course(Path(folder) / "notebooks"), Path(folder) / "workbook"
        workbook.lay_out(book, source)
        written: list[str] = []
        for index, step in enumerate(steps):
            text, damaged = f"mine {index}", not mine(book).read_text().startswith("{\n")
            if step in ("answer", "prediction", "prose") and not damaged:
                id = {"prediction": "guess", "prose": "intro"}.get(step) or next(i for i in sources(mine(book)) if "answer" in i)
                # A learner who writes over an own text loses it by their own hand.
                written = [w for w in written if w not in sources(mine(book))[id] or _in_backups(book, w)]
                edit(book, id, text)
                written.append(text)
            elif step == "damage":
                saved = mine(book).read_text()
                mine(book).write_text("<<<<<<< " + saved)
            elif step in ("update", "rename"):
                course(source, f"edition {index}", answers=(f"answer-2-{index}" if step == "rename" else "answer-2-1",))
            elif step == "lay out":
                workbook.lay_out(book, source)
            elif step in ("reset", "keep"):
                try:
                    workbook.reset(book, "2", keep_answers=step == "keep", source=source)
                except workbook.WorkbookError:
                    assert damaged
        everything = mine(book).read_text() + "".join(p.read_text() for p in backups(book))
        assert [text for text in written if json.dumps(text)[1:-1] not in everything] == []


def _in_backups(book: Path, text: str) -> bool:
    return any(text in p.read_text() for p in backups(book))
