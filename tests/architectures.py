"""Tiny models of the architectures that people use, with random weights: one config a name, made when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

VOCABULARY = 320
LLAMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
OPT = {
    "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256,
    "word_embed_proj_dim": 64,
}  # fmt: skip
NEOX = LLAMA | {"num_key_value_heads": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# Name: transformers' model_type, and what differs from its defaults.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama3": ("llama", LLAMA | {"rope_parameters": LLAMA3_ROPE}),
    "llama-biases-tied": ("llama", LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-72-wide": ("llama", LLAMA | {"hidden_size": 72, "intermediate_size": 144, "head_dim": 18}),
    "llama-960-wide": (
        "llama", {
            "hidden_size": 960, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 30, "head_dim": 16,
            "num_key_value_heads": 10, "max_position_embeddings": 256,
        },
    ),
    "qwen2": ("qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2-sliding": ("qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen2-moe": ("qwen2_moe", LLAMA | MOE | {"shared_expert_intermediate_size": 64, "decoder_sparse_step": 1}),
    "qwen3-moe": ("qwen3_moe", LLAMA | MOE | {"head_dim": 16}),
    "mistral": ("mistral", LLAMA | {"sliding_window": 16}),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("gemma", LLAMA | {"head_dim": 32}),
    "gemma2": ("gemma2", LLAMA | {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3_text", LLAMA | {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}),
    "phi": ("phi", NEOX),
    "phi3": ("phi3", LLAMA | {"pad_token_id": 0}),
    "opt": ("opt", OPT),
    "opt-350m": ("opt", OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "gpt2": ("gpt2", GPT2),
    "gpt-neox": ("gpt_neox", {k: v for k, v in NEOX.items() if k != "num_key_value_heads"}),
    "gpt-j": ("gptj", GPT2 | {"rotary_dim": 8}),
    "gpt-neo": (
        "gpt_neo",
        {
            "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 256, "intermediate_size": 96,
            "attention_types": [[["global", "local"], 1]], "window_size": 16,
        },
    ),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "falcon",
        {
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True, "parallel_attn": True,
            "alibi": False,
        },
    ),
    "bigcode": ("gpt_bigcode", GPT2 | {"multi_query": True}),
    "starcoder2": ("starcoder2", LLAMA | {"sliding_window": 16}),
    "cohere": ("cohere", LLAMA),
    "glm4": ("glm4", LLAMA | {"head_dim": 16, "pad_token_id": 0}),
    "olmo2": ("olmo2", LLAMA),
    "granite": ("granite", LLAMA),
    "stablelm": ("stablelm", LLAMA),
    "smollm3": ("smollm3", LLAMA | {"pad_token_id": 0}),
}  # fmt: skip

# For tests of one thing in every architecture: what `labs test --quick` tries too. Plain blocks, sliding windows, experts, caps,
# fused and transposed linears, one head of keys for all.
QUICK = ("llama3", "qwen2-sliding", "mixtral", "gemma2", "gpt2", "falcon")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]


def make(name: str) -> nn.Module:
    """The model with this name, float32, ready to evaluate; the same weights each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = CONFIGS[name]
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **settings)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norms and biases off their defaults, so that one that is forgotten shows.
            parameter.copy_(0.06 * noise) if parameter.ndim > 1 else parameter.add_(0.05 * noise)
    return model.float().eval()


def write(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model as a directory, with a tokenizer whose tokens are bytes. Returns the directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make(name).to(dtype).save_pretrained(directory)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return directory
