"""GPTQ: round one column at a time, and let the columns that come after it make up for the error.

Frantar et al. 2022, "GPTQ", arXiv:2210.17323, section 3.3. `algorithm_1` below is the paper's, in its names; `quantize`
prepares what it takes, and runs it or `gptq_fast`, which computes the same with less work. The loss is tr(E H E^T), where E is
the error of the weight and H = 2/n X^T X, X the layer's n inputs: 2/n times the squared error of the outputs. (The Hessian of
that loss is 2 H. A factor on H changes no code.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from labsupport.quant import checks, gptq_fast, grid
from labsupport.quant.gptq_grids import GridRule, Grids
from labsupport.quant.grid import UniformTensor

# Damping where the factorization fails: ten times more, from at least a thousandth on, this many times before it is an error.
RAISES, LEAST_RAISED = 3, 1e-3


@torch.no_grad()
def algorithm_1(W: torch.Tensor, Hinv: torch.Tensor, grids: Grids, B: int = 128) -> torch.Tensor:
    """Algorithm 1 of the paper: quantize W [d_row, d_col] column by column, and return its codes, uint8 [d_row, d_col].

    W: float; it is changed. Hinv: upper triangular [d_col, d_col], the Cholesky factor of H^-1 (see `autogptq_factor`); its row
    j says how the columns after j make up for the error in column j. B: the block size. The grid of a group is chosen when the
    block in which the group begins is reached. So where a block is a group, it is chosen from weights that are up to date; where
    blocks are longer, as in the authors' code, from what the weights were when the block began.
    """
    d_col = W.shape[1]
    codes = torch.zeros_like(W, dtype=torch.uint8)
    E = torch.zeros_like(W[:, :B])  # the errors of a block
    for i in range(0, d_col, B):
        end = min(i + B, d_col)
        grids.choose(W[:, i:], i, end)
        for j in range(i, end):
            codes[:, j], q = grids.quantize(W[:, j], j)  # round to the grid; q is what the codes stand for
            E[:, j - i] = (W[:, j] - q) / Hinv[j, j]
            W[:, j:end] -= torch.outer(Hinv[j, j:end], E[:, j - i]).T  # the rest of the block makes up for it
        W[:, end:] -= E[:, : end - i] @ Hinv[i:end, end:]  # all columns after the block make up for its errors
    return codes


def autogptq_factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """Upper triangular U with U^T U = H^-1, of which algorithm 1 reads a row for each column. None if H is not positive definite.

    By way of the inverse, as the paper, AutoGPTQ and the authors' code compute it.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed else upper


def damped(diagonal: torch.Tensor, damping: float) -> torch.Tensor:
    """H's diagonal, float32 [in], with this share of its mean added to each entry."""
    return diagonal + damping * diagonal.mean()


def output_error(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T) with E = values - weight: 2/n times the squared error of the outputs on the n inputs that H was made of."""
    error = values.float() - weight.float()
    return ((error @ hessian.float()) * error).sum(dtype=torch.float64).item()


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
    act_order: columns with the largest diagonal of H first. static_groups: every grid is chosen from the weight as it came,
    and groups stay neighbors under act_order. Otherwise a grid is chosen when its group is reached, from the weights
    as the errors before them have left them; with stale_grids from what they were when the block of `block_size` columns began,
    as the authors' code does. mse: grids of least |error|**2.4, by search, and not those that reach the extremes.
    damping: this share of H's mean diagonal is added to the diagonal; tenfold, three times at most, where H cannot be factorized
    with it (see GPTQTensor.damping). A column that never saw an input, with a zero on the diagonal, becomes 0.

    autogptq: the codes, scales and zero-points of AutoGPTQ 0.7.1 to the last bit, by algorithm 1 as it stands, which is slower:
    stale grids, float32 scales and blocks of 128, whatever is asked; a division where others multiply by the inverse; and its
    rule for symmetric grids (see `gptq_grids.autogptq_range`).

    Raises ValueError for NaN, infinity, a shape or group size that does not fit, bits outside 2-8, a Hessian that is zero,
    not symmetric or not positive definite; TypeError for a dtype that is not floating point.
    """
    bits, size = checks.weight_and_grid(weight, bits, group_size)
    if not weight.sum().isfinite():  # a finite sum has finite terms, and is quicker to know
        checks.finite(weight, "weight")
    block_size = checks.whole(block_size, "block_size", wanted="a positive whole number")
    damping = checks.number(damping, "damping", 0, sys.float_info.max, "a share of the mean diagonal, 0 or more")
    symmetric, scale_dtype = checks.flag(symmetric, "symmetric"), checks.float_dtype(scale_dtype, "scale_dtype")
    H = _checked_hessian(hessian, weight)
    if autogptq:
        stale_grids, scale_dtype, block_size = True, torch.float32, 128
    rule = GridRule(bits, symmetric, mse, scale_dtype, autogptq)
    rows, columns = weight.shape
    group_of = torch.arange(columns, device=weight.device) // size  # of each column

    W, never_fed = weight.detach().float(), H.diagonal() == 0
    given = W
    if never_fed.any():
        W = W.masked_fill(never_fed, 0)
    groups = W.reshape(rows, -1, size)
    grid.stored_grids(groups.amin(2), groups.amax(2), bits, symmetric, scale_dtype)  # raises where one cannot be stored
    diagonal = H.diagonal().masked_fill(never_fed, 1)
    order = torch.argsort(diagonal, descending=True) if act_order else None
    if order is not None:
        diagonal = diagonal[order]
        group_of = group_of[order] if static_groups else group_of

    grids = Grids(rule, size, group_of, rows)
    if group_size is None:
        grids.set([rule.fit(given if autogptq else W)])  # AutoGPTQ looks at columns that were never fed as well
    elif static_groups:
        grids.set([rule.fit(group) for group in W.split(size, dim=1)])

    by_column = gptq_fast.transposed(W, order)  # [in, out]
    if autogptq:
        ordered = H if order is None else H[order][:, order]
        Hinv, damping = _raising_damping(diagonal, damping, lambda d: autogptq_factor(ordered.diagonal_scatter(d)))
        codes = algorithm_1(by_column.t(), Hinv, grids, block_size).t()
    else:
        lower, damping = _raising_damping(diagonal, damping, partial(gptq_fast.reverse_cholesky, H, order=order))
        codes = gptq_fast.solve(by_column, lower, grids, block_size, stale_grids)

    if order is not None:
        place = torch.argsort(order)
        codes, group_of = codes[place], group_of[place]
    scattered = not torch.equal(group_of, torch.arange(columns, device=weight.device) // size)
    return GPTQTensor(
        packed_codes=grid.pack_bits(codes.t(), bits),
        scale=grids.scale.t().to(scale_dtype).contiguous(),
        packed_zero_points=None if symmetric else grid.pack_bits(grids.zero_point.t(), bits),
        bits=bits,
        group_size=size,
        shape=(rows, columns),
        g_idx=group_of.to(torch.int32) if scattered else None,
        damping=damping,
    )


def _raising_damping(
    diagonal: torch.Tensor, damping: float, factorize: Callable[[torch.Tensor], torch.Tensor | None]
) -> tuple[torch.Tensor, float]:
    """A factor of H by `factorize`, which is handed H's diagonal with the damping added; and the damping with which it exists."""
    for _ in range(RAISES + 1):
        factor = factorize(damped(diagonal, damping))
        if factor is not None:
            return factor, damping
        tried, damping = damping, max(10 * damping, LEAST_RAISED)
    raise ValueError(f"hessian is not positive definite even with damping {tried:g}: it cannot be a sum of x x^T")


def _checked_hessian(hessian: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The Hessian in float32, on the weight's device."""
    columns = weight.shape[1]
    hessian = checks.square(hessian, "hessian", columns).detach().to(weight.device, torch.float32)
    return checks.gram(hessian, "hessian", columns)
