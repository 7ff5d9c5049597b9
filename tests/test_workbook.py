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


def test_a_stored_picture_brings_its_alternative_text_to_jupyterlab(source: Path) -> None:
    original = workbook.read(source / "02_rounding.ipynb")
    about = {"image/png": {"alt": 'a "dot"', "width": 3, "height": 2}}
    original.cells[1].outputs = [new_output("display_data", {"image/png": "aGk="}, metadata=about)]
    (shown,) = workbook.learner_copy(original).cells[1].outputs
    assert shown.data["text/html"].startswith('<img alt="a &quot;dot&quot;" width="3" height="2"')
    assert shown.data["text/html"].endswith('src="data:image/png;base64,aGk=">')
    assert shown.data["image/png"] == "aGk="
    assert "text/html" not in original.cells[1].outputs[0].data


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
    before = mine(book).read_bytes()
    assert workbook.lay_out(book, source) == []
    assert sources(mine(book))["intro"] == "second"
    assert [path.read_bytes() for path in backups(book)] == [before]


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
    assert "cell 4 of your copy (`print('scratch')`) is not carried over: your text for it is in the backup" in lines
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


def test_an_answer_in_several_cells_that_was_copied_or_split_is_put_into_one(book: Path, source: Path) -> None:
    edit(book, "cell-answer-2-1", "def f(x): return 1")
    notebook = nbformat.read(mine(book), as_version=4)
    notebook.cells += [code("copied", "def f(x): return 2", grade_id="answer-2-1"), code("blank", STUB, grade_id="answer-2-1")]
    nbformat.write(notebook, mine(book))
    lines = workbook.reset(book, "2", keep_answers=True, source=source)
    assert sources(mine(book))["cell-answer-2-1"] == "def f(x): return 1\n\ndef f(x): return 2"
    assert "answer-2-1 had 2 cells: they were put into one, in their order" in lines


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
    assert [p.name for p in book.glob("*.*")] == ["02_rounding.ipynb"]
    assert backups(book) == []


def test_answers_written_into_the_courses_own_notebook_are_never_replaced_without_a_backup(tmp_path: Path) -> None:
    from labsupport.course.execute import source_sha256

    folder, book = course(tmp_path / "notebooks"), tmp_path / "workbook"
    path = folder / "02_rounding.ipynb"
    built = nbformat.read(path, as_version=4)
    built.metadata["labs"] = {"executed_source_sha256": source_sha256(built)}
    nbformat.write(built, path)
    as_committed = path.read_bytes()
    edit(folder, "cell-answer-2-1", "def f(x): return 'mine'")
    (line,) = workbook.lay_out(book, folder)
    assert line.startswith(f"{path} has been edited")
    path.write_bytes(as_committed)
    (line,) = workbook.lay_out(book, folder)
    assert "labs reset 02 --keep-answers" in line
    assert sources(mine(book))["cell-answer-2-1"] == "def f(x): return 'mine'"
    workbook.reset(book, "2", keep_answers=True, source=folder)
    assert sources(mine(book))["cell-answer-2-1"] == "def f(x): return 'mine'"
    assert workbook.lay_out(book, folder) == []


ANSWER = "def f(x):\n    return 'MY ANSWER'"


def answer_cell(notebook: NotebookNode) -> NotebookNode:
    return next(cell for cell in notebook.cells if cell.get("id") == "cell-answer-2-1")


def lost_metadata(notebook: NotebookNode) -> None:
    answer_cell(notebook).update(source=ANSWER, metadata=NotebookNode())


def lost_metadata_and_ids(notebook: NotebookNode) -> None:
    lost_metadata(notebook)
    without_ids(notebook)


def without_ids(notebook: NotebookNode) -> None:
    notebook.cells[2].source = "prediction = 7"
    if notebook.cells[-1].metadata:
        answer_cell(notebook).source = ANSWER
    for cell in notebook.cells:
        del cell["id"]
    notebook.nbformat_minor = 4


def added_below(notebook: NotebookNode) -> None:
    notebook.cells.append(new_code_cell(ANSWER))


def split(notebook: NotebookNode) -> None:
    answer_cell(notebook).source = ANSWER
    notebook.cells.insert(4, code("half", "import math", grade_id="answer-2-1"))


def merged_into_another(notebook: NotebookNode) -> None:
    notebook.cells.remove(answer_cell(notebook))
    notebook.cells[3].source = ANSWER + "\n" + notebook.cells[3].source


def renamed(notebook: NotebookNode) -> None:
    answer_cell(notebook).source = ANSWER
    answer_cell(notebook).metadata.nbgrader.grade_id = "answer-2-1-copy"


def nbgrader_is_text(notebook: NotebookNode) -> None:
    answer_cell(notebook).source = ANSWER
    answer_cell(notebook).metadata.nbgrader = "x"


def record_is_a_list(notebook: NotebookNode) -> None:
    answer_cell(notebook).source = ANSWER
    notebook.metadata.labs = []


def blanks_are_a_list(notebook: NotebookNode) -> None:
    answer_cell(notebook).source = ANSWER
    notebook.metadata.labs = {"blanks": [], "cells": 3}


HANDLED = [
    lost_metadata, lost_metadata_and_ids, without_ids, added_below, split, merged_into_another, renamed, nbgrader_is_text,
    record_is_a_list, blanks_are_a_list,
]  # fmt: skip


@pytest.mark.parametrize("handle", HANDLED)
def test_an_answer_is_carried_whatever_an_editor_did_to_its_cell(book: Path, source: Path, handle) -> None:
    notebook = nbformat.read(mine(book), as_version=4)
    handle(notebook)
    mine(book).write_text(json.dumps(notebook))
    course(source, "second")
    assert len(workbook.lay_out(book, source)) == 1
    lines = workbook.reset(book, "2", keep_answers=True, source=source)
    now = sources(mine(book))
    assert now["cell-answer-2-1"] == {split: f"import math\n\n{ANSWER}"}.get(handle, ANSWER)
    assert now["guess"] == ("prediction = 7" if "without_ids" in handle.__name__ or "and_ids" in handle.__name__ else now["guess"])
    assert now["below"] == "print(42)"
    assert now["intro"] == "second"
    assert len(now) == 5, lines


def test_a_cell_that_the_learner_added_is_carried_to_its_place_and_named(book: Path, source: Path) -> None:
    notebook = nbformat.read(mine(book), as_version=4)
    notebook.cells.insert(4, new_code_cell("helper = 1"))
    notebook.cells.insert(5, new_markdown_cell("my note"))
    nbformat.write(notebook, mine(book))
    lines = workbook.reset(book, "2", keep_answers=True, source=source)
    assert list(sources(mine(book)).values())[3:6] == ["print(42)", "helper = 1", "my note"]
    assert "cell 5 of your copy (`helper = 1`), which you added, was carried over" in lines


def test_a_second_attempt_beside_a_filled_answer_stays_a_cell_of_its_own(book: Path, source: Path) -> None:
    edit(book, "cell-answer-2-1", ANSWER)
    notebook = nbformat.read(mine(book), as_version=4)
    notebook.cells.append(new_code_cell("def f(x): return 'trial'"))
    nbformat.write(notebook, mine(book))
    workbook.reset(book, "2", keep_answers=True, source=source)
    assert list(sources(mine(book)).values())[-2:] == [ANSWER, "def f(x): return 'trial'"]


def test_a_byte_order_mark_is_read_and_half_a_character_is_one_line(book: Path, source: Path) -> None:
    edit(book, "cell-answer-2-1", ANSWER)
    mine(book).write_bytes(b"\xef\xbb\xbf" + mine(book).read_bytes())
    workbook.reset(book, "2", keep_answers=True, source=source)
    assert sources(mine(book))["cell-answer-2-1"] == ANSWER
    text = mine(book).read_text().replace("MY ANSWER", "\\ud83d")
    mine(book).write_text(text)
    (line,) = workbook.lay_out(book, source)
    assert "half of a character" in line
    assert mine(book).read_text() == text


def test_a_chapter_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path, source: Path) -> None:
    (source / "01_first.ipynb").write_text("[" * 100_000)
    (line,) = workbook.lay_out(tmp_path / "new", source)
    assert "01_first.ipynb cannot be read as a notebook" in line
    assert mine(tmp_path / "new").is_file()


def test_two_backups_at_once_do_not_replace_each_other(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process backs up between the choice of a name and the copy."""
    copied, inner = workbook.shutil.copy2, []

    def copy_late(path: Path, target: Path) -> None:
        if not inner:
            inner.append(True)
            edit(book, "intro", "second")
            workbook.back_up(mine(book))
        copied(path, target)

    monkeypatch.setattr(workbook.shutil, "copy2", copy_late)
    edit(book, "intro", "first")
    workbook.back_up(mine(book))
    assert len(backups(book)) == 2


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
