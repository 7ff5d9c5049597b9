"""An answer is run, and whatever it does becomes data: tensors, numbers, text.

Running and judging are apart. Judging (judging.py) looks at this data and never at the answer, so that running can happen in a
sandbox and judging outside it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import numbers
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from labsupport.exercises.form import Exercise

LONGEST_OUTPUT = 1_000  # characters of what an answer prints that are kept
LARGEST_INTEGER = 2**63


@dataclass(frozen=True)
class Attempt:
    """What became of an answer, as data.

    status: "ran", "blank" (the untouched stub), "raised" or "returned" (values that cannot be used). changed: inputs that it
    changed in place. borrowed: it called labsupport's own version. printed: what it printed or warned, cut at a sensible length.
    """

    status: str
    outputs: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    changed: tuple[str, ...] = ()
    borrowed: bool = False
    printed: str = ""

    def save(self, stem: Path) -> None:
        """Write `stem`.safetensors (tensors) and `stem`.json (everything else)."""
        from safetensors.torch import save_file

        tensors = {k: v.clone() for k, v in self.outputs.items() if isinstance(v, torch.Tensor)}
        rest = {k: v for k, v in self.outputs.items() if k not in tensors}
        save_file(tensors, stem.with_name(stem.name + ".safetensors"))
        about = {"status": self.status, "error": self.error, "changed": self.changed, "borrowed": self.borrowed}
        about |= {"printed": self.printed, "outputs": rest, "order": list(self.outputs)}
        stem.with_name(stem.name + ".json").write_text(json.dumps(about), "utf-8")

    @classmethod
    def load(cls, stem: Path) -> Attempt:
        """Read what `save` wrote. Only safetensors and JSON are read."""
        from safetensors.torch import load_file

        about = json.loads(stem.with_name(stem.name + ".json").read_text("utf-8"))
        stored = load_file(stem.with_name(stem.name + ".safetensors")) | about["outputs"]
        outputs = {k: stored[k] for k in about["order"]}
        return cls(about["status"], outputs, about["error"], tuple(about["changed"]), about["borrowed"], about["printed"])


class WrongReturn(Exception):
    """The answer ran, but what it returned cannot be used."""


def _plain(name: str, value: Any) -> Any:
    """A tensor on the CPU or a value that JSON can hold, so that an attempt is the same before and after a file."""
    if isinstance(value, torch.Tensor):
        return _plain_tensor(name, value)
    if value is None:
        raise WrongReturn(f"{name} is None. Is there a return statement?")
    if isinstance(value, bool | str):
        return type(value)(value) if isinstance(value, bool) else str(value)
    if isinstance(value, numbers.Integral):
        if abs(int(value)) >= LARGEST_INTEGER:
            raise WrongReturn(f"{name} is a whole number of more than 63 bits")
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{index}]", v) for index, v in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(k): _plain(f"{name}[{k!r}]", v) for k, v in value.items()}
    raise WrongReturn(f"{name} is a {type(value).__name__}, wanted a tensor or a number")


def _plain_tensor(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.is_meta:
        raise WrongReturn(f"{name} is on the meta device: it has a shape and no values")
    if value.layout != torch.strided or value.is_quantized:
        raise WrongReturn(f"{name} is a tensor of another kind ({value.layout}, {value.dtype}), wanted an ordinary one")
    if value.is_complex():
        raise WrongReturn(f"{name} holds complex numbers, wanted real ones")
    return value.detach().cpu().contiguous().clone()


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
def _watch(function: Callable) -> Iterator[list]:
    """Notice a call of `function` under any name. A courtesy to the learner, not a guard."""
    code, seen, before = getattr(function, "__code__", None), [], sys.getprofile()

    def look(frame, event, _):
        if event == "call" and frame.f_code is code:
            seen.append(frame.f_code.co_name)

    sys.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(before)


def is_reference(exercise: Exercise, answer: Any) -> bool:
    """Whether an answer is labsupport's function itself, under whatever name."""
    code = getattr(exercise.reference, "__code__", None)
    return answer is exercise.reference or (code is not None and getattr(answer, "__code__", None) is code)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return True


def _failed_line(error: BaseException, answer: Callable) -> str | None:
    """The line of the answer at which it failed, counted from its first, or of a method where it is a class; None elsewhere."""
    functions = vars(answer).values() if isinstance(answer, type) else [answer]
    codes = [function.__code__ for function in functions if hasattr(function, "__code__")]
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if frame.f_code.co_filename in {code.co_filename for code in codes}:
            if isinstance(answer, type):
                return f"line {line - frame.f_code.co_firstlineno + 1} of {frame.f_code.co_name}"
            return f"line {line - codes[0].co_firstlineno + 1} of the function"
    return None


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def run(exercise: Exercise, answer: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """Drive an answer with `given` and return its outputs by name, as plain data. Lets the answer's exceptions through."""
    if exercise.drive is not None:
        outputs = exercise.drive(answer, given)
    else:
        outputs = _named(exercise, answer(*given.values()))
    return {k: _plain(k, v) for k, v in outputs.items()}


@contextmanager
def _listening() -> Iterator[io.StringIO]:
    """What is printed or warned meanwhile, instead of in the cell: nbgrader gives 0 for anything on standard error."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard), warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, category, *_: print(f"{category.__name__}: {message}", file=heard)
        yield heard


def _cut(text: str) -> str:
    if len(text) <= LONGEST_OUTPUT:
        return text
    return f"{text[:LONGEST_OUTPUT]}\n... and {len(text) - LONGEST_OUTPUT} more characters"


def attempt(exercise: Exercise, answer: Callable, given: dict[str, Any]) -> Attempt:
    """Run an answer on a copy of `given`; whatever it does becomes data."""
    if not callable(answer):
        return Attempt("returned", error=f"{exercise.name} is a {type(answer).__name__}, wanted a function")
    mine, outputs, status, error_text = copy.deepcopy(given), {}, "ran", ""
    with _listening() as heard, torch.no_grad(), _watch(exercise.reference) as seen:
        try:
            outputs = run(exercise, answer, mine)
        except WrongReturn as error:
            status, error_text = "returned", str(error)
        except NotImplementedError as error:  # the stub raises it bare; torch with a text where a kernel is missing
            status, error_text = ("raised", _described(error)) if error.args else ("blank", "")
        except (Exception, SystemExit) as error:
            status, error_text = _failure(exercise, answer, error)
    printed = _cut(heard.getvalue())
    if status != "ran":
        return Attempt(status, error=error_text, printed=printed)
    changed = tuple(k for k in given if not _same(given[k], mine[k]))
    borrowed = bool(seen) and answer is not exercise.reference
    return Attempt("ran", outputs, changed=changed, borrowed=borrowed, printed=printed)


def _failure(exercise: Exercise, answer: Callable, error: BaseException) -> tuple[str, str]:
    if where := _failed_line(error, answer):
        return "raised", f"{_described(error)} ({where})"
    if exercise.drive is not None and _inside_drive(exercise.drive, error):
        return "returned", f"what it returned cannot be used ({_described(error)})"
    return "raised", _described(error)


def _inside_drive(drive: Callable, error: BaseException) -> bool:
    """Whether an error comes from the script around an answer, which met a value that it can do nothing with."""
    code = getattr(drive, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    return code is not None and any(f.filename == code.co_filename and f.name == code.co_name for f in frames)
