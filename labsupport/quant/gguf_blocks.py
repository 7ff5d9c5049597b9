"""The block formats of llama.cpp's GGUF files: Q8_0, Q4_0, Q4_1, and Q4_K, the most used of the k-quants.

A row of a weight is cut into blocks, and a block is a few bytes that hold everything, scales first. With float16 d and m:

    q8_0   32 weights, 34 bytes   d, then 32 int8 codes            d q                         8.5 bits a weight
    q4_0   32 weights, 18 bytes   d, then 32 codes of 4 bits       d (q - 8)                   4.5
    q4_1   32 weights, 20 bytes   d, m, then 32 codes of 4 bits    d q + m                     5.0
    q4_k  256 weights, 144 bytes  d, m, then 8 scales s and 8 minima t of 6 bits in 12 bytes,
                                  then 256 codes of 4 bits         (d s) q - (m t)             4.5

In q4_0 and q4_1 byte i of the codes holds code i below and code i + 16 above; in q4_k, of each 64 weights, i and i + 32.

The formats are those of ggml (ggml-common.h, dequantize_row_* in ggml-quants.c, version 0.12). A format says what bytes mean, not
how to choose them. For the first three the rounding is that of ggml's reference, and the bytes equal those of
`gguf.quants.quantize`. For q4_k ggml searches with weights of its own; `quantize_q4_k` says what is done here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from labsupport.quant import checks
from labsupport.quant.grid import QuantizedTensor, UniformTensor

BLOCK, SUPERBLOCK = 32, 256
WEIGHTS = {"q8_0": BLOCK, "q4_0": BLOCK, "q4_1": BLOCK, "q4_k": SUPERBLOCK}  # in a block
BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20, "q4_k": 144}  # of a block
BITS = {"q8_0": 8, "q4_0": 4, "q4_1": 4, "q4_k": 4}  # of a code
HALVES = {"q8_0": 1, "q4_0": 1, "q4_1": 2, "q4_k": 2}  # float16 numbers at the start of a block
SIX = 63  # the highest code of 6 bits
SHRINKS = tuple(1 - 0.025 * step for step in range(13))  # of a group's range, tried by q4_k
CHUNK = 2**18  # weights to take at a time


@dataclass(frozen=True)
class GGUFTensor(QuantizedTensor):
    """blocks: uint8 [out_features, in_features / WEIGHTS[kind] * BYTES[kind]], as they stand in the file. kind: one of WEIGHTS."""

    blocks: torch.Tensor
    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        rows, stored = self.blocks.shape
        return rows, stored // BYTES[self.kind] * WEIGHTS[self.kind]

    def dequantize(self) -> torch.Tensor:
        blocks = self.blocks.reshape(-1, BYTES[self.kind])
        step = CHUNK // WEIGHTS[self.kind]
        return torch.cat([_VALUES[self.kind](part) for part in blocks.split(step)]).view(self.shape)

    @property
    def halves(self) -> torch.Tensor:
        """d, and m where there is one, of every block: float32 [blocks, 1 or 2]."""
        return _halves(self.blocks.reshape(-1, BYTES[self.kind]), HALVES[self.kind])


def read(blocks: torch.Tensor, kind: str) -> GGUFTensor:
    """A weight of which a file holds the blocks.

    Raises ValueError for a kind that is not known, rows that are not whole blocks, and d or m that is no finite number; TypeError
    for a dtype other than uint8.
    """
    checks.choice(kind, "kind", tuple(WEIGHTS))
    checks.tensor(blocks, "blocks", (torch.uint8,), "a tensor of bytes, torch.uint8")
    if blocks.ndim != 2 or blocks.numel() == 0 or blocks.shape[1] % BYTES[kind]:
        raise ValueError(f"blocks has shape {list(blocks.shape)}, wanted rows of whole {kind} blocks of {BYTES[kind]} bytes")
    tensor = GGUFTensor(blocks, kind)
    if bad := int((~tensor.halves.isfinite()).any(1).sum()):
        raise ValueError(f"{bad} of its {len(tensor.halves)} {kind} blocks have a scale or minimum that is NaN or infinity")
    return tensor


# Rounding ------------------------------------------------------------------------------------------------------------


def quantize_q8_0(weight: torch.Tensor) -> GGUFTensor:
    """d is the largest magnitude over 127; codes are rounded, ties away from 0.

    weight: float [out_features, in_features], finite, in_features a multiple of 32. Raises ValueError for a weight that is not so
    and for scales that float16 does not hold; TypeError for a dtype that is not floating point. So do the other three.
    """
    return _in_blocks(weight, "q8_0", _round_q8_0)


def quantize_q4_0(weight: torch.Tensor) -> GGUFTensor:
    """d is the weight of largest magnitude over -8: that weight gets code 0, and the other side of the grid is one step shorter."""
    return _in_blocks(weight, "q4_0", _round_q4_0)


def quantize_q4_1(weight: torch.Tensor) -> GGUFTensor:
    """m is the smallest weight, and 15 steps of d reach the largest."""
    return _in_blocks(weight, "q4_1", _round_q4_1)


def quantize_q4_k(weight: torch.Tensor) -> GGUFTensor:
    """Eight grids to a block, whose scales and minima are themselves rounded to 6 bits of one d and one m.

    in_features must be a multiple of 256. For each group of 32 the range from min to max is shrunk in small steps; with the codes
    that a range gives, the scale and minimum of least squared error follow from two linear equations; the best of all
    is kept. A block keeps it only where, after 6 bits, its squared error is less than that of the plain range.
    """
    return _in_blocks(weight, "q4_k", _round_q4_k)


QUANTIZE = {"q8_0": quantize_q8_0, "q4_0": quantize_q4_0, "q4_1": quantize_q4_1, "q4_k": quantize_q4_k}


def _in_blocks(weight: torch.Tensor, kind: str, round_blocks: Callable[[torch.Tensor], torch.Tensor]) -> GGUFTensor:
    """round_blocks: from float32 [blocks, weights] to uint8 [blocks, bytes]."""
    checks.finite(checks.matrix(weight), "weight")
    size = WEIGHTS[kind]
    if weight.shape[1] % size:
        raise ValueError(f"in_features {weight.shape[1]} is not a multiple of {size}, which a block of {kind} holds")
    blocks = weight.detach().float().reshape(-1, size)
    packed = torch.cat([round_blocks(part) for part in blocks.split(CHUNK // size)])
    if not _halves(packed, HALVES[kind]).isfinite().all():
        raise ValueError(f"a scale or minimum of {kind} is more than float16 holds: weights reach {weight.abs().max().item():.3g}")
    return GGUFTensor(packed.view(len(weight), -1), kind)


def _inverse(step: torch.Tensor) -> torch.Tensor:
    """1 / step; 0 where that is no number, and then every code stands for nearly nothing."""
    return (1 / step).nan_to_num_(0.0, 0.0, 0.0)


def _round_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    step = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * _inverse(step)
    whole = scaled.abs().floor()
    codes = scaled.sign() * (whole + (2 * (scaled.abs() - whole)).floor())
    return torch.cat([_bytes(step), codes.to(torch.int8).view(torch.uint8)], 1)


def _round_q4_0(blocks: torch.Tensor) -> torch.Tensor:
    step = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    codes = (blocks * _inverse(step) + 8.5).to(torch.uint8).clamp_(max=15)
    return torch.cat([_bytes(step), _nibbles(codes, BLOCK)], 1)


def _round_q4_1(blocks: torch.Tensor) -> torch.Tensor:
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = (high - low) / 15
    codes = ((blocks - low) * _inverse(step) + 0.5).to(torch.uint8).clamp_(max=15)
    return torch.cat([_bytes(step), _bytes(low), _nibbles(codes, BLOCK)], 1)


def _round_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    groups = blocks.view(-1, SUPERBLOCK // BLOCK, BLOCK)  # [blocks, 8, 32]
    low, high = groups.amin(2, keepdim=True).clamp_(max=0), groups.amax(2, keepdim=True).clamp_(min=0)
    plain = (high - low) / 15, -low
    packed = _pack_q4_k(groups, *plain)
    searched = _pack_q4_k(groups, *_least_squares(groups, *plain))
    loss, loss_plain = ((_values_q4_k(p) - blocks).pow(2).sum(1, keepdim=True) for p in (searched, packed))
    return torch.where(loss < loss_plain, searched, packed)


def _least_squares(groups: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum [..., 1] such that scale * code - minimum is near each group, see `quantize_q4_k`. Neither is below 0."""
    best, least = (scale, minimum), torch.full_like(scale, torch.inf)
    for shrink in SHRINKS:
        codes = _codes(groups, scale * shrink, minimum * shrink)
        # Of all lines through the points (code, weight) the one of least squares: its slope is the scale.
        about, weights = codes - codes.mean(-1, keepdim=True), groups - groups.mean(-1, keepdim=True)
        slope = ((about * weights).sum(-1, keepdim=True) * _inverse(about.pow(2).sum(-1, keepdim=True))).clamp_(min=0)
        offset = slope * codes.mean(-1, keepdim=True) - groups.mean(-1, keepdim=True)
        # The line must meet 0 at a code, or the minimum would be below 0: then it goes through the origin.
        through = (codes * groups).sum(-1, keepdim=True) * _inverse(codes.pow(2).sum(-1, keepdim=True))
        slope, offset = torch.where(offset < 0, through.clamp(min=0), slope), offset.clamp(min=0)
        loss = (slope * _codes(groups, slope, offset) - offset - groups).pow(2).sum(-1, keepdim=True)
        better = loss < least
        best = torch.where(better, slope, best[0]), torch.where(better, offset, best[1])
        least = torch.where(better, loss, least)
    return best


def _codes(groups: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    return ((groups + minimum) * _inverse(scale)).round_().clamp_(0, 15)


def _pack_q4_k(groups: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """Blocks of groups [blocks, 8, 32] whose grids are near those of scale and minimum, [blocks, 8, 1]."""
    steps = [(values.amax(1) / SIX).half() for values in (scale, minimum)]  # d and m, [blocks, 1]
    sixes = [
        (values[..., 0] * _inverse(step.float())).round_().clamp_(0, SIX)
        for values, step in zip((scale, minimum), steps, strict=True)
    ]
    stored = [(step.float() * six)[..., None] for step, six in zip(steps, sixes, strict=True)]
    codes = _codes(groups, *stored).to(torch.uint8).view(-1, 4, 2 * BLOCK)
    return torch.cat([*map(_bytes, steps), _pack_six(*(six.to(torch.uint8) for six in sixes)), _nibbles(codes, 2 * BLOCK)], 1)


# Bytes ---------------------------------------------------------------------------------------------------------------


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    """float [n, 1] as float16 in uint8 [n, 2]."""
    return numbers.half().contiguous().view(torch.uint8)


def _halves(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """The float16 numbers at the start of each block, float32 [blocks, count]."""
    return blocks[:, : 2 * count].contiguous().view(torch.float16).float()


def _nibbles(codes: torch.Tensor, run: int) -> torch.Tensor:
    """Codes of 4 bits, uint8 [blocks, ...], two to a byte: of each `run` the first half below, the second above."""
    low, high = codes.reshape(len(codes), -1, 2, run // 2).unbind(2)
    return (low | high << 4).flatten(1)


def _codes_of(packed: torch.Tensor, run: int) -> torch.Tensor:
    """The inverse of `_nibbles`: float32 [blocks, codes]."""
    halves = packed.view(len(packed), -1, run // 2)
    return torch.stack([halves & 15, halves >> 4], 2).flatten(1).float()


def _pack_six(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight minima of 6 bits, uint8 [blocks, 8] each, in 12 bytes.

    Bytes 0-3 are the first four scales and bytes 4-7 the first four minima, all 6 bits. Bytes 8-11 hold the low 4 bits of the last
    four scales below and those of the minima above; their high 2 bits stand above the first eight.
    """
    first, last = scales[:, :4], scales[:, 4:]
    first_min, last_min = minima[:, :4], minima[:, 4:]
    return torch.cat([first | last >> 4 << 6, first_min | last_min >> 4 << 6, last & 15 | (last_min & 15) << 4], 1)


def _unpack_six(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `_pack_six`."""
    first, first_min, last = packed.split(4, 1)
    scales = torch.cat([first & SIX, last & 15 | first >> 6 << 4], 1)
    return scales, torch.cat([first_min & SIX, last >> 4 | first_min >> 6 << 4], 1)


def _values_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks, 1) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _values_q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks, 1) * (_codes_of(blocks[:, 2:].contiguous(), BLOCK) - 8)


def _values_q4_1(blocks: torch.Tensor) -> torch.Tensor:
    step, low = _halves(blocks, 2).split(1, 1)
    return step * _codes_of(blocks[:, 4:].contiguous(), BLOCK) + low


def _values_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    steps = _halves(blocks, 2).split(1, 1)
    scale, minimum = ((step * six.float())[..., None] for step, six in zip(steps, _unpack_six(blocks[:, 4:16]), strict=True))
    codes = _codes_of(blocks[:, 16:].contiguous(), 2 * BLOCK).view(-1, SUPERBLOCK // BLOCK, BLOCK)
    return (scale * codes - minimum).flatten(1)


_VALUES = {"q8_0": _values_q8_0, "q4_0": _values_q4_0, "q4_1": _values_q4_1, "q4_k": _values_q4_k}


# Uniform grids that a block holds exactly ----------------------------------------------------------------------------


def of_uniform(tensor: UniformTensor) -> GGUFTensor:
    """The same values in blocks: a symmetric grid of 4 bits is q4_0, one of 8 bits q8_0, in groups of 32 with float16 scales.

    Raises ValueError for any other grid. An asymmetric one has its zero-point at a code, and its minimum, scale * zero_point, has
    more digits than q4_1's float16.
    """
    kind = {4: "q4_0", 8: "q8_0"}.get(tensor.bits)
    if kind is None or tensor.group_size != BLOCK or tensor.packed_zero_points is not None:
        has = f"{tensor.bits} bits in groups of {tensor.group_size}, {'a' * (tensor.packed_zero_points is not None)}symmetric"
        raise ValueError(f"GGUF has blocks of 32 weights on symmetric grids of 4 or 8 bits, and this is {has}")
    if getattr(tensor, "g_idx", None) is not None:
        raise ValueError("the groups are scattered over the row, and a block of GGUF holds neighbors: use static groups")
    if tensor.scale.dtype != torch.float16:
        raise ValueError(f"its scales are {tensor.scale.dtype}, wanted torch.float16")
    codes, steps = tensor.codes.view(-1, BLOCK), tensor.scale.reshape(-1, 1)
    stored = _nibbles(codes, BLOCK) if kind == "q4_0" else codes ^ 128  # code - 128 as int8 has the highest bit turned
    return GGUFTensor(torch.cat([_bytes(steps), stored], 1).view(tensor.shape[0], -1), kind)
