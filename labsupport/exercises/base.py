"""The old form of an exercise, with a judge of its own. Chapters move to form.py; this file goes when the last has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from labsupport.exercises.attempts import run
from labsupport.exercises.compare import largest_difference
from labsupport.exercises.form import Mutant, Verdict, generator, right, wrong

__all__ = ["Exercise", "Mutant", "Verdict", "generator", "largest_difference", "like", "right", "run", "shape_fault", "wrong"]


@dataclass(frozen=True)
class Exercise:
    id: str
    name: str
    title: str
    minutes: int
    difficulty: int
    points: int
    returns: tuple[str, ...]
    inputs: Callable[[int], dict[str, Any]]
    reference: Callable
    judge: Callable[[dict, dict, dict], Verdict]
    mutants: tuple[Mutant, ...]
    drive: Callable[[Callable, dict], dict] | None = None
    needs_model: bool = False


def shape_fault(got: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """The first stage of most judges: kinds, shapes and finite values. None when all is well. Worth no points."""
    for name, want in expected.items():
        have = got[name]
        if isinstance(want, torch.Tensor):
            if not isinstance(have, torch.Tensor):
                return f"{name} is a {type(have).__name__}, wanted a tensor of shape {list(want.shape)}"
            if have.shape != want.shape:
                return f"{name} has shape {list(have.shape)}, wanted {list(want.shape)}"
            if have.is_floating_point() and not have.isfinite().all() and want.isfinite().all():
                return f"{name} holds {'NaN' if have.isnan().any() else 'infinity'}"
        elif isinstance(want, bool | str):
            if not isinstance(have, type(want)):
                return f"{name} is a {type(have).__name__}, wanted {type(want).__name__}"
        elif isinstance(want, int | float):
            if isinstance(have, torch.Tensor) and have.numel() == 1:
                return f"{name} is a tensor, wanted a plain number: .item() makes one of it"
            if isinstance(have, bool) or not isinstance(have, int | float):
                return f"{name} is a {type(have).__name__}, wanted a number"
    return None


def like(mistakes: dict[str, Any], said: str) -> Any:
    """The mistake whose message holds `said`. mistakes: by the message that each is told."""
    return next(mistake for message, mistake in mistakes.items() if said in message)
