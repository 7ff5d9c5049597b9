"""Outputs set beside each other: how far apart they are, where they first differ, and with how many digits that shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

Limit = float | torch.Tensor  # the same for all entries, or one for each


def leaves(outputs: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every tensor, number and text in outputs that may hold lists and dicts, as (output's name, path to it, value)."""
    for name, value in outputs.items():
        yield from ((name, path, leaf) for path, leaf in _inside(name, value))


def _inside(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _inside(f"{path}[{key!r}]", part)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _inside(f"{path}[{index}]", part)
    else:
        yield path, value


def _gap(have: Any, want: Any) -> torch.Tensor:
    """|have - want|, float64: 0 where both are the same infinity or NaN, infinite where one is NaN or texts differ."""
    if isinstance(want, str):
        return torch.tensor(0.0 if have == want else math.inf, dtype=torch.float64)
    a, b = (v.double() if isinstance(v, torch.Tensor) else torch.tensor(float(v), dtype=torch.float64) for v in (have, want))
    same = (a == b) | (a.isnan() & b.isnan())
    return (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(same, 0.0)


def _limit(limits: Limit | Mapping[str, Limit], name: str) -> Limit:
    return limits[name] if isinstance(limits, Mapping) else limits


def same_form(have: Mapping[str, Any], want: Mapping[str, Any]) -> bool:
    """Whether both hold the same leaves, tensors of the same shapes."""

    def form(outputs: Mapping[str, Any]) -> list[tuple]:
        found = []
        for _, path, leaf in leaves(outputs):
            found.append((path, leaf.shape if isinstance(leaf, torch.Tensor) else isinstance(leaf, str)))
        return found

    return form(have) == form(want)


def difference(
    have: Mapping[str, Any], want: Mapping[str, Any], limits: Limit | Mapping[str, Limit] = 0.0
) -> tuple[float, float, bool]:
    """The largest gap, the limit where it lies, and whether every entry is within its limit. Infinity where the forms differ.

    limits: how far apart entries may lie, for all outputs or by output's name; a number, or a tensor that fits the output. An entry
    whose limit is infinite is not compared.
    """
    if not same_form(have, want):
        return math.inf, 0.0, False
    worst, limit_there, within = 0.0, 0.0, True
    for (name, _, a), (_, _, b) in zip(leaves(have), leaves(want), strict=True):
        gap = _gap(a, b)
        limit = torch.as_tensor(_limit(limits, name), dtype=torch.float64).expand_as(gap)
        gap = gap.masked_fill(limit.isinf(), 0.0)
        within = within and bool((gap <= limit).all())
        if gap.numel() and gap.max() >= worst:
            worst, limit_there = gap.max().item(), limit.flatten()[gap.argmax()].item()
    return worst, limit_there, within


def first_place(
    have: Mapping[str, Any], want: Mapping[str, Any], limits: Limit | Mapping[str, Limit] = 0.0
) -> tuple[str, tuple[int, ...], Any, Any]:
    """The first entry that is further off than its limit: path, place in its tensor, and both entries. The forms are the same.

    Raises ValueError where nothing differs.
    """
    for (name, path, a), (_, _, b) in zip(leaves(have), leaves(want), strict=True):
        beyond = _gap(a, b) > torch.as_tensor(_limit(limits, name), dtype=torch.float64)
        if beyond.any():
            place = tuple(beyond.nonzero()[0].tolist())
            return path, place, *(v[place].item() if isinstance(v, torch.Tensor) else v for v in (a, b))
    raise ValueError("have and want differ nowhere")


def first_difference(
    have: Mapping[str, Any], want: Mapping[str, Any], limits: Limit | Mapping[str, Limit] = 0.0
) -> tuple[str, Any, Any]:
    """The same with path and place in one text, such as codes[3, 0]."""
    path, place, *entries = first_place(have, want, limits)
    return path + (str(list(place)) if place else ""), *entries


def shown(have: Any, want: Any, digits: int = 4) -> tuple[str, str]:
    """Both as text, with as many digits as it takes to tell them apart; whole numbers with all of theirs.

    digits: at least as many, and six for what needs an exponent otherwise.
    """
    if isinstance(have, str) or isinstance(want, str):
        return repr(have), repr(want)
    if isinstance(have, int) and isinstance(want, int):
        return str(have), str(want)
    texts = (str(have), str(want))
    for count in range(6 if 1e4 <= max(abs(have), abs(want)) < 1e6 else digits, 18):
        texts = (f"{have:.{count}g}", f"{want:.{count}g}")
        if texts[0] != texts[1] or have == want:
            break
    return texts


def got_and_wanted(have: Any, want: Any) -> str:
    """ "got 3, wanted 4", with as many digits as it takes to tell them apart."""
    return "got {}, wanted {}".format(*shown(have, want))


def largest_difference(have: torch.Tensor, want: torch.Tensor) -> float:
    return (have.double() - want.double()).abs().max().item()
