"""Activation-aware weight quantization: stretch the channels that matter before rounding, divide their inputs by as much.

Lin et al. 2023, "AWQ", arXiv:2306.00978, section 3. With a scale s for each input channel, x W^T = (x / s) (W s)^T, so nothing
changes until W s is rounded; then the error of Q(W s) / s counts. A stretched channel is rounded more finely, as long as it does
not stretch the steps of its whole group. `search` tries several scales made from the inputs' magnitudes and keeps the best.

    found = awq.search([q, k, v], x.T @ x, awq.saliency(x))     # one scale for all linears that read x
    rtn.quantize(q * found.scale)                               # once 1 / scale is folded into what comes before: pipeline.fold

Nothing else is stored. GPTQ on top of AWQ's scales is GPTQ of the folded model, with Hessians measured there, or
`scaled_gram(hessian, found.scale)`, which is the same matrix.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Literal

import torch

from labsupport.quant import checks, grid, rtn
from labsupport.quant.grid import UniformTensor

Rule = Literal["llm-awq", "autoawq"]
RULES = ("llm-awq", "autoawq")
SMALLEST_SCALE = 1e-4  # in both libraries: of a channel that never saw an input, before all scales are divided by their middle
CLIP_TOKENS = 512


@dataclass(frozen=True)
class Search:
    """scale: float32 [in_features], the best one. ratio: its exponent. losses: float64 [n_grid], at the ratios i / n_grid."""

    scale: torch.Tensor
    ratio: float
    losses: torch.Tensor


def saliency(inputs: torch.Tensor) -> torch.Tensor:
    """How much each input channel matters: its mean magnitude (section 3.1). [..., in_features] -> float32 [in_features]."""
    checks.tensor(inputs, "inputs")
    if inputs.ndim == 0 or inputs.numel() == 0:
        raise ValueError(f"inputs has shape {list(inputs.shape)}, wanted [..., in_features], none of them 0")
    flat = inputs.reshape(-1, inputs.shape[-1])
    mean = flat.abs().float().sum(0) / len(flat)
    if not mean.isfinite().all():
        raise checks.not_finite(flat, "inputs")
    return mean


def relative_magnitude(weights: Sequence[torch.Tensor], group_size: int) -> torch.Tensor:
    """Mean over all rows of |W| relative to the largest of its group, AutoAWQ's w_mean. float32 [in_features]."""
    stacked = _stacked(weights)
    groups = stacked.view(-1, group_size).abs()
    return (groups / (groups.amax(1, keepdim=True) + 1e-6)).view_as(stacked).mean(0)


def scale_at(ratio: float, mean_abs: torch.Tensor, magnitude: torch.Tensor | None = None) -> torch.Tensor:
    """The scale of each input channel at one ratio, float32 [in_features] > 0.

    mean_abs to the power of ratio (equation 5): at 0 all scales are 1, and rounding is plain. With `magnitude`, the relative
    magnitude of the weights, AutoAWQ's rule: that, divided by magnitude to the power of 1 - ratio, so that rounding is not plain
    at 0. Both libraries clamp the scales and divide them by the geometric mean of the largest and the smallest. A channel that
    never saw an input is clamped: it gets the smallest scale, and its weights are rounded most coarsely, but to finite numbers.
    """
    scale = mean_abs.pow(ratio)
    if magnitude is not None:
        scale = scale / (magnitude.pow(1 - ratio) + 1e-4)
    scale = scale.clamp(min=SMALLEST_SCALE)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(scale.isfinite(), scale, torch.ones_like(scale))


def search(
    weights: Sequence[torch.Tensor],
    gram: torch.Tensor | None,
    mean_abs: torch.Tensor,
    bits: int = 4,
    group_size: int | None = 128,
    rule: Rule = "llm-awq",
    n_grid: int = 20,
    symmetric: bool = False,
    autoawq_grid: bool = False,
    loss: Callable[[list[torch.Tensor]], float] | None = None,
) -> Search:
    """Try the ratios 0, 1/n_grid, ... below 1 and keep the scale with the least loss; at a tie the smaller ratio.

    weights: the linears that share an input, each float [out_features, in_features]; they are not changed. gram: X^T X of that
    input, float [in_features, in_features], times any positive factor (a Hessian will do). mean_abs: its `saliency`. The loss is
    the linears' own output error, tr(E G E^T) with E = Q(W s) / s - W: the squared error on X, without X. Or it is `loss`, called
    with what each weight would read back as (see `fold.module_loss`); gram may then be None.

    rule: how scales are made, see `scale_at`. The grid is that of rtn.quantize, or with autoawq_grid that of `quantize_as_autoawq`
    in float32. For AutoAWQ's scales to the bit: rule "autoawq", autoawq_grid and fold.module_loss.
    Raises ValueError for shapes that do not fit, for NaN and infinity, for a zero gram, and where no ratio has a finite loss.
    """
    stacked = _stacked(weights)
    bits, size = checks.bits(bits), checks.group_size(group_size, stacked.shape[1])
    checks.finite(stacked, "weights")
    checks.choice(rule, "rule", RULES)
    n_grid = checks.whole(n_grid, "n_grid", wanted="a positive whole number")
    mean_abs = _checked_mean(mean_abs, stacked)
    loss = loss or partial(_output_error, stacked, _checked_gram(gram, stacked))
    magnitude = relative_magnitude([stacked], size) if rule == "autoawq" else None
    rounded = _rounding(bits, size, symmetric, autoawq_grid)
    rows = [len(weight) for weight in weights]

    best, losses = None, torch.full((n_grid,), math.nan, dtype=torch.float64)
    for i in range(n_grid):
        scale = scale_at(i / n_grid, mean_abs, magnitude)
        values = rounded(stacked * scale).div_(scale)  # Q(W s) / s
        found: object = loss(list(values.split(rows)))
        if not isinstance(found, Real):
            raise TypeError(f"loss returns {checks.kind(found)}, wanted a number")
        losses[i] = float(found)
        if losses[i] < (math.inf if best is None else losses[best]):
            best, best_scale = i, scale
    if best is None:
        raise ValueError(f"no ratio has a finite loss: the first is {losses[0].item()}")
    return Search(best_scale, best / n_grid, losses)


def _output_error(weight: torch.Tensor, gram: torch.Tensor, values: list[torch.Tensor]) -> float:
    """tr(E G E^T): the sum of the squares of X E^T."""
    error = torch.cat(values).sub_(weight)
    products = (error @ gram).mul_(error)
    loss = products.sum(dtype=torch.float64).item()
    _check_squares(products, loss)
    return loss


def _check_squares(products: torch.Tensor, loss: float) -> None:
    """Raise ValueError where a sum of squares is below 0 by more than rounding."""
    if loss < 0 and loss < -checks.SLACK * products.abs().sum(dtype=torch.float64).item():
        raise ValueError(f"gram is no X^T X: the error of an output is below 0 with it, {loss:.3g}")


def scaled_gram(gram: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The Gram matrix (or Hessian) of the inputs once they are divided by scale: entry i, j over scale i and scale j."""
    return gram / scale[:, None] / scale


def search_clip(
    weight: torch.Tensor,
    gram: torch.Tensor,
    bits: int = 4,
    group_size: int | None = 128,
    n_grid: int = 20,
    max_shrink: float = 0.5,
    symmetric: bool = False,
    autoawq_grid: bool = False,
) -> torch.Tensor:
    """The magnitude at which each group is best clipped, float32 [out_features, groups].

    Tries the group's own largest magnitude times 1, 1 - 1/n_grid, ... above 1 - max_shrink: ten steps down to 0.55, as both
    libraries do. The loss is the squared error of the group's part of the output on the inputs: E_g G_gg E_g^T, for which a
    diagonal block of the Gram matrix is enough. weight: as it will be rounded, that is, after scaling; gram: X^T X of the inputs
    that it then reads, see `scaled_gram`. AutoAWQ takes X from `clip_tokens`, and does not clip q and k, since their product
    counts. Raises ValueError for shapes that do not fit, for NaN and infinity, and for a gram that is zero.
    """
    bits, size = checks.weight_and_grid(weight, bits, group_size)
    checks.finite(weight, "weight")
    n_grid = checks.whole(n_grid, "n_grid", wanted="a positive whole number")
    max_shrink = checks.number(max_shrink, "max_shrink", sys.float_info.min, 1, "a share above 0, at most 1")
    weight = weight.detach().float()
    groups = len(weight.T) // size
    blocks = _checked_gram(gram, weight).view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    rounded = _rounding(bits, size, symmetric, autoawq_grid)
    largest = weight.view(-1, groups, size).abs().amax(2)  # [out, groups]
    least, best = torch.full_like(largest, math.inf), largest.clone()
    for step in range(max(1, int(max_shrink * n_grid))):
        limit = largest * (1 - step / n_grid)
        error = rounded(clip(weight, limit)).sub_(weight).view(-1, groups, size).transpose(0, 1)  # [groups, out, size]
        products = (error @ blocks).mul_(error)
        loss = products.sum(2).T  # E_g G_gg E_g^T, row by row
        if (worst := loss.min().item()) < 0:
            _check_squares(products, worst)
        better = loss < least
        least, best = torch.where(better, loss, least), torch.where(better, limit, best)
    return best


def clip(weight: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """The weight with every group clamped to plus and minus its limit, [out_features, groups]."""
    groups = weight.unflatten(1, (limit.shape[1], -1))
    return groups.clamp(-limit[..., None], limit[..., None]).flatten(1)


def clip_tokens(inputs: torch.Tensor) -> torch.Tensor:
    """The inputs on which AutoAWQ searches clips: every n-th token, so that 512 to 1023 remain.

    [..., in_features] -> [tokens, in_features].
    """
    flat = inputs.reshape(-1, inputs.shape[-1])
    return flat[:: max(1, len(flat) // CLIP_TOKENS)]


def quantize_as_autoawq(
    weight: torch.Tensor, bits: int = 4, group_size: int | None = 128, dtype: torch.dtype = torch.float16
) -> UniformTensor:
    """Round to nearest on AutoAWQ's grid, from the least to the largest weight of a group, whether or not 0 lies between.

    The zero-point is clamped to a code, so a group that lies to one side of 0 saturates: weights between 1 and 2 all read back as
    about 1. rtn.quantize reaches to 0 instead. weight: float [out_features, in_features], cast to `dtype`, in which the
    arithmetic is done: float16 for what AutoAWQ stores (float32 gives some other codes), float32 for its searches. Raises what
    rtn.quantize raises.
    """
    bits, size = checks.weight_and_grid(weight, bits, group_size)
    rows, columns = weight.shape
    groups = weight.detach().to(checks.float_dtype(dtype, "dtype")).view(rows, -1, size)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    if not (low.isfinite().all() and high.isfinite().all()):
        raise checks.not_finite(weight.to(dtype))
    maxq = 2**bits - 1
    scale = (high - low).clamp(min=1e-5) / maxq
    zero_point = (-torch.round(low / scale)).clamp(0, maxq)
    codes = (torch.round(groups / scale) + zero_point).clamp(0, maxq)
    return UniformTensor(
        packed_codes=grid.pack_bits(codes.to(torch.uint8), bits),
        scale=scale.flatten(1),
        packed_zero_points=grid.pack_bits(zero_point.to(torch.uint8), bits),
        bits=bits,
        group_size=size,
        shape=(rows, columns),
    )


def _rounding(bits: int, size: int, symmetric: bool, autoawq_grid: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from a weight to what it reads back as, float32."""
    if symmetric and autoawq_grid:
        raise ValueError("symmetric and autoawq_grid exclude each other: AutoAWQ's grid is asymmetric here")
    if autoawq_grid:
        return lambda weight: quantize_as_autoawq(weight, bits, size, torch.float32).dequantize()
    return lambda weight: rtn.quantize(weight, bits, size, symmetric).dequantize()


def _stacked(weights: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    """float32 [sum of out_features, in_features]. A single tensor is refused."""
    if not isinstance(weights, list | tuple) or not weights:
        what = "empty" if isinstance(weights, list | tuple) else checks.kind(weights)
        raise ValueError(f"weights is {what}, wanted a list of the weights that share an input")
    for index, weight in enumerate(weights):
        checks.matrix(weight, f"weights[{index}]")
        if weight.shape[1] != weights[0].shape[1]:
            raise ValueError(f"weights[{index}] has in_features {weight.shape[1]}, weights[0] has {weights[0].shape[1]}")
    return torch.cat([weight.detach().float() for weight in weights])


def _checked_mean(mean_abs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    checks.tensor(mean_abs, "mean_abs")
    if mean_abs.shape != weight.shape[1:]:
        raise ValueError(f"mean_abs has shape {list(mean_abs.shape)}, wanted one value for each of {weight.shape[1]} in_features")
    mean_abs = checks.finite(mean_abs.to(weight), "mean_abs")
    if (mean_abs < 0).any():
        raise ValueError(f"mean_abs reaches down to {mean_abs.min().item():.3g}, wanted means of magnitudes")
    return mean_abs


def _checked_gram(gram: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    given = checks.square(gram, "gram", weight.shape[1])
    return checks.gram(given.to(weight), "gram", weight.shape[1])
