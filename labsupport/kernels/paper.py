"""A product with quantized weights on paper: the bytes it has to move, and the batch at which it stops paying."""

from __future__ import annotations

import math


def bytes_moved(
    batch: int, in_features: int, out_features: int, bits: int, group_size: int, kept_width: int | None = None
) -> float:
    """Bytes that cross the memory in a product with weights of `bits` bits, each once.

    Every group has a 16-bit scale and a `bits`-bit zero-point; activations and outputs have 16 bits. kept_width: where the weight
    is dequantized into memory first, in that many bits, and multiplied from there: written once and read once.
    """
    weights = in_features * out_features
    stored = (weights * bits + weights / group_size * (16 + bits)) / 8
    between = 0 if kept_width is None else 2 * weights * kept_width / 8
    return stored + between + 2 * batch * (in_features + out_features)


def crossover(read: float, operations: float, bandwidth: float, rate: float, narrow_rate: float) -> int | None:
    """The smallest batch at which a kernel for narrow weights takes at least as long as that for 16-bit weights; None if never.

    read: bytes of the weight in 16 bits, of which the narrow one has fewer. operations: of one row of the batch. rate, narrow_rate:
    operations a second of either kernel. Each takes the longer of reading its weight once and doing its operations.
    """
    if narrow_rate > rate:  # ahead in both
        return None
    # The slower arithmetic catches up with the 16-bit kernel while that still reads: so the two meet at the time of its reading.
    return max(1, math.ceil(read / bandwidth * narrow_rate / operations))
