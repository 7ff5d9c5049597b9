"""Hostile answers and notebooks: none earns a point, reads a secret, harms machine or class, or stops the batch."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import select
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("jinja2")
pytest.importorskip("sqlalchemy")

import nbformat
from grading_hostile import ATTACKS, spread
from test_grading_sandbox import bubblewrap_or_skip

from labsupport.course import build
from labsupport.course.carry import answer_key
from labsupport.exercises.registry import exercises_of, get
from labsupport.exercises.session import CHECK_SEEDS, SCORE_SEEDS
from labsupport.grading import feedback, gradebook, marking, report, texts
from labsupport.grading.classroom import Classroom
from labsupport.grading.records import Collected, Release
from labsupport.grading.sandbox import Limits

pytestmark = pytest.mark.slow  # each notebook starts a sandbox and torch

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = {2: "02_rounding.ipynb", 5: "05_nf4.ipynb"}
IDS = {lab: [exercise.id for exercise in exercises_of(lab)] for lab in NOTEBOOKS}
POINTS = {exercise.id: float(exercise.points) for lab in NOTEBOOKS for exercise in exercises_of(lab)}
LIMITS = Limits(
    answer_seconds=2, notebook_seconds=60, memory_bytes=2**30, processes=20, file_bytes=2**23, output_bytes=2**25, output_files=400
)
SHORT = LIMITS.model_copy(update={"notebook_seconds": 25})  # for what may stop all answers of its notebook
CANARY = "canary-5a1f"  # stands wherever a secret does; a result that holds it has leaked one
LONGEST_SECRET = 20  # characters of the class's key that a leak would show


class World:
    """A class on a machine with secrets, somebody who listens, and a sandbox."""

    def __init__(self, folder: Path, server: socket.socket, box) -> None:
        self.folder, self.host, self.server, self.box = folder / "class", folder / "host", server, box
        self.room = Classroom.create(self.folder, "hostile")
        self.host.mkdir()
        for path in (self.host / "answers.txt", self.folder / "gradebook.sqlite", self.folder / "collected" / "other.ipynb"):
            path.write_text(CANARY)
        with (self.folder / "roster.csv").open("a") as stream:
            stream.write(f"ada,{CANARY},ada@example.org\n")
        for lab, name in NOTEBOOKS.items():
            (self.folder / "release" / f"{lab:02d}").mkdir(parents=True)
            points = {id: POINTS[id] for id in IDS[lab]}
            Release(lab=lab, points=points, notebook=name).write(self.folder / "release" / f"{lab:02d}" / "release.json")
        self.solved = {lab: nbformat.read(REPOSITORY / "notebooks" / "solutions" / name, 4) for lab, name in NOTEBOOKS.items()}

    def notebook(self, lab, answers):
        """A right submission, with other texts for some answers."""
        handed_in = build.student_form(nbformat.from_dict(self.solved[lab]))
        right = {cell.id: cell.source for cell in self.solved[lab].cells}
        for cell in handed_in.cells:
            if answer_key(cell):
                id = cell.id.removeprefix("answer-").replace("-", ".")
                cell.source = answers.get(id, right[cell.id])
        return handed_in

    def mark(self, lab, notebook, limits=LIMITS):
        """Marks a notebook and sees to it that nothing else has changed or was told."""
        text = nbformat.writes(notebook)
        digest = hashlib.sha256(text.encode()).hexdigest()
        path = self.folder / "collected" / f"{lab:02d}" / "mallory" / f"{digest}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        file = str(path.relative_to(self.folder))
        collected = Collected(lab=lab, learner="mallory", sha256=digest, file=file, handed_in=datetime.now(UTC))
        room = dataclasses.replace(self.room, settings=self.room.settings.model_copy(update={"limits": limits}))
        before = self.state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LABS_SECRET", CANARY)
            result = marking.mark(room, collected, self.box)
        assert self.state() == before
        assert not select.select([self.server], [], [], 0)[0], "somebody called from inside"
        said = result.model_dump_json()
        assert CANARY not in said
        assert self.room.key.hex()[:LONGEST_SECRET] not in said
        assert result.final, result.problems
        assert set(result.marks) == set(IDS[lab])
        assert all(mark.of == POINTS[id] and 0 <= mark.points <= mark.of for id, mark in result.marks.items())
        json.loads(said)
        return result

    def state(self):
        """Every file of the class and beside it, with its content."""
        paths = [path for root in (self.folder, self.host) for path in sorted(root.rglob("*"))]
        return {str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"") for path in paths}

    def names(self, id):
        """What stands for the names in a text of grading_hostile.txt."""
        exercise = get(id)
        reference = exercise.reference
        pairs = []
        if id == "5.4":  # numbers in, numbers out: such a table is short
            inputs = [tuple(exercise.inputs(seed).values()) for seed in (*CHECK_SEEDS, *SCORE_SEEDS)]
            pairs = [(repr(given), reference(*given)) for given in inputs]
        return {
            "id": id, "lab": f"{int(id.split('.')[0]):02d}", "name": exercise.name, "count": len(exercise.returns),
            "module": reference.__module__, "reference": reference.__name__, "repository": REPOSITORY,
            "site": next(path for path in sys.path if path.endswith("site-packages")), "folder": self.folder, "host": self.host,
            "deep": "-" * 90_000 + "1", "port": self.server.getsockname()[1], "table": f"TABLE = {dict(pairs)!r}",
        }  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield World(tmp_path_factory.mktemp("hostile"), server, bubblewrap_or_skip())


@pytest.mark.parametrize("lab", NOTEBOOKS)
def test_the_honest_notebook_of_which_the_others_are_made_has_all_points(world, lab):
    result = world.mark(lab, world.notebook(lab, {}))
    assert {id: mark.message for id, mark in result.marks.items() if mark.outcome != "pass"} == {}
    assert result.points == sum(POINTS[id] for id in IDS[lab])


HANDED_IN = spread(ATTACKS, IDS)


@pytest.mark.parametrize(("lab", "attacks"), HANDED_IN, ids=[next(iter(attacks.values())).title for _, attacks in HANDED_IN])
def test_no_hostile_answer_earns_anything(world, lab, attacks):
    answers = {id: attack.answer(world.names(id)) for id, attack in attacks.items()}
    alone = any(attack.alone for attack in attacks.values())
    result = world.mark(lab, world.notebook(lab, answers), SHORT if alone else LIMITS)
    won = {
        attacks[id].title: mark for id, mark in result.marks.items() if id in attacks and (mark.points or mark.outcome == "pass")
    }
    assert won == {}
    assert not any(result.marks[id].outcome in ("unmarked", "missing") for id in attacks)
    if not alone:  # what is right beside them counts
        assert {id: result.marks[id].message for id in IDS[lab] if id not in attacks and result.marks[id].outcome != "pass"} == {}


def test_there_are_enough_of_them():
    titles = [attack.title for attack in ATTACKS]
    assert len(titles) == len(set(titles)) >= 40
    assert sum(len(attacks) for _, attacks in HANDED_IN) == len(ATTACKS)


def _code(source, **metadata):
    cell = nbformat.v4.new_code_cell(source)
    cell.metadata.update(metadata)
    return cell


def test_a_notebook_whose_frame_is_forged_earns_what_its_answers_do(world):
    """Raised points, edited and deleted checks, doubled ids, stored outputs and results: of all this nothing is read."""
    zero = {id: f"def {get(id).name}(*a): return 0\n" for id in IDS[2]}
    forged = world.notebook(2, zero)
    for cell in forged.cells:
        if "nbgrader" in cell.metadata:
            cell.metadata.nbgrader["points"] = 1000
            cell.metadata.nbgrader["locked"] = False
        if cell.id.startswith("check-"):
            cell.source = "print('pass, exact')"
            cell.outputs = [nbformat.v4.new_output("stream", text="2.1 symmetric_scale: pass, exact\n18 of 18 points\n")]
    forged.cells = [cell for cell in forged.cells if cell.id not in ("check-2-1", "check-2-2")]
    copy = nbformat.from_dict(next(cell for cell in forged.cells if cell.id == "answer-2-3"))
    copy.source = "quantize = check('2.3', None)"
    forged.cells.append(copy)
    forged.metadata["labs"] = {"points": 18, "result": {"points": 18, "outcome": "pass"}}
    forged.cells.insert(1, _code("check = lambda id, answer: answer\nscore = lambda id: 1000.0\ntally = lambda: 1000"))
    result = world.mark(2, forged)
    assert result.points == 0
    assert not any(mark.outcome == "pass" for mark in result.marks.values())


PATCHES = """
import builtins, sys, torch
shell = get_ipython()
shell.input_transformers_post.append(lambda lines: ["pass\\n"])
shell.ast_transformers.append(type("T", (), {"visit": lambda s, tree: tree})())
torch.equal = torch.allclose = lambda *a, **k: True
builtins.abs = lambda x: 0
sys.modules["labsupport.grading"] = sys.modules["torch"]
open("/out/result.json", "w").write('{"points": 18}')
import os; os._exit(0)
"""


def test_cells_beside_the_answers_change_no_answer(world):
    """Transformers of the shell, patches and an exit in cells that no answer needs: all eight answers count, and no ninth."""
    patched = world.notebook(2, {"2.3": "def quantize(weight, scale, zero_point, bits): return weight * 0\n"})
    patched.cells.insert(1, _code(PATCHES))
    patched.cells.append(_code(PATCHES))
    result = world.mark(2, patched)
    assert result.marks["2.3"].points == 0
    assert {id for id, mark in result.marks.items() if mark.outcome != "pass"} == {"2.3"}


def test_a_helper_that_patches_spoils_only_the_answer_that_uses_it(world):
    """The answer names the helper's cell, which is then run with it: in a process of that answer alone."""
    cell = "import os, torch\nhelp_me = 1\ntorch.round = torch.clamp = lambda *a, **k: a[0]\nos.environ['X'] = '1'\n"
    answers = {"2.1": "def symmetric_scale(weight, bits):\n    return help_me * weight[:, :1]\n"}
    patched = world.notebook(2, answers)
    patched.cells.insert(1, _code(cell))
    result = world.mark(2, patched)
    assert {id for id, mark in result.marks.items() if mark.outcome != "pass"} == {"2.1"}


def test_what_is_said_to_hurt_readers_stays_text(world):
    """In a result it stands as it was written, without half characters: JSON is UTF-8. A page escapes it; no cell is a formula."""
    text = "def sqnr_db(*a):\n    print('<script>alert(1)</script>', '\\ud800')\n    raise ValueError('=cmd|A0 <img> \\ud800')\n"
    last = "class E(Exception):\n    def __str__(s): return '\u202e<b>'\nE.__name__ = '=HYPERLINK'\ndef dequantize(*a): raise E\n"
    handed_in = world.notebook(2, {"2.6": text, "2.4": last})
    for cell in handed_in.cells:
        cell.source = cell.source.replace("predicted_error = None", "predicted_error = '=1+1<script>'")
    result = world.mark(2, handed_in)
    assert result.marks["2.6"].outcome == "raised"
    assert "=cmd|A0" in result.marks["2.6"].message
    assert "=HYPERLINK" in result.marks["2.4"].message
    assert result.predictions["predicted_error"] == "=1+1<script>"
    result.model_dump_json().encode("utf-8")
    assert os.listdir(world.host) == ["answers.txt"]

    with (world.folder / "roster.csv").open("a") as stream:
        stream.write("mallory,Mallory,\n")
    room = Classroom.open(world.folder)
    file = f"collected/02/mallory/{result.sha256}.ipynb"
    one = Collected(lab=2, learner="mallory", sha256=result.sha256, file=file, handed_in=result.handed_in)
    one.write((world.folder / file).with_suffix(".json"))
    room.result_path(one).parent.mkdir(parents=True)
    result.write(room.result_path(one))
    entry = next(entry for entry in gradebook.entries(room, 2) if entry.learner == "mallory")
    page = feedback.page(room, 2, entry)
    assert "alert(1)" in page
    assert not re.search(r"<(script|img|b)\b", page)
    rows = list(csv.reader(io.StringIO(texts.table(report.marks(room, [entry])))))
    assert any("=cmd|A0" in cell for row in rows for cell in row)
    assert not any(cell[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") for row in rows for cell in row if cell)
