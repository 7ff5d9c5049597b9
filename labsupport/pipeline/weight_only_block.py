"""A block by a method that looks at a weight alone: each linear by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from labsupport.pipeline.block import Block
from labsupport.pipeline.linear import Quantized, Settings, replace_weight
from labsupport.quant.grid import QuantizedTensor


class WeightOnlyBlocks:
    """quantize(weight, **settings): for example rtn.quantize. Where group_size is "tensor", a whole weight is one group."""

    def __init__(self, quantize: Callable[..., QuantizedTensor]):
        self.quantize = quantize

    def __call__(self, block: Block, settings: Mapping[str, Settings | None]) -> dict[str, Quantized]:
        return {name: replace_weight(name, layer.weight, settings[name], self._quantize) for name, layer in block.linears.items()}

    def _quantize(self, weight: torch.Tensor, settings: Settings) -> QuantizedTensor:
        if settings.get("group_size") == "tensor":
            return self.quantize(weight.reshape(1, -1), **{**settings, "group_size": None})
        return self.quantize(weight, **settings)
