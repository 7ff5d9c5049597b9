"""How fast the quantizers are, against copying the weight and against bitsandbytes, in one run on this machine: `labs bench`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from labsupport import peers
from labsupport.machine import median_seconds
from labsupport.quant import int8, nf4, rtn


@dataclass(frozen=True)
class Timing:
    """Median seconds of one piece of work on a float32 weight, of copying that weight, and of bitsandbytes doing the same."""

    name: str
    seconds: float
    copy: float
    theirs: float | None = None

    @property
    def passes(self) -> float:
        """How many copies of the weight would take as long. 1 is the limit for what reads and writes it whole."""
        return self.seconds / self.copy

    @property
    def ratio(self) -> float | None:
        """How many times as fast as bitsandbytes."""
        return None if self.theirs is None else self.theirs / self.seconds


def quantizers(rows: int = 4096, columns: int = 4096, budget: float = 1.0) -> Iterator[Timing]:
    """Quantize and dequantize a normal weight [rows, columns] by every method. budget: seconds for each piece of work.

    Raises ValueError where a row is not whole groups of 128.
    """
    if rows < 1 or columns < 1 or columns % 128:
        raise ValueError(f"the weight is {rows} x {columns}, wanted at least one row, and columns in groups of 128")
    functional = peers.bitsandbytes().functional
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    target = torch.empty_like(weight)
    copy = median_seconds(lambda: target.copy_(weight), "cpu", budget)

    def timing(name: str, work, theirs=None) -> Timing:
        peer = None if theirs is None else median_seconds(theirs, "cpu", budget)
        return Timing(name, median_seconds(work, "cpu", budget), copy, peer)

    for bits in (4, 3):
        yield timing(f"rtn {bits} bits g128: quantize", partial(rtn.quantize, weight, bits, 128))
        yield timing(f"rtn {bits} bits g128: dequantize", rtn.quantize(weight, bits, 128).dequantize)
    for kind, double in (("nf4", False), ("nf4", True), ("fp4", False)):
        name = kind.upper() + (" double" if double else "")
        theirs = partial(functional.quantize_4bit, weight, quant_type=kind, compress_statistics=double)
        yield timing(f"{name}: quantize", partial(nf4.quantize, weight, kind, 64, double), theirs)
        packed, state = theirs()
        stored = nf4.quantize(weight, kind, 64, double)
        yield timing(f"{name}: dequantize", stored.dequantize, partial(functional.dequantize_4bit, packed, state))
    half = weight.half()
    theirs = partial(functional.int8_vectorwise_quant, half)
    codes, absmax, _ = theirs()
    yield timing("int8 rows, from float16: quantize", partial(int8.quantize, half), theirs)
    stored = int8.quantize(half)
    yield timing("int8 rows: dequantize", stored.dequantize, partial(functional.int8_vectorwise_dequant, codes, absmax))
