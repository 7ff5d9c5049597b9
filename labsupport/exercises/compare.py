"""Outputs set beside each other: how far apart they are, where they first differ, and with how many digits that shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Limit = float | torch.Tensor  # the same for all entries, or one for each
Limits = Limit | Mapping[str, Limit]  # for all outputs, or by output's name


def leaves(outputs: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Every tensor, number and text in outputs that may hold lists and dicts, as (output's name, path to it, value)."""
    found: list[tuple[str, str, Any]] = []

    def find(name: str, value: Any) -> None:
        map_leaves(name, value, lambda path, leaf: found.append((name, path, leaf)))

    for name, value in outputs.items():
        find(name, value)
    return found


def map_leaves(path: str, value: Any, change: Callable[[str, Any], Any]) -> Any:
    """`value` with every leaf of its lists and dicts replaced by change(path, leaf); tuples become lists, keys texts."""
    if isinstance(value, Mapping):
        return {str(key): map_leaves(f"{path}[{key!r}]", part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [map_leaves(f"{path}[{index}]", part, change) for index, part in enumerate(value)]
    return change(path, value)


def _gap(have: Any, want: Any) -> torch.Tensor:
    """|have - want|, float64: 0 where both are the same infinity or NaN, infinite where one is NaN or texts differ."""
    if isinstance(want, str):
        return torch.tensor(0.0 if have == want else math.inf, dtype=torch.float64)
    a, b = (v.double() if isinstance(v, torch.Tensor) else torch.tensor(float(v), dtype=torch.float64) for v in (have, want))
    gap = (a - b).abs()
    if gap.isfinite().all():
        return gap
    same = (a == b) | (a.isnan() & b.isnan())
    return gap.nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(same, 0.0)


def _limit(limits: Limits, name: str) -> torch.Tensor:
    return torch.as_tensor(limits[name] if isinstance(limits, Mapping) else limits, dtype=torch.float64)


def same_form(have: Mapping[str, Any], want: Mapping[str, Any]) -> bool:
    """Whether both hold the same leaves, tensors of the same shapes."""
    form = [
        [(path, leaf.shape if isinstance(leaf, torch.Tensor) else isinstance(leaf, str)) for _, path, leaf in leaves(outputs)]
        for outputs in (have, want)
    ]
    return form[0] == form[1]


def within(have: Mapping[str, Any], want: Mapping[str, Any], limits: Limits = 0.0) -> bool:
    """Whether both have the same form and no entry lies further off than its limit; see `difference`."""
    if not same_form(have, want):
        return False
    pairs = zip(leaves(have), leaves(want), strict=True)
    return all(bool((_gap(a, b) <= _limit(limits, name)).all()) for (name, _, a), (_, _, b) in pairs)


def difference(have: Mapping[str, Any], want: Mapping[str, Any], limits: Limits = 0.0) -> tuple[float, float, bool]:
    """The largest gap, the limit where it lies, and whether every entry is within its limit. Infinity where the forms differ.

    limits: how far apart entries may lie; a tensor fits its output. An entry whose limit is infinite is not compared.
    """
    if not same_form(have, want):
        return math.inf, 0.0, False
    worst, limit_there, fits = 0.0, 0.0, True
    for (name, _, a), (_, _, b) in zip(leaves(have), leaves(want), strict=True):
        gap = _gap(a, b)
        limit = _limit(limits, name).expand_as(gap)
        gap = gap.masked_fill(limit.isinf(), 0.0)
        fits = fits and bool((gap <= limit).all())
        if gap.numel() and gap.max() >= worst:
            worst, limit_there = gap.max().item(), limit.flatten()[gap.argmax()].item()
    return worst, limit_there, fits


def first_place(have: Mapping[str, Any], want: Mapping[str, Any], limits: Limits = 0.0) -> tuple[str, tuple[int, ...], Any, Any]:
    """The first entry that is further off than its limit: path, place in its tensor, and both entries. The forms are the same.

    Raises ValueError where nothing differs.
    """
    for (name, path, a), (_, _, b) in zip(leaves(have), leaves(want), strict=True):
        beyond = _gap(a, b) > _limit(limits, name)
        if beyond.any():
            place = tuple(beyond.nonzero()[0].tolist())
            a, b = (leaf[place].item() if isinstance(leaf, torch.Tensor) else leaf for leaf in (a, b))
            return path, place, a, b
    raise ValueError("have and want differ nowhere")


def first_difference(have: Mapping[str, Any], want: Mapping[str, Any], limits: Limits = 0.0) -> tuple[str, Any, Any]:
    """The same with path and place in one text, such as codes[3, 0]."""
    path, place, a, b = first_place(have, want, limits)
    return path + (str(list(place)) if place else ""), a, b


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


def kind_of(value: Any) -> str:
    """ "an int", "a list": what a value is."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def got_and_wanted(have: Any, want: Any) -> str:
    """ "got 3, wanted 4", with as many digits as it takes to tell them apart."""
    return "got {}, wanted {}".format(*shown(have, want))


def largest_difference(have: torch.Tensor, want: torch.Tensor) -> float:
    return (have.double() - want.double()).abs().max().item()
