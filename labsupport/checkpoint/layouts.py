"""The layouts in which quantized linears are stored, and what the config says of them: GPTQ's two, AWQ's, bitsandbytes',
compressed-tensors' two, GGUF's blocks.

A layout reads back exactly the values that were written; codes may differ, see `_without_zeros`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from labsupport.checkpoint import compressed_tensors
from labsupport.checkpoint.weights import CheckpointError
from labsupport.quant import bnb_format, gguf_blocks, grid, packing
from labsupport.quant.gguf_blocks import GGUFTensor
from labsupport.quant.grid import QuantizedTensor, UniformTensor
from labsupport.quant.nf4 import BlockTensor

COMPRESSED = tuple(compressed_tensors.FORMATS)
LAYOUTS = ("gptq", "gptq_v2", "awq", "bitsandbytes", *COMPRESSED, "gguf")
PARTS = ("qweight", "qzeros", "scales", "g_idx")
VERSION = {"gptq": 1, "gptq_v2": 2}
DTYPES = {"scales": (torch.float16, torch.bfloat16, torch.float32), "g_idx": (torch.int32,)}


@dataclass(frozen=True)
class Grids:
    """What a layout has of uniform grids.

    group_size: the only one, -1 for the whole row; None for any. symmetric: it has no others. scattered: groups may be out of
    order. multiples: of which out_features and in_features must be.
    """

    bits: tuple[int, ...]
    group_size: int | None = None
    symmetric: bool = False
    scattered: bool = False
    multiples: tuple[int, int] = (1, 1)


GRIDS = {
    "gptq": Grids(packing.GPTQ_BITS, scattered=True, multiples=(32, 32)),
    "gptq_v2": Grids(packing.GPTQ_BITS, scattered=True, multiples=(32, 32)),
    "awq": Grids((4,), multiples=(8, 1)),
    compressed_tensors.PACKED: Grids(compressed_tensors.BITS, multiples=(compressed_tensors.MULTIPLE,) * 2),
    compressed_tensors.INT8: Grids((8,), group_size=-1, symmetric=True),
    "gguf": Grids((4, 8), group_size=gguf_blocks.BLOCK, symmetric=True),
}


def rounds_activations(layout: str) -> bool:
    """Whether who reads the layout rounds each token that goes into a linear as well, see `int8.round_tokens`."""
    return layout == compressed_tensors.INT8


def check_settings(layout: str, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a group size (None for the whole row) and choices that uniform grids of the layout do not have."""
    grids = GRIDS[layout]
    size = -1 if settings["group_size"] is None else settings["group_size"]
    if grids.group_size not in (None, size):
        wanted = "-1, one grid for a whole row" if grids.group_size == -1 else grids.group_size
        raise CheckpointError(f"group_size is {size}, the {layout} layout has {wanted}")
    if grids.symmetric and not settings.get("symmetric"):
        reason = ": the minimum of an asymmetric grid is scale * zero_point, and has more digits than q4_1's float16"
        raise CheckpointError(f"the {layout} layout has symmetric grids alone{reason if layout == 'gguf' else ''}")
    if settings.get("act_order") and not settings.get("static_groups") and not grids.scattered:
        raise CheckpointError(f"act_order without static_groups scatters groups over the row, and the {layout} layout has no g_idx")


def check(layout: str, name: str, shape: tuple[int, int], bits: int, group_size: int | None) -> None:
    """Raise CheckpointError where a linear [out_features, in_features] has no form in the layout. group_size: None for a row."""
    if layout == "bitsandbytes":
        return
    grids = GRIDS[layout]
    if bits not in grids.bits:
        raise CheckpointError(f"bits is {bits}, the {layout} layout has {', '.join(map(str, grids.bits))}")
    multiples = grids.multiples
    if layout == "gguf" and group_size is not None:
        multiples = (1, group_size)  # a block of 32 or, for q4_k, of 256 weights
    for axis, size, multiple in zip(("out_features", "in_features"), shape, multiples, strict=True):
        if size % multiple:
            also = ": q8_0, q4_0 and q4_1 have blocks of 32" if multiple == gguf_blocks.SUPERBLOCK else ""
            raise CheckpointError(f"{name} has {axis} {size}, the {layout} layout asks for a multiple of {multiple}{also}")


def write(layout: str, name: str, tensor: QuantizedTensor, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The tensors that stand for linear `name`, by full name. dtype: the one that bitsandbytes dequantizes to.

    Raises CheckpointError for what the layout cannot hold.
    """
    try:
        if layout == "bitsandbytes":
            if not isinstance(tensor, BlockTensor):
                raise ValueError(f"a {type(tensor).__name__} is not on a codebook of 16 levels")
            return bnb_format.write_4bit(tensor, f"{name}.weight", dtype)
        if isinstance(tensor, GGUFTensor) and layout == "gguf":
            return {f"{name}.{tensor.kind}": tensor.blocks}
        if not isinstance(tensor, UniformTensor):
            raise ValueError(f"a {type(tensor).__name__} is not on uniform grids")
        if tensor.scale.dtype != torch.float16:
            raise ValueError(f"its scales are {tensor.scale.dtype}, wanted torch.float16")
        if layout == "gguf":
            return write(layout, name, gguf_blocks.of_uniform(tensor))
        if layout in COMPRESSED:
            state = compressed_tensors.write(layout, tensor)
        else:
            state = packing.write_awq(tensor) if layout == "awq" else packing.write_gptq(_storable(layout, tensor), VERSION[layout])
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be stored in the {layout} layout: {error}") from error
    return {f"{name}.{part}": value for part, value in state.items()}


def _storable(layout: str, tensor: UniformTensor) -> UniformTensor:
    return _without_zeros(tensor) if layout == "gptq" else tensor


def _without_zeros(tensor: UniformTensor) -> UniformTensor:
    """The same values without a zero-point of 0: version 1 stores it as the highest code, which readers take for 2**bits.

    Codes and zero-points of such a group are raised by one. Raises ValueError for a group that has the highest code as well,
    which is one whose weights are all of one sign and not all zero.
    """
    lifted = tensor.zero_point == 0
    if not lifted.any():
        return tensor
    groups, codes, highest = packing.groups_of(tensor).long(), tensor.codes, 2**tensor.bits - 1
    top = torch.zeros_like(tensor.zero_point).scatter_reduce_(1, groups.expand(tensor.shape), codes.float(), "amax")
    if stuck := int((lifted & (top == highest)).sum()):
        raise ValueError(
            f"{stuck} of its groups hold no negative weight, and readers of version 1 misread their zero-point, 0: "
            "use gptq_v2, or symmetric grids"
        )
    return replace(
        tensor,
        packed_codes=grid.pack_bits(codes + lifted[:, groups], tensor.bits),
        packed_zero_points=grid.pack_bits((tensor.zero_point + lifted).to(torch.uint8), tensor.bits),
    )


def read(layout: str, name: str, state: Mapping[str, torch.Tensor], bits: int, symmetric: bool | None = None) -> QuantizedTensor:
    """The inverse of `write`. state: the linear's tensors, by what follows its name. symmetric: what the config says, by which
    compressed-tensors goes; None for what the tensors show. Raises CheckpointError.
    """
    try:
        if layout == "bitsandbytes":
            return bnb_format.read_4bit({key: value for key, value in state.items() if key.partition(".")[0] == "weight"}, "weight")
        if layout == "gguf":
            (kind,) = state.keys() & gguf_blocks.WEIGHTS.keys()
            return gguf_blocks.read(state[kind], kind)
        if layout in COMPRESSED:
            return compressed_tensors.read(
                layout, state, bits, "weight_zero_point" not in state if symmetric is None else symmetric
            )
        for part, known in DTYPES.items():
            if part in state and state[part].dtype not in known:
                raise ValueError(f"{part} is {state[part].dtype}, wanted {' or '.join(map(str, known))}")
        return packing.read_awq(state) if layout == "awq" else packing.read_gptq(state, bits, VERSION[layout])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{name}: {error}") from error


def config(
    layout: str, settings: Mapping[str, Any], dtype: str = "float16", floats: Sequence[str] = ("lm_head",)
) -> dict[str, Any]:
    """The quantization_config of config.json. settings: bits, group_size, symmetric, and the method's others.

    floats: the linears that are stored as they are. For AWQ and bitsandbytes transformers makes 4-bit layers of all others. For
    GPTQ it calls optimum, which replaces linears of the blocks alone (GPTQQuantizer.convert_model).
    """
    if layout == "bitsandbytes":
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
            "_load_in_8bit": False, "bnb_4bit_quant_type": settings.get("codebook", "nf4"),
            "bnb_4bit_use_double_quant": settings.get("double_quant", False), "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8", "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(floats), "llm_int8_threshold": 6.0,
        }  # fmt: skip
    if layout in COMPRESSED:
        return compressed_tensors.config(layout, settings, floats)
    size = settings["group_size"] or -1
    if layout == "awq":
        return {
            "quant_method": "awq", "version": "gemm", "bits": settings["bits"], "group_size": size, "zero_point": True,
            "modules_to_not_convert": list(floats),
        }  # fmt: skip
    scattered = bool(settings.get("act_order") and not settings.get("static_groups"))
    return {
        "quant_method": "gptq", "checkpoint_format": layout, "bits": settings["bits"], "group_size": size,
        "sym": bool(settings.get("symmetric")), "desc_act": scattered, "static_groups": bool(settings.get("static_groups")),
        "true_sequential": True, "damp_percent": settings.get("damping", 0.01), "lm_head": False,
        "model_name_or_path": None, "model_file_base_name": "model",
    }  # fmt: skip


def other_configs(layout: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files that AutoGPTQ and AutoAWQ read in place of config.json: name to content."""
    if layout == "awq":
        size = settings["group_size"] or -1
        return {"quant_config.json": {"zero_point": True, "q_group_size": size, "w_bit": settings["bits"], "version": "GEMM"}}
    return {"quantize_config.json": config(layout, settings)} if layout in VERSION else {}
