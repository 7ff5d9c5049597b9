"""The small files that the ordinary tests compare with: what the peers made of the same weights, Hessians and text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from interop.cases import AwqRun, Setting, exact_hessian
from safetensors import safe_open

from labsupport.model import files
from labsupport.quant import grid

FOLDER = Path(__file__).resolve().parent / "golden"
GPTQ = FOLDER / "gptq.safetensors"
AWQ = FOLDER / "awq.safetensors"
COMMAND = "make interop ARGS=--write"


@dataclass(frozen=True)
class Solved:
    """What GPTQ gave: codes uint8 [out, in]; scale float32, zero_point uint8 [out, groups], g_idx int16 [in], each its group."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    g_idx: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]."""
        groups = self.g_idx.long()
        return (self.codes.float() - self.zero_point[:, groups]) * self.scale[:, groups]


@dataclass(frozen=True)
class Layer:
    """A layer and every result kept for it. rounding: see cases.rounding_of, on the machine that the results are from."""

    weight: torch.Tensor
    inputs: torch.Tensor
    results: dict[Setting, Solved]
    rounding: str

    @property
    def hessian(self) -> torch.Tensor:
        return exact_hessian(self.inputs)


@dataclass(frozen=True)
class Found:
    """What AutoAWQ gave, by the names that run_awq.py describes. groups: {"after": norm or linear, "linears": [...]} in order."""

    tensors: dict[str, torch.Tensor]
    groups: list[dict[str, Any]]

    def ratio(self, group: int) -> float:
        """The exponent of the activations that won."""
        losses = self.tensors[f"group.{group}/losses"]
        return losses.argmin().item() / len(losses)

    def unpacked(self) -> Found:
        """The results alone, with codes uint8 [out, in], zero_point and scale [out, groups] in place of AutoAWQ's layout."""
        results = {}
        for key, tensor in self.tensors.items():
            name, _, part = key.rpartition("/")
            if part in ("qweight", "qzeros"):
                results[f"{name}/{'codes' if part == 'qweight' else 'zero_point'}"] = unpack_awq(tensor).to(torch.uint8)
            elif part == "scales":
                results[f"{name}/scale"] = tensor.T.contiguous()
            elif part not in ("x_mean", "w_mean", "logits_change", "seconds"):
                results[key] = tensor
        return Found(results, self.groups)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, columns / 8] to codes [columns, rows]: nibble i of a word is column 0, 2, 4, 6, 1, 3, 5, 7 of its eight."""
    nibbles = words[..., None] >> 4 * torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]) & 15
    return nibbles.flatten(1).T


@dataclass(frozen=True)
class Model:
    """A tiny model, what it was calibrated with, and every result kept for it. weights: as tiny.make gives them."""

    weights: dict[str, torch.Tensor]
    tokens: torch.Tensor
    results: dict[AwqRun, Found]


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, object]) -> None:
    """Metadata that is not a string is written as JSON. The file appears whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    files.save_tensors(path, tensors, text)


def write_gptq(layers: dict[str, Layer], about: dict[str, object]) -> None:
    """Codes are packed to their bits, weights kept as float16, which holds them exactly."""
    tensors = {}
    for name, layer in layers.items():
        tensors |= {f"{name}/weight": layer.weight.half(), f"{name}/inputs": layer.inputs}
        for setting, solved in layer.results.items():
            prefix = f"{name}/{setting.name}"
            tensors[f"{prefix}/codes"] = grid.pack_bits(solved.codes, setting.bits)
            tensors[f"{prefix}/scale"] = solved.scale
            tensors[f"{prefix}/zero_point"] = solved.zero_point
            tensors[f"{prefix}/g_idx"] = solved.g_idx.to(torch.uint8)
    settings = {name: [vars(setting) for setting in layer.results] for name, layer in layers.items()}
    rounding = {name: layer.rounding for name, layer in layers.items()}
    write(GPTQ, tensors, about | {"settings": settings, "rounding": rounding})


@cache
def about(path: Path) -> dict[str, str]:
    """The metadata of a golden file."""
    with safe_open(path, "pt") as file:
        return file.metadata()


@cache
def read_gptq() -> dict[str, Layer]:
    layers = {}
    said = about(GPTQ)
    rounding = json.loads(said["rounding"])
    with safe_open(GPTQ, "pt") as file:
        for name, settings in json.loads(said["settings"]).items():
            weight, results = file.get_tensor(f"{name}/weight").float(), {}
            for setting in (Setting(**fields) for fields in settings):
                prefix = f"{name}/{setting.name}"
                packed = file.get_tensor(f"{prefix}/codes")
                results[setting] = Solved(
                    codes=grid.unpack_bits(packed, setting.bits, weight.numel()).view(weight.shape),
                    scale=file.get_tensor(f"{prefix}/scale"),
                    zero_point=file.get_tensor(f"{prefix}/zero_point"),
                    g_idx=file.get_tensor(f"{prefix}/g_idx").to(torch.int16),
                )
            layers[name] = Layer(weight, file.get_tensor(f"{name}/inputs"), results, rounding[name])
    return layers


def write_awq(models: dict[str, Model], about: dict[str, object]) -> None:
    tensors, runs = {}, {}
    for name, model in models.items():
        tensors[f"{name}/tokens"] = model.tokens.to(torch.uint8)
        tensors |= {f"{name}/weights/{key}": weight for key, weight in model.weights.items()}
        runs[name] = [{"run": vars(run), "groups": found.groups} for run, found in model.results.items()]
        for run, found in model.results.items():
            tensors |= {f"{name}/{run.name}/{key}": tensor for key, tensor in found.tensors.items() if key != "seconds"}
    write(AWQ, tensors, about | {"runs": runs})


@cache
def read_awq() -> dict[str, Model]:
    models = {}
    with safe_open(AWQ, "pt") as file:
        keys = list(file.keys())

        def below(prefix: str) -> dict[str, torch.Tensor]:
            return {key.removeprefix(prefix): file.get_tensor(key) for key in keys if key.startswith(prefix)}

        for name, runs in json.loads(about(AWQ)["runs"]).items():
            results = {}
            for entry in runs:
                run = AwqRun(**entry["run"])
                results[run] = Found(below(f"{name}/{run.name}/"), entry["groups"])
            models[name] = Model(below(f"{name}/weights/"), file.get_tensor(f"{name}/tokens").long(), results)
    return models
