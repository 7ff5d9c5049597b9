"""A whole model through quantization-aware training: its linears compute with weights on a grid while float ones learn.

`prepare` puts the fake quantizers in, `training.fit` trains, `convert` leaves a plain model whose weights are what is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labsupport.model import models
from labsupport.model.models import ModelError
from labsupport.quant import checks, qat
from labsupport.quant.grid import QuantizedTensor


@dataclass(frozen=True)
class Grid:
    """Where weights must stand, and how the gradient gets past the rounding.

    way: "straight-through"; "learned steps", a symmetric grid whose scales learn; "soft", a smooth staircase while it trains and
    real rounding when it is converted; "ternary", which has no other bits. scale_dtype: of the scales, as they are stored.
    """

    way: str = "straight-through"
    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16
    sharpness: float = 8.0


def _straight_through(layer: QATLinear, grid: Grid) -> Tensor:
    return qat.fake_quantize(layer.weight, grid.bits, grid.group_size, grid.symmetric, grid.scale_dtype)


def _soft(layer: QATLinear, grid: Grid) -> Tensor:
    return qat.soft_quantize(layer.weight, grid.bits, grid.group_size, grid.symmetric, grid.scale_dtype, grid.sharpness)


def _learned(layer: QATLinear, grid: Grid) -> Tensor:
    return qat.learned_step(layer.weight, layer.step, grid.bits, grid.scale_dtype)


def _ternary(layer: QATLinear, grid: Grid) -> Tensor:
    return qat.ternary(layer.weight, grid.group_size, grid.scale_dtype)


WAYS: dict[str, Callable[[QATLinear, Grid], Tensor]] = {
    "straight-through": _straight_through, "learned steps": _learned, "soft": _soft, "ternary": _ternary,
}  # fmt: skip


class QATLinear(nn.Module):
    """A linear whose weight learns in float32 and is on a grid, or beside it where the way is soft, in every product.

    step: float32 [out_features, groups], for learned steps; None otherwise.
    """

    def __init__(self, layer: nn.Linear, grid: Grid):
        super().__init__()
        self.grid, self.in_features, self.out_features = grid, layer.in_features, layer.out_features
        self.weight = nn.Parameter(layer.weight.detach().float())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())
        steps = qat.first_steps(self.weight, grid.bits, grid.group_size) if grid.way == "learned steps" else None
        self.step = None if steps is None else nn.Parameter(steps)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, grid={self.grid}"

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, WAYS[self.grid.way](self, self.grid).to(x.dtype), self.bias)

    @torch.no_grad()
    def stored(self) -> QuantizedTensor:
        """The weight as it is stored. It reads back as what `forward` multiplies by, but for a soft one."""
        grid = self.grid
        if grid.way == "ternary":
            return qat.ternary_tensor(self.weight, grid.group_size, grid.scale_dtype)
        return qat.uniform(self.weight, self.step, grid.bits, grid.group_size, grid.symmetric, grid.scale_dtype)


def layers(model: nn.Module) -> dict[str, QATLinear]:
    """The linears with a fake quantizer, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QATLinear)}


def prepare(model: nn.Module, grid: Grid) -> nn.Module:
    """Put a fake quantizer into every linear of the model's blocks, in place; every parameter then learns. Returns the model.

    Raises ValueError for a way that is not in WAYS and a grid that does not fit a weight; ModelError where that was done before,
    or a linear is shared.
    """
    if grid.way not in WAYS:
        raise ValueError(f"way is {grid.way!r}, wanted one of {', '.join(WAYS)}")
    if layers(model):
        raise ModelError("the model has fake quantizers already: convert them, or take a model without")
    models.check_values(model)
    if (name := models.packed(model)) is not None:
        raise ModelError(f"{name} keeps its weight packed: only a float weight can learn, take the model in float")
    if pair := models.shared(model):
        raise ModelError(f"{pair[0]} and {pair[1]} are one weight: a fake quantizer in one place would not be in the other")
    linears = models.linears(model)
    for name, layer in linears.items():
        if grid.group_size is not None and grid.group_size > 0 and layer.in_features % grid.group_size:
            raise checks.undivided(grid.group_size, name, {name: layer.in_features for name, layer in linears.items()})
    prepared = {name: QATLinear(layer, grid) for name, layer in linears.items()}
    for layer in prepared.values():
        layer(torch.zeros(1, layer.in_features, device=layer.weight.device))  # what does not fit is refused before anything changes
    for name, layer in prepared.items():
        model.set_submodule(name, layer)
    return model.requires_grad_(True)


@torch.no_grad()
def convert(model: nn.Module, stored: dict[str, QuantizedTensor] | None = None) -> nn.Module:
    """Put plain linears with the weights that are stored in the place of the fake quantizers, in place. Returns the model.

    stored: gets each linear's QuantizedTensor by full name, for labsupport.checkpoint. Raises ModelError for a model without.
    """
    found = layers(model)
    if not found:
        raise ModelError("the model has no fake quantizers to convert: prepare it first")
    for name, layer in found.items():
        tensor = layer.stored()
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(tensor.dequantize()), layer.bias
        model.set_submodule(name, plain)
        if stored is not None:
            stored[name] = tensor
    return model.eval()
