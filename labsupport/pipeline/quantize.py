"""A whole model through a method: every linear of its blocks is quantized.

A method that stores weights alone leaves them in the layer as they would read back. int8 rounds what comes into a layer as well,
so it puts another layer in its place.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from labsupport.model import models
from labsupport.model.text import TokenStream
from labsupport.pipeline import calibrate, calibrated
from labsupport.pipeline.calibrated import LayerReport, lost_share
from labsupport.quant import int8, nf4, rtn
from labsupport.quant.grid import QuantizedTensor
from labsupport.quant.int8 import Int8Linear

WEIGHT_ONLY = {"rtn": rtn.quantize, "nf4": nf4.quantize, "int8-weights": int8.quantize}
CALIBRATED = ("gptq", "awq")
METHODS = (*WEIGHT_ONLY, "int8", *CALIBRATED)


@dataclass(frozen=True)
class Report:
    """What was stored. weights: how many the quantized linears hold. layers: what became of each, by full name."""

    weights: int
    layers: dict[str, LayerReport]

    @property
    def nbytes(self) -> int:
        """Bytes of all linears, counted from what is stored."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    method: str = "rtn",
    *,
    calibration: torch.Tensor | TokenStream | None = None,
    overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
    in_place: bool = False,
    keep: str | Path | None = None,
    progress: bool = False,
    stored: dict[str, QuantizedTensor] | None = None,
    **settings: Any,
) -> tuple[nn.Module, Report]:
    """Quantize every linear of the model's blocks; return the model and what became of each linear.

    settings go to the method:
    - "rtn": bits, group_size ("tensor": one grid for a whole weight), symmetric; see quant.rtn.quantize.
    - "nf4": codebook, block_size, double_quant, absmax_dtype; see quant.nf4.quantize.
    - "int8": threshold, paper, granularity; see quant.int8.Int8Linear. It rounds activations too.
    - "int8-weights": granularity. It does not.
    - "gptq": bits, group_size, symmetric, act_order, static_groups, damping, mse, ...; see quant.gptq.quantize.
    - "awq": bits, group_size, symmetric, rule, n_grid, autoawq_grid; see quant.awq.search. loss: "gram", or "block" for the output
      of attention and MLP. clip: False for scales alone. base: "rtn", or "gptq" for GPTQ of the scaled weights.

    calibration, which gptq and awq need: token ids, int64 [windows, length] (calibrate.windows), or a stream, of which 64 windows
    of 512 tokens are taken. overrides: other settings for the linears whose full name ends in a key, or None to leave them as they
    are, at 16 bits a weight. A copy is made unless `in_place`. keep: a folder for gptq's and awq's finished blocks, from which
    a run that was stopped goes on. progress: show a bar. stored: a dict that gets each linear's QuantizedTensor by full name, for
    labsupport.checkpoint. The same arguments give the same codes.
    Raises ValueError for an unknown method, an override that matches nothing, calibration missing or in vain, a folder of another
    run, and what the method raises.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, wanted one of {', '.join(METHODS)}")
    if (method in CALIBRATED) != (calibration is not None):
        said = "needs text: pass calibration" if method in CALIBRATED else "looks at no text: leave calibration out"
        raise ValueError(f"calibration is {'missing' if calibration is None else 'given'}, but {method} {said}")
    if keep is not None and method not in CALIBRATED:
        raise ValueError(f"keep is given, but {method} has nothing worth keeping: it takes seconds")
    if stored is not None and (method == "int8" or keep is not None):
        other = "keep: blocks found there come back as floats" if keep else "method int8, whose layers hold what they store"
        raise ValueError(f"stored is given beside {other}")
    names = models.linears(model).keys()
    for key in overrides or {}:
        if not any(name.endswith(key) for name in names):
            raise ValueError(f"overrides names {key!r}, with which no linear's name ends")

    def settings_of(name: str) -> Mapping[str, Any] | None:
        chosen: Mapping[str, Any] | None = settings
        for key, other in (overrides or {}).items():
            if name.endswith(key):
                chosen = None if other is None else {**settings, **other}
        return chosen

    model = model if in_place else models.duplicate(model)
    weights = sum(layer.weight.numel() for layer in models.linears(model).values())
    with tqdm(total=len(names), desc=method, unit="layer", disable=not progress) as bar:
        if method in CALIBRATED:
            ids = calibrate.windows(calibration) if isinstance(calibration, TokenStream) else calibration
            kept = None if keep is None else Path(keep)
            layers = calibrated.quantize_blocks(model, method, ids, settings_of, kept, lambda _: bar.update(), stored=stored)
        else:
            layers = {}
            for name, layer in models.linears(model).items():
                layers[name] = quantize_linear(model, method, name, layer, settings_of(name), stored)
                bar.update()
    return model, Report(weights, layers)


def quantize_linear(
    model: nn.Module,
    method: str,
    name: str,
    layer: nn.Linear,
    settings: Mapping[str, Any] | None,
    stored: dict[str, QuantizedTensor] | None = None,
) -> LayerReport:
    """Quantize one linear, in place, by a method that looks at no text. Without settings it is left as it is."""
    weight, start = layer.weight, time.perf_counter()
    if settings is None:
        return LayerReport.of(weight, 2 * weight.numel(), 0.0, 0.0)
    if method == "int8":
        replacement = Int8Linear(layer, **settings)
        model.set_submodule(name, replacement)
        made, values = replacement, replacement.stored.dequantize()
    elif settings.get("group_size") == "tensor":
        made = WEIGHT_ONLY[method](weight.reshape(1, -1), **{**settings, "group_size": None})
        values = made.dequantize().view_as(weight)
    else:
        made = WEIGHT_ONLY[method](weight, **settings)
        values = made.dequantize()
    error = lost_share(weight, values)
    if method != "int8":
        weight.copy_(values)
    if stored is not None:
        stored[name] = made
    return LayerReport.of(weight, made.nbytes, error, time.perf_counter() - start)
