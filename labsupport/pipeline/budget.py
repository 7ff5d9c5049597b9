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


def stored_bytes(shapes: torch.Tensor, options: torch.Tensor) -> torch.Tensor:
    """What matrices take on asymmetric grids, to the byte: codes, a float16 scale a group and its zero-point, a code as well.

    shapes: int64 [matrices, 2], out_features and in_features. options: int64 [options, 2], bits and group size.
    Returns int64 [matrices, options]. Raises ValueError for a group size that does not divide in_features.
    """
    bits, size = options.unbind(1)
    weights, columns = shapes.prod(1)[:, None], shapes[:, 1, None]
    if (columns % size).any():
        raise ValueError(f"group sizes {size.unique().tolist()} do not all divide in_features {columns.unique().tolist()}")
    groups = weights // size
    return (weights * bits + 7) // 8 + 2 * groups + (groups * bits + 7) // 8


def allocate(loss: torch.Tensor, shapes: torch.Tensor, options: torch.Tensor, budget: int) -> torch.Tensor:
    """An option for each matrix that keeps the sum of losses small and all bytes within the budget, by `spend`.

    loss: float [matrices, options]. shapes, options: as `stored_bytes` has them, options in any order. Returns int64 [matrices].
    Raises ValueError where even the cheapest options cost more than the budget.
    """
    nbytes = stored_bytes(shapes, options)
    order = nbytes.argsort(dim=1, stable=True)
    place = spend(loss.gather(1, order), nbytes.gather(1, order), budget)
    return order[torch.arange(len(order)), place]
