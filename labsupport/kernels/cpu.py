"""PyTorch's own int4 product for CPUs: a weight in the layout of its kernel.

`torch.ops.aten._weight_int4pack_mm_for_cpu` (PyTorch 2.6 and later; aten/src/ATen/native/cpu/int4mm_kernel.cpp) computes with
(code - 8) * scale + zero, scale and zero both in the dtype of the activations. It wants out_features in multiples of 16 and groups
of 32, 64, 128 or 256. The order of the packed bytes depends on the processor's instructions, so they are never to be stored or
compared. It is fast in bfloat16 on processors with AVX-512 or AVX2; in other dtypes it is correct and very slow.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

GROUPS = (256, 128, 64, 32)
MULTIPLE = 16


def available() -> bool:
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    return all(hasattr(torch.ops.aten, name) for name in names)


def group_for(group_size: int) -> int | None:
    """The largest of the kernel's group sizes that divides `group_size`; None if none does."""
    return next((group for group in GROUPS if group_size % group == 0), None)


def scales_and_zeros(scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """scale and zero_point [out, groups] in the form that the kernel reads, `dtype` [groups, out, 2].

    (code - 8) * scale + zero is (code - zero_point) * scale where zero = (8 - zero_point) * scale. The scale is rounded to `dtype`
    first, and zero is computed from the rounded scale.
    """
    rounded = scale.to(dtype)
    zero = ((8 - zero_point.float()) * rounded.float()).to(dtype)
    return torch.stack((rounded, zero), dim=-1).transpose(0, 1).contiguous()


def pack(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, group_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """codes uint8 [out, in], scale and zero_point [out, groups] -> packed codes, scales and zeros, the kernel's group size.

    Rows are added until out_features is a multiple of 16; a longer group repeats its scale. Raises ValueError for groups that
    are not a multiple of 32.
    """
    group = group_for(group_size)
    if group is None:
        raise ValueError(f"group_size is {group_size}, and PyTorch's int4 product for CPUs wants a multiple of 32")
    more = -len(codes) % MULTIPLE
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(pad(codes.to(torch.int32), (0, 0, 0, more)), 1)
    grids = scales_and_zeros(pad(scale, (0, 0, 0, more)), pad(zero_point, (0, 0, 0, more)), dtype)
    return packed, grids.repeat_interleave(group_size // group, 0).contiguous(), group


def multiply(x: torch.Tensor, packed: torch.Tensor, grids: torch.Tensor, group: int, rows: int) -> torch.Tensor:
    """x [batch, in] in the dtype of grids -> [batch, rows] in that dtype."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group, grids)[:, :rows]
