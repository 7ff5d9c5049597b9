"""How a checkpoint was packed, by the statistics of its codes, where neither a name nor a shape says it.

Zero-points. Weights scatter around 0, so the codes of a group scatter around its zero-point. If the zero-point is read one too
high or too low, as by the wrong version, the mean of code - zero_point is off by a whole step in every layer.

Order. A group with one very large weight has a large scale, and all its other codes lie close together: the larger the scale, the
smaller the spread of the codes. This holds only between scales and codes of the same output. So the eight outputs that share a
word, less their mean, are compared in each order that is known: one order shows the correlation, in the others it looks like
chance. The zero-points are compared with the means of the codes in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

import torch

from labsupport.quant import packing
from labsupport.quant.grid import UniformTensor

# What a reader in AWQ's order finds at each of the eight places, if the word was written in this order.
ORDERS = {
    "0 2 4 6 1 3 5 7": tuple(range(8)),
    "0 1 2 3 4 5 6 7": packing.AWQ_PLACES,
    "0 4 1 5 2 6 3 7": tuple(packing.AWQ_PLACES[place] for place in packing.AWQ_PLACES),
}
AWQ, *OTHERS = ORDERS
CERTAIN = 6.0  # standard errors: by chance once in a billion
STEADY = 0.25  # steps by which layers may differ and still agree


def group_means(tensor: UniformTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each group's codes, float32 [out_features, groups]."""
    groups = packing.groups_of(tensor).long()
    codes = tensor.codes.float()[:, torch.argsort(groups, stable=True)].unflatten(1, (-1, tensor.group_size))
    return codes.mean(2), codes.std(2, correction=0)


@dataclass
class Offset:
    """steps: the mean of code - zero_point in every layer. errors: the standard error of each, from how much its groups differ."""

    steps: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def add(self, tensor: UniformTensor, means: torch.Tensor) -> None:
        difference = means - tensor.zero_point
        self.steps.append(difference.mean().item())
        self.errors.append((difference.std() / math.sqrt(difference.numel())).item() if difference.numel() > 1 else math.inf)

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
    def whole_steps(self) -> int | None:
        """How many steps the zero-points are off; None where the layers disagree, or there are too few groups to tell."""
        nearest = round(self.middle)
        steady = abs(self.middle - nearest) <= STEADY and self.scatter <= STEADY
        return nearest if steady and CERTAIN * self.error <= 1 - STEADY else None


@dataclass
class Match:
    """How two values of each group correlate when one of them is put in each of the orders.

    sums: of their products, by order. energy: the sum of squares of either. count: how many pairs there were.
    """

    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ORDERS, 0.0))
    energy: list[float] = field(default_factory=lambda: [0.0, 0.0])
    count: int = 0

    def add(self, fixed: torch.Tensor, moved: torch.Tensor) -> None:
        """fixed, moved: float [out_features, groups], whole words of eight outputs. `moved` is put in each order."""
        first, second = (_within_words(values.double()) for values in (fixed, moved))
        for name, order in ORDERS.items():
            places = [order.index(column) for column in range(8)]
            self.sums[name] += (first * second[:, places]).sum().item()
        self.energy[0] += first.pow(2).sum().item()
        self.energy[1] += second.pow(2).sum().item()
        self.count += first.numel() * 7 // 8  # of eight values less their mean, seven are free

    def correlation(self, order: str) -> float:
        size = math.sqrt(self.energy[0] * self.energy[1])
        return self.sums[order] / size if size else 0.0

    def best(self, sign: int) -> str | None:
        """The order in which the correlation has this sign and is largest; None where it could be chance."""
        order = max(ORDERS, key=lambda name: sign * self.correlation(name))
        return order if sign * self.correlation(order) * math.sqrt(self.count) >= CERTAIN else None

    def __str__(self) -> str:
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
        """means, spread: what group_means gives. A tensor with a group whose codes are all equal has no logarithm of its spread."""
        if bool(((spread > 0) & (tensor.scale > 0)).all()):
            self.codes.add(tensor.scale.float().log(), spread.float().log())
        self.zeros.add(means, tensor.zero_point)

    def findings(self) -> Iterator[tuple[str, str]]:
        """What is packed in another order than AWQ's: the part, and a sentence."""
        codes, zeros = self.codes.best(-1), self.zeros.best(+1)
        if codes in OTHERS:
            yield "qweight", f"nibbles stand in order {codes}, not {AWQ}: scales go against the codes' spread {self.codes}"
        if zeros in OTHERS and codes in (AWQ, None):
            yield "qzeros", f"nibbles stand in order {zeros}, not {AWQ}: they follow the codes' means {self.zeros}"
        if zeros == AWQ and codes in OTHERS:
            yield "qzeros", f"nibbles stand in order {codes} as well: in the same order they follow the codes' means"
