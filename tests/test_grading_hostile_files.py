"""Hostile zips, folders and notebooks, as they are collected: what is right beside them is taken, and nothing else is touched."""

import io
import json
import os
import stat
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from labsupport.course import workbook
from labsupport.grading import collect, submission
from labsupport.grading.cells import LARGEST_FILE
from labsupport.grading.classroom import Classroom
from labsupport.grading.records import GradingError, Release

NAME = "02_rounding.ipynb"
GOOD = Path(workbook.chapter("2")).read_bytes()
SECRET = "secret-of-the-class"


@pytest.fixture
def room(tmp_path):
    Classroom.create(tmp_path / "class", "hostile")
    (tmp_path / "class" / "roster.csv").write_text("learner,name,email\nada,Ada,\nmallory,Mallory,\n")
    (tmp_path / "class" / "release" / "02").mkdir(parents=True)
    Release(lab=2, points={"2.1": 2.0}, notebook=NAME).write(tmp_path / "class" / "release" / "02" / "release.json")
    (tmp_path / "secret").write_text(SECRET)
    return Classroom.open(tmp_path / "class")


def outside(room):
    """Everything but what may be collected, with its content."""
    paths = [path for path in room.folder.parent.rglob("*") if "collected" not in path.parts]
    return {path: path.read_bytes() if path.is_file() and not path.is_symlink() else b"" for path in paths if not path.is_fifo()}


def taken(room, source):
    """Learners of whom something was taken; nothing outside has changed, and what lies in the class is plain and in its place."""
    before = outside(room)
    found = collect.collect(room, 2, source)
    assert outside(room) == before
    for path in (room.folder / "collected").rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or path.parent.parent == room.folder / "collected" / "02"
    assert all(line.isprintable() and len(line) < 1000 for line in found.lines)
    assert SECRET not in "".join(found.lines)
    assert not any(SECRET.encode() in path.read_bytes() for path in (room.folder / "collected").rglob("*.ipynb"))
    return {one.learner: one for one in found.taken}, found.lines


def packed(folder, members, after=lambda content: content):
    """A zip with one right notebook and `members`: pairs of a name or ZipInfo, and a content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr(f"ada/{NAME}", GOOD)
        for name, content in members:
            made.writestr(name, content, zipfile.ZIP_DEFLATED)
    path = folder / "handed_in.zip"
    path.write_bytes(after(buffer.getvalue()))
    return path


def kind(name, mode):
    info = zipfile.ZipInfo(name)
    info.create_system = 3  # Unix: the kind of a file stands in the upper half
    info.external_attr = mode << 16
    return info


def lies(content):
    """The list of files says that the last one has 10 bytes."""
    at = content.rfind(b"PK\1\2")
    return content[: at + 24] + (10).to_bytes(4, "little") + content[at + 28 :]


def encrypted(content):
    at = content.rfind(b"PK\1\2")
    return content[: at + 8] + bytes([content[at + 8] | 1]) + content[at + 9 :]


M = f"mallory/{NAME}"
ZIPS = {
    "points upward": ([(f"../../{M}", GOOD), (f"mallory/../../../{NAME}", GOOD)], lambda c: c),
    "points to the root": ([(f"/tmp/mallory/{NAME}", GOOD)], lambda c: c),
    "points upward as Windows writes it": ([(f"..\\..\\mallory\\{NAME}", GOOD), (f"C:\\mallory\\{NAME}", GOOD)], lambda c: c),
    "a link to a secret": ([(kind(M, stat.S_IFLNK | 0o777), "../../secret")], lambda c: c),
    "a link to a folder, and a file in it": (
        [(kind("mallory", stat.S_IFLNK | 0o777), "../class"), ("mallory/roster.csv", "learner,name,email\n")],
        lambda c: c,
    ),
    "a device": ([(kind(M, stat.S_IFCHR | 0o666), "")], lambda c: c),
    "a bomb": ([(M, b"0" * (LARGEST_FILE + 10**6))], lambda c: c),
    "a bomb that says it is small": ([(M, b"0" * (LARGEST_FILE + 10**6))], lies),
    "a bomb below the size of a notebook": ([(M, b"0" * (LARGEST_FILE - 10**6))], lambda c: c),
    "a zip in the zip": ([("mallory/more.zip", b"PK\5\6" + b"\0" * 18)], lambda c: c),
    "encrypted": ([(M, GOOD)], encrypted),
    "a name that steers the terminal": ([(f"mallory/\x1b[2J\n=cmd\u202e{NAME}", GOOD)], lambda c: c),
    "an empty name": ([("mallory/.ipynb", GOOD), ("/", b"")], lambda c: c),
}


@pytest.mark.parametrize("form", ZIPS)
def test_a_hostile_zip_gives_what_is_right_in_it(room, form, tmp_path):
    members, after = ZIPS[form]
    found, lines = taken(room, packed(tmp_path, members, after))
    assert list(found) == ["ada"], lines
    if form not in ("an empty name",):
        assert lines


@pytest.mark.parametrize(
    "after", [lambda c: c[:-30], lambda c: c[: len(c) // 2], lambda c: b"PK\5\6" + b"\xff" * 18, lambda c: b""]
)
def test_a_broken_zip_is_said_to_be_one(room, tmp_path, after):
    with pytest.raises(GradingError) as raised:
        taken(room, packed(tmp_path, [], after))
    assert "\n" not in str(raised.value)


def test_in_a_folder_links_pipes_and_depths_are_left_alone(room, tmp_path):
    source = tmp_path / "in"
    for learner in ("ada", "mallory"):
        (source / learner).mkdir(parents=True)
    (source / "ada" / NAME).write_bytes(GOOD)
    (source / "mallory" / NAME).symlink_to(tmp_path / "secret")
    (source / "mallory" / "class").symlink_to(room.folder)
    (source / "mallory" / "round").symlink_to(source)
    os.mkfifo(source / "mallory" / "pipe.ipynb")
    (source / "mallory" / "/".join("abcdefghijklmnop")).mkdir(parents=True)
    found, lines = taken(room, source)
    assert list(found) == ["ada"]
    assert sum("a link, not followed" in line for line in lines) == 3


TEXTS = {
    "deep lists": "[" * 10**5,
    "deep tables": '{"cells":' * 10**5,
    "deep source": '{"cells": [{"cell_type": "code", "source": ' + "[" * 900 + "]" * 900 + "}]}",
    "many digits": '{"cells": [], "nbformat": 1' + "0" * 10**5 + "}",
    "half a character": json.dumps({"cells": [{"cell_type": "code", "source": "\ud800", "id": "answer-2-1", "metadata": {}}]}),
    "no texts": json.dumps(
        {"cells": [{"cell_type": "code", "source": {"a": 1}, "id": ["answer-2-1"], "metadata": []}, None, 1, []]}
    ),
    "not a number": '{"cells": NaN}',
    "a pickle": "\x80\x04cos\nsystem\n",
    "many cells": json.dumps({"cells": [{"cell_type": "code", "source": ""}] * 5000}),
    "a large cell": json.dumps({"cells": [{"cell_type": "code", "source": "x" * 10**6, "id": "answer-2-1"}]}),
    "the same key twice": '{"cells": 1, "cells": "x", "worksheets": [[], {"cells": 3}]}',
}


READ = ("half a character", "no texts", "a large cell")  # the cell is left out; the others of the notebook would count


@pytest.mark.parametrize("form", [form for form in TEXTS if form not in READ])
def test_a_hostile_notebook_is_refused_in_one_line(tmp_path, form):
    path = tmp_path / NAME
    path.write_text(TEXTS[form], "utf-8")
    with pytest.raises(GradingError) as raised:
        submission.read(path, 2)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("form", READ)
def test_a_hostile_cell_is_left_out(tmp_path, form):
    """Beside the cells of a right notebook."""
    notebook, cell = json.loads(GOOD), json.loads(TEXTS[form])["cells"]
    notebook["cells"] = [*notebook["cells"], *cell]
    path = tmp_path / NAME
    path.write_text(json.dumps(notebook), "utf-8")
    found = submission.read(path, 2)
    found.model_dump_json().encode("utf-8")
    assert len(found.answers) == 8
    assert found.remarks
    assert all(len(text) <= 10**5 for text in (*found.answers.values(), *found.others))


def test_a_prediction_is_never_run(tmp_path):
    """It is read as a literal: a call, a name or a comprehension in its place is no value."""
    notebook = json.loads(GOOD)
    for cell in notebook["cells"]:
        if "prediction" in cell.get("metadata", {}).get("tags", []):
            name = "".join(cell["source"]).split("=")[0].strip()
            cell["source"] = f"{name} = __import__('pathlib').Path({str(tmp_path / 'owned')!r}).touch() or 15.0"
    (tmp_path / NAME).write_text(json.dumps(notebook))
    assert set(submission.read(tmp_path / NAME, 2).predictions.values()) == {None}
    assert not (tmp_path / "owned").exists()
