"""Bytes and tokens a second on paper: what a model weighs, what a step has to read, and how fast a machine could be at best.

A roofline has two limits: bytes over bandwidth, and floating-point operations over the rate of a processor. A step takes at
least the longer of the two. Everything here is an upper bound on speed; what a kernel reaches is measured, not planned.
The KV cache is not in it: that is the subject of notebooks 09 and 15.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

GB, GIB = 10**9, 2**30
SCALE_BITS = 16


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-shaped model, which fix how many weights it has."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    head_width: int | None = None

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers inside the blocks: those that get quantized."""
        width = self.head_width or self.hidden // self.heads
        attention = self.hidden * width * (2 * self.heads + 2 * self.kv_heads)  # q and o, k and v
        return self.layers * (attention + 3 * self.hidden * self.intermediate)  # gate, up, down

    @property
    def embedding_parameters(self) -> int:
        """The input table. A step reads one row of it for each token, not the table."""
        return self.vocab * self.hidden

    @property
    def other_parameters(self) -> int:
        """Embedding, output head and norms: those that stay in 16 bits."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.embedding_parameters * (1 if self.tied else 2) + norms

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters


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


# From the config.json of meta-llama/Llama-2-7b-hf, codellama/CodeLlama-34b-hf and meta-llama/Llama-2-70b-hf.
LLAMA_7B = Shape("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000)
LLAMA_34B = Shape("CodeLlama-34B", 48, 8192, 22016, 64, 8, 32000)
LLAMA_70B = Shape("Llama-2-70B", 80, 8192, 28672, 64, 8, 32000)
SHAPES = (LLAMA_7B, LLAMA_34B, LLAMA_70B)

# Peak figures of the maker: dense (no sparsity), bf16 with float32 accumulation; fp16 on the T4, which has no bf16.
T4 = Device("T4", 320e9, 65e12, 16 * GB, "NVIDIA T4 datasheet")
RTX_4090 = Device("RTX 4090", 1008e9, 165.2e12, 24 * GB, "NVIDIA Ada GPU architecture whitepaper")
A100 = Device("A100 80GB SXM", 2039e9, 312e12, 80 * GB, "NVIDIA A100 datasheet")
H100 = Device("H100 SXM", 3350e9, 989.4e12, 80 * GB, "NVIDIA H100 datasheet, where 1979 teraFLOPS are with sparsity")
GPUS = (T4, RTX_4090, A100, H100)


def shape_of(config: Any, name: str) -> Shape:
    """The shape of a Hugging Face config. Llama-shaped models only: gated MLP, no biases."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Shape(
        name,
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        kv_heads,
        config.vocab_size,
        bool(config.tie_word_embeddings),
        getattr(config, "head_dim", None),
    )


def stored_bytes(quantized: int, others: int, bits: int, group_size: int) -> tuple[float, float]:
    """What a quantized model weighs, in bytes and in GiB.

    quantized: weights stored in `bits` bits, with a 16-bit scale and a `bits`-bit zero-point for each group of `group_size`.
    others: weights that stay in 16 bits.
    """
    groups = quantized / group_size
    total = (quantized * bits + groups * (SCALE_BITS + bits) + others * 16) / 8
    return total, total / GIB


def model_bytes(shape: Shape, bits: int, group_size: int = 128) -> float:
    """Stored bytes of all weights; 16 bits means not quantized."""
    if bits == 16:
        return 2.0 * shape.parameters
    return stored_bytes(shape.linear_parameters, shape.other_parameters, bits, group_size)[0]


def step_bytes(shape: Shape, bits: int, group_size: int = 128) -> float:
    """Bytes of weights that one decode step reads: all of them, but for the input table unless the head is that same table."""
    return model_bytes(shape, bits, group_size) - (0 if shape.tied else 2 * shape.embedding_parameters)


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
