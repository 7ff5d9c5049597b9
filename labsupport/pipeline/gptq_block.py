"""A block by GPTQ, true sequential: each linear is fed by what those before it have become."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from labsupport.pipeline.block import Block
from labsupport.pipeline.linear import Quantized, Settings, defaults_of, replace_weight
from labsupport.quant import gptq
from labsupport.quant.grid import QuantizedTensor


class GPTQBlocks:
    SETTINGS: ClassVar[Mapping[str, Any]] = defaults_of(gptq.quantize)

    def __init__(self, model: nn.Module):
        """Any model will do: GPTQ changes nothing but the linears."""

    def __call__(self, block: Block, settings: Mapping[str, Settings | None]) -> dict[str, Quantized]:
        made, start = {}, time.perf_counter()
        for name, statistics in block.fed():

            def quantize(weight: torch.Tensor, chosen: Settings, statistics=statistics) -> QuantizedTensor:
                return gptq.quantize(weight, statistics.hessian, **chosen)

            waited = time.perf_counter() - start
            made[name] = replace_weight(name, block.linears[name].weight, settings[name], quantize, statistics.gram, waited)
            start = time.perf_counter()
        return made
