"""One linear: its weight is replaced by what is stored, and a report says what became of it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from labsupport.quant.grid import QuantizedTensor

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear.

    nbytes: stored. bits_per_weight. error: the share of its output's energy that is lost on the calibration text, or of its
    weight's energy where there is none; 0 for a linear that was left as it is. seconds: how long it took, by GPTQ together with
    the pass that fed it; of linears that share an input, the first has the pass. tokens: rows of calibration text that it was fed,
    0 where none was looked at. rounded: another method was asked for, and it was rounded to nearest for want of tokens.
    weighed: tokens counted by the attention that they get.
    """

    nbytes: int
    bits_per_weight: float
    error: float
    seconds: float
    tokens: int = 0
    rounded: bool = False
    weighed: bool = False

    @classmethod
    def of(cls, weight: torch.Tensor, nbytes: int, error: float, seconds: float) -> LayerReport:
        return cls(nbytes, 8 * nbytes / weight.numel(), error, seconds)


class Quantized(NamedTuple):
    """tensor: what is stored for the linear. None for one that was left as it is, and where a new layer holds it."""

    report: LayerReport
    tensor: QuantizedTensor | None


def left_as_it_is(weight: torch.Tensor) -> Quantized:
    """A linear that no method touches: 16 bits a weight."""
    return Quantized(LayerReport.of(weight, 2 * weight.numel(), 0.0, 0.0), None)


def replace_weight(
    name: str,
    weight: torch.Tensor,
    settings: Settings | None,
    quantize: Callable[[torch.Tensor, Settings], QuantizedTensor],
    gram: torch.Tensor | None = None,
    waited: float = 0.0,
) -> Quantized:
    """Put into a linear's weight what `quantize(weight, settings)` reads back as. Without settings it is left as it is.

    gram: X^T X of the linear's input, [in, in]; with it the report's error is that of the output. waited: seconds that were spent
    for this linear before. Raises what `quantize` raises, a ValueError with the linear's name.
    """
    if settings is None:
        return left_as_it_is(weight)
    start = time.perf_counter()
    with errors_name(name):
        tensor = quantize(weight, settings)
    values = tensor.dequantize().view_as(weight)
    error = lost_share(weight, values, gram)
    weight.copy_(values)
    return Quantized(LayerReport.of(weight, tensor.nbytes, error, waited + time.perf_counter() - start), tensor)


def lost_share(weight: torch.Tensor, values: torch.Tensor, gram: torch.Tensor | None = None) -> float:
    """tr(E G E^T) / tr(W G W^T) with E = values - weight; without a Gram matrix |E|^2 / |W|^2. 0 for a weight of zeros."""
    weight, error = weight.float(), values.float() - weight.float()
    lost, whole = (((t if gram is None else t @ gram) * t).sum(dtype=torch.float64).item() for t in (error, weight))
    return lost / whole if whole else 0.0


@contextmanager
def errors_name(name: str) -> Iterator[None]:
    """Inside, the message of a ValueError gets the name of the linear, which a method does not know, in front."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def defaults_of(function: Callable) -> dict[str, Any]:
    """The arguments of a function that have a default, with it."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
