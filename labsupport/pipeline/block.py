"""One block of a model: its weights, what it is fed, and what each of its linears is fed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from labsupport.quant import checks

SHARE = 0.25  # of a block's size, which the statistics of linears that are fed in one pass may add to it

# How much a token counts in what a linear is fed: as much as every other; for the linear that makes the values, by the attention
# that it gets; as much as every other, but the first of a window not at all.
TOKEN_WEIGHTS = (EVEN, ATTENTION, NOT_FIRST) = ("even", "attention", "not_first")
# What a block is called with beside the hidden states: positional and by name.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class CalibrationError(ValueError):
    """The model cannot be calibrated: a linear never saw an input, a weight is used in two places, it is in training mode."""


class Stop(Exception):
    """Raised by a hook when all that is needed has been seen, so that the rest of a forward pass is left out."""


@dataclass
class InputStatistics:
    """What a linear, or several that share their input, was fed, summed over tokens. float32 on the layer's device.

    gram: X^T X [in, in], or sum_t w_t x_t x_t^T where tokens were given weights. sum_abs, max_abs: of |x| for each channel, [in].
    tokens: how many rows X has.
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

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """inputs: float [..., in]. Batches may differ in size: sums are kept, and divided by the count at the end.

        weights: float [...], how much each token counts in `gram`; by default every one 1.
        """
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if not len(x):  # an expert to which no token was routed
            return
        self.gram.addmm_(x.t(), x if weights is None else x * weights.reshape(-1, 1))
        magnitude = x.abs()
        self.sum_abs += magnitude.sum(0)
        torch.maximum(self.max_abs, magnitude.amax(0), out=self.max_abs)
        self.tokens += len(x)

    def to(self, device: torch.device | str) -> InputStatistics:
        """The same on another device."""
        return InputStatistics(self.gram.to(device), self.sum_abs.to(device), self.max_abs.to(device), self.tokens)

    @property
    def hessian(self) -> torch.Tensor:
        """2/n X^T X, which GPTQ needs. float32 [in, in]."""
        return self.gram * (2 / self.tokens)

    @property
    def mean_abs(self) -> torch.Tensor:
        """Mean |x| of each channel, which AWQ needs. float32 [in]."""
        return self.sum_abs / self.tokens


class Resident:
    """Where a model's weights are while they are needed: in memory, all the time.

    A class that loads them for as long as a context lasts overrides both methods; its model is otherwise on the meta device.
    """

    def outside(self) -> AbstractContextManager:
        """Inside, the weights of everything but the blocks are there."""
        return nullcontext()

    def block(self, index: int) -> AbstractContextManager:
        """Inside, the weights of one block are there."""
        return nullcontext()


@dataclass
class Block:
    """One block of a model, and everything that it is fed.

    linears: by full name. inputs: hidden states, [windows, length, hidden] for each batch. calls: what else the block is called
    with, for each batch; batches of one shape share it (positions, masks, rotary tables). steps: of the linears of experts, by
    full name, the step in which they are called (opened.routed). returned: how many items the tuple has that the block returned
    when it was last run, hidden states first; 0 where it returned these alone.
    """

    index: int
    module: nn.Module
    linears: dict[str, nn.Linear]
    inputs: list[torch.Tensor]
    calls: list[Call]
    steps: dict[str, str] = field(default_factory=dict)
    returned: int = 0

    def outputs(self) -> Iterator[torch.Tensor]:
        """What the block, as it now is, gives for each batch. [windows, length, hidden]."""
        for batch in range(len(self.inputs)):
            yield self.run(batch)

    def groups(self) -> list[tuple[str, ...]]:
        """The names of the linears that share an input, in the order in which they are called, seen by running one batch.

        Raises CalibrationError where a linear is not called, or more than once.
        """
        called: list[tuple[str, torch.Tensor]] = []
        with watching(self.linears, lambda name, x: called.append((name, x))):
            self.run(0)
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

    def statistics(self, names: Iterable[str], first: bool = True) -> dict[str, InputStatistics]:
        """What each of the named linears is fed by the block as it now is. Of linears that share an input, one is enough.

        first: whether the first token of each window counts. A pass is stopped as soon as all of them have been fed.
        Raises CalibrationError where it should not count and a linear is fed tokens out of their windows, as experts are.
        """
        watched = {name: self.linears[name] for name in names}
        statistics = {name: InputStatistics.empty(layer.in_features, layer.weight.device) for name, layer in watched.items()}
        waiting: set[str] = set()

        def see(name: str, x: torch.Tensor) -> None:
            if not first:
                x = self.in_windows(name, x)[:, 1:]
            statistics[name].add(x)
            waiting.discard(name)
            if not waiting:
                raise Stop

        with watching(watched, see):
            for batch in range(len(self.inputs)):
                waiting.update(watched)
                self.run(batch)
        return statistics

    def in_windows(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x, what the linear `name` is fed: [windows, tokens, in], or CalibrationError where tokens are out of their windows.

        OPT's MLP and an expert that all tokens share are fed the tokens of all windows in one row; experts among which tokens are
        divided get some of them, in another order.
        """
        tokens = self.inputs[0].shape[1]
        if x.ndim == 2 and name not in self.steps and any(len(x) == len(batch) * tokens for batch in self.inputs):
            x = x.unflatten(0, (-1, tokens))
        if x.ndim < 3 or x.shape[1] != tokens:
            raise CalibrationError(f"{name} is fed tokens out of their windows: which of them are first cannot be told")
        return x

    def fed(self, true_sequential: bool = True, first: bool = True) -> Iterator[tuple[str, InputStatistics]]:
        """Each linear in the order in which they are called, with what it is fed.

        true_sequential: each is fed by what the linears before it have become, so quantize a linear before asking for the next.
        Without it, all are fed by the block as it was, in a single pass. first: see `statistics`.
        Raises what `groups` and `statistics` raise.
        """
        groups = self.groups()
        at_once = {} if true_sequential else self.statistics((group[0] for group in groups), first)
        for together in [groups] if at_once else self._passes(groups):
            fed = at_once or self.statistics((group[0] for group in together), first)
            for group in together:
                statistics = fed.pop(group[0])
                for name in group:
                    yield name, statistics

    def _passes(self, groups: list[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
        """Groups that are fed in one pass: one, or those of one step, while their statistics are SHARE of the block's size."""
        most = SHARE * sum(parameter.numel() for parameter in self.module.parameters())
        together: list[tuple[str, ...]] = []
        size = 0
        for group in groups:
            more, step = self.linears[group[0]].in_features ** 2, self.steps.get(group[0])
            if together and (step is None or step != self.steps.get(together[0][0]) or size + more > most):
                yield together
                together, size = [], 0
            together, size = [*together, group], size + more
        if together:
            yield together

    @torch.no_grad()
    def run(self, batch: int) -> torch.Tensor | None:
        """What the block, as it now is, gives for one batch; None where a hook stopped it."""
        args, kwargs = self.calls[batch]
        try:
            output = self.module(self.inputs[batch], *args, **kwargs)
        except Stop:
            return None
        self.returned = len(output) if isinstance(output, tuple) else 0
        return output[0] if self.returned else output


def token_weights(settings: Mapping[str, Mapping[str, Any] | None], known: tuple[str, ...]) -> dict[str, str]:
    """How tokens count for each linear of a block, by name, without those that are left as they are. settings: of each linear.

    known: what the method can do of TOKEN_WEIGHTS. Raises ValueError for others, and where the first token of a window counts for
    some linears alone.
    """
    counted = {
        name: checks.choice(chosen.get("token_weights", EVEN), "token_weights", known)
        for name, chosen in settings.items()
        if chosen is not None
    }
    if len(others := {*counted.values()} - {NOT_FIRST}) and NOT_FIRST in counted.values():
        raise ValueError(f"token_weights {NOT_FIRST!r} is for all linears of a block, and one of them has {min(others)!r}")
    return counted


def counts_first(counted: Mapping[str, str]) -> bool:
    """Whether the first token of a window counts. counted: see `token_weights`."""
    return NOT_FIRST not in counted.values()


@contextmanager
def watching(layers: dict[str, nn.Linear], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Inside, see(name, input) is called whenever one of the layers is."""
    handles = [layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
