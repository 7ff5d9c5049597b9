"""4-bit weights times 16-bit activations in Triton: one kernel for a single row of activations, one for a small batch.

Both read codes from memory and never write a weight back. A weight is (code - zero_point) * scale. The difference is a small whole
number and is multiplied exactly; the scale, which a whole group shares, is applied once to the group's sum. Only float32 sums
are rounded, and at the end the output.

    x [batch, in] * packed uint8 [out, in / 2], scale [out, groups], zero_point uint8 [out, groups] -> out [batch, out]

A byte holds two codes, the first in its low nibble: the stream that quant.grid stores. Work is cut along in_features into units of
UNIT columns that lie within one group; `per_group` units share a scale.
"""

from __future__ import annotations

import torch

from labsupport.kernels.language import launch, tl

ROWS, UNITS = 8, 8  # of a tile of `matvec`: 8 rows x 8 units of 128 columns are 4 KiB of codes
BATCH_TILE, ROW_TILE = 16, 16  # of a tile of `small_batch`: 16 is the least that tl.dot multiplies


def matvec(
    x, packed, scale, zero_point, out, rows, units, per_group,
    UNIT: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """One row of activations. A program makes ROWS outputs; BYTES is UNIT / 2 rounded up to a power of two."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    byte, pair = tl.arange(0, BYTES), tl.arange(0, 2)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, units, UNITS):
        unit = first + tl.arange(0, UNITS)
        # Where each byte of the tile is in a row of codes, and which of the tile's rows, units and bytes exist.
        place = unit[:, None] * (UNIT // 2) + byte[None, :]  # [UNITS, BYTES]
        real = (unit[:, None] < units) & (byte[None, :] < UNIT // 2)
        both = real[None, :, :] & (row[:, None, None] < rows)
        start = row.to(tl.int64) * (units * (UNIT // 2))  # a large weight has more bytes than 32 bits count
        codes = tl.load(packed + start[:, None, None] + place[None, :, :], mask=both, other=0)  # [ROWS, UNITS, BYTES]
        pairs = tl.load(x + 2 * place[:, :, None] + pair[None, None, :], mask=real[:, :, None], other=0.0)
        even, odd = tl.split(pairs.to(tl.float32))  # [UNITS, BYTES] each
        group = row[:, None] * (units // per_group) + unit[None, :] // per_group  # [ROWS, UNITS]
        exists = (row[:, None] < rows) & (unit[None, :] < units)
        step = tl.load(scale + group, mask=exists, other=0.0).to(tl.float32)
        zero = tl.load(zero_point + group, mask=exists, other=0).to(tl.float32)[:, :, None]
        low, high = (codes & 15).to(tl.float32) - zero, (codes >> 4).to(tl.float32) - zero
        sums = tl.sum(low * even[None, :, :] + high * odd[None, :, :], 2)  # [ROWS, UNITS]
        total += tl.sum(sums * step, 1)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < rows)


def small_batch(
    x, packed, scale, zero_point, out, batch, rows, units, per_group,
    UNIT: tl.constexpr, BYTES: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Several rows of activations, by the matrix unit. A program makes BATCH x ROWS outputs; BYTES >= 16 for tl.dot."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    byte = tl.arange(0, BYTES)
    real = byte < UNIT // 2
    total = tl.zeros([BATCH, ROWS], tl.float32)
    for unit in range(units):
        place = unit * (UNIT // 2) + byte
        start = row.to(tl.int64) * (units * (UNIT // 2))
        of_weight = (row[None, :] < rows) & real[:, None]
        codes = tl.load(packed + start[None, :] + place[:, None], mask=of_weight, other=0)  # [BYTES, ROWS], the weight transposed
        pair = x + token.to(tl.int64)[:, None] * (units * UNIT) + 2 * place[None, :]
        of_batch = (token[:, None] < batch) & real[None, :]
        even, odd = tl.load(pair, mask=of_batch, other=0.0), tl.load(pair + 1, mask=of_batch, other=0.0)  # [BATCH, BYTES]
        group = row * (units // per_group) + unit // per_group
        step = tl.load(scale + group, mask=row < rows, other=0.0).to(tl.float32)
        zero = tl.load(zero_point + group, mask=row < rows, other=0).to(tl.float32)[None, :]
        low, high = (codes & 15).to(tl.float32) - zero, (codes >> 4).to(tl.float32) - zero
        # Whole numbers from -15 to 15 are exact in 16 bits, so nothing is lost before the matrix unit. "ieee": no TF32.
        sums = tl.dot(even, low.to(even.dtype), input_precision="ieee")
        sums += tl.dot(odd, high.to(odd.dtype), input_precision="ieee")
        total += sums * step[None, :]
    outputs = out + token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(outputs, total.to(out.dtype.element_ty), mask=(token[:, None] < batch) & (row[None, :] < rows))


def multiply(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, unit: int) -> torch.Tensor:
    """x [batch, in] times a weight in the layout above -> [batch, out] in x's dtype. Compiled on a GPU, interpreted on a CPU.

    unit: an even divisor of the group size. Raises RuntimeError where Triton is missing.
    """
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        # Triton's interpreter does not compute in bfloat16: its casts truncate instead of rounding, and its tl.dot multiplies the
        # bits as whole numbers. float32 holds the same values.
        return multiply(x.float(), packed, scale, zero_point, unit).bfloat16()
    rows, (batch, columns) = len(packed), x.shape
    units = columns // unit
    per_group = units // scale.shape[1]
    out = x.new_empty(batch, rows)
    width = 1 << (unit // 2 - 1).bit_length()
    if batch == 1:
        launch(
            matvec, (-(-rows // ROWS),), x, packed, scale, zero_point, out, rows, units, per_group,
            UNIT=unit, BYTES=width, ROWS=ROWS, UNITS=max(1, UNITS * 64 // width), num_warps=4,
        )  # fmt: skip
    else:
        launch(
            small_batch, (-(-rows // ROW_TILE), -(-batch // BATCH_TILE)), x, packed, scale, zero_point, out,
            batch, rows, units, per_group,
            UNIT=unit, BYTES=max(16, width), BATCH=BATCH_TILE, ROWS=ROW_TILE, num_warps=4, num_stages=4,
        )  # fmt: skip
    return out
