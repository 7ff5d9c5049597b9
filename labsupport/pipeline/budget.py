"""Which layers should get more bytes: where a byte saves the most error, and how to spend a budget."""

from __future__ import annotations

import torch

from labsupport.quant import checks


def rank_layers(error: torch.Tensor, nbytes: torch.Tensor) -> torch.Tensor:
    """Layers by how much an upgrade is worth: error saved for each byte added, most first.

    error float and nbytes int64 [layers, 2]: before the upgrade and after it. Returns layer numbers, int64 [layers].
    """
    saved = (error[:, 0] - error[:, 1]) / (nbytes[:, 1] - nbytes[:, 0])
    return saved.argsort(descending=True)


def spend(error: torch.Tensor, nbytes: torch.Tensor, budget: int) -> torch.Tensor:
    """A choice for each layer that keeps the sum of errors small and the sum of bytes within the budget.

    error float and nbytes int64 [layers, choices], the cheapest choice first. Starts with the cheapest everywhere and buys, again
    and again, the upgrade that saves the most error for each byte, as long as one fits. Returns choices, int64 [layers].
    Raises ValueError where the cheapest choices already cost more than the budget.
    """
    checks.finite(checks.matrix(error, "error", "[layers, choices]"), "error")
    if nbytes.shape != error.shape:
        raise ValueError(f"nbytes has shape {list(nbytes.shape)}, wanted {list(error.shape)}, that of error")
    rows = torch.arange(len(error))
    choice = torch.zeros(len(error), dtype=torch.int64)
    left = budget - int(nbytes[:, 0].sum())
    if left < 0:
        raise ValueError(f"budget is {budget} bytes, the cheapest choices take {budget - left}")
    while True:
        saved = error[rows, choice][:, None] - error
        extra = nbytes - nbytes[rows, choice][:, None]
        rate = torch.where((extra > 0) & (extra <= left) & (saved > 0), saved / extra.clamp(min=1), -torch.inf)
        if rate.max() == -torch.inf:
            return choice
        layer, option = divmod(int(rate.argmax()), error.shape[1])
        left -= int(extra[layer, option])
        choice[layer] = option
