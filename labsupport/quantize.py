"""A whole model through a method: every linear of its blocks is quantized.

A method that stores weights alone leaves them in the layer as they would read back. int8 rounds what comes into a layer as well,
so it puts another layer in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from labsupport import models
from labsupport.quant import int8, nf4, rtn
from labsupport.quant.int8 import Int8Linear

WEIGHT_ONLY = {"rtn": rtn.quantize, "nf4": nf4.quantize, "int8-weights": int8.quantize}
METHODS = (*WEIGHT_ONLY, "int8")


@dataclass(frozen=True)
class Report:
    """What was stored. nbytes: of the quantized linears, counted. weights: how many they hold."""

    nbytes: int
    weights: int
    layers: dict[str, float]  # bits a weight of each linear

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    method: str = "rtn",
    *,
    overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
    in_place: bool = False,
    **settings: Any,
) -> tuple[nn.Module, Report]:
    """Quantize every linear of the model's blocks; return the model and what it stores.

    settings go to the method: bits, group_size and symmetric for "rtn" (group_size "tensor": one grid for a whole weight);
    codebook, block_size, double_quant for "nf4"; threshold, paper and granularity for "int8" (see Int8Linear), which
    rounds activations too; granularity for "int8-weights", which does not. overrides: other settings for the linears whose full
    name ends in a key, or None to leave them as they are, at 16 bits a weight. A copy is made unless `in_place`.
    Raises ValueError for an unknown method or an override that matches nothing, and what the method raises.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, wanted one of {', '.join(METHODS)}")
    model = model if in_place else models.duplicate(model)
    layers = models.linears(model)
    for key in overrides or {}:
        if not any(name.endswith(key) for name in layers):
            raise ValueError(f"overrides names {key!r}, with which no linear's name ends")
    nbytes, per_layer = 0, {}
    for name, layer in layers.items():
        chosen: Mapping[str, Any] | None = settings
        for key, other in (overrides or {}).items():
            if name.endswith(key):
                chosen = None if other is None else {**settings, **other}
        weight = layer.weight
        if chosen is None:
            stored = 2 * weight.numel()
        elif method == "int8":
            replacement = Int8Linear(layer, **chosen)
            stored = replacement.nbytes
            model.set_submodule(name, replacement)
        else:
            stored, values = _apply(WEIGHT_ONLY[method], weight, dict(chosen))
            weight.copy_(values)
        nbytes += stored
        per_layer[name] = 8 * stored / weight.numel()
    return model, Report(nbytes, sum(layer.weight.numel() for layer in layers.values()), per_layer)


def _apply(method, weight: torch.Tensor, settings: dict[str, Any]) -> tuple[int, torch.Tensor]:
    if settings.get("group_size") == "tensor":
        quantized = method(weight.reshape(1, -1), **settings | {"group_size": None})
    else:
        quantized = method(weight, **settings)
    return quantized.nbytes, quantized.dequantize().view_as(weight)
