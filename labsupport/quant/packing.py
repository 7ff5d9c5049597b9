"""How AutoGPTQ and AutoAWQ store a weight: eight 4-bit codes to an int32 word, in the order that each one's kernel reads.

Codes are [out_features, in_features] here and the files hold them transposed. For a linear layer both store

    qweight  int32, the codes
    qzeros   int32, one zero-point for each group and output
    scales   float16 [groups, out_features]

GPTQ: a word holds neighbors along in_features, lowest bits first, and where bits does not divide 32 a code may begin in one
word and end in the next. It is the stream of `grid.pack_bits`, of one row of the weight after the other, cut into words.
Zero-points are such a stream along out_features. Version 1 stores zero_point - 1, version 2 zero_point itself, and nothing in
the tensors says which. g_idx int32 [in_features] is the group of each column.

AWQ (its GEMM layout, 4 bits): a word holds eight neighbors along out_features, of codes and of zero-points alike, but not in order:
counted from the lowest bits, columns 0, 2, 4, 6, 1, 3, 5, 7. Nothing is subtracted.

bitsandbytes: `labsupport.quant.bnb_format`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from labsupport.quant import checks, grid
from labsupport.quant.gptq import GPTQTensor
from labsupport.quant.grid import UniformTensor

WORD = 32
GPTQ_BITS = (2, 3, 4, 8)
VERSIONS = (1, 2)  # of how GPTQ stores zero-points
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbors each nibble of a word holds
AWQ_PLACES = tuple(AWQ_ORDER.index(neighbor) for neighbor in range(8))  # in which nibble each of eight neighbors is


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row as a stream of bits, lowest first, in 32-bit words: whole numbers [rows, n] to int32 [rows, n / 32 * bits].

    Raises ValueError where n is not a multiple of 32 (of the codes in a word, if a word holds whole codes), and for a code that
    has more bits, which would spill into its neighbors.
    """
    bits = checks.bits(bits)
    rows, count = checks.codes(codes, bits, ndim=2).shape
    if count * bits % WORD:
        raise ValueError(f"{count} codes of {bits} bits do not fill 32-bit words: wanted a multiple of {_whole(bits)}")
    return grid.pack_bits(codes, bits).view(torch.int32).view(rows, count * bits // WORD)


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_rows`: int32 [rows, words] to uint8 [rows, words * 32 / bits]."""
    bits = checks.bits(bits)
    checks.tensor(words, "words", (torch.int32,), "a tensor of 32-bit words, torch.int32")
    if words.ndim != 2:
        raise ValueError(f"words has shape {list(words.shape)}, wanted two axes")
    rows, count = words.shape[0], words.shape[1] * WORD // bits
    return grid.unpack_bits(words.contiguous().view(-1).view(torch.uint8), bits, rows * count).view(rows, count)


def pack_gptq(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ's qweight: codes [out_features, in_features] to int32 [in_features / 32 * bits, out_features]."""
    return pack_rows(codes, bits).t().contiguous()


def unpack_gptq(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [out_features, in_features]."""
    return unpack_rows(qweight.t(), bits)


def pack_gptq_zeros(zero_point: torch.Tensor, bits: int, version: int = 1) -> torch.Tensor:
    """GPTQ's qzeros: whole numbers [out_features, groups] to int32 [groups, out_features / 32 * bits].

    Version 1 subtracts 1 and keeps `bits` bits, so that a zero-point of 0 becomes 2**bits - 1 and leaves its neighbors alone.
    AutoGPTQ 0.7.1 does not cut it, and the -1 fills the rest of the word with ones.
    """
    bits = checks.bits(bits)
    stored = checks.codes(zero_point, bits, "zero_point", 2).to(torch.int16) - _less(version) & 2**bits - 1
    return pack_rows(stored.t(), bits)


def unpack_gptq_zeros(qzeros: torch.Tensor, bits: int, version: int = 1) -> torch.Tensor:
    """uint8 [out_features, groups]. Version 1 adds 1 and keeps `bits` bits; the libraries' kernels add it without cutting."""
    return (unpack_rows(qzeros, bits) + _less(version) & 2**bits - 1).t().contiguous()


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """AWQ's qweight: 4-bit codes [out_features, in_features] to int32 [in_features, out_features / 8].

    Its qzeros are the same of zero_point [out_features, groups], int32 [groups, out_features / 8].
    """
    if checks.codes(codes, 4, ndim=2).shape[0] % 8:
        raise ValueError(f"out_features {codes.shape[0]} is not a multiple of 8, of which AWQ fills a word")
    eights = codes.t().reshape(-1, 8)[:, list(AWQ_ORDER)]
    return pack_rows(eights, 4).view(codes.shape[1], -1)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_awq`: int32 [n, out_features / 8] to uint8 [out_features, n]."""
    return unpack_rows(words.reshape(-1, 1), 4)[:, list(AWQ_PLACES)].reshape(len(words), -1).t().contiguous()


def write_gptq(tensor: UniformTensor, version: int = 1) -> dict[str, torch.Tensor]:
    """What a GPTQ checkpoint stores for a linear layer: qweight, qzeros, scales (in the scale's own dtype) and g_idx.

    Raises ValueError for bits other than 2, 3, 4 and 8, and for a shape that does not fill words.
    """
    rows, columns = tensor.shape
    if tensor.bits not in GPTQ_BITS:
        raise ValueError(f"bits is {tensor.bits}, GPTQ's layout has {', '.join(map(str, GPTQ_BITS))}")
    for name, size in (("in_features", columns), ("out_features", rows)):
        if size % WORD:
            raise ValueError(f"{name} {size} is not a multiple of 32, which GPTQ's layout asks for")
    # The stored stream is what pack_rows would make of the codes.
    words = tensor.packed_codes.view(torch.int32).view(rows, -1)
    return {
        "qweight": words.t().contiguous(),
        "qzeros": pack_gptq_zeros(tensor.zero_point, tensor.bits, version),
        "scales": tensor.scale.t().contiguous(),
        "g_idx": groups_of(tensor),
    }


def groups_of(tensor: UniformTensor) -> torch.Tensor:
    """The group of each column, int32 [in_features]."""
    g_idx = getattr(tensor, "g_idx", None)
    if g_idx is None:
        g_idx = torch.arange(tensor.shape[1], device=tensor.scale.device) // tensor.group_size
    return g_idx.to(torch.int32)


def read_gptq(state: Mapping[str, torch.Tensor], bits: int, version: int = 1) -> GPTQTensor:
    """The weight of which a GPTQ checkpoint stores qweight, qzeros, scales and, if columns were reordered, g_idx.

    Where every zero-point is 2**(bits - 1) the grid is taken for symmetric. Raises ValueError naming what is missing, of a shape
    that does not fit the others, or no scale (not finite or not above 0), TypeError naming what is of another dtype.
    """
    if checks.bits(bits) not in GPTQ_BITS:
        raise ValueError(f"bits is {bits}, GPTQ's layout has {', '.join(map(str, GPTQ_BITS))}")
    bits = int(bits)
    qweight, qzeros, scales = _parts(state)
    columns, rows = qweight.shape[0] * WORD // bits, qweight.shape[1]
    size = _group_size(scales, rows, columns)
    _expect("qzeros", qzeros, (len(scales), rows * bits // WORD))
    g_idx = state.get("g_idx")
    if g_idx is not None:
        _expect("g_idx", checks.tensor(g_idx, "g_idx", (torch.int32, torch.int64), "torch.int32"), (columns,))
        if g_idx.min() < 0 or g_idx.max() >= len(scales):
            raise ValueError(f"g_idx names groups {int(g_idx.min())} to {int(g_idx.max())}, scales holds {len(scales)}")
        if torch.equal(g_idx.long(), torch.arange(columns, device=g_idx.device) // size):
            g_idx = None
    zero_point = unpack_gptq_zeros(qzeros, bits, version)
    return GPTQTensor(
        packed_codes=qweight.t().contiguous().view(-1).view(torch.uint8),
        scale=scales.t().contiguous(),
        packed_zero_points=None if (zero_point == 2 ** (bits - 1)).all() else grid.pack_bits(zero_point, bits),
        bits=bits,
        group_size=size,
        shape=(rows, columns),
        g_idx=g_idx,
        damping=0.0,  # not stored
    )


def write_awq(tensor: UniformTensor) -> dict[str, torch.Tensor]:
    """What an AWQ checkpoint stores for a linear layer: qweight, qzeros and scales (in the scale's own dtype).

    Raises ValueError for bits other than 4, columns out of order, and out_features that do not fill words.
    """
    if tensor.bits != 4:
        raise ValueError(f"bits is {tensor.bits}, AWQ's layout has 4")
    if getattr(tensor, "g_idx", None) is not None:
        raise ValueError("the groups are scattered over the row, AWQ's layout has no g_idx: quantize without act_order")
    return {
        "qweight": pack_awq(tensor.codes),
        "qzeros": pack_awq(tensor.zero_point),
        "scales": tensor.scale.t().contiguous(),
    }


def read_awq(state: Mapping[str, torch.Tensor]) -> UniformTensor:
    """The weight of which an AWQ checkpoint stores qweight, qzeros and scales. Raises what `read_gptq` raises."""
    qweight, qzeros, scales = _parts(state)
    columns, rows = qweight.shape[0], qweight.shape[1] * 8
    size = _group_size(scales, rows, columns)
    _expect("qzeros", qzeros, (len(scales), rows // 8))
    zero_point = unpack_awq(qzeros)
    return UniformTensor(
        packed_codes=grid.pack_bits(unpack_awq(qweight), 4),
        scale=scales.t().contiguous(),
        packed_zero_points=None if (zero_point == 8).all() else grid.pack_bits(zero_point, 4),
        bits=4,
        group_size=size,
        shape=(rows, columns),
    )


def _less(version: int) -> int:
    return 1 if checks.whole(version, "version", VERSIONS[0], VERSIONS[1], "1 or 2") == 1 else 0


def _whole(bits: int) -> int:
    """The fewest codes that fill whole words."""
    return next(count for count in (4, 8, 16, 32) if count * bits % WORD == 0)


def _parts(state: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if missing := [name for name in ("qweight", "qzeros", "scales") if name not in state]:
        raise ValueError(f"the layer lacks {', '.join(missing)}")
    qweight, qzeros, scales = (state[name] for name in ("qweight", "qzeros", "scales"))
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        checks.tensor(tensor, name, (torch.int32,), "torch.int32")
    checks.scales(checks.tensor(scales, "scales", wanted="floating point"), "scales")
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales)):
        if tensor.ndim != 2 or tensor.numel() == 0:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, wanted two axes, neither of them 0")
    return qweight, qzeros, scales


def _group_size(scales: torch.Tensor, rows: int, columns: int) -> int:
    groups, outputs = scales.shape
    if outputs != rows or columns % groups:
        raise ValueError(f"scales has shape {[groups, outputs]}, wanted groups that divide {columns} inputs, and {rows} outputs")
    return columns // groups


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, wanted {list(shape)}")
