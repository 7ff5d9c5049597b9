"""Chapter 14, last part: is a difference in answers of yes and no real; and a verdict at equal bytes, with the number behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from labsupport.exercises.compare import got_and_wanted
from labsupport.exercises.form import Exercise, Mutant, drive_cases, generator, mistakes_by_option
from labsupport.model.evaluate import paired_interval

ROUNDING = 1e-9  # of a few dozen operations in float64

Interval = tuple[float, float, float]


# 14.5 -----------------------------------------------------------------------------------------------------------------
def tasks_inputs(seed: int) -> dict:
    """Answers of two models to the same questions. In one case nobody differs, in another as many either way."""
    g = generator(seed)

    def answers(both: int, neither: int, only_first: int, only_second: int) -> tuple[Tensor, Tensor]:
        first = torch.tensor([True] * both + [False] * neither + [True] * only_first + [False] * only_second)
        second = torch.tensor([True] * both + [False] * neither + [False] * only_first + [True] * only_second)
        order = torch.randperm(len(first), generator=g)
        return first[order], second[order]

    few = torch.randint(0, 4, (6,), generator=g).tolist()
    return {
        "loses": answers(90 + few[0], 41, 13 + few[1], 3 + few[2]),
        "gains": answers(37, 80 + few[3], 2 + few[4], 9 + few[5]),
        "level": answers(60, 25, 6, 6),
        "alike": answers(50, 31, 0, 0),
    }


def sign_test(first: Tensor, second: Tensor) -> tuple[int, int, float]:
    """Exact: of the questions on which the two differ, a fair coin decides each if neither model is better."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differ = only_first + only_second
    tail = sum(math.comb(differ, count) for count in range(min(only_first, only_second) + 1)) / 2**differ
    return only_first, only_second, min(1.0, 2 * tail)


def _tested(first, second, p=lambda a, b, first, second: min(1.0, 2 * _tail(min(a, b), a + b)), swapped=False, counted=None):
    """The same in the open, and ways to get it wrong."""
    a, b = int((first & ~second).sum()), int((second & ~first).sum())
    value = p(a, b, first, second)
    if counted is not None:
        a, b = counted(first, second)
    return (b, a, value) if swapped else (a, b, value)


def _tail(count: int, of: int) -> float:
    return sum(math.comb(of, i) * 0.5**of for i in range(count + 1))


def _two_sided(a: int, b: int) -> float:
    return min(1.0, 2 * _tail(min(a, b), a + b))


def _corrected(a, b, first, second):
    """McNemar's with the correction for continuity."""
    return 2 * NormalDist().cdf(-max(abs(a - b) - 1, 0) / max(a + b, 1) ** 0.5)


def _unpaired(a, b, first, second):
    shares = [each.float().mean().item() for each in (first, second)]
    both = sum(shares) / 2
    return 2 * NormalDist().cdf(-abs(shares[1] - shares[0]) / (2 * both * (1 - both) / len(first)) ** 0.5)


SIGN_TEST = Exercise(
    id="14.5", name="sign_test", title="A test of yes and no", minutes=10, difficulty=3, points=3,
    returns=("test",), inputs=tasks_inputs, reference=sign_test, drive=drive_cases, allowed=lambda given, want: ROUNDING,
    about=lambda given, want, path, place: f"{('only_first', 'only_second', 'p')[int(path[-2])]} of the case {path[:-3]!r}",
    mistakes=mistakes_by_option(_tested, {
        "only_first and only_second are exchanged": {"swapped": True},
        "the counts are of all right answers: a question that both answer says nothing about which is better": {
            "counted": lambda first, second: (int(first.sum()), int(second.sum()))},
        "counts and p are of all right answers: a question that both answer says nothing about which is better": {
            "counted": lambda first, second: (int(first.sum()), int(second.sum())),
            "p": lambda a, b, first, second: _two_sided(int(first.sum()), int(second.sum()))},
        "p is of two shares measured on different questions: both models had the same ones, so look only at those on which they "
        "differ": {"p": _unpaired},
        "p counts one direction: the other model could have been ahead as easily, so it is twice this": {
            "p": lambda a, b, first, second: _tail(min(a, b), a + b)},
        "p is above 1 where both counts are equal: no probability is": {
            "p": lambda a, b, first, second: 2 * _tail(min(a, b), a + b)},
        "p is the chance of exactly these counts: take all that are as uneven, or more": {
            "p": lambda a, b, first, second: min(1.0, 2 * math.comb(a + b, a) * 0.5 ** (a + b))},
        "p counts all questions as differing: those on which both are right or both wrong have no say": {
            "p": lambda a, b, first, second: min(1.0, 2 * _tail(min(a, b), len(first)))},
        "p is of more uneven counts alone: those that were seen belong to it": {
            "p": lambda a, b, first, second: min(1.0, 2 * _tail(min(a, b) - 1, a + b))},
        "p is that the two do not differ by this much: it is small where the difference is large": {
            "p": lambda a, b, first, second: 1 - min(1.0, 2 * _tail(min(a, b), a + b))},
        "p is from the normal curve, and these counts are small: add up the exact chances": [
            {"p": lambda a, b, first, second: 2 * NormalDist().cdf(-abs(a - b) / max(a + b, 1) ** 0.5)}, {"p": _corrected}],
    }),
    others=(
        Mutant(lambda *given: (*_tested(*given)[:2], 0.5), "p of the case 'loses'"),
        Mutant(lambda *given: (_tested(*given)[0] + 1, *_tested(*given)[1:]), "only_first of the case 'loses'"),
    ),
)  # fmt: skip


# 14.6 -----------------------------------------------------------------------------------------------------------------
REST = {"large": 420_000, "small": 150_000}  # bytes of embedding and norms


@cache
def verdict_inputs(seed: int) -> dict:
    """A large model's rows and a small one in float, in four cases: better, worse, and each of both where it could be chance.

    In one, the best that fits has exactly as many bytes; in the others another row that fits has more. Some rows fit by their
    linears alone, and are better.
    """
    g = generator(seed)
    wanted = {"better": (-1, True), "worse": (1, True), "perhaps better": (-1, False), "perhaps worse": (1, False)}
    found: dict[str, Any] = {}
    while len(found) < len(wanted):
        tokens = torch.randint(300, 2000, (16,), generator=g)
        hard = (2 + torch.rand(16, generator=g, dtype=torch.float64)) * tokens
        draws = torch.randint(0, 16, (300, 16), generator=g)
        budget = int(torch.randint(900, 1100, (1,), generator=g)) * 1000  # all bytes of the small model

        def row(name: str, total: int, rest: int, effect: float, hard=hard, tokens=tokens) -> dict[str, Any]:
            noise = 0.03 * torch.randn(len(tokens), generator=g, dtype=torch.float64)
            loss = hard + tokens * (effect + noise)
            perplexity = math.exp((loss.sum() / tokens.sum()).item())
            return {"name": name, "nbytes": total, "linear_nbytes": total - rest, "perplexity": perplexity, "loss": loss.tolist()}

        small = row("small, float", budget, REST["small"], 0.0)
        effect = (0.08 * torch.randn(1, generator=g)).item()
        rows = [
            row("3 bits, g128", budget - (60_000 if found else 0), REST["large"], effect),
            row("3 bits, g32", budget - 20_000, REST["large"], effect + 0.03),
            row("2 bits, g32", budget - 160_000, REST["large"], effect + 0.4),
            row("4 bits, g128", budget + 15_000, REST["large"], effect - 0.05),
            row("4 bits, g32", budget + 70_000, REST["large"], effect - 0.2),
            row("8 bits, row", budget + 450_000, REST["large"], effect - 0.4),
        ]
        case = ([rows[i] for i in torch.randperm(len(rows), generator=g).tolist()], small, tokens, draws)
        name, change, low, high, _ = _verdict(*case[:2], _paired(*case[2:]))
        kind = (math.copysign(1, change), low > 0 or high < 0)
        if name == "3 bits, g128" and min(abs(change), abs(low), abs(high)) > 1e-3:
            # The first has exactly as many bytes.
            found.setdefault(next(key for key, value in wanted.items() if value == kind), case)
    return {key: found[key] for key in wanted}


def _paired(tokens: Tensor, draws: Tensor) -> Callable[[dict, dict], Interval]:
    """What a learner is given: the change in perplexity from one row to another, and its interval."""

    def interval(first: dict, second: dict) -> Interval:
        loss, other = (torch.tensor(row["loss"], dtype=torch.float64) for row in (first, second))
        change = ((other - loss).sum() / tokens.sum()).expm1().item()
        return change, *paired_interval(loss, other, tokens, draws)

    return interval


def equal_bytes(large: Sequence[dict], small: dict, interval: Callable) -> tuple[str, float, float, float, str]:
    """The best of those rows whose whole model stores no more than the small one."""
    fits = [row for row in large if row["nbytes"] <= small["nbytes"]]
    best = min(fits, key=lambda row: row["perplexity"])
    change, low, high = interval(small, best)
    return best["name"], change, low, high, "holds" if high < 0 else "fails" if low > 0 else "cannot be told"


def _stored(row: dict) -> int:
    return row["nbytes"]


def _by_interval(change: float, low: float, high: float) -> str:
    return "holds" if high < 0 else "fails" if low > 0 else "cannot be told"


def _verdict(
    large, small, interval, stored=_stored, fits=lambda row, small, stored: stored(row) <= stored(small),
    best=lambda rows, small, stored: min(rows, key=lambda row: row["perplexity"]), turned=False, said=_by_interval,
):  # fmt: skip
    """The same, and ways to get it wrong."""
    chosen = best([row for row in large if fits(row, small, stored)], small, stored)
    three = interval(chosen, small) if turned else interval(small, chosen)
    return chosen["name"], *three, said(*three)


def drive_verdicts(answer: Callable, given: dict) -> dict:
    return {case: answer(large, small, _paired(*rest)) for case, (large, small, *rest) in given.items()}


def _verdict_differs(given: dict, got: dict, want: dict) -> str | None:
    for case, (name, *numbers, verdict) in got.items():
        wanted, *of_it, right = want[case]
        rows = {row["name"]: row for row in given[case][0]}
        if name not in rows:
            return f"{case}: there is no row {name!r}"
        if name != wanted and (over := _stored(rows[name]) - _stored(given[case][1])) > 0:
            return f"{case}: {name!r} stores {over} bytes more than the small model"
        if name != wanted:
            pair = got_and_wanted(rows[name]["perplexity"], rows[wanted]["perplexity"])
            return f"{case}: {name!r} fits and is not the best that does; its perplexity: {pair}"
        if all(abs(a - b) <= ROUNDING for a, b in zip(numbers, of_it, strict=True)) and verdict != right:
            place = "lies below 0" if of_it[2] < 0 else "lies above 0" if of_it[1] > 0 else "holds 0"
            return f"{case}: the verdict is {verdict!r}, and the interval {place}"
    return None


EQUAL_BYTES = Exercise(
    id="14.6", name="equal_bytes", title="A verdict at equal bytes", minutes=12, difficulty=3, points=4,
    returns=("verdict",), inputs=verdict_inputs, reference=equal_bytes, drive=drive_verdicts, otherwise=_verdict_differs,
    allowed=lambda given, want: ROUNDING,
    mistakes=mistakes_by_option(_verdict, {
        "the bytes are those of the linears alone: the large model's embedding is larger too, and `nbytes` counts it": {
            "stored": lambda row: row["linear_nbytes"]},
        "the best of all rows was taken, whatever it stores: only those count that store no more than the small model": {
            "fits": lambda row, small, stored: True},
        "the row with most bytes that fits was taken: it is not the best of those that fit": {
            "best": lambda rows, small, stored: max(rows, key=stored)},
        "the row nearest in bytes was taken, and it stores more than the small model": {
            "fits": lambda row, small, stored: True,
            "best": lambda rows, small, stored: min(rows, key=lambda row: abs(stored(row) - stored(small)))},
        "the smallest row was taken, and it is the worst: the question is about the best that fits": {
            "best": lambda rows, small, stored: min(rows, key=stored)},
        "a row that stores exactly as many bytes as the small model was left out: no more means that it fits": {
            "fits": lambda row, small, stored: stored(row) < stored(small)},
        "the change goes the other way, and the verdict with it: below 0 is wanted where the large model is better": {
            "turned": True},
        "the verdict is right, and the change goes the other way: wanted is from the small model to the large one": {
            "turned": True, "said": lambda change, low, high: _by_interval(-change, -high, -low)},
        "the verdict goes by the change alone: where the interval holds 0 it cannot be told": {
            "said": lambda change, low, high: "holds" if change < 0 else "fails"},
        "what does not hold is called a failure: where the interval holds 0 it cannot be told": {
            "said": lambda change, low, high: "holds" if high < 0 else "fails"},
        "what does not fail is called held: where the interval holds 0 it cannot be told": {
            "said": lambda change, low, high: "fails" if low > 0 else "holds"},
        "the verdict is turned: the large model is better where the perplexity falls": {
            "said": lambda change, low, high: _by_interval(-change, -high, -low)},
    }),
    others=(
        Mutant(lambda *given: ("9 bits", *_verdict(*given)[1:]), "there is no row"),
        Mutant(lambda *given: (*_verdict(*given)[:4], "cannot be told"), "the verdict is 'cannot be told', and the interval lies"),
        Mutant(lambda *given: (_verdict(*given)[0], 0.5, *_verdict(*given)[2:]), "better[1]"),
    ),
)  # fmt: skip

EXERCISES = (SIGN_TEST, EQUAL_BYTES)
