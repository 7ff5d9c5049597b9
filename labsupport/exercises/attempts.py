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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from labsupport.exercises.compare import kind_of, map_leaves

if TYPE_CHECKING:
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
        """Write `stem`.safetensors (tensors, by their paths) and `stem`.json (everything else, null where a tensor stands)."""
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}

        def without_tensors(path: str, leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            tensors[path] = leaf.clone()
            return None

        about = vars(self) | {"outputs": map_leaves("", self.outputs, without_tensors)}
        save_file(tensors, f"{stem}.safetensors")
        Path(f"{stem}.json").write_text(json.dumps(about), "utf-8")

    @classmethod
    def load(cls, stem: Path) -> Attempt:
        """Read what `save` wrote. Only safetensors and JSON are read."""
        from safetensors.torch import load_file

        about, tensors = json.loads(Path(f"{stem}.json").read_text("utf-8")), load_file(f"{stem}.safetensors")
        outputs = map_leaves("", about["outputs"], lambda path, leaf: tensors[path] if leaf is None else leaf)
        return cls(**about | {"outputs": outputs, "changed": tuple(about["changed"])})


class WrongReturn(Exception):
    """The answer ran, but what it returned cannot be used."""


def plain(name: str, value: Any) -> Any:
    """A tensor on the CPU or a value that JSON can hold, so that an attempt is the same before and after a file.

    Raises WrongReturn for what is neither, within lists and dicts too.
    """
    return map_leaves(name, value, _plain_leaf)


def _plain_leaf(path: str, value: Any) -> torch.Tensor | bool | str | int | float:
    if isinstance(value, torch.Tensor):
        return _plain_tensor(path, value)
    if value is None:
        raise WrongReturn(f"{path} is None. Is there a return statement?")
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)  # of a subclass too
    if isinstance(value, numbers.Integral):
        if abs(int(value)) >= LARGEST_INTEGER:
            raise WrongReturn(f"{path} is a whole number of more than 63 bits")
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise WrongReturn(f"{path} is {kind_of(value)}, wanted a tensor or a number")


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
    values = value if len(wanted) > 1 and isinstance(value, tuple | list) else (value,)
    if (count := len(values)) != len(wanted):
        raise WrongReturn(f"it returned {count} value{'s' * (count != 1)}, wanted {len(wanted)}: {', '.join(wanted)}")
    return dict(zip(wanted, values, strict=True))


@contextmanager
def _watch(function: Callable) -> Iterator[list[str]]:
    """Notice a call of `function` under any name. A courtesy to the learner, not a guard."""
    code, before = getattr(function, "__code__", None), sys.getprofile()
    seen: list[str] = []
    if code is None:  # there is nothing to watch for, and watching makes every call slower
        yield seen
        return

    def look(frame: FrameType, event: str, _: Any) -> None:
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
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a == b if isinstance(a, str | int | float) else True  # a model is not looked into


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def run(exercise: Exercise, answer: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """Drive an answer with `given` and return its outputs by name, as plain data. Lets the answer's exceptions through."""
    if exercise.drive is not None:
        outputs = exercise.drive(answer, given)
    else:
        outputs = _named(exercise, answer(*given.values()))
    return {name: plain(name, value) for name, value in outputs.items()}


@contextmanager
def _listening() -> Iterator[io.StringIO]:
    """What is printed or warned meanwhile, instead of in the cell: nbgrader gives 0 for anything on standard error."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard), warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, category, *_: print(f"{category.__name__}: {message}", file=heard)
        yield heard


def attempt(exercise: Exercise, answer: Any, given: dict[str, Any]) -> Attempt:
    """Run an answer on a copy of `given`; whatever it does becomes data."""
    if not callable(answer):
        return Attempt("returned", error=f"{exercise.name} is {kind_of(answer)}, wanted a function")
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
    printed = heard.getvalue()
    if (more := len(printed) - LONGEST_OUTPUT) > 0:
        printed = f"{printed[:LONGEST_OUTPUT]}\n... and {more} more characters"
    if status != "ran":
        return Attempt(status, error=error_text, printed=printed)
    changed_inputs = tuple(k for k in given if not _same(given[k], mine[k]))
    return Attempt("ran", outputs, "", changed_inputs, bool(seen) and answer is not exercise.reference, printed)


def _failure(exercise: Exercise, answer: Callable, error: BaseException) -> tuple[str, str]:
    """Status and sentence for what an answer raised: "returned" where the script around it met a value that it cannot use."""
    functions = [f for f in (vars(answer).values() if isinstance(answer, type) else [answer]) if hasattr(f, "__code__")]
    drive = getattr(exercise.drive, "__code__", None)
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        code = frame.f_code
        if code.co_filename in {f.__code__.co_filename for f in functions}:  # the line, counted from the first of the function
            first = code.co_firstlineno if isinstance(answer, type) else functions[0].__code__.co_firstlineno
            where = code.co_name if isinstance(answer, type) else "the function"
            return "raised", f"{_described(error)} (line {line - first + 1} of {where})"
    frames = traceback.extract_tb(error.__traceback__)
    if drive is not None and any(f.filename == drive.co_filename and f.name == drive.co_name for f in frames):
        return "returned", f"what it returned cannot be used ({_described(error)})"
    return "raised", _described(error)
