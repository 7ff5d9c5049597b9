"""The one way through a model: block by block, each quantized by a method, kept if that is asked for, and let go.

A method that looks at text sees each block fed by what the blocks before it have become.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from labsupport.pipeline import calibrate
from labsupport.pipeline.block import Block, Resident
from labsupport.pipeline.finished import FinishedBlocks
from labsupport.pipeline.linear import LayerReport, Settings
from labsupport.pipeline.methods import BlockQuantizer, Method
from labsupport.quant.grid import QuantizedTensor


@torch.no_grad()
def quantize_blocks(
    model: nn.Module,
    method: Method,
    settings_of: Callable[[str], Settings | None],
    ids: torch.Tensor | None = None,
    finished: FinishedBlocks | None = None,
    on_linear: Callable[[str], None] = lambda name: None,
    weights: Resident | None = None,
    stored: dict[str, QuantizedTensor] | None = None,
) -> dict[str, LayerReport]:
    """Quantize a model in place. Returns what became of each linear, by full name.

    settings_of(name): what goes to the method for a linear, None to leave it as it is. ids: calibration text, int64
    [windows, length], for a method that needs it. finished: keeps the blocks; those that it has are put back and not quantized
    again. on_linear(name) is called for each linear when its block is done. weights: see calibrate.blocks. stored: gets each
    linear's QuantizedTensor by name, but not those of blocks that were put back.
    Raises what `finished`, calibrate.blocks and the method raise.
    """
    quantize = method.on(model)
    blocks = calibrate.blocks(model, ids, weights=weights) if method.needs_text else calibrate.bare_blocks(model, weights)
    reports: dict[str, LayerReport] = {}
    for block in blocks:
        found = finished.read(block) if finished else None
        if found is None:
            found = _quantize_block(quantize, block, settings_of, finished, stored)
        for name in block.linears:
            reports[name] = found[name]
            on_linear(name)
    return reports


def _quantize_block(
    quantize: BlockQuantizer,
    block: Block,
    settings_of: Callable[[str], Settings | None],
    finished: FinishedBlocks | None,
    stored: dict[str, QuantizedTensor] | None,
) -> dict[str, LayerReport]:
    """A function of its own, so that what a block has become is let go before the next one is read."""
    made = quantize(block, {name: settings_of(name) for name in block.linears})
    reports = {name: made[name].report for name in block.linears}
    tensors = {name: made[name].tensor for name in block.linears if made[name].tensor is not None}
    if finished is not None:
        finished.write(block, reports, tensors)
    if stored is not None:
        stored |= tensors
    return reports
