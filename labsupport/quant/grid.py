"""Uniform grids, and what every method ends in: a QuantizedTensor.

A grid has 2**bits levels, `scale` apart. A code q stands for the value (q - zero_point) * scale. Weights are
[out_features, in_features]; groups run along in_features, each with a grid of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from labsupport.quant import checks

GROUP_SIZES = (128, 64, 32)  # of which the largest that fits is taken where none is named: kernels know them
CHUNK = 2**18  # values to take at a time, few enough that they stay in a CPU's cache between the steps
MOST_AT_ONCE = 2**26  # on a GPU, where each step waits for its start and takes some bytes of memory for a value


def _lanes(width: int, start: int, bits: int) -> int:
    """A 64-bit mask, as a signed number: `bits` bits from `start` on in every lane of `width` bits."""
    mask = sum((2**bits - 1) << (lane + start) for lane in range(0, 64, width))
    return mask - 2**64 if mask >= 2**63 else mask


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes below 2**bits as one stream of bits, lowest bit first, in uint8 [ceil(n * bits / 8)].

    codes: any integer dtype, any shape, read row by row. The last byte is filled with zeros.
    Raises ValueError and TypeError for what is no code of `bits` bits, which would spill into its neighbors.
    """
    bits = checks.whole(bits, "bits", 1, 8)
    codes = checks.codes(codes, bits)
    flat = codes.reshape(-1).to(torch.uint8)
    packed = flat.new_empty(-(-len(flat) * bits // 8))
    for part, into in zip(flat.split(CHUNK), packed.split(CHUNK * bits // 8), strict=True):
        # Eight codes are one 64-bit word (little-endian). Move neighbors together, then pairs, then fours: 8 * bits bits remain.
        words = _padded(part, 8).view(torch.int64)
        for width in (8, 16, 32):
            used = width // 8 * bits
            words = words & _lanes(2 * width, 0, used) | words >> (width - used) & _lanes(2 * width, used, used)
        into.copy_(words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)[: len(into)])
    return packed


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of a stream made by `pack_bits`. uint8 [count]."""
    bits, count = checks.whole(bits, "bits", 1, 8), checks.whole(count, "count", 0)
    checks.tensor(packed, "packed", (torch.uint8,), "a tensor of bytes, torch.uint8")
    if packed.ndim != 1 or 8 * len(packed) < count * bits:
        raise ValueError(f"packed has shape {list(packed.shape)}, {count} codes of {bits} bits are {-(-count * bits // 8)} bytes")
    stream = packed[: -(-count * bits // 8)]
    if 8 % bits == 0:  # a byte holds whole codes
        return torch.stack([stream >> start & 2**bits - 1 for start in range(0, 8, bits)], 1).view(-1)[:count]
    words = torch.nn.functional.pad(_padded(stream, bits).view(-1, bits), (0, 8 - bits)).view(torch.int64).view(-1)
    for width in (32, 16, 8):
        used = width // 8 * bits
        words = words & _lanes(2 * width, 0, used) | words << (width - used) & _lanes(2 * width, width, used)
    return words.view(torch.uint8)[:count]


def _padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -len(flat) % multiple
    return torch.cat([flat, flat.new_zeros(missing)]) if missing else flat


def scale_and_zero_point(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The asymmetric grid of each row: the shortest that reaches from min to max and has a level at 0.

    weight float [rows, columns] -> scale [rows, 1] > 0 and zero_point [rows, 1], a whole number in [0, 2**bits - 1].
    A row of zeros gets scale 1. (Jacob et al. 2018, arXiv:1712.05877, section 2.1 and equation 3.)
    """
    return _asymmetric(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), bits)


def symmetric_scale(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The scale of each row for a grid whose zero_point is 2**(bits - 1): absmax lies at most half a step off the end.

    weight float [rows, columns] -> scale [rows, 1] > 0. A row of zeros gets scale 1.
    """
    return _symmetric(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), bits)[0]


def _asymmetric(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.round(-low / scale)


def _symmetric(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = 2 * torch.maximum(high, -low) / (2**bits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.full_like(scale, 2 ** (bits - 1))


def grids(low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero_point for ranges [low, high] of any shape."""
    return (_symmetric if symmetric else _asymmetric)(low, high, bits)


def stored_grids(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype, tiny_is_zero: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `grids`, with the scale in the dtype that it is stored in and a zero_point that belongs to the scale so rounded.

    Raises ValueError for a scale that `scale_dtype` cannot hold: too large for it, or so small that it would be 0 and with it all
    weights of the group, unless `tiny_is_zero`.
    """
    scale, zero_point = grids(low, high, bits, symmetric)
    stored = scale.to(scale_dtype)
    if stored.isinf().any():
        raise ValueError(f"a scale of {scale.max().item():.3g} is more than {scale_dtype} holds: pass scale_dtype=torch.float32")
    if (lost := stored == 0).any():
        if not tiny_is_zero:
            least = scale[lost].min().item()
            raise ValueError(f"a scale of {least:.3g} is less than {scale_dtype} holds: pass scale_dtype=torch.float32")
        stored = stored.masked_fill(lost, 1)  # not to divide by 0
    if not symmetric:
        zero_point = torch.round(-low.clamp(max=0) / stored.float()).clamp_(0, 2**bits - 1)
    return stored, zero_point


def quantize(weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of `weight` on a grid that broadcasts against it: round, half to even, then move by zero_point, then clamp.

    Multiplies by 1/scale, as PyTorch's fake_quantize does. Returns float whole numbers in [0, 2**bits - 1].
    """
    return (weight * (1 / scale)).round_().add_(zero_point).clamp_(0, 2**bits - 1)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """The values that codes stand for: (codes - zero_point) * scale."""
    return (codes.to(scale.dtype) - zero_point) * scale


def group_sizes(wanted: int = GROUP_SIZES[0]) -> tuple[int, ...]:
    """What `largest_group_size` chooses from: `wanted`, then those of 128, 64, 32 that are smaller."""
    return (wanted, *(size for size in GROUP_SIZES if size < wanted))


def largest_group_size(in_features: Iterable[int], wanted: int = GROUP_SIZES[0]) -> int:
    """The group size to take where none is named: the largest of `group_sizes(wanted)` that divides all of in_features.

    in_features: of every linear that is quantized. Raises ValueError where none of them does: a larger group, such as the row,
    loses more, and a smaller one stores more, so that is for the user to say.
    """
    widths, sizes = sorted(set(in_features)), group_sizes(wanted)
    for size in sizes:
        if not any(width % size for width in widths):
            return size
    raise ValueError(
        f"group_size is not given, and none of {', '.join(map(str, sizes))} divides in_features {', '.join(map(str, widths))}: "
        f"name another, the largest that does is {math.gcd(*widths)}, or take whole rows"
    )


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight as it is stored. The classes derived from it are dataclasses, and every byte is in one of their tensors.

    shape: [out_features, in_features]. codes: a whole number for each weight, in that shape. dequantize(): what the weight reads
    back as, float32 in that shape.
    """

    if TYPE_CHECKING:  # a dataclass would take a property for the default of a field with that name

        @property
        def shape(self) -> tuple[int, int]: ...

        def dequantize(self) -> torch.Tensor: ...

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that are stored, by the names of their fields; "absmax.offset" where a field is stored in parts itself."""
        found: dict[str, torch.Tensor] = {}
        for field in fields(self):
            part = getattr(self, field.name)
            if isinstance(part, torch.Tensor):
                found[field.name] = part
            elif isinstance(part, QuantizedTensor):
                found |= {f"{field.name}.{name}": tensor for name, tensor in part.tensors.items()}
        return found

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors that are stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class UniformTensor(QuantizedTensor):
    """A weight on uniform grids: packed codes, one scale and zero-point a group.

    packed_codes: uint8, the stream of `bits`-bit codes of the whole weight, row by row.
    scale: float [out, groups]. packed_zero_points: uint8 stream of `bits`-bit zero-points; None for a symmetric grid, whose
    zero-point is 2**(bits - 1) everywhere and costs nothing.
    """

    packed_codes: torch.Tensor
    scale: torch.Tensor
    packed_zero_points: torch.Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, int]

    @property
    def codes(self) -> torch.Tensor:
        """uint8 [out_features, in_features]."""
        rows, columns = self.shape
        return unpack_bits(self.packed_codes, self.bits, rows * columns).view(rows, columns)

    @property
    def zero_point(self) -> torch.Tensor:
        """Whole numbers as float32 [out_features, groups]."""
        if self.packed_zero_points is None:
            return torch.full(self.scale.shape, float(2 ** (self.bits - 1)), device=self.scale.device)
        return unpack_bits(self.packed_zero_points, self.bits, self.scale.numel()).view(self.scale.shape).float()

    def dequantize(self) -> torch.Tensor:
        rows, columns = self.shape
        scale, zero_point = self.scale.float()[..., None], self.zero_point[..., None]
        values = torch.empty(rows, columns // self.group_size, self.group_size, device=scale.device)
        chunk = CHUNK if scale.device.type == "cpu" else MOST_AT_ONCE
        step = -(-max(1, chunk // columns) // 8) * 8  # whole bytes of codes in every step but the last
        for start in range(0, rows, step):
            part = values[start : start + step]
            first = start * columns * self.bits // 8
            codes = unpack_bits(self.packed_codes[first:], self.bits, part.numel())
            torch.sub(codes.view(part.shape), zero_point[start : start + step], out=part)
            part.mul_(scale[start : start + step])
        return values.view(rows, columns)


def sqnr_db(weight: torch.Tensor, reconstruction: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in decibels, 10 log10(sum w^2 / sum (w - r)^2); infinity without error."""
    noise = (weight - reconstruction).double().pow(2).sum()
    return (10 * torch.log10(weight.double().pow(2).sum() / noise)).item()


def best_clip(weight: torch.Tensor, bits: int, factors: torch.Tensor) -> torch.Tensor:
    """For each row the factor on the symmetric scale that leaves the least squared error; what sticks out is clipped.

    weight float [rows, columns], factors float [k] in (0, 1] -> [rows, 1], each an entry of `factors`.
    """
    scale, zero_point = symmetric_scale(weight, bits), torch.tensor(2.0 ** (bits - 1))
    factors, errors = factors.to(weight.device), []
    for factor in factors:
        codes = quantize(weight, factor * scale, zero_point, bits)
        errors.append((dequantize(codes, factor * scale, zero_point) - weight).pow(2).sum(1))
    return factors[torch.stack(errors).argmin(0)][:, None]
