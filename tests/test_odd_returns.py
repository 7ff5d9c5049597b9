"""Whatever an answer returns, it is told one sentence: no traceback, and NaN or infinity never passes."""

import functools
import math

import pytest
import torch
from remembering import remember_outputs

from labsupport.exercises import attempts, registry
from labsupport.exercises.attempts import attempt, run
from labsupport.exercises.form import Exercise
from labsupport.exercises.judging import INTERNAL, assess

pytestmark = pytest.mark.slow

EXERCISES = registry.all_exercises()


class Strange:
    """Nothing that an answer should return."""


def like(make_tensor, number):
    return lambda want: make_tensor(want) if isinstance(want, torch.Tensor) else number


ODD = {
    "float": lambda want: 2.0, "int": lambda want: 3, "text": lambda want: "x", "bool": lambda want: True,
    "none": lambda want: None,
    "list": lambda want: [1.0, 2.0], "empty list": lambda want: [], "dict": lambda want: {"a": 1}, "object": lambda want: Strange(),
    "function": lambda want: abs, "huge number": lambda want: 10**400, "tiny number": lambda want: 5e-324,
    "scalar tensor": lambda want: torch.tensor(1.0), "empty tensor": lambda want: torch.zeros(0),
    "no rows": lambda want: torch.zeros(0, 3), "rank 4": lambda want: torch.zeros(2, 3, 4, 5),
    "one more axis": like(lambda t: t[None], torch.tensor([1.0])), "one row less": like(lambda t: t[1:] if t.ndim else t, 0.5),
    "turned": like(lambda t: t.t() if t.ndim == 2 else t, 1.5), "flat": like(lambda t: t.flatten(), torch.tensor([2.0])),
    "half": like(lambda t: t.half(), torch.tensor(1.0).half()), "double": like(lambda t: t.double() + 1, 1.0),
    "complex": like(lambda t: t.to(torch.complex64), 1j), "bool tensor": like(lambda t: t.bool(), torch.tensor(True)),
    "nan": like(lambda t: torch.full(t.shape, math.nan), math.nan), "inf": like(lambda t: torch.full(t.shape, math.inf), math.inf),
    "minus inf": like(lambda t: torch.full(t.shape, -math.inf), -math.inf), "one nan": like(lambda t: with_one_nan(t), math.nan),
    "zeros": like(torch.zeros_like, 0), "negative": like(lambda t: torch.full(t.shape, -5), -5),
    "huge": like(lambda t: torch.full(t.shape, 2**40), 2**40), "tiny": like(lambda t: torch.full(t.shape, 1e-30), 1e-30),
    "uint8": like(lambda t: t.to(torch.uint8), 7), "meta": like(lambda t: t.to("meta"), torch.zeros(1, device="meta")),
    "sparse": like(lambda t: t.float().to_sparse(), torch.ones(2, 2).to_sparse()),
    "floats as texts": like(lambda t: str(t), "1.0"), "list of lists": like(lambda t: t.tolist(), [[1], [2, 3]]),
    "nested": lambda want: [{"a": [torch.zeros(2), None]}],
}  # fmt: skip
NEVER = {"nan", "inf", "minus inf", "one nan"}


def with_one_nan(tensor):
    odd = tensor.float().clone()
    if odd.numel():
        odd.view(-1)[-1] = math.nan
    return odd


def answers(exercise):
    """Odd values for all outputs at once and for each of several alone, by what is odd."""
    want = list(run(exercise, exercise.reference, exercise.inputs(0)).values())
    if exercise.drive is not None:
        # What an answer returns is not what comes out of the script around it.
        want = [torch.ones(3, 5)] * len(exercise.returns)
    for place in ["all", *range(len(want))] if len(want) > 1 else ["all"]:
        for name, make in ODD.items():
            values = [make(value) if place in ("all", i) else value for i, value in enumerate(want)]
            yield name, values[0] if len(values) == 1 else tuple(values)


@functools.cache
def reference_output(exercise):
    return run(exercise, exercise.reference, exercise.inputs(0))


def refuses(exercise, given, answer, nan_within):
    verdict = assess(exercise, given, attempt(exercise, answer, given))
    assert INTERNAL not in verdict.message, verdict.message
    assert "\n" not in verdict.message
    assert verdict.passed or verdict.message
    if nan_within:
        assert not verdict.passed, "NaN or infinity passes"


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_no_return_value_raises(exercise, monkeypatch):
    remember_outputs(monkeypatch)
    given, count = exercise.inputs(0), 0
    for name, value in answers(exercise):
        refuses(exercise, given, lambda *_, value=value: value, name in NEVER)
        count += 1
    assert count >= len(ODD)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_no_judge_raises_over_odd_outputs(exercise, monkeypatch):
    """The same behind the script around an answer: each output of the reference is replaced by odd ones."""
    remember_outputs(monkeypatch)
    given, right = exercise.inputs(0), reference_output(exercise)
    for place in right:
        for name in ODD:
            replaced = attempt_with({**right, place: ODD[name](right[place])})
            if replaced is None:
                continue
            verdict = assess(exercise, given, replaced)
            assert INTERNAL not in verdict.message, f"{place} {name}: {verdict.message}"
            if name in NEVER:
                assert not verdict.passed, f"{place} {name}: NaN or infinity passes"


def test_a_whole_number_keeps_its_value_on_the_way_to_a_small_dtype():
    """Codes of which uint8 would cut off what is wrong: 256 too high is no right answer."""
    codes = torch.tensor([[3, 7]], dtype=torch.uint8)
    exercise = Exercise(
        id="0.0", name="codes", title="", minutes=1, difficulty=1, points=1, returns=("codes",),
        inputs=lambda seed: {}, reference=lambda: codes,
    )  # fmt: skip
    for wrong in (codes.long() + 256, codes.double() + 256, codes.long() - 256):
        assert not assess(exercise, {}, attempt(exercise, lambda wrong=wrong: wrong, {})).passed


def attempt_with(outputs):
    """An attempt with these outputs; None where no file holds them, which is refused before a judge sees it."""
    try:
        return attempts.Attempt("ran", {name: attempts.plain(name, value) for name, value in outputs.items()})
    except attempts.WrongReturn:
        return None
