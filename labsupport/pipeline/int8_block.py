"""A block by LLM.int8(): activations are rounded as well, so another layer is put in each linear's place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from labsupport.pipeline.block import Block
from labsupport.pipeline.linear import LayerReport, Quantized, Settings, defaults_of, errors_name, left_as_it_is, lost_share
from labsupport.quant.int8 import Int8Linear


class Int8Blocks:
    SETTINGS: ClassVar[Mapping[str, Any]] = defaults_of(Int8Linear)

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, block: Block, settings: Mapping[str, Settings | None]) -> dict[str, Quantized]:
        return {name: self._quantize(name, layer, settings[name]) for name, layer in block.linears.items()}

    def _quantize(self, name: str, layer: nn.Linear, settings: Settings | None) -> Quantized:
        if settings is None:
            return left_as_it_is(layer.weight)
        start = time.perf_counter()
        with errors_name(name):
            replacement = Int8Linear(layer, **settings)
        self.model.set_submodule(name, replacement)
        error = lost_share(layer.weight, replacement.stored.dequantize())
        return Quantized(LayerReport.of(layer.weight, replacement.nbytes, error, time.perf_counter() - start), None)
