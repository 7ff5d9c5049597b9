"""Attention that reads keys and values as a quantized cache would give them back: a whole decode in one forward pass."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from labsupport.model import models
from labsupport.quant import kv
from labsupport.quant.kv import Scheme


def frequencies_of(model: nn.Module) -> torch.Tensor:
    """`inv_freq` of the model's rotary embedding. Raises ModelError where there is none, or more than one."""
    embeddings = {id(m): m.inv_freq for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)}
    if len(embeddings) != 1:
        found = len(embeddings) or "no"
        raise models.ModelError(f"found {found} rotary embedding{'s' * (found != 'no')} in a {type(model).__name__}, wanted one")
    return next(iter(embeddings.values()))


def rotation_of(model: nn.Module) -> torch.Tensor | None:
    """What keys are turned back by, float [width / 2]. None, with a line that says why, where they cannot be: a model of one's own
    may learn its positions, as OPT does, or turn other channels.
    """
    try:
        check_rotation(model)
    except models.ModelError as error:
        print(f"There are no keys before RoPE to look at: {error}.")
        return None
    return frequencies_of(model)


@contextmanager
def reading_back(model: nn.Module, scheme: Scheme) -> Iterator[nn.Module]:
    """Inside, one forward pass without a cache gives the logits of a decode token by token through a QuantizedCache.

    At position t the cache holds t + 1 tokens, of which the first `stored(t + 1)` read back quantized, and what they read back as
    does not change when more come. So there are two products, one with the keys as they are and one with what they read back
    as, and each query takes from either; the same for values. Sequences start at position 0 and are not padded. What a query may
    see (all before it, or a sliding window) is the model's own mask, and scores are capped where the model caps them.

    Raises ModelError for a model whose attention cannot be replaced: whose logits would change with a cache that stores everything
    unrounded. And for keys that cannot be rotated back, where `scheme` stores them before the rotary embedding.
    """
    _check_replaceable(model)
    if scheme.before_rope:
        check_rotation(model)
    with _attending(model, scheme):
        yield model


@contextmanager
def _attending(model: nn.Module, scheme: Scheme) -> Iterator[list[torch.Tensor]]:
    """Inside, the model's attention reads keys and values as `scheme` would give them back. Yields the keys of each call so far."""
    frequencies, called = frequencies_of(model) if scheme.before_rope else None, []

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
        called.append(key)
        tokens, positions = key.shape[2], torch.arange(key.shape[2], device=key.device)
        if attention_mask is not None and not _is_causal(attention_mask):
            raise ValueError("attention_mask is given, but this pass is for sequences that are not padded")
        if scheme.before_rope:
            key = kv.rotate(key, positions, frequencies.to(key.device), back=True)
        read_keys, read_values = (_read_back(s, part) for s, part in ((key, scheme.keys), (value, scheme.values)))
        if scheme.before_rope:
            key, read_keys = (k if k is None else kv.rotate(k, positions, frequencies.to(k.device)) for k in (key, read_keys))
        query = query.unflatten(1, (key.shape[1], -1))  # heads that share a key side by side
        scores = _chosen(query, key, read_keys, scheme.keys, lambda q, k: q @ k[:, :, None].transpose(3, 4))
        seen = positions <= positions[:, None]
        if attention_mask is not None:
            seen = seen & seen_through(attention_mask)[:, :, None]
        weights = weights_of(scores, seen, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap).to(query.dtype)
        if read_values is None:
            output = weights @ value[:, :, None]
        else:
            quantized = _quantized(scheme.values, tokens, key.device)
            output = (weights * quantized) @ read_values[:, :, None] + (weights * ~quantized) @ value[:, :, None]
        return output.flatten(1, 2).transpose(1, 2).contiguous(), None

    with attending(model, "labsupport_reading_back", attend):
        yield called


@contextmanager
def attending(module: nn.Module, name: str, attend: Callable[..., Any]) -> Iterator[Callable[[nn.Module], Callable[..., Any]]]:
    """Inside, attend(attention, query, key, value, mask, **settings) computes the attention of a model, or of one of its blocks.

    Yields what gives the function that an attention module would call otherwise. name: under which transformers knows `attend`.
    """
    inside = [m for m in module.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")]
    configs = {id(m.config): m.config for m in inside}
    before = {key: config._attn_implementation for key, config in configs.items()}

    def original(attention: nn.Module) -> Callable[..., Any]:
        eager = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(before[id(attention.config)], eager)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, eager_mask)
    for config in configs.values():
        config._attn_implementation = name
    try:
        yield original
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def weights_of(scores: torch.Tensor, seen: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """The weights of an attention, in float32 at least. scores: [.., queries, tokens]. seen: bool, of a shape that fits."""
    scores = scores * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, -math.inf).softmax(-1, dtype=torch.float32 if scores.dtype.itemsize < 4 else None)


def seen_through(mask: torch.Tensor) -> torch.Tensor:
    """bool [batch, heads or 1, queries, keys]: which key a query may see, of a mask of True and False or one that is added."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _is_causal(mask: torch.Tensor) -> bool:
    """Whether every query of every sequence sees itself and the mask is the same for all sequences: none is padded."""
    seen = seen_through(mask)
    return bool(seen.diagonal(dim1=-2, dim2=-1).all()) and bool((seen == seen[:1]).all())


CHECKED_TOKENS = 48
# Two ways to add up the same products differ by some units in the last place; a mask or a cap that is lost by tens of percent.
SAME = {torch.float32: 1e-3, torch.float64: 1e-6}
SAME_IN_HALF = 5e-2


def same(dtype: torch.dtype) -> float:
    """By how much of its size the output of an attention may move where another function computes the same."""
    return SAME.get(dtype, SAME_IN_HALF)


@torch.no_grad()
def _check_replaceable(model: nn.Module) -> None:
    """Raise ModelError unless the model computes the same through our attention with a cache that stores everything as it comes."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    length = CHECKED_TOKENS + (window if isinstance(window, int) and window < 1024 else 0)  # a longer one is its mask's affair
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    ids = (torch.arange(2 * length).view(2, length) * 7919 % config.vocab_size).to(next(model.parameters()).device)
    original = model(input_ids=ids, use_cache=False).logits.float()
    with _attending(model, kv.FLOAT) as called:
        replaced = model(input_ids=ids, use_cache=False).logits.float()
    kind, layers = type(model).__name__, len(models.blocks(model))
    if len(called) != layers:
        raise models.ModelError(
            f"the attention of a {kind} cannot be replaced: {len(called)} of its {layers} layers ask transformers for it by name. "
            "Decode through cache.QuantizedCache instead"
        )
    difference = ((replaced - original).norm() / original.norm()).item()
    if not difference <= same(model.dtype):
        raise models.ModelError(
            f"the attention of a {kind} does more than the one that replaces it: with nothing quantized its logits move by "
            f"{difference:.2g} of their size. Decode through cache.QuantizedCache instead"
        )


@torch.no_grad()
def check_rotation(model: nn.Module) -> None:
    """Raise ModelError where kv.rotate cannot rotate keys back: a rotary embedding of a part of a head, or of other pairs.

    The first layer is fed the same token at every position, so its keys differ by their rotation alone.
    """
    frequencies, kind = frequencies_of(model), type(model).__name__
    ids = torch.full((1, 9), 5, device=next(model.parameters()).device)
    with _attending(model, kv.FLOAT) as called:
        model(input_ids=ids, use_cache=False)
    if not called:
        raise models.ModelError(f"the keys of a {kind} cannot be read, so they cannot be stored before the rotary embedding")
    keys = called[0].float()
    if 2 * len(frequencies) != keys.shape[-1]:
        raise models.ModelError(
            f"the rotary embedding of a {kind} turns {2 * len(frequencies)} of the {keys.shape[-1]} channels of a key: "
            "labsupport cannot store keys before it"
        )
    back = kv.rotate(keys, torch.arange(keys.shape[2], device=keys.device), frequencies.float().to(keys.device), back=True)
    if (back - back[:, :, :1]).abs().max() > 1e-2 * keys.abs().max():
        raise models.ModelError(
            f"the rotary embedding of a {kind} turns other pairs of channels than i and i + width / 2: "
            "labsupport cannot store keys before it"
        )


def _read_back(states: torch.Tensor, part: kv.Part) -> torch.Tensor | None:
    """The states with all tokens that a cache of their length has quantized as they read back; None where it has none."""
    stored = part.stored(states.shape[2])
    if not stored:
        return None
    return torch.cat([kv.quantize(states[:, :, :stored], part).dequantize().to(states.dtype), states[:, :, stored:]], dim=2)


def _quantized(part: kv.Part, tokens: int, device: torch.device) -> torch.Tensor:
    """bool [tokens, tokens]: whether the query of a row finds the token of a column quantized."""
    stored = torch.tensor([part.stored(t + 1) for t in range(tokens)], device=device)
    return torch.arange(tokens, device=device) < stored[:, None]


def _chosen(query, key, read, part, product):
    if read is None:
        return product(query, key)
    quantized = _quantized(part, key.shape[2], key.device)
    if quantized.tril().sum() == torch.ones_like(quantized).tril().sum():  # nothing waits: every key that counts is quantized
        return product(query, read)
    return torch.where(quantized, product(query, read), product(query, key))
