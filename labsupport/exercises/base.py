"""What an exercise is, and how an answer to it is tried and judged.

Trying and judging are apart. `attempt` runs an answer and returns plain data: tensors, numbers, text. `assess` looks at that data
and never at the answer, so the first can happen in a sandbox and the second outside it.
"""

from __future__ import annotations

import copy
import json
import numbers
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Verdict:
    """What a judge says: right, with the largest difference seen and the one allowed; or not, with one sentence why."""

    passed: bool
    message: str = ""
    difference: float = 0.0
    allowed: float = 0.0


def right(difference: float = 0.0, allowed: float = 0.0) -> Verdict:
    if difference == 0:
        return Verdict(True, "pass, exact")
    said = f"pass, within tolerance (max difference {difference:.1e}, allowed {allowed:.1e})"
    return Verdict(True, said, difference, allowed)


def wrong(message: str) -> Verdict:
    return Verdict(False, message)


@dataclass(frozen=True)
class Mutant:
    """A wrong answer that people give, and words that the message about it must contain."""

    answer: Callable
    says: str


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    id: "2.4", the chapter and a number. name: the function that the learner writes. returns: names of what it returns.
    inputs(seed): the arguments by name, in the order in which the answer takes them.
    reference: a right answer; where labsupport has the function, that function.
    judge(given, got, expected): pure; `got` and `expected` are what `drive` made of the answer and of the reference.
    drive(answer, given): makes a dict of tensors, numbers and text from an answer; without one, the answer is called.
    """

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


@dataclass(frozen=True)
class Attempt:
    """What became of an answer, as data. status: "ran", "blank" (the untouched stub), "raised" or "returned" (unusable values)."""

    status: str
    outputs: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    changed: tuple[str, ...] = ()
    borrowed: bool = False

    def save(self, stem: Path) -> None:
        """Write `stem`.safetensors (tensors) and `stem`.json (everything else)."""
        from safetensors.torch import save_file

        tensors = {k: v.clone() for k, v in self.outputs.items() if isinstance(v, torch.Tensor)}
        rest = {k: v for k, v in self.outputs.items() if k not in tensors}
        save_file(tensors, stem.with_suffix(".safetensors"))
        about = {"status": self.status, "error": self.error, "changed": self.changed, "borrowed": self.borrowed}
        stem.with_suffix(".json").write_text(json.dumps(about | {"outputs": rest, "order": list(self.outputs)}))

    @classmethod
    def load(cls, stem: Path) -> Attempt:
        """Read what `save` wrote. Only safetensors and JSON are read."""
        from safetensors.torch import load_file

        about = json.loads(stem.with_suffix(".json").read_text())
        found = load_file(stem.with_suffix(".safetensors")) | about["outputs"]
        outputs = {k: found[k] for k in about["order"]}
        return cls(about["status"], outputs, about["error"], tuple(about["changed"]), about["borrowed"])


class WrongReturn(Exception):
    """The answer ran, but what it returned cannot be used."""


def _plain(name: str, value: Any) -> Any:
    """A tensor on the CPU or a value that JSON can hold, so that an attempt is the same before and after a file."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().contiguous().clone()
    if value is None:
        raise WrongReturn(f"{name} is None. Is there a return statement?")
    if isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(name, v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(name, v) for k, v in value.items()}
    raise WrongReturn(f"{name} is a {type(value).__name__}, wanted a tensor or a number")


def _named(exercise: Exercise, value: Any) -> dict[str, Any]:
    wanted = exercise.returns
    if value is None:
        raise WrongReturn("it returned None. Is there a return statement?")
    values = (value,) if len(wanted) == 1 else value
    if not isinstance(values, tuple | list) or len(values) != len(wanted):
        count = len(values) if isinstance(values, tuple | list) else 1
        raise WrongReturn(f"it returned {count} value{'s' * (count != 1)}, wanted {len(wanted)}: {', '.join(wanted)}")
    return dict(zip(wanted, values, strict=True))


@contextmanager
def _watch(function: Callable):
    """Notice a call of `function` under any name. A courtesy to the learner, not a guard."""
    code, seen, before = getattr(function, "__code__", None), [], sys.getprofile()

    def look(frame, event, _):
        if event == "call" and frame.f_code is code:
            seen.append(frame)

    sys.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(before)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return True


def _where(error: Exception, answer: Callable) -> str:
    """The line of the answer at which it failed, as text, or nothing if it failed elsewhere."""
    name = getattr(getattr(answer, "__code__", None), "co_filename", None)
    first = getattr(getattr(answer, "__code__", None), "co_firstlineno", 1)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == name]
    return f" (line {lines[-1] - first + 1} of the function)" if lines else ""


def run(exercise: Exercise, answer: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """Drive an answer with `given` and return its outputs by name, as plain data. Lets the answer's exceptions through."""
    if exercise.drive is not None:
        outputs = exercise.drive(answer, given)
    else:
        outputs = _named(exercise, answer(*given.values()))
    return {k: _plain(k, v) for k, v in outputs.items()}


def attempt(exercise: Exercise, answer: Callable, given: dict[str, Any]) -> Attempt:
    """Run an answer on a copy of `given`; whatever it does becomes data."""
    if not callable(answer):
        return Attempt("returned", error=f"{exercise.name} is a {type(answer).__name__}, wanted a function")
    mine = copy.deepcopy(given)
    try:
        with torch.no_grad(), _watch(exercise.reference) as seen:
            outputs = run(exercise, answer, mine)
    except NotImplementedError as error:
        if not error.args:  # the stub; torch raises it with a text where a kernel is missing
            return Attempt("blank")
        return Attempt("raised", error=f"NotImplementedError: {error}")
    except WrongReturn as error:
        return Attempt("returned", error=str(error))
    except Exception as error:
        return Attempt("raised", error=f"{type(error).__name__}: {error}{_where(error, answer)}")
    changed = tuple(k for k in given if not _same(given[k], mine[k]))
    return Attempt("ran", outputs, changed=changed, borrowed=bool(seen) and answer is not exercise.reference)


def assess(exercise: Exercise, given: dict[str, Any], tried: Attempt) -> Verdict:
    """Judge an attempt. Pure: the answer itself is not needed."""
    if tried.status == "blank":
        return wrong("not attempted")
    if tried.status == "raised":
        return wrong(f"it raised {tried.error}")
    if tried.status == "returned":
        return wrong(tried.error)
    if tried.changed:
        return wrong(f"it changes its input {tried.changed[0]!r} in place; whoever passed it still needs it")
    if tried.borrowed:
        return wrong("it calls labsupport's own version. Write it out: the point is to have built it")
    with torch.no_grad():
        expected = run(exercise, exercise.reference, copy.deepcopy(given))
        verdict = exercise.judge(given, tried.outputs, expected)
    for name, value in tried.outputs.items():
        if not verdict.passed and isinstance(value, torch.Tensor) and value.dtype in HALF and expected[name].dtype not in HALF:
            said = (
                f"{verdict.message}. (And {name} is {value.dtype}, whose few digits alone can be the reason: compute in float32.)"
            )
            return wrong(said)
    return verdict


def test(exercise: Exercise, answer: Callable, seeds: Iterable[int]) -> tuple[Verdict, bool]:
    """The first verdict against the answer, or the pass with the largest difference; and whether the answer is blank."""
    best = None
    for seed in seeds:
        given = exercise.inputs(seed)
        tried = attempt(exercise, answer, given)
        verdict = assess(exercise, given, tried)
        if not verdict.passed:
            return verdict, tried.status == "blank"
        if best is None or verdict.difference > best.difference:
            best = verdict
    if best is None:
        raise ValueError("seeds is empty, wanted at least one")
    return best, False


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


def largest_difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return (got.double() - want.double()).abs().max().item()


def generator(seed: int) -> torch.Generator:
    """Where an exercise's inputs come from."""
    return torch.Generator().manual_seed(seed)


def like(mistakes: dict[str, Any], said: str) -> Any:
    """The mistake whose message holds `said`. mistakes: by the message that each is told."""
    return next(mistake for message, mistake in mistakes.items() if said in message)
