"""Quantization-aware training: the forward pass rounds, the backward pass acts as if it had not, and a float weight learns.

Rounding has a derivative of 0 almost everywhere, so nothing would be learned through it. The straight-through estimator (Bengio,
Leonard and Courville 2013, arXiv:1308.3432) puts 1 in its place, and 0 where a value is clipped. `soft_round` is the contrast: a
smooth function with a derivative of its own, which is not on the grid.

Every function here gives values that a QuantizedTensor holds exactly: `uniform` and `ternary_tensor` make it, so that what was
trained is what is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labsupport.quant import checks, grid, rtn
from labsupport.quant.grid import QuantizedTensor, UniformTensor


class _Round(torch.autograd.Function):
    """round(x), half to even, with the derivative of x. Not x + (round(x) - x).detach(): float32 does not give round(x) back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def round_through(x: Tensor) -> Tensor:
    """x rounded to whole numbers, half to even; the derivative is that of x (the straight-through estimator)."""
    return _Round.apply(x)


def soft_round(x: Tensor, sharpness: float = 8.0) -> Tensor:
    """A smooth staircase through the whole numbers and the middles between them: x for sharpness near 0, round(x) for a large one.

    floor(x) + 1/2 + tanh(sharpness (x - floor(x) - 1/2)) / (2 tanh(sharpness / 2)), as in Agustsson and Theis 2020
    (arXiv:2006.09952, section 4). Raises ValueError for a sharpness that is not above 0.
    """
    sharpness = checks.number(sharpness, "sharpness", 1e-3, 1e3, "a number from 0.001 to 1000")
    whole = x.detach().floor()
    return whole + 0.5 + torch.tanh(sharpness * (x - whole - 0.5)) / (2 * math.tanh(sharpness / 2))


def fake_quantize(
    weight: Tensor, bits: int = 4, group_size: int | None = 32, symmetric: bool = True, scale_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight as `rtn.quantize` stores it and reads it back; its gradient arrives where nothing is clipped.

    weight: float [out_features, in_features] -> float32 in that shape. scale_dtype: the scale is rounded to it, as it is stored.
    The scale follows the weight and gets no gradient. On a symmetric grid of 4 bits it is absmax / 7.5: a positive absmax is
    code 8 on a grid that ends at 7, so it may be clipped and then gets no gradient. With a scale in float32 this is the rule of
    torchao 0.18's IntxFakeQuantizer. Raises what `rtn.quantize` raises.
    """
    groups, scale, zero_point = _groups_and_grid(weight, bits, group_size, symmetric, scale_dtype)
    codes = (round_through(groups * (1 / scale)) + zero_point).clamp(0, 2**bits - 1)
    return ((codes - zero_point) * scale).flatten(1)


def soft_quantize(
    weight: Tensor,
    bits: int = 4,
    group_size: int | None = 32,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    sharpness: float = 8.0,
) -> Tensor:
    """`fake_quantize` with `soft_round` in the place of rounding: its values are beside the grid, its gradient is its own."""
    groups, scale, zero_point = _groups_and_grid(weight, bits, group_size, symmetric, scale_dtype)
    codes = (soft_round(groups * (1 / scale), sharpness) + zero_point).clamp(0, 2**bits - 1)
    return ((codes - zero_point) * scale).flatten(1)


def _groups_and_grid(
    weight: Tensor, bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight in groups, [out, groups, size], and their grid without a gradient, [out, groups, 1], all float32."""
    bits, size = checks.weight_and_grid(weight, bits, group_size)
    groups = weight.float().unflatten(1, (-1, size))
    low, high = groups.detach().amin(2, keepdim=True), groups.detach().amax(2, keepdim=True)
    if not (low.isfinite().all() and high.isfinite().all()):
        raise checks.not_finite(weight)
    symmetric, scale_dtype = checks.flag(symmetric, "symmetric"), checks.float_dtype(scale_dtype, "scale_dtype")
    scale, zero_point = grid.stored_grids(low, high, bits, symmetric, scale_dtype)
    return groups, scale.float(), zero_point


class _Step(torch.autograd.Function):
    """A learned step, rounded to the dtype that it is stored in, passes its gradient on multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, step: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
        ctx.factor = factor
        return step.to(dtype).to(step.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.factor * gradient, None, None


def first_steps(weight: Tensor, bits: int = 4, group_size: int | None = 32) -> Tensor:
    """Where learned steps begin: 2 mean |w| / sqrt(Q) of each group, Q = 2**(bits - 1) - 1, as LSQ does. float32 [out, groups].

    1 for a group of zeros.
    """
    bits, size = checks.weight_and_grid(weight, bits, group_size)
    mean = weight.detach().float().abs().unflatten(1, (-1, size)).mean(2)
    return torch.where(mean == 0, torch.ones_like(mean), 2 * mean / math.sqrt(2 ** (bits - 1) - 1))


def learned_step(weight: Tensor, step: Tensor, bits: int = 4, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """LSQ (Esser et al. 2020, arXiv:1902.08153): steps learn with the weight. float32 [out, in].

    weight: float [out, in]. step: float [out, groups] above 0, a group's distance between levels; codes run from -2**(bits - 1)
    to 2**(bits - 1) - 1. scale_dtype: the step is rounded to it, as it is stored. Inside the range
    a step's derivative is round(w/s) - w/s, outside the code at the end; it is multiplied by 1 / sqrt(group size * Q), LSQ's
    gradient scale. Raises ValueError for a step that is not above 0 or of another shape.
    """
    rows, groups = checks.matrix(step, "step", "[out_features, groups]").shape
    checks.finite(checks.matrix(weight).detach(), "weight")
    if rows != weight.shape[0] or weight.shape[1] % groups:
        raise ValueError(f"step has shape {list(step.shape)}, wanted [{weight.shape[0]}, a divisor of {weight.shape[1]}]")
    bits, size = checks.weight_and_grid(weight, bits, weight.shape[1] // groups)
    checks.scales(step.detach().to(checks.float_dtype(scale_dtype, "scale_dtype")), "step")
    largest = 2 ** (bits - 1) - 1
    scale = _Step.apply(step.float(), 1 / math.sqrt(size * largest), scale_dtype)[..., None]
    codes = round_through((weight.float().unflatten(1, (-1, size)) / scale).clamp(-largest - 1, largest))
    return (codes * scale).flatten(1)


def ternary(weight: Tensor, group_size: int | None = None, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """Every weight is -s, 0 or s, with s = mean |w| of its group: BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764, section 2).

    weight: float [out, in] -> float32 in that shape. group_size: a divisor of in_features; None for the whole matrix as one group,
    as there. The gradient goes straight through, past the clip as well.
    """
    groups, scale = _ternary_groups(weight, group_size, scale_dtype)
    clipped = _Through.apply(groups / scale)
    return (clipped * scale).view_as(weight)


class _Through(torch.autograd.Function):
    """round(clamp(x, -1, 1)) with the derivative of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-1, 1).round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _ternary_groups(weight: Tensor, group_size: int | None, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight in groups, [groups, size], and their scales, [groups, 1]; 1 for a group of zeros."""
    checks.finite(checks.matrix(weight), "weight")
    size = weight.numel() if group_size is None else checks.weight_and_grid(weight, 2, group_size)[1]
    groups = weight.float().reshape(-1, size)
    scale = groups.detach().abs().mean(1, keepdim=True).to(checks.float_dtype(scale_dtype, "scale_dtype")).float()
    return groups, torch.where(scale == 0, torch.ones_like(scale), scale)


@dataclass(frozen=True)
class TernaryTensor(QuantizedTensor):
    """A weight of -s, 0 and s: five codes in a byte, since 3**5 = 243 is less than 256. 1.6 bits a weight, and the scales.

    packed_codes: uint8 [ceil(n / 5)], of five codes 0, 1, 2 the number with these digits to the base 3, the first one's lowest.
    scale: float [groups]. shape: [out_features, in_features].
    """

    packed_codes: Tensor
    scale: Tensor
    shape: tuple[int, int]

    @property
    def codes(self) -> Tensor:
        """uint8 [out_features, in_features]: 0, 1 and 2 stand for -s, 0 and s."""
        powers = 3 ** torch.arange(5, device=self.packed_codes.device)
        digits = self.packed_codes[:, None].long() // powers % 3
        return digits.flatten()[: self.shape[0] * self.shape[1]].view(self.shape).to(torch.uint8)

    def dequantize(self) -> Tensor:
        """float32 [out_features, in_features]."""
        signs = (self.codes.float() - 1).reshape(len(self.scale), -1)
        return (signs * self.scale.float()[:, None]).view(self.shape)


def ternary_tensor(weight: Tensor, group_size: int | None = None, scale_dtype: torch.dtype = torch.float32) -> TernaryTensor:
    """What `ternary` gives with the same arguments, as it is stored: equal values."""
    groups, scale = _ternary_groups(weight.detach(), group_size, scale_dtype)
    codes = (groups / scale).clamp(-1, 1).round().add(1).flatten().long()
    digits = torch.nn.functional.pad(codes, (0, -len(codes) % 5)).view(-1, 5)
    packed = (digits * 3 ** torch.arange(5, device=digits.device)).sum(1).to(torch.uint8)
    return TernaryTensor(packed, scale.flatten().to(scale_dtype), (weight.shape[0], weight.shape[1]))


def uniform(
    weight: Tensor,
    step: Tensor | None = None,
    bits: int = 4,
    group_size: int | None = 32,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> UniformTensor:
    """What `fake_quantize(weight, ...)`, or with steps `learned_step(weight, step, ...)`, gives, as it is stored: equal values."""
    if step is None:
        return rtn.quantize(weight, bits, group_size, symmetric, scale_dtype)
    values, scale = learned_step(weight.detach(), step.detach(), bits, scale_dtype), step.detach().to(scale_dtype)
    groups = values.unflatten(1, (step.shape[1], -1))
    codes = (groups / scale.float()[..., None]).round().add(2 ** (bits - 1)).to(torch.uint8)
    rows, columns = weight.shape
    return UniformTensor(grid.pack_bits(codes, bits), scale, None, bits, groups.shape[2], (rows, columns))
