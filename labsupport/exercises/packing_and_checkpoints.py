"""Chapter 10: codes in 32-bit words as AutoGPTQ and AutoAWQ lay them out, and what is wrong with a file that loads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from labsupport.exercises.base import Exercise, Mutant, Verdict, generator, largest_difference, like, right, shape_fault, wrong
from labsupport.quant import packing, rtn

HALF_WORD = 2**31


def _codes(g: torch.Generator, rows: int, columns: int, bits: int = 4) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8)


def _word(pieces: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Words of pieces [..., n], the first in the lowest bits: int64 [...], signed as int32 is."""
    places = bits * torch.arange(pieces.shape[-1])
    return _signed((pieces.long() << places).sum(-1))


def _signed(words: torch.Tensor) -> torch.Tensor:
    return (words + HALF_WORD) % 2**32 - HALF_WORD


def _as_packed(pieces: torch.Tensor) -> torch.Tensor:
    """Eight codes a word: [out, in / 8, 8] to int32 [in / 8, out]."""
    return _word(pieces).t().to(torch.int32).contiguous()


def _by_whole_words(name: str, got: torch.Tensor) -> str | None:
    if not isinstance(got, torch.Tensor):
        return f"{name} is a {type(got).__name__}, wanted a tensor"
    if got.is_floating_point():
        return f"{name} is {got.dtype}, wanted torch.int32: a float32 has 24 bits for its digits, and a word has 32"
    if got.dtype == torch.int64 and (got >= HALF_WORD).any():
        return f"{name} is torch.int64 and {int(got.max())} is no int32. The same 32 bits are: .to(torch.int32) keeps them"
    if got.dtype != torch.int32:
        return f"{name} is {got.dtype}, wanted torch.int32"
    return None


def _matching(got: torch.Tensor, mistakes: dict[str, Callable], *arguments) -> str | None:
    """The message of the mistake that gives just what was got."""
    for said, mistake in mistakes.items():
        try:
            wanted = mistake(*arguments)
        except RuntimeError:  # a mistake that these shapes do not allow
            continue
        if isinstance(got, torch.Tensor) and got.shape == wanted.shape and torch.equal(got.long(), wanted.long()):
            return said
    return None


def _first_code(got: torch.Tensor, want: torch.Tensor) -> str:
    row, column = (got.long() != want.long()).nonzero()[0].tolist()
    return f"row {row}, column {column} is {int(got[row, column])}, wanted {int(want[row, column])}"


def _like(mistakes: dict[str, Callable], *sayings: str) -> tuple[Mutant, ...]:
    return tuple(Mutant(like(mistakes, said), said) for said in sayings)


# 10.1 -----------------------------------------------------------------------------------------------------------------


def nibble_inputs(seed: int) -> dict:
    """Not square, both sides multiples of 8; in the first column of words the eighth code is 8 or more: the sign bit is set."""
    codes = _codes(generator(seed), 16, 40)
    codes[:, 7] |= 8
    return {"codes": codes}


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """labsupport's packing of 4 bits."""
    return packing.pack_gptq(codes, 4)


PACK_MISTAKES = {
    "the first of eight codes is in the highest bits, wanted it in the lowest: shift code i by 4 * i": (
        lambda codes: _as_packed(codes.unflatten(1, (-1, 8)).flip(2))
    ),
    "a word holds every fifth code here, wanted eight neighbors along in_features: reshape to [..., in / 8, 8]": (
        lambda codes: _as_packed(codes.unflatten(1, (8, -1)).transpose(1, 2))
    ),
    "eight neighbors along out_features share a word. That is AWQ's axis; GPTQ packs along in_features": (
        lambda codes: _word(codes.t().unflatten(1, (-1, 8))).to(torch.int32)
    ),
    "eight rows of the weight share a word. GPTQ packs along in_features, eight columns to a word": (
        lambda codes: _word(codes.t().unflatten(1, (-1, 8))).t().to(torch.int32)
    ),
    "the words are right and lie as the weight does, [out, in / 8]. The file holds them transposed": (
        lambda codes: _word(codes.unflatten(1, (-1, 8))).to(torch.int32)
    ),
    "the highest bit of every word is lost: it belongs to the eighth code, and that it makes the int32 negative is no harm": (
        lambda codes: _as_packed(codes.unflatten(1, (-1, 8))) & HALF_WORD - 1
    ),
    "the words are built of differences from 8. Codes are stored as they are, from 0 to 15": (
        lambda codes: _as_packed(codes.unflatten(1, (-1, 8)) ^ 8)
    ),
}


def judge_pack(given: dict, got: dict, want: dict) -> Verdict:
    if fault := _by_whole_words("qweight", got["qweight"]):
        return wrong(fault)
    if torch.equal(got["qweight"], want["qweight"]):
        return right()
    if said := _matching(got["qweight"], PACK_MISTAKES, given["codes"]):
        return wrong(said)
    if fault := shape_fault(got, want):
        return wrong(fault)
    inside = packing.unpack_gptq(got["qweight"], 4)
    return wrong(f"unpacked, {_first_code(inside, given['codes'])}")


PACK_NIBBLES = Exercise(
    id="10.1", name="pack_nibbles", title="Eight codes to a word", minutes=10, difficulty=2, points=3,
    returns=("qweight",), inputs=nibble_inputs, reference=pack_nibbles, judge=judge_pack,
    mutants=(
        *_like(
            PACK_MISTAKES,
            "in the highest bits", "every fifth code", "AWQ's axis", "eight rows of the weight", "holds them transposed",
            "highest bit of every word", "differences from 8",
        ),
        Mutant(lambda codes: _word(codes.unflatten(1, (-1, 8))).t() % 2**32, "is no int32"),
        Mutant(lambda codes: _word(codes.unflatten(1, (-1, 8))).t().float(), "24 bits"),
        Mutant(lambda codes: _as_packed(codes.unflatten(1, (-1, 4))), "has shape"),
    ),
)  # fmt: skip


# 10.2 -----------------------------------------------------------------------------------------------------------------


def words_inputs(seed: int) -> dict:
    return {"qweight": packing.pack_gptq(nibble_inputs(seed)["codes"], 4)}


def unpack_nibbles(qweight: torch.Tensor) -> torch.Tensor:
    """labsupport's unpacking of 4 bits."""
    return packing.unpack_gptq(qweight, 4)


def _nibbles(qweight: torch.Tensor) -> torch.Tensor:
    """The eight codes of each word, lowest bits first: int64 [out, in / 8, 8]."""
    return qweight.t().long()[..., None] >> 4 * torch.arange(8) & 15


def _shifted_only(qweight: torch.Tensor) -> torch.Tensor:
    return (qweight.t()[..., None] >> 4 * torch.arange(8, dtype=torch.int32)).flatten(1)


def _masked_first(qweight: torch.Tensor) -> torch.Tensor:
    """The mask before the shift: the eighth code keeps the sign."""
    codes = _nibbles(qweight)
    codes[..., 7] = (codes[..., 7] ^ 8) - 8
    return codes.flatten(1)


UNPACK_MISTAKES = {
    "the eighth code of a word comes out negative: >> of an int32 copies its highest bit. Mask after the shift": _masked_first,
    "the eighth code of a word comes out as 248 to 255, negative in uint8: >> copies the sign bit. Mask after the shift": (
        lambda words: _masked_first(words).to(torch.uint8)
    ),
    "the words were shifted and not masked: every code but the last still carries its neighbors": _shifted_only,
    "the words were shifted and not masked; as uint8 every code still carries the next one in its upper half": (
        lambda words: _shifted_only(words).to(torch.uint8)
    ),
    "the highest bits came first, wanted the lowest: code i is in bits 4 * i and up": lambda words: (
        _nibbles(words).flip(2).flatten(1)
    ),
    "all first codes of the words, then all second ones: the eight of a word are neighbors. stack, not cat": (
        lambda words: _nibbles(words).transpose(1, 2).flatten(1)
    ),
    "the codes are right and lie as the words do, [in, out]. Wanted them as the weight lies, [out, in]": (
        lambda words: _nibbles(words).flatten(1).t()
    ),
    "abs() of a word is another word: a negative int32 holds its bits as two's complement": lambda words: _nibbles(
        words.abs()
    ).flatten(1),
}


def judge_unpack(given: dict, got: dict, want: dict) -> Verdict:
    codes = got["codes"]
    if said := _matching(codes, UNPACK_MISTAKES, given["qweight"]):
        return wrong(said)
    if fault := shape_fault(got, want):
        return wrong(fault)
    if torch.equal(codes.double(), want["codes"].double()):
        return right()
    return wrong(_first_code(codes, want["codes"]))


UNPACK_NIBBLES = Exercise(
    id="10.2", name="unpack_nibbles", title="And back", minutes=8, difficulty=2, points=3,
    returns=("codes",), inputs=words_inputs, reference=unpack_nibbles, judge=judge_unpack,
    mutants=(
        *_like(
            UNPACK_MISTAKES,
            "comes out negative", "248 to 255", "shifted and not masked: every", "as uint8 every", "highest bits came first",
            "all first codes", "as the words do", "two's complement",
        ),
        Mutant(lambda words: _nibbles(words)[..., :7].flatten(1), "has shape"),
        Mutant(lambda words: _nibbles(words).flatten(1).clamp(max=14), "row"),
    ),
)  # fmt: skip


# 10.3 -----------------------------------------------------------------------------------------------------------------


def three_inputs(seed: int) -> dict:
    """64 columns, 6 words for each of 8 outputs. Codes 10 and 21 of a run lie in two words: every bit of them is set somewhere."""
    codes = _codes(generator(seed), 8, 64, bits=3)
    codes[0, [10, 21]] = 7
    codes[1, [10, 21]] = torch.tensor([5, 6], dtype=torch.uint8)
    codes[2, [10, 21]] = torch.tensor([2, 1], dtype=torch.uint8)
    return {"qweight": packing.pack_gptq(codes, 3)}


def unpack_three(qweight: torch.Tensor) -> torch.Tensor:
    """labsupport's unpacking of 3 bits."""
    return packing.unpack_gptq(qweight, 3)


def _runs(qweight: torch.Tensor) -> torch.Tensor:
    """Three words a run of 32 codes, as numbers from 0 to 2**32 - 1: int64 [out, runs, 3]."""
    return (qweight.t().long() % 2**32).unflatten(1, (-1, 3))


def _three(qweight: torch.Tensor, across: Callable | None = None) -> torch.Tensor:
    """The codes, with those in two words made by across(low word, next word, first bit), if it is given."""
    runs, codes = _runs(qweight), []
    for i in range(32):
        word, bit = divmod(3 * i, 32)
        low = runs[..., word]
        if bit <= 29:
            codes.append(low >> bit & 7)
        else:
            high = runs[..., word + 1]
            codes.append((low >> bit | high << 32 - bit) & 7 if across is None else across(low, high, bit))
    return torch.stack(codes, -1).flatten(1)


def _planes(qweight: torch.Tensor) -> torch.Tensor:
    bits = _runs(qweight)[..., None] >> torch.arange(32) & 1
    return (bits << torch.arange(3)[:, None]).sum(2).flatten(1)


def _ten_a_word(qweight: torch.Tensor) -> torch.Tensor:
    return (qweight.t().long()[..., None] >> 3 * torch.arange(10) & 7).flatten(1)


THREE_MISTAKES = {
    "the codes that begin in one word and end in the next lost their upper part: bits 30 and 31 go on in the next word": (
        lambda words: _three(words, lambda low, high, bit: low >> bit)
    ),
    "in the codes that lie in two words the second part is not moved up: its bits belong above those that the first word gave": (
        lambda words: _three(words, lambda low, high, bit: (low >> bit | high) & 7)
    ),
    "the codes that lie in two words have the two parts exchanged: the first word holds the low bits": (
        lambda words: _three(words, lambda low, high, bit: (low >> bit << bit - 29 | high & 2 ** (bit - 29) - 1) & 7)
    ),
    "a code that lies in two words is wrong where the first of them is negative: >> copied its sign bit over the second part. Mask "
    "the first part, too": lambda words: _three(words, lambda low, high, bit: (_signed(low) >> bit | high << 32 - bit) & 7),
    "ten codes a word, and two bits left over: nothing is left over in this layout, 32 codes fill 3 words": _ten_a_word,
    "bit by bit: the first word taken for the lowest bits of 32 codes, and so on. A code's bits are neighbors": _planes,
    "the stream was read from its highest bit: it begins at the lowest of the first word": (
        lambda words: _three(packing.pack_gptq(packing.unpack_gptq(words, 3).flip(1), 3))
    ),
    "the codes are right and lie as the words do, [in, out]. Wanted them as the weight lies, [out, in]": lambda words: _three(
        words
    ).t(),
}


def judge_three(given: dict, got: dict, want: dict) -> Verdict:
    codes = got["codes"]
    if isinstance(codes, torch.Tensor) and codes.ndim == 2 and codes.shape[1] * 32 == want["codes"].shape[1] * 30:
        return wrong(next(said for said in THREE_MISTAKES if said.startswith("ten codes a word")))
    if said := _matching(codes, THREE_MISTAKES, given["qweight"]):
        return wrong(said)
    if fault := shape_fault(got, want):
        return wrong(fault)
    if torch.equal(codes.double(), want["codes"].double()):
        return right()
    column = int((codes.long() != want["codes"].long()).nonzero()[0, 1])
    first, last = divmod(3 * column, 32), divmod(3 * column + 2, 32)
    where = f"bits {first[1]} and up of word {first[0]}" + ("" if first[0] == last[0] else f", and word {last[0]}")
    return wrong(f"{_first_code(codes, want['codes'])}: it is stored in {where}")


UNPACK_THREE = Exercise(
    id="10.3", name="unpack_three", title="Three bits, across words", minutes=15, difficulty=4, points=4,
    returns=("codes",), inputs=three_inputs, reference=unpack_three, judge=judge_three,
    mutants=(
        *_like(
            THREE_MISTAKES,
            "lost their upper part", "not moved up", "parts exchanged", "copied its sign bit", "ten codes a word", "bit by bit",
            "from its highest bit", "as the words do",
        ),
        Mutant(lambda words: _three(words).clamp(max=6), "it is stored in"),
        Mutant(lambda words: _three(words)[:, :32], "has shape"),
    ),
)  # fmt: skip


# 10.4 -----------------------------------------------------------------------------------------------------------------


def zeros_inputs(seed: int) -> dict:
    """16 outputs, 24 groups: both fill words. Some zero-points are 0, some 15."""
    zero_point = _codes(generator(seed), 16, 24)
    zero_point[:, 0] = 8
    zero_point[3:5, 1], zero_point[9, 2] = 0, 15
    return {"zero_point": zero_point}


def _both_versions(answer: Callable, given: dict) -> dict:
    return {f"version {version}": answer(*given.values(), version) for version in packing.VERSIONS}


def pack_zeros(zero_point: torch.Tensor, version: int) -> torch.Tensor:
    """labsupport's packing of 4-bit zero-points."""
    return packing.pack_gptq_zeros(zero_point, 4, version)


def _zero_words(stored: torch.Tensor) -> torch.Tensor:
    """Whole numbers [out, groups], whatever their size, each moved to its place and or-ed: int32 [groups, out / 8]."""
    pieces = stored.long().t().unflatten(1, (-1, 8))
    words = torch.zeros(pieces.shape[:2], dtype=torch.int64)
    for i in range(8):
        words |= pieces[..., i] << 4 * i
    return _signed(words).to(torch.int32)


ZERO_MISTAKES = {
    "version 1 stores zero_point - 1, and here it stores zero_point: whoever reads it adds 1": (
        lambda z, version: _zero_words(z)
    ),
    "version 2 stores zero_point itself; the 1 is subtracted in version 1 alone": lambda z, version: _zero_words(z.long() - 1 & 15),
    "the two versions are exchanged": lambda z, version: _zero_words(z.long() - version + 1 & 15),
    "version 1 adds 1, wanted it subtracted: the reader is the one who adds": lambda z, version: _zero_words(
        z.long() + 2 - version & 15
    ),
    "a zero-point of 0 fills the rest of its word with ones: 0 - 1 is negative, and all its bits are set. Keep four of them": (
        lambda z, version: _zero_words(z.long() - 2 + version)
    ),
    "a zero-point of 0 was clamped to 0 in version 1, and is read as 1. Keep four bits of 0 - 1, which is 15": (
        lambda z, version: _zero_words((z.long() - 2 + version).clamp(min=0))
    ),
    "eight groups of an output share a word. Zero-points are packed along out_features: eight outputs of a group": (
        lambda z, version: _word((z.long() - 2 + version & 15).unflatten(1, (-1, 8))).t()
    ),
    "the words are right and lie as [out / 8, groups], wanted [groups, out / 8]": (
        lambda z, version: _zero_words(z.long() - 2 + version & 15).t()
    ),
    "the first of eight is in the highest bits, wanted it in the lowest, as with codes": lambda z, version: _word(
        (z.long() - 2 + version & 15).t().unflatten(1, (-1, 8)).flip(2)
    ),
}  # fmt: skip


def judge_zeros(given: dict, got: dict, want: dict) -> Verdict:
    for said, mistake in ZERO_MISTAKES.items():
        mistaken = {f"version {version}": mistake(given["zero_point"], version) for version in packing.VERSIONS}
        if all(
            isinstance(got[k], torch.Tensor) and got[k].shape == v.shape and torch.equal(got[k].long(), v.long())
            for k, v in mistaken.items()
        ):
            return wrong(said)
    for name, words in got.items():
        if fault := _by_whole_words(name, words):
            return wrong(fault)
    if fault := shape_fault(got, want):
        return wrong(fault)
    for version in packing.VERSIONS:
        name = f"version {version}"
        if not torch.equal(got[name], want[name]):
            read = packing.unpack_gptq_zeros(got[name], 4, version)
            return wrong(f"{name}, read back: {_first_code(read, given['zero_point'])}")
    return right()


PACK_ZEROS = Exercise(
    id="10.4", name="pack_zeros", title="The one that is subtracted", minutes=10, difficulty=3, points=3,
    returns=("qzeros",), inputs=zeros_inputs, reference=pack_zeros, judge=judge_zeros, drive=_both_versions,
    mutants=(
        *_like(
            ZERO_MISTAKES,
            "here it stores zero_point", "in version 1 alone", "are exchanged", "version 1 adds 1", "rest of its word",
            "was clamped", "eight groups of an output", "lie as [out / 8, groups]", "in the highest bits",
        ),
        Mutant(lambda z, version: _zero_words(z.long() - 2 + version & 7), "read back"),
        Mutant(lambda z, version: _zero_words(z.long() - 2 + version & 15).long() % 2**32, "is no int32"),
    ),
)  # fmt: skip


# 10.5 -----------------------------------------------------------------------------------------------------------------


def layer_inputs(seed: int) -> dict:
    """A layer as it comes out of its words: 16 outputs, 24 inputs, 3 groups of 8 scattered over the row."""
    g = generator(seed)
    stored = _codes(g, 16, 3)
    stored[0], stored[1] = 15, 0
    g_idx = torch.arange(24) // 8
    while torch.equal(g_idx, torch.arange(24) // 8):
        g_idx = g_idx[torch.randperm(24, generator=g)]
    scales = torch.randint(1, 2048, (3, 16), generator=g).half() / 1024
    return {"codes": _codes(g, 16, 24), "stored": stored, "scales": scales, "g_idx": g_idx.to(torch.int32)}


def read_layer(codes: torch.Tensor, stored: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, version: int) -> torch.Tensor:
    """labsupport's reader of a GPTQ file, given what the words held."""
    state = {
        "qweight": packing.pack_rows(codes, 4).t(), "scales": scales, "g_idx": g_idx,
        "qzeros": packing.pack_rows(stored.t().contiguous(), 4),
    }  # fmt: skip
    wide = {**state, "qweight": state["qweight"].contiguous(), "qzeros": state["qzeros"].contiguous()}
    return packing.read_gptq(wide, 4, version).dequantize()


def _layer(codes, stored, scales, groups, added: int, mask: int = 15) -> torch.Tensor:
    zero = (stored.long() + added & mask)[:, groups.long()]
    return (codes.long() - zero).float() * scales.float().t()[:, groups.long()]


def _in_order(g_idx: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(g_idx)) // (len(g_idx) // (int(g_idx.max()) + 1))


READ_MISTAKES = {
    "g_idx was not used: column j takes the scale and zero-point of group g_idx[j], and here groups are no neighbors": (
        lambda c, z, s, g, version: _layer(c, z, s, _in_order(g), 2 - version)
    ),
    "g_idx was taken for an order of columns and undone. It names the group of each column; the columns are in their places": (
        lambda c, z, s, g, version: _layer(c, z, s, _in_order(g), 2 - version)[:, g.long().argsort(stable=True).argsort()]
    ),
    "in version 1 all weights are one step too high: the stored zero-points lack 1": lambda c, z, s, g, version: _layer(
        c, z, s, g, 0
    ),
    "in version 2 all weights are one step too low: 1 was added, and nothing had been subtracted": (
        lambda c, z, s, g, version: _layer(c, z, s, g, 1)
    ),
    "the two versions are exchanged: it is version 1 that lacks 1": lambda c, z, s, g, version: _layer(c, z, s, g, version - 1),
    "in version 1 a stored 15 became 16. It stands for 0, from which 1 was subtracted: keep four bits of the sum": (
        lambda c, z, s, g, version: _layer(c, z, s, g, 2 - version, mask=31)
    ),
    "a code below its zero-point gives a large positive number: uint8 has no negative values, and 3 - 8 is 251. Convert first": (
        lambda c, z, s, g, version: (c - (z + 2 - version & 15)[:, g.long()]).float() * s.float().t()[:, g.long()]
    ),
    "the zero-point was subtracted after the multiplication: scale * (code - zero_point)": (
        lambda c, z, s, g, version: c.float() * s.float().t()[:, g.long()] - (z.long() + 2 - version & 15)[:, g.long()]
    ),
    "the zero-points were added: scale * (code - zero_point)": (
        lambda c, z, s, g, version: (c.long() + (z.long() + 2 - version & 15)[:, g.long()]).float() * s.float().t()[:, g.long()]
    ),
}


def judge_layer(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    # A product of two numbers of 11 bits and 5 bits is exact in float32; half a step in scale's last place is 2**-11 of it.
    if all(torch.equal(got[name].float(), want[name]) for name in want):
        return right()
    for said, mistake in READ_MISTAKES.items():
        mistaken = {f"version {version}": mistake(*given.values(), version) for version in packing.VERSIONS}
        if all(torch.equal(got[name].float(), mistaken[name]) for name in want):
            return wrong(said)
    name = next(name for name in want if not torch.equal(got[name].float(), want[name]))
    row, column = (got[name].float() != want[name]).nonzero()[0].tolist()
    have, wanted = got[name][row, column].item(), want[name][row, column].item()
    most = largest_difference(got[name], want[name])
    return wrong(f"{name}: weight [{row}, {column}] is {have:.6g}, wanted {wanted:.6g}; the largest difference is {most:.2g}")


READ_LAYER = Exercise(
    id="10.5", name="read_layer", title="From words to a weight", minutes=10, difficulty=3, points=3,
    returns=("weight",), inputs=layer_inputs, reference=read_layer, judge=judge_layer, drive=_both_versions,
    mutants=(
        *_like(
            READ_MISTAKES,
            "g_idx was not used", "order of columns", "one step too high", "one step too low", "exchanged", "became 16",
            "uint8 has no negative", "after the multiplication", "were added",
        ),
        Mutant(lambda c, z, s, g, version: _layer(c, z, s, g, 2 - version).t(), "has shape"),
        Mutant(lambda c, z, s, g, version: 2 * _layer(c, z, s, g, 2 - version), "the largest difference"),
    ),
)  # fmt: skip


# 10.6 -----------------------------------------------------------------------------------------------------------------


def awq_inputs(seed: int) -> dict:
    codes = _codes(generator(seed), 40, 16)
    codes[[7, 14], 0] = torch.tensor([15, 9], dtype=torch.uint8)
    return {"words": packing.pack_awq(codes)}


def _eights(words: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """The eight nibbles of each word, taken in an order: int64 [n, out]."""
    return (words.long()[..., None] >> 4 * torch.arange(8) & 15)[..., list(order)].flatten(1)


def _awq_signed(words: torch.Tensor) -> torch.Tensor:
    nibbles = words.long()[..., None] >> 4 * torch.arange(8) & 15
    nibbles[..., 7] = (nibbles[..., 7] ^ 8) - 8
    return nibbles[..., list(packing.AWQ_PLACES)].flatten(1).t()


AWQ_MISTAKES = {
    "the order was used the wrong way round: it says which output a nibble holds. Which nibble holds output i is its argsort": (
        lambda words: _eights(words, packing.AWQ_ORDER).t()
    ),
    "the nibbles were taken as they come: of every eight outputs they are 0 2 4 6 1 3 5 7": lambda words: _eights(words).t(),
    "the eight outputs of a word came out back to front: the lowest bits hold output 0": (
        lambda words: _eights(words, packing.AWQ_PLACES[::-1]).t()
    ),
    "the codes are right and lie as the words do, [in, out]. Wanted them as the weight lies, [out, in]": (
        lambda words: _eights(words, packing.AWQ_PLACES)
    ),
    "one nibble of every word comes out negative: >> of an int32 copies its highest bit. Mask after the shift": _awq_signed,
    "1 was added: AWQ stores what it means, and nothing was subtracted": (
        lambda words: _eights(words, packing.AWQ_PLACES).t() + 1 & 15
    ),
    "these are eight neighbors along in_features, which is GPTQ's axis: the eight of a word belong to eight outputs": (
        lambda words: _nibbles(words).flatten(1)
    ),
}  # fmt: skip


def judge_awq(given: dict, got: dict, want: dict) -> Verdict:
    if said := _matching(got["codes"], AWQ_MISTAKES, given["words"]):
        return wrong(said)
    if fault := shape_fault(got, want):
        return wrong(fault)
    if torch.equal(got["codes"].double(), want["codes"].double()):
        return right()
    return wrong(_first_code(got["codes"], want["codes"]))


UNPACK_AWQ = Exercise(
    id="10.6", name="unpack_awq", title="AWQ's order", minutes=10, difficulty=3, points=3,
    returns=("codes",), inputs=awq_inputs, reference=packing.unpack_awq, judge=judge_awq,
    mutants=(
        *_like(
            AWQ_MISTAKES,
            "wrong way round", "taken as they come", "back to front", "as the words do", "comes out negative", "1 was added",
            "GPTQ's axis",
        ),
        Mutant(lambda words: _eights(words, packing.AWQ_PLACES).t().clamp(max=14), "row"),
    ),
)  # fmt: skip


# 10.7 -----------------------------------------------------------------------------------------------------------------

FAULTS = ("fine", "version", "order", "groups")
SIZE, GROUPS, OUTPUTS = 16, 16, 32


def _sick(g: torch.Generator, fault: str, plain: bool = False) -> dict[str, torch.Tensor]:
    """A layer with asymmetric grids as a reader of version 1 reads it. fault: what happened to the file. plain: groups of
    neighbors, as without act-order; otherwise they are scattered.

    The groups are skewed, this way or that, as those of a real layer are now and then: so zero-points differ.
    """
    skewed = -torch.rand(OUTPUTS, GROUPS, SIZE, generator=g).clamp(min=1e-6).log() - 1
    skewed[..., 0] = 2.5  # in every group a weight of either sign, whose range then includes 0 without being stretched to
    skewed[..., 1] = -0.9
    weight = skewed * (1 - 2 * torch.randint(0, 2, (OUTPUTS, GROUPS, 1), generator=g))
    stored = rtn.quantize(weight.flatten(1), 4, SIZE)
    places = torch.arange(GROUPS * SIZE) if plain else torch.randperm(GROUPS * SIZE, generator=g)
    codes, zero_point = stored.codes[:, places], stored.zero_point.to(torch.uint8)
    g_idx = places // SIZE
    if fault == "version":  # 2, labelled 1: the reader adds 1
        zero_point = zero_point + 1 & 15
    elif fault == "order":  # written in AWQ's
        zero_point = zero_point.unflatten(0, (-1, 8))[:, list(packing.AWQ_ORDER)].flatten(0, 1)
    elif fault == "groups":  # g_idx was lost, and a plain one written in its place
        g_idx = torch.arange(GROUPS * SIZE) // SIZE
    return {"codes": codes, "zero_point": zero_point, "g_idx": g_idx.to(torch.int32)}


def sick_inputs(seed: int) -> dict:
    """Six layers, in any order: one of each kind, another, and a sound one whose g_idx is plain and right."""
    g = generator(seed)
    more = FAULTS[int(torch.randint(0, 4, (1,), generator=g))]
    kinds = [*((kind, False) for kind in (*FAULTS, more)), ("fine", True)]
    return {"layers": [_sick(g, *kinds[i]) for i in torch.randperm(6, generator=g).tolist()]}


def diagnose(codes: torch.Tensor, zero_point: torch.Tensor, g_idx: torch.Tensor) -> str:
    """From what the codes of each group say: do they reach from end to end, and do they scatter about their zero-point?"""
    columns = [(g_idx == group).nonzero().flatten() for group in range(zero_point.shape[1])]
    of_group = torch.stack([codes[:, places].float() for places in columns], 1)  # [out, groups, group_size]
    reach = of_group.amax(2) - of_group.amin(2)
    off = of_group.mean(2) - zero_point.float()
    if (reach < 14).any():  # the least weight of a group has code 0, the largest 15; rounding of both ends may take one
        return "groups"
    if off.std() > 2:
        return "order"
    return "version" if off.mean().abs() > 0.5 else "fine"


def _ask(answer: Callable, given: dict) -> dict:
    return {"verdicts": [answer(*layer.values()) for layer in given["layers"]]}


def judge_sick(given: dict, got: dict, want: dict) -> Verdict:
    verdicts, wanted = got["verdicts"], want["verdicts"]
    if not all(isinstance(verdict, str) for verdict in verdicts):
        return wrong(f"a verdict is a {type(verdicts[0]).__name__}, wanted one of the words {', '.join(FAULTS)}")
    if unknown := [verdict for verdict in verdicts if verdict not in FAULTS]:
        return wrong(f"a verdict is {unknown[0]!r}, wanted one of the words {', '.join(FAULTS)}")
    if verdicts == wanted:
        return right()
    if len(set(verdicts)) == 1:
        return wrong(f"every layer is said to be {verdicts[0]!r}: among the layers shown are all four kinds")
    hints = {
        ("fine", "version"): "Read with the wrong version, every zero-point is off by the same 1: look at the mean over all "
        "groups of (mean code - zero_point)",
        (
            "fine",
            "order",
        ): "Zero-points of other outputs are as often too high as too low: their mean does not show it, their spread does",
        ("fine", "groups"): "A grid laid from the least to the largest weight has a code near 0 and one near 15 in every group. "
        "In these groups?",
        ("order", "groups"): "Both leave codes that do not scatter about their zero-points. Only where the groups are wrong do "
        "their codes not reach from end to end",
    }
    for have, wish, layer in zip(verdicts, wanted, given["layers"], strict=True):
        plain = torch.equal(layer["g_idx"], _in_order(layer["g_idx"]))
        if (have, wish) == ("groups", "fine") and plain:
            said = "a sound layer was called 'groups': its g_idx is plain, as without act-order it is, and right"
            return wrong(f"{said}. Whether a g_idx is right, only the codes of its groups can say")
        if have == "groups" != wish:
            said = (
                f"a layer whose fault is {wish!r} was called 'groups'. The columns of a group are those with its number in g_idx, "
            )
            return wrong(f"{said}wherever they stand; and rounding of its ends may take a step from what their codes reach")
    for have, wish in zip(verdicts, wanted, strict=True):
        if have != wish:
            hint = hints.get((have, wish)) or hints.get((wish, have)) or "Which of the two changes what a group's codes reach, or "
            if hint.endswith("or "):
                hint += "moves all zero-points by the same?"
            return wrong(f"a layer whose fault is {wish!r} was called {have!r}. {hint}")
    return wrong("the verdicts differ in number")


def _by(rule: Callable[[torch.Tensor, torch.Tensor], str]) -> Callable:
    """An answer that sees (mean code - zero_point) and the reach of each group."""

    def answer(codes: torch.Tensor, zero_point: torch.Tensor, g_idx: torch.Tensor) -> str:
        grouped = codes[:, g_idx.argsort(stable=True)].float().unflatten(1, (zero_point.shape[1], -1))
        return rule(grouped.mean(2) - zero_point.float(), grouped.amax(2) - grouped.amin(2))

    return answer


def _mean_only(off: torch.Tensor, reach: torch.Tensor) -> str:
    return "groups" if (reach < 14).any() else "version" if off.mean().abs() > 0.5 else "fine"


def _spread_only(off: torch.Tensor, reach: torch.Tensor) -> str:
    return "groups" if (reach < 14).any() else "order" if off.std() > 2 else "fine"


def _without_reach(off: torch.Tensor, reach: torch.Tensor) -> str:
    return "order" if off.std() > 2 else "version" if off.mean().abs() > 0.5 else "fine"


def _all_three(off: torch.Tensor, reach: torch.Tensor) -> str:
    return "groups" if (reach < 14).any() else _without_reach(off, reach)


def _assumes_neighbors(codes: torch.Tensor, zero_point: torch.Tensor, g_idx: torch.Tensor) -> str:
    plain = torch.arange(len(g_idx)) // (len(g_idx) // zero_point.shape[1])
    return _by(_all_three)(codes, zero_point, plain)


def _believes_scattered(codes: torch.Tensor, zero_point: torch.Tensor, g_idx: torch.Tensor) -> str:
    """A plain g_idx taken for a lost one."""
    if torch.equal(g_idx, _in_order(g_idx)):
        return "groups"
    return _by(_without_reach)(codes, zero_point, g_idx)


DIAGNOSE = Exercise(
    id="10.7", name="diagnose", title="Which file is corrupt, and how?", minutes=20, difficulty=4, points=4,
    returns=("verdicts",), inputs=sick_inputs, reference=diagnose, judge=judge_sick, drive=_ask,
    mutants=(
        Mutant(_by(_mean_only), "their spread does"),
        Mutant(_by(_spread_only), "off by the same 1"),
        Mutant(_by(_without_reach), "groups"),
        Mutant(_assumes_neighbors, "wherever they stand"),
        Mutant(_believes_scattered, "only the codes of its groups can say"),
        Mutant(lambda codes, zero_point, g_idx: "fine", "every layer is said to be 'fine'"),
        Mutant(lambda codes, zero_point, g_idx: FAULTS.index(_by(_all_three)(codes, zero_point, g_idx)), "wanted one of the words"),
        Mutant(lambda codes, zero_point, g_idx: _by(_all_three)(codes, zero_point, g_idx).upper(), "wanted one of the words"),
    ),
)  # fmt: skip

EXERCISES = (PACK_NIBBLES, UNPACK_NIBBLES, UNPACK_THREE, PACK_ZEROS, READ_LAYER, UNPACK_AWQ, DIAGNOSE)
