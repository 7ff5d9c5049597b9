"""The product with 4-bit weights in plain PyTorch, tile by tile: what the Triton kernels compute, in the same order."""

from __future__ import annotations

import torch


def multiply(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, rows: int = 256) -> torch.Tensor:
    """x [batch, in] times packed uint8 [out, in / 2], scale and zero_point [out, groups] -> float32 [batch, out].

    A byte holds two codes, the first in its low nibble. `rows` rows of the weight are unpacked at a time, and not kept. As in the
    kernels, whole numbers are multiplied, and a group's sum is scaled once.
    """
    groups = scale.shape[1]
    activations = x.float().view(len(x), groups, -1).transpose(0, 1)  # [groups, batch, size]
    parts = []
    for codes, step, zero in zip(packed.split(rows), scale.split(rows), zero_point.split(rows), strict=True):
        nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).view(len(codes), groups, -1)
        whole = nibbles.float() - zero.float()[:, :, None]  # [rows, groups, size]
        sums = activations @ whole.permute(1, 2, 0)  # [groups, batch, rows]
        parts.append((sums * step.float().t()[:, None, :]).sum(0))
    return torch.cat(parts, dim=1)
