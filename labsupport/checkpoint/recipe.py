"""What `labs quantize` is to do: checked against the method, and against the model, before anything is computed or written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from labsupport.checkpoint import layouts
from labsupport.checkpoint.weights import CheckpointError
from labsupport.pipeline.block import TOKEN_WEIGHTS
from labsupport.pipeline.methods import METHODS, Method, Storage, stored_methods
from labsupport.quant import checks, grid

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """A method, which of its layouts, and every setting that it takes when it is stored.

    group_size: None for a grid for each whole row; for nf4 the size of a block. dtype: of everything that is not quantized.
    choices: the settings beside bits and the group size. named: whether the group size was asked for. why: a few words on a group
    size that was chosen for a model; "" otherwise.
    """

    method: Method
    layout: str
    dtype: str
    bits: int
    group_size: int | None
    choices: Mapping[str, Any]
    named: bool = True
    why: str = ""

    @classmethod
    def of(
        cls,
        method: str = "gptq",
        bits: int | None = None,
        group_size: int | None = None,
        layout: str | None = None,
        dtype: str = "float16",
        **choices: Any,
    ) -> Recipe:
        """bits: None for 4, or for the only number there is. group_size: None for the only one that the layout has, or one that is
        chosen for the model; -1 for a grid for each whole row. layout: None for the method's own. Where a layout has symmetric
        grids alone, they are the default.

        Raises CheckpointError for what does not go together.
        """
        storages = stored_methods()
        if method not in storages:
            raise CheckpointError(f"method is {method!r}, wanted one of {', '.join(storages)}")
        if dtype not in DTYPES:
            raise CheckpointError(f"dtype is {dtype!r}, wanted one of {', '.join(DTYPES)}")
        storage = storages[method]
        for name in choices:
            if name not in storage.settings:
                raise CheckpointError(f"{name} is given, but {method} has no such choice")
        layout = storage.layouts[0] if layout is None else layout
        if layout not in storage.layouts:
            raise CheckpointError(f"format is {layout!r}, {method} is stored as {', '.join(storage.layouts)}")
        grids = layouts.GRIDS.get(layout) if storage.group_sizes is None else None
        if bits is None:
            known = storage.bits or (grids.bits if grids else (4,))
            bits = 4 if 4 in known else known[0]
        only = grids.group_size if grids else None
        size = group_size if group_size is not None else storage.group_size if only is None else only
        _check_grid(method, storage, bits, size)
        defaults = dict(storage.settings) | ({"symmetric": True} if grids and grids.symmetric else {})
        chosen = {name: choices.get(name, default) for name, default in defaults.items()}
        if grids:
            layouts.check_settings(layout, {"group_size": None if size == -1 else size, **chosen})
        if chosen.get("token_weights", TOKEN_WEIGHTS[0]) not in TOKEN_WEIGHTS:
            raise CheckpointError(f"token_weights is {chosen['token_weights']!r}, wanted one of {', '.join(TOKEN_WEIGHTS)}")
        if not 0 <= chosen.get("damping", 0) < float("inf"):
            raise CheckpointError(f"damping is {chosen['damping']}, wanted 0 or more")
        named = group_size is not None or only is not None
        return cls(METHODS[method], layout, dtype, bits, None if size == -1 else size, chosen, named)

    @property
    def storage(self) -> Storage:
        return stored_methods()[self.method.name]

    def for_model(self, linears: Mapping[str, torch.nn.Linear]) -> Recipe:
        """The recipe with a group size for this model, if none was named: the largest that divides the inputs of every linear.

        Raises CheckpointError where there are no linears, for one that the settings or the layout do not fit, and where a group
        size must be named.
        """
        if not linears:
            raise CheckpointError("the blocks of the model hold no linear layers (torch.nn.Linear): there is nothing to quantize")
        for name, layer in linears.items():
            layouts.check(self.layout, name, (layer.out_features, layer.in_features), self.bits, self.group_size)
        if self.storage.group_setting != "group_size" or self.group_size is None:
            return self
        widths = {name: layer.in_features for name, layer in linears.items()}
        try:
            if not self.named:
                size = grid.largest_group_size(widths.values(), self.group_size)
                return replace(self, group_size=size, why=f"{_why(self.group_size)} {_listed(widths.values())}")
            for name, width in widths.items():
                if width % self.group_size:
                    raise checks.undivided(self.group_size, name, widths, "-1")
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        return self

    def settings(self) -> dict[str, Any]:
        """What goes to the method."""
        size = {} if self.storage.group_setting is None else {self.storage.group_setting: self.group_size}
        values = {"bits": self.bits, **size, **self.choices}
        return {name: value for name, value in values.items() if name in self.method.settings}

    def about(self) -> dict[str, Any]:
        """For the config and the card: all of it."""
        about = {"method": self.method.name, "layout": self.layout, "dtype": self.dtype}
        return about | {"bits": self.bits, "group_size": self.group_size, **self.choices}


def _why(wanted: int) -> str:
    return f"the largest of {', '.join(map(str, grid.group_sizes(wanted)))} that divides the inputs of every linear,"


def _listed(widths: Iterable[int]) -> str:
    """ "576", "576 and 1536", "576, 768 and 1536"."""
    *others, last = map(str, sorted(set(widths)))
    return f"{', '.join(others)} and {last}" if others else last


def _check_grid(method: str, storage: Storage, bits: int, size: int) -> None:
    """Raise CheckpointError for bits and a group size that the method does not have."""
    if storage.bits is not None and bits not in storage.bits:
        raise CheckpointError(f"bits is {bits}, {method} has {', '.join(map(str, storage.bits))}")
    if storage.group_sizes is not None and size not in storage.group_sizes:
        wanted = ", ".join(map(str, storage.group_sizes))
        raise CheckpointError(f"group_size is {size}, {method} has blocks of {wanted}")
    if size < 1 and size != -1:
        raise CheckpointError(f"group_size is {size}, wanted a positive whole number, or -1 for a whole row")
