"""A whole model through a method: every linear of its blocks is quantized, and what is one in all but its class (model.opened).

A method that stores weights alone leaves in each layer the weights as they read back. int8 rounds what comes into a layer as well,
so it puts another layer in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from labsupport.model import models, opened
from labsupport.model.text import TokenStream
from labsupport.pipeline import calibrate
from labsupport.pipeline.driver import quantize_blocks
from labsupport.pipeline.finished import FinishedBlocks, digest
from labsupport.pipeline.linear import LayerReport, Settings
from labsupport.pipeline.methods import Method, method_named
from labsupport.quant import checks, grid
from labsupport.quant.grid import QuantizedTensor


@dataclass(frozen=True)
class Report:
    """What was stored.

    weights: how many the model's linears hold. layers: what became of each linear, by full name. left_in_float: other matrices
    of the blocks, as routers are, and how many values they hold, by full name; they count with 16 bits each. group_size: the one
    that was chosen; None where it was named, and where the method has none.
    """

    weights: int
    layers: dict[str, LayerReport]
    left_in_float: dict[str, int] = field(default_factory=dict)
    group_size: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices of the blocks, those of linears counted from what is stored."""
        return sum(layer.nbytes for layer in self.layers.values()) + 2 * sum(self.left_in_float.values())

    @property
    def bits_per_weight(self) -> float:
        """Over all matrices of the blocks."""
        return 8 * self.nbytes / (self.weights + sum(self.left_in_float.values()))

    @property
    def rounded(self) -> list[str]:
        """The experts that were rounded to nearest, since too few tokens of the calibration text reached them, by full name."""
        return [name for name, layer in self.layers.items() if layer.rounded]


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

    method: "rtn", "nf4", "int8-weights", "int8", "gptq", "awq": a record in pipeline.methods, which says which settings it takes.
    calibration, which gptq and awq need: token ids, int64 [windows, length] (calibrate.windows), or a stream, of which 64 windows
    of 512 tokens are taken. overrides: other settings for the linears whose full name ends in a key, or None to leave them as they
    are, at 16 bits a weight. A copy is made unless `in_place`. keep: a folder for the finished blocks of a method that needs text;
    a run that was stopped goes on from it. progress: show a bar. stored: a dict that gets each linear's QuantizedTensor by full
    name, for labsupport.checkpoint. An expert is named as in the model's files; int8 leaves each of them a layer of its own.
    Where no group_size is named it is the largest of 128, 64, 32 that divides the inputs of every linear (grid.largest_group_size).
    The same arguments give the same codes.
    Raises ValueError for an unknown method or setting, an override that matches nothing, calibration missing or in vain, a folder
    of another run, and what the method raises.
    """
    models.check_values(model)
    record = method_named(method)
    if not isinstance(overrides or {}, Mapping):
        raise TypeError(f"overrides is {checks.kind(overrides)}, wanted a dict from endings of names to settings")
    for given in (settings, *(other for other in (overrides or {}).values() if other is not None)):
        record.check(given)
    if record.needs_text and calibration is None:
        raise ValueError(f"calibration is missing, but {method} needs text: pass calibration")
    if calibration is not None and not record.needs_text:
        raise ValueError(f"calibration is given, but {method} looks at no text: leave calibration out")
    if keep is not None and not record.needs_text:
        raise ValueError(f"keep is given, but {method} has nothing worth keeping: it takes seconds")
    if stored is not None and record.rounds_activations:
        raise ValueError(f"stored is given beside method {method}, whose layers hold what they store")
    if stored is not None and keep is not None:
        raise ValueError("stored is given beside keep: blocks found there come back as floats")

    def settings_of(name: str) -> Mapping[str, Any] | None:
        chosen: Mapping[str, Any] | None = settings
        for key, other in (overrides or {}).items():
            if name.endswith(key):
                chosen = None if other is None else {**settings, **other}
        return chosen

    model = model if in_place else models.duplicate(model)
    ids = calibrate.windows(calibration) if isinstance(calibration, TokenStream) else calibration
    with opened.opened(model):
        linears = models.linears(model)
        for key in overrides or {}:
            if not any(name.endswith(key) for name in linears):
                raise ValueError(f"overrides names {key!r}, with which no linear's name ends")
        chosen_size = _choose_group_size(record, linears, settings, settings_of)
        weights, left = sum(layer.weight.numel() for layer in linears.values()), models.left_in_float(model)
        finished = None
        if keep is not None:
            finished = FinishedBlocks(Path(keep), {"identity": digest(model, method, ids, settings_of)})
        with tqdm(total=len(linears), desc=method, unit="layer", disable=not progress) as bar:
            layers = quantize_blocks(model, record, settings_of, ids, finished, lambda name: bar.update(), stored=stored)
    return model, Report(weights, layers, left, chosen_size)


def _choose_group_size(
    record: Method, linears: Mapping[str, nn.Linear], settings: dict[str, Any], settings_of: Callable[[str], Settings | None]
) -> int | None:
    """Put a group size into the settings where none is named, and return it. Raises ValueError where one does not fit a linear."""
    given = {name: chosen for name in linears if (chosen := settings_of(name)) is not None}
    widths = {name: linears[name].in_features for name in given}
    wanted, size = record.settings.get("group_size"), None
    if wanted is not None and "group_size" not in settings:
        size = grid.largest_group_size([widths[name] for name in given if "group_size" not in given[name]], wanted)
        settings["group_size"] = size
    for name in given:
        named = given[name].get("group_size")
        if isinstance(named, int) and named > 0 and widths[name] % named:
            raise checks.undivided(named, name, widths)
    return size
