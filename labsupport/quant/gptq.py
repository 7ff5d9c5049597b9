"""GPTQ: round one column at a time, and let the columns that are still to come make up for the error.

Frantar et al. 2022, "GPTQ", arXiv:2210.17323, section 3.3 and algorithm 1. The loss is tr(E H E^T), E the error of the weight and
H = 2/n X^T X the Hessian of each row, X the layer's inputs: the squared error of the outputs.

With `autogptq` everything is computed as AutoGPTQ 0.7.1 does and in its order, so that codes, scales and zero-points are its own to
the last bit. Without, it is the same method with less to compute: inside a block of columns errors are spread by the inverse of H,
as in the paper, but from block to block by a factor of H itself, so that H is never inverted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from labsupport.quant import grid
from labsupport.quant.grid import UniformTensor

INNER_BLOCK = 32  # columns after which the rest of a block is updated by a matrix product, while they are still in the cache
# The search of the reference implementation: least sum of |error|**2.4 over ranges shrunk by 0, 1, ..., 79 %.
NORM, STEPS, SHRINK = 2.4, 100, 0.8
# Damping where the factorization fails: ten times more, from at least a thousandth on, so often before it is an error.
RAISES, LEAST_RAISED = 3, 1e-3
ROW_BYTES = 2**21  # ranges are searched some rows at a time, few enough that they stay in a CPU's last-level cache


@dataclass(frozen=True)
class GPTQTensor(UniformTensor):
    """A weight by GPTQ.

    g_idx: int32 [in_features], the group of each column where act_order has scattered groups over the row; None where a group is
    `group_size` neighbors. damping: the share of H's mean diagonal that was added to it: what was asked for, or more where
    H could not be factorized with that.
    """

    g_idx: torch.Tensor | None
    damping: float

    def dequantize(self) -> torch.Tensor:
        if self.g_idx is None:
            return super().dequantize()
        groups = self.g_idx.long()
        return grid.dequantize(self.codes, self.scale.float()[:, groups], self.zero_point[:, groups])


@torch.no_grad()
def quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    mse: bool = False,
    stale_grids: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    block_size: int = 128,
    autogptq: bool = False,
) -> GPTQTensor:
    """Round a weight so that the outputs, not the weights, stay close.

    weight: float [out_features, in_features]. hessian: float [in_features, in_features], 2/n X^T X; any factor on it leaves the
    codes alone. Neither is changed. group_size: a divisor of in_features, or None for a grid for each whole row.
    act_order: columns with the largest diagonal of H first. static_groups: every grid is taken from the weight as it came,
    and groups stay neighbors under act_order. Otherwise a grid is taken when its group is reached, from the weights
    as the errors before them have left them; with stale_grids from what they were when the block of `block_size` columns began,
    as the reference implementation does. mse: grids of least |error|**2.4, by search, and not those that reach the extremes.
    damping: this share of H's mean diagonal is added to the diagonal; tenfold, three times at most, where H cannot be factorized
    with it (see GPTQTensor.damping). A column that was never fed, with a zero on the diagonal, becomes 0.

    autogptq: AutoGPTQ's codes, scales and zero-points, slower: stale grids, float32 scales, blocks of 128 whatever is asked;
    a division where others multiply; and its rule for symmetric grids (see `autogptq_range`).

    Raises ValueError for NaN, infinity, a shape or group size that does not fit, bits outside 2-8, a Hessian that is zero,
    not symmetric or not positive definite; TypeError for a dtype that is not floating point.
    """
    size = grid.check_weight(weight, bits, group_size)
    if not weight.sum().isfinite() and not weight.isfinite().all():  # a finite sum has finite terms, and is quicker to know
        raise grid.not_finite(weight)
    if not (isinstance(block_size, int) and block_size >= 1):
        raise ValueError(f"block_size is {block_size!r}, wanted a positive whole number")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping is {damping}, wanted a share of the mean diagonal, 0 or more")
    hessian = _checked(hessian, weight)
    rows, columns = weight.shape
    if autogptq:
        stale_grids, scale_dtype, block_size = True, torch.float32, 128
    rule = Grids(bits, symmetric, mse, scale_dtype, autogptq)

    work = weight.detach().float()
    whole = rule.fit(work) if autogptq and group_size is None else None  # it looks at columns that were never fed as well
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    if dead.any():
        work = work.masked_fill(dead, 0)
    starts = range(0, columns, size)
    fixed = None
    if group_size is None:
        fixed = [whole or rule.fit(work)]
    elif static_groups:
        fixed = [rule.fit(work[:, start : start + size]) for start in starts]

    group_of = torch.arange(columns, device=weight.device) // size
    order = torch.argsort(hessian.diagonal(), descending=True) if act_order else None
    if order is not None:
        work, hessian = work[:, order], hessian[order][:, order]
        group_of = group_of[order] if fixed else group_of
    factor, damping = _factorize(hessian, damping, autogptq_factor if autogptq else upper_root)
    del hessian
    solver = _Solver(rows, columns, rule, size, group_of, fixed)
    sizes = _sizes(block_size, None if fixed or stale_grids else size, autogptq)
    grids_at = None if fixed else block_size if stale_grids else size
    (solver.as_autogptq if autogptq else solver.by_blocks)(work, factor, sizes, grids_at)

    codes = solver.codes.t()
    if order is not None:
        inverse = torch.argsort(order)
        codes, group_of = codes[:, inverse], group_of[inverse]
    scattered = not torch.equal(group_of, torch.arange(columns, device=weight.device) // size)
    return GPTQTensor(
        packed_codes=grid.pack_bits(codes, bits),
        scale=solver.scale.t().to(scale_dtype).contiguous(),
        packed_zero_points=None if symmetric else grid.pack_bits(solver.zero_point.t(), bits),
        bits=bits,
        group_size=size,
        shape=(rows, columns),
        g_idx=group_of.to(torch.int32) if scattered else None,
        damping=damping,
    )


def output_error(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T) with E = values - weight: 2/n times the squared error of the outputs on the n inputs that H was made of."""
    error = values.float() - weight.float()
    return ((error @ hessian.float()) * error).sum(dtype=torch.float64).item()


class _Solver:
    """Columns in the order in which they are quantized, and what is known of those that are done.

    codes: uint8 [in, out]. scale, zero_point: float32 [groups, out]. While a stretch of columns is at work, `offset` is where it
    starts; work, float32 [out, stretch], its columns as the errors before them have left them, then as they read back; error
    [out, stretch], what the columns after each answer to; factor [stretch, stretch], how, as in algorithm 1.
    """

    def __init__(self, rows: int, columns: int, rule: Grids, group_size: int, group_of: torch.Tensor, fixed: list | None):
        self.columns, self.rule, self.group_size, self.group_of = columns, rule, group_size, group_of.tolist()
        self.codes = torch.empty(columns, rows, dtype=torch.uint8, device=group_of.device)
        self.scale = torch.empty(len(set(self.group_of)), rows, device=group_of.device)
        self.zero_point = torch.empty_like(self.scale)
        for group, (scale, zero_point) in enumerate(fixed or []):
            self.scale[group], self.zero_point[group] = scale[:, 0], zero_point[:, 0]

    def as_autogptq(self, weight: torch.Tensor, factor: torch.Tensor, sizes: list[int], grids_at: int | None) -> None:
        """All columns are one stretch."""
        self.work = weight.clone(memory_format=torch.contiguous_format)
        self.offset, self.error, self.factor = 0, torch.zeros_like(self.work), factor
        self._run(0, self.columns, sizes, grids_at)

    def by_blocks(self, weight: torch.Tensor, root: torch.Tensor, sizes: list[int], grids_at: int | None) -> None:
        """One block after the other is a stretch. root: R, upper triangular, H = R R^T.

        The loss is |E R|^2. With errors E, weights less values, in the columns before block b, it is least where the block comes
        to W_b + E R_eb R_bb^-1, if the columns after it may move too. R_bb^-1 is also the block's part of algorithm 1's factor.
        """
        # A column is a row in memory: what is done to one column at a time reads and writes neighbors.
        # Columns that are done hold their error against the weight as it came; the others hold that weight.
        errors = weight.t().clone(memory_format=torch.contiguous_format)
        for first in range(0, self.columns, sizes[0]):
            last = min(first + sizes[0], self.columns)
            reach = last if grids_at is None else max([last, *(start + self.group_size for start in self._starts(first, last))])
            inside = torch.linalg.solve_triangular(
                root[first:reach, first:reach], torch.eye(reach - first, device=root.device), upper=True
            )
            above = root[:first, first:reach].t() @ errors[:first]
            self.work = torch.addmm(errors[first:reach], inside.t(), above).t()
            self.offset, self.error, self.factor = first, torch.empty_like(self.work), inside
            self._run(0, last - first, sizes, grids_at)
            errors[first:last] -= self.work.t()[: last - first]

    def _run(self, start: int, stop: int, sizes: list[int], grids_at: int | None) -> None:
        """Quantize columns start to stop of the stretch: in parts of sizes[0], each in parts of sizes[1], at last one by one.

        The columns up to `stop` answer to a part's error as soon as it is done; those after `stop` wait, and the caller sees
        to them. So whoever starts a part finds all columns up to `stop` up to date. The last level is the method; the
        others give the same with matrix products (section 3.3, step 2). grids_at: the size of the parts with which grids are taken.
        """
        size, *finer = sizes
        for first in range(start, stop, size):
            last = min(first + size, stop)
            if size == grids_at:
                self._take_grids(first, last)
            if finer:
                self._run(first, last, finer, grids_at)
            else:
                self._round(first)
            if last < stop:
                self._subtract(self.work[:, last:stop], self.error[:, first:last], self.factor[first:last, last:stop])

    def _round(self, i: int) -> None:
        group = self.group_of[self.offset + i]
        scale, zero_point = self.scale[group], self.zero_point[group]
        column = self.work[:, i]
        codes = self.rule.codes(column, scale, zero_point)
        values = grid.dequantize(codes, scale, zero_point)
        self.codes[self.offset + i] = codes
        self.error[:, i] = (column - values) / self.factor[i, i]
        self.work[:, i] = values

    def _subtract(self, rest: torch.Tensor, error: torch.Tensor, factor: torch.Tensor) -> None:
        if self.rule.autogptq:
            rest -= error @ factor  # the product is rounded before it is subtracted
        else:
            rest.addmm_(error, factor, alpha=-1)

    def _starts(self, first: int, last: int) -> range:
        """Where groups start from column `first` on, before `last`."""
        return range(-(-first // self.group_size) * self.group_size, last, self.group_size)

    def _take_grids(self, first: int, last: int) -> None:
        """Grids for the groups that start in columns first to last of the stretch, from the weights as they are now."""
        for start in self._starts(self.offset + first, self.offset + last):
            group = start // self.group_size
            scale, zero_point = self.rule.fit(self.work[:, start - self.offset :][:, : self.group_size])
            self.scale[group], self.zero_point[group] = scale[:, 0], zero_point[:, 0]


def _sizes(block_size: int, group_size: int | None, autogptq: bool) -> list[int]:
    """The levels of `_Solver._run`. With a group size, one level's parts are groups and no part holds a piece of one."""
    levels = {block_size, 1} if autogptq else {block_size, min(block_size, INNER_BLOCK), 1}
    if group_size:
        levels = {size if size <= group_size else size // group_size * group_size for size in levels} | {group_size}
    return sorted(levels, reverse=True)


def _checked(hessian: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A float32 copy of a Hessian that can be one."""
    columns = weight.shape[1]
    grid.check_matrix(hessian, "hessian", "[in_features, in_features]")
    if hessian.shape != (columns, columns):
        raise ValueError(f"hessian has shape {list(hessian.shape)}, wanted [{columns}, {columns}] for in_features {columns}")
    hessian = hessian.detach().to(weight.device, torch.float32, copy=True)
    largest = hessian.diagonal().max().item()
    gap = max((hessian[i : i + 256, i:] - hessian[i:, i : i + 256].t()).abs_().max().item() for i in range(0, columns, 256))
    if not gap < float("inf"):
        raise grid.not_finite(hessian, "hessian")
    if gap > 1e-3 * abs(largest):  # X^T X summed in float32 is symmetric to some 1e-6 of it
        raise ValueError(f"hessian is not symmetric: entries differ from their mirror image by up to {gap:.3g}")
    if hessian.diagonal().min() < 0:
        raise ValueError(f"hessian has {hessian.diagonal().min().item():.3g} on its diagonal, wanted sums of squares")
    if largest == 0:
        raise ValueError("hessian is zero: the layer never saw an input")
    return hessian


def _factorize(hessian: torch.Tensor, damping: float, form: Callable[[torch.Tensor], torch.Tensor | None]):
    """form(H + damping * mean diagonal), and the damping with which that exists."""
    diagonal = hessian.diagonal()
    before, mean = diagonal.clone(), torch.diag(hessian).mean()  # of a copy, as AutoGPTQ: a strided mean has other last bits
    for _ in range(RAISES + 1):
        diagonal.copy_(before + damping * mean)
        factor = form(hessian)
        if factor is not None:
            return factor, damping
        tried, damping = damping, max(10 * damping, LEAST_RAISED)
    raise ValueError(f"hessian is not positive definite even with damping {tried:g}: it cannot be a sum of x x^T")


def upper_root(hessian: torch.Tensor) -> torch.Tensor | None:
    """Upper triangular R with R R^T = H: factorized from the last column on. None where H has none.

    R^-1 is the factor of algorithm 1, U with U^T U = H^-1, and the blocks on its diagonal are the inverses of R's.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    return None if failed else lower.flip(0, 1)


def autogptq_factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """Upper triangular U with U^T U = H^-1: its row i tells how later columns answer to column i. None where H has none.

    By way of the inverse, as AutoGPTQ and the reference implementation take it.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed else upper


@dataclass(frozen=True)
class Grids:
    """How a group's grid is taken and how weights are rounded to it."""

    bits: int
    symmetric: bool
    mse: bool
    scale_dtype: torch.dtype
    autogptq: bool

    def fit(self, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [out, columns] -> scale, as stored, and zero_point, both float32 [out, 1]."""
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        if not self.mse:
            return self._at(low, high)
        step = max(1, ROW_BYTES // (4 * group.shape[1]))
        parts = [self._search(*some) for some in zip(group.split(step), low.split(step), high.split(step), strict=True)]
        return torch.cat([scale for scale, _ in parts]), torch.cat([zero_point for _, zero_point in parts])

    def codes(self, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        if self.autogptq:
            return (weight / scale).round_().add_(zero_point).clamp_(0, 2**self.bits - 1)
        return grid.quantize(weight, scale, zero_point, self.bits)

    def _at(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.autogptq:
            scale, zero_point = grid.stored_grids(low, high, self.bits, self.symmetric, self.scale_dtype)
            return scale.float(), zero_point
        low, high = autogptq_range(low, high, self.symmetric)
        scale = (high - low) / (2**self.bits - 1)
        return scale, torch.full_like(scale, 2 ** (self.bits - 1)) if self.symmetric else torch.round(-low / scale)

    def _search(self, group: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        least = torch.full_like(low, float("inf"))
        scale, zero_point = self._at(low, high)
        for step in range(int(SHRINK * STEPS)):
            share = 1 - step / STEPS
            some_scale, some_zero = self._at(share * low, share * high)
            values = grid.dequantize(self.codes(group, some_scale, some_zero), some_scale, some_zero)
            error = values.sub_(group).abs_().pow_(NORM).sum(1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero_point = torch.where(better, some_scale, scale), torch.where(better, some_zero, zero_point)
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
