"""A product with quantized weights on paper: the bytes it has to move, and the batch at which it stops paying."""

from __future__ import annotations

import math


def bytes_moved(
    batch: int, in_features: int, out_features: int, bits: int, group_size: int, kept_width: int | None = None
) -> float:
    """Bytes that cross the memory in a product with weights of `bits` bits, each once.

    Every group has a 16-bit scale and a `bits`-bit zero-point; activations and outputs have 16 bits. kept_width: if the weight is
    first dequantized into memory, in how many bits; it is then written once and read once more.
    """
    weights = in_features * out_features
    stored = (weights * bits + weights / group_size * (16 + bits)) / 8
    dequantized = 0 if kept_width is None else 2 * weights * kept_width / 8
    return stored + dequantized + 2 * batch * (in_features + out_features)


def crossover(read: float, operations: float, bandwidth: float, rate: float, narrow_rate: float) -> int | None:
    """The smallest batch at which a kernel for narrow weights takes at least as long as that for 16-bit weights; None if never.

    read: bytes of the weight in 16 bits; the narrow one has fewer. operations: of one row of the batch. rate, narrow_rate:
    operations a second of each kernel. Each takes the longer of the times for reading its weight once and for doing its operations.
    """
    if narrow_rate > rate:  # reads less and computes faster
        return None
    # The narrow kernel computes more slowly, so its time reaches that of the 16-bit kernel while the latter is still reading.
    return max(1, math.ceil(read / bandwidth * narrow_rate / operations))
