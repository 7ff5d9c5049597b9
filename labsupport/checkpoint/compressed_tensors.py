"""The two layouts of compressed-tensors, which llm-compressor and vLLM write today, for integer weights.

pack-quantized, called compressed-tensors here: weights of 4 or 8 bits, activations as they are (W4A16, W8A16). For a linear

    weight_packed      int32 [out_features, in_features / 32 * bits], each row a stream of codes, lowest bits first
    weight_scale       float16 [out_features, groups]
    weight_zero_point  int32 [out_features / 32 * bits, groups], such a stream along out_features; not where grids are symmetric
    weight_shape       int64 [2], out_features and in_features

int-quantized, compressed-tensors-w8a8: 8 bits and one symmetric grid an output, and whoever runs the model rounds activations to
8 bits as well, each token by itself (W8A8).

    weight             int8 [out_features, in_features], the code less 128
    weight_scale       float16 [out_features, 1]

Code and zero-point are those of quant.grid. The library has them from -2**(bits - 1) on and adds as much when it packs, so that the
same bits are stored. (compressed_tensors 0.20, compressors/pack_quantized and naive_quantized.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from labsupport.quant import checks, grid, packing
from labsupport.quant.grid import UniformTensor

PACKED, INT8 = "compressed-tensors", "compressed-tensors-w8a8"
FORMATS = {PACKED: "pack-quantized", INT8: "int-quantized"}  # what the config calls them
PARTS = {PACKED: ("weight_packed", "weight_scale", "weight_shape"), INT8: ("weight", "weight_scale")}
BITS = (4, 8)
SCALES = (torch.float16, torch.bfloat16, torch.float32)
MULTIPLE = 8  # of which in_features and out_features are whole words of 4 bits


def write(layout: str, tensor: UniformTensor) -> dict[str, torch.Tensor]:
    """The tensors of a linear. Raises ValueError for a grid that the layout does not have."""
    if getattr(tensor, "g_idx", None) is not None:
        raise ValueError("the groups are scattered over the row, and compressed-tensors has no g_idx any more: use static groups")
    if layout == INT8:
        if tensor.bits != 8 or tensor.packed_zero_points is not None or tensor.group_size != tensor.shape[1]:
            raise ValueError("it has one symmetric grid of 8 bits for each output")
        return {"weight": (tensor.codes ^ 128).view(torch.int8), "weight_scale": tensor.scale.clone()}
    rows, columns = tensor.shape
    state = {
        "weight_packed": packing.pack_rows(tensor.codes, tensor.bits),
        "weight_scale": tensor.scale.clone(),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if tensor.packed_zero_points is not None:
        state["weight_zero_point"] = packing.pack_rows(tensor.zero_point.t(), tensor.bits).t().contiguous()
    return state


def read(layout: str, state: Mapping[str, torch.Tensor], bits: int, symmetric: bool) -> UniformTensor:
    """The inverse of `write`. Raises ValueError and TypeError for what is missing, of another dtype or shape, or no scale."""
    wanted = PARTS[layout] if symmetric else (*PARTS[layout], "weight_zero_point")
    if missing := [part for part in wanted if part not in state]:
        raise ValueError(f"the layer lacks {', '.join(missing)}")
    if symmetric and "weight_zero_point" in state:
        raise ValueError("it has a weight_zero_point, and config.json says symmetric: a loader that goes by the config ignores it")
    scale = checks.scales(checks.tensor(state["weight_scale"], "weight_scale", SCALES, "floating point"), "weight_scale")
    if layout == INT8:
        stored = checks.tensor(state["weight"], "weight", (torch.int8,), "torch.int8")
        if stored.ndim != 2 or stored.numel() == 0:
            raise ValueError(f"weight has shape {list(stored.shape)}, wanted two axes, neither of them 0")
        codes = stored.view(torch.uint8) ^ 128
    else:
        codes = packing.unpack_rows(checks.tensor(state["weight_packed"], "weight_packed", (torch.int32,), "torch.int32"), bits)
        if state["weight_shape"].tolist() != list(codes.shape):
            raise ValueError(f"weight_shape is {state['weight_shape'].tolist()}, weight_packed holds {list(codes.shape)}")
    rows, columns = codes.shape
    if scale.ndim != 2 or len(scale) != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise ValueError(
            f"weight_scale has shape {list(scale.shape)}, wanted {rows} outputs, and groups that divide {columns} inputs"
        )
    zero_point = None
    if not symmetric:
        words = checks.tensor(state["weight_zero_point"], "weight_zero_point", (torch.int32,), "torch.int32")
        if list(words.shape) != [rows * bits // packing.WORD, scale.shape[1]]:
            raise ValueError(
                f"weight_zero_point has shape {list(words.shape)}, wanted {[rows * bits // packing.WORD, scale.shape[1]]}"
            )
        zero_point = packing.unpack_rows(words.t(), bits).t()
    return UniformTensor(
        packed_codes=grid.pack_bits(codes, bits),
        scale=scale.contiguous(),
        packed_zero_points=None if zero_point is None else grid.pack_bits(zero_point, bits),
        bits=bits,
        group_size=columns // scale.shape[1],
        shape=(rows, columns),
    )


def config(layout: str, settings: Mapping[str, Any], floats: Sequence[str]) -> dict[str, Any]:
    """The quantization_config. settings: bits, group_size (None for a whole row) and symmetric. floats: linears left alone."""
    size = settings["group_size"]
    weights = {
        "num_bits": settings["bits"], "type": "int", "symmetric": bool(settings.get("symmetric")), "dynamic": False,
        "strategy": "channel" if size is None else "group", "group_size": size,
    }  # fmt: skip
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token", "group_size": None}
    group = {
        "targets": ["Linear"], "weights": weights, "input_activations": tokens if layout == INT8 else None,
        "output_activations": None, "format": FORMATS[layout],
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": FORMATS[layout], "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": list(floats), "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip


def settings_of(quantization: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Layout, and bits, group_size (None for a whole row) and symmetric, as a quantization_config has them.

    Raises ValueError naming what this package does not read.
    """
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ValueError(f"config_groups holds {len(groups) if isinstance(groups, dict) else groups!r} groups, wanted one")
    (group,) = groups.values()
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise ValueError("the group in config_groups has no weights")
    layout = {name: key for key, name in FORMATS.items()}.get(str(quantization.get("format")))
    if layout is None:
        raise ValueError(f"format is {quantization.get('format')!r}, wanted {' or '.join(FORMATS.values())}")
    weights = group["weights"]
    bits, size, symmetric = weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric", True)
    strategy = weights.get("strategy") or ("channel" if size in (None, -1) else "group")
    if weights.get("type", "int") != "int" or type(bits) is not int or bits not in ((8,) if layout == INT8 else BITS):
        wanted = f"int and {' or '.join(map(str, (8,) if layout == INT8 else BITS))}"
        raise ValueError(f"weights have type {weights.get('type', 'int')!r} and num_bits {bits!r}, wanted {wanted}")
    if type(symmetric) is not bool or (layout == INT8 and not symmetric):
        raise ValueError(f"symmetric is {symmetric!r}, wanted {'true' if layout == INT8 else 'true or false'}")
    if strategy == "channel":
        size = None
    elif strategy != "group" or type(size) is not int or size < 1 or layout == INT8:
        wanted = "channel" if layout == INT8 else "channel, or group and a positive whole number"
        raise ValueError(f"strategy is {strategy!r} and group_size {size!r}, wanted {wanted}")
    tokens = group.get("input_activations")
    if not _wanted_activations(layout, tokens):
        wanted = "8 bits, symmetric, dynamic, by token" if layout == INT8 else "none"
        raise ValueError(f"input_activations is {tokens!r}, wanted {wanted}")
    return layout, {"bits": bits, "group_size": size, "symmetric": symmetric}


def _wanted_activations(layout: str, tokens: object) -> bool:
    """Whether what a config says of activations is what the layout has."""
    if layout != INT8:
        return tokens is None
    if not isinstance(tokens, dict):
        return False
    kept = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True, "type": "int"}
    return {"symmetric": True, "type": "int", **tokens}.items() >= kept.items()
