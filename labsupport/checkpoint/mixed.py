"""The course's own layout, "labs": every matrix with bits and groups of its own, the embedding as well.

Loaders of the field know one number of bits for a whole model, and leave the embedding in float. Here a matrix NAME.weight is
either stored as it is, in float16, or as

    NAME.codes   uint8, the stream of all codes row by row, lowest bit first (`grid.pack_bits`): 1 to 8 bits each
    NAME.scales  float16 [out_features, groups]; groups are neighbors along in_features
    NAME.zeros   uint8, the stream of zero-points, in as many bits; where it is missing they are 2**(bits - 1)
    NAME.levels  float16 [2**bits], in place of zeros: a code stands for level * scale

config.json has {"quant_method": "labs"} as quantization_config and no more: bits and group sizes follow from how many bytes and
scales there are for a matrix whose shape is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labsupport.checkpoint.weights import CheckpointError
from labsupport.model import files
from labsupport.quant import checks, grid
from labsupport.quant.grid import QuantizedTensor, UniformTensor

METHOD = "labs"
CONFIG: dict[str, Any] = {"quant_method": METHOD}


@dataclass(frozen=True)
class LevelTensor(QuantizedTensor):
    """A weight on any levels, the same for all its groups: level * scale.

    packed_codes: uint8, as of a UniformTensor. scale: float16 [out_features, groups]. levels: float16 [2**bits].
    """

    packed_codes: torch.Tensor
    scale: torch.Tensor
    levels: torch.Tensor
    bits: int
    shape: tuple[int, int]

    @property
    def codes(self) -> torch.Tensor:
        rows, columns = self.shape
        return grid.unpack_bits(self.packed_codes, self.bits, rows * columns).view(rows, columns)

    def dequantize(self) -> torch.Tensor:
        groups = self.levels.float()[self.codes.long()].unflatten(1, (self.scale.shape[1], -1))
        return (groups * self.scale.float()[..., None]).flatten(1)


def on_levels(weight: torch.Tensor, levels: torch.Tensor, group_size: int | None = 64) -> LevelTensor:
    """Each weight on the nearest of `levels`, float [2**bits] from -1 to 1 in order, times the largest magnitude of its group."""
    levels = levels.half()
    size = weight.shape[1] if group_size is None else group_size
    groups = weight.float().unflatten(1, (-1, size))
    scale = groups.abs().amax(2).half()
    scale = scale.masked_fill(scale == 0, 1)
    middles = (levels[1:].float() + levels[:-1].float()) / 2
    codes = torch.bucketize(groups / scale.float()[..., None], middles)
    bits = (len(levels) - 1).bit_length()
    return LevelTensor(grid.pack_bits(codes, bits), scale, levels, bits, (weight.shape[0], weight.shape[1]))


def write_tensor(name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors that stand for matrix `name`, by full name. Raises CheckpointError for what the layout cannot hold."""
    if isinstance(tensor, LevelTensor):
        parts = {"codes": tensor.packed_codes, "scales": tensor.scale, "levels": tensor.levels}
    elif isinstance(tensor, UniformTensor) and getattr(tensor, "g_idx", None) is None:
        parts = {"codes": tensor.packed_codes, "scales": tensor.scale}
        if tensor.packed_zero_points is not None:
            parts["zeros"] = tensor.packed_zero_points
    else:
        scattered = isinstance(tensor, UniformTensor)
        kind = "has groups scattered by act_order without static_groups" if scattered else f"is a {type(tensor).__name__}"
        raise CheckpointError(f"{name} {kind}, the {METHOD} layout holds uniform grids and levels in groups of neighbors")
    if tensor.scale.dtype != torch.float16:
        raise CheckpointError(f"{name} has scales in {tensor.scale.dtype}, the {METHOD} layout stores torch.float16")
    return {f"{name}.{part}": value for part, value in parts.items()}


def read_tensor(name: str, state: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> QuantizedTensor:
    """The inverse of `write_tensor`. state: by part. shape: of the matrix. Raises CheckpointError naming what does not fit."""
    try:
        return _read_tensor(state, shape)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{name}: {error}") from error


def _read_tensor(state: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> QuantizedTensor:
    if unknown := sorted(state.keys() - {"codes", "scales", "zeros", "levels"}):
        raise ValueError(f"{unknown[0]} is no part of a matrix: wanted codes, scales and zeros or levels")
    if missing := [part for part in ("codes", "scales") if part not in state]:
        raise ValueError(f"{missing[0]} is missing")
    if "zeros" in state and "levels" in state:
        raise ValueError("it has zeros and levels, wanted one of them")
    (rows, columns), codes, scales = shape, state["codes"], state["scales"]
    checks.tensor(codes, "codes", (torch.uint8,), "torch.uint8")
    checks.scales(checks.tensor(scales, "scales", (torch.float16,), "torch.float16"), "scales")
    bits = 8 * len(codes) // (rows * columns) if codes.ndim == 1 else 0
    if not 1 <= bits <= 8 or len(codes) != -(-rows * columns * bits // 8):
        raise ValueError(f"codes has shape {list(codes.shape)}, of which no number of bits from 1 to 8 makes {rows} x {columns}")
    if scales.ndim != 2 or len(scales) != rows or not scales.shape[1] or columns % scales.shape[1]:
        raise ValueError(f"scales has shape {list(scales.shape)}, wanted [{rows}, a divisor of {columns}]")
    if "levels" in state:
        levels = checks.tensor(state["levels"], "levels", (torch.float16,), "torch.float16")
        if list(levels.shape) != [2**bits] or not levels.isfinite().all():
            raise ValueError(f"levels has shape {list(levels.shape)}, wanted {2**bits} finite numbers, one for each code")
        return LevelTensor(codes, scales, levels, bits, (rows, columns))
    zeros = state.get("zeros")
    if zeros is not None:
        checks.tensor(zeros, "zeros", (torch.uint8,), "torch.uint8")
        if list(zeros.shape) != [-(-scales.numel() * bits // 8)]:
            raise ValueError(f"zeros has shape {list(zeros.shape)}, wanted {scales.numel()} zero-points of {bits} bits")
    return UniformTensor(codes, scales, zeros, bits, columns // scales.shape[1], (rows, columns))


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a model stores, by name: of tied parameters the first."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_tensors(model: nn.Module, stored: Mapping[str, QuantizedTensor], path: Path) -> None:
    """Write a model as one safetensors file. stored: of each quantized matrix, by its module's name; the rest becomes float16.

    Raises CheckpointError for a name that is no matrix of the model and for what the layout cannot hold; files.WriteError.
    """
    parameters = parameters_of(model)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if f"{name}.weight" not in parameters or tuple(parameters[f"{name}.weight"].shape) != tuple(tensor.shape):
            raise CheckpointError(f"stored holds {name} {list(tensor.shape)}, which is no matrix of the model")
        tensors |= write_tensor(name, tensor)
    tensors |= {name: p.half() for name, p in parameters.items() if name.removesuffix(".weight") not in stored}
    files.save_tensors(path, {name: tensor.cpu() for name, tensor in tensors.items()}, {"format": "pt"})


def values(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Every parameter in float32, as it reads back. weights: the tensors of a checkpoint. shapes: of each parameter, by name.

    Raises CheckpointError for a parameter that is missing or of another shape, a tensor that belongs to none, and NaN or infinity.
    """
    read: dict[str, torch.Tensor] = {}
    taken: set[str] = set()
    for name, shape in shapes.items():
        start = name.removesuffix("weight")
        parts = {key for key in weights if key.startswith(start) and "." not in key[len(start) :] and key != name}
        if name in weights and parts:
            raise CheckpointError(f"{name} is stored in float and as codes, wanted one of them")
        if parts and len(shape) == 2:
            state = {key.removeprefix(start): weights[key] for key in parts}
            read[name] = read_tensor(start.removesuffix("."), state, (shape[0], shape[1])).dequantize()
        elif name in weights and weights[name].is_floating_point():
            read[name] = weights[name].float()
        elif name in weights:
            raise CheckpointError(f"{name} is {weights[name].dtype}, wanted a float")
        else:
            raise CheckpointError(f"{name} is missing: neither in float nor as codes")
        taken |= parts | ({name} & set(weights))
        if tuple(read[name].shape) != tuple(shape):
            raise CheckpointError(f"{name} has shape {list(read[name].shape)}, the model asks for {list(shape)}")
        if not read[name].isfinite().all():
            raise CheckpointError(f"{name} holds NaN or infinity")
    if foreign := sorted(set(weights) - taken):
        raise CheckpointError(f"{foreign[0]} belongs to no parameter of the model")
    return read
