"""Perplexity of a model that is never in memory as a whole: all the text goes through one block, then through the next."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from labsupport.model import evaluate, models
from labsupport.model.evaluate import Evaluation
from labsupport.model.text import TokenStream
from labsupport.pipeline import calibrate
from labsupport.pipeline.block import Block, Resident


@torch.no_grad()
def evaluate_streamed(
    model: nn.Module,
    weights: Resident,
    stream: TokenStream,
    length: int,
    windows: int | None,
    at_block: Callable[[Block], object] = lambda block: None,
) -> Evaluation:
    """The same as evaluate.evaluate, with one block's weights in memory at a time.

    at_block: called with each block when its weights are in memory and before it is run; it may change them.
    """
    ids = stream.ids[stream.positions(length, windows)]
    modules = models.blocks(model)
    last: list[torch.Tensor] = []
    returned = 0
    for block in calibrate.blocks(model, ids, evaluate.BATCH, weights):
        at_block(block)
        if block.index + 1 == len(modules):
            last = list(block.outputs())
            returned = block.returned
    with weights.outside(), calibrate.passing_through(modules, returned, iter(last)):
        return evaluate.evaluate(model, stream, length, windows)
