"""What is said of an output that cannot be set beside the reference's, before any mistake is looked for."""

import math

import pytest
import torch

from labsupport.exercises.attempts import attempt
from labsupport.exercises.form import Exercise
from labsupport.exercises.judging import assess

CODES = torch.tensor([[3, 7]], dtype=torch.uint8)
RIGHT = {"codes": CODES, "share": 0.5, "fits": True, "mask": torch.tensor([True, False]), "parts": {"a": [1, 2]}}
EXERCISE = Exercise(
    id="0.0", name="parts", title="", minutes=1, difficulty=1, points=1, returns=tuple(RIGHT), inputs=lambda seed: {},
    reference=lambda: tuple(RIGHT.values()), hint="A row for each token",
)  # fmt: skip


def judged(**changed):
    return assess(EXERCISE, {}, attempt(EXERCISE, lambda: tuple((RIGHT | changed).values()), {})).message


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, "pass, exact"),
        ({"codes": CODES.double(), "share": torch.tensor(0.5).item(), "mask": torch.tensor([1.0, 0.0])}, "pass, exact"),
        ({"share": torch.tensor(0.5)}, "share is a tensor, wanted a plain number: .item() makes one of it"),
        ({"share": "half"}, "share is a str, wanted a number"),
        ({"share": math.nan}, "share is NaN"),
        ({"share": -math.inf}, "share is infinite"),
        ({"fits": 1}, "fits is an int, wanted True or False"),
        ({"codes": 3}, "codes is an int, wanted a tensor of shape [1, 2]"),
        ({"codes": CODES[0]}, "codes has shape [2], wanted [1, 2]. A row for each token"),
        ({"codes": CODES + 0.5}, "codes holds 3.5, wanted whole numbers"),
        ({"codes": CODES / 0}, "codes[0, 0] is infinite"),
        ({"codes": CODES > 3}, "codes holds True and False, wanted numbers"),
        ({"mask": torch.tensor([2, 0])}, "mask holds numbers, wanted True and False"),
        ({"parts": {"b": [1, 2]}}, "parts has no 'a'"),
        ({"parts": {"a": [1]}}, "parts['a'] has 1 entries, wanted 2"),
        ({"parts": {"a": [1, None]}}, "parts['a'][1] is None. Is there a return statement?"),
        ({"parts": {"a": [1, 3]}}, "parts['a'][1]: got 3, wanted 2"),
        ({"codes": CODES.half() + 1}, "codes[0, 0]: got 4, wanted 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_sentence(changed, sentence):
    assert judged(**changed) == sentence


def test_a_dtype_that_must_be_the_reference_s():
    exercise = Exercise(
        id="0.0", name="codes", title="", minutes=1, difficulty=1, points=1, returns=("codes",), inputs=lambda seed: {},
        reference=lambda: CODES, dtypes=("codes",),
    )  # fmt: skip
    assert assess(exercise, {}, attempt(exercise, lambda: CODES.int(), {})).message == "codes is torch.int32, wanted torch.uint8"


def test_few_digits_are_named_as_a_possible_reason():
    exercise = Exercise(
        id="0.0", name="values", title="", minutes=1, difficulty=1, points=1, returns=("values",), inputs=lambda seed: {},
        reference=lambda: torch.tensor([0.1]),
    )  # fmt: skip
    message = assess(exercise, {}, attempt(exercise, lambda: torch.tensor([0.1]).half(), {})).message
    assert message.startswith("values[0]: got 0.09998, wanted 0.1. (And values is torch.float16")
