"""GPTQ: round one column at a time, and let the columns that are still to come make up for the error.

Frantar et al. 2022, "GPTQ", arXiv:2210.17323, section 3.3 and algorithm 1. The loss is tr(E H E^T), E the error of the weight and
H = 2/n X^T X the Hessian of each row, X the layer's inputs: the squared error of the outputs.

With `autogptq` everything is computed as AutoGPTQ 0.7.1 does and in its order, so that codes, scales and zero-points are its own to
the last bit. Without, it is the same method with less to compute: inside a block of columns errors are spread by the inverse of H,
as in the paper, but from block to block by a factor of H itself, so that H is never inverted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from labsupport.quant import grid
from labsupport.quant.grid import UniformTensor
from labsupport.quant.products import add_product

INNER_BLOCK = 32  # columns after which the rest of a block is updated by a matrix product, while they are still in the cache
# The search of the reference implementation: least sum of |error|**2.4 over ranges shrunk by 0, 1, ..., 79 %.
NORM, STEPS, SHRINK = 2.4, 100, 0.8
# Damping where the factorization fails: ten times more, from at least a thousandth on, so often before it is an error.
RAISES, LEAST_RAISED = 3, 1e-3
BLOCK = 256  # rows or columns of a large matrix to take at a time
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
    if dead.any():
        work = work.masked_fill(dead, 0)
    starts = range(0, columns, size)
    fixed = None
    if group_size is None:
        fixed = [whole or rule.fit(work)]
    elif static_groups:
        fixed = [rule.fit(work[:, start : start + size]) for start in starts]

    group_of = torch.arange(columns, device=weight.device) // size
    diagonal = hessian.diagonal().masked_fill(dead, 1)
    order = torch.argsort(diagonal, descending=True) if act_order else None
    if fixed and act_order:
        group_of = group_of[order]
    factor, damping = _factorize(hessian, diagonal, order, damping, autogptq)
    work = _columns(work, order)
    solver = _Solver(rows, columns, rule, size, group_of, fixed)
    sizes = _sizes(block_size, None if fixed or stale_grids else size, autogptq, stale_grids)
    grids_at = None if fixed else block_size if stale_grids else size
    (solver.as_autogptq if autogptq else solver.by_blocks)(work, factor, sizes, grids_at)

    codes = solver.codes
    if order is not None:
        inverse = torch.argsort(order)
        codes, group_of = codes[inverse], group_of[inverse]
    scattered = not torch.equal(group_of, torch.arange(columns, device=weight.device) // size)
    return GPTQTensor(
        packed_codes=grid.pack_bits(codes.t(), bits),
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
    starts; work, float32 [stretch, out], its columns, each a row, as the errors before them have left them, and at its end as
    they read back; steps [stretch, out], their codes less zero_point; error [stretch, out], what the columns after each answer to;
    factor [stretch, stretch], how: algorithm 1's, its rows divided by their entries on the diagonal; where all is to be as AutoGPTQ
    has it, errors are divided instead.
    """

    def __init__(self, rows: int, columns: int, rule: Grids, group_size: int, group_of: torch.Tensor, fixed: list | None):
        self.columns, self.rule, self.group_size, self.group_of = columns, rule, group_size, group_of
        self.groups = group_of.tolist()
        self.codes = torch.empty(columns, rows, dtype=torch.uint8, device=group_of.device)
        self.scale = torch.empty(len(set(self.groups)), rows, device=group_of.device)
        self.zero_point = torch.empty_like(self.scale)
        self.grids: dict[int, tuple[torch.Tensor, ...]] = {}
        for group, (scale, zero_point) in enumerate(fixed or []):
            self._keep(group, scale, zero_point)

    def as_autogptq(self, weight: torch.Tensor, factor: torch.Tensor, sizes: list[int], grids_at: int | None) -> None:
        """All columns are one stretch."""
        self._stretch(0, self.columns, weight.clone(), factor, sizes, grids_at)

    def by_blocks(self, weight: torch.Tensor, root: torch.Tensor, sizes: list[int], grids_at: int | None) -> None:
        """One block after the other is a stretch. root: see `reverse_cholesky`; here R = root^T, so that H = R R^T.

        The loss is |E R|^2. With errors E, weights less values, in the columns before block b, it is least where the block comes
        to W_b + E R_eb R_bb^-1, if the columns after it may move too. R_bb^-1 is also the block's part of algorithm 1's factor.
        """
        errors = weight  # columns that are done hold their error against the weight as it came; the others hold that weight
        for first in range(0, self.columns, sizes[0]):
            last = min(first + sizes[0], self.columns)
            reach = last if grids_at is None else max([last, *(start + self.group_size for start in self._starts(first, last))])
            here, done = slice(first, reach), slice(first)
            inside = torch.linalg.solve_triangular(root[here, here].t(), torch.eye(reach - first, device=root.device), upper=True)
            work = add_product(errors[here], inside.t() @ root[here, done], errors[done])
            self._stretch(first, last, work, inside / inside.diagonal()[:, None], sizes, grids_at)
            errors[first:last] -= work[: last - first]

    def _stretch(
        self, first: int, last: int, columns: torch.Tensor, factor: torch.Tensor, sizes: list[int], grids_at: int | None
    ) -> None:
        """Quantize columns first to last. columns: float32 [stretch, out], those and what a grid looks at; they become values."""
        self.offset, self.factor, self.diagonal = first, factor, factor.diagonal().tolist()
        self.work, self.error, self.steps = columns, torch.empty_like(columns), torch.empty_like(columns[: last - first])
        self._run(0, last - first, sizes, grids_at)
        groups, steps = self.group_of[first:last], self.steps
        torch.mul(steps, self.scale[groups], out=columns[: last - first])
        self.codes[first:last] = steps.add_(self.zero_point[groups])

    def _run(self, start: int, stop: int, sizes: list[int], grids_at: int | None) -> None:
        """Quantize columns start to stop of the stretch: in parts of sizes[0], each in parts of sizes[1], the last one by one.

        The columns up to `stop` answer to a part's error as soon as it is done; those after `stop` wait, and the caller sees
        to them. So whoever starts a part finds all columns up to `stop` up to date. `_round` is the method; the levels above
        it give the same with matrix products (section 3.3, step 2). grids_at: the size of the parts with which grids are taken.
        """
        size, *finer = sizes
        for first in range(start, stop, size):
            last = min(first + size, stop)
            if size == grids_at:
                self._take_grids(first, last)
            if finer:
                self._run(first, last, finer, grids_at)
            else:
                self._round(first, last)
            if last < stop:
                self._subtract(first, last, stop)

    def _round(self, first: int, last: int) -> None:
        """One by one: a column answers to the errors before it in its part, is rounded, and leaves its own error."""
        errors, factor = self.error[first:last].t(), self.factor[first:last, first:last]
        for i, group in enumerate(self.groups[self.offset + first : self.offset + last]):
            column, steps = self.work[first + i], self.steps[first + i]
            if i:
                column.addmv_(errors[:, :i], factor[:i, i], alpha=-1)
            scale, *grid_of_group = self.grids[group]
            self.rule.steps(column, scale, *grid_of_group, out=steps)
            if self.rule.autogptq:
                error = torch.sub(column, steps * scale, out=self.error[first + i])  # the value is rounded before it is subtracted
                error.div_(self.diagonal[first + i])
            else:
                torch.addcmul(column, steps, scale, value=-1, out=self.error[first + i])

    def _subtract(self, first: int, last: int, stop: int) -> None:
        """Columns last to stop answer to the errors of columns first to last."""
        rest, error, factor = self.work[last:stop], self.error[first:last], self.factor[first:last, last:stop]
        if self.rule.autogptq:
            rest.t().sub_(error.t() @ factor)  # the product is rounded before it is subtracted
        else:
            rest.addmm_(factor.t(), error, alpha=-1)

    def _starts(self, first: int, last: int) -> range:
        """Where groups start from column `first` on, before `last`."""
        return range(-(-first // self.group_size) * self.group_size, last, self.group_size)

    def _take_grids(self, first: int, last: int) -> None:
        """Grids for the groups that start in columns first to last of the stretch, from the weights as they are now."""
        for start in self._starts(self.offset + first, self.offset + last):
            group = start // self.group_size
            self._keep(group, *self.rule.fit(self.work[start - self.offset :][: self.group_size].t()))

    def _keep(self, group: int, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Both [out, 1]."""
        self.scale[group], self.zero_point[group] = scale[:, 0], zero_point[:, 0]
        self.grids[group] = self.rule.prepared(self.scale[group], self.zero_point[group])


def _sizes(block_size: int, group_size: int | None, autogptq: bool, stale_grids: bool) -> list[int]:
    """The levels of `_Solver._run`. With a group size, one level's parts are groups and no part holds a piece of one."""
    levels = {block_size, 1 if autogptq else min(block_size, INNER_BLOCK)}
    if not stale_grids:  # the grids do not depend on it: as large as is fast
        levels |= {max(block_size, BLOCK)}
    if group_size:
        levels = {size if size <= group_size else size // group_size * group_size for size in levels} | {group_size}
    return sorted(levels, reverse=True)


def _checked(hessian: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A Hessian that can be one, float32."""
    columns = weight.shape[1]
    grid.check_matrix(hessian, "hessian", "[in_features, in_features]")
    if hessian.shape != (columns, columns):
        raise ValueError(f"hessian has shape {list(hessian.shape)}, wanted [{columns}, {columns}] for in_features {columns}")
    hessian = hessian.detach().to(weight.device, torch.float32)
    largest = hessian.diagonal().max().item()
    tiles = [slice(start, start + BLOCK) for start in range(0, columns, BLOCK)]
    gap = max((hessian[i, j] - hessian[j, i].t()).abs_().max().item() for i in tiles for j in tiles if i.start <= j.start)
    if not gap < float("inf"):
        raise grid.not_finite(hessian, "hessian")
    if gap > 1e-3 * abs(largest):  # X^T X summed in float32 is symmetric to some 1e-6 of it
        raise ValueError(f"hessian is not symmetric: entries differ from their mirror image by up to {gap:.3g}")
    if hessian.diagonal().min() < 0:
        raise ValueError(f"hessian has {hessian.diagonal().min().item():.3g} on its diagonal, wanted sums of squares")
    if largest == 0:
        raise ValueError("hessian is zero: the layer never saw an input")
    return hessian


def _columns(weight: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """The columns of a weight in that order, each a row in memory: what is done to one reads and writes neighbors. [in, out]."""
    if order is None:
        return weight.t().clone(memory_format=torch.contiguous_format)
    columns = torch.empty(weight.shape[1], weight.shape[0], device=weight.device)
    for some, into in zip(order.split(BLOCK), columns.split(BLOCK), strict=True):
        into.copy_(weight.gather(1, some.expand(len(weight), -1)).t())
    return columns


def _factorize(
    hessian: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor | None, damping: float, autogptq: bool
) -> tuple[torch.Tensor, float]:
    """What the solver wants of H with `diagonal`, damped, its columns in that order; and the damping with which that exists."""
    diagonal = diagonal if order is None else diagonal[order]
    for _ in range(RAISES + 1):
        with_damping = damped(diagonal, damping)
        if autogptq:
            ordered = hessian if order is None else hessian[order][:, order]
            factor = autogptq_factor(ordered.diagonal_scatter(with_damping))
        else:
            factor = reverse_cholesky(hessian, with_damping, order)
        if factor is not None:
            return factor, damping
        tried, damping = damping, max(10 * damping, LEAST_RAISED)
    raise ValueError(f"hessian is not positive definite even with damping {tried:g}: it cannot be a sum of x x^T")


def damped(diagonal: torch.Tensor, damping: float) -> torch.Tensor:
    """H's diagonal, float32 [in], with this share of its mean added to each entry."""
    return diagonal + damping * diagonal.mean()


def reverse_cholesky(hessian: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor | None:
    """Lower triangular L with L^T L = H, for H with its columns and rows in `order` and this diagonal, already so. None: has none.

    L^-T is the factor of algorithm 1, U with U^T U = H^-1, and the blocks on its diagonal are the inverses of L^T's.
    What is above the diagonal is left as it is in memory, and no ordered copy of H is made: at 4096 columns, fresh memory costs
    as much time as the arithmetic. From the last block to the first: a block of rows of L^T L = H, less what the blocks after it
    give, is its part of the diagonal times the rest.
    """
    lower = torch.empty_like(hessian)
    columns = len(hessian)
    for first in reversed(range(0, columns, BLOCK)):
        last = min(first + BLOCK, columns)
        if order is None:
            rows = hessian[first:last, :last].clone()
        else:
            rows = hessian[order[first:last]].gather(1, order[:last].expand(last - first, last))
        rows.diagonal(first).copy_(diagonal[first:last])
        rows.addmm_(lower[last:, first:last].t(), lower[last:, :last], alpha=-1)
        backwards, failed = torch.linalg.cholesky_ex(rows[:, first:].flip(0, 1))
        if failed:
            return None
        upper = backwards.flip(0, 1)
        lower[first:last, first:last] = upper.t()
        # Transposed, so that the columns of the system are neighbors in memory, as LAPACK wants them.
        lower[first:last, :first] = torch.linalg.solve_triangular(upper.t(), rows[:, :first].t(), upper=False, left=False).t()
    return lower


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

    def prepared(self, scale: torch.Tensor, zero_point: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `steps` wants: the scale, its inverse, and the least and the largest step."""
        return scale, 1 / scale, -zero_point, 2**self.bits - 1 - zero_point

    def steps(
        self, weight: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor, low: torch.Tensor, high: torch.Tensor, out=None
    ) -> torch.Tensor:
        """Codes less zero_point, as `grid.quantize` gives them: to do without the zero_point is one pass less."""
        scaled = torch.div(weight, scale, out=out) if self.autogptq else torch.mul(weight, inverse, out=out)
        return torch.clamp(scaled.round_(), low, high, out=scaled)

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
            values = self.steps(group, *self.prepared(some_scale, some_zero)).mul_(some_scale)
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
