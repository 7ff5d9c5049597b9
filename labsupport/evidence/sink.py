"""The first token of a text inside a model, block by block: how much attention it gets, how large it is, and what that does.

Many models send much of their attention to the first token, whatever it is: an attention sink (Xiao et al. 2023,
arXiv:2309.17453). Its hidden state holds a few huge values, massive activations (Sun et al. 2024, arXiv:2402.17762), and so do the
inputs of some linears. They are one token in a window, and yet most of what a calibration sums up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from labsupport.model import models
from labsupport.pipeline import calibrate, listening
from labsupport.pipeline.block import Block, watching
from labsupport.quant import checks, kv

BEFORE = 8  # tokens that a query has before it at least; the first queries have little but the first token to attend to
# A head whose queries send it more than this on average has the sink: the measure of Gu et al. 2024, arXiv:2410.10781.
SINKING = 0.3
GROUP = 32  # of a cache, as in the sweep "kv"
HIDDEN = "hidden"  # among the linears: the hidden state that the block is fed
MOST = 0.9  # of a token's squares, which are held by how many channels?
# The keys of a row beside "block".
MEASURED = (
    "attention",
    "sinking_heads",
    "runner_up",
    "key_norm",
    "value_norm",
    "inputs",
    "key_error",
    "value_error",
    "output_error",
)


def rows(model: nn.Module, ids: Tensor, batch: int = calibrate.BATCH) -> Iterator[dict[str, Any]]:
    """A row for each block, which holds by name:

    attention: the share that the first token gets, mean over heads and over queries with at least BEFORE tokens before them.
    sinking_heads: the share of heads in which that is more than SINKING.
    runner_up: the "attention" that the most attended of the other tokens of a window gets, mean over windows; and in each window
        which it is, "tokens", as ids.
    key_norm, value_norm: the norm of the first token's key and value, over the mean of all others.
    inputs: of each kind of linear, by the name of the first that reads it, and of "hidden":
        largest: the largest |x|; loudest: the channel with the most squares; channels: how few of them hold MOST of the squares.
        Each for the "first" token and for all "others".
        mean_abs: the first token's share of sum |x|, AWQ's statistic, over all channels; most_mean_abs: in the channel where it is
        largest; trace: its share of the trace of X^T X.
    key_error, value_error: the relative error in a 4-bit cache, where a group is GROUP tokens of a "channel" or GROUP channels of a
        "token". Of the "first" token, of those "beside" it, the rest of the first GROUP, and of all "others".
    output_error: what that makes of the heads' outputs, relatively: of "keys" and of "values", by "channel" and by "token"; and as
        "keys_but_first", "values_but_first" where the first token alone is not rounded.

    Every token of the windows that fills a group is quantized. ids: int64 [windows, tokens]. Raises what `calibrate.blocks` raises;
    ValueError for windows shorter than GROUP; ModelError for an attention of which the weights cannot be computed;
    CalibrationError for linears that are fed tokens out of their windows.
    """
    checks.whole(ids.shape[-1], "the length of a window", GROUP)
    for block in calibrate.blocks(model, ids, batch):
        row = {"block": block.index} | _of_block(block)
        places = row["runner_up"].pop("places")
        row["runner_up"]["tokens"] = [int(window[place]) for window, place in zip(ids, places, strict=True)]
        yield row


def summary(rows: Iterable[Mapping[str, Any]]) -> str:
    """A sentence: whether the model has an attention sink, and how much attention it gets."""
    rows = list(rows)
    most = max(rows, key=lambda row: row["attention"])
    share = sum(row["sinking_heads"] for row in rows) / len(rows)
    mean = sum(row["attention"] for row in rows) / len(rows)
    gets = f"the first token gets {mean:.1%} of all attention, at most {most['attention']:.1%} (block {most['block']})"
    if not share:
        return f"no attention sink: {gets}, and in no head more than {SINKING:.0%}"
    return f"an attention sink: {gets}, and more than {SINKING:.0%} in {share:.0%} of the heads"


@dataclass
class _Inputs:
    """Sums over what one linear is fed: [0] of first tokens, [1] of all others."""

    largest: list[float] = field(default_factory=lambda: [0.0, 0.0])
    magnitudes: list[Tensor] = field(default_factory=lambda: [torch.zeros(()), torch.zeros(())])  # float64 [channels]
    squares: list[Tensor] = field(default_factory=lambda: [torch.zeros(()), torch.zeros(())])

    def add(self, x: Tensor) -> None:
        """x: [windows, tokens, channels]."""
        for place, part in enumerate((x[:, :1], x[:, 1:])):
            magnitude = part.detach().float().abs().flatten(0, 1)
            self.largest[place] = max(self.largest[place], magnitude.max().item())
            self.magnitudes[place] = self.magnitudes[place] + magnitude.sum(0).cpu().double()
            self.squares[place] = self.squares[place] + magnitude.square().sum(0).cpu().double()

    def row(self) -> dict[str, Any]:
        first, every = self.magnitudes[0], sum(self.magnitudes)
        share = first / every.clamp(min=torch.finfo(torch.float64).tiny)  # a channel that is never fed anything counts 0
        squares = [part.sum().item() for part in self.squares]
        return {
            "largest": _places(_short(value) for value in self.largest),
            "loudest": _places(int(part.argmax()) for part in self.squares),
            "channels": _places(_holding(part) for part in self.squares),
            "mean_abs": _short((first.sum() / every.sum()).item()),
            "most_mean_abs": _short(share.max().item()),
            "trace": _short(squares[0] / sum(squares)),
        }


@dataclass
class _Attention:
    """Sums over windows and heads of what the attention of a block does, float64 on the CPU."""

    received: list[Tensor] = field(default_factory=list)  # [heads, tokens] for each window: mean over queries
    norms: dict[str, Tensor] = field(default_factory=dict)  # of "key" and "value": first token, mean of all others
    errors: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # "key" or "value", axis: [3, 2], see _squares
    outputs: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # what is rounded, axis: squared error, square

    def see(self, attend: listening.Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Any:
        if not self.received and not listening.is_known(attend, module, query, key, value, settings):
            raise models.ModelError("the attention does more than softmax(Q K^T) V: how much a token gets cannot be computed")
        mask = settings.pop("attention_mask", None)
        output = attend(module, query, key, value, mask, **settings)
        settings["attention_mask"] = mask
        given = {"key": key, "value": value}
        read = {kind: {axis: _read_back(x, axis) for axis in kv.AXES} for kind, x in given.items()}
        for kind, x in given.items():
            norm = x.float().norm(dim=-1)
            _add(self.norms, kind, torch.stack([norm[:, :, 0].sum(), norm[:, :, 1:].mean(2).sum()]))
            for axis, again in read[kind].items():
                _add(self.errors, (kind, axis), _squares(x.float(), again.float()))
        but_first = {kind: {axis: _but_first(again, x) for axis, again in read[kind].items()} for kind, x in given.items()}
        for window in range(len(key)):
            heads = []
            for head in range(key.shape[1]):
                weights = listening.attention_weights(query, key, settings, window, head)
                heads.append(weights[:, BEFORE:].mean(1).cpu().double())
                v = value[window, head].to(weights.dtype)
                for axis in kv.AXES:
                    for rounded, states in (("", read), ("_but_first", but_first)):
                        otherwise = listening.attention_weights(query, states["key"][axis], settings, window, head)
                        _add(self.outputs, ("keys" + rounded, axis), _error(weights @ v, otherwise @ v))
                        again = states["value"][axis][window, head].to(v.dtype)
                        _add(self.outputs, ("values" + rounded, axis), _error(weights @ v, weights @ again))
            self.received.append(torch.cat(heads))
        return output

    def row(self) -> dict[str, Any]:
        first = torch.stack([window[:, 0] for window in self.received]).mean(0)  # [heads]
        others = [window[:, 1:].mean(0) for window in self.received]
        errors = {
            f"{kind}_error": {axis: _places(map(_relative, self.errors[kind, axis]), "beside") for axis in kv.AXES}
            for kind in ("key", "value")
        }
        norms = {f"{kind}_norm": _short((first / others).item()) for kind, (first, others) in self.norms.items()}
        rounded = dict.fromkeys(name for name, _ in self.outputs)
        outputs = {name: {axis: _relative(self.outputs[name, axis]) for axis in kv.AXES} for name in rounded}
        return {
            "attention": _short(first.mean().item()),
            "sinking_heads": _short((first > SINKING).double().mean().item()),
            "runner_up": {
                "attention": _short(sum(window.max().item() for window in others) / len(others)),
                "places": [1 + int(window.argmax()) for window in others],
            },
        } | norms | errors | {"output_error": outputs}  # fmt: skip


def _of_block(block: Block) -> dict[str, Any]:
    readers = {group[0]: group[0].rsplit(".", 1)[-1] for group in block.groups()}
    inputs = {HIDDEN: _Inputs()} | {kind: _Inputs() for kind in readers.values()}
    attention = _Attention()

    def see(name: str, x: Tensor) -> None:
        inputs[readers[name]].add(block.in_windows(name, x))

    with watching({name: block.linears[name] for name in readers}, see), listening.watched(block.module, attention.see):
        for batch, hidden in enumerate(block.inputs):
            inputs[HIDDEN].add(hidden)
            block.run(batch)
    if not attention.received:
        raise models.ModelError(f"block {block.index} does not ask transformers for its attention: it cannot be watched")
    row = attention.row()
    return {key: row[key] if key in row else {kind: seen.row() for kind, seen in inputs.items()} for key in MEASURED}


def _read_back(states: Tensor, axis: str) -> Tensor:
    """Keys or values as a 4-bit cache gives them back, in their own dtype; tokens after the last whole group as they are."""
    stored = states.shape[2] // GROUP * GROUP
    size = GROUP if axis == "channel" else math.gcd(GROUP, states.shape[3])
    part = kv.Part(4, "channel" if axis == "channel" else "token", size)
    read = kv.quantize(states[:, :, :stored], part).dequantize().to(states.dtype)
    return torch.cat([read, states[:, :, stored:]], dim=2)


def _but_first(read: Tensor, states: Tensor) -> Tensor:
    """The first token as it is, the others as they read back."""
    return torch.cat([states[:, :, :1], read[:, :, 1:]], dim=2)


def _squares(states: Tensor, read: Tensor) -> Tensor:
    """[3, 2]: squared error and square, of the first token, of those beside it, and of all others that are quantized."""
    stored = states.shape[2] // GROUP * GROUP
    error, size = (x.square().sum((0, 1, 3)) for x in (read - states, states))  # [tokens]
    slices = (slice(0, 1), slice(1, GROUP), slice(1, stored))
    return torch.stack([torch.stack([error[s].sum(), size[s].sum()]) for s in slices])


def _error(given: Tensor, otherwise: Tensor) -> Tensor:
    """Squared error and square."""
    return torch.stack([(otherwise - given).square().sum(), given.square().sum()])


def _add(sums: dict, key: Any, value: Tensor) -> None:
    sums[key] = sums.get(key, 0) + value.cpu().double()


def _relative(squares: Tensor) -> float:
    error, size = squares.tolist()
    return _short(math.sqrt(error / size))


def _holding(squares: Tensor) -> int:
    """How few channels hold MOST of the squares."""
    sums = squares.sort(descending=True).values.cumsum(0)
    return int((sums < MOST * sums[-1]).sum()) + 1


def _places(values: Iterable[Any], *between: str) -> dict[str, Any]:
    return dict(zip(("first", *between, "others"), values, strict=True))


def _short(value: float) -> float:
    """To five digits, which are more than other text leaves as they are."""
    return float(f"{value:.5g}")
