"""The state dicts of bitsandbytes: what Linear4bit and Linear8bitLt save, written from our tensors and read back into them.

Only tensors and JSON, so a safetensors file holds it all. For a linear layer whose weight is called `weight`, 4 bits store:
weight (uint8 [bytes, 1]), weight.absmax, weight.quant_map and weight.quant_state.bitsandbytes__nf4 (JSON in uint8), and with
double quantization weight.nested_absmax and weight.nested_quant_map; absmax is then the 8-bit codes. 8 bits store weight (int8
[out, in]), SCB (float32 [out]) and weight_format (0: rows).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from labsupport.quant import checks, nf4
from labsupport.quant.int8 import Int8Tensor
from labsupport.quant.nf4 import BlockTensor, NestedAbsmax

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
KINDS = ("nf4", "fp4")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class FormatError(ValueError):
    """A state dict that does not hold what bitsandbytes writes, or a tensor that bitsandbytes cannot store."""


def write_4bit(tensor: BlockTensor, name: str = "weight", dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The entries of a Linear4bit's state dict. dtype: of the weight before it was quantized, and of what bitsandbytes reads back.

    Raises FormatError for what bitsandbytes cannot store: another codebook or block size, magnitudes in half precision.
    """
    if tensor.kind not in KINDS:
        raise FormatError(f"the codebook is {tensor.kind or 'one of your own'}, bitsandbytes reads {' or '.join(KINDS)}")
    if tensor.block_size not in BLOCK_SIZES:
        raise FormatError(f"block_size is {tensor.block_size}, bitsandbytes reads {', '.join(map(str, BLOCK_SIZES))}")
    dtypes = {value: key for key, value in DTYPES.items()}
    if dtype not in dtypes:
        raise FormatError(f"dtype is {dtype}, bitsandbytes reads {', '.join(DTYPES)}")
    about: dict[str, Any] = {
        "quant_type": tensor.kind, "blocksize": tensor.block_size, "dtype": dtypes[dtype], "shape": list(tensor.shape),
    }  # fmt: skip
    state = {name: tensor.packed_codes[:, None], f"{name}.quant_map": torch.tensor(tensor.levels)}
    absmax = tensor.absmax
    if isinstance(absmax, NestedAbsmax):
        state |= {
            f"{name}.absmax": absmax.codes,
            f"{name}.nested_absmax": absmax.absmax,
            f"{name}.nested_quant_map": nf4.dynamic_map(),
        }
        about |= {"nested_blocksize": nf4.NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": absmax.offset.item()}
    elif absmax.dtype == torch.float32:
        state[f"{name}.absmax"] = absmax
    else:
        raise FormatError(f"the magnitudes are {absmax.dtype}, bitsandbytes reads float32 or double quantization")
    text = json.dumps(about).encode()
    state[f"{name}.quant_state.bitsandbytes__{tensor.kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return state


def read_4bit(state: Mapping[str, torch.Tensor], name: str = "weight") -> BlockTensor:
    """The weight `name` of a state dict that Linear4bit wrote, which may also hold other layers' entries.

    Raises FormatError for what is missing, what does not belong there, and what contradicts something else, ValueError for
    magnitudes that are not finite or below 0.
    """
    prefix = f"{name}.quant_state.bitsandbytes__"
    kinds = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise FormatError(f"wanted one entry {prefix}nf4 or fp4, got {', '.join(kinds) or 'none'}")
    about = _about(state[prefix + kinds[0]], prefix + kinds[0])
    nested = "nested_offset" in about
    parts = ["absmax", "quant_map"] + (["nested_absmax", "nested_quant_map"] if nested else [])
    wanted = {name, prefix + kinds[0]} | {f"{name}.{part}" for part in parts}
    if missing := sorted(wanted - state.keys()):
        raise FormatError(f"the state dict lacks {', '.join(missing)}")
    if foreign := sorted(key for key in state if key.startswith(f"{name}.") and key not in wanted):
        raise FormatError(f"the state dict holds {', '.join(foreign)}, which a Linear4bit with these settings does not write")
    shape, block_size = tuple(about["shape"]), about["blocksize"]
    count = shape[0] * shape[1]
    blocks = -(-count // block_size)
    _expect(state, name, torch.uint8, -(-count // 2))
    _expect(state, f"{name}.absmax", torch.uint8 if nested else torch.float32, blocks)
    _expect(state, f"{name}.quant_map", torch.float32, 16)
    stored = state[f"{name}.absmax"].view(-1)
    absmax: torch.Tensor | NestedAbsmax = stored
    if nested:
        if about.get("nested_blocksize") != nf4.NESTED_BLOCK_SIZE:
            raise FormatError(f"nested_blocksize is {about.get('nested_blocksize')}, bitsandbytes writes {nf4.NESTED_BLOCK_SIZE}")
        _expect(state, f"{name}.nested_absmax", torch.float32, -(-blocks // nf4.NESTED_BLOCK_SIZE))
        _expect(state, f"{name}.nested_quant_map", torch.float32, 256)
        if not torch.equal(state[f"{name}.nested_quant_map"].cpu(), nf4.dynamic_map()):
            raise FormatError(f"{name}.nested_quant_map is not the signed dynamic map")
        offset = torch.tensor(about["nested_offset"], dtype=torch.float32)
        nested_absmax = checks.scales(state[f"{name}.nested_absmax"].view(-1), f"{name}.nested_absmax", zero=True)
        absmax = NestedAbsmax(stored, nested_absmax, offset.to(stored.device))
        checks.finite(absmax.dequantize(), f"{name}.absmax")  # one that was quantized in its turn may read back a little below 0
    else:
        checks.scales(stored, f"{name}.absmax", zero=True)
    levels = state[f"{name}.quant_map"].view(-1)
    if not torch.allclose(levels.cpu(), nf4.levels_of(kinds[0]), rtol=0, atol=1e-6):
        raise FormatError(f"{name}.quant_map is not the codebook {kinds[0]}")
    return BlockTensor(state[name].reshape(-1), absmax, tuple(levels.tolist()), kinds[0], block_size, shape)


def write_8bit(tensor: Int8Tensor, prefix: str = "") -> dict[str, torch.Tensor]:
    """The entries of a Linear8bitLt's state dict. Raises FormatError where all rows share one magnitude."""
    if tensor.absmax.shape != (tensor.shape[0],):
        raise FormatError(f"there are {tensor.absmax.numel()} magnitudes for {tensor.shape[0]} rows, bitsandbytes wants one a row")
    return {
        f"{prefix}weight": tensor.codes,
        f"{prefix}SCB": tensor.absmax,
        f"{prefix}weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def read_8bit(state: Mapping[str, torch.Tensor], prefix: str = "") -> Int8Tensor:
    """The weight that Linear8bitLt wrote under `prefix`.

    Raises FormatError for what is missing or of another form, ValueError for magnitudes that are not finite or below 0.
    """
    names = [f"{prefix}{part}" for part in ("weight", "SCB")]
    if missing := [name for name in names if name not in state]:
        raise FormatError(f"the state dict lacks {', '.join(missing)}")
    layout = state.get(f"{prefix}weight_format", torch.tensor(0))
    if layout.item() != 0:
        raise FormatError(f"{prefix}weight_format is {layout.item()}, wanted 0: rows")
    codes, absmax = (state[name] for name in names)
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise FormatError(f"{names[0]} is {codes.dtype} {list(codes.shape)}, wanted torch.int8 [out_features, in_features]")
    _expect(state, names[1], torch.float32, len(codes))
    return Int8Tensor(codes, checks.scales(absmax, names[1], zero=True))


def _about(packed: torch.Tensor, name: str) -> dict[str, Any]:
    try:
        about = json.loads(bytes(packed.tolist()))
        kind, size, dtype, shape = (about[key] for key in ("quant_type", "blocksize", "dtype", "shape"))
    except (AttributeError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise FormatError(f"{name} is not the JSON that bitsandbytes writes: {type(error).__name__}: {error}") from error
    whole = isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)
    offset = about.get("nested_offset", 0.0)
    number = isinstance(offset, int | float) and math.isfinite(offset)
    if kind not in KINDS or size not in BLOCK_SIZES or dtype not in DTYPES or not whole or not number:
        raise FormatError(f"{name} holds settings that bitsandbytes does not write: {about}")
    if not name.endswith(kind):
        raise FormatError(f"{name} says that it holds {kind}")
    return about


def _expect(state: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype, count: int) -> None:
    tensor = state[name]
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.numel() != count:
        if not isinstance(tensor, torch.Tensor):
            raise FormatError(f"{name} is {checks.kind(tensor)}, wanted a tensor")
        raise FormatError(f"{name} is {tensor.dtype} with {tensor.numel()} values, wanted {dtype} with {count}")
