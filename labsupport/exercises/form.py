"""The form of an exercise: what is asked, the reference, and the wrong answers that people give, each with its sentence.

A wrong answer is written once. `Mistake` is an answer and the sentence about it: the judge shows the sentence where an output
equals that answer's output on every input that was tried, and the tests see that it does. `Fault` is something that can be seen in
an output itself (a negative scale, codes that are no whole numbers). What is neither is shown the first place that differs.

    QUANTIZE = Exercise(
        id="2.3", name="quantize", title="Values to codes", minutes=6, difficulty=2, points=2,
        returns=("codes",), inputs=quantize_inputs, reference=grid.quantize,
        mistakes=mistakes_by_option(_codes, {  # a right answer, whose options are what can go wrong
            "the zero-point is missing: the code of 0.0 is zero_point, not 0": {"times": 0},
            "the weight is multiplied by the scale: ...": lambda w, s, z, b: _codes(w, 1 / s, z, b),
        }),
    )

Before a sentence is looked for, kinds, shapes, dtypes and non-finite numbers have been settled (judging.py): `given`, `got` and
`want` are dicts by name; `got` has the kinds, shapes and dtypes of `want` (but int64 for all whole numbers, so that they keep their
value), and no NaN where `want` has none.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from labsupport.exercises.compare import Limits, first_place, got_and_wanted

Outputs = dict[str, Any]


# Division and a product in float32: each rounds by at most 2**-24 of the result; four units of 2**-23 cover any order of them.
FLOAT32 = 4 * 2**-23


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
    message = f"pass, within tolerance (max difference {difference:.1e}, allowed {allowed:.1e})"
    return Verdict(True, message, difference, allowed)


def wrong(message: str) -> Verdict:
    return Verdict(False, message)


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that people give, and the whole sentence that is shown about it."""

    says: str
    answer: Callable


def mistakes_of(make: Callable[[Any], Callable], parts: Mapping[str, Any]) -> tuple[Mistake, ...]:
    """Mistakes whose answers are make(part), for parts that stand by their sentences. A list of parts gives one for each."""
    lists = {says: each if isinstance(each, list) else [each] for says, each in parts.items()}
    return tuple(Mistake(says, make(part)) for says, each in lists.items() for part in each)


def mistakes_by_option(answer: Callable, options: Mapping[str, Any]) -> tuple[Mistake, ...]:
    """Mistakes that one function makes with other keyword arguments, by their sentences: {"top": 128}. Or a whole wrong answer."""
    return mistakes_of(lambda part: part if callable(part) else partial(answer, **part), options)


@dataclass(frozen=True)
class Fault:
    """Something wrong that can be seen in an output, whatever made it.

    says: the sentence, a format string; where it has {fields}, `seen` gives their values. seen(given, got, want): true or a dict of
    fields where the fault is there, false or None where it is not. answers: answers that show it. early: looked for before shapes,
    dtypes and non-finite numbers are settled, in what the answer returned: only the kinds (tensor, number, text) are known to be
    right then.
    """

    says: str
    seen: Callable[[Outputs, Outputs, Outputs], Any]
    answers: tuple[Callable, ...]
    early: bool = False

    def message(self, given: Outputs, got: Outputs, want: Outputs) -> str | None:
        found = self.seen(given, got, want)
        if isinstance(found, Mapping):
            return self.says.format(**found)
        return self.says.format() if found else None


@dataclass(frozen=True)
class Mutant:
    """An answer that must be refused, and words that the message about it must contain."""

    answer: Callable
    says: str


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    id: "2.4", the chapter and a number. name: the function that the learner writes. returns: names of what it returns.
    inputs(seed): the arguments by name, in the order in which the answer takes them; or cases by name, with drive_cases.
    reference: a right answer; where labsupport has the function, that function.
    drive(answer, given): makes a dict of tensors, numbers and texts from an answer; without one, the answer is called.

    How an answer is judged:
    allowed(given, want): how far from the reference's output an answer's may lie, for all outputs or by name; 0 without it.
    accepts(given, got, want): in place of `allowed`, where other outputs than the reference's are right as well: a right(...), or
    None for an output that is not right. Without faults of its own an exercise cannot refuse anything by it.
    free: outputs whose shape is the learner's choice. dtypes: outputs whose dtype must be the reference's.
    faults, mistakes: see there; looked for in that order, each in the order in which they stand.
    close(given, want): how far an output may lie from a mistake's and still be taken for it; `allowed` without it.
    alike(given, got, theirs): in place of `close`, whether an output is a mistake's.
    otherwise(given, got, want): the sentence where no cause is known. Without one, the first entry that differs is shown, of the
    outputs in `order` first. about(given, want, path, place): what is said of that entry in place of where it stands.
    hint: what is said after a wrong shape. others: more answers that must be refused.
    needs_model: whether inputs load the course model; it is then tried with one seed.
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
    mistakes: tuple[Mistake, ...] = ()
    faults: tuple[Fault, ...] = ()
    others: tuple[Mutant, ...] = ()
    allowed: Callable[[Outputs, Outputs], Limits] = lambda given, want: 0.0
    accepts: Callable[[Outputs, Outputs, Outputs], Verdict | None] | None = None
    close: Callable[[Outputs, Outputs], Limits] | None = None
    alike: Callable[[Outputs, Outputs, Outputs], bool] | None = None
    otherwise: Callable[[Outputs, Outputs, Outputs], str | None] | None = None
    about: Callable[[Outputs, Outputs, str, tuple[int, ...]], str] | None = None
    order: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    hint: str = ""
    drive: Callable[[Callable, dict], dict] | None = None
    needs_model: bool = False

    @property
    def mutants(self) -> tuple[Mutant, ...]:
        """Every known wrong answer, with words that the message about it must contain."""
        known = [Mutant(mistake.answer, mistake.says) for mistake in self.mistakes]
        for fault in self.faults:
            longest = max((literal for literal, *_ in string.Formatter().parse(fault.says)), key=len)
            known += [Mutant(answer, longest) for answer in fault.answers]
        return (*known, *self.others)

    def where(self, given: Outputs, got: Outputs, want: Outputs) -> str:
        """The sentence about an output of which no cause is known."""
        if self.otherwise is not None and (sentence := self.otherwise(given, got, want)):
            return sentence
        ordered = {name: got[name] for name in (*self.order, *got)}
        path, place, have, wanted = first_place(ordered, {name: want[name] for name in ordered}, self.allowed(given, want))
        where = self.about(given, want, path, place) if self.about else path + (str(list(place)) if place else "")
        return f"{where}: {got_and_wanted(have, wanted)}"


def generator(seed: int) -> torch.Generator:
    """Where an exercise's inputs come from."""
    return torch.Generator().manual_seed(seed)


def drive_cases(answer: Callable, given: dict) -> dict:
    """For inputs that are cases, each the arguments of one call: what the answer returns for each, by the same names."""
    return {case: answer(*arguments) for case, arguments in given.items()}
