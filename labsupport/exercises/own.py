"""Numbers of a learner's own: an answer on inputs that no other learner has, reduced to one number that is written down.

In a class that wants them, a cell after each check calls `own_number` with constants that the class drew for this learner. What
the number shows and what it does not stands in labsupport/grading/own.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from labsupport.exercises.attempts import attempt
from labsupport.exercises.compare import Limit
from labsupport.exercises.form import Exercise, Outputs
from labsupport.exercises.judging import outputs
from labsupport.exercises.registry import get
from labsupport.exercises.session import passed_answer

CYCLE = 7  # entries are weighted by 1 to 7 in turn, so that their order counts
DIGITS = 10  # significant ones that are printed


def own_number(id: str, *constants: int) -> None:
    """Print the number of the answer that passed `check` last, on the inputs that the constants make. See `reduce`."""
    exercise, answer = get(id), passed_answer(id)
    if answer is None:
        print(f"{id}: your number comes from your own {exercise.name}. Run this cell again when its check says pass")
        return
    total = 0.0
    for turn, constant in enumerate(constants, 1):
        given = exercise.inputs(constant)
        print(f"{id} on inputs of your own: {', '.join(f'{name} {_shown(value)}' for name, value in given.items())}")
        tried = attempt(exercise, answer, given)
        if tried.status != "ran":
            print(f"{id}: your {exercise.name} gave no outputs for them: {tried.error or tried.status}")
            return
        total += turn * reduce(exercise, tried.outputs, _limits(exercise, given, outputs(exercise, exercise.reference, given)))
    print(f"your number for {id}: {total:.{DIGITS}g}")


def reduce(exercise: Exercise, values: Outputs, limits: torch.Tensor) -> float:
    """Outputs as one number: all numbers in them, by name and place, times 1, 2, ... 7, 1, 2, ... in turn, added up in float64.

    limits: how far off each entry may be, float64 [count]. True counts as 1. Texts, infinities and NaN count as 0, as do entries
    that may be anything, and outputs whose shape is the learner's choice.
    """
    entries = _flat(_counted(exercise, values)).nan_to_num(0, 0, 0)
    if len(entries) == len(limits):
        entries = entries.masked_fill(limits.isinf(), 0)
    return float((entries * _weights(len(entries))).sum())


def expected(exercise: Exercise, constants: tuple[int, ...]) -> tuple[float, float]:
    """The reference's number on the inputs of `constants`, and how far from it the number of an answer that is right may lie.

    Each entry may be off by what the exercise allows it, and the number by the sum of these, weighted as the entries are.
    """
    number = within = 0.0
    for turn, constant in enumerate(constants, 1):
        given = exercise.inputs(constant)
        want = outputs(exercise, exercise.reference, given)
        limits = _limits(exercise, given, want)
        number += turn * reduce(exercise, want, limits)
        within += turn * float((limits.masked_fill(limits.isinf(), 0) * _weights(len(limits))).sum())
    return number, within


def can_be_asked(exercise: Exercise) -> bool:
    """Whether only one set of outputs is right, so that there is one number."""
    return exercise.accepts is None and not exercise.needs_model


def _counted(exercise: Exercise, values: Outputs) -> Outputs:
    return {name: value for name, value in values.items() if name not in exercise.free}


def _limits(exercise: Exercise, given: Outputs, want: Outputs) -> torch.Tensor:
    """How far off each entry of the outputs may be, float64 [count]; infinite where anything is right."""
    limits = exercise.allowed(given, want)
    counted = _counted(exercise, want).items()
    return _flat({name: _allowed(value, limits[name] if isinstance(limits, Mapping) else limits) for name, value in counted})


def _weights(count: int) -> torch.Tensor:
    return (1 + torch.arange(count) % CYCLE).double()


def _flat(value: Any) -> torch.Tensor:
    """All numbers in a value, float64 [count]: a dict by its keys in their alphabetical order, a text as 0."""
    if isinstance(value, Mapping):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list | tuple):
        return torch.cat([torch.zeros(0, dtype=torch.float64), *map(_flat, value)])
    if isinstance(value, torch.Tensor):
        return value.detach().double().flatten()
    return torch.tensor([0.0 if isinstance(value, str) else float(value)], dtype=torch.float64)


def _allowed(value: Any, limit: Limit) -> Any:
    """The limit of each number in an output, in the output's form."""
    if isinstance(value, Mapping):
        return {key: _allowed(part, limit) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_allowed(part, limit) for part in value]
    if isinstance(value, torch.Tensor):
        return torch.as_tensor(limit, dtype=torch.float64).expand_as(value)
    return float(limit)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value)):
        return f"{value:.6g}" if isinstance(value, float) else repr(value)[:40]
    return f"({type(value).__name__})"
