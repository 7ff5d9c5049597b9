"""LoRA through a frozen base that stays packed (Hu et al. 2021, arXiv:2106.09685; QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

A layer gives y = x W^T + (alpha / r) (x A^T) B^T. W is frozen and kept as it is stored; A [r, in] and B [out, r] learn. For the
gradient of x, W is read back a second time; its own gradient is never needed, so nothing of x is kept for it:

    dL/dx = dL/dy W + (alpha / r) (dL/dy B) A,    dL/dB = (alpha / r) dL/dy^T (x A^T),    dL/dA = (alpha / r) (dL/dy B)^T x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labsupport.model import models
from labsupport.model.models import ModelError
from labsupport.quant import checks
from labsupport.quant.grid import QuantizedTensor


class ReadBack(torch.autograd.Function):
    """x W^T for a W that is kept packed: it is read back for the product, let go, and read back again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: QuantizedTensor) -> Tensor:
        ctx.stored = stored
        return x @ stored.dequantize().to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.stored.dequantize().to(gradient.dtype), None


class Narrow(torch.autograd.Function):
    """x A^T in A's dtype. For A's gradient x is kept as it came: a copy in A's dtype is made again when it is needed.

    x.to(A.dtype) @ A.t() would keep that copy. Where x is bfloat16 and A float32 it is twice as large as x, and each layer that
    reads x has one of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(x, a)
        return x.to(a.dtype) @ a.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        x, a = ctx.saved_tensors
        of_x = (gradient @ a).to(x.dtype) if ctx.needs_input_grad[0] else None
        return of_x, gradient.flatten(0, -2).t() @ x.flatten(0, -2).to(a.dtype)


class LoRALinear(nn.Module):
    """A linear with a frozen base and an adapter that learns.

    layer: the linear as it was, whose weight and bias are frozen. stored: what is kept in its weight's place; None keeps the float
    weight. rank: r. A begins random, uniform within 1 / sqrt(in_features), B at zero, so that the layer begins as its base, as
    peft's does. A and B are float32, or float64 where the weight is.
    """

    def __init__(self, layer: nn.Linear, stored: QuantizedTensor | None, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.in_features, self.out_features, self.scaling = layer.in_features, layer.out_features, alpha / rank
        weight = layer.weight
        self.stored = stored
        self.weight = None if stored is not None else nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        limit = 1 / math.sqrt(layer.in_features)
        a = limit * (2 * torch.rand(rank, layer.in_features, generator=generator) - 1)
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        self.lora_a = nn.Parameter(a.to(weight.device, dtype))
        self.lora_b = nn.Parameter(torch.zeros(layer.out_features, rank, device=weight.device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        base = x @ self.weight.t() if self.stored is None else ReadBack.apply(x, self.stored)
        if self.bias is not None:
            base = base + self.bias
        adapter = F.linear(Narrow.apply(x, self.lora_a), self.lora_b)
        return base + (self.scaling * adapter).to(base.dtype)

    @property
    def update(self) -> Tensor:
        """What the adapter adds to the weight: (alpha / r) B A, [out_features, in_features]."""
        return self.scaling * self.lora_b.detach() @ self.lora_a.detach()

    def base_weight(self) -> Tensor:
        """The frozen weight, as it reads back. [out_features, in_features]."""
        return self.weight.detach() if self.stored is None else self.stored.dequantize()

    @property
    def base_nbytes(self) -> int:
        """Bytes of the frozen weight while it trains: of what is stored, not of what it reads back as."""
        return self.weight.nbytes if self.stored is None else self.stored.nbytes

    def _apply(self, function: Any, recurse: bool = True) -> LoRALinear:
        """Moves what is stored with everything else; it keeps its dtypes."""
        moved = super()._apply(function, recurse)
        if self.stored is not None:
            self.stored = _moved(self.stored, function(torch.empty(0)).device)
        return moved


def _moved(stored: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    parts = {field.name: getattr(stored, field.name) for field in fields(stored)}
    tensors = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)}
    nested = {name: _moved(part, device) for name, part in parts.items() if isinstance(part, QuantizedTensor)}
    return replace(stored, **tensors, **nested)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with an adapter, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add(
    model: nn.Module, stored: Mapping[str, QuantizedTensor] | None = None, rank: int = 8, alpha: float = 16.0, seed: int = 0
) -> nn.Module:
    """Freeze the model and put an adapter beside every linear of its blocks, in place. Returns the model.

    stored: what quantize_model(..., stored=) kept of each linear, by full name, for a base that stays packed; a linear that it does
    not name, and every one without `stored`, keeps its float weight. Raises ValueError for a rank that is not from 1 to the smaller
    side of every weight, and for a name that is no linear; ModelError where adapters are there already, or a linear is shared.
    """
    alpha = checks.number(alpha, "alpha", 0)
    if adapters(model):
        raise ModelError("the model has adapters already: merge them, or take a model without")
    layers = models.linears(model)
    smallest = min(min(layer.weight.shape) for layer in layers.values())
    rank = checks.whole(rank, "rank", 1, smallest, f"a whole number from 1 to {smallest}, the smaller side of the smallest weight")
    if unknown := [name for name in stored or {} if name not in layers]:
        raise ValueError(f"stored names {unknown[0]}, which is no linear of the model's blocks")
    if pair := models.shared(model):
        raise ModelError(f"{pair[0]} and {pair[1]} are one weight: an adapter beside it would be two")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear(layer, (stored or {}).get(name), rank, alpha, generator))
    return model


@torch.no_grad()
def merge(model: nn.Module, base: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Add each adapter to a weight and put a plain float linear in its place, in place. Returns the model.

    base: weights to add to, by the linear's full name: those of the original float model, of which the adapter was *not* trained
    on top. Without it each is added to its own base as it reads back, and the model computes what it computed.
    Raises ModelError for a model without adapters, ValueError for a base that lacks a weight or has it in another shape.
    """
    layers = adapters(model)
    if not layers:
        raise ModelError("the model has no adapters to merge")
    for name, layer in layers.items():
        if base is not None and name not in base:
            raise ValueError(f"base lacks {name}, which has an adapter")
        weight = layer.base_weight() if base is None else base[name]
        if tuple(weight.shape) != (layer.out_features, layer.in_features):
            wanted = [layer.out_features, layer.in_features]
            raise ValueError(f"base has {name} of shape {list(weight.shape)}, and its adapter is for {wanted}")
        merged = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        merged.weight = nn.Parameter((weight.to(layer.lora_a) + layer.update), requires_grad=False)
        merged.bias = layer.bias
        model.set_submodule(name, merged)
    return model
