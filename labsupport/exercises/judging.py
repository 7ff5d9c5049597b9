"""Attempts are judged: kinds, shapes, dtypes and non-finite numbers first, then what can be seen in values, then known mistakes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from labsupport.exercises.attempts import Attempt, WrongReturn, attempt, run
from labsupport.exercises.compare import difference, kind_of, leaves, within
from labsupport.exercises.form import Exercise, Mistake, Outputs, Verdict, right, wrong

HALF = (torch.float16, torch.bfloat16)
INTERNAL = "this answer could not be judged"


class _Refused(Exception):
    """An output that cannot be set beside the reference's; the sentence says why."""


def _kind(value: Any) -> str:
    kinds = {bool: "bool", int: "number", float: "number", str: "str", list: "list", dict: "dict"}
    return "tensor" if isinstance(value, torch.Tensor) else kinds[type(value)]


def _as_tensor(have: Any, want: Any) -> Any:
    """A number or one entry where a tensor without axes is wanted, a list of numbers where one of one axis is: as good."""
    if not isinstance(want, torch.Tensor):
        return have
    if want.ndim == 0 and isinstance(have, torch.Tensor):
        return have.reshape(()) if have.numel() == 1 else have
    if want.ndim == 0 and _kind(have) == "number":
        return torch.tensor(float(have), dtype=torch.float64)
    if want.ndim == 1 and isinstance(have, list) and {*map(type, have)} in ({int}, {float}):
        return torch.tensor(have, dtype=torch.float64 if isinstance(have[0], float) else torch.int64)
    return have


def _check_kind(name: str, have: Any, want: Any) -> None:
    """Raise _Refused unless `have` is of the kind of `want`, and its parts of the kinds of its parts."""
    kind, wanted = _kind(have), _kind(want)
    if wanted == "number" and kind == "tensor" and have.numel() == 1:
        raise _Refused(f"{name} is a tensor, wanted a plain number: .item() makes one of it")
    if kind != wanted:
        shape = f" of shape {list(want.shape)}" if wanted == "tensor" else ""
        article = {"number": "a number", "bool": "True or False", "str": "a text"}.get(wanted, f"a {wanted}")
        raise _Refused(f"{name} is {kind_of(have)}, wanted {article}{shape}")
    if wanted == "dict":
        if missing := [key for key in want if key not in have]:
            raise _Refused(f"{name} has no {missing[0]!r}")
        for key in want:
            _check_kind(f"{name}[{key!r}]", have[key], want[key])
    if wanted == "list":
        if len(have) != len(want):
            raise _Refused(f"{name} has {len(have)} entries, wanted {len(want)}")
        for index, part in enumerate(want):
            _check_kind(f"{name}[{index}]", have[index], part)


def _settled(name: str, have: Any, want: Any, exercise: Exercise) -> Any:
    """`have` in the shape and dtype of `want`. Its kind is right. Raises _Refused where that cannot be, and for NaN."""
    if isinstance(want, dict):
        return {key: _settled(f"{name}[{key!r}]", have[key], part, exercise) for key, part in want.items()}
    if isinstance(want, list):
        return [_settled(f"{name}[{index}]", have[index], part, exercise) for index, part in enumerate(want)]
    if isinstance(want, torch.Tensor):
        return _settled_tensor(name, have, want, exercise)
    if isinstance(want, float | int) and not math.isfinite(have) and have != want:
        raise _Refused(f"{name} is {'NaN' if math.isnan(have) else 'infinite'}")
    return have


def _settled_tensor(name: str, have: torch.Tensor, want: torch.Tensor, exercise: Exercise) -> torch.Tensor:
    output = name.split("[", 1)[0]
    if have.shape != want.shape and output not in exercise.free:
        hint = f". {exercise.hint}" if exercise.hint else ""
        raise _Refused(f"{name} has shape {list(have.shape)}, wanted {list(want.shape)}{hint}")
    if have.dtype != want.dtype and output in exercise.dtypes:
        raise _Refused(f"{name} is {have.dtype}, wanted {want.dtype}")
    if have.dtype == torch.bool and want.dtype != torch.bool:
        raise _Refused(f"{name} holds True and False, wanted numbers")
    if have.is_floating_point():
        strange = ~have.isfinite() if output in exercise.free else ~have.isfinite() & want.isfinite()
        if strange.any():
            place = strange.nonzero()[0].tolist()
            value = have[tuple(place)].item()
            raise _Refused(f"{name}{place if place else ''} is {'NaN' if value != value else 'infinite'}")
    if want.dtype == torch.bool and have.dtype != torch.bool and not ((have == 0) | (have == 1)).all():
        raise _Refused(f"{name} holds numbers, wanted True and False")
    if not want.is_floating_point() and have.is_floating_point() and not torch.equal(have, have.round()):
        value = have[have != have.round()].flatten()[0].item()
        raise _Refused(f"{name} holds {value:.6g}, wanted whole numbers")
    if output in exercise.free and have.is_floating_point() == want.is_floating_point():
        return have
    if want.dtype == torch.bool:
        return have.bool()
    if not want.is_floating_point():
        return have.to(torch.int64)  # 271 stays 271: in uint8 it would be 15, and right
    return have.to(torch.float64 if have.dtype == torch.float64 else want.dtype)  # a float64 holds what a float32 would round


def _found(exercise: Exercise, given: Outputs, tried: Attempt, want: Outputs) -> tuple[Verdict | None, Outputs]:
    """The verdict where one can be seen in the output itself, else None; and the output as it is compared with the reference's."""
    got = tried.outputs
    try:
        if missing := [name for name in want if name not in got]:
            raise _Refused(f"there is no {missing[0]}")
        got = {name: _as_tensor(got[name], value) for name, value in want.items()}
        for name, value in want.items():
            _check_kind(name, got[name], value)
        if message := _first_fault(exercise, given, got, want, early=True):
            return wrong(message), got
        got = {name: _settled(name, got[name], value, exercise) for name, value in want.items()}
    except _Refused as refused:
        known = (mistake.says for mistake in exercise.mistakes if _is_mistake(exercise, mistake, given, got, None))
        return wrong(next(known, str(refused))), got
    if message := _first_fault(exercise, given, got, want, early=False):
        return wrong(message), got
    return _accepted(exercise, given, got, want), got


def _first_fault(exercise: Exercise, given: Outputs, got: Outputs, want: Outputs, early: bool) -> str | None:
    messages = (fault.message(given, got, want) for fault in exercise.faults if fault.early == early)
    return next(filter(None, messages), None)


def _accepted(exercise: Exercise, given: Outputs, got: Outputs, want: Outputs) -> Verdict | None:
    if exercise.accepts is not None:
        return exercise.accepts(given, got, want)
    off, limit, near = difference(got, want, exercise.allowed(given, want))
    return right(off, limit) if near else None


def outputs(exercise: Exercise, answer: Callable, given: Outputs) -> Outputs:
    """What an answer of ours returns for a copy of `given`. Lets its exceptions through."""
    return run(exercise, answer, copy.deepcopy(given))


def _is_mistake(exercise: Exercise, mistake: Mistake, given: Outputs, got: Outputs, want: Outputs | None) -> bool:
    """Whether an output is a mistake's; where `want` is None, exactly, since it has another shape or dtype than the reference's."""
    try:
        theirs = outputs(exercise, mistake.answer, given)
        if want is None:
            return within(got, theirs)
        theirs = {name: _settled(name, theirs[name], value, exercise) for name, value in want.items()}
    except (WrongReturn, _Refused, RuntimeError, ValueError, IndexError):  # it has no output to compare with on these inputs
        return False
    if exercise.alike is not None:
        return exercise.alike(given, got, theirs)
    return within(got, theirs, (exercise.close or exercise.allowed)(given, want))


def _unusable(tried: Attempt) -> str | None:
    """The sentence about an attempt whose outputs need not be looked at."""
    if tried.status == "blank":
        return "not attempted"
    if tried.status == "raised":
        return f"it raised {tried.error}"
    if tried.status == "returned":
        return tried.error
    if tried.changed:
        return f"it changes its input {tried.changed[0]!r} in place; whoever passed it still needs it"
    if tried.borrowed:
        return "it calls labsupport's own version. Write it out: the point is to have built it"
    return None


def _few_digits(tried: Attempt, want: Outputs) -> str:
    """What is added where an output is in 16 bits and the reference's is not."""
    wanted = {path: leaf for _, path, leaf in leaves(want)}
    for _, path, leaf in leaves(tried.outputs):
        dtype, expected = getattr(leaf, "dtype", None), getattr(wanted.get(path), "dtype", None)
        if dtype in HALF and expected is not None and expected.is_floating_point and expected not in HALF:
            return f". (And {path} is {dtype}, whose few digits alone can be the reason: compute in float32.)"
    return ""


@torch.no_grad()
def judge(exercise: Exercise, cases: Sequence[tuple[dict[str, Any], Attempt]], wanted: Sequence[Outputs] | None = None) -> Verdict:
    """The first verdict against an answer, of what became of it on several inputs, or the pass with the largest difference.

    wanted: the reference's outputs on each input, where they are known already.

    Pure: the answer itself is not needed. A sentence that names a cause is shown only if every output equals that mistake's.
    Never raises over what an answer returned; a judge that fails on it says so in the verdict.
    """
    if not cases:
        raise ValueError("cases is empty, wanted the attempts at one seed at least")
    try:
        return _judge(exercise, cases, wanted)
    except Exception as error:  # shown to the learner, and an error in the tests, which look for the sentence
        return wrong(f"{INTERNAL} ({type(error).__name__}: {error}). Please report it: the course is at fault")


def _judge(exercise: Exercise, cases: Sequence[tuple[dict[str, Any], Attempt]], wanted: Sequence[Outputs] | None) -> Verdict:
    best, unexplained, compared = right(), None, []
    for number, (given, tried) in enumerate(cases):
        if message := _unusable(tried):
            return wrong(message)
        want = outputs(exercise, exercise.reference, given) if wanted is None else wanted[number]
        verdict, got = _found(exercise, given, tried, want)
        if verdict is not None and not verdict.passed:
            return wrong(verdict.message + _few_digits(tried, want))
        compared.append((given, got, want))
        if verdict is None:
            unexplained = unexplained or (given, got, want, tried)
        elif verdict.difference > best.difference:
            best = verdict
    if unexplained is None:
        return best
    given, got, want, tried = unexplained
    for mistake in exercise.mistakes:
        if all(_is_mistake(exercise, mistake, *case) for case in compared):
            return wrong(mistake.says + _few_digits(tried, want))
    return wrong(exercise.where(given, got, want) + _few_digits(tried, want))


@torch.no_grad()
def outputs_right(exercise: Exercise, given: Outputs, tried: Attempt, want: Outputs) -> set[str]:
    """Names of the outputs that are the reference's, each looked at by itself. None where others than the reference's are right."""
    if exercise.accepts is not None or _unusable(tried):
        return set()
    limits = exercise.allowed(given, want)
    found = set()
    for name, value in want.items():
        try:
            have = _as_tensor(tried.outputs[name], value)
            _check_kind(name, have, value)
            have = _settled(name, have, value, exercise)
        except (_Refused, KeyError):
            continue
        if within({name: have}, {name: value}, limits):
            found.add(name)
    return found


def assess(exercise: Exercise, given: dict[str, Any], tried: Attempt) -> Verdict:
    """Judge what became of an answer on one input."""
    return judge(exercise, [(given, tried)])


def test(exercise: Exercise, answer: Callable, seeds: Iterable[int]) -> tuple[Verdict, list[Attempt]]:
    """Run an answer on the inputs of each seed, up to the first on which it fails outright. The verdict, and what became of it."""
    cases = []
    for seed in seeds:
        given = exercise.inputs(seed)
        cases.append((given, attempt(exercise, answer, given)))
        if _unusable(cases[-1][1]):
            break
    return judge(exercise, cases), [tried for _, tried in cases]
