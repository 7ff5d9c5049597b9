"""Round to nearest: every weight goes to the closest level of its group's grid, and nothing else is looked at."""

from __future__ import annotations

import torch

from labsupport.quant import grid
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
    size = grid.check_weight(weight, bits, group_size)
    rows, columns = weight.shape
    scales, zero_points, codes = [], [], []
    step = max(1, BLOCK_BYTES // (4 * columns))
    step = -(-step // 8) * 8  # whole bytes of codes in every block but the last, whatever `bits` and `columns` are
    for block in weight.detach().split(step):
        groups = block.float().reshape(len(block), -1, size)
        # Two passes, and yet many times faster on a CPU than aminmax, which PyTorch does not vectorize.
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise grid.not_finite(weight)
        scale, _ = grid.grids(low, high, bits, symmetric)
        stored = _as_stored(scale, scale_dtype)
        scale = stored.float()
        zero_point = _zero_points(low, scale, bits, symmetric)
        codes.append(grid.pack_bits(grid.quantize(groups, scale, zero_point, bits).to(torch.uint8), bits))
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


def _as_stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    stored = scale.to(dtype)
    if stored.isinf().any():
        raise ValueError(f"a scale of {scale.max().item():.3g} is more than {dtype} holds: pass scale_dtype=torch.float32")
    # A scale too small for the dtype would become 0 and divide by it; its weights are that small too, and become 0.
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def _zero_points(low: torch.Tensor, scale: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    if symmetric:
        return torch.full_like(scale, 2 ** (bits - 1))
    return torch.round(-low.clamp(max=0) / scale).clamp_(0, 2**bits - 1)
