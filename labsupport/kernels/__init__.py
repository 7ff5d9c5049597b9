"""Products with 4-bit weights behind one call: `matmul(x, prepare(weight))`.

Three backends: "triton" (compiled on a GPU, interpreted and slow on a CPU), "cpu" (PyTorch's own int4 product) and "twin" (plain
PyTorch, tile by tile, anywhere). `prepare` brings a weight into a backend's layout once; `matmul` multiplies with it many times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from labsupport.kernels import cpu, language, twin, w4a16
from labsupport.quant.grid import UniformTensor

Backend = Literal["triton", "cpu", "twin"]
BACKENDS = ("triton", "cpu", "twin")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LONGEST_UNIT = 256  # columns that a Triton tile takes from one group

__all__ = ["BACKENDS", "Int4Weight", "cpu", "language", "matmul", "prepare", "twin", "w4a16"]


@dataclass(frozen=True)
class Int4Weight:
    """A weight of 4-bit codes in the layout of a backend.

    shape: [out_features, in_features]. dtype: of the activations it is for. codes: uint8, two to a byte. grids: scale and
    zero_point [out, groups] (the latter uint8), or for "cpu" PyTorch's one tensor of both. unit: columns in a group, as the backend
    counts them.
    """

    backend: Backend
    shape: tuple[int, int]
    dtype: torch.dtype
    codes: torch.Tensor
    grids: tuple[torch.Tensor, ...]
    unit: int

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weight."""
        return self.codes.nbytes + sum(grid.nbytes for grid in self.grids)


def prepare(
    weight: UniformTensor,
    dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
    device: str | torch.device | None = None,
) -> Int4Weight:
    """Bring a 4-bit weight into the layout of a backend. dtype: of the activations. device: by default the weight's.

    Without a backend: Triton on a GPU; on a CPU PyTorch's own product if it takes the weight and is fast (bfloat16); otherwise
    the twin. Raises ValueError for a weight that the backend cannot take, RuntimeError for a backend that is not installed.
    """
    if weight.bits != 4:
        raise ValueError(f"weight has {weight.bits} bits, and these kernels are for 4")
    if getattr(weight, "g_idx", None) is not None:
        raise ValueError("the groups of weight are scattered over its rows (g_idx), and these kernels read neighbors")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, wanted one of {', '.join(map(str, DTYPES))}")
    device = torch.device(device or weight.packed_codes.device)
    chosen = backend or _best(weight.group_size, dtype, device)
    if chosen not in BACKENDS:
        raise ValueError(f"backend is {chosen!r}, wanted one of {', '.join(BACKENDS)}")
    if chosen == "cpu":
        return _for_cpu(weight, dtype, device)
    if weight.group_size % 2:
        raise ValueError(f"group_size is {weight.group_size}, wanted an even number: a byte holds two codes")
    if chosen == "triton" and not language.available():
        raise RuntimeError(language.MISSING)
    rows, columns = weight.shape
    codes = weight.packed_codes.view(rows, columns // 2).to(device)
    grids = weight.scale.to(device), weight.zero_point.to(torch.uint8).to(device)
    return Int4Weight(chosen, weight.shape, dtype, codes, grids, _unit(weight.group_size))


def _best(group_size: int, dtype: torch.dtype, device: torch.device) -> Backend:
    if device.type == "cuda":
        return "triton" if language.available() else "twin"
    fast = dtype == torch.bfloat16 and cpu.available() and cpu.group_for(group_size)
    return "cpu" if fast else "twin"


def _for_cpu(weight: UniformTensor, dtype: torch.dtype, device: torch.device) -> Int4Weight:
    if device.type != "cpu":
        raise ValueError(f"device is {device}, and PyTorch's int4 product for CPUs runs on a CPU")
    if not cpu.available():
        raise RuntimeError(f"torch {torch.__version__} has no int4 product for CPUs: version 2.6 or later has")
    packed, grids, group = cpu.pack(weight.codes, weight.scale, weight.zero_point, weight.group_size, dtype)
    return Int4Weight("cpu", weight.shape, dtype, packed, (grids,), group)


def _unit(group_size: int) -> int:
    """The largest even divisor of an even group size that is at most LONGEST_UNIT."""
    return max(unit for unit in range(2, min(group_size, LONGEST_UNIT) + 1, 2) if group_size % unit == 0)


def matmul(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """x [..., in_features] times the weight, transposed -> [..., out_features] in x's dtype.

    Raises TypeError for another dtype than the weight was prepared for, ValueError for a width or device that does not fit.
    """
    out_features, in_features = weight.shape
    if x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype}, and the weight was prepared for {weight.dtype}")
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {list(x.shape)}, wanted a last axis of {in_features}")
    if x.device.type != weight.codes.device.type:
        raise ValueError(f"x is on {x.device}, the weight on {weight.codes.device}")
    flat = x.reshape(-1, in_features)
    if not len(flat):
        return x.new_empty(*x.shape[:-1], out_features)
    if weight.backend == "cpu":
        (grids,) = weight.grids
        product = cpu.multiply(flat, weight.codes, grids, weight.unit, out_features)
    else:
        scale, zero_point = weight.grids
        if weight.backend == "triton":
            product = w4a16.multiply(flat.contiguous(), weight.codes, scale, zero_point, weight.unit)
        else:
            product = twin.multiply(flat, weight.codes, scale, zero_point).to(x.dtype)
    return product.reshape(*x.shape[:-1], out_features)
