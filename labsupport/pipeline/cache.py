"""A quantized cache inside a model: one that `generate` accepts, and one pass that reads what a decode step by step would.

transformers' own QuantizedCache gives the first tokens it is fed back unrounded, so one forward pass through it measures nothing.
The cache here returns what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from labsupport.model import models
from labsupport.model.evaluate import BATCH, LENGTH, Evaluation, Interval, evaluate
from labsupport.model.text import TokenStream
from labsupport.quant import kv
from labsupport.quant.kv import Scheme


class QuantizedLayer(DynamicLayer):
    """The cache of one layer. frequencies: float [width / 2], needed where keys are stored before the rotary embedding."""

    is_croppable = False

    def __init__(self, scheme: Scheme, frequencies: torch.Tensor | None = None):
        super().__init__()
        if scheme.before_rope and frequencies is None:
            raise ValueError("frequencies is None, but keys stored before the rotary embedding are rotated back by them")
        self.scheme, self.frequencies = scheme, frequencies
        self.reset()

    def reset(self) -> None:
        self.streams = (kv.Stream(self.scheme.keys, "keys"), kv.Stream(self.scheme.values, "values"))
        self.is_initialized = False

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are stored."""
        return sum(stream.nbytes for stream in self.streams)

    def get_seq_length(self) -> int:
        return self.streams[0].tokens

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens, [batch, heads, tokens, width] each; return all tokens as they read back, the new ones among them.

        Tokens stand at the positions in which they come: keys are rotated back by their place in the cache. Raises ValueError
        for shapes that do not fit each other or the tokens before, NaN and infinity; then nothing is stored.
        """
        keys, values = self.streams
        if self.scheme.before_rope:
            kv.check_states(key_states, "keys")
            key_states = self._rotated(key_states, keys.tokens, back=True)
        keys, values = keys.grown(key_states), values.grown(value_states)
        if key_states.shape[:3] != value_states.shape[:3]:
            shapes = f"{list(key_states.shape)} and {list(value_states.shape)}"
            raise ValueError(f"keys and values have shapes {shapes}, wanted the same batch, heads and tokens")
        self.streams, self.is_initialized = (keys, values), True
        read = keys.read()
        return (self._rotated(read, 0) if self.scheme.before_rope else read), values.read()

    def _rotated(self, keys: torch.Tensor, start: int, back: bool = False) -> torch.Tensor:
        positions = torch.arange(start, start + keys.shape[2], device=keys.device)
        return kv.rotate(keys, positions, self.frequencies.to(keys.device), back)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a quantized cache cannot be cropped: tokens that share a scale cannot be parted")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for stream in self.streams:
            # Bytes, since an index into float8 is not to be had everywhere.
            stream.map(lambda t: t.view(torch.uint8)[indices.to(t.device)].view(t.dtype))

    def batch_repeat_interleave(self, repeats: int) -> None:
        for stream in self.streams:
            stream.map(lambda t: t.view(torch.uint8).repeat_interleave(repeats, dim=0).view(t.dtype))


class QuantizedCache(Cache):
    """For `model.generate(past_key_values=...)`, or for one forward pass after another. Made for one model, by its config."""

    def __init__(self, model: nn.Module, scheme: Scheme):
        frequencies = None
        if scheme.before_rope:
            check_rotation(model)
            frequencies = frequencies_of(model)
        super().__init__(layers=[QuantizedLayer(scheme, frequencies) for _ in models.blocks(model)])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are stored."""
        return sum(layer.nbytes for layer in self.layers)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """As the layer's. Raises ValueError for a layer out of turn, which would give tokens other positions than they have."""
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(f"layer_idx is {layer_idx}, the cache has {len(self.layers)} layers")
        held = [layer.get_seq_length() for layer in self.layers]
        new = key_states.shape[-2]
        due = held[-1] if layer_idx == 0 else held[layer_idx - 1] - new
        if held[layer_idx] != due:
            beside = len(self.layers) - 1 if layer_idx == 0 else layer_idx - 1
            said = f"it holds {held[layer_idx]} tokens and layer {beside} {held[beside]}"
            raise ValueError(f"layer {layer_idx} is fed {new} tokens out of turn: {said}")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def frequencies_of(model: nn.Module) -> torch.Tensor:
    """`inv_freq` of the model's rotary embedding. Raises ModelError where there is none, or more than one."""
    found = {id(m): m.inv_freq for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)}
    if len(found) != 1:
        raise models.ModelError(f"found {len(found)} rotary embeddings in a {type(model).__name__}, wanted one")
    return next(iter(found.values()))


@contextmanager
def reading_back(model: nn.Module, scheme: Scheme) -> Iterator[nn.Module]:
    """Inside, one forward pass without a cache gives the logits of a decode token by token through a QuantizedCache.

    At position t the cache holds t + 1 tokens, of which the first `stored(t + 1)` read back quantized, and what they read back as
    does not change when more come. So there are two products, one with the keys as they are and one with what they read back
    as, and each query takes from either; the same for values. Sequences start at position 0 and are not padded. What a query may
    see (all before it, or a sliding window) is the model's own mask, and scores are capped where the model caps them.

    Raises ModelError for a model whose attention cannot be replaced so: with a cache that stores everything as it comes, its
    logits would not be its own. And for keys that cannot be turned back, where `scheme` stores them before the rotary embedding.
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
        scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(positions > positions[:, None], -math.inf)
        if attention_mask is not None:
            scores = scores.masked_fill(~_seen(attention_mask)[:, :, None], -math.inf)
        weights = scores.softmax(-1, dtype=torch.float32 if scores.dtype.itemsize < 4 else None).to(query.dtype)
        if read_values is None:
            output = weights @ value[:, :, None]
        else:
            quantized = _quantized(scheme.values, tokens, key.device)
            output = (weights * quantized) @ read_values[:, :, None] + (weights * ~quantized) @ value[:, :, None]
        return output.flatten(1, 2).transpose(1, 2).contiguous(), None

    name = "labsupport_reading_back"
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, eager_mask)
    for config in configs.values():
        config._attn_implementation = name
    try:
        yield called
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _seen(mask: torch.Tensor) -> torch.Tensor:
    """bool [batch, heads or 1, queries, keys]: which key a query may see, of a mask of True and False or one that is added."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _is_causal(mask: torch.Tensor) -> bool:
    """Whether every query of every sequence sees itself and the mask is the same for all sequences: none is padded."""
    seen = _seen(mask)
    return bool(seen.diagonal(dim1=-2, dim2=-1).all()) and bool((seen == seen[:1]).all())


CHECKED_TOKENS = 48
# Two ways to add up the same products differ by some units in the last place; a mask or a cap that is lost by tens of percent.
SAME = {torch.float32: 1e-3, torch.float64: 1e-6}
SAME_IN_HALF = 5e-2


@torch.no_grad()
def _check_replaceable(model: nn.Module) -> None:
    """Raise ModelError unless the model computes the same through our attention with a cache that stores everything as it comes."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    length = CHECKED_TOKENS + (window if isinstance(window, int) and window < 1024 else 0)  # a longer one is its mask's affair
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    ids = (torch.arange(2 * length).view(2, length) * 7919 % config.vocab_size).to(next(model.parameters()).device)
    own = model(input_ids=ids, use_cache=False).logits.float()
    with _attending(model, kv.FLOAT) as called:
        ours = model(input_ids=ids, use_cache=False).logits.float()
    kind, layers = type(model).__name__, len(models.blocks(model))
    if len(called) != layers:
        raise models.ModelError(
            f"the attention of a {kind} cannot be replaced: {len(called)} of its {layers} layers ask transformers for it by name. "
            "Decode through cache.QuantizedCache instead"
        )
    off = ((ours - own).norm() / own.norm()).item()
    if not off <= SAME.get(model.dtype, SAME_IN_HALF):
        raise models.ModelError(
            f"the attention of a {kind} does more than the one that replaces it: with nothing quantized its logits move by "
            f"{off:.2g} of their size. Decode through cache.QuantizedCache instead"
        )


@torch.no_grad()
def check_rotation(model: nn.Module) -> None:
    """Raise ModelError where keys cannot be turned back by kv.rotate: rotary embeddings of a part of a head, or of other pairs.

    The first layer is fed one and the same token at every place, so its keys differ by their rotation alone.
    """
    frequencies, kind = frequencies_of(model), type(model).__name__
    ids = torch.full((1, 9), 5, device=next(model.parameters()).device)
    with _attending(model, kv.FLOAT) as called:
        model(input_ids=ids, use_cache=False)
    if not called:
        raise models.ModelError(f"the keys of a {kind} are not to be had, so they cannot be stored before the rotary embedding")
    keys = called[0].float()
    if 2 * len(frequencies) != keys.shape[-1]:
        raise models.ModelError(
            f"the rotary embedding of a {kind} turns {2 * len(frequencies)} of the {keys.shape[-1]} channels of a key: "
            "keys cannot be stored before it here"
        )
    back = kv.rotate(keys, torch.arange(keys.shape[2], device=keys.device), frequencies.float().to(keys.device), back=True)
    if (back - back[:, :, :1]).abs().max() > 1e-2 * keys.abs().max():
        raise models.ModelError(
            f"the rotary embedding of a {kind} turns other pairs of channels than i and i + width / 2: "
            "keys cannot be stored before it here"
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


def evaluate_cached(
    model: nn.Module, stream: TokenStream, scheme: Scheme, length: int = LENGTH, windows: int | None = None
) -> Evaluation:
    """Losses of the model where every token is predicted through a quantized cache, as in a decode token by token."""
    with reading_back(model, scheme):
        return evaluate(model, stream, length, windows)


@torch.no_grad()
def losses_by_place(
    model: nn.Module, stream: TokenStream, scheme: Scheme, bins: int, length: int = LENGTH, windows: int | None = None
) -> torch.Tensor:
    """Nats summed by where in its window a token stands: float64 [windows, bins], of equal width. The first is never predicted.

    Raises ValueError where bins does not divide length.
    """
    if length % bins:
        raise ValueError(f"bins is {bins}, wanted a divisor of length {length}")
    found = []
    with reading_back(model, scheme):
        for ids in stream.ids[stream.positions(length, windows)].to(next(model.parameters()).device).split(BATCH):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nll = nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").double().cpu()
            found.append(nn.functional.pad(nll, (1, 0)).unflatten(1, (bins, -1)).sum(2))
    return torch.cat(found)


def interaction(losses: Mapping[str, torch.Tensor], tokens: torch.Tensor, draws: torch.Tensor, level: float = 0.95) -> Interval:
    """What two kinds of damage cost together beyond the sum of what each costs alone: mean nats a token, and its interval.

    losses: nats of each document, float [documents], of "neither", "weights", "cache" and "both". tokens: of each. draws: int64
    [samples, documents], as in evaluate.paired_interval. 0 means that the losses add up, and that factors of perplexity multiply.
    """
    extra = (losses["both"] - losses["weights"] - losses["cache"] + losses["neither"]).double()
    drawn = extra[draws].sum(1) / tokens[draws].sum(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval((extra.sum() / tokens.sum()).item(), low, high)
