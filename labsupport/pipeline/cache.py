"""A quantized cache inside a model: one that `generate` accepts, and evaluation through it in one forward pass.

transformers' own QuantizedCache gives the first tokens it is fed back unrounded, so one forward pass through it measures nothing.
The cache here returns what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from labsupport.model import models
from labsupport.model.evaluate import LENGTH, Evaluation, Interval, batch_size, evaluate
from labsupport.model.text import TokenStream
from labsupport.pipeline.attention import check_rotation, frequencies_of, reading_back
from labsupport.pipeline.attention import rotation_of as rotation_of  # a notebook asks for it here
from labsupport.quant import checks, kv
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
        raise ValueError("a quantized cache cannot be cropped: tokens that share a scale cannot be separated")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for stream in self.streams:
            # As bytes, since not every back end can index float8.
            stream.map(lambda t: t.view(torch.uint8)[indices.to(t.device)].view(t.dtype))

    def batch_repeat_interleave(self, repeats: int) -> None:
        for stream in self.streams:
            stream.map(lambda t: t.view(torch.uint8).repeat_interleave(repeats, dim=0).view(t.dtype))


class QuantizedCache(Cache):
    """For `model.generate(past_key_values=...)`, or for one forward pass after another. Made for one model, by its config."""

    def __init__(self, model: nn.Module, scheme: Scheme):
        if not isinstance(scheme, Scheme):
            raise TypeError(f"scheme is {checks.kind(scheme)}, wanted a Scheme of keys and values")
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
        layer_idx = checks.whole(layer_idx, "layer_idx", 0, len(self.layers) - 1, f"one of the cache's {len(self.layers)} layers")
        held = [layer.get_seq_length() for layer in self.layers]
        new = key_states.shape[-2]
        due = held[-1] if layer_idx == 0 else held[layer_idx - 1] - new
        if held[layer_idx] != due:
            previous = len(self.layers) - 1 if layer_idx == 0 else layer_idx - 1
            raise ValueError(
                f"layer {layer_idx} is fed {new} tokens out of turn: "
                f"it holds {held[layer_idx]} tokens and layer {previous} holds {held[previous]}"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


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
    if checks.whole(length, "length", 2) % checks.whole(bins, "bins"):
        raise ValueError(f"bins is {bins}, wanted a divisor of length {length}")
    losses = []
    with reading_back(model, scheme):
        for ids in (
            stream.ids[stream.positions(length, windows)].to(next(model.parameters()).device).split(batch_size(model, length))
        ):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nll = nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").double().cpu()
            losses.append(nn.functional.pad(nll, (1, 0)).unflatten(1, (bins, -1)).sum(2))
    return torch.cat(losses)


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
