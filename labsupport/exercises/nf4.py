"""Chapter 5: where sixteen levels stand, what a block stores, and what a level costs."""

from __future__ import annotations

from statistics import NormalDist

import torch

from labsupport.exercises.base import Exercise, Mutant, Verdict, generator, largest_difference, like, right, shape_fault, wrong
from labsupport.quant import nf4

_quantile = NormalDist().inv_cdf


# 5.1 ------------------------------------------------------------------------------------------------------------------


def codebook_inputs(seed: int) -> dict:
    """NF4's own outermost probability, or another that float32 holds exactly: copied constants fit the first alone."""
    k = int(torch.randint(940, 1004, (1,), generator=generator(seed)))
    return {"offset": nf4.OFFSET if seed % 2 == 0 else k / 1024}


def _half(offset: float, count: int, keep_middle: bool = False) -> list[float]:
    spaced = torch.linspace(offset, 0.5, count if keep_middle else count + 1).tolist()
    return [_quantile(p) for p in (spaced if keep_middle else spaced[:-1])]


def _over_largest(levels: list[float]) -> torch.Tensor:
    found = torch.tensor(sorted(levels))
    return found / found.max()


def _levels(offset: float) -> torch.Tensor:
    """The right answer, for what mutants make of it."""
    return _over_largest([*_half(offset, 8), 0.0, *(-x for x in _half(offset, 7))])


def _mirrored(half: list[float]) -> torch.Tensor:
    return _over_largest([*half, *(-x for x in half)])


CODEBOOK_MISTAKES = {
    "this is the popular formula, quantiles at (i + 0.5) / 16. No level is 0, and the outermost has another probability": (
        lambda offset: _over_largest([_quantile((i + 0.5) / 16) for i in range(16)])
    ),
    "these are quantiles at 16 even steps from 1 - offset to offset: no level is 0. Each side has its own even steps": (
        lambda offset: _over_largest([_quantile(p) for p in torch.linspace(1 - offset, offset, 16).tolist()])
    ),
    "the levels are not divided by the largest: a block is divided by its largest magnitude, so the levels must end at 1": (
        lambda offset: _levels(offset) * _quantile(offset)
    ),
    "8 levels on either side, and none of them is 0": lambda offset: _mirrored(_half(offset, 8)),
    "0 is there twice: 1/2 is an end of both halves. A code is lost": lambda offset: _mirrored(_half(offset, 8, keep_middle=True)),
    "7 positive levels and 8 negative ones, wanted it the other way round": lambda offset: -_levels(offset).flip(0),
    "the probabilities are there, not the quantiles: inv_cdf takes one to the other": (
        lambda offset: _over_largest(
            [p - 0.5 for p in torch.linspace(offset, 0.5, 9)[:-1].tolist()]
            + [0.5 - p for p in torch.linspace(offset, 0.5, 8).tolist()]
        )
    ),
}


def judge_codebook(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    levels, wanted = got["levels"].double(), want["levels"].double()
    # A probability rounded to float32 moves by up to 2**-25, its quantile by 1 / density as much: 14 times at the outermost, by
    # which all are divided (1.85). With two roundings more it comes to 3.5e-7. Probabilities in float64 come within 1.4e-7.
    allowed = 4e-7
    off = largest_difference(levels, wanted)
    if off <= allowed:
        return right(off, allowed)
    if torch.allclose(levels.sort().values, wanted, rtol=0, atol=allowed):
        return wrong("the levels are right but do not ascend: a code is the place of its level among the sorted ones")
    for said, mistake in CODEBOOK_MISTAKES.items():
        if torch.allclose(levels.sort().values, mistake(given["offset"]).double(), rtol=0, atol=1e-5):
            return wrong(said)
    if not (levels == 0).any():
        return wrong("no level is exactly 0")
    place = int((levels - wanted).abs().argmax())
    return wrong(f"level {place} is {levels[place].item():.6f}, wanted {wanted[place].item():.6f} within {allowed:.0e}")


CODEBOOK = Exercise(
    id="5.1", name="nf4_codebook", title="Sixteen levels, one of them 0", minutes=12, difficulty=2, points=3,
    returns=("levels",), inputs=codebook_inputs, reference=nf4.normal_quantiles, judge=judge_codebook,
    mutants=(
        *(
            Mutant(like(CODEBOOK_MISTAKES, said), said)
            for said in (
                "popular formula", "from 1 - offset", "divided by the largest", "none of them is 0", "0 is there twice",
                "the other way round", "not the quantiles",
            )
        ),
        Mutant(lambda offset: _levels(offset)[torch.arange(16).roll(8)], "do not ascend"),
        Mutant(lambda offset: torch.cat([_levels(offset), torch.ones(1)]), "has shape [17]"),
        Mutant(lambda offset: _levels(offset - 0.005), "level"),
    ),
)  # fmt: skip


# 5.2 ------------------------------------------------------------------------------------------------------------------


def _bounds(levels: torch.Tensor) -> torch.Tensor:
    return (levels[:-1] + levels[1:]) / 2


def encode_inputs(seed: int) -> dict:
    """Values from -1 to 1, the levels and every midpoint among them. Levels are multiples of 1/64, so that ties are exact."""
    g = generator(seed)
    inner = (torch.randperm(127, generator=g)[:14] - 63) / 64
    levels = torch.cat([torch.tensor([-1.0, 1.0]), inner]).sort().values
    values = torch.cat([2 * torch.rand(200, generator=g) - 1, _bounds(levels), levels])
    return {"values": values[torch.randperm(len(values), generator=g)], "levels": levels}


def encode(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """labsupport's codes for one block: its largest magnitude is 1, so the division changes nothing."""
    return nf4.quantize(values[None], levels, block_size=len(values)).codes[0].long()


def _uniform_code(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return torch.round((values + 1) * 7.5).long()


ENCODE_MISTAKES = {
    "a value between two levels gets the upper one, however near the lower is: bucketize on the levels. The borders between codes "
    "are the midpoints": lambda v, lv: torch.bucketize(v, lv).clamp(max=15),
    "a value between two levels gets the lower one, however near the upper is. The borders between codes are the midpoints": (
        lambda v, lv: torch.bucketize(v, lv, right=True) - 1
    ),
    "these are codes of a uniform grid: the levels were not looked at": _uniform_code,
    "the level with the smallest signed difference was taken, which is the largest level: the distance is an absolute value": (
        lambda v, lv: (v[:, None] - lv).argmin(1)
    ),
    "every code is one too high: a value below the first midpoint has code 0": lambda v, lv: torch.bucketize(v, _bounds(lv)) + 1,
}


def judge_encode(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    values, levels, codes = given["values"], given["levels"], got["codes"]
    if not torch.equal(codes, codes.round()):
        return wrong("codes are whole numbers; these look like levels" if (codes.abs() <= 1).all() else "codes are whole numbers")
    codes = codes.long()
    if torch.equal(codes, want["codes"]):
        return right()
    for said, mistake in ENCODE_MISTAKES.items():
        if torch.equal(codes, mistake(values, levels)):
            return wrong(said)
    place = int((codes != want["codes"]).nonzero()[0])
    value, have, code = values[place].item(), int(codes[place]), int(want["codes"][place])
    tied = (values[:, None] == _bounds(levels)).any(1)
    if torch.equal(codes[~tied], want["codes"][~tied]):
        return wrong(f"{value:.6f} lies exactly half way between two levels and got code {have}. A tie takes the lower, {code}")
    return wrong(f"{value:.6f} got code {have}, wanted {code}, whose level {levels[code].item():.6f} is the nearest")


ENCODE = Exercise(
    id="5.2", name="encode", title="The nearest of sixteen", minutes=8, difficulty=2, points=3,
    returns=("codes",), inputs=encode_inputs, reference=encode, judge=judge_encode,
    mutants=(
        *(
            Mutant(like(ENCODE_MISTAKES, said), said)
            for said in ("gets the upper one", "gets the lower one", "uniform grid", "signed difference", "one too high")
        ),
        Mutant(lambda v, lv: torch.bucketize(v, _bounds(lv), right=True), "A tie takes the lower"),
        Mutant(lambda v, lv: lv[torch.bucketize(v, _bounds(lv))], "these look like levels"),
        Mutant(lambda v, lv: torch.bucketize(v, _bounds(lv)).clamp(max=14), "is the nearest"),
    ),
)  # fmt: skip


# 5.3 ------------------------------------------------------------------------------------------------------------------


def block_inputs(seed: int) -> dict:
    """Three rows of eleven: blocks of 8 run on into the next row, the last is short, and the number of weights is odd.

    One block is all zero; in one the largest magnitude is negative. No value is near the middle of two levels, so that dividing and
    multiplying by the reciprocal give the same codes.
    """
    g = generator(seed)
    levels = nf4.normal_quantiles()
    while True:
        flat = torch.randn(33, generator=g) * torch.tensor([1.0, 0.1, 10.0, 3.0, 0.5]).repeat_interleave(8)[:33]
        flat[8:16] = 0
        flat[20] = -flat[16:24].abs().max() - 1
        weight = flat.view(3, 11)
        divided = flat / nf4.quantize(weight, levels, 8).absmax.repeat_interleave(8)[:33].clamp(min=1e-30)
        if (divided[:, None] - _bounds(levels)).abs().min() > 1e-4:
            return {"weight": weight, "levels": levels, "block_size": 8}


def quantize_blocks(weight: torch.Tensor, levels: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """labsupport's NF4, taken apart."""
    stored = nf4.quantize(weight, levels, block_size)
    return stored.packed_codes, stored.absmax


def _blocks(flat: torch.Tensor, levels: torch.Tensor, size: int, absmax=None, low_first=False, spare=0.0, zero_code=None):
    """The right answer, or one with another magnitude, order of nibbles, filling, or code for a block of zeros."""
    parts = flat.split(size)
    absmax = absmax or (lambda part: part.abs().max())
    largest = torch.stack([absmax(part) for part in parts])
    divided = torch.cat([part / m if m != 0 else part for part, m in zip(parts, largest, strict=True)])
    codes = torch.bucketize(divided, _bounds(levels)).to(torch.uint8)
    if zero_code is not None:
        codes[flat == 0] = zero_code
    if len(codes) % 2:
        codes = torch.cat([codes, torch.bucketize(torch.tensor([spare]), _bounds(levels)).to(torch.uint8)])
    first, second = codes[0::2], codes[1::2]
    return (second << 4 | first, largest) if low_first else (first << 4 | second, largest)


def _restarted(weight: torch.Tensor, levels: torch.Tensor, size: int):
    parts = [part for row in weight for part in row.split(size)]
    divided = torch.cat([part / part.abs().max().clamp(min=1e-30) for part in parts])
    return _blocks(divided, levels, len(divided))[0], torch.stack([part.abs().max() for part in parts])


ABSMAX_MISTAKES = {
    "the signed maximum was taken; where the largest magnitude is negative it is too small, and codes run off the end: "
    "abs() before max()": lambda part: part.max(),
    "the longer side of the range was taken for its magnitude: max - min over 2 is not the largest magnitude": (
        lambda part: (part.max() - part.min()) / 2
    ),
    "this is the root mean square, not the largest magnitude": lambda part: part.pow(2).mean().sqrt(),
    "this is the mean magnitude, not the largest": lambda part: part.abs().mean(),
}


def judge_blocks(given: dict, got: dict, want: dict) -> Verdict:
    weight, levels, size = given.values()
    flat, packed, absmax = weight.reshape(-1), got["packed_codes"], got["absmax"]
    count = len(flat)
    if isinstance(absmax, torch.Tensor):
        if absmax.numel() == weight.shape[0] * -(-weight.shape[1] // size) != want["absmax"].numel():
            return wrong(
                "the blocks start anew at each row. The weight is one long vector: a block runs on into the next row where it must"
            )
        if absmax.numel() == count // size:
            return wrong("the short block at the end has no absmax of its own: its weights are lost, or share another block's")
        if absmax.numel() == 1:
            return wrong("there is one absmax for the whole weight, wanted one for each block")
    if isinstance(packed, torch.Tensor) and packed.numel() in (count, count + 1):
        return wrong("there is a byte for every code: two codes share a byte, first << 4 | second")
    if isinstance(packed, torch.Tensor) and packed.numel() * 2 > count + 1 and packed.ndim == 1:
        return wrong(f"{packed.numel()} bytes for {count} weights: the zeros that filled up the last block are stored as well")
    finite = {k: v.nan_to_num() if isinstance(v, torch.Tensor) else v for k, v in got.items()}
    if fault := shape_fault(finite, want):
        return wrong(fault)
    if packed.dtype != torch.uint8:
        return wrong(f"packed_codes is {packed.dtype}, wanted torch.uint8: one byte for two codes")
    absmax, wanted = absmax.float(), want["absmax"]
    if not absmax.isfinite().all():
        return wrong("absmax is not a number in a block of zeros")
    # A largest magnitude is one of the values: nothing is rounded. (1e-30: a zero may be kept off 0 to divide by it.)
    if (absmax - wanted).abs().max() > 1e-30:
        for said, mistake in ABSMAX_MISTAKES.items():
            if torch.allclose(absmax, torch.stack([mistake(part) for part in flat.split(size)]), rtol=1e-5):
                return wrong(said)
        block = int((absmax - wanted).abs().gt(1e-30).nonzero()[0])
        if wanted[block] == 0:
            return wrong(f"a block of zeros stores absmax {absmax[block].item():g}, wanted 0: divide by something else, store 0")
        return wrong(f"block {block} stores absmax {absmax[block].item():.5g}, wanted {wanted[block].item():.5g}")
    if torch.equal(packed, want["packed_codes"]):
        return right()
    if torch.equal(packed, _blocks(flat, levels, size, low_first=True)[0]):
        return wrong("absmax is right and so are the codes, but the first of two is in the low nibble, wanted it in the high one")
    codes, right_codes = nf4.unpack_nibbles(packed)[:count], nf4.unpack_nibbles(want["packed_codes"])[:count]
    if torch.equal(codes, right_codes):
        return wrong("all is right but the spare nibble of the last byte: an odd number of weights is filled up with a 0, code 7")
    zeros = flat == 0
    if torch.equal(codes[~zeros], right_codes[~zeros]):
        code = int(codes[zeros][0])
        return wrong(
            f"a block of zeros gets code {code}, wanted 7, whose level is 0. 0 / 0 is not a number, and its code is anything"
        )
    places = torch.bucketize(flat, _bounds(levels))
    if torch.equal(codes, places.to(torch.uint8)):
        return wrong("absmax is right, but the weights were not divided by it before their codes were chosen")
    place = int((codes != right_codes).nonzero()[0])
    return wrong(
        f"absmax is right; weight {place} of the long vector, in block {place // size}, has code {int(codes[place])}, "
        f"wanted {int(right_codes[place])}"
    )


def _padded_bytes(weight: torch.Tensor, levels: torch.Tensor, size: int):
    flat = weight.reshape(-1)
    full = torch.cat([flat, torch.zeros(-len(flat) % size)])
    return _blocks(full, levels, size)


def _undivided(weight: torch.Tensor, levels: torch.Tensor, size: int):
    flat = weight.reshape(-1)
    return _blocks(flat, levels, size, absmax=lambda part: torch.ones(()))[0], _blocks(flat, levels, size)[1]


def _ones_for_zeros(weight: torch.Tensor, levels: torch.Tensor, size: int):
    packed, absmax = _blocks(weight.reshape(-1), levels, size)
    return packed, torch.where(absmax == 0, torch.ones_like(absmax), absmax)


def _unpacked(weight: torch.Tensor, levels: torch.Tensor, size: int):
    packed, absmax = _blocks(weight.reshape(-1), levels, size)
    return nf4.unpack_nibbles(packed)[: weight.numel()], absmax


QUANTIZE_BLOCKS = Exercise(
    id="5.3", name="quantize_blocks", title="Blocks, to the byte", minutes=15, difficulty=3, points=4,
    returns=("packed_codes", "absmax"), inputs=block_inputs, reference=quantize_blocks, judge=judge_blocks,
    mutants=(
        *(
            Mutant(lambda w, lv, s, rule=rule: _blocks(w.reshape(-1), lv, s, absmax=rule), said[:30])
            for said, rule in ABSMAX_MISTAKES.items()
        ),
        Mutant(_restarted, "start anew at each row"),
        Mutant(lambda w, lv, s: _blocks(w.reshape(-1)[: w.numel() // s * s], lv, s), "short block at the end"),
        Mutant(lambda w, lv, s: _blocks(w.reshape(-1), lv, w.numel()), "whole weight"),
        Mutant(_unpacked, "a byte for every code"),
        Mutant(_padded_bytes, "are stored as well"),
        Mutant(lambda w, lv, s: _blocks(w.reshape(-1), lv, s, low_first=True), "low nibble"),
        Mutant(lambda w, lv, s: _blocks(w.reshape(-1), lv, s, spare=-1.0), "spare nibble"),
        Mutant(lambda w, lv, s: _blocks(w.reshape(-1), lv, s, zero_code=15), "0 / 0"),
        Mutant(_undivided, "not divided"),
        Mutant(_ones_for_zeros, "divide by something else"),
    ),
)  # fmt: skip


# 5.4 ------------------------------------------------------------------------------------------------------------------


def bits_inputs(seed: int) -> dict:
    """A shape that no block size divides, with an odd number of weights: every mistake gives a number of its own."""
    g = generator(seed)
    rows, columns = (2 * int(n) + 1 for n in torch.randint(100, 130, (2,), generator=g))
    return {"rows": rows, "columns": columns, "block_size": (32, 64, 128)[seed % 3]}


def stored_bits(rows: int, columns: int, block_size: int) -> tuple[float, float]:
    """Counted from real tensors, not computed."""
    weight = torch.zeros(rows, columns)
    plain, double = (nf4.quantize(weight, block_size=block_size, double_quant=nested) for nested in (False, True))
    return plain.bits_per_weight, double.bits_per_weight


def _bits_mistakes(rows: int, columns: int, block_size: int) -> dict[str, tuple[float, float]]:
    count = rows * columns
    blocks = -(-count // block_size)
    nested = -(-blocks // 256)
    codes = -(-count // 2)

    def bits(plain: float, double: float) -> tuple[float, float]:
        return 8 * plain / count, 8 * double / count

    plain, double = codes + 4 * blocks, codes + blocks + 4 * nested + 4
    by_row = rows * -(-columns // block_size)
    return {
        "256 nested magnitudes share a float32, and all share an offset. Without both it comes to 4.125 in blocks of 64": (
            bits(plain, codes + blocks)
        ),
        "what the nested magnitudes are divided by is missing: a float32 for every 256 of them": bits(plain, double - 4 * nested),
        "the offset is missing: 4 bytes for the whole weight": bits(plain, double - 4),
        "there is an offset for every 256 magnitudes here: there is one for the whole weight": (
            bits(plain, double - 4 + 4 * nested)
        ),
        "with double quantization the float32 magnitudes are gone; only what replaces them is stored": (
            bits(plain, double + 4 * blocks)
        ),
        "the magnitudes are float32, 32 bits each, not 16": bits(codes + 2 * blocks, double),
        "the 16 levels are the same for a whole model and are not counted": bits(plain + 64, double + 64),
        "the blocks start anew at each row here; they run on into the next": (
            bits(codes + 4 * by_row, codes + by_row + 4 * -(-by_row // 256) + 4)
        ),
        "these are bytes for the whole weight, wanted bits for each": (float(plain), float(double)),
    }


def judge_bits(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    mine, wanted = (got["plain"], got["double"]), (want["plain"], want["double"])
    off = max(abs(a - b) for a, b in zip(mine, wanted, strict=True))
    if off < 1e-12:
        return right()
    for said, mistake in _bits_mistakes(**given).items():
        if all(abs(a - b) < 1e-9 for a, b in zip(mine, mistake, strict=True)):
            return wrong(said)
    count = given["rows"] * given["columns"]
    size = given["block_size"]
    if all(abs(a - b) < 1e-9 for a, b in zip(mine, (4 + 32 / size, 4 + 8 / size + 32 / (256 * size) + 32 / count), strict=True)):
        return wrong("right for sizes that divide. A short block stores a whole absmax, and an odd weight a whole byte: round up")
    said = f"{given['rows']} x {given['columns']} in blocks of {size}"
    for name, a, b in zip(("plain", "double"), mine, wanted, strict=True):
        if abs(a - b) >= 1e-12:
            return wrong(f"{said}: {name} is {a:.6f} bits, {a * count / 8:.1f} bytes, wanted {b:.6f}, {b * count / 8:.0f} bytes")
    raise AssertionError("one of the two differs")


def _smooth_bits(rows: int, columns: int, size: int) -> tuple[float, float]:
    return 4 + 32 / size, 4 + 8 / size + 32 / (256 * size) + 32 / (rows * columns)


STORED_BITS = Exercise(
    id="5.4", name="stored_bits", title="The ledger, to the bit", minutes=8, difficulty=2, points=3,
    returns=("plain", "double"), inputs=bits_inputs, reference=stored_bits, judge=judge_bits,
    mutants=(
        *(
            Mutant(lambda *given, said=said: like(_bits_mistakes(*given), said), said)
            for said in (
                "4.125", "is missing: a float32", "offset is missing", "an offset for every 256", "are gone", "not 16", "16 levels",
                "start anew", "these are bytes",
            )
        ),
        Mutant(_smooth_bits, "round up"),
        Mutant(lambda r, c, s: (8 * (-(-r * c // 2) + 4 * -(-r * c // s)) / (r * c), 4.0), "double is"),
    ),
)  # fmt: skip


# 5.5 ------------------------------------------------------------------------------------------------------------------


def nested_inputs(seed: int) -> dict:
    """600 magnitudes: two whole blocks of 256 and a short one, each of another spread. One is far off, below the mean's reach."""
    g = generator(seed)
    spread = torch.tensor([0.2, 0.05, 0.6]).repeat_interleave(256)[:600]
    absmax = (1.5 + spread * torch.randn(600, generator=g)).clamp(min=0.01)
    absmax[300] = 0.02
    return {"absmax": absmax, "code_map": nf4.dynamic_map().clone()}


def double_quantize(absmax: torch.Tensor, code_map: torch.Tensor):
    """labsupport's nested magnitudes, taken apart: codes, largest, offset, and what is read back."""
    stored = nf4.nest(absmax)
    return stored.codes, stored.absmax, stored.offset, stored.dequantize()


def _nested(absmax: torch.Tensor, code_map: torch.Tensor, offset=None, largest=None, add_back=True, codes_for=None):
    """The right answer with the nearest code, or one of the ways to miss it."""
    offset = absmax.mean() if offset is None else offset(absmax)
    parts = (absmax - offset).split(256)
    largest = torch.stack([(largest or (lambda p: p.abs().max()))(part) for part in parts])
    wide = largest.repeat_interleave(256)[: len(absmax)]
    codes = (codes_for or torch.bucketize)((absmax - offset) / wide, _bounds(code_map)).clamp(0, 255)
    restored = code_map[codes] * wide
    return codes.to(torch.uint8), largest, offset if offset.ndim == 0 else offset[0], restored + offset if add_back else restored


NESTED_MISTAKES = {
    "the mean was not taken off before the codes were chosen: magnitudes are positive, and half of the signed map stays empty": (
        lambda a, m: _nested(a, m, offset=lambda a: torch.zeros(()))
    ),
    "the smallest magnitude was taken off, not the mean: half of the signed map stays empty": (
        lambda a, m: _nested(a, m, offset=lambda a: a.min())
    ),
    "the median was taken off, not the mean": lambda a, m: _nested(a, m, offset=lambda a: a.median()),
}


def judge_nested(given: dict, got: dict, want: dict) -> Verdict:
    absmax, code_map = given.values()
    got = {k: torch.tensor(float(v)) if k == "offset" and isinstance(v, int | float) else v for k, v in got.items()}
    if isinstance(got["offset"], torch.Tensor) and got["offset"].numel() == 3:
        return wrong("there is an offset for every 256 magnitudes, wanted one for all")
    if isinstance(got["largest"], torch.Tensor) and got["largest"].numel() == 1:
        return wrong("all magnitudes share one largest, wanted one for every 256 of them")
    got["offset"] = got["offset"].reshape(()) if getattr(got["offset"], "numel", lambda: 0)() == 1 else got["offset"]
    if fault := shape_fault(got, want):
        return wrong(fault)
    codes, largest, offset, restored = (got[k].double() for k in ("codes", "largest", "offset", "restored"))
    # A float32 sum of 600 terms, in any order, is right within 600 * 2**-24 of it.
    slack = 600 * 2**-24 * absmax.mean().item()
    if abs(offset - want["offset"]) > slack:
        for said, mistake in NESTED_MISTAKES.items():
            if abs(offset - mistake(absmax, code_map)[2]) <= slack:
                return wrong(said)
        return wrong(f"offset is {offset.item():.5f}, wanted the mean of all magnitudes, {want['offset'].item():.5f}")
    if largest_difference(largest, want["largest"]) > 2 * slack:
        signed = torch.stack([part.max() for part in (absmax - want["offset"]).split(256)])
        if largest_difference(largest, signed) <= 2 * slack:
            return wrong("largest is the signed maximum: the mean is off, so half of the values are negative. abs() first")
        if largest_difference(largest, torch.stack([p.max() for p in absmax.split(256)])) <= slack:
            return wrong("largest is that of the magnitudes as they were: the mean has to be taken off first")
        return wrong(f"largest is {largest.tolist()}, wanted {want['largest'].tolist()}")
    if not torch.equal(codes, codes.round()) or codes.min() < 0 or codes.max() > 255:
        return wrong("codes holds something else than places in the map, 0 to 255")
    wide = want["largest"].repeat_interleave(256)[: len(absmax)]
    divided = (absmax - want["offset"]) / wide
    # bitsandbytes looks its codes up in a table of 65,536 values, so the second nearest entry is right too where a border lies
    # within two steps of that table: then it is at most four steps further away than the nearest.
    distance = (divided - code_map[codes.long()]).abs() - (divided[:, None] - code_map).abs().amin(1)
    if (distance > 4 * 2 / 65535).any():
        uniform = torch.round(divided * 127) + 127
        if ((codes - uniform).abs() <= 1).all():
            return wrong("these are codes of a uniform grid of 8 bits; wanted the nearest entry of code_map, which is fine near 0")
        if ((codes - torch.bucketize(divided, code_map).clamp(max=255)).abs() <= 0).float().mean() > 0.95:
            return wrong("each value got the entry above it: bucketize on the entries. The borders are the midpoints, as in 5.2")
        place = int(distance.argmax())
        return wrong(f"magnitude {place} got code {int(codes[place])}, whose entry is not the nearest")
    read = (code_map[codes.long()].double() * wide.double() + offset).float()
    off, allowed = largest_difference(restored, read), 4 * slack
    if off <= allowed:
        return right(off, allowed)
    if largest_difference(restored, read - offset) <= allowed:
        return wrong("the offset was not added back: what is read back has mean 0, and magnitudes are negative")
    if largest_difference(restored, code_map[codes.long()] + offset) <= allowed:
        return wrong("what is read back was not multiplied by the largest of its 256")
    place = int((restored - read).abs().argmax())
    return wrong(
        f"codes, largest and offset are right; {place} reads back {restored[place].item():.5f}, wanted {read[place].item():.5f}"
    )


def _mean_of_each(absmax: torch.Tensor, code_map: torch.Tensor):
    offset = torch.stack([part.mean() for part in absmax.split(256)])
    parts = [_nested(part, code_map) for part in absmax.split(256)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), offset, torch.cat([p[3] for p in parts])


def _one_largest(absmax: torch.Tensor, code_map: torch.Tensor):
    centered = absmax - absmax.mean()
    largest = centered.abs().max()
    codes = torch.bucketize(centered / largest, _bounds(code_map))
    return codes.to(torch.uint8), largest[None], absmax.mean(), code_map[codes] * largest + absmax.mean()


def _unscaled(absmax: torch.Tensor, code_map: torch.Tensor):
    codes, largest, offset, _ = _nested(absmax, code_map)
    return codes, largest, offset, code_map[codes.long()] + offset


def _uniform_codes(absmax: torch.Tensor, code_map: torch.Tensor):
    return _nested(absmax, code_map, codes_for=lambda divided, _: (torch.round(divided * 127) + 127).long())


def _largest_before(absmax: torch.Tensor, code_map: torch.Tensor):
    codes, _, offset, restored = _nested(absmax, code_map)
    return codes, torch.stack([part.max() for part in absmax.split(256)]), offset, restored


DOUBLE_QUANTIZE = Exercise(
    id="5.5", name="double_quantize", title="Magnitudes of magnitudes", minutes=12, difficulty=3, points=4,
    returns=("codes", "largest", "offset", "restored"), inputs=nested_inputs, reference=double_quantize, judge=judge_nested,
    mutants=(
        *(Mutant(rule, said[:25]) for said, rule in NESTED_MISTAKES.items()),
        Mutant(lambda a, m: _nested(a, m, add_back=False), "not added back"),
        Mutant(lambda a, m: _nested(a, m, largest=lambda part: part.max()), "signed maximum"),
        Mutant(_mean_of_each, "an offset for every 256"),
        Mutant(_one_largest, "share one largest"),
        Mutant(_largest_before, "as they were"),
        Mutant(_uniform_codes, "uniform grid of 8 bits"),
        Mutant(lambda a, m: _nested(a, m, codes_for=lambda d, _: torch.bucketize(d, m)), "the entry above"),
        Mutant(_unscaled, "not multiplied"),
    ),
)  # fmt: skip


# 5.6 ------------------------------------------------------------------------------------------------------------------

INT4_GAIN, NF4_GAIN, APART = 3.0, 2.0, 1e-3


def two_blocks_inputs(seed: int) -> dict:
    return {"size": (64, 128, 32)[seed % 3]}


def two_blocks(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _two_blocks(size)


def _two_blocks(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in NF4's wide outer gaps, and one large weight among small ones."""
    outer = torch.linspace(0.65, 1, size // 2)
    small = torch.linspace(-0.1, 0.1, size - 1)
    return torch.cat([-outer, outer]), torch.cat([small, torch.ones(1)])


def block_error(block: torch.Tensor, codebook: str) -> float:
    """Squared error of a block of any length on one of the codebooks."""
    block = block.detach().float().reshape(1, -1)
    return (nf4.quantize(block, codebook, block.numel()).dequantize() - block).double().pow(2).sum().item()


def judge_two_blocks(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    gains = {}
    for name, block in got.items():
        if not block.any():
            return wrong(f"{name} is all zero: both codebooks have a 0, and neither loses")
        gap = (block.float().sort().values.diff() / block.abs().max()).min().item()
        # Rounding of a block written down in steps of a thousandth.
        if gap < 0.99 * APART:
            return wrong(
                f"two weights of {name} lie {max(gap, 0):.2g} of the largest apart, wanted at least {APART}, so that "
                "none is built of the levels themselves"
            )
        gains[name] = block_error(block, "nf4") / block_error(block, "int4")  # above 1: int4 wins
    int4_wins, nf4_wins = gains["for_int4"], 1 / gains["for_nf4"]
    if 1 / int4_wins > NF4_GAIN and 1 / nf4_wins > INT4_GAIN:
        return wrong("the two are exchanged: the block for int4 comes first")
    if int4_wins < INT4_GAIN:
        said = f"for_int4: NF4's squared error is {int4_wins:.2f} times int4's, wanted {INT4_GAIN:g}."
        if int4_wins > 1.5:
            return wrong(f"{said} Evenly spread weights get that far. Which gaps of NF4 are wider than int4's? Put more there")
        return wrong(f"{said} Where is NF4 coarser than the uniform grid? Multiplying a block by a number changes nothing")
    if nf4_wins < NF4_GAIN:
        said = f"for_nf4: int4's squared error is {nf4_wins:.2f} times NF4's, wanted {NF4_GAIN:g}."
        return wrong(f"{said} Where is NF4 finer than the uniform grid, and what brings most weights of a block there?")
    return right()


TWO_BLOCKS = Exercise(
    id="5.6", name="two_blocks", title="A block on which NF4 loses", minutes=10, difficulty=3, points=3,
    returns=("for_int4", "for_nf4"), inputs=two_blocks_inputs, reference=two_blocks, judge=judge_two_blocks,
    mutants=(
        Mutant(lambda n: _two_blocks(n)[::-1], "exchanged"),
        Mutant(lambda n: (torch.linspace(-1, 1, n), _two_blocks(n)[1]), "Evenly spread weights"),
        Mutant(lambda n: (100 * _two_blocks(n)[1], _two_blocks(n)[1]), "changes nothing"),
        Mutant(lambda n: (_two_blocks(n)[0], 0.01 * torch.linspace(-1, 1, n)), "NF4 finer"),
        Mutant(lambda n: (nf4.int4_levels()[1:].repeat(n)[:n], _two_blocks(n)[1]), "levels themselves"),
        Mutant(lambda n: (torch.zeros(n), _two_blocks(n)[1]), "all zero"),
        Mutant(lambda n: (_two_blocks(n)[0], torch.ones(n)), "levels themselves"),
    ),
)  # fmt: skip


# 5.7 ------------------------------------------------------------------------------------------------------------------


def lloyd_inputs(seed: int) -> dict:
    """Values of blocks over their magnitudes; 16 levels in no good place, one of them with no value near it; some are held."""
    g = generator(seed)
    blocks = torch.randn(12, 40, generator=g)
    values = (blocks / blocks.abs().amax(1, keepdim=True)).view(-1)
    levels = torch.linspace(-1, 1, 16) + 0.05 * torch.rand(16, generator=g)
    levels[0] = -1.05
    bounds = _bounds(levels)
    values = values[(values <= bounds[11]) | (values > bounds[12])]  # nothing is nearest to level 12
    hold = torch.zeros(16, dtype=torch.bool)
    hold[torch.randperm(11, generator=g)[:2] + 1] = True
    return {"values": values, "levels": levels, "hold": hold}


def lloyd_step(values: torch.Tensor, levels: torch.Tensor, hold: torch.Tensor) -> torch.Tensor:
    """float [n], float32 [16] ascending, bool [16] -> float32 [16]. (Lloyd 1982, method I.)"""
    return _moved(values, levels, hold, torch.mean)


def _moved(values: torch.Tensor, levels: torch.Tensor, hold: torch.Tensor, middle=torch.mean) -> torch.Tensor:
    """Each level moves to the mean of the values nearest to it; those held, and those without values, stay."""
    codes = torch.bucketize(values, _bounds(levels))
    moved = levels.clone()
    for code in range(len(levels)):
        mine = values[codes == code]
        if len(mine) and not hold[code]:
            moved[code] = middle(mine)
    return moved


def _by_codes(codes_of, empty=None):
    def step(values: torch.Tensor, levels: torch.Tensor, hold: torch.Tensor) -> torch.Tensor:
        codes = codes_of(values, levels)
        total = torch.zeros(16).index_add_(0, codes, values)
        count = torch.zeros(16).index_add_(0, codes, torch.ones_like(values))
        means = total / count if empty == "nan" else total / count.clamp(min=1)
        if empty is None:
            means = torch.where(count == 0, levels, means)
        return torch.where(hold, levels, means)

    return step


def _nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(values, _bounds(levels))


LLOYD_MISTAKES = {
    "this is the median of each level's values. It makes the sum of magnitudes of errors least, not of squares": (
        lambda v, lv, h: _moved(v, lv, h, torch.median)
    ),
    "levels that are held have moved": lambda v, lv, h: _moved(v, lv, torch.zeros_like(h)),
    "a level without values moved to 0, where there is a level already: let it stay": _by_codes(_nearest, "zero"),
    "each level takes the values up to it from the level below: bucketize on the levels. A value belongs to the nearest": (
        _by_codes(lambda v, lv: torch.bucketize(v, lv).clamp(max=15))
    ),
    "each level moved to the middle between its smallest and largest value, not to their mean": (
        lambda v, lv, h: _moved(v, lv, h, lambda mine: (mine.min() + mine.max()) / 2)
    ),
    "each level moved to the middle of its cell, without a look at the values": (
        lambda v, lv, h: torch.where(h, lv, torch.cat([lv[:1], (_bounds(lv)[:-1] + _bounds(lv)[1:]) / 2, lv[-1:]]))
    ),
    "nothing has moved": lambda v, lv, h: lv.clone(),
}


def judge_lloyd(given: dict, got: dict, want: dict) -> Verdict:
    finite = {k: v.nan_to_num(nan=9.0) if isinstance(v, torch.Tensor) else v for k, v in got.items()}
    if fault := shape_fault(finite, want):
        return wrong(fault)
    moved, wanted = got["moved"].float(), want["moved"]
    if not moved.isfinite().all():
        return wrong(f"level {int((~moved.isfinite()).nonzero()[0])} is not a number: no value is nearest to it. Let it stay")
    # A float32 sum of a cell's values, at most 480 of them and none above 1, over their number.
    allowed = 480 * 2**-24
    off = largest_difference(moved, wanted)
    if off <= allowed:
        return right(off, allowed)
    for said, mistake in LLOYD_MISTAKES.items():
        if largest_difference(moved, mistake(*given.values())) <= allowed:
            return wrong(said)
    place = int((moved - wanted).abs().argmax())
    return wrong(
        f"level {place} moved to {moved[place].item():.5f}, wanted {wanted[place].item():.5f}, the mean of what is nearest to it"
    )


LLOYD_STEP = Exercise(
    id="5.7", name="lloyd_step", title="One step of Lloyd's", minutes=10, difficulty=3, points=3,
    returns=("moved",), inputs=lloyd_inputs, reference=lloyd_step, judge=judge_lloyd,
    mutants=(
        *(Mutant(rule, said[:40]) for said, rule in LLOYD_MISTAKES.items()),
        Mutant(_by_codes(_nearest, "nan"), "no value is nearest"),
        Mutant(lambda v, lv, h: (lv + _moved(v, lv, h)) / 2, "the mean of what"),
    ),
)  # fmt: skip

EXERCISES = (CODEBOOK, ENCODE, QUANTIZE_BLOCKS, STORED_BITS, DOUBLE_QUANTIZE, TWO_BLOCKS, LLOYD_STEP)
