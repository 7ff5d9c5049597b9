"""What the linears of a model are fed by calibration text, block by block, without ever holding more than one block's inputs.

The text goes through the embedding once. Then each block is met in turn: what its linears are fed is summed up, they are
quantized, and the block as it then stands gives the inputs of the next, so that later layers answer to what earlier ones
have become. Inside a block the linears that share an input go together, in the order in which they are called (for a Llama:
q, k, v; o; gate, up; down), each group fed by what the groups before it have become: AutoGPTQ's "true sequential" order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from labsupport.model import models
from labsupport.model.text import TextError, TokenStream

WINDOWS, LENGTH, BATCH = 64, 512, 8


class CalibrationError(ValueError):
    """The model cannot be calibrated as asked: a linear that never saw an input, a weight in two places, training mode."""


class _Stop(Exception):
    """What is needed has been seen: the rest of a forward pass is left out."""


@dataclass
class InputStatistics:
    """What a linear, or several that share their input, was fed, summed over tokens. float32 on the layer's device.

    gram: X^T X [in, in]. sum_abs, max_abs: of |x| for each channel, [in]. tokens: how many rows X has.
    """

    gram: torch.Tensor
    sum_abs: torch.Tensor
    max_abs: torch.Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> InputStatistics:
        return cls(
            torch.zeros(in_features, in_features, device=device),
            torch.zeros(in_features, device=device),
            torch.zeros(in_features, device=device),
        )

    def add(self, inputs: torch.Tensor) -> None:
        """inputs: float [..., in]. Batches may differ in size: sums are kept, and divided by the count at the end."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.gram.addmm_(x.t(), x)
        magnitude = x.abs()
        self.sum_abs += magnitude.sum(0)
        torch.maximum(self.max_abs, magnitude.amax(0), out=self.max_abs)
        self.tokens += len(x)

    @property
    def hessian(self) -> torch.Tensor:
        """2/n X^T X, what GPTQ asks for. float32 [in, in]."""
        return self.gram * (2 / self.tokens)

    @property
    def mean_abs(self) -> torch.Tensor:
        """Mean |x| of each channel, what AWQ asks for. float32 [in]."""
        return self.sum_abs / self.tokens


def windows(stream: TokenStream, count: int = WINDOWS, length: int = LENGTH) -> torch.Tensor:
    """`count` windows of `length` tokens spread evenly over the stream. int64 [count, length].

    Raises text.TextError where the stream has fewer.
    """
    ids = stream.ids[stream.positions(length, count)]
    if len(ids) < count:
        raise TextError(f"the text {stream.source!r} has {len(ids)} windows of {length} tokens, fewer than the {count} asked for")
    return ids


class Resident:
    """Where a model's weights are while they are needed: here, in memory all the time.

    What loads them only for as long as a context lasts overrides both methods; its model is otherwise on the meta device.
    """

    def outside(self) -> AbstractContextManager:
        """The weights of everything but the blocks."""
        return nullcontext()

    def block(self, index: int) -> AbstractContextManager:
        """The weights of one block."""
        return nullcontext()


@dataclass
class Block:
    """One block of a model, and everything that it is fed.

    linears: by full name. inputs: hidden states, [windows, length, hidden] for each batch. calls: what else the block is called
    with, positional and by name, for each batch; batches of one shape share it (positions, masks, rotary tables).
    """

    index: int
    module: nn.Module
    linears: dict[str, nn.Linear]
    inputs: list[torch.Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def outputs(self) -> Iterator[torch.Tensor]:
        """What the block, as it stands, gives for each batch. [windows, length, hidden]."""
        for batch in range(len(self.inputs)):
            yield self._run(batch)

    def groups(self) -> list[tuple[str, ...]]:
        """The names of the linears that share an input, in the order in which they are called, seen by running one batch.

        Raises CalibrationError where a linear is not called, or more than once.
        """
        called: list[tuple[str, torch.Tensor]] = []
        with _watching(self.linears, lambda name, x: called.append((name, x))):
            self._run(0)
        times = {name: sum(name == other for other, _ in called) for name in self.linears}
        for name, count in times.items():
            if count == 0:
                raise CalibrationError(f"{name} never saw an input")
            if count > 1:
                raise CalibrationError(f"{name} is called {count} times in one pass: it has no one input")
        groups: list[tuple[torch.Tensor, list[str]]] = []
        for name, x in called:
            for other, names in groups:
                if other is x:
                    names.append(name)
                    break
            else:
                groups.append((x, [name]))
        return [tuple(names) for _, names in groups]

    def statistics(self, names: Iterable[str]) -> dict[str, InputStatistics]:
        """What each of the named linears is fed by the block as it stands. Of linears that share an input, one is enough.

        A pass is broken off as soon as all of them have been fed.
        """
        watched = {name: self.linears[name] for name in names}
        found = {name: InputStatistics.empty(layer.in_features, layer.weight.device) for name, layer in watched.items()}
        waiting: set[str] = set()

        def see(name: str, x: torch.Tensor) -> None:
            found[name].add(x)
            waiting.discard(name)
            if not waiting:
                raise _Stop

        with _watching(watched, see):
            for batch in range(len(self.inputs)):
                waiting.update(watched)
                self._run(batch)
        return found

    def fed(self, true_sequential: bool = True) -> Iterator[tuple[str, InputStatistics]]:
        """Each linear in the order in which they are called, with what feeds it.

        true_sequential: what those before it have become is seen, so whoever quantizes them does so before asking for the next.
        Without it, all are fed by the block as it was, in a single pass. Raises what `groups` raises.
        """
        groups = self.groups()
        at_once = {} if true_sequential else self.statistics(group[0] for group in groups)
        for first, *others in groups:
            statistics = at_once.pop(first) if at_once else self.statistics([first])[first]
            for name in (first, *others):
                yield name, statistics

    @torch.no_grad()
    def _run(self, batch: int) -> torch.Tensor | None:
        args, kwargs = self.calls[batch]
        try:
            output = self.module(self.inputs[batch], *args, **kwargs)
        except _Stop:
            return None
        return output[0] if isinstance(output, tuple) else output  # a tuple before transformers 5


def blocks(model: nn.Module, ids: torch.Tensor, batch: int = BATCH, weights: Resident | None = None) -> Iterator[Block]:
    """Each block in turn, with what the whole text feeds it. When the next one is asked for, the last is run as it then stands.

    ids: int64 [windows, length]; `batch` windows go through at a time. weights: loads and drops a block's weights where the model
    does not hold them. Whoever stops and starts again puts the finished blocks' weights back first and passes over them.
    Raises text.TextError for no text at all, CalibrationError for a model in training mode and for linears that share a weight
    with another part of the model.
    """
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
    """Each block in turn, with its weights and fed by nothing: for methods that look at no text."""
    weights, linears = weights or Resident(), models.linears(model)
    for index, module in enumerate(models.blocks(model)):
        inside = set(module.modules())
        own = {name: linears.pop(name) for name, layer in list(linears.items()) if layer in inside}  # a shared one only once
        with weights.block(index):
            yield Block(index, module, own, [], [])


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
    total, results = len(models.linears(model)), {}
    for block in blocks(model, ids, batch):
        for name, fed in block.fed(true_sequential):
            results[name] = quantize_linear(name, block.linears[name], fed)
            on_linear(name, len(results), total)
    return results


@torch.no_grad()
def _first_inputs(model: nn.Module, ids: torch.Tensor, batch: int):
    """What the first block is fed for each batch; and for each batch size what else every block is called with."""
    device = model.get_input_embeddings().weight.device
    modules = list(models.blocks(model))
    inputs: list[torch.Tensor] = []
    calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def see(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, args, kwargs = (args[0], args[1:], kwargs) if args else (kwargs.pop("hidden_states"), (), kwargs)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if index == 0:
            inputs.append(hidden)
        known = calls.setdefault(len(hidden), [])
        if len(known) == index:
            known.append((args, kwargs))
        if len(known) == len(modules):
            raise _Stop

    handles = [
        module.register_forward_pre_hook(lambda _, args, kwargs, index=index: see(index, args, dict(kwargs)), with_kwargs=True)
        for index, module in enumerate(modules)
    ]
    try:
        # What else a block is called with does not depend on what the one before it gives, so none need be run.
        with passing_through(modules):
            for some in ids.to(device).split(batch):
                with suppress(_Stop):
                    model(input_ids=some, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, calls


@contextmanager
def passing_through(modules: Iterable[nn.Module], first: Iterator[torch.Tensor] | None = None) -> Iterator[None]:
    """While inside, blocks give what they are given and are not computed; the first gives what comes next from `first`."""
    import transformers

    as_tuple = int(transformers.__version__.split(".")[0]) < 5  # see Block._run

    def forward(index: int, *args: Any, **kwargs: Any) -> Any:
        hidden = next(first) if index == 0 and first is not None else args[0] if args else kwargs["hidden_states"]
        return (hidden,) if as_tuple and not isinstance(hidden, tuple) else hidden

    modules = list(modules)
    for index, module in enumerate(modules):
        module.forward = partial(forward, index)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _check_shared(model: nn.Module) -> None:
    def place(parameter: torch.Tensor) -> int:
        return parameter.data_ptr() or id(parameter)  # a meta tensor has no address

    owners: dict[int, str] = {}
    inside = {place(layer.weight) for layer in models.linears(model).values()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        pointer = place(parameter)
        if pointer in inside and owners.setdefault(pointer, name) != name:
            raise CalibrationError(f"{owners[pointer]} and {name} are one weight: it cannot be quantized for two places")


@contextmanager
def _watching(layers: dict[str, nn.Linear], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """While inside, see(name, input) is called whenever one of the layers is."""
    handles = [layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
