"""A model block by block: what calibration text feeds each block, without ever holding more than one block's inputs.

The text goes through the embedding once. Then the blocks come in turn: what the linears of a block are fed is summed up, they are
quantized, and the block as it then is gives the inputs of the next, so that later layers make up for what earlier ones have
become. Inside a block the linears that share an input go together, in the order in which they are called (for a Llama:
q, k, v; o; gate, up; down), each group fed by what the groups before it have become: AutoGPTQ's "true sequential" order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from labsupport.model import models, opened, quick
from labsupport.model.text import TextError, TokenStream
from labsupport.pipeline.block import Block, CalibrationError, Call, InputStatistics, Resident, Stop
from labsupport.quant import checks

WINDOWS, LENGTH, BATCH = 64, 512, 8


def windows(stream: TokenStream, count: int = WINDOWS, length: int = LENGTH) -> torch.Tensor:
    """`count` windows of `length` tokens spread evenly over the stream, fewer with LABS_QUICK. int64 [count, length].

    Raises text.TextError where the stream has fewer.
    """
    count = quick.windows(count)
    ids = stream.ids[stream.positions(length, count)]
    if len(ids) < count:
        raise TextError(f"the text {stream.source!r} has {len(ids)} windows of {length} tokens, fewer than the {count} asked for")
    return ids


def blocks(model: nn.Module, ids: torch.Tensor, batch: int = BATCH, weights: Resident | None = None) -> Iterator[Block]:
    """Each block in turn, with what the whole text feeds it. When the next one is asked for, the last is run as it then is.

    ids: int64 [windows, length]; `batch` windows go through at a time. weights: loads and drops a block's weights where the model
    does not hold them. A run that continues an older one puts the weights of each finished block back before asking for the next.
    Raises text.TextError for no text at all, CalibrationError for a model in training mode, for linears that share a weight
    with another part of the model, and where a block is not fed by what the one before it returns.
    """
    checks.tokens(ids, "calibration", models.vocabulary(model))
    if ids.ndim != 2 or ids.numel() == 0:
        raise TextError(f"calibration text has shape {list(ids.shape)}, wanted [windows, length], neither of them 0")
    if model.training:
        raise CalibrationError("the model is in training mode, in which it may drop inputs at random: call model.eval() first")
    _check_shared(model)
    weights = weights or Resident()
    with weights.outside():
        inputs, calls = _first_inputs(model, ids, batch)
    for block in bare_blocks(model, weights):
        block.inputs, block.calls = inputs, [calls[len(hidden)][block.index] for hidden in inputs]
        yield block
        if block.index + 1 < len(models.blocks(model)):
            for number, output in enumerate(block.outputs()):
                inputs[number] = output  # in its place, so that there is never more than one set of hidden states


def bare_blocks(model: nn.Module, weights: Resident | None = None) -> Iterator[Block]:
    """Each block in turn, with its weights and no inputs: for methods that look at no text."""
    weights, remaining, steps = weights or Resident(), models.linears(model), opened.routed(model)
    for index, module in enumerate(models.blocks(model)):
        inside = set(module.modules())
        # A linear that two blocks share comes with the first.
        linears = {name: remaining.pop(name) for name, layer in list(remaining.items()) if layer in inside}
        with weights.block(index):
            yield Block(index, module, linears, [], [], {name: steps[name] for name in linears if name in steps})


def blockwise(
    model: nn.Module,
    ids: torch.Tensor,
    quantize_linear: Callable[[str, nn.Linear, InputStatistics], Any],
    batch: int = BATCH,
    true_sequential: bool = True,
    on_linear: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any]:
    """Go through the model block by block and call quantize_linear(name, layer, statistics) for each linear.

    It puts the quantized weight into the layer; what it returns is returned by name. true_sequential: see `Block.fed`.
    on_linear(name, done, total) is called after each. Raises what `blocks` and `Block.groups` raise.
    """
    models.check_values(model)
    total, results = len(models.linears(model)), {}
    for block in blocks(model, ids, batch):
        for name, statistics in block.fed(true_sequential):
            results[name] = quantize_linear(name, block.linears[name], statistics)
            on_linear(name, len(results), total)
    return results


class _TakenApart(Exception):
    """A block was handed an item of what the one before it returned: its caller expects a tuple."""


def _first_inputs(model: nn.Module, ids: torch.Tensor, batch: int) -> tuple[list[torch.Tensor], dict[int, list[Call]]]:
    """What the first block is fed for each batch, and for each batch size what else every block is called with."""
    try:
        return _first_inputs_with(model, ids, batch, returned=0)
    except _TakenApart:
        pass
    try:
        return _first_inputs_with(model, ids, batch, returned=2)
    except _TakenApart:
        message = "its second block is handed neither what the first returns nor the first item of that"
        raise CalibrationError(f"a {type(model).__name__} cannot be calibrated block by block: {message}") from None


@torch.no_grad()
def _first_inputs_with(
    model: nn.Module, ids: torch.Tensor, batch: int, returned: int
) -> tuple[list[torch.Tensor], dict[int, list[Call]]]:
    """The same where what blocks return is known: see passing_through. Raises _TakenApart where it is something else."""
    device = model.get_input_embeddings().weight.device
    modules = list(models.blocks(model))
    inputs: list[torch.Tensor] = []
    calls: dict[int, list[Call]] = {}

    def see(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, args, kwargs = (args[0], args[1:], kwargs) if args else (kwargs.pop("hidden_states"), (), kwargs)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if index == 0:
            inputs.append(hidden)
        elif hidden.shape != inputs[-1].shape:
            raise _TakenApart
        seen = calls.setdefault(len(hidden), [])
        if len(seen) == index:
            seen.append((args, kwargs))
        if len(seen) == len(modules):
            raise Stop

    handles = [
        module.register_forward_pre_hook(lambda _, args, kwargs, index=index: see(index, args, dict(kwargs)), with_kwargs=True)
        for index, module in enumerate(modules)
    ]
    try:
        # What else a block is called with does not depend on what the one before it gives, so no block need be computed.
        with passing_through(modules, returned):
            for windows_of_batch in ids.to(device).split(batch):
                with suppress(Stop):
                    model(input_ids=windows_of_batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, calls


@contextmanager
def passing_through(modules: Iterable[nn.Module], returned: int, first: Iterator[torch.Tensor] | None = None) -> Iterator[None]:
    """Inside, blocks return their input and are not computed; the first returns the next item of `first`, where it is given.

    returned: what blocks return, see Block.returned: their callers take a tuple apart, and a tensor in its place as well.
    """

    def forward(index: int, *args: Any, **kwargs: Any) -> Any:
        hidden = next(first) if index == 0 and first is not None else args[0] if args else kwargs["hidden_states"]
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return (hidden, *[None] * (returned - 1)) if returned else hidden

    modules = list(modules)
    for index, module in enumerate(modules):
        module.forward = partial(forward, index)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _check_shared(model: nn.Module) -> None:
    """Raise CalibrationError where the weight of a linear is used in a second place."""
    if pair := models.shared(model):
        raise CalibrationError(f"{pair[0]} and {pair[1]} are one weight: it cannot be quantized for two places")
