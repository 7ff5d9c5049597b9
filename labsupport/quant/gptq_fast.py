"""GPTQ's codes with less to compute: H is never inverted, and all but a few operations are products of matrices.

Inside a block of columns errors are spread by the inverse of H, as in the paper, but from block to block by a factor of H itself.
`gptq.algorithm_1` is the method as published, and what this is tested against.

Weights are [in_features, out_features] in memory: what is done to a column of the weight then reads and writes neighbors.
"""

from __future__ import annotations

import torch

from labsupport.quant.gptq_grids import Grids
from labsupport.quant.products import add_product

INNER_BLOCK = 32  # columns after which the rest of a block is updated by a matrix product, while they are still in the cache
BLOCK = 256  # rows or columns of a large matrix to take at a time


def solve(columns: torch.Tensor, lower: torch.Tensor, grids: Grids, block_size: int, stale_grids: bool) -> torch.Tensor:
    """Quantize columns in order: float32 [in, out], which is changed, to codes, uint8 [in, out].

    lower: L with L^T L = H, see `reverse_cholesky`. A group's grid is chosen when the group is reached; with stale_grids when the
    block of `block_size` columns is reached in which the group begins.

    With R = L^T the loss is |E R|^2. With errors E, weights less values, in the columns before block b, it is least where the block
    becomes W_b + E R_eb R_bb^-1, if the columns after it may change too. R_bb^-1 is also the block's part of algorithm 1's factor.
    """
    sizes = _sizes(block_size, None if grids.fixed or stale_grids else grids.group_size, stale_grids)
    grids_at = None if grids.fixed else block_size if stale_grids else grids.group_size
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    errors = columns  # columns that are done hold their error against the weight as it came; the others hold that weight
    for first in range(0, len(columns), sizes[0]):
        last = min(first + sizes[0], len(columns))
        reach = last if grids_at is None else max([last, *(start + grids.group_size for start in grids.starts(first, last))])
        block, done = slice(first, reach), slice(first)
        upper = lower[block, block].t()
        inverse = torch.linalg.solve_triangular(upper, torch.eye(reach - first, device=upper.device), upper=True)
        weights = add_product(errors[block], inverse.t() @ lower[block, done], errors[done])
        part = _Block(first, last - first, weights, inverse / inverse.diagonal()[:, None], grids, grids_at)
        part.quantize(0, last - first, sizes)
        codes[first:last] = part.codes_and_values()
        errors[first:last] -= weights[: last - first]
    return codes


def _sizes(block_size: int, group_size: int | None, stale_grids: bool) -> list[int]:
    """The sizes of blocks, and of the parts and parts of parts that `_Block.quantize` cuts them into.

    With a group size, one of the sizes is that, and no part holds a piece of a group.
    """
    sizes = {block_size, min(block_size, INNER_BLOCK)}
    if not stale_grids:  # the grids do not depend on it: as large as is fast
        sizes |= {max(block_size, BLOCK)}
    if group_size:
        sizes = {size if size <= group_size else size // group_size * group_size for size in sizes} | {group_size}
    return sorted(sizes, reverse=True)


class _Block:
    """A block of columns while it is being quantized, and the columns after it that its grids look at. Each is a row in memory.

    first: the first column's place in the weight. count: how many are quantized. weights: float32 [columns, out], as the errors
    before them have left them; at the end the first `count` hold the values that their codes stand for. factor: float32
    [columns, columns], algorithm 1's with each row divided by its entry on the diagonal, so that errors need not be divided.
    grids_at: the size of the parts at whose beginning grids are chosen; None where all are set before.
    """

    def __init__(self, first: int, count: int, weights: torch.Tensor, factor: torch.Tensor, grids: Grids, grids_at: int | None):
        self.first, self.weights, self.factor, self.grids, self.grids_at = first, weights, factor, grids, grids_at
        self.errors, self.steps = torch.empty_like(weights), torch.empty_like(weights[:count])

    def quantize(self, start: int, stop: int, sizes: list[int]) -> None:
        """Quantize columns start to stop: in parts of sizes[0], each in parts of sizes[1], and so on; the last ones one by one.

        A part's errors are subtracted from the columns up to `stop` as soon as it is done; those from `stop` on are left to the
        caller. So all columns up to `stop` are up to date when a part begins. `_one_by_one` is the method; the levels above it
        compute the same with products of matrices (section 3.3, step 2).
        """
        size, *finer = sizes
        for first in range(start, stop, size):
            last = min(first + size, stop)
            if size == self.grids_at:
                self.grids.choose(self.weights[first:].t(), self.first + first, self.first + last)
            if finer:
                self.quantize(first, last, finer)
            else:
                self._one_by_one(first, last)
            if last < stop:  # subtract this part's errors from the columns after it
                self.weights[last:stop].addmm_(self.factor[first:last, last:stop].t(), self.errors[first:last], alpha=-1)

    def _one_by_one(self, first: int, last: int) -> None:
        """From each column subtract the errors before it in its part, round it, and keep its own error."""
        errors, factor = self.errors[first:last].t(), self.factor[first:last, first:last]
        for i in range(last - first):
            column, steps = self.weights[first + i], self.steps[first + i]
            if i:
                column.addmv_(errors[:, :i], factor[:i, i], alpha=-1)
            grid = self.grids.of(self.first + first + i)
            self.grids.rule.steps(column, grid, out=steps)
            torch.addcmul(column, steps, grid.scale, value=-1, out=self.errors[first + i])

    def codes_and_values(self) -> torch.Tensor:
        """The codes of all columns, float32 [count, out]; `weights` then holds the values that they stand for."""
        count = len(self.steps)
        groups = self.grids.group_of[self.first : self.first + count]
        torch.mul(self.steps, self.grids.scale[groups], out=self.weights[:count])
        return self.steps.add_(self.grids.zero_point[groups])


def reverse_cholesky(hessian: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor | None:
    """Lower triangular L with L^T L = H, where H is `hessian` with rows and columns in `order`, and `diagonal`, already so ordered.

    Returns None if that H is not positive definite. Above L's diagonal the memory is left as it is.

    L^-T is the factor of algorithm 1, U with U^T U = H^-1, and the blocks on its diagonal are the inverses of those of L^T.
    No ordered copy of H is made: at 4096 columns, fresh memory costs as much time as the arithmetic. From the last block to the
    first: a block of rows of L^T L = H, less what the blocks after it give, is its part of the diagonal times the rest.
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


def transposed(weight: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
    """The columns of a weight [out, in], in `order` if there is one, each a row in memory: a copy, [in, out]."""
    if order is None:
        return weight.t().clone(memory_format=torch.contiguous_format)
    columns = torch.empty(weight.shape[1], weight.shape[0], device=weight.device)
    for places, into in zip(order.split(BLOCK), columns.split(BLOCK), strict=True):
        into.copy_(weight.gather(1, places.expand(len(weight), -1)).t())
    return columns
