"""What compressed-tensors packs a layer into: kept in a golden file, made again live.

The file holds weight float16 [16, 64] and tokens float32 [2, 4, 64], and for each case the tensors that the library stores for the
linear, CASE/decompressed, the weight that it reads from them, and where activations are rounded CASE/rounded, its rounded tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PATH = Path(__file__).with_name("golden") / "compressed.safetensors"
SHAPE = (16, 64)


@dataclass(frozen=True)
class Case:
    """group_size: None for a whole row. activations: they are rounded to 8 bits a token as well."""

    bits: int
    group_size: int | None
    symmetric: bool
    activations: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """What llm-compressor says of such linears in config.json."""
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "group_size": self.group_size,
            "strategy": "group" if self.group_size else "channel",
        }  # fmt: skip
        tokens = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
        kind = "int-quantized" if self.activations else "pack-quantized"
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": tokens if self.activations else None,
            "format": kind,
        }
        return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}


CASES = {
    "w4": Case(4, 32, True), "w4-asym": Case(4, 32, False), "w8": Case(8, 16, True), "w8-asym-row": Case(8, None, False),
    "w8a8": Case(8, None, True, activations=True),
}  # fmt: skip


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, tokens = torch.randn(SHAPE, generator=generator), torch.randn(2, 5, SHAPE[1], generator=generator)[:, :4]
    weight[3] = weight[3].abs() + 1  # no 0 in between
    tokens[0, 2] = 0
    return {"weight": (weight / 8).half(), "tokens": tokens.contiguous()}


def live(threads: int) -> dict[str, torch.Tensor]:
    """What the golden file is to hold, made anew."""
    from interop import environment  # the environment that run_compressed runs in has no labsupport

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compressed.safetensors"
        save_file(inputs(), path)
        environment.MODERN.run("run_compressed", str(path), threads=threads)
        return load_file(path)


def write(threads: int) -> None:
    """The golden file, from fresh results."""
    from interop import environment, golden

    golden.write(PATH, live(threads), {"command": golden.COMMAND, "versions": environment.MODERN.versions(), "threads": threads})


def lines(threads: int) -> Iterator[tuple[str, bool]]:
    """Fresh results beside the golden file, a line for each case."""
    kept, fresh = load_file(PATH), live(threads)
    for name in CASES:
        mine, theirs = ({key: t for key, t in tensors.items() if key.startswith(f"{name}/")} for tensors in (kept, fresh))
        same = mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
        yield f"compressed-tensors {name}: golden file {'equal' if same else 'OTHER'}", same
