"""The grids of a weight's groups under GPTQ: how one is chosen, and how weights are rounded to it.

A grid spans from the least to the largest weight of its group, or with `mse` the shorter range whose rounding errors are least.
With `autogptq` both are computed as AutoGPTQ 0.7.1 does and in its order, so that scales and zero-points are its own to the
last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from labsupport.quant.grid import stored_grids

# The search of the authors' code: least sum of |error|**2.4 over ranges shrunk by 0, 1, ..., 79 %.
NORM, STEPS, SHRINK = 2.4, 100, 0.8
ROW_BYTES = 2**21  # ranges are searched some rows at a time, few enough that they stay in a CPU's last-level cache


class Grid(NamedTuple):
    """A grid in the form in which weights are rounded to it most quickly. All float32, [out] or [out, 1].

    least, most: the numbers of steps from 0 at which the first and the last code stand.
    """

    scale: torch.Tensor
    inverse: torch.Tensor
    least: torch.Tensor
    most: torch.Tensor


@dataclass(frozen=True)
class GridRule:
    """How a group's grid is chosen and how weights are rounded to it."""

    bits: int
    symmetric: bool
    mse: bool
    scale_dtype: torch.dtype
    autogptq: bool

    def fit(self, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The grid of each row: float [out, columns] -> scale, rounded to scale_dtype, and zero_point, both float32 [out, 1]."""
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        if not self.mse:
            return self._spanning(low, high)
        step = max(1, ROW_BYTES // (4 * group.shape[1]))
        parts = [self._search(*rows) for rows in zip(group.split(step), low.split(step), high.split(step), strict=True)]
        return torch.cat([scale for scale, _ in parts]), torch.cat([zero_point for _, zero_point in parts])

    def prepared(self, scale: torch.Tensor, zero_point: torch.Tensor) -> Grid:
        return Grid(scale, 1 / scale, -zero_point, 2**self.bits - 1 - zero_point)

    def steps(self, weight: torch.Tensor, grid: Grid, out: torch.Tensor | None = None) -> torch.Tensor:
        """How many steps from 0 each weight is rounded to: its code less zero_point, in one pass less than the code."""
        scaled = torch.div(weight, grid.scale, out=out) if self.autogptq else torch.mul(weight, grid.inverse, out=out)
        return torch.clamp(scaled.round_(), grid.least, grid.most, out=scaled)

    def _spanning(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.autogptq:
            # Errors of other columns may leave next to nothing in a group: that is no weight, and becomes 0.
            scale, zero_point = stored_grids(low, high, self.bits, self.symmetric, self.scale_dtype, tiny_is_zero=True)
            return scale.float(), zero_point
        low, high = autogptq_range(low, high, self.symmetric)
        scale = (high - low) / (2**self.bits - 1)
        return scale, torch.full_like(scale, 2 ** (self.bits - 1)) if self.symmetric else torch.round(-low / scale)

    def _search(self, group: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        least = torch.full_like(low, float("inf"))
        scale, zero_point = self._spanning(low, high)
        for step in range(int(SHRINK * STEPS)):
            share = 1 - step / STEPS
            tried_scale, tried_zero = self._spanning(share * low, share * high)
            values = self.steps(group, self.prepared(tried_scale, tried_zero)).mul_(tried_scale)
            error = values.sub_(group).abs_().pow_(NORM).sum(1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero_point = torch.where(better, tried_scale, scale), torch.where(better, tried_zero, zero_point)
        return scale, zero_point


def autogptq_range(low: torch.Tensor, high: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The range that AutoGPTQ's grid spans. Both [out, 1].

    A group without a negative weight keeps the range [0, max] under `symmetric`, though its zero_point is in the middle of the
    codes: every weight above half the largest is clipped. A group of zeros spans [-1, 1].
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    return low.masked_fill(empty, -1), high.masked_fill(empty, 1)


class Grids:
    """The grids of a weight's groups, each chosen when its group is reached, or all set before.

    group_of: int64 [in_features], the group of each column, columns in the order in which they are quantized. group_size: a divisor
    of in_features. scale, zero_point: float32 [groups, out_features].
    """

    def __init__(self, rule: GridRule, group_size: int, group_of: torch.Tensor, rows: int):
        self.rule, self.group_size, self.group_of = rule, group_size, group_of
        self.scale = torch.empty(len(group_of) // group_size, rows, device=group_of.device)
        self.zero_point = torch.empty_like(self.scale)
        self.fixed = False
        self._groups: list[int] = group_of.tolist()
        self._prepared: dict[int, Grid] = {}

    def set(self, grids: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Use these, a scale and a zero_point [out, 1] for each group; `choose` then leaves them alone."""
        for group, (scale, zero_point) in enumerate(grids):
            self._keep(group, scale, zero_point)
        self.fixed = True

    def choose(self, weight: torch.Tensor, first: int, last: int) -> None:
        """Choose grids for the groups that begin in columns first to last, from the weights as they are now.

        weight: float [out, columns], from column `first` on, as far as those groups reach.
        """
        if not self.fixed:
            for start in self.starts(first, last):
                self._keep(start // self.group_size, *self.rule.fit(weight[:, start - first :][:, : self.group_size]))

    def starts(self, first: int, last: int) -> range:
        """The columns from `first` on, before `last`, in which groups begin."""
        return range(-(-first // self.group_size) * self.group_size, last, self.group_size)

    def of(self, column: int) -> Grid:
        return self._prepared[self._groups[column]]

    def quantize(self, weight: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes of a column's weights, and the values that they stand for. Both float [out]."""
        steps = self.rule.steps(weight, self.of(column))
        return steps + self.zero_point[self._groups[column]], steps * self.of(column).scale

    def _keep(self, group: int, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        self.scale[group], self.zero_point[group] = scale[:, 0], zero_point[:, 0]
        self._prepared[group] = self.rule.prepared(self.scale[group], self.zero_point[group])
