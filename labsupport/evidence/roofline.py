"""Seconds and tokens a second on paper: how fast a machine could be at best.

A roofline has two limits: bytes over bandwidth, and floating-point operations over the rate of a processor. A step takes at
least the longer of the two. Everything here is an upper bound on speed; what a kernel reaches is measured, not planned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What a roofline needs. bandwidth: bytes/s. rate: dense floating-point operations/s. memory: bytes. source: who says so."""

    name: str
    bandwidth: float
    rate: float
    memory: float
    source: str

    @property
    def ridge(self) -> float:
        """Operations a byte at which both limits meet."""
        return self.rate / self.bandwidth


# Peak figures of the maker: dense (no sparsity), bf16 with float32 accumulation; fp16 on the T4, which has no bf16.
T4 = Device("T4", 320e9, 65e12, 16e9, "NVIDIA T4 datasheet")
RTX_4090 = Device("RTX 4090", 1008e9, 165.2e12, 24e9, "NVIDIA Ada GPU architecture whitepaper")
A100 = Device("A100 80GB SXM", 2039e9, 312e12, 80e9, "NVIDIA A100 datasheet")
H100 = Device("H100 SXM", 3350e9, 989.4e12, 80e9, "NVIDIA H100 datasheet, where 1979 teraFLOPS are with sparsity")
GPUS = (T4, RTX_4090, A100, H100)


def intensity(tokens: int, in_features: int, out_features: int, weight_bits: float) -> float:
    """Operations a byte of [tokens, in] times [in, out], when weights, inputs and outputs cross the memory once.

    A multiplication and an addition count as two operations. Inputs and outputs are in 16 bits.
    """
    operations = 2 * tokens * in_features * out_features
    moved = in_features * out_features * weight_bits / 8 + 2 * tokens * (in_features + out_features)
    return operations / moved


def matmul_seconds(tokens: int, in_features: int, out_features: int, weight_bits: float, device: Device) -> float:
    """The least time that a matrix product can take: the longer of moving its bytes and doing its operations."""
    operations = 2 * tokens * in_features * out_features
    moved = operations / intensity(tokens, in_features, out_features, weight_bits)
    return max(moved / device.bandwidth, operations / device.rate)


def decode_rate(read: float, parameters: float, batch: int, bandwidth: float, rate: float) -> float:
    """Tokens a second, at most, of `batch` sequences decoded together.

    read: bytes of weights that a step reads, once for the whole batch. parameters: weights that each token is multiplied with.
    """
    seconds = max(read / bandwidth, 2 * parameters * batch / rate)
    return batch / seconds


def crossover_batch(bandwidth: float, rate: float, weight_bits: float) -> int:
    """The smallest batch whose operations take at least as long as reading the weights. Activations are left out."""
    return math.ceil(rate / bandwidth * weight_bits / 16)


def what_limits(seconds: float, read: float, operations: float, bandwidth: float, rate: float) -> str:
    """ "memory" or "compute", whichever a run used the larger share of, or "overhead" if it used less than a third of either."""
    of_memory = read / seconds / bandwidth
    of_compute = operations / seconds / rate
    if max(of_memory, of_compute) < 1 / 3:
        return "overhead"
    return "memory" if of_memory > of_compute else "compute"
