"""The peers run on given layers and models, from the course's environment: files to them, files back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from interop import environment
from interop.cases import AwqRun, Setting
from interop.golden import Found, Solved
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Answer:
    """AutoGPTQ's results of one layer. rounding: cases.rounding_of where it ran. seconds: of its solver alone."""

    results: dict[Setting, Solved]
    rounding: str
    seconds: dict[Setting, float]


def gptq(
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor, Sequence[Setting]]], threads: int = 1
) -> Iterator[tuple[str, Answer]]:
    """AutoGPTQ on each layer's weight and Hessian, or weight and inputs [windows, tokens, in], at each setting, layer by layer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for layer, (weight, known, settings) in layers.items():
            tensors = {"weight": weight.float().contiguous(), "hessian" if known.ndim == 2 else "inputs": known.contiguous()}
            save_file(tensors, folder / f"{layer}.in.safetensors", {"settings": json.dumps([asdict(s) for s in settings])})
        environment.LEGACY.run("run_gptq", name, threads=threads)
        for layer, (_, _, settings) in layers.items():
            path = folder / f"{layer}.out.safetensors"
            out, parts = load_file(path), ("codes", "scale", "zero_point", "g_idx")
            results = {s: Solved(*(out[f"{s.name}/{part}"] for part in parts)) for s in settings}
            with safe_open(path, "pt") as file:
                rounding = file.metadata()["rounding"]
            yield layer, Answer(results, rounding, {s: out[f"{s.name}/seconds"].item() for s in settings})


def awq(model: Path, tokens: torch.Tensor, runs: Sequence[AwqRun], threads: int = 1) -> dict[AwqRun, Found]:
    """AutoAWQ on a Llama directory, calibrated on tokens int64 [samples, length], once for each run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").symlink_to(model.resolve())
        save_file({"tokens": tokens.contiguous()}, folder / "tokens.safetensors")
        (folder / "runs.json").write_text(json.dumps([asdict(run) for run in runs]))
        environment.LEGACY.run("run_awq", name, threads=threads)
        found = {}
        for run in runs:
            path = folder / f"{run.name}.out.safetensors"
            with safe_open(path, "pt") as file:
                found[run] = Found(load_file(path), json.loads(file.metadata()["groups"]))
        return found
