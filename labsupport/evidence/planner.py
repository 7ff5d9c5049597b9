"""Bytes on paper: how many weights a model has, what they weigh, and how many of their bytes a step has to read.

The KV cache is not in it: that is the subject of notebooks 09 and 15.
"""

from __future__ import annotations

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
    def width(self) -> int:
        """Channels of one head."""
        return self.head_width or self.hidden // self.heads

    @property
    def block_linears(self) -> dict[str, tuple[int, int]]:
        """The linears of one block: those that get quantized. Name to (out_features, in_features)."""
        hidden, queries, keys = self.hidden, self.heads * self.width, self.kv_heads * self.width
        return {
            "q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries),
            "gate_proj": (self.intermediate, hidden), "up_proj": (self.intermediate, hidden),
            "down_proj": (hidden, self.intermediate),
        }  # fmt: skip

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers inside the blocks."""
        return self.layers * sum(rows * columns for rows, columns in self.block_linears.values())

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


# From the config.json of meta-llama/Llama-2-7b-hf, codellama/CodeLlama-34b-hf and meta-llama/Llama-2-70b-hf.
LLAMA_7B = Shape("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000)
LLAMA_34B = Shape("CodeLlama-34B", 48, 8192, 22016, 64, 8, 32000)
LLAMA_70B = Shape("Llama-2-70B", 80, 8192, 28672, 64, 8, 32000)
SHAPES = (LLAMA_7B, LLAMA_34B, LLAMA_70B)


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
