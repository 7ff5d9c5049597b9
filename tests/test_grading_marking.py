"""A submission is marked by what its answers return on secret inputs: right ones fully, wrong ones partly, and tricks not."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import pytest
import torch

pytest.importorskip("pydantic")

from labsupport.course import workbook
from labsupport.exercises.attempts import Attempt, attempt
from labsupport.exercises.judging import outputs_right
from labsupport.exercises.registry import CHAPTERS, exercises_of, get
from labsupport.grading import marking, prepared, returned, sandbox
from labsupport.grading.classroom import Classroom
from labsupport.grading.records import Collected, GradingError, Policy, Release
from labsupport.grading.sandbox import Ended, Limits
from labsupport.grading.unsafe import Unsafe

KEY = "5a" * 32  # of every class here, so that secret seeds are the same in each run
QUICK = Limits(answer_seconds=4, notebook_seconds=60)
SOLUTIONS = workbook.notebooks_dir() / "solutions"


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marking") / "class"
    Classroom.create(folder, "trial")
    (folder / ".secret").write_text(KEY)
    for lab in CHAPTERS:
        points = {exercise.id: float(exercise.points) for exercise in exercises_of(lab)}
        (folder / "release" / f"{lab:02d}").mkdir()
        Release(lab=lab, points=points, notebook="x.ipynb").write(folder / "release" / f"{lab:02d}" / "release.json")
    opened = Classroom.open(folder)
    return Classroom(folder, opened.settings.model_copy(update={"limits": QUICK}), opened.roster, opened.key)


def solved(lab):
    return workbook.read(next(SOLUTIONS.glob(f"{lab:02d}_*.ipynb")))


def hand_in(room, notebook, lab):
    path = room.folder / "collected" / f"{len(list((room.folder / 'collected').iterdir()))}.ipynb"
    nbformat.write(notebook, path)
    handed_in = datetime(2026, 1, 1, tzinfo=UTC)
    return Collected(lab=lab, learner="a", sha256="0" * 64, file=str(path.relative_to(room.folder)), handed_in=handed_in)


def mark(room, lab, answers=None, others=(), notebook=None, box=None):
    """Mark the solved notebook with other answers in it, by id, and cells added at its end."""
    notebook = notebook or solved(lab)
    for cell in notebook.cells:
        for id, text in (answers or {}).items():
            if cell.get("id") == f"answer-{id.replace('.', '-')}":
                cell.source = text
    notebook.cells += [nbformat.v4.new_code_cell(text) for text in others]
    return marking.mark(room, hand_in(room, notebook, lab), box or Unsafe())


def solution(id):
    cells = solved(int(id.split(".")[0])).cells
    return next(cell.source for cell in cells if cell.get("id") == f"answer-{id.replace('.', '-')}")


def outcomes(result):
    return {id: mark.outcome for id, mark in result.marks.items()}


# Right and blank ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lab", [2, 5] + [pytest.param(lab, marks=pytest.mark.slow) for lab in CHAPTERS if lab not in (2, 5)])
def test_the_courses_answers_earn_full_points_and_twice_the_same(lab, room):
    first, second = mark(room, lab), mark(room, lab) if lab == 2 else None
    assert set(outcomes(first).values()) == {"pass"}, [m for m in first.marks.values() if m.outcome != "pass"]
    assert first.points == sum(exercise.points for exercise in exercises_of(lab))
    assert first.final
    assert not first.problems
    assert first.sandbox == "none"
    assert first.versions["torch"] == torch.__version__
    if second:
        about = [result.model_dump(exclude={"seconds": True, "in_sandbox": True}) for result in (first, second)]
        for each in about:
            for one in each["marks"].values():
                one["seconds"] = 0
        assert about[0] == about[1]


@pytest.mark.parametrize("lab", [2, *(pytest.param(lab, marks=pytest.mark.slow) for lab in CHAPTERS if lab != 2)])
def test_the_empty_notebook_is_blank(lab, room):
    result = mark(room, lab, notebook=workbook.read(workbook.chapter(str(lab))))
    assert set(outcomes(result).values()) == {"blank"}
    assert result.points == 0
    assert {m.message for m in result.marks.values()} == {"not attempted"}


def test_what_is_not_in_the_notebook_is_missing_and_a_broken_one_is_reported(room):
    notebook = solved(2)
    notebook.cells = [cell for cell in notebook.cells if not cell.get("id", "").endswith("-2-3")]
    result = mark(room, 2, notebook=notebook)
    assert [id for id, outcome in outcomes(result).items() if outcome != "pass"] == ["2.3"]
    assert result.marks["2.3"].outcome == "missing"
    broken = hand_in(room, solved(5), 2)
    result = marking.mark(room, broken, Unsafe())
    assert set(outcomes(result).values()) == {"missing"}
    assert result.problems == (f"{Path(broken.file).name} is lab 05, wanted lab 02",)


@pytest.mark.slow
def test_in_bubblewrap_marks_are_the_same(room):
    try:
        box = sandbox.find("bubblewrap")
    except GradingError as error:
        pytest.skip(str(error))
    result = mark(room, 5, {"5.2": "def encode(values, levels):\n    while True: pass"}, box=box)
    assert outcomes(result) == {exercise.id: "stopped" if exercise.id == "5.2" else "pass" for exercise in exercises_of(5)}
    assert result.sandbox == "bubblewrap"


# Wrong, by every known mistake ----------------------------------------------------------------------------------------
def asked(room, id):
    lab = prepared.lab(room, int(id.split(".")[0]), [id])
    return lab.groups[0].asked[id]


def through_files(folder, one, answer):
    """What an answer gives on the secret inputs, written as the sandbox writes it and read as it is read."""
    found = []
    for given, want in zip(one.given, one.want, strict=True):
        attempt(one.exercise, answer, given).save(folder / "stem")
        found.append(returned.attempt(folder / "stem", want))
        if found[-1].status != "ran":
            break
    return marking._Ran(found)


@pytest.mark.parametrize("exercise", [*exercises_of(2), *exercises_of(5)], ids=lambda exercise: exercise.id)
def test_a_known_mistake_gets_its_sentence_and_never_full_points(exercise, room, tmp_path):
    one = asked(room, exercise.id)
    for mutant in exercise.mutants:
        mark = marking.marked(one, through_files(tmp_path, one, mutant.answer), 4.0, Policy())
        assert mark.outcome in ("wrong", "raised"), mark
        assert mutant.says in mark.message, mark
        assert mark.points == 4.0 * 0.5 * mark.share
        assert 0 <= mark.share < 1
        assert mark.outcome == "wrong" or mark.points == 0


def test_a_part_that_is_right_earns_its_share(room, tmp_path):
    one = asked(room, "4.1")  # codes and absmax
    largest_alone = lambda matrix: (torch.zeros(matrix.shape, dtype=torch.int8), matrix.abs().amax(1))  # noqa: E731
    mark = marking.marked(one, through_files(tmp_path, one, largest_alone), 4.0, Policy())
    assert (mark.outcome, mark.share, mark.points) == ("wrong", 0.5, 1.0)
    shapes_alone = lambda matrix: (torch.zeros(matrix.shape, dtype=torch.int8), torch.zeros(len(matrix)))  # noqa: E731
    mark = marking.marked(one, through_files(tmp_path, one, shapes_alone), 4.0, Policy())
    assert (mark.outcome, mark.share, mark.points) == ("wrong", 0.0, 0.0)


def test_words_that_can_be_guessed_earn_no_share(room, tmp_path):
    one = asked(room, "1.5")  # a word for each of many runs
    mark = marking.marked(one, through_files(tmp_path, one, lambda *_: "memory"), 4.0, Policy())
    assert mark.outcome == "wrong"
    assert mark.points == 0
    assert outputs_right(one.exercise, one.given[0], through_files(tmp_path, one, lambda *_: "memory").attempts[0], one.want[0])


def test_numbers_of_the_learners_own_are_looked_at_where_the_class_has_them(room, monkeypatch):
    seen = []
    judge = lambda room, release, learner, taken: seen.append((release.lab, learner, len(taken.answers))) or {"2.1": "as b"}  # noqa: E731
    monkeypatch.setattr("labsupport.grading.own.judge", judge)
    machine = Broken(GradingError("no sandbox"))
    assert mark(room, 2, box=machine).own == {}
    path = room.folder / "release" / "02" / "release.json"
    before = path.read_text()
    path.write_text(before.replace('"own_numbers": false', '"own_numbers": true'))
    assert mark(room, 2, box=machine).own == {"2.1": "as b"}
    assert seen == [(2, "a", len(exercises_of(2)))]
    path.write_text(before)


def test_seeds_are_the_classs_own(room, tmp_path):
    other = Classroom.create(tmp_path / "class")
    ours, theirs = prepared.seeds_of(room, get("2.1")), prepared.seeds_of(other, get("2.1"))
    assert len(set(ours) | set(theirs)) == 6
    assert min(*ours, *theirs) >= 10_000
    assert ours == prepared.seeds_of(room, get("2.1")) != prepared.seeds_of(room, get("2.2"))


# Honest oddities ------------------------------------------------------------------------------------------------------
def test_honest_oddities_are_marked_as_the_plain_answer_is(room):
    answers = {exercise.id: solution(exercise.id) for exercise in exercises_of(2)}
    noisy = "    from tqdm import tqdm\n    [*tqdm(range(3))]\n    import warnings\n    warnings.warn('odd')\n"
    head, body = answers["2.1"].split(":\n", 1)
    answers["2.1"] = f"{head}:\n{noisy}{body}"
    answers["2.2"] = "score = 0.93\n" + answers["2.2"] + "\nprint(scale_and_zero_point(layer, 4))\nscore = 1 / 0"
    answers["2.3"] = answers["2.3"].replace("\n", "\r\n")
    answers["2.4"] = "%time print('timed')\n!pip install torch\n" + answers["2.4"] + "\nexit()"
    answers["2.5"] = answers["2.5"].replace("mended_grid(", "mended_grid(", 1) + "\nwhile True:\n    pass"
    answers["2.6"] = answers["2.6"] + "\nraise RuntimeError('a test of mine')"
    others = ["list = [1, 2]\ntorch = 7\ncheck = 3\nsum = 4", "import matplotlib.pyplot as plt\nplt.plot(layer)", "def broken(:"]
    result = mark(room, 2, answers, others)
    assert set(outcomes(result).values()) == {"pass"}, {i: m.message for i, m in result.marks.items() if m.outcome != "pass"}
    assert "odd" in result.marks["2.1"].printed
    assert "100%" in result.marks["2.1"].printed


def test_a_notebook_without_ids_in_another_order_with_split_cells_is_marked_as_it_was(room):
    notebook = solved(2)
    for cell in notebook.cells:
        if cell.get("id") == "answer-2-4":
            cell.source, rest = cell.source.split("    ### BEGIN SOLUTION\n")
            notebook.cells.insert(notebook.cells.index(cell) + 1, nbformat.v4.new_code_cell(rest, metadata=dict(cell.metadata)))
            break
    notebook.cells[:] = [cell for cell in notebook.cells if cell.source] + [nbformat.v4.new_code_cell("x = 1\n%matplotlib inline")]
    split = mark(room, 2, notebook=notebook)
    notebook = solved(2)
    for cell in notebook.cells:
        cell.pop("id")
        cell.metadata.clear()
        cell.metadata["executionInfo"] = {"status": "ok"}
    notebook.cells.reverse()
    notebook.nbformat_minor = 0
    reversed_ = mark(room, 2, notebook=notebook)
    assert {*outcomes(split).values(), *outcomes(reversed_).values()} == {"pass"}


def test_one_answer_that_never_ends_or_kills_leaves_the_others(room):
    answers = {
        "2.1": "def symmetric_scale(*_):\n  while True:\n    try:\n      while True: pass\n    except BaseException: pass",
        "2.2": "def scale_and_zero_point(weight, bits):\n    return helper(weight)",
        "2.3": "import os, signal\ndef quantize(*_):\n    os.kill(os.getpid(), signal.SIGKILL)",
        "2.4": "def dequantize(*_):\n    raise SystemExit(3)",
        "2.5": "import os\ndef mended_grid(*_):\n    os._exit(0)",
        "2.6": "def sqnr_db(weight, reconstruction):\n    return (weight",
        "2.7": "import torch\ndef stubborn_row():\n    return torch.zeros(30_000_000)",
        "2.8": "import torch\ndef best_clip(*_):\n    return torch.zeros(1).expand(10**12)",
    }
    result = mark(room, 2, answers, others=["def helper(x):\n    raise NotImplementedError"])
    want = {
        "2.1": "stopped",
        "2.2": "raised",
        "2.3": "stopped",
        "2.4": "raised",
        "2.5": "raised",
        "2.6": "raised",
        "2.7": "raised",
        "2.8": "raised",
    }
    assert outcomes(result) == {exercise.id: want.get(exercise.id, "pass") for exercise in exercises_of(2)}
    says = {id: result.marks[id].message for id in want}
    assert says["2.1"] == "it took longer than is allowed for one input, and was stopped"
    assert says["2.7"] == "its outputs take 120.0 MB, more than the 4.2 MB that are taken"
    assert "memory" in says["2.8"]
    assert "a function of yours that is still empty" in says["2.2"]
    assert says["2.6"] == "it raised SyntaxError: '(' was never closed (line 2 of the cell)"
    assert says["2.4"].startswith("it raised SystemExit: 3 (line 2 of the function)")
    assert says["2.5"] == "it left no result"


# Tricks ---------------------------------------------------------------------------------------------------------------
EQUAL = """
class Equal(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return True
"""
PATCHED = """
import builtins
torch.equal = torch.allclose = lambda *_, **__: True
from labsupport.exercises import judging, attempts
judging.judge = attempts.attempt = lambda *_: True
"""
GC = """
import gc, inspect, sys
def search():
    for frame in inspect.stack():
        for value in [*frame.frame.f_locals.values(), *frame.frame.f_globals.values()]:
            found = getattr(value, "reference", None)
            if callable(found):
                return found
    for thing in gc.get_objects():
        if type(thing).__name__ == "Exercise" or getattr(thing, "__name__", "") in ("quantize", "UniformTensor"):
            found = getattr(thing, "reference", thing)
            if callable(found) and getattr(found, "__module__", "").startswith("labsupport"):
                return found
"""


def test_tricks_gain_nothing(room):
    answers = {
        "2.1": "from labsupport.exercises import registry\ndef symmetric_scale(*x):\n    return registry.get('2.1').reference(*x)",
        "2.2": EQUAL + "def scale_and_zero_point(w, bits):\n    return [torch.zeros(len(w), 1).as_subclass(Equal) for _ in 'ab']",
        "2.3": "def quantize(*given):\n    from labsupport.quant import grid\n    return grid.quantize(*given)",
        "2.4": "from labsupport.quant.grid import dequantize",
        "2.5": PATCHED + "def mended_grid(w, bits):\n    judging.judge()\n    return [torch.zeros(len(w), 1)] * 2",
        "2.6": "class F(float):\n    __eq__ = __le__ = __lt__ = lambda *_: True\n    __sub__ = __rsub__ = lambda *_: 0.0\n"
        "def sqnr_db(*_):\n    return F(1)",
        "2.7": GC + "def stubborn_row():\n    return search()()",
        "2.8": "import json, os\ndef best_clip(weight, bits, factors):\n    for path in ('/out', os.getcwd()):\n        try:\n"
        "            open(path + '/2.8.end.json', 'w').write(json.dumps({'seconds': 0.0, 'ended': 'pass'}))\n"
        "        except OSError: pass\n    return 'pass, exact'",
    }  # fmt: skip
    result = mark(room, 2, answers, others=["score = 18\ndef check(*_): return 1"])
    assert result.points == 0
    assert not {"pass", "unmarked", "missing"} & set(outcomes(result).values())
    assert "is not there where answers are marked" in result.marks["2.1"].message + result.marks["2.3"].message
    assert all(type(m.message) is str for m in result.marks.values())


# What a stranger may leave --------------------------------------------------------------------------------------------
WANT = {"codes": torch.zeros(4, 4, dtype=torch.uint8), "scale": 0.5}
GOOD = Attempt("ran", {"codes": torch.ones(4, 4, dtype=torch.uint8), "scale": 0.5})
ABOUT = {"status": "ran", "outputs": {"codes": None, "scale": 0.5}, "error": "", "changed": [], "borrowed": False, "printed": ""}


def left(folder, about, tensors=None):
    from safetensors.torch import save_file

    text = about if isinstance(about, str) else json.dumps(about)
    (folder / "stem.json").write_text(text, "utf-8")
    save_file(tensors if tensors is not None else {"['codes']": torch.ones(4, 4, dtype=torch.uint8)}, folder / "stem.safetensors")
    return returned.attempt(folder / "stem", WANT)


def test_what_an_attempt_saves_is_read(tmp_path):
    GOOD.save(tmp_path / "stem")
    found = returned.attempt(tmp_path / "stem", WANT)
    assert found.status == "ran"
    assert found.outputs["scale"] == 0.5
    assert torch.equal(found.outputs["codes"], GOOD.outputs["codes"])
    assert left(tmp_path, ABOUT).outputs.keys() == WANT.keys()


@pytest.mark.parametrize(
    ("about", "tensors", "says"),
    [
        ("", None, "JSONDecodeError"),
        ("null", None, "no record"),
        ("[" * 100_000, None, "RecursionError"),
        ('{"status": ' + "9" * 10_000 + "}", None, "ValueError"),
        (ABOUT | {"more": 1}, None, "no record"),
        ({"status": "ran"}, None, "no record"),
        (ABOUT | {"status": "pass"}, None, "no record"),
        (ABOUT | {"status": ["ran"]}, None, "no record"),
        (ABOUT | {"changed": "x"}, None, "no record"),
        (ABOUT | {"borrowed": 0}, None, "no record"),
        (ABOUT | {"error": None}, None, "no record"),
        (ABOUT | {"outputs": [1]}, None, "no table"),
        (ABOUT | {"outputs": {"codes": None, "scale": 2**70}}, None, "more than 63 bits"),
        (ABOUT | {"outputs": {"codes": [0] * 5000, "scale": 1}}, None, "far more entries"),
        (ABOUT, {}, "KeyError"),
        (ABOUT, {"['codes']": torch.zeros(100, 100)}, "shape [100, 100], far more than what is wanted"),
        (ABOUT, {"['codes']": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, "float8_e4m3fn, wanted one of"),
        (ABOUT, {"['codes']": torch.zeros(4, 4, dtype=torch.complex64)}, "complex64, wanted one of"),
        ("x" * 5 * 2**20, None, "more than"),
    ],
)
def test_a_strangers_record_is_an_attempt_that_cannot_be_used(about, tensors, says, tmp_path):
    found = left(tmp_path, about, tensors)
    assert found.status == "returned"
    assert says in found.error
    assert "\n" not in found.error


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/etc/passwd"), Path.mkdir])
def test_only_plain_files_are_opened(make, tmp_path):
    make(tmp_path / "stem.json")
    assert "cannot be read" in returned.attempt(tmp_path / "stem", WANT).error


def test_a_pickle_that_poses_as_safetensors_is_not_loaded(tmp_path):
    left(tmp_path, ABOUT)
    torch.save({"['codes']": torch.ones(4, 4)}, tmp_path / "stem.safetensors")
    assert "cannot be read (SafetensorError)" in returned.attempt(tmp_path / "stem", WANT).error


def test_numbers_that_are_no_numbers_and_long_texts_are_bounded(tmp_path):
    found = left(tmp_path, ABOUT | {"printed": "x" * 10**6, "outputs": {"codes": None, "scale": float("nan"), "other": 1}})
    assert found.status == "ran"
    assert len(found.printed) < 1100
    assert "other" not in found.outputs
    assert "\ud800" not in left(tmp_path, json.dumps(ABOUT | {"status": "raised", "error": "\ud800"})).error


@pytest.mark.parametrize(
    "text", ["", "[]", '{"seconds": 1}', '{"seconds": NaN, "ended": ""}', '{"seconds": "1", "ended": ""}', "[" * 500]
)
def test_the_word_of_the_program_inside_is_checked(text, tmp_path):
    (tmp_path / "end.json").write_text(text)
    assert returned.ended(tmp_path / "end.json") is None


# The machine's own failures -------------------------------------------------------------------------------------------
class Broken:
    name = "broken"

    def __init__(self, error=None, ended=None):
        self.error, self.ended, self.runs = error, ended, 0

    def run(self, command, *, folders, out, limits):
        self.runs += 1
        if self.error:
            raise self.error
        if self.ended.why:
            (out / "ready.json").write_text("{}")
        return self.ended


@pytest.mark.parametrize(
    "box",
    [
        Broken(OSError(28, "No space left on device")),
        Broken(GradingError("bubblewrap could not start")),
        Broken(ended=Ended(1, "", 0.1, "ImportError: torch")),
    ],
)
def test_where_the_machine_fails_nothing_is_marked_and_it_is_said_why(box, room):
    result = mark(room, 2, box=box)
    assert set(outcomes(result).values()) == {"unmarked"}
    assert not result.final
    assert result.points == 0
    assert any(word in result.problems[0] for word in ("No space left", "could not start", "ImportError"))
    assert box.runs == (1 if box.error else 2)  # once more without any answer: is it the machine?


def test_an_answer_that_ends_the_sandbox_is_left_out_and_the_rest_run_again(room):
    box = Broken(ended=Ended(None, "memory", 1.0, ""))
    result = mark(room, 2, box=box)
    assert set(outcomes(result).values()) == {"stopped"}
    assert result.final
    assert box.runs == len(exercises_of(2))
    assert result.marks["2.1"].message == "it took more memory than there is, and was stopped"


def test_a_judge_that_fails_leaves_the_answer_unmarked(room, tmp_path, monkeypatch):
    one = asked(room, "2.1")
    ran = through_files(tmp_path, one, one.exercise.reference)
    monkeypatch.setattr("labsupport.exercises.judging._found", lambda *_: 1 / 0)
    mark = marking.marked(one, ran, 1.0, Policy())
    assert mark.outcome == "unmarked"
    assert "the course is at fault" in mark.message
