"""NF4, FP4 and int4: blocks divided by their largest magnitude and rounded to sixteen levels, stored as bitsandbytes does.

Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3 and appendix E. The weight is read row by row as one long vector and cut
into blocks, which may run from one row into the next. Codes, absmax and nested statistics equal those of bitsandbytes 0.50 on
a CPU to the last bit; labsupport/quant/bnb_format.py reads and writes its state dicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from statistics import NormalDist

import torch
from torch.nn import functional as F

from labsupport.quant import checks
from labsupport.quant.grid import QuantizedTensor

BLOCK_SIZE = 64  # `labs quantize` has it from pipeline/methods.py
NESTED_BLOCK_SIZE = 256
# The outermost probability: half way between those for 8 and for 7 levels, 1 - (1/32 + 1/30) / 2, cut to seven digits.
OFFSET = 0.9677083
SMALLEST_ABSMAX = 1e-38  # what a block of smaller values is divided by; a short block at the end also stores it
# Values are taken some at a time, few enough that they stay in a CPU's last-level cache between the steps.
CHUNK = 2**18


def normal_quantiles(offset: float = OFFSET) -> torch.Tensor:
    """The NF4 codebook: float32 [16], ascending, from -1 to 1, with an exact 0.

    8 positive levels are quantiles of a standard normal at probabilities evenly spaced from 1/2 to `offset`, without 1/2 itself;
    7 negative ones likewise; all are divided by the largest. The probabilities are spaced in float32, as bitsandbytes does:
    in float64 ten of the sixteen levels differ in their last bit.
    """
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(offset, 0.5, 9)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(offset, 0.5, 8)[:-1].tolist()]
    levels = torch.tensor(sorted([*negative, 0.0, *positive]))
    return levels / levels.max()


def fp4_levels() -> torch.Tensor:
    """bitsandbytes' FP4 by code, not ascending: float32 [16]. A sign bit and the magnitudes 0, 1/16, 8, 12, 4, 6, 2, 3 over 12.

    This is not E2M1, the FP4 of the OCP formats, whose magnitudes in the same unit are 0, 1, 2, 3, 4, 6, 8, 12: here the 1 is a
    sixteenth, and the codes are in another order.
    """
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    return torch.cat([magnitudes, 0 - magnitudes])  # 0.0 twice: their table holds no -0.0


def int4_levels() -> torch.Tensor:
    """Evenly spaced levels: float32 [16], (code - 8) / 7.5, so that no value from -1 to 1 is more than half a step away.

    They are the symmetric grid of rtn, with the largest magnitude stored in place of the scale.
    """
    return (torch.arange(16) - 8) / 7.5


CODEBOOKS = {"nf4": normal_quantiles, "fp4": fp4_levels, "int4": int4_levels}


def _computed_once(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compute a tensor once for each argument; who asks gets a copy, since what they do to it must not change the next one's."""
    kept = cache(make)

    @wraps(make)
    def copied(*arguments: str) -> torch.Tensor:
        return kept(*arguments).clone()

    return copied


@_computed_once
def levels_of(name: str) -> torch.Tensor:
    """The levels of "nf4", "fp4" or "int4" by code. float32 [16]. Raises ValueError for another name."""
    if name not in CODEBOOKS:
        raise ValueError(f"codebook is {name!r}, wanted one of {', '.join(CODEBOOKS)}, or a tensor of 16 levels")
    return CODEBOOKS[name]()


@_computed_once
def dynamic_map() -> torch.Tensor:
    """The levels of the 8-bit code for nested statistics: float32 [256], ascending, of both signs, fine near 0 and coarse near 1.

    Seven decades, the last from 0.1 to 1. The first is one step; each of the others is cut into twice as many equal steps as the
    one before it. The middles of the steps are the levels, together with 0 and 1. (Dettmers 2015, arXiv:1511.04561, section 4.1.)
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values


@cache
def _dynamic_table() -> torch.Tensor:  # only ever read
    """The code for each of 65,536 values from -1 to 1. bitsandbytes looks codes up in it; most of them are the nearest, not all."""
    levels = dynamic_map()
    values = -1 + 2 * torch.arange(65536, dtype=torch.float32) / 65535
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


@dataclass(frozen=True)
class NestedAbsmax(QuantizedTensor):
    """The largest magnitudes of blocks, quantized in their turn: double quantization.

    codes: uint8 [blocks]. absmax: float32 [blocks / 256, rounded up]. offset: float32 scalar, the mean of all magnitudes.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return 1, len(self.codes)

    def dequantize(self) -> torch.Tensor:
        """float32 [blocks]."""
        values = dynamic_map().to(self.codes.device)[self.codes.int()]
        return _times(values, self.absmax, NESTED_BLOCK_SIZE) + self.offset


@dataclass(frozen=True)
class BlockTensor(QuantizedTensor):
    """A weight in 4-bit codes, two a byte, the first in the high nibble, and the largest magnitude of each block.

    packed_codes: uint8 [weights / 2, rounded up]. absmax: float [blocks], or nested. levels: the 16 numbers of the codebook; it is
    the same for a whole model, so its 64 bytes are not counted. kind: its name, "" for a codebook without one.
    """

    packed_codes: torch.Tensor
    absmax: torch.Tensor | NestedAbsmax
    levels: tuple[float, ...]
    kind: str
    block_size: int
    shape: tuple[int, int]

    @property
    def codes(self) -> torch.Tensor:
        """uint8 [out_features, in_features]."""
        rows, columns = self.shape
        return unpack_nibbles(self.packed_codes)[: rows * columns].view(rows, columns)

    @property
    def block_absmax(self) -> torch.Tensor:
        """float32 [blocks], read back where it is nested."""
        return self.absmax.dequantize() if isinstance(self.absmax, NestedAbsmax) else self.absmax.float()

    def dequantize(self) -> torch.Tensor:
        rows, columns = self.shape
        levels, device = torch.tensor(self.levels), self.packed_codes.device
        # A byte is two codes: both levels are looked up at once, as one 64-bit word.
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1).view(torch.int64).view(-1).to(device)
        values = torch.empty(2 * len(self.packed_codes), device=device)
        absmax, step = self.block_absmax, _chunk(self.block_size)
        for start in range(0, rows * columns, step):
            part = values[start : start + step]
            packed = self.packed_codes[start // 2 : (start + step) // 2]
            torch.take(pairs, packed.long(), out=part.view(torch.int64))
            _times(part, absmax[start // self.block_size :][: -(-len(part) // self.block_size)], self.block_size)
        return values[: rows * columns].view(rows, columns)


def quantize(
    weight: torch.Tensor,
    codebook: str | torch.Tensor = "nf4",
    block_size: int = BLOCK_SIZE,
    double_quant: bool = False,
    absmax_dtype: torch.dtype = torch.float32,
) -> BlockTensor:
    """Divide each block by its largest magnitude and give each value the code of the nearest level.

    weight: float [out_features, in_features], finite; it is not changed. codebook: "nf4", "fp4", "int4", or 16 levels from -1 to 1.
    A value half way between two levels takes the lower one. double_quant: store each magnitude in 8 bits. absmax_dtype: the dtype
    in which they are stored otherwise. Codes are chosen with the magnitude as it is stored.

    Raises ValueError for NaN, infinity, a shape, block size or codebook that does not fit, a magnitude that `absmax_dtype` cannot
    hold, or `double_quant` with another dtype than float32; TypeError for a dtype that is not floating point.
    """
    checks.matrix(weight)
    rows, columns = weight.shape
    block_size = checks.whole(block_size, "block_size", wanted="a positive whole number")
    double_quant = checks.flag(double_quant, "double_quant")
    levels = _checked_levels(codebook, double_quant, absmax_dtype)
    by_size = levels.argsort(stable=True)  # FP4's codes do not ascend
    ascending = levels[by_size]
    bounds = ((ascending[:-1] + ascending[1:]) / 2).tolist()
    packed, largest = [], []
    for chunk in weight.detach().reshape(-1).split(_chunk(block_size)):
        values = chunk.float()
        absmax = _absmax(values, block_size)
        if len(values) % block_size:
            absmax[-1].clamp_(min=SMALLEST_ABSMAX)
        stored = absmax.to(absmax_dtype)
        if not stored.float().isfinite().all():
            if not weight.isfinite().all():
                raise checks.not_finite(weight)
            raise ValueError(f"a block's largest magnitude is {absmax.max().item():.3g}, more than {absmax_dtype} holds")
        if (lost := (stored.float() == 0) & (absmax > 0)).any():
            raise ValueError(f"a block's largest magnitude is {absmax[lost].min().item():.3g}, less than {absmax_dtype} holds")
        divided = _divided(values, stored.float(), block_size)
        packed.append(pack_nibbles(_count_below(F.pad(divided, (0, len(divided) % 2)), bounds)))
        largest.append(stored)
    stream, absmax = torch.cat(packed), torch.cat(largest)
    if not torch.equal(by_size, torch.arange(16)):  # from places in ascending order to codes, a byte with both at a time
        bytes_of = pack_nibbles(torch.cartesian_prod(by_size, by_size).to(torch.uint8).view(-1))
        stream = torch.take(bytes_of.to(stream.device), stream.long())
    return BlockTensor(
        packed_codes=stream,
        absmax=nest(absmax) if double_quant else absmax,
        levels=tuple(levels.tolist()),
        kind=codebook if isinstance(codebook, str) else "",
        block_size=block_size,
        shape=(rows, columns),
    )


def nest(absmax: torch.Tensor) -> NestedAbsmax:
    """Double quantization: float32 [blocks] to 8 bits each, with one magnitude for every 256 and one offset, the mean of all.

    The last bit of the mean, a float32 sum, depends on the number of threads, as it does in bitsandbytes.
    """
    offset = absmax.mean()
    if not offset.isfinite():
        raise ValueError(f"the magnitudes are too large to be quantized in their turn: their sum is more than {absmax.dtype} holds")
    centered = absmax - offset
    largest = _absmax(centered, NESTED_BLOCK_SIZE)
    table = _dynamic_table().to(absmax.device)
    place = (_times(centered, 1 / largest, NESTED_BLOCK_SIZE) + 1) * 0.5 * 65535 + 0.5
    place = place.nan_to_num(nan=0.0).clamp(0, 65535).int()  # where all magnitudes are equal, 0 / 0 takes the lowest code
    return NestedAbsmax(codes=table[place], absmax=largest, offset=offset)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes below 16 [2 n] to bytes [n], the first of two in the high nibble."""
    return codes[0::2] << 4 | codes[1::2]


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n] to codes, uint8 [2 n], high nibble first."""
    return torch.stack([packed >> 4, packed & 15], 1).view(-1)


def _checked_levels(codebook: str | torch.Tensor, double_quant: bool, absmax_dtype: torch.dtype) -> torch.Tensor:
    if double_quant and absmax_dtype != torch.float32:
        raise ValueError(f"absmax_dtype is {absmax_dtype}, wanted torch.float32 with double_quant: it replaces the stored dtype")
    if not isinstance(absmax_dtype, torch.dtype) or not absmax_dtype.is_floating_point:
        raise ValueError(f"absmax_dtype is {absmax_dtype!r}, wanted a floating-point dtype")
    if isinstance(codebook, str):
        return levels_of(codebook)
    levels = checks.tensor(codebook, "codebook", wanted="a name or a floating-point tensor of 16 levels").detach().float().cpu()
    if levels.shape != (16,) or not levels.isfinite().all() or levels.abs().max() > 1 or len(levels.unique()) == 1:
        held = levels.tolist() if levels.numel() < 20 else list(levels.shape)
        raise ValueError(f"codebook is {held}, wanted 16 levels from -1 to 1")
    return levels


def _chunk(block_size: int) -> int:
    """How many values to take at a time: whole blocks and whole bytes."""
    whole = math.lcm(block_size, 2)
    return max(1, CHUNK // whole) * whole


def _absmax(values: torch.Tensor, block_size: int) -> torch.Tensor:
    """Largest magnitude of each block, the short one at the end included. float32 [n] -> [n / block_size, rounded up]."""
    full = len(values) - len(values) % block_size
    blocks = values[:full].view(-1, block_size)
    largest = torch.maximum(blocks.amax(1), -blocks.amin(1)).abs_()  # abs turns the -0.0 of a zero block into 0.0
    if full < len(values):
        largest = torch.cat([largest, values[full:].abs().max().view(1)])
    return largest


def _times(values: torch.Tensor, factors: torch.Tensor, block_size: int) -> torch.Tensor:
    """Multiply each block of `values` [n] by its factor, in place."""
    full = len(values) - len(values) % block_size
    values[:full].view(-1, block_size).mul_(factors[: full // block_size, None])
    if full < len(values):
        values[full:].mul_(factors[-1])
    return values


def _divided(values: torch.Tensor, absmax: torch.Tensor, block_size: int) -> torch.Tensor:
    """Each block over its magnitude: by its reciprocal, but a short block at the end by itself, as bitsandbytes does."""
    absmax = absmax.clamp(min=SMALLEST_ABSMAX)
    full = len(values) - len(values) % block_size
    blocks = values[:full].view(-1, block_size) * (1 / absmax[: full // block_size, None])
    return blocks.view(-1) if full == len(values) else torch.cat([blocks.view(-1), values[full:] / absmax[-1]])


def _count_below(values: torch.Tensor, bounds: list[float]) -> torch.Tensor:
    """How many bounds lie below each value, uint8 [n]. On a CPU many times faster than torch.bucketize, a search for each value."""
    codes = (values > bounds[0]).to(torch.uint8)
    for bound in bounds[1:]:
        codes += (values > bound).view(torch.uint8)
    return codes
