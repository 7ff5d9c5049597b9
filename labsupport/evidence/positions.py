"""Which token pays: the error that each way to quantize leaves in the values of a token, by where in its window the token stands.

The layers that make the values are quantized alone, each on the inputs of the model in floating point, so that the ways differ in
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from labsupport.model.models import ModelError
from labsupport.pipeline import calibrate, listening
from labsupport.quant import gptq, rtn

WAYS = (ROUNDING, GPTQ, NOT_FIRST, LISTENING) = ("rounding", "gptq", "gptq not first", "gptq by attention")
MEASURED = ("heard", *WAYS)


def edges(length: int) -> list[int]:
    """Where bins of places begin, and the end: the first token, the second, then from one power of two to the next."""
    return [0, *(2**power for power in range((length - 1).bit_length())), length]


@torch.no_grad()
def rows(model: nn.Module, calibration: Tensor, held_out: Tensor, bits: int, group_size: int) -> Iterator[dict[str, Any]]:
    """For each block: the mean of |E x_t|^2 in each bin of places (`edges`), E the error of the weight that makes the values, on
    `held_out`, by way; and `heard`, the share of all attention, squared and summed over queries and heads, that a bin gets.

    calibration, held_out: token ids, int64 [windows, length], of one length. GPTQ goes through columns from left to right.
    Raises ModelError where tokens cannot be weighed by the attention that they get (listening.makes_values); ValueError for texts
    of two lengths.
    """
    if calibration.shape[1] != held_out.shape[1]:
        raise ValueError(
            f"calibration has windows of {calibration.shape[1]} tokens, held_out of {held_out.shape[1]}: wanted one length"
        )
    bins = list(pairwise(edges(held_out.shape[1])))
    for block in calibrate.blocks(model, torch.cat([calibration, held_out])):
        name = listening.makes_values(block)
        if name is None:
            raise ModelError(f"block {block.index} has no linear whose output, as it stands, is the values of its attention")
        weight = block.linears[name].weight.detach().float().cpu()
        x, w = listening.received(block, name)
        seen, weights, x, w = x[: len(calibration)], w[: len(calibration)], x[len(calibration) :], w[len(calibration) :]
        later, every = seen[:, 1:].flatten(0, 1), seen.flatten(0, 1)
        hessians = {GPTQ: every.t() @ every, NOT_FIRST: later.t() @ later, LISTENING: (weights.reshape(-1, 1) * every).t() @ every}
        solved = {ROUNDING: rtn.quantize(weight, bits, group_size)}
        solved |= {way: gptq.quantize(weight, hessian, bits, group_size) for way, hessian in hessians.items()}
        row: dict[str, Any] = {"block": block.index, "bits": bits, "group_size": group_size}
        row["heard"] = [round((w[:, start:end].sum() / w.sum()).item(), 6) for start, end in bins]
        for way in WAYS:
            errors = (x @ (solved[way].dequantize() - weight).t()).square().sum(2)
            row[way] = [float(f"{errors[:, start:end].mean().item():.6g}") for start, end in bins]
        yield row
