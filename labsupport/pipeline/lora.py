"""LoRA through a frozen base that stays packed (Hu et al. 2021, arXiv:2106.09685; QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

A layer gives y = x W^T + (alpha / r) (x A^T) B^T. W is frozen and kept as it is stored; A [r, in] and B [out, r] learn. For the
gradient of x, W is read back a second time; its own gradient is never needed, so nothing of x is kept for it:

    dL/dx = dL/dy W + (alpha / r) (dL/dy B) A,    dL/dB = (alpha / r) dL/dy^T (x A^T),    dL/dA = (alpha / r) (dL/dy B)^T x.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labsupport.model import files, models
from labsupport.model.models import ModelError
from labsupport.pipeline import training
from labsupport.quant import checks
from labsupport.quant.grid import QuantizedTensor

PARTS = ("lora_a", "lora_b")
ABOUT = "lora"  # the entry of a file's metadata


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
        self.stored = None if stored is None else _moved(stored, weight.device)
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

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, rank={len(self.lora_a)}"
        return f"{shape}, scaling={self.scaling:g}, base={'float' if self.stored is None else type(self.stored).__name__}"

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
    side of every weight, and for what is stored of no linear or of another shape; ModelError where adapters are there already, a
    linear is shared, or its weight is packed.
    """
    alpha = checks.number(alpha, "alpha", 0)
    if adapters(model):
        raise ModelError("the model has adapters already: merge them, or take a model without")
    if (name := models.packed(model)) is not None:
        raise ModelError(f"{name} keeps its weight packed: take the model in float, and pass what is stored of it as `stored`")
    layers = models.linears(model)
    smallest = min(min(layer.weight.shape) for layer in layers.values())
    rank = checks.whole(rank, "rank", 1, smallest, f"a whole number from 1 to {smallest}, the smaller side of the smallest weight")
    if unknown := [name for name in stored or {} if name not in layers]:
        raise ValueError(f"stored names {unknown[0]}, which is no linear of the model's blocks")
    for name, tensor in (stored or {}).items():
        if tuple(tensor.shape) != (wanted := tuple(layers[name].weight.shape)):
            raise ValueError(f"stored has {name} of shape {list(tensor.shape)}, and the model has it of {list(wanted)}")
    if pair := models.shared(model):
        raise ModelError(f"{pair[0]} and {pair[1]} are one weight: an adapter beside it would be two")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear(layer, (stored or {}).get(name), rank, alpha, generator))
    return model


def save(model: nn.Module, path: str | Path) -> None:
    """Write the adapters to a safetensors file; in its metadata their rank and alpha, and what base they belong to.

    Raises ModelError for a model without adapters, WriteError where the file cannot be written.
    """
    layers = adapters(model)
    if not layers:
        raise ModelError("the model has no adapters to save")
    tensors = {f"{name}.{part}": getattr(layer, part).detach() for name, layer in layers.items() for part in PARTS}
    rank = len(next(iter(layers.values())).lora_a)
    about = {"rank": rank, "alpha": rank * next(iter(layers.values())).scaling} | _base(model)
    files.save_tensors(Path(path), tensors, {ABOUT: json.dumps(about)})


@torch.no_grad()
def load(model: nn.Module, path: str | Path, stored: Mapping[str, QuantizedTensor] | None = None) -> nn.Module:
    """Put the adapters of a file beside the linears of the base that they were trained on, in place. Returns the model.

    stored: as in `add`. Raises ValueError for a file that holds no adapters, and for adapters of another model or another base;
    and what `add` raises. The model is then as it was.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"{path} is no file")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[ABOUT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        rank, alpha, layers = about["rank"], about["alpha"], dict(about["layers"])
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        wanted = {f"{name}.lora_a": [rank, columns] for name, (_, columns, _) in layers.items()}
        wanted |= {f"{name}.lora_b": [rows, rank] for name, (rows, _, _) in layers.items()}
        if found != wanted:
            raise ValueError("its tensors are not those that its metadata names")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no adapters, or is damaged") from error
    if not adapters(model):
        _check_base(path, about, _base(model, stored or {}))
    add(model, stored, rank, alpha)
    for name, layer in adapters(model).items():
        for part in PARTS:
            getattr(layer, part).copy_(tensors[f"{name}.{part}"])
    return model


def _base(model: nn.Module, stored: Mapping[str, QuantizedTensor] | None = None) -> dict[str, Any]:
    """What an adapter is trained on: each linear's size and how it is kept, and a digest of all weights.

    stored: for a model that has no adapters yet, what is kept of its linears.
    """
    packed = dict(stored or {}) | {name: layer.stored for name, layer in adapters(model).items() if layer.stored is not None}
    learned = {f"{name}.{part}" for name in adapters(model) for part in PARTS}
    weights = {name: parameter for name, parameter in model.named_parameters() if name not in learned}
    layers = {}
    for name, layer in (adapters(model) or models.linears(model)).items():
        kept = weights.pop(f"{name}.weight", None)
        if name in packed:
            weights |= {f"{name}.{part}": tensor for part, tensor in packed[name].tensors.items()}
        elif kept is not None:
            weights[f"{name}.weight"] = kept
        layers[name] = [
            layer.out_features,
            layer.in_features,
            type(packed[name]).__name__ if name in packed else str(layer.weight.dtype),
        ]
    return {"layers": layers, "weights": training.digest(dict(sorted(weights.items())))}


def _check_base(path: str | Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name in [*wanted["layers"], *found["layers"]]:
        trained, here = (about["layers"].get(name) for about in (wanted, found))
        if here is None or trained is None:
            place = "the model has no such linear" if here is None else "the file has no adapter for it"
            raise ValueError(f"{path} is of another model: {place}, {name}")
        if trained[:2] != here[:2]:
            raise ValueError(f"{path} is of another model: its {name} is {trained[:2]}, the model's is {here[:2]}")
        if trained[2] != here[2]:
            raise ValueError(f"{path} was trained on another base: it kept {name} as {trained[2]}, here it is {here[2]}")
    if wanted["weights"] != found["weights"]:
        digests = f"sha256 {wanted['weights'][:12]}, here {found['weights'][:12]}"
        raise ValueError(f"{path} was trained on another base: its sizes are the model's, its weights are not ({digests})")


@torch.no_grad()
def merge(model: nn.Module, base: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Add each adapter to a weight and put a plain float linear in its place, in place. Returns the model.

    base: weights to add to, by the linear's full name: those of the original float model, of which the adapter was *not* trained
    on top. Without it each is added to its own base as it reads back, and the model computes what it computed.
    Raises ModelError for a model without adapters, ValueError for a base that lacks a weight, or has it packed or in another shape;
    the model is then as it was.
    """
    layers = adapters(model)
    if not layers:
        raise ModelError("the model has no adapters to merge")
    for name, layer in layers.items() if base is not None else ():  # before anything is changed
        if name not in base:
            raise ValueError(f"base lacks {name}, which has an adapter")
        if not isinstance(base[name], Tensor) or not base[name].is_floating_point():
            kind = base[name].dtype if isinstance(base[name], Tensor) else type(base[name]).__name__
            raise ValueError(f"base has {name} packed, as {kind}: an adapter is added to a float weight, dequantize it first")
        if tuple(base[name].shape) != (layer.out_features, layer.in_features):
            wanted = [layer.out_features, layer.in_features]
            raise ValueError(f"base has {name} of shape {list(base[name].shape)}, and its adapter is for {wanted}")
    for name, layer in layers.items():
        weight = layer.base_weight() if base is None else base[name]
        merged = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        merged.weight = nn.Parameter((weight.to(layer.lora_a) + layer.update), requires_grad=False)
        merged.bias = layer.bias
        model.set_submodule(name, merged)
    return model
