"""What `labs quantize` was asked for: checked against the model before anything is computed or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from labsupport.checkpoint import layouts
from labsupport.checkpoint.weights import CheckpointError
from labsupport.quant import bnb_format

GROUP_SIZE = {"gptq": 128, "awq": 128, "rtn": 128, "nf4": bnb_format.BLOCK_SIZES[1]}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Which settings a method takes, by the names that its quantize function gives them.
TAKES = {
    "rtn": ("bits", "group_size", "symmetric"),
    "awq": ("bits", "group_size", "symmetric"),
    "gptq": ("bits", "group_size", "symmetric", "act_order", "static_groups", "damping"),
    "nf4": ("block_size", "double_quant"),
}


@dataclass(frozen=True)
class Recipe:
    """group_size: None for the method's own, -1 for a grid for each whole row; for nf4 the size of a block.

    layout: None for the method's own. dtype: of everything that is not quantized.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    act_order: bool = False
    static_groups: bool = False
    damping: float = 0.01
    double_quant: bool = True
    layout: str | None = None
    dtype: str = "float16"

    def checked(self) -> Recipe:
        """With the method's own group size and layout filled in. Raises CheckpointError for what does not go together."""
        if self.method not in TAKES:
            raise CheckpointError(f"method is {self.method!r}, wanted one of {', '.join(TAKES)}")
        if self.dtype not in DTYPES:
            raise CheckpointError(f"dtype is {self.dtype!r}, wanted one of {', '.join(DTYPES)}")
        full = replace(
            self,
            group_size=GROUP_SIZE[self.method] if self.group_size is None else self.group_size,
            layout=layouts.DEFAULT[self.method] if self.layout is None else self.layout,
        )
        for name in ("symmetric", "act_order", "static_groups", "damping", "double_quant"):
            if getattr(full, name) != getattr(Recipe, name) and name not in TAKES[full.method]:
                raise CheckpointError(f"{name} is given, but {full.method} has no such choice")
        if full.layout not in layouts.FOR[full.method]:
            wanted = ", ".join(layouts.FOR[full.method])
            raise CheckpointError(f"format is {full.layout!r}, {full.method} is stored as {wanted}")
        if full.method == "nf4" and (full.bits != 4 or full.group_size not in bnb_format.BLOCK_SIZES):
            sizes = ", ".join(map(str, bnb_format.BLOCK_SIZES))
            raise CheckpointError(f"nf4 has 4 bits and blocks of {sizes}, asked for are {full.bits} and {full.group_size}")
        if full.group_size < 1 and full.group_size != -1:
            raise CheckpointError(f"group_size is {full.group_size}, wanted a positive whole number, or -1 for a whole row")
        if not 0 <= full.damping < float("inf"):
            raise CheckpointError(f"damping is {full.damping}, wanted 0 or more")
        return full

    def check_model(self, linears: Mapping[str, torch.nn.Linear]) -> None:
        """Raise CheckpointError where there are no linears, and for one that the settings or the layout do not fit."""
        if not linears:
            raise CheckpointError("the blocks of the model hold no linear layers (torch.nn.Linear): there is nothing to quantize")
        for name, layer in linears.items():
            if self.method != "nf4" and self.group_size > 0 and layer.in_features % self.group_size:
                raise CheckpointError(f"group_size {self.group_size} does not divide in_features {layer.in_features} of {name}")
            layouts.check(self.layout, name, (layer.out_features, layer.in_features), self.bits)

    def settings(self) -> dict[str, Any]:
        """What the method's quantize function is called with."""
        size = None if self.group_size == -1 else self.group_size
        values = {**vars(self), "group_size": size, "block_size": self.group_size}
        return {name: values[name] for name in TAKES[self.method]}

    def about(self) -> dict[str, Any]:
        """For the config and the card: the settings that the method has, and how it is stored."""
        size = None if self.group_size == -1 else self.group_size
        return {"method": self.method, "layout": self.layout, "dtype": self.dtype, "bits": self.bits, "group_size": size} | {
            name: value for name, value in self.settings().items() if name not in ("bits", "group_size", "block_size")
        }
