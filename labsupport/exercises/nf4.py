"""Chapter 5: where sixteen levels stand, what a block stores, and what a level costs."""

from __future__ import annotations

from functools import partial
from statistics import NormalDist

import torch
from torch.nn import functional as F

from labsupport.exercises.compare import got_and_wanted, largest_difference, shown
from labsupport.exercises.form import Exercise, Fault, Mistake, Mutant, generator, mistakes_by_option, right
from labsupport.quant import nf4

_quantile = NormalDist().inv_cdf


# 5.1 ------------------------------------------------------------------------------------------------------------------
# A probability rounded to float32 moves by up to 2**-25, its quantile by 1 / density as much: 14 times at the outermost, by which
# all are divided (1.85). With two roundings more it comes to 3.5e-7. Probabilities in float64 come within 1.4e-7.
LEVELS_APART = 4e-7


def codebook_inputs(seed: int) -> dict:
    """NF4's own outermost probability, or another that float32 holds exactly: copied constants fit the first alone."""
    k = int(torch.randint(940, 1004, (1,), generator=generator(seed)))
    return {"offset": nf4.OFFSET if seed % 2 == 0 else k / 1024}


def _codebook(offset, *, above=8, below=7, middle=(0.0,), level=_quantile, divide=True):
    """A right answer, with what can go wrong as options: numbers of levels, another level for a probability, not divided."""
    up, down = (torch.linspace(offset, 0.5, count + 1)[:-1].tolist() for count in (above, below))
    levels = torch.tensor(sorted([*(-level(p) for p in down), *middle, *(level(p) for p in up)]))
    return levels / levels.max() if divide else levels


def _quantiles(low, high):
    levels = torch.tensor([_quantile(p) for p in torch.linspace(low, high, 16).tolist()])
    return levels / levels.max()


CODEBOOK = Exercise(
    id="5.1", name="nf4_codebook", title="Sixteen levels, one of them 0", minutes=12, difficulty=2, points=3,
    returns=("levels",), inputs=codebook_inputs, reference=nf4.normal_quantiles, allowed=lambda given, want: LEVELS_APART,
    otherwise=lambda given, got, want: None if (got["levels"] == 0).any() else "no level is exactly 0",
    alike=lambda given, got, theirs: largest_difference(got["levels"].sort().values, theirs["levels"].sort().values) < 1e-5,
    faults=(
        Fault("the levels are right but do not ascend: a code is the place of its level among the sorted ones",
              lambda given, got, want: largest_difference(got["levels"].sort().values, want["levels"]) <= LEVELS_APART
              and (got["levels"].diff() < 0).any(),
              (lambda offset: _codebook(offset).roll(8), lambda offset: _codebook(offset).flip(0))),
    ),
    mistakes=mistakes_by_option(_codebook, {
        "this is the popular formula, quantiles at (i + 0.5) / 16. No level is 0; the outermost has another probability":
            lambda offset: _quantiles(0.5 / 16, 15.5 / 16),
        "these are quantiles at 16 even steps from 1 - offset to offset: no level is 0. Each side has its own even steps":
            lambda offset: _quantiles(1 - offset, offset),
        "the levels are not divided by the largest: a block is divided by its largest magnitude, so levels end at 1":
            {"divide": False},
        "8 levels on either side, and none of them is 0": {"below": 8, "middle": ()},
        "0 is there twice: 1/2 is an end of both halves. A code is lost": {"above": 7, "middle": (0.0, 0.0)},
        "7 positive levels and 8 negative ones, wanted it the other way round": {"above": 7, "below": 8},
        "the probabilities are there, not the quantiles: inv_cdf takes one to the other": {"level": lambda p: p - 0.5},
    }),
    others=(Mutant(lambda offset: _codebook(offset) + 1e-3, "no level is exactly 0"),),
)  # fmt: skip


# 5.2 ------------------------------------------------------------------------------------------------------------------
def _bounds(levels: torch.Tensor) -> torch.Tensor:
    return (levels[:-1] + levels[1:]) / 2


def _nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(values, _bounds(levels))


def encode_inputs(seed: int) -> dict:
    """Values from -1 to 1; levels, midpoints and both sides of each among them. Levels are multiples of 1/64: ties are exact."""
    g = generator(seed)
    inner = (torch.randperm(127, generator=g)[:14] - 63) / 64
    levels = torch.cat([torch.tensor([-1.0, 1.0]), inner]).sort().values
    bounds = _bounds(levels)
    values = torch.cat([2 * torch.rand(200, generator=g) - 1, bounds - 2**-12, bounds, bounds + 2**-12, levels])
    return {"values": values[torch.randperm(len(values), generator=g)], "levels": levels}


def encode(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """labsupport's codes for one block: its largest magnitude is 1, so the division changes nothing."""
    return nf4.quantize(values[None], levels, block_size=len(values)).codes.flatten().long()


def _about_value(given, want, name, place):
    value, levels = given["values"][place], given["levels"]
    if torch.isin(value, _bounds(levels)):
        return f"the code of {value:.6f}, exactly half way between two levels, where a tie takes the lower"
    return f"the code of {value:.6f}, to which {levels[want['codes'][place]]:.6f} is the nearest level"


ENCODE = Exercise(
    id="5.2", name="encode", title="The nearest of sixteen", minutes=8, difficulty=2, points=3,
    returns=("codes",), inputs=encode_inputs, reference=encode, about=_about_value,
    faults=(
        Fault("codes are whole numbers; these are levels",
              lambda given, got, want: got["codes"].is_floating_point() and not torch.equal(got["codes"], got["codes"].round())
              and torch.isin(got["codes"].float(), given["levels"]).all(), (lambda v, lv: lv[_nearest(v, lv)],), early=True),
    ),
    mistakes=(
        Mistake("a value between two levels gets the upper one, however near the lower is: bucketize on the levels. The borders "
                "between codes are the midpoints", lambda v, lv: torch.bucketize(v, lv).clamp(max=15)),
        Mistake("a value between two levels gets the lower one, however near the upper is. The borders between codes are the "
                "midpoints", lambda v, lv: torch.bucketize(v, lv, right=True) - 1),
        Mistake("these are codes of a uniform grid: the levels were not looked at",
                lambda v, lv: torch.round((v + 1) * 7.5).long()),
        Mistake("the level with the smallest signed difference was taken, which is the largest level: the distance is an absolute "
                "value", lambda v, lv: (v[:, None] - lv).argmin(1)),
        Mistake("every code is one too high: a value below the first midpoint has code 0", lambda v, lv: _nearest(v, lv) + 1),
    ),
    others=(
        Mutant(lambda v, lv: torch.bucketize(v, _bounds(lv), right=True), "a tie takes the lower"),
        Mutant(lambda v, lv: _nearest(v, lv).clamp(max=14), "is the nearest level"),
    ),
)  # fmt: skip


# 5.3 ------------------------------------------------------------------------------------------------------------------
def block_inputs(seed: int) -> dict:
    """Three rows of eleven in blocks of 8 or 7: they run on into the next row, the last is short, and the number of weights is odd.

    One block is all zero; in one the largest magnitude is positive, in one negative. No value is near the middle of two levels, so
    that dividing and multiplying by the reciprocal give the same codes.
    """
    g, size = generator(seed), (8, 7)[seed % 2]
    levels = nf4.normal_quantiles()
    while True:
        flat = torch.randn(33, generator=g) * torch.tensor([1.0, 0.1, 10.0, 3.0, 0.5]).repeat_interleave(size)[:33]
        flat[size : 2 * size] = 0
        flat[3] = flat[:size].abs().max() + 1
        flat[2 * size + 4] = -flat[2 * size : 3 * size].abs().max() - 1
        absmax = torch.stack([part.abs().max() for part in flat.split(size)]).repeat_interleave(size)[:33]
        if ((flat / absmax.clamp(min=1e-30))[:, None] - _bounds(levels)).abs().min() > 1e-4:
            return {"weight": flat.view(3, 11), "levels": levels, "block_size": size}


def quantize_blocks(weight: torch.Tensor, levels: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """labsupport's NF4, taken apart."""
    stored = nf4.quantize(weight, levels, block_size)
    return stored.packed_codes, stored.block_absmax


def _blocks(weight, levels, size, *, cut=None, largest=lambda part: part.abs().max(), divide=True, zero=7, spare=7, store=None):
    """A right answer, with what can go wrong as options: blocks, their magnitudes, codes for zeros and for the spare nibble, and
    how it is stored: store(codes, absmax)."""
    parts = cut(weight, size) if cut else weight.flatten().split(size)
    absmax = torch.stack([largest(part) for part in parts])
    divided = [part / m if divide and m != 0 else part for part, m in zip(parts, absmax, strict=True)]
    codes = _nearest(torch.cat(divided), levels).masked_fill(torch.cat(parts) == 0, zero)
    codes = torch.cat([codes, torch.full((len(codes) % 2,), spare)]).to(torch.uint8)
    return store(codes, absmax) if store else (nf4.pack_nibbles(codes), absmax)


def _first_block_off(given, got, want):
    if (off := ((got["absmax"] - want["absmax"]).abs() > 1e-30).nonzero()).numel():
        block = int(off[0])
        return f"absmax[{block}], one for each block: {got_and_wanted(got['absmax'][block].item(), want['absmax'][block].item())}"
    flat = given["weight"].flatten()
    codes, wanted = (nf4.unpack_nibbles(each["packed_codes"].long()) for each in (got, want))
    place = int((codes != wanted).nonzero()[0])
    if place == len(flat):
        return "all is right but the spare nibble of the last byte: an odd number of weights is filled up with a 0, code 7"
    if not (codes != wanted)[: len(flat)][flat != 0].any():
        of_zeros = f"a block of zeros gets code {codes[place]}, wanted 7, whose level is 0"
        return f"{of_zeros}. Is 0 divided by 0 there? The code of that is anything"
    about = f"weight {place} of the long vector, in block {place // given['block_size']}"
    return f"absmax is right; {about}, has code {codes[place]}, wanted {wanted[place]}"


QUANTIZE_BLOCKS = Exercise(
    id="5.3", name="quantize_blocks", title="Blocks, to the byte", minutes=15, difficulty=3, points=4,
    returns=("packed_codes", "absmax"), inputs=block_inputs, reference=quantize_blocks, dtypes=("packed_codes",),
    # A largest magnitude is one of the values: nothing is rounded. A zero may be kept off 0 to divide by it.
    allowed=lambda given, want: {"packed_codes": 0.0, "absmax": 1e-30},
    close=lambda given, want: {"packed_codes": 0.0, "absmax": 1e-6 * want["absmax"]}, otherwise=_first_block_off,
    faults=(
        Fault("a block of zeros stores absmax {value}, wanted 0: divide by something else, store 0",
              lambda given, got, want: got["absmax"][1] > 1e-30 and {"value": f"{got['absmax'][1].item():g}"},
              (partial(_blocks, store=lambda codes, absmax: (nf4.pack_nibbles(codes), absmax.masked_fill(absmax == 0, 1))),)),
    ),
    mistakes=mistakes_by_option(_blocks, {
        "the blocks start anew at each row. The weight is one long vector: a block runs on into the next row where it must":
            {"cut": lambda w, s: [part for row in w for part in row.split(s)]},
        "the short block at the end has no absmax of its own: its weights are lost":
            {"cut": lambda w, s: w.flatten()[: w.numel() // s * s].split(s)},
        "there is one absmax for the whole weight, wanted one for each block": {"cut": lambda w, s: [w.flatten()]},
        "there is a byte for every code: two codes share a byte, first << 4 | second":
            {"store": lambda codes, absmax: (codes[:-1], absmax)},
        "the zeros that fill up the last block are stored as well, wanted no more codes than weights":
            {"cut": lambda w, s: F.pad(w.flatten(), (0, -w.numel() % s)).split(s)},
        "the signed maximum was taken; where the largest magnitude is negative it is too small, and codes run off the end: abs() "
        "before max()": {"largest": torch.max},
        "half the range was taken for its magnitude: max - min over 2 is not the largest magnitude":
            {"largest": lambda part: (part.max() - part.min()) / 2},
        "this is the root mean square, not the largest magnitude": {"largest": lambda part: part.pow(2).mean().sqrt()},
        "this is the mean magnitude, not the largest": {"largest": lambda part: part.abs().mean()},
        "absmax is right and so are the codes, but the first of two is in the low nibble, wanted it in the high one":
            {"store": lambda codes, absmax: (codes[1::2] << 4 | codes[0::2], absmax)},
        "absmax is right, but the weights were not divided by it before their codes were chosen": {"divide": False},
    }),
    others=(
        Mutant(partial(_blocks, spare=0), "spare nibble"), Mutant(partial(_blocks, zero=15), "gets code 15, wanted 7"),
        Mutant(partial(_blocks, largest=lambda part: 1.01 * part.abs().max()), "one for each block: got"),
        Mutant(partial(_blocks, store=lambda codes, absmax: (nf4.pack_nibbles(codes.clamp(max=14)), absmax)), "code 14, wanted 15"),
    ),
)  # fmt: skip


# 5.4 ------------------------------------------------------------------------------------------------------------------
def bits_inputs(seed: int) -> dict:
    """A shape that no block size divides, with an odd number of weights: every mistake gives a number of its own."""
    rows, columns = torch.randint(100, 115, (2,), generator=generator(seed)).tolist()
    return {"rows": 2 * rows + 1, "columns": 2 * columns + 31, "block_size": (32, 64, 128)[seed % 3]}


def stored_bits(rows: int, columns: int, block_size: int) -> tuple[float, float]:
    """Counted from real tensors, not computed."""
    weight = torch.zeros(rows, columns)
    plain, double = (nf4.quantize(weight, block_size=block_size, double_quant=nested) for nested in (False, True))
    return plain.bits_per_weight, double.bits_per_weight


def _ledger(rows, columns, size, *, absmax=4, code=1, nested=4, offset=4, levels=0, by_row=False):
    """A right answer, with what can go wrong as options: bytes of all that is stored, and blocks that start anew at each row."""
    count = rows * columns
    blocks = rows * -(-columns // size) if by_row else -(-count // size)
    plain, double = absmax * blocks, code * blocks + nested * -(-blocks // 256) + offset
    return tuple(8 * (-(-count // 2) + magnitudes + levels) / count for magnitudes in (plain, double))


def _bits_and_bytes(given, got, want):
    name, count = "plain" if abs(got["plain"] - want["plain"]) > 1e-12 else "double", given["rows"] * given["columns"]
    bits, nbytes = (shown(got[name] * unit, want[name] * unit, 8) for unit in (1, count / 8))
    about = "{rows} x {columns} in blocks of {block_size}".format(**given)
    return f"{about}: {name} is {bits[0]} bits, {nbytes[0]} bytes, wanted {bits[1]} bits, {nbytes[1]} bytes"


STORED_BITS = Exercise(
    id="5.4", name="stored_bits", title="The ledger, to the bit", minutes=8, difficulty=2, points=3,
    returns=("plain", "double"), inputs=bits_inputs, reference=stored_bits, otherwise=_bits_and_bytes,
    allowed=lambda given, want: 1e-12,  # a few roundings of a float64 near 4
    close=lambda given, want: 1e-9,  # and of the number of bytes
    mistakes=mistakes_by_option(_ledger, {
        "256 nested magnitudes share a float32, and all share an offset. Without both it comes to 4.125 in blocks of 64":
            {"nested": 0, "offset": 0},
        "what the nested magnitudes are divided by is missing: a float32 for every 256 of them": {"nested": 0},
        "the offset is missing: 4 bytes for the whole weight": {"offset": 0},
        "there is an offset for every 256 magnitudes here: there is one for the whole weight": {"nested": 8, "offset": 0},
        "with double quantization the float32 magnitudes are gone; only what replaces them is stored": {"code": 5},
        "the magnitudes are float32, 32 bits each, not 16": {"absmax": 2},
        "the 16 levels are the same for a whole model and are not counted": {"levels": 64},
        "the blocks start anew at each row here; they run on into the next": {"by_row": True},
        "these are bytes for the whole weight, wanted bits for each":
            lambda rows, columns, size: tuple(bits * rows * columns / 8 for bits in _ledger(rows, columns, size)),
        "right for sizes that divide. A short block stores a whole absmax, and an odd weight a whole byte: round up":
            lambda rows, columns, size: (4 + 32 / size, 4 + 8 / size + 32 / (256 * size) + 32 / (rows * columns)),
    }),
    others=(Mutant(partial(_ledger, absmax=3), ": plain is"),),
)  # fmt: skip


# 5.5 ------------------------------------------------------------------------------------------------------------------
def nested_inputs(seed: int) -> dict:
    """600 magnitudes with a mean of 5: two whole blocks of 256 and a short one, each of another spread, the furthest of them below
    the mean, most of them above it. None lies so near the middle of two entries that bitsandbytes, which looks codes up in a
    table of 65,536 values, takes the other one."""
    g, code_map = generator(seed), nf4.dynamic_map().clone()
    parts = []
    for spread, count in ((1.5, 84), (0.3, 84), (4.0, 28)):
        size, share = 0.1 + 0.9 * torch.rand(2 * count, generator=g), 0.3 + 0.4 * torch.rand(2 * count, generator=g)
        threes = torch.stack([-size, share * size, (1 - share) * size], 1)  # of sum 0
        far = (threes[:, :, None] - _bounds(code_map)).abs().amin(2) > 4 * 2 / 65535
        centered = torch.cat([threes[far.all(1)][:count].flatten(), torch.tensor([-1.0, 0.557, 0.331, 0.112])])
        parts.append(5 + spread * centered[torch.randperm(len(centered), generator=g)])
    return {"absmax": torch.cat(parts), "code_map": code_map}


def double_quantize(absmax: torch.Tensor, code_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """labsupport's nested magnitudes, taken apart: codes, largest, offset, and what is read back."""
    stored = nf4.nest(absmax)
    return stored.codes, stored.absmax, stored.offset, stored.dequantize()


def _nested(
    absmax, code_map, *, offset=torch.mean, largest=lambda centered, part: centered.abs().max(), codes_for=_nearest, size=256,
    scaled=1, added=1,
):  # fmt: skip
    """A right answer, with what can go wrong as options. scaled, added: 0 to leave that out on the way back."""
    off = offset(absmax)
    magnitudes = torch.stack([largest(part - off, part) for part in absmax.split(size)])
    wide = magnitudes.repeat_interleave(size)[: len(absmax)]
    codes = codes_for((absmax - off) / wide, code_map).clamp(0, 255)
    return codes.to(torch.uint8), magnitudes, off, code_map[codes] * wide**scaled + added * off


def _each_its_own(absmax, code_map):
    codes, largest, offset, restored = zip(*(_nested(part, code_map) for part in absmax.split(256)), strict=True)
    return torch.cat(codes), torch.cat(largest), torch.stack(offset), torch.cat(restored)


def _nested_allowed(given: dict, want: dict) -> dict:
    """A float32 sum of 600 terms, in any order, is right within 600 * 2**-24 of it; so is their mean, and what it is taken off."""
    slack = len(given["absmax"]) * 2**-24 * want["offset"].item()
    return {"offset": slack, "largest": 2 * slack, "codes": 0.0, "restored": 4 * slack}


DOUBLE_QUANTIZE = Exercise(
    id="5.5", name="double_quantize", title="Magnitudes of magnitudes", minutes=12, difficulty=3, points=4,
    returns=("codes", "largest", "offset", "restored"), inputs=nested_inputs, reference=double_quantize,
    allowed=_nested_allowed, order=("offset", "largest"),
    faults=(
        Fault("there is an offset for every 256 magnitudes, wanted one for all",
              lambda given, got, want: got["offset"].numel() == len(want["largest"]), (_each_its_own,), early=True),
        Fault("all magnitudes share one largest, wanted one for every 256 of them",
              lambda given, got, want: got["largest"].numel() == 1, (partial(_nested, size=600),), early=True),
        Fault("codes go from {least} to {most}, wanted places in the map, 0 to 255",
              lambda given, got, want: (got["codes"].min() < 0 or got["codes"].max() > 255)
              and {"least": int(got["codes"].min()), "most": int(got["codes"].max())},
              (lambda a, m: (_nested(a, m)[0].int() - 128, *_nested(a, m)[1:]),)),
    ),
    mistakes=mistakes_by_option(_nested, {
        "the mean was not taken off before the codes were chosen: magnitudes are positive, and half of the signed map stays empty":
            {"offset": lambda absmax: torch.zeros(())},
        "the smallest magnitude was taken off, not the mean: half of the signed map stays empty": {"offset": torch.min},
        "the median was taken off, not the mean": {"offset": torch.median},
        "largest is the signed maximum: the mean is off, so half of the values are negative. abs() first":
            {"largest": lambda centered, part: centered.max()},
        "largest is that of the magnitudes as they were: the mean has to be taken off first":
            {"largest": lambda _, part: part.max()},
        "these are codes of a uniform grid of 8 bits; wanted the nearest entry of code_map, which is fine near 0":
            {"codes_for": lambda divided, code_map: (torch.round(divided * 127) + 127).long()},
        "each value got the entry above it: bucketize on the entries. The borders are the midpoints, as in 5.2":
            {"codes_for": torch.bucketize},
        "the offset was not added back: what is read back has mean 0, and magnitudes are negative": {"added": 0},
        "what is read back was not multiplied by the largest of its 256": {"scaled": 0},
    }),
)  # fmt: skip


# 5.6 ------------------------------------------------------------------------------------------------------------------
INT4_GAIN, NF4_GAIN, APART = 3.0, 2.0, 1e-3


def two_blocks_inputs(seed: int) -> dict:
    return {"size": (64, 128, 32)[seed % 3]}


def two_blocks(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in NF4's wide outer gaps, and one large weight among small ones."""
    return _outer(size), _small(size)


def _outer(size):
    outer = torch.linspace(0.65, 1, size // 2)
    return torch.cat([-outer, outer])


def _small(size):
    return torch.cat([torch.linspace(-0.1, 0.1, size - 1), torch.ones(1)])


def block_error(block: torch.Tensor, codebook: str) -> float:
    """Squared error of a block of any length, divided by its largest magnitude, on one of the codebooks."""
    block = (block.double() / block.abs().max()).float()[None]
    return (nf4.quantize(block, codebook, block.numel()).dequantize() - block).double().pow(2).sum().item()


def _gain(block: torch.Tensor) -> float:
    """How many times int4's squared error NF4's is."""
    return block_error(block, "nf4") / block_error(block, "int4")


def _two_blocks_fault(given, got, want) -> str | None:
    for name, block in got.items():
        if not block.any():
            return f"{name} is all zero: both codebooks have a 0, and neither loses"
        gap = (block.double().sort().values.diff() / block.abs().max()).min().item()
        if gap < 0.99 * APART:  # a block written down in steps of a thousandth is rounded
            apart = f"lie {gap:.2g} of the largest apart, wanted at least {APART}"
            return f"two weights of {name} {apart}, so that none is built of the levels themselves"
    int4_wins, nf4_wins = _gain(got["for_int4"]), 1 / _gain(got["for_nf4"])
    if 1 / int4_wins > NF4_GAIN and 1 / nf4_wins > INT4_GAIN:
        return "the two are exchanged: the block for int4 comes first"
    if int4_wins < INT4_GAIN:
        about = f"for_int4: NF4's squared error is {shown(int4_wins, INT4_GAIN, 3)[0]} times int4's, wanted {INT4_GAIN:g}"
        about += f"; evenly spread weights get {_gain(torch.linspace(-1, 1, given['size'])):.3g}"
        return f"{about}. Where are NF4's gaps wider than the uniform grid's? Multiplying a block by a number changes nothing"
    if nf4_wins < NF4_GAIN:
        about = f"for_nf4: int4's squared error is {shown(nf4_wins, NF4_GAIN, 3)[0]} times NF4's, wanted {NF4_GAIN:g}"
        return f"{about}. Where is NF4 finer than the uniform grid, and what brings most weights of a block there?"
    return None


TWO_BLOCKS = Exercise(
    id="5.6", name="two_blocks", title="A block on which NF4 loses", minutes=10, difficulty=3, points=3,
    returns=("for_int4", "for_nf4"), inputs=two_blocks_inputs, reference=two_blocks,
    accepts=lambda given, got, want: None if _two_blocks_fault(given, got, want) else right(), otherwise=_two_blocks_fault,
    others=(
        Mutant(lambda n: (_small(n), _outer(n)), "exchanged"), Mutant(lambda n: (torch.zeros(n), _small(n)), "all zero"),
        Mutant(lambda n: (torch.linspace(-1, 1, n), _small(n)), "evenly spread weights"),
        Mutant(lambda n: (100 * _small(n), _small(n)), "changes nothing"),
        Mutant(lambda n: (_outer(n), 0.01 * torch.linspace(-1, 1, n)), "NF4 finer"),
        Mutant(lambda n: (nf4.int4_levels()[1:].repeat(n)[:n], _small(n)), "levels themselves"),
    ),
)  # fmt: skip


# 5.7 ------------------------------------------------------------------------------------------------------------------
EMPTY = 12  # the level that no value is nearest to


def lloyd_inputs(seed: int) -> dict:
    """Values of blocks over their magnitudes, none near the middle of two levels; 16 levels in no good place, one of them with no
    value near it; two are held, which values would move."""
    g = generator(seed)
    blocks = torch.randn(12, 40, generator=g)
    values = (blocks / blocks.abs().amax(1, keepdim=True)).view(-1)
    levels = torch.linspace(-1, 1, 16) + 0.05 * torch.rand(16, generator=g)
    levels[0] = -1.05
    bounds = _bounds(levels)
    values = values[(values <= bounds[EMPTY - 1]) | (values > bounds[EMPTY])]
    values = values[(values[:, None] - bounds).abs().amin(1) > 1e-5]
    hold = torch.zeros(16, dtype=torch.bool)
    hold[torch.randperm(11, generator=g)[:2] + 1] = True
    return {"values": values, "levels": levels, "hold": hold}


def lloyd_step(values: torch.Tensor, levels: torch.Tensor, hold: torch.Tensor) -> torch.Tensor:
    """float [n], float32 [16] ascending, bool [16] -> float32 [16]. (Lloyd 1982, method I.)"""
    return _moved(values, levels, hold)


def _moved(values, levels, hold, *, middle=torch.mean, codes_for=_nearest, empty=None, held=True):
    """A right answer, with what can go wrong as options: another middle, other values, what a level without values gets."""
    codes, moved = codes_for(values, levels), levels.clone()
    for code in range(len(levels)):
        mine = values[codes == code]
        if not (hold[code] and held) and (len(mine) or empty is not None):
            moved[code] = middle(mine) if len(mine) else empty
    return moved


def _about_level(given, want, name, place):
    stays = given["levels"][place] == want["moved"][place]
    return f"{name}{list(place)}, {'which stays where it was' if stays else 'the mean of the values that are nearest to it'}"


LLOYD_STEP = Exercise(
    id="5.7", name="lloyd_step", title="One step of Lloyd's", minutes=10, difficulty=3, points=3,
    returns=("moved",), inputs=lloyd_inputs, reference=lloyd_step, about=_about_level,
    allowed=lambda given, want: 480 * 2**-24,  # a float32 sum of a cell's values, at most 480 and none above 1, over their number
    faults=(
        Fault(f"level {EMPTY} is not a number: no value is nearest to it. Let it stay",
              lambda given, got, want: got["moved"].flatten()[EMPTY : EMPTY + 1].isnan().any(),
              (partial(_moved, empty=torch.nan),), early=True),
    ),
    mistakes=mistakes_by_option(_moved, {
        "levels that are held have moved": {"held": False},
        "a level without values moved to 0: let it stay": {"empty": 0.0},
        "this is the median of each level's values. It makes the sum of magnitudes of errors least, not of squares":
            {"middle": torch.median},
        "each level takes the values up to it from the level below: bucketize on the levels. A value belongs to the nearest":
            {"codes_for": lambda v, lv: torch.bucketize(v, lv).clamp(max=15)},
        "each level moved to the middle between its smallest and largest value, not to their mean":
            {"middle": lambda mine: (mine.min() + mine.max()) / 2},
        "each level moved to the middle of its cell, without a look at the values":
            lambda v, lv, h: torch.where(h, lv, torch.cat([lv[:1], _bounds(_bounds(lv)), lv[-1:]])),
        "nothing has moved": lambda v, lv, h: lv.clone(),
    }),
    others=(
        Mutant(lambda v, lv, h: (lv + _moved(v, lv, h)) / 2, "the mean of the values that are nearest to it"),
        Mutant(partial(_moved, empty=0.5), "stays where it was"),
    ),
)  # fmt: skip

EXERCISES = (CODEBOOK, ENCODE, QUANTIZE_BLOCKS, STORED_BITS, DOUBLE_QUANTIZE, TWO_BLOCKS, LLOYD_STEP)
