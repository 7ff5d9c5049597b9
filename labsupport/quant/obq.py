"""Optimal Brain Quantization: one weight at a time, with an inverse that shrinks. It is what GPTQ was derived from.

Frantar and Alistarh 2022, "Optimal Brain Compression", arXiv:2208.11580, section 5 and algorithm 3. Plain and slow, in float64:
O(in_features^3) for each row where the order is greedy. In column order all rows share one inverse, and the codes are those of
GPTQ with static groups: row i of GPTQ's factor is the first row of the inverse that is left when i columns are gone, over the
square root of its first entry (GPTQ, step 3).
"""

from __future__ import annotations

import sys

import torch

from labsupport.quant import checks, grid
from labsupport.quant.grid import UniformTensor


@torch.no_grad()
def quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    greedy: bool = False,
    damping: float = 0.01,
    scale_dtype: torch.dtype = torch.float16,
) -> UniformTensor:
    """Quantize each row one weight at a time; after each, change the weights that are left so that they best make up for it.

    weight: float [out_features, in_features]. hessian: float [in_features, in_features], positive definite once `damping` times its
    mean diagonal is added. Neither is changed. greedy: in every row that weight first whose rounding costs least,
    (w - q)^2 / [H^-1]_pp; otherwise columns in order. Grids are chosen from the weight as it came. For layers small enough to
    watch; use gptq for others. Raises ValueError and TypeError as gptq does.
    """
    bits, size = checks.weight_and_grid(weight, bits, group_size)
    damping = checks.number(damping, "damping", 0, sys.float_info.max, "a share of the mean diagonal, 0 or more")
    symmetric, scale_dtype = checks.flag(symmetric, "symmetric"), checks.float_dtype(scale_dtype, "scale_dtype")
    rows, columns = weight.shape
    checks.finite(weight, "weight")
    checks.gram(hessian, "hessian", columns)

    groups = weight.detach().float().reshape(rows, -1, size)
    stored, zero_points = grid.stored_grids(groups.amin(2), groups.amax(2), bits, symmetric, scale_dtype)
    scale = stored.double().repeat_interleave(size, 1)  # of each weight, [out, in]
    zero_point = zero_points.double().repeat_interleave(size, 1)

    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(columns, device=weight.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ValueError(f"hessian is not positive definite with damping {damping}")
    inverse = torch.cholesky_inverse(factor).repeat(rows, 1, 1)  # [out, in, in]: in another order, another inverse is left

    work, codes = weight.double(), torch.zeros(rows, columns, dtype=torch.uint8, device=weight.device)
    each, left = torch.arange(rows), torch.ones(rows, columns, dtype=torch.bool, device=weight.device)
    for step in range(columns):
        rounded = grid.quantize(work, scale, zero_point, bits)
        error = work - grid.dequantize(rounded, scale, zero_point)
        cost = error**2 / inverse.diagonal(dim1=1, dim2=2)
        chosen = cost.masked_fill(~left, float("inf")).argmin(1) if greedy else torch.full((rows,), step)
        codes[each, chosen] = rounded[each, chosen].to(torch.uint8)
        left[each, chosen] = False

        row = inverse[each, chosen]  # [out, in], the chosen row of each inverse, with
        pivot = row[each, chosen][:, None]  # [H^-1]_pp
        work -= error[each, chosen][:, None] / pivot * row  # what best makes up for the error
        inverse -= row[:, :, None] * row[:, None, :] / pivot[..., None]  # the inverse of H without row and column p (lemma 1)
        inverse[each, chosen, chosen] = 1  # it is 0 now, and costs are divided by it
    return UniformTensor(
        packed_codes=grid.pack_bits(codes, bits),
        scale=stored,
        packed_zero_points=None if symmetric else grid.pack_bits(zero_points.to(torch.uint8), bits),
        bits=bits,
        group_size=size,
        shape=(rows, columns),
    )
