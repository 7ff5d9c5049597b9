"""A weight that has changed, rounded to the grid on which an older one is stored: its scales and zero-points are used again."""

from __future__ import annotations

import torch
from torch import Tensor

from labsupport.quant import checks, grid
from labsupport.quant.grid import QuantizedTensor, UniformTensor
from labsupport.quant.nf4 import BlockTensor


def values(weight: Tensor, stored: QuantizedTensor) -> Tensor:
    """Each weight at the nearest level of the grid of `stored`, whose scales stay as they are. float32 [out_features, in_features].

    weight: float [out_features, in_features]; what lies beyond the ends of the grid is clipped.
    Raises ValueError for another shape than that of `stored`, NaN or infinity; TypeError for a tensor on no grid of its own.
    """
    checks.finite(checks.matrix(weight), "weight")
    if tuple(weight.shape) != tuple(stored.shape):
        raise ValueError(f"weight has shape {list(weight.shape)}, and what is stored has {list(stored.shape)}")
    weight = weight.detach().float()
    if type(stored) is UniformTensor:
        groups = weight.unflatten(1, (-1, stored.group_size))
        scale, zero_point = stored.scale.float()[..., None], stored.zero_point[..., None]
        return grid.dequantize(grid.quantize(groups, scale, zero_point, stored.bits), scale, zero_point).flatten(1)
    if isinstance(stored, BlockTensor):
        levels = torch.tensor(sorted(stored.levels), device=weight.device)
        largest = stored.block_absmax.repeat_interleave(stored.block_size)[: weight.numel()].view_as(weight)
        share = weight / torch.where(largest == 0, torch.ones_like(largest), largest)
        return levels[torch.bucketize(share, (levels[:-1] + levels[1:]) / 2)] * largest
    raise TypeError(f"stored is a {type(stored).__name__}, wanted a UniformTensor or a BlockTensor")
