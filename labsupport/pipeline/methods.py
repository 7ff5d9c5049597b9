"""The methods by which a whole model can be quantized: one record each, all that other modules know of a method.

A new method is one file and one record in `METHODS`. Where it looks at weights alone, the file is a function in quant/ and the
record names it as `quantize`. Otherwise the file is its work on a block, as gptq_block.py is, and the record names it as `blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn

    from labsupport.pipeline.block import Block
    from labsupport.pipeline.linear import Quantized, Settings


class BlockQuantizer(Protocol):
    """The work of a method on one block of a model."""

    def __call__(self, block: Block, settings: Mapping[str, Settings | None]) -> dict[str, Quantized]:
        """Quantize a block's linears in place. settings: of each linear, by its full name; None leaves it as it is."""


@dataclass(frozen=True)
class Storage:
    """How `labs quantize` stores what a method makes.

    layouts: see checkpoint.layouts; the method's own comes first. settings: what can be chosen there beside bits and the group
    size, with the defaults. bits: None for those that the layout has. group_size: the default. group_sizes: None for all that
    divide in_features. group_setting: what the method calls it; "block_size" is for blocks that run on from row to row, None for
    blocks of one size, which nobody chooses.
    """

    layouts: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    bits: tuple[int, ...] | None = None
    group_size: int = 128
    group_sizes: tuple[int, ...] | None = None
    group_setting: str | None = "group_size"


@dataclass(frozen=True)
class Method:
    """One method.

    quantize: a function of a weight, [out_features, in_features], and settings by name that gives a QuantizedTensor. blocks: a
    class that is made with the model and is then a BlockQuantizer; its SETTINGS are all settings that the method takes, with
    their defaults; it raises ValueError for a model that the method cannot do. Either is given as itself or as "module:name",
    which is imported when it is first needed, so that the command line knows all methods and still starts at once.
    needs_text: it looks at calibration text. rounds_activations: it puts another layer in the linear's place. takes: the settings
    of a `quantize`, where they are not all of its arguments that have a default. storage: None for what cannot be stored.
    """

    name: str
    quantize: str | Callable[..., Any] | None = None
    blocks: str | Callable[..., BlockQuantizer] | None = None
    needs_text: bool = False
    rounds_activations: bool = False
    takes: Mapping[str, Any] | None = None
    storage: Storage | None = None

    def __post_init__(self) -> None:
        if (self.quantize is None) == (self.blocks is None):
            raise ValueError(f"method {self.name} has quantize {self.quantize} and blocks {self.blocks}, wanted one of them")
        if self.quantize is not None and self.needs_text:
            raise ValueError(f"method {self.name} needs text, and a function of a weight alone is given no text: pass blocks")

    def on(self, model: nn.Module) -> BlockQuantizer:
        """What quantizes the model's blocks. Raises ValueError for a model that the method cannot do."""
        from labsupport.pipeline.weight_only_block import WeightOnlyBlocks

        return WeightOnlyBlocks(_imported(self.quantize)) if self.blocks is None else _imported(self.blocks)(model)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Every setting that it takes, with its default."""
        from labsupport.pipeline.linear import defaults_of

        if self.blocks is not None:
            return _imported(self.blocks).SETTINGS
        return defaults_of(_imported(self.quantize)) if self.takes is None else self.takes

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError for a setting that it does not take."""
        if unknown := [name for name in settings if name not in self.settings]:
            raise ValueError(f"{unknown[0]} is given, but {self.name} takes {', '.join(self.settings) or 'none'}")


def _imported(reference: str | Callable) -> Any:
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


def _gguf(kind: str, bits: int, block: int) -> Method:
    """ggml's own rounding to blocks of one kind."""
    storage = Storage(("gguf",), bits=(bits,), group_size=block, group_sizes=(block,), group_setting=None)
    return Method(kind, quantize=f"labsupport.quant.gguf_blocks:quantize_{kind}", storage=storage)


# Layouts that hold uniform grids with an integer zero-point; which bits and groups, checkpoint.layouts says.
_UNIFORM = ("compressed-tensors", "compressed-tensors-w8a8", "gguf")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "rtn",
            quantize="labsupport.quant.rtn:quantize",
            storage=Storage(("gptq", "gptq_v2", "awq", *_UNIFORM), {"symmetric": False}),
        ),
        Method(
            "nf4",
            quantize="labsupport.quant.nf4:quantize",
            storage=Storage(
                ("bitsandbytes",),
                {"double_quant": True},
                bits=(4,),
                group_size=64,  # nf4.BLOCK_SIZE
                group_sizes=(32, 64, 128, 256, 512, 1024, 2048, 4096),  # bnb_format.BLOCK_SIZES
                group_setting="block_size",
            ),
        ),
        Method("int8-weights", quantize="labsupport.quant.int8:quantize", takes={"granularity": "row"}),
        Method("int8", blocks="labsupport.pipeline.int8_block:Int8Blocks", rounds_activations=True),
        Method(
            "gptq",
            blocks="labsupport.pipeline.gptq_block:GPTQBlocks",
            needs_text=True,
            storage=Storage(
                ("gptq", "gptq_v2", *_UNIFORM),
                {"symmetric": False, "act_order": True, "static_groups": True, "damping": 0.01, "token_weights": "attention"},
            ),
        ),
        Method(
            "awq",
            blocks="labsupport.pipeline.awq_block:AWQBlocks",
            needs_text=True,
            storage=Storage(("awq", "gptq", "gptq_v2", *_UNIFORM), {"symmetric": False}),
        ),
        _gguf("q8_0", 8, 32),
        _gguf("q4_0", 4, 32),
        _gguf("q4_1", 4, 32),
        _gguf("q4_k", 4, 256),
    )
}


def method_named(name: str) -> Method:
    """Raises ValueError for a name that is in no record."""
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method is {name!r}, wanted one of {', '.join(METHODS)}")
    return METHODS[name]


def stored_methods() -> dict[str, Storage]:
    """How each method is stored that can be, by its name."""
    return {name: method.storage for name, method in METHODS.items() if method.storage is not None}


def stored_settings() -> dict[str, Any]:
    """Every setting that some method takes when it is stored, with its default."""
    return {name: default for storage in stored_methods().values() for name, default in storage.settings.items()}


def stored_layouts() -> list[str]:
    """Every layout in which some method is stored."""
    return list(dict.fromkeys(layout for storage in stored_methods().values() for layout in storage.layouts))
