"""A checkpoint on disk: its layout, its linears as quantized tensors, and the model that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labsupport.checkpoint import compressed_tensors, gguf_file, layouts
from labsupport.checkpoint.gguf_file import GGUFWeights
from labsupport.checkpoint.skeleton import empty_model
from labsupport.checkpoint.weights import FLOATS, CheckpointError, Weights, read_json
from labsupport.model import names, opened
from labsupport.quant import gguf_blocks, int8, packing
from labsupport.quant.grid import QuantizedTensor


@dataclass(frozen=True)
class Checkpoint:
    """directory: or the file, of GGUF. config: all of config.json, or what a GGUF file says in its place. layout: one of
    layouts.LAYOUTS, as the config says it.
    """

    directory: Path
    config: dict[str, Any]
    layout: str
    weights: Weights | GGUFWeights

    @property
    def quantization(self) -> dict[str, Any]:
        return self.config["quantization_config"]

    @cached_property
    def grids(self) -> dict[str, Any]:
        """bits, group_size (None for a grid for each whole row) and symmetric, those that the config has."""
        if self.layout in layouts.COMPRESSED:
            return compressed_tensors.settings_of(self.quantization)[1]
        named = {"bits": "bits", "group_size": "group_size", "symmetric": "sym"}
        found = {name: self.quantization[key] for name, key in named.items() if key in self.quantization}
        return found | ({"group_size": None} if found.get("group_size") == -1 else {})

    @property
    def bits(self) -> int:
        return self.grids.get("bits", 4)

    @property
    def group_size(self) -> int | None:
        """None for a grid for each whole row."""
        return self.grids.get("group_size")

    @property
    def names(self) -> list[str]:
        """Every quantized linear, by full name."""
        if self.layout == "bitsandbytes":
            return [name.partition(".weight.quant_state.")[0] for name in self.weights if ".weight.quant_state." in name]
        if self.layout in layouts.COMPRESSED:
            return [name.removesuffix(".weight_scale") for name in self.weights if name.endswith(".weight_scale")]
        if self.layout == "gguf":
            return [name.rpartition(".")[0] for name in self.weights if name.rpartition(".")[2] in gguf_blocks.WEIGHTS]
        return [name.removesuffix(".qweight") for name in self.weights if name.endswith(".qweight")]

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a linear, by what follows its name."""
        return self.weights.below(name)

    def tensor(self, name: str) -> QuantizedTensor:
        """A linear's weight as it is stored. Raises CheckpointError naming what is wrong."""
        return layouts.read(self.layout, name, self.state(name), self.bits, self.grids.get("symmetric"))

    def tensors(self) -> Iterator[tuple[str, QuantizedTensor]]:
        for name in self.names:
            yield name, self.tensor(name)


def layout_of(config: dict[str, Any], directory: Path) -> str:
    """Which layout a config.json names. Raises CheckpointError for none, and for one that labsupport does not know."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        older = next((name for name in ("quantize_config.json", "quant_config.json") if (directory / name).is_file()), None)
        hint = f" ({older} is there, which only older loaders read)" if older else ""
        raise CheckpointError(f"{directory} is not a quantized checkpoint: config.json has no quantization_config{hint}")
    layout = _layout_of(settings, directory)
    if layout in ("gptq", "gptq_v2", "awq"):
        bits, size = settings.get("bits", 4), settings.get("group_size")
        known = (4,) if layout == "awq" else packing.GPTQ_BITS
        if type(bits) is not int or bits not in known:
            raise CheckpointError(f"{directory} has bits {bits!r}, the {layout} layout has {', '.join(map(str, known))}")
        if size is not None and (type(size) is not int or (size < 1 and size != -1)):
            raise CheckpointError(f"{directory} has group_size {size!r}, wanted a positive whole number, or -1 for a whole row")
    return layout


def _layout_of(settings: dict[str, Any], directory: Path) -> str:
    method = settings.get("quant_method")
    if method == "gptq":
        layout = settings.get("checkpoint_format", "gptq")
        if isinstance(layout, str) and layout in layouts.VERSION:
            return layout
        raise CheckpointError(f"{directory} has checkpoint_format {layout!r}, wanted gptq or gptq_v2")
    if method == "awq":
        version = str(settings.get("version", "gemm")).lower()
        if version == "gemm":
            return "awq"
        raise CheckpointError(f"{directory} has AWQ version {version!r}, wanted gemm")
    if method == "bitsandbytes" or settings.get("load_in_4bit"):
        if settings.get("load_in_8bit"):
            raise CheckpointError(f"{directory} holds int8 weights of bitsandbytes, wanted 4 bits")
        return "bitsandbytes"
    if method == "compressed-tensors":
        try:
            return compressed_tensors.settings_of(settings)[0]
        except ValueError as error:
            raise CheckpointError(f"{directory}: quantization_config: {error}") from error
    raise CheckpointError(f"{directory} has quant_method {method!r}, wanted gptq, awq, bitsandbytes or compressed-tensors")


def read(directory: str | Path) -> Checkpoint:
    """Open a quantized checkpoint; tensors are read when they are asked for. Raises CheckpointError for anything else."""
    directory = Path(directory)
    if (file := gguf_file.located(directory)) is not None:
        held = GGUFWeights(file)
        return Checkpoint(file, held.config, "gguf", held)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    config = read_json(directory / "config.json")
    return Checkpoint(directory, config, layout_of(config, directory), Weights(directory, any_name=True))


@torch.no_grad()
def load(directory: str | Path) -> tuple[nn.Module, Any]:
    """The model in float32 with each quantized weight as it reads back, and its tokenizer, None where there is none.

    No library's kernel takes part: the model multiplies by the values that the file stands for. Where a layout asks for activations
    in 8 bits, each linear rounds what goes into it. Raises CheckpointError for a
    checkpoint that lacks a tensor or holds one that its config does not know, and by its name for one with NaN or infinity, or
    with scales that are not above 0. A buffer that transformers lets a file lack is what the model's constructor makes.
    """
    from labsupport.checkpoint.tokenizers import read_tokenizer

    checkpoint = read(directory)
    model = empty_model(checkpoint.directory, checkpoint.weights)
    taken_apart = opened.open_up(model)
    values: dict[str, torch.Tensor] = {}
    taken: set[str] = set()
    for name, tensor in checkpoint.tensors():
        values[f"{name}.weight"] = tensor.dequantize()
        taken |= {f"{name}.{part}" for part in checkpoint.state(name) if part != "bias"}
    wanted, ignored, may_lack = model.state_dict().keys(), names.ignored(model), names.may_lack(model)
    for name in checkpoint.weights:
        if name not in taken and not (name not in wanted and ignored(name)):
            if name in wanted and (kind := checkpoint.weights.kind(name)) not in FLOATS:
                raise CheckpointError(f"{name} in {directory} is stored as {kind}, wanted one of {', '.join(FLOATS)}")
            if not all(part.isfinite().all() for part in checkpoint.weights.in_parts(name)):
                raise CheckpointError(f"{name} in {directory} holds NaN or infinity")
            values |= taken_apart.parts(name, checkpoint.weights[name].to(torch.float32, copy=True))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = parameters.keys() - dict(model.named_parameters()).keys()
    if missing := sorted(name for name in wanted - values.keys() - tied if not may_lack(name)):
        raise CheckpointError(f"{directory} lacks {missing[0]}, which its config asks for")
    if foreign := sorted(values.keys() - wanted):
        raise CheckpointError(f"{directory} holds {foreign[0]}, which its config does not know")
    for name in values:
        if values[name].shape != model.state_dict()[name].shape:
            wanted_shape = list(model.state_dict()[name].shape)
            raise CheckpointError(f"{name} has shape {list(values[name].shape)} in {directory}, its config asks for {wanted_shape}")
    model.load_state_dict({name: value for name, value in values.items() if name not in tied}, strict=False, assign=True)
    taken_apart.close()
    model.tie_weights()
    if layouts.rounds_activations(checkpoint.layout):
        for name in checkpoint.names:
            model.get_submodule(name).register_forward_pre_hook(int8.round_inputs)
    held = checkpoint.weights
    tokenizer = held.tokenizer() if isinstance(held, GGUFWeights) else read_tokenizer(checkpoint.directory)
    return model.eval().requires_grad_(False), tokenizer
