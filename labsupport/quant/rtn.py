"""Round to nearest: every weight goes to the closest level of its group's grid, and nothing else is looked at."""

from __future__ import annotations

import torch

from labsupport.quant import checks, grid
from labsupport.quant.grid import UniformTensor

# Rows are taken a block at a time, small enough that a block stays in a CPU's last-level cache between the steps.
BLOCK_BYTES = 2**21


def quantize(
    weight: torch.Tensor,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> UniformTensor:
    """Round a weight to the nearest level of a grid for each group.

    weight: float [out_features, in_features], finite; it is not changed. group_size: a divisor of in_features, or None for a grid
    for each whole row. The scale is rounded to `scale_dtype` before the codes are chosen, so that they belong to the grid
    that is stored. With scale_dtype float32 the values equal torch.fake_quantize_per_channel_affine exactly.

    Raises ValueError for NaN, infinity, a shape or group size that does not fit, bits outside 2-8, or a scale
    that `scale_dtype` cannot hold; TypeError for a dtype that is not floating point.
    """
    bits, size = checks.weight_and_grid(weight, bits, group_size)
    symmetric, scale_dtype = checks.flag(symmetric, "symmetric"), checks.float_dtype(scale_dtype, "scale_dtype")
    rows, columns = weight.shape
    scales, zero_points, codes = [], [], []
    step = max(1, BLOCK_BYTES // (4 * columns))
    step = -(-step // 8) * 8  # whole bytes of codes in every block but the last, whatever `bits` and `columns` are
    for block in weight.detach().split(step):
        groups = block.float().reshape(len(block), -1, size)
        # Two passes, and yet many times faster on a CPU than aminmax, which PyTorch does not vectorize.
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise checks.not_finite(weight)
        stored, zero_point = grid.stored_grids(low, high, bits, symmetric, scale_dtype)
        codes.append(grid.pack_bits(grid.quantize(groups, stored.float(), zero_point, bits).to(torch.uint8), bits))
        scales.append(stored.flatten(1))
        zero_points.append(zero_point.flatten(1))
    return UniformTensor(
        packed_codes=torch.cat(codes),
        scale=torch.cat(scales),
        packed_zero_points=None if symmetric else grid.pack_bits(torch.cat(zero_points).to(torch.uint8), bits),
        bits=bits,
        group_size=size,
        shape=(rows, columns),
    )
