"""Two tiny Llamas with random weights, small enough to keep: whole numbers times a power of two, exact in every dtype."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from interop.cases import AwqRun
from safetensors.torch import save_file

STEP = 2.0**-9
SAMPLES, LENGTH = 20, 64  # 1280 tokens: AutoAWQ's clip search then takes every second


@dataclass(frozen=True)
class Shape:
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = 128

    @property
    def config(self) -> dict[str, object]:
        """config.json as transformers before and after 5 reads it."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "vocab_size": self.vocabulary, "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.blocks, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads, "max_position_embeddings": 128, "tie_word_embeddings": True,
            "rope_theta": 10000.0, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float32",
        }  # fmt: skip


SHAPES = {"gqa": Shape(2, 128, 256, 4, 2), "mha": Shape(1, 128, 256, 4, 4)}
# Both rules, both group sizes; scaling alone, which changes no logit, also as published.
RUNS = {
    "gqa": (AwqRun(128), AwqRun(128, duo_scaling=False, quantize=False), AwqRun(64, clip=False, quantize=False)),
    "mha": (
        AwqRun(64),
        AwqRun(64, duo_scaling=False, quantize=False),
        AwqRun(128, clip=False, quantize=False),
        AwqRun(128, clip=False, quantize=False, patched=False),
    ),
}


def make(shape: Shape, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weights by name, whole numbers as int8 (norms float32), and tokens int64 [SAMPLES, LENGTH]."""
    generator = torch.Generator().manual_seed(seed)

    def whole(rows: int, columns: int, spread: float = 40.0) -> torch.Tensor:
        return (spread * torch.randn(rows, columns, generator=generator)).round().clamp(-127, 127).to(torch.int8)

    def norm() -> torch.Tensor:
        """As in a large model: a few channels far above the others. Steps of 1/64, so that float16 would hold them too."""
        weight = torch.exp(0.5 * torch.randn(shape.hidden, generator=generator))
        weight[torch.randperm(shape.hidden, generator=generator)[:3]] *= 6
        return (64 * weight).round().clamp(min=1) / 64

    kv = shape.hidden // shape.heads * shape.kv_heads
    weights = {"model.embed_tokens.weight": whole(shape.vocabulary, shape.hidden), "model.norm.weight": norm()}
    for block in range(shape.blocks):
        name = f"model.layers.{block}"
        weights |= {
            f"{name}.input_layernorm.weight": norm(),
            f"{name}.self_attn.q_proj.weight": whole(shape.hidden, shape.hidden, 15),
            f"{name}.self_attn.k_proj.weight": whole(kv, shape.hidden, 15),
            f"{name}.self_attn.v_proj.weight": whole(kv, shape.hidden, 25),
            f"{name}.self_attn.o_proj.weight": whole(shape.hidden, shape.hidden, 25),
            f"{name}.post_attention_layernorm.weight": norm(),
            f"{name}.mlp.gate_proj.weight": whole(shape.intermediate, shape.hidden, 25),
            f"{name}.mlp.up_proj.weight": whole(shape.intermediate, shape.hidden, 25),
            f"{name}.mlp.down_proj.weight": whole(shape.hidden, shape.intermediate, 25),
        }
    tokens = torch.randint(0, shape.vocabulary, (SAMPLES, LENGTH), generator=generator)
    return weights, tokens


def floats(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict, float32, in tensors of its own."""
    return {name: weight.float() * STEP if weight.dtype == torch.int8 else weight.clone() for name, weight in weights.items()}


def save(shape: Shape, weights: dict[str, torch.Tensor], directory: Path) -> None:
    """As a model directory that every version of transformers reads."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape.config, indent=1))
    save_file(floats(weights), directory / "model.safetensors", {"format": "pt"})
