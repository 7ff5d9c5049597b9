"""From a config.json to a `Shape`. What is counted is what transformers builds from the same config: tests compare the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from labsupport.evidence.shapes import Experts, Latent, Shape

Config = Mapping[str, Any]


def shape_of(config: Any, name: str) -> Shape:
    """The shape that a config.json describes: a mapping, a config of transformers, or an object with these attributes.

    Of a model that also sees or hears it is the shape of its language model.
    Raises ValueError for a model_type that is not in FAMILIES, and for a size that is missing or no whole number above 0.
    """
    if not isinstance(config, Mapping):
        config = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    native = (config.get("quantization_config") or {}).get("quant_method")
    if isinstance(config.get("text_config"), Mapping):
        config = config["text_config"]
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type is {kind!r}, whose sizes are not known here; known are {', '.join(FAMILIES)}")
    return FAMILIES[kind](config, {"name": name, "native": native})


def _whole(config: Config, *names: str, default: int | None = None) -> int:
    """The first of the names that the config has."""
    found = next((config[name] for name in names if config.get(name) is not None), default)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"{names[0]} is {found!r} in the config, wanted a whole number above 0")
    return found


def _common(config: Config, fields: dict[str, Any], tied: bool = False, width: int | None = None) -> Shape:
    """What nearly all configs say by the same names; small tensors are still a Llama's. tied, width: its defaults."""
    heads = _whole(config, "num_attention_heads")
    hidden = _whole(config, "hidden_size")
    width = _whole(config, "head_dim", default=width or max(1, hidden // heads))
    return Shape(
        layers=_whole(config, "num_hidden_layers"), vocab=_whole(config, "vocab_size"),
        hidden=hidden, heads=heads, head_width=width,
        intermediate=_whole(config, "intermediate_size", "ffn_dim", default=4 * hidden),
        kv_heads=_whole(config, "num_key_value_heads", "num_kv_heads", default=heads),
        tied=bool(config.get("tie_word_embeddings", tied)),
        **fields,
    )  # fmt: skip


def _windows(config: Config, shape: Shape, sees_all: Callable[[int], bool] = lambda layer: False) -> tuple[int, ...]:
    """The window of each layer. sees_all(layer): what holds where the config has no layer_types."""
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return ()
    window = _whole(config, "sliding_window")
    kinds = config.get("layer_types") or ["full" if sees_all(i) else "sliding_attention" for i in range(shape.layers)]
    if len(kinds) != shape.layers:
        raise ValueError(f"layer_types has {len(kinds)} entries, wanted one for each of {shape.layers} layers")
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _llama(config: Config, fields: dict[str, Any]) -> Shape:
    """Llama, Mistral, Phi-3, SmolLM3, Granite; Qwen2, whose queries, keys and values have biases. RMSNorm before both halves."""
    kind = config["model_type"]
    shape = _common(config, fields, tied=kind == "smollm3")
    queries, keys = shape.heads * shape.width, shape.kv_heads * shape.width
    small = shape.small_parameters
    if kind == "qwen2":
        small += shape.layers * (queries + 2 * keys)
    elif config.get("attention_bias"):
        small += shape.layers * (queries + 2 * keys + shape.hidden)
    if config.get("mlp_bias"):
        small += shape.layers * (2 * shape.intermediate + shape.hidden)
    if kind in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", 28)
        return replace(shape, small=small, windows=_windows(config, shape, lambda layer: layer < first))
    windows = _windows(config, shape) if kind in ("mistral", "phi3") else ()
    return replace(shape, small=small, windows=windows)


def _qwen3(config: Config, fields: dict[str, Any]) -> Shape:
    """Each head's query and key pass a norm of their own."""
    shape = _llama(config, fields)
    shape = replace(shape, head_width=_whole(config, "head_dim", default=128))
    return replace(shape, small=shape.small_parameters + shape.layers * 2 * shape.width)


def _qwen3_moe(config: Config, fields: dict[str, Any]) -> Shape:
    shape = _qwen3(config, fields)
    step, dense = _whole(config, "decoder_sparse_step", default=1), config.get("mlp_only_layers") or []
    sparse = sum(1 for layer in range(shape.layers) if (layer + 1) % step == 0 and layer not in dense)
    count = _whole(config, "num_experts", "num_local_experts")
    experts = Experts(sparse, count, _whole(config, "num_experts_per_tok"), _whole(config, "moe_intermediate_size"))
    return replace(shape, experts=experts, small=shape.small_parameters + sparse * count * shape.hidden)


def _mixtral(config: Config, fields: dict[str, Any]) -> Shape:
    shape = _common(config, fields)
    count = _whole(config, "num_local_experts")
    experts = Experts(shape.layers, count, _whole(config, "num_experts_per_tok"), shape.intermediate)
    small = shape.small_parameters + shape.layers * count * shape.hidden
    return replace(shape, experts=experts, small=small, windows=_windows(config, shape))


def _gemma(config: Config, fields: dict[str, Any]) -> Shape:
    """Norms before and after both halves; head and table are one. Layers with a window and without take turns."""
    kind = config["model_type"]
    shape = _common(config, fields, tied=True, width=256)
    small = (4 * shape.layers + 1) * shape.hidden
    if kind == "gemma3_text":
        small += shape.layers * 2 * shape.width
    turn = _whole(config, "sliding_window_pattern", "_sliding_window_pattern", default=6) if kind == "gemma3_text" else 2
    return replace(shape, small=small, windows=_windows(config, shape, lambda layer: (layer + 1) % turn == 0))


def _deepseek(config: Config, fields: dict[str, Any]) -> Shape:
    shape = _common(config, fields)
    rank, query_rank = _whole(config, "kv_lora_rank"), config.get("q_lora_rank")
    latent = Latent(
        rank, _whole(config, "qk_rope_head_dim"), _whole(config, "qk_nope_head_dim"), _whole(config, "v_head_dim"),
        _whole(config, "q_lora_rank") if query_rank is not None else None,
    )  # fmt: skip
    small = shape.small_parameters + shape.layers * (rank + (latent.query_rank or 0))
    if not config.get("n_routed_experts"):
        return replace(shape, latent=latent, small=small)
    width, count = _whole(config, "moe_intermediate_size"), _whole(config, "n_routed_experts")
    sparse = max(0, shape.layers - int(config.get("first_k_dense_replace") or 0))
    shared = width * int(config.get("n_shared_experts") or 0)
    experts = Experts(sparse, count, _whole(config, "num_experts_per_tok"), width, shared)
    return replace(shape, latent=latent, experts=experts, small=small + sparse * count * shape.hidden)


def _gpt_oss(config: Config, fields: dict[str, Any]) -> Shape:
    """Biases everywhere, those of experts and routers too; a sink for each head. Every other layer has a window."""
    shape = _common(config, fields, width=64)
    count, queries, keys = _whole(config, "num_local_experts"), shape.heads * shape.width, shape.kv_heads * shape.width
    experts = Experts(shape.layers, count, _whole(config, "num_experts_per_tok"), shape.intermediate)
    of_layer = queries + 2 * keys + shape.hidden + shape.heads + count * (shape.hidden + 1 + 2 * shape.intermediate + shape.hidden)
    windows = _windows(config, shape, lambda layer: layer % 2 == 1)
    return replace(shape, experts=experts, small=shape.small_parameters + shape.layers * of_layer, windows=windows)


def _olmo2(config: Config, fields: dict[str, Any]) -> Shape:
    """Norms after both halves, and over all queries and all keys of a token."""
    shape = _common(config, fields)
    return replace(shape, small=shape.small_parameters + shape.layers * (shape.heads + shape.kv_heads) * shape.width)


def _falcon(config: Config, fields: dict[str, Any]) -> Shape:
    """Attention and MLP beside each other, LayerNorms with biases; one key and one value for all heads, or num_kv_heads of them."""
    if config.get("bias") or config.get("alibi") or not config.get("parallel_attn", True):
        raise ValueError("a Falcon with bias, alibi or without parallel_attn is not known here")
    shape = _common(config, fields, tied=True)
    norms = 2 if config.get("new_decoder_architecture") and config.get("num_ln_in_parallel_attn") != 1 else 1
    if not config.get("new_decoder_architecture"):
        shape = replace(shape, kv_heads=1 if config.get("multi_query", True) else shape.heads)
    return replace(shape, gated=False, small=2 * shape.hidden * (norms * shape.layers + 1))


def _opt(config: Config, fields: dict[str, Any]) -> Shape:
    """LayerNorms and linears with biases, a table of positions that begins with two unused rows."""
    shape = _common(config, fields, tied=True)
    if config.get("word_embed_proj_dim", shape.hidden) != shape.hidden or not config.get("do_layer_norm_before", True):
        raise ValueError("an OPT whose embedding has another width than its blocks, or with norms after them, is not known here")
    positions = (_whole(config, "max_position_embeddings", default=2048) + 2) * shape.hidden
    of_layer = 4 * shape.hidden + 4 * shape.hidden + shape.intermediate + shape.hidden
    return replace(shape, gated=False, small=positions + 2 * shape.hidden + shape.layers * of_layer)


FAMILIES: dict[str, Callable[[Config, dict[str, Any]], Shape]] = {
    **dict.fromkeys(("llama", "mistral", "phi3", "smollm3", "granite", "qwen2"), _llama),
    "qwen3": _qwen3, "qwen3_moe": _qwen3_moe, "mixtral": _mixtral,
    **dict.fromkeys(("gemma2", "gemma3_text"), _gemma),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _deepseek),
    "gpt_oss": _gpt_oss, "olmo2": _olmo2, "falcon": _falcon, "opt": _opt,
}  # fmt: skip
