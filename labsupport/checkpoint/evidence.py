"""What the numbers of a checkpoint say of how it was packed, where neither a name nor a shape does.

Zero-points. Weights scatter around 0, so the codes of a group scatter around its zero-point. Read one too high or too low, as
by the wrong version, the mean of code - zero_point is off by a whole step in every layer.

Order. A group with a straggler has a large scale, and all its other codes lie close together: scale and spread of the codes go
against each other. They do so only if they belong to the same output. Eight outputs that share a word, less their mean, are
compared in each order that is known; the others look like chance. The zero-points are then held to the means of the codes in
the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

import torch

from labsupport.quant import packing
from labsupport.quant.grid import UniformTensor

# A reading in AWQ's order of what was written in another: at each place, which of eight it holds.
ORDERS = {
    "0 2 4 6 1 3 5 7": tuple(range(8)),
    "0 1 2 3 4 5 6 7": packing.AWQ_PLACES,
    "0 4 1 5 2 6 3 7": tuple(packing.AWQ_PLACES[place] for place in packing.AWQ_PLACES),
}
AWQ, *OTHERS = ORDERS
SURE = 6.0  # standard errors: by chance once in a billion
STEADY = 0.25  # steps


def group_means(tensor: UniformTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each group's codes, float32 [out_features, groups]."""
    groups = packing.groups_of(tensor).long()
    codes = tensor.codes.float()[:, torch.argsort(groups, stable=True)].unflatten(1, (-1, tensor.group_size))
    return codes.mean(2), codes.std(2, correction=0)


@dataclass
class Offset:
    """Mean of code - zero_point in every layer, in steps. errors: what that mean is uncertain by, since groups differ."""

    steps: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def add(self, tensor: UniformTensor, means: torch.Tensor) -> None:
        away = means - tensor.zero_point
        self.steps.append(away.mean().item())
        self.errors.append((away.std() / math.sqrt(away.numel())).item() if away.numel() > 1 else math.inf)

    @property
    def middle(self) -> float:
        return median(self.steps)

    @property
    def scatter(self) -> float:
        """Median distance of the layers from their middle."""
        return median(abs(step - self.middle) for step in self.steps)

    @property
    def error(self) -> float:
        """Standard error of the middle: a median is 1.25 times as uncertain as a mean."""
        return 1.25 * math.sqrt(sum(error**2 for error in self.errors)) / len(self.steps)

    @property
    def whole(self) -> int | None:
        """How many steps the zero-points are off; None where the layers do not say, or too few groups do."""
        nearest = round(self.middle)
        steady = abs(self.middle - nearest) <= STEADY and self.scatter <= STEADY
        return nearest if steady and SURE * self.error <= 1 - STEADY else None


@dataclass
class Match:
    """How well two values of each group go together when one of them is put in each of the orders. sums: of products."""

    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ORDERS, 0.0))
    energy: list[float] = field(default_factory=lambda: [0.0, 0.0])
    count: int = 0

    def add(self, fixed: torch.Tensor, moved: torch.Tensor) -> None:
        """Both float [out_features, groups], whole words of eight outputs."""
        one, other = (_within_words(values.double()) for values in (fixed, moved))
        for name, order in ORDERS.items():
            places = [order.index(column) for column in range(8)]
            self.sums[name] += (one * other[:, places]).sum().item()
        self.energy[0] += one.pow(2).sum().item()
        self.energy[1] += other.pow(2).sum().item()
        self.count += one.numel() * 7 // 8

    def correlation(self, order: str) -> float:
        size = math.sqrt(self.energy[0] * self.energy[1])
        return self.sums[order] / size if size else 0.0

    def best(self, sign: int) -> str | None:
        """The order in which the correlation has this sign and is largest; None where chance could have made it."""
        order = max(ORDERS, key=lambda name: sign * self.correlation(name))
        return order if sign * self.correlation(order) * math.sqrt(self.count) >= SURE else None

    def said(self) -> str:
        return ", ".join(f"{self.correlation(name):+.2f} in order {name}" for name in ORDERS)


def _within_words(values: torch.Tensor) -> torch.Tensor:
    """[words, 8, groups], less the mean of the eight."""
    words = values.unflatten(0, (-1, 8))
    return words - words.mean(1, keepdim=True)


@dataclass
class Order:
    """Codes against scales, and zero-points against codes, over all layers."""

    codes: Match = field(default_factory=Match)
    zeros: Match = field(default_factory=Match)

    def add(self, tensor: UniformTensor, means: torch.Tensor, spread: torch.Tensor) -> None:
        fit = (spread > 0) & (tensor.scale > 0)
        # A group whose codes are all one says nothing: 0 is what is no different from the others of its word.
        logs = [torch.where(fit, values.float().clamp(min=1e-30).log(), torch.zeros(())) for values in (tensor.scale, spread)]
        if bool(fit.all()):
            self.codes.add(*logs)
        self.zeros.add(means, tensor.zero_point)

    def findings(self) -> Iterator[tuple[str, str]]:
        """What is packed in which other order."""
        weights = self.codes.best(-1)
        if weights in OTHERS:
            yield "qweight", f"nibbles stand in order {weights}, not {AWQ}: scales go against the codes' spread {self.codes.said()}"
        together = self.zeros.best(+1)
        if together in OTHERS and weights in (AWQ, None):
            yield "qzeros", f"nibbles stand in order {together}, not {AWQ}: they follow the codes' means {self.zeros.said()}"
        if together is not None and weights in OTHERS and together == AWQ:
            yield "qzeros", f"nibbles stand in order {weights} as well: in the same order they follow the codes' means"
