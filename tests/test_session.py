"""What a learner sees: check, score, tally, revisit, and answers that misbehave."""

import functools
import subprocess
import sys
import types
import warnings

import pytest
import torch

from labsupport.exercises import check, judging, registry, revisit, score, session, tally
from labsupport.exercises.attempts import Attempt, attempt
from labsupport.exercises.form import Exercise
from labsupport.quant import grid

EXERCISE = registry.get("2.2")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(session, "_records", {})
    monkeypatch.delenv("LABS_STRICT", raising=False)


def right_answer(weight, bits):
    high, low = weight.amax(1, keepdim=True).clamp(min=0), weight.amin(1, keepdim=True).clamp(max=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.round(-low / scale)


def blank(*arguments):
    raise NotImplementedError


def half_kernel(weight, bits):
    raise NotImplementedError("\"addmm_impl_cpu_\" not implemented for 'Half'")


def returns_nothing(weight, bits):
    right_answer(weight, bits)


def returns_one(weight, bits):
    return right_answer(weight, bits)[0]


def changes_its_input(weight, bits):
    result = right_answer(weight, bits)
    weight.mul_(2)
    return result


def raises(weight, bits):
    scale, zero = right_answer(weight, bits)
    return scale + torch.zeros(3, 2, 7), zero  # two rows do not broadcast against those of any input


def borrows(weight, bits):
    under_another_name = grid.scale_and_zero_point
    return under_another_name(weight, bits)


def prints_numbers(weight, bits):
    return "scale", "zero"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (right_answer, "2.2 scale_and_zero_point: pass, "),
        (blank, "not attempted, going on with the reference"),
        (half_kernel, 'not yet. it raised NotImplementedError: "addmm'),
        (returns_nothing, "it returned None. Is there a return statement?"),
        (returns_one, "it returned 1 value, wanted 2: scale, zero_point"),
        (changes_its_input, "it changes its input 'weight' in place"),
        (raises, "it raised RuntimeError: The size of tensor"),
        (borrows, "it calls labsupport's own version"),
        (prints_numbers, "scale is a str, wanted a tensor"),
        (3, "is an int, wanted a function"),
        (lambda weight: weight, "it raised TypeError"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_kind_of_answer(answer, said, capsys):
    before = EXERCISE.inputs(0)["weight"].clone()
    kept = check("2.2", answer)
    out, err = capsys.readouterr()
    assert said in out
    assert err == ""
    passed = answer is right_answer
    assert kept is (answer if passed else EXERCISE.reference)
    assert score("2.2") == (EXERCISE.points if passed else 0.0)
    assert torch.equal(EXERCISE.inputs(0)["weight"], before)


def test_where_an_answer_failed_is_said():
    assert "(line 3 of the function)" in attempt(EXERCISE, raises, EXERCISE.inputs(0)).error


def test_a_class_that_fails_in_a_method_is_not_said_to_return_something():
    from transformers.cache_utils import DynamicLayer

    class CacheLayer(DynamicLayer):
        def __init__(self, quantize):
            super().__init__()

        def update(self, key_states, value_states, *args, **kwargs):
            return key_states + no_such_name, value_states  # noqa: F821

    layer = registry.get("9.4")
    tried = attempt(layer, CacheLayer, layer.inputs(0))
    assert tried.status == "raised"
    assert "NameError" in tried.error
    assert "(line 2 of update)" in tried.error


def test_the_same_answer_hears_the_same_twice(capsys):
    wrong = EXERCISE.mutants[0].answer
    check("2.2", wrong)
    first = capsys.readouterr().out
    check("2.2", wrong)
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("answer", [blank, returns_nothing, EXERCISE.mutants[0].answer])
def test_strict_raises(answer, monkeypatch):
    monkeypatch.setenv("LABS_STRICT", "1")
    with pytest.raises(AssertionError, match=r"^2.2 scale_and_zero_point"):
        check("2.2", answer)


def test_score_uses_other_inputs_than_check():
    assert not set(session.SCORE_SEEDS) & set(session.CHECK_SEEDS)
    seen = [EXERCISE.inputs(s)["weight"] for s in session.CHECK_SEEDS]

    def knows_the_check_inputs(weight, bits):
        if not any(torch.equal(weight, s) for s in seen):
            return torch.ones(len(weight), 1), torch.zeros(len(weight), 1)
        return right_answer(weight, bits)

    assert check("2.2", knows_the_check_inputs) is knows_the_check_inputs
    assert score("2.2") == 0.0


def test_score_without_an_answer():
    assert score("2.2") == 0.0


@pytest.mark.parametrize("id", ["2.99", "77.1", "two", "", "2"])
def test_unknown_exercise(id):
    with pytest.raises(KeyError, match="no exercise"):
        check(id, right_answer)


def test_unknown_chapter():
    with pytest.raises(KeyError, match="there is no chapter 77"):
        tally(77)


def test_tally_counts(capsys):
    check("2.2", right_answer)
    check("2.3", blank)
    capsys.readouterr()
    tally(2)
    lines = capsys.readouterr().out.splitlines()
    count = len(registry.exercises_of(2))
    assert len(lines) == count + 1
    assert lines[1].endswith("pass")
    assert lines[2].endswith("not attempted")
    assert lines[-1] == f"1 of {count} pass"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((None, 4.0, "rise"), "rise: measured 4; no prediction was made"),
        ((2, 4.0, "rise"), "rise: predicted 2, measured 4, a factor 2 apart"),
        ((8, 4.0, "rise"), "rise: predicted 8, measured 4, a factor 2 apart"),
        (("C", "c", "error"), "error: predicted C, measured c, as predicted"),
        (("a", "c", "error"), "error: predicted a, measured c"),
        ((-1, 4.0, "rise"), "rise: predicted -1, measured 4"),
    ],
)
def test_revisit(arguments, said, capsys):
    revisit(*arguments)
    assert capsys.readouterr().out.strip() == said


@pytest.mark.parametrize("answer", [blank, returns_nothing, EXERCISE.mutants[0].answer], ids=["blank", "nothing", "wrong"])
def test_a_check_cell_that_runs_twice_does_not_judge_its_own_stand_in(answer, capsys):
    kept = check("2.2", answer)
    first = capsys.readouterr().out
    assert check("2.2", kept) is EXERCISE.reference
    assert capsys.readouterr().out == first
    assert score("2.2") == 0.0
    tally(2)
    assert "1 of" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer",
    [grid.scale_and_zero_point, types.FunctionType(grid.scale_and_zero_point.__code__, vars(grid), "mine"), borrows,
     functools.partial(grid.scale_and_zero_point)],
    ids=["itself", "its code", "called", "partial"],
)  # fmt: skip
def test_the_reference_under_any_name_is_borrowed(answer, capsys):
    check("2.2", answer)
    assert "labsupport's own version" in capsys.readouterr().out
    assert score("2.2") == 0.0


def test_what_an_answer_prints_stays_out_of_standard_error_and_is_cut(capsys):
    def talkative(weight, bits):
        print("begins", file=sys.stderr)
        warnings.warn("careful", stacklevel=1)
        print("x" * 100_000)
        return right_answer(weight, bits)

    assert check("2.2", talkative) is talkative
    out, err = capsys.readouterr()
    assert err == ""
    assert "scale_and_zero_point printed:\nbegins" in out
    assert "careful" in out
    assert len(out) < 2_000
    assert score("2.2") == EXERCISE.points
    assert capsys.readouterr() == ("", "")


def test_an_answer_that_exits_is_not_yet_right(capsys):
    check("2.2", lambda weight, bits: sys.exit("bye"))
    assert "not yet. it raised SystemExit: bye" in capsys.readouterr().out


NOTEBOOK = """
from labsupport.exercises import check, revisit, score, tally
#---
score, check = 0.93, "mine"
#---
def stubborn_row():
    raise NotImplementedError
#---
stubborn_row = check("2.7", stubborn_row)
score("2.7")
#---
print(score, check)
"""


@pytest.mark.slow
def test_names_that_a_learner_reuses_do_no_harm():
    """In a kernel: a cell that calls check or score means the course's, and the learner's own values are there again after it."""
    code = (
        "import sys\nfrom IPython.core.interactiveshell import InteractiveShell\nshell = InteractiveShell.instance()\n"
        f"cells = {NOTEBOOK.split('#---')!r}\n"
        "for cell in cells:\n    result = shell.run_cell(cell)\n    result.raise_error()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2.7 stubborn_row: not attempted, going on with the reference" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == "0.93 mine"


def test_seeds_must_not_be_empty():
    with pytest.raises(ValueError, match="cases is empty"):
        judging.test(EXERCISE, right_answer, [])


def test_attempts_whose_names_hold_a_dot_are_files_of_their_own(tmp_path):
    for number in (4, 5):
        Attempt("ran", {"a": torch.tensor(number)}).save(tmp_path / f"2.{number}")
    assert [int(Attempt.load(tmp_path / f"2.{number}").outputs["a"]) for number in (4, 5)] == [4, 5]


LAYERS = Exercise(
    id="0.0", name="layers", title="", minutes=1, difficulty=1, points=1, returns=("layers",), inputs=lambda seed: {},
    reference=lambda: [],
)  # fmt: skip


def test_tensors_within_lists_and_dicts_survive_a_file(tmp_path):
    scale, nothing = torch.ones(2, dtype=torch.float16), torch.zeros(0, 3)
    tried = attempt(LAYERS, lambda: [{"scale": scale, "bits": 4, "of": [nothing, "nf4"]}], {})
    tried.save(tmp_path / "2.4")
    loaded = Attempt.load(tmp_path / "2.4")
    assert loaded.status == "ran"
    (layer,) = loaded.outputs["layers"]
    assert list(layer) == ["scale", "bits", "of"]
    assert torch.equal(layer["scale"], scale)
    assert layer["scale"].dtype == scale.dtype
    assert layer["bits"] == 4
    assert layer["of"][0].shape == (0, 3)
    assert layer["of"][1] == "nf4"


def test_an_entry_of_a_list_that_is_replaced_is_a_changed_input():
    def replaces(batches):
        batches[1] = None
        return []

    assert attempt(LAYERS, replaces, {"batches": [torch.ones(2), torch.ones(2)]}).changed == ("batches",)
