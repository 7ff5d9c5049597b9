"""Whether a weight already lies on a 4-bit lattice, as one does that was dequantized from a 4-bit file.

A group of such a weight holds at most 16 values, evenly spaced: d q + m with whole numbers q from 0 to 15. How much is lost when it
is rounded again depends on whether the new levels fall on the old ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from labsupport.quant import checks

SIZES = (128, 64, 32)
LEVELS = 16
FEWEST = 9  # levels from the lowest value of a group to the highest; with fewer it has no need of 4 bits
# How far a value may lie from its point, in eps M, where M is the largest magnitude of the group. d q + m is computed in the
# weight's own dtype or a wider one: half an eps of 2 M for the product, of M for the sum and of M for what is stored, 2 together.
# So may the ends of the group be off, between which the points are laid out.
ROUNDINGS = 4.0
# Steps that are fewer tolerances long than this show nothing: two values of a bfloat16 near 1 are a lattice of their own.
CLEAR = 3.0


@dataclass(frozen=True)
class Lattice:
    """Where a weight lies. group_size: the largest of SIZES for which it does. has_zero: whether 0 is one of its points, as with
    an integer zero-point; not where a group has a minimum that is a float.
    """

    group_size: int
    has_zero: bool


def find(weight: torch.Tensor) -> Lattice | None:
    """The lattice of a weight, or of some of its rows, [out_features, in_features]. None where there is none.

    There is one if no group of a size holds other values, and at least half of the groups use more than 3 bits of it. Raises
    TypeError and ValueError for what is no weight of finite numbers.
    """
    checks.finite(checks.matrix(weight), "weight")
    for size in SIZES:
        if weight.shape[1] % size == 0:
            kinds = _look(weight.detach().reshape(-1, size))
            if not (kinds == OTHER).any() and (kinds >= LATTICE).float().mean() >= 0.5:
                return Lattice(size, not (kinds == WITHOUT_ZERO).any())
    return None


# What a group can be. UNKNOWN: constant, of few levels, or so fine that its dtype hides the steps.
OTHER, UNKNOWN, LATTICE, WITHOUT_ZERO = range(4)


def _look(groups: torch.Tensor) -> torch.Tensor:
    """What each group is, int64 [groups]. groups: [groups, size]."""
    eps = _resolution(groups)
    values = groups.double().sort(dim=1).values
    low, high = values[:, :1], values[:, -1:]
    spread, tolerance = high - low, ROUNDINGS * eps * values.abs().amax(dim=1, keepdim=True)
    distinct = (values.diff(dim=1) != 0).sum(dim=1) + 1
    kinds = torch.full((len(values),), OTHER, device=values.device)
    kinds[(spread <= CLEAR * tolerance * (LEVELS - 1)).squeeze(1)] = UNKNOWN
    for steps in range(1, LEVELS):
        step = spread / steps
        position = (values - low) / step
        even = (((position - position.round()) * step).abs() <= tolerance).all(dim=1) & (distinct <= LEVELS) & (kinds == OTHER)
        zero = -low / step
        off = ((zero - zero.round()) * step).abs() > tolerance
        beside = (off & (low < 0) & (high > 0)).squeeze(1)  # far outside the group, rounding errors of the ends would grow
        kinds[even] = UNKNOWN if steps + 1 < FEWEST else LATTICE
        kinds[even & beside & (kinds == LATTICE)] = WITHOUT_ZERO
    return kinds


def _resolution(values: torch.Tensor) -> float:
    """eps of the coarsest dtype that holds the values: a file may hold in float32 what was rounded to bfloat16 before."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return torch.finfo(dtype).eps
    return torch.finfo(values.dtype).eps
