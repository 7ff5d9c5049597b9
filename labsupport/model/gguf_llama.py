"""A Llama in llama.cpp's GGUF, as the plain directory that transformers reads: config, float32 weights, tokenizer.

Weights that are quantized in the file are dequantized: their values, and so what the model computes, stay as they are stored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from labsupport.model.files import save_tensors

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONTROL = 3  # tokenizer.ggml.token_type of tokens that are no text
DIGIT_BY_DIGIT = "smollm"  # tokenizer.ggml.pre of tokenizers that never join digits


class GGUFError(ValueError):
    """A GGUF file holds something else than a Llama with a byte-level BPE tokenizer."""


def convert(path: Path, out: Path, progress: bool = False) -> dict[str, str]:
    """Write the model in a GGUF file into the directory `out`. Returns the type that each tensor was stored in, by its new name."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    config = read_config(reader)
    (out / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "generation_config.json").write_text(json.dumps(ids, indent=1), "utf-8")
    read_tokenizer(reader).save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(reader, config), indent=1), "utf-8")
    tensors, types = read_tensors(reader, config, progress)
    save_tensors(out / "model.safetensors", tensors, {"format": "pt"})
    return types


def _value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """What the file says under a key. Raises GGUFError where it says nothing and there is no default."""
    field = reader.get_field(key)
    if field is None and default is None:
        raise GGUFError(f"the GGUF file has no {key}")
    return default if field is None else field.contents()


def read_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM. Raises GGUFError for another architecture."""
    if (architecture := _value(reader, "general.architecture")) != "llama":
        raise GGUFError(f"the GGUF file holds a {architecture}, wanted a llama")
    heads, hidden = _value(reader, "llama.attention.head_count"), _value(reader, "llama.embedding_length")
    theta = float(_value(reader, "llama.rope.freq_base", 10000.0))
    head_dim = _value(reader, "llama.attention.key_length", hidden // heads)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(_value(reader, "tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "hidden_act": "silu",
        "rms_norm_eps": _shortest(_value(reader, "llama.attention.layer_norm_rms_epsilon")),
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "use_cache": True,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id", _value(reader, "tokenizer.ggml.eos_token_id")),
        "torch_dtype": "float32",
        # The same fact for old and new versions of transformers.
        "rope_theta": theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
    }


def _shortest(value: float) -> float:
    """The number with the fewest digits that is the same in float32: 1e-05, which the file holds as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def read_tokenizer(reader: GGUFReader) -> Tokenizer:
    """Byte-level BPE with the file's tokens and merges. Raises GGUFError for another kind of tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, rule = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or rule not in ("gpt-2", DIGIT_BY_DIGIT):
        raise GGUFError(f"the GGUF file has a tokenizer {kind!r} that splits text as {rule!r}: labs does not know it")
    tokens, types = _value(reader, "tokenizer.ggml.tokens"), _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == DIGIT_BY_DIGIT:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of_words])
    else:
        tokenizer.pre_tokenizer = bytes_of_words
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def tokenizer_config(reader: GGUFReader, config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json."""
    tokens = _value(reader, "tokenizer.ggml.tokens")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[_value(reader, "tokenizer.ggml.unknown_token_id", config["eos_token_id"])],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    template = reader.get_field("tokenizer.chat_template")
    return settings | ({} if template is None else {"chat_template": template.contents()})


def read_tensors(reader: GGUFReader, config: dict[str, Any], progress: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """float32 weights by the names that transformers has for them, and the type in which each was stored.

    Raises GGUFError for a tensor that a Llama does not have.
    """
    from gguf import quants

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors, types = {}, {}
    for stored in tqdm(reader.tensors, desc="converting", unit="tensor", disable=not progress):
        part = stored.name.split(".")[-2] if stored.name.count(".") else ""
        name = name_of(stored.name)
        weight = torch.from_numpy(np.array(quants.dequantize(stored.data, stored.tensor_type), dtype=np.float32))
        tensors[name] = halves_together(weight, heads[part]) if part in heads else weight
        types[name] = stored.tensor_type.name
    return tensors, types


def name_of(stored: str) -> str:
    """blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight. Raises GGUFError for a tensor that a Llama does not have."""
    match stored.split("."):
        case [part, "weight"] if part in OUTSIDE:
            return f"{OUTSIDE[part]}.weight"
        case ["blk", number, part, "weight"] if part in INSIDE and number.isdecimal():
            return f"model.layers.{number}.{INSIDE[part]}.weight"
    raise GGUFError(f"the GGUF file holds {stored}, which is not of a plain Llama")


def stored_name(module: str) -> str:
    """The inverse of `name_of`, from a module's name."""
    for stored, name in OUTSIDE.items():
        if module == name:
            return f"{stored}.weight"
    number, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{next(stored for stored, name in INSIDE.items() if name == part)}.weight"


def halves_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in the order of transformers, [heads * head_dim, in]; a row may be weights or the bytes of blocks.

    The rotary embedding turns pairs of channels. In a head of GGUF's Llamas the two stand side by side, in transformers' they are
    i and i + head_dim / 2.
    """
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])  # [heads, head_dim / 2, 2, in]
    return pairs.transpose(1, 2).reshape(weight.shape)


def pairs_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `halves_together`: rows in the order of GGUF."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])  # [heads, 2, head_dim / 2, in]
    return halves.transpose(1, 2).reshape(weight.shape)
