"""Perplexity of a model that is never in memory as a whole: all the text goes through one block, then through the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from labsupport.checkpoint.skeleton import Skeleton
from labsupport.checkpoint.weights import CheckpointError
from labsupport.model import evaluate, memory, models
from labsupport.model.evaluate import Evaluation
from labsupport.model.text import TokenStream
from labsupport.pipeline import calibrate
from labsupport.pipeline.block import Block, Resident

# A run holds a block at a time, and a model that is loaded as a whole for one window must not need more: 0.8 GB in float32.
COMPARED = 200_000_000
# The same products, summed in another order: each block may add some units in the last place, 2**-24, to what it is fed.
# A head, a norm or a mask that is read wrongly changes the loss by percent.
SAME = 1e-3

# What is wrong with files and the machine. Whatever else is raised while a model runs is its own code's.
OURS = (CheckpointError, SafetensorError, OSError, MemoryError)


def in_short(error: Exception) -> str:
    """The first line of an error from a model's own code, and its kind."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def compare_with_transformers(source: Path, skeleton: Skeleton, stream: TokenStream, length: int) -> str:
    """A sentence about whether the model, read block by block, is the one that transformers reads: by the loss on one window.

    Raises CheckpointError where it is not, and what reading the files raises.
    """
    count = sum(parameter.numel() for parameter in skeleton.model.parameters())
    if count > COMPARED or 8 * count > memory.here().free:
        return f"Not compared with transformers' own reading of the model, whose {count:,} parameters it would hold at once."
    try:
        ours = evaluate_streamed(skeleton.model, skeleton, stream, length, 1).mean_loss
        model, _ = models.load_model(str(source), skeleton.device, torch.float32)
        theirs = evaluate.evaluate(model, stream, length, 1).mean_loss
    except OURS:
        raise
    except Exception as error:  # it can be quantized and yet not be run
        return f"Not compared with transformers' own reading of the model: {in_short(error)}."
    if ours != theirs and not abs(ours - theirs) <= SAME * max(1.0, theirs):
        raise CheckpointError(
            f"labs reads {source} otherwise than transformers does: on one window the loss is {ours:.4f} nats a token, "
            f"{theirs:.4f} by from_pretrained. Please report it with the model's name; --windows 0 leaves this check out"
        )
    return f"On one window its loss is that of transformers' own reading of the model, {theirs:.4f} nats a token."


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
    for block in calibrate.blocks(model, ids, evaluate.batch_size(model, length), weights):
        at_block(block)
        if block.index + 1 == len(modules):
            last = list(block.outputs())
            returned = block.returned
    with weights.outside(), calibrate.passing_through(modules, returned, iter(last)):
        return evaluate.evaluate(model, stream, length, windows)
