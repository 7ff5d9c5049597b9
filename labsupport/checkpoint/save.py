"""A quantized model that is in memory, written as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from labsupport.checkpoint import gguf_file, layouts
from labsupport.checkpoint.card import Facts
from labsupport.checkpoint.finish import finish
from labsupport.checkpoint.parts import Parts, in_one_line
from labsupport.checkpoint.recipe import DTYPES
from labsupport.checkpoint.weights import CheckpointError, read_json
from labsupport.model import models, names, opened
from labsupport.pipeline import calibrate
from labsupport.quant import gguf_blocks
from labsupport.quant.gguf_blocks import GGUFTensor
from labsupport.quant.grid import QuantizedTensor, UniformTensor
from labsupport.quant.nf4 import BlockTensor, NestedAbsmax

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@in_one_line()
@torch.no_grad()
def save(
    model: PreTrainedModel,
    stored: Mapping[str, QuantizedTensor],
    out: str | Path,
    layout: str,
    source: str | Path | None = None,
    method: str = "",
    dtype: str = "float16",
) -> Path:
    """Write a quantized model that is in memory. stored: what quantize_model(..., stored=stored) put there. Returns `out`.

    source: a directory whose config, tokenizer and generation settings are taken; without it the model's own config is, and there
    is no tokenizer. method: what the card calls it. Raises CheckpointError where a linear is missing in `stored`, where its
    tensors differ in bits or groups, for what the layout cannot hold, and where `out` cannot be written.
    """
    for name, value, known in (("layout", layout, layouts.LAYOUTS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise CheckpointError(f"{name} is {value!r}, wanted one of {', '.join(known)}")
    models.check_values(model)
    with opened.opened(model):
        return _save(model, stored, Path(out), layout, Path(source) if source else None, method, dtype)


def _save(
    model: PreTrainedModel,
    stored: Mapping[str, QuantizedTensor],
    out: Path,
    layout: str,
    source: Path | None,
    method: str,
    dtype: str,
) -> Path:
    """A model that is taken apart."""
    linears = models.linears(model)
    if missing := sorted(linears.keys() - stored.keys()):
        raise CheckpointError(f"stored lacks {missing[0]}: the {layout} layout is for models of which every linear is quantized")
    if foreign := sorted(stored.keys() - linears.keys()):
        raise CheckpointError(f"stored holds {foreign[0]}, which is no linear of the model's blocks")
    settings = {"method": method or layout, "layout": layout, "dtype": dtype} | _settings_of(stored)
    for name, layer in linears.items():
        layouts.check(layout, name, (layer.out_features, layer.in_features), settings["bits"], settings["group_size"])
    places = {id(module): name for name, module in model.named_modules()}
    blocks = [places[id(module)] for module in models.blocks(model)]
    parts = Parts(out, {}, layout, blocks, settings["bits"], DTYPES[dtype], restart=True, to_file=names.to_file(model))
    try:
        if layout == "gguf" and source:
            gguf_file.check(read_json(source / "config.json"), source)
        for block in calibrate.bare_blocks(model):
            parts.write(block, {}, {name: stored[name] for name in block.linears})
        inside = tuple(name + "." for name in blocks)
        parts.save_outside({name: p.detach().cpu() for name, p in model.named_parameters() if not name.startswith(inside)})
        config = read_json(source / "config.json") if source else json.loads(model.config.to_json_string(use_diff=False))
        config.pop("_name_or_path", None)  # a folder of the machine that writes
        weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in stored.values())
        facts = Facts(source.resolve().name if source else "", settings, weights, models.left_in_float(model))
        return finish(parts, model, source, config, facts)
    except BaseException:
        parts.give_up()
        raise


def _settings_of(stored: Mapping[str, QuantizedTensor]) -> dict[str, Any]:
    """Bits, group size and the rest, as the tensors show them. group_size None: each whole row.

    Raises CheckpointError where they differ.
    """
    in_blocks = [tensor for tensor in stored.values() if isinstance(tensor, BlockTensor)]
    on_grids = [tensor for tensor in stored.values() if isinstance(tensor, UniformTensor)]
    in_gguf = {tensor.kind for tensor in stored.values() if isinstance(tensor, GGUFTensor)}
    if len(in_gguf) == 1 and all(isinstance(tensor, GGUFTensor) for tensor in stored.values()):
        kind = in_gguf.pop()
        return {"bits": gguf_blocks.BITS[kind], "group_size": gguf_blocks.WEIGHTS[kind]}
    if len(in_blocks) == len(stored):
        kinds = {(tensor.kind, tensor.block_size, isinstance(tensor.absmax, NestedAbsmax)) for tensor in in_blocks}
        if len(kinds) == 1:
            kind, size, nested = kinds.pop()
            return {"bits": 4, "group_size": size, "codebook": kind, "double_quant": nested}
    elif len(on_grids) == len(stored):
        sizes, bits = {tensor.group_size for tensor in on_grids}, {tensor.bits for tensor in on_grids}
        whole = all(tensor.group_size == tensor.shape[1] for tensor in on_grids)
        if len(bits) == 1 and (whole or len(sizes) == 1):
            return {
                "bits": bits.pop(),
                "group_size": None if whole else sizes.pop(),
                "symmetric": all(tensor.packed_zero_points is None for tensor in on_grids),
                "act_order": any(getattr(tensor, "g_idx", None) is not None for tensor in on_grids),
            }
    raise CheckpointError("stored holds tensors of several kinds, bits or group sizes: a checkpoint has one of each")
