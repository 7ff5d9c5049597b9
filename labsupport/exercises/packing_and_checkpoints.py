"""Chapter 10: codes in 32-bit words as AutoGPTQ and AutoAWQ lay them out, and what is wrong with a file that loads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from labsupport.exercises.compare import first_difference
from labsupport.exercises.form import Exercise, Fault, Mistake, Mutant, generator, mistakes_by_option, mistakes_of
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


def _found_words(check: Callable[[str, torch.Tensor], object]) -> Callable:
    return lambda given, got, want: next((found for item in got.items() if (found := check(*item))), None)


def _word_faults(as_float: Callable, unsigned: Callable) -> tuple[Fault, ...]:
    """Words in which 32 bits cannot be. as_float, unsigned: answers that return such words."""
    return (
        Fault("{name} is {dtype}, wanted torch.int32: a float32 has 24 bits for its digits, and a word has 32",
              _found_words(lambda name, words: words.is_floating_point() and {"name": name, "dtype": words.dtype}),
              (as_float,), early=True),
        Fault("{name} is torch.int64 and {largest} is no int32. The same 32 bits are: .to(torch.int32) keeps them",
              _found_words(lambda name, words: words.dtype == torch.int64 and bool((words >= HALF_WORD).any())
                           and {"name": name, "largest": int(words.max())}), (unsigned,), early=True),
    )  # fmt: skip


def _where_unpacked(unpack: Callable) -> Callable:
    """The sentence about words, by the first of their codes that is wrong."""

    def otherwise(given: dict, got: dict, want: dict) -> str:
        name = next(name for name in want if not torch.equal(got[name], want[name].long()))
        have, wanted = ({"code": unpack(words[name].to(torch.int32), name)} for words in (got, want))
        place, code, right_code = first_difference(have, wanted)
        return f"{name}: {place.removeprefix('code')} unpacks to {code}, wanted {right_code}"

    return otherwise


# 10.1 -----------------------------------------------------------------------------------------------------------------
def nibble_inputs(seed: int) -> dict:
    """Not square, both sides multiples of 8; in the first column of words the eighth code is 8 or more: the sign bit is set."""
    codes = _codes(generator(seed), 16, 40)
    codes[:, 7] |= 8
    return {"codes": codes}


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """labsupport's packing of 4 bits."""
    return packing.pack_gptq(codes, 4)


def _eight(codes: torch.Tensor) -> torch.Tensor:
    """Eight neighbors along the last axis, [..., n / 8, 8]."""
    return codes.unflatten(1, (-1, 8))


PACK_NIBBLES = Exercise(
    id="10.1", name="pack_nibbles", title="Eight codes to a word", minutes=10, difficulty=2, points=3,
    returns=("qweight",), inputs=nibble_inputs, reference=pack_nibbles, dtypes=("qweight",),
    otherwise=_where_unpacked(lambda words, name: packing.unpack_gptq(words, 4)),
    faults=_word_faults(lambda codes: _word(_eight(codes)).t().float(), lambda codes: _word(_eight(codes)).t() % 2**32),
    mistakes=(
        Mistake("the first of eight codes is in the highest bits, wanted it in the lowest: shift code i by 4 * i",
                lambda codes: _as_packed(_eight(codes).flip(2))),
        Mistake("a word holds every fifth code here, wanted eight neighbors along in_features: reshape to [..., in / 8, 8]",
                lambda codes: _as_packed(codes.unflatten(1, (8, -1)).transpose(1, 2))),
        Mistake("eight neighbors along out_features share a word. That is AWQ's axis; GPTQ packs along in_features",
                lambda codes: _word(_eight(codes.t())).to(torch.int32)),
        Mistake("eight rows of the weight share a word. GPTQ packs along in_features, eight columns to a word",
                lambda codes: _word(_eight(codes.t())).t().to(torch.int32)),
        Mistake("the words are right and lie as the weight does, [out, in / 8]. The file holds them transposed",
                lambda codes: _word(_eight(codes)).to(torch.int32)),
        Mistake("the highest bit of every word is lost: it belongs to the eighth code, and that it makes the int32 negative is no "
                "harm", lambda codes: _as_packed(_eight(codes)) & HALF_WORD - 1),
        Mistake("the words are built of differences from 8. Codes are stored as they are, from 0 to 15",
                lambda codes: _as_packed(_eight(codes) ^ 8)),
    ),
    others=(
        Mutant(lambda codes: _as_packed(_eight(codes)).long(), "qweight is torch.int64, wanted torch.int32"),
        Mutant(lambda codes: _as_packed(_eight(codes.clamp(max=14))), "unpacks to 14, wanted 15"),
    ),
)  # fmt: skip


# 10.2 -----------------------------------------------------------------------------------------------------------------
def words_inputs(seed: int) -> dict:
    return {"qweight": packing.pack_gptq(nibble_inputs(seed)["codes"], 4)}


def unpack_nibbles(qweight: torch.Tensor) -> torch.Tensor:
    """labsupport's unpacking of 4 bits."""
    return packing.unpack_gptq(qweight, 4)


def _shifted(words: torch.Tensor) -> torch.Tensor:
    """Words [...] moved down by 0, 4, ... 28 bits, int64 [..., 8]."""
    return words.long()[..., None] >> 4 * torch.arange(8)


def _nibbles(qweight: torch.Tensor) -> torch.Tensor:
    """The eight codes of each word, lowest bits first: int64 [out, in / 8, 8]."""
    return _shifted(qweight.t()) & 15


def _masked_first(codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., 8] that were masked before the shift: the eighth keeps the sign."""
    return torch.where(torch.arange(8) == 7, (codes ^ 8) - 8, codes)


def _of_nibbles(of: Callable) -> Callable:
    return lambda words: of(_nibbles(words))


LIES_AS_WORDS = "the codes are right and lie as the words do, [in, out]. Wanted them as the weight lies, [out, in]"

UNPACK_NIBBLES = Exercise(
    id="10.2", name="unpack_nibbles", title="And back", minutes=8, difficulty=2, points=3,
    returns=("codes",), inputs=words_inputs, reference=unpack_nibbles,
    mistakes=(
        *mistakes_of(_of_nibbles, {
            "the eighth code of a word comes out negative: >> of an int32 copies its highest bit. Mask after the shift":
                lambda codes: _masked_first(codes).flatten(1),
            "the eighth code of a word comes out as 248 to 255, negative in uint8: >> copies the sign bit. Mask after the shift":
                lambda codes: _masked_first(codes).flatten(1).to(torch.uint8),
            "the highest bits came first, wanted the lowest: code i is in bits 4 * i and up":
                lambda codes: codes.flip(2).flatten(1),
            "all first codes of the words, then all second ones: the eight of a word are neighbors. stack, not cat":
                lambda codes: codes.transpose(1, 2).flatten(1),
            LIES_AS_WORDS: lambda codes: codes.flatten(1).t(),
        }),
        Mistake("the words were shifted and not masked: every code but the last still carries its neighbors",
                lambda words: _shifted(words.t()).flatten(1)),
        Mistake("the words were shifted and not masked; as uint8 every code still carries the next one in its upper half",
                lambda words: _shifted(words.t()).flatten(1).to(torch.uint8)),
        Mistake("abs() of a word is another word: a negative int32 holds its bits as two's complement",
                lambda words: _nibbles(words.abs()).flatten(1)),
    ),
)  # fmt: skip


# 10.3 -----------------------------------------------------------------------------------------------------------------
def three_inputs(seed: int) -> dict:
    """64 columns, 6 words for each of 7 outputs. Codes 10 and 21 of a run lie in two words: every bit of them is set somewhere."""
    codes = _codes(generator(seed), 7, 64, bits=3)
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


def _three(qweight: torch.Tensor, across: Callable = lambda low, high, bit: (low >> bit | high << 32 - bit) & 7) -> torch.Tensor:
    """The codes, with those in two words made by across(low word, next word, first bit)."""
    runs, codes = _runs(qweight), []
    for i in range(32):
        word, bit = divmod(3 * i, 32)
        low = runs[..., word]
        codes.append(low >> bit & 7 if bit <= 29 else across(low, runs[..., word + 1], bit))
    return torch.stack(codes, -1).flatten(1)


def _about_three(given: dict, want: dict, path: str, place: tuple) -> str:
    (word, bit), last = divmod(3 * place[1], 32), (3 * place[1] + 2) // 32
    also = "" if word == last else f", and word {last}"
    return f"{path}{list(place)}, stored in bits {bit} and up of word {word}{also}"


UNPACK_THREE = Exercise(
    id="10.3", name="unpack_three", title="Three bits, across words", minutes=15, difficulty=4, points=4,
    returns=("codes",), inputs=three_inputs, reference=unpack_three, about=_about_three,
    mistakes=mistakes_by_option(_three, {
        "the codes that begin in one word and end in the next lost their upper part: bits 30 and 31 go on in the next word": {
            "across": lambda low, high, bit: low >> bit},
        "in the codes that lie in two words the second part is not moved up: its bits belong above those that the first word "
        "gave": {"across": lambda low, high, bit: (low >> bit | high) & 7},
        "the codes that lie in two words have the two parts exchanged: the first word holds the low bits": {
            "across": lambda low, high, bit: (low >> bit << bit - 29 | high & 2 ** (bit - 29) - 1) & 7},
        "a code that lies in two words is wrong where the first of them is negative: >> copied its sign bit over the second "
        "part. Mask the first part, too": {
            "across": lambda low, high, bit: (_signed(low) >> bit | high << 32 - bit) & 7},
        "ten codes a word, and two bits left over: nothing is left over in this layout, 32 codes fill 3 words":
            lambda words: (words.t().long()[..., None] >> 3 * torch.arange(10) & 7).flatten(1),
        "bit by bit: the first word taken for the lowest bits of 32 codes, and so on. A code's bits are neighbors":
            lambda words: ((_runs(words)[..., None] >> torch.arange(32) & 1) << torch.arange(3)[:, None]).sum(2).flatten(1),
        "the stream was read from its highest bit: it begins at the lowest of the first word":
            lambda words: _three(packing.pack_gptq(packing.unpack_gptq(words, 3).flip(1), 3)),
        LIES_AS_WORDS: lambda words: _three(words).t(),
    }),
    others=(
        Mutant(lambda words: _three(words).clamp(max=6), "stored in bits"),
        Mutant(lambda words: _three(words) * (torch.arange(64) < 10), "of word 0, and word 1"),
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
    return {f"version {version}": answer(*given.values(), version) for version in (1, 2)}


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


def _kept(z: torch.Tensor, version: int) -> torch.Tensor:
    """What is stored, cut to four bits."""
    return z.long() - 2 + version & 15


PACK_ZEROS = Exercise(
    id="10.4", name="pack_zeros", title="The one that is subtracted", minutes=10, difficulty=3, points=3,
    returns=("qzeros",), inputs=zeros_inputs, reference=pack_zeros, drive=_both_versions, dtypes=("version 1", "version 2"),
    otherwise=_where_unpacked(lambda words, name: packing.unpack_gptq_zeros(words, 4, int(name[-1]))),
    faults=_word_faults(lambda z, v: _zero_words(_kept(z, v)).float(), lambda z, v: _zero_words(_kept(z, v)).long() % 2**32),
    mistakes=(
        *mistakes_of(lambda stored: lambda z, version: _zero_words(stored(z.long(), version)), {
            "version 1 stores zero_point - 1, and here it stores zero_point: whoever reads it adds 1": lambda z, version: z,
            "version 2 stores zero_point itself; the 1 is subtracted in version 1 alone": lambda z, version: z - 1 & 15,
            "the two versions are exchanged": lambda z, version: z + 1 - version & 15,
            "version 1 adds 1, wanted it subtracted: the reader is the one who adds": lambda z, version: z + 2 - version & 15,
            "a zero-point of 0 fills the rest of its word with ones: 0 - 1 is negative, and all its bits are set. Keep four of "
            "them": lambda z, version: z - 2 + version,
            "a zero-point of 0 was clamped to 0 in version 1, and is read as 1. Keep four bits of 0 - 1, which is 15":
                lambda z, version: (z - 2 + version).clamp(min=0),
        }),
        Mistake("eight groups of an output share a word. Zero-points are packed along out_features: eight outputs of a group",
                lambda z, version: _word(_eight(_kept(z, version))).t()),
        Mistake("the words are right and lie as [out / 8, groups], wanted [groups, out / 8]",
                lambda z, version: _zero_words(_kept(z, version)).t()),
        Mistake("the first of eight is in the highest bits, wanted it in the lowest, as with codes",
                lambda z, version: _word(_eight(_kept(z, version).t()).flip(2))),
    ),
    others=(Mutant(lambda z, version: _zero_words(_kept(z, version) & 7), "unpacks to"),),
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
    words, zeros = packing.pack_rows(codes, 4).t().contiguous(), packing.pack_rows(stored.t().contiguous(), 4)
    state = {"qweight": words, "qzeros": zeros, "scales": scales, "g_idx": g_idx}
    return packing.read_gptq(state, 4, version).dequantize()


def _layer(
    codes, stored, scales, g_idx, version, groups_of=torch.Tensor.long, added=lambda version: 2 - version, mask=15,
    rule=lambda code, zero, scale: (code - zero) * scale,
):  # fmt: skip
    groups = groups_of(g_idx)
    return rule(codes.long(), (stored.long() + added(version) & mask)[:, groups], scales.float().t()[:, groups])


def _in_order(g_idx: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(g_idx)) // (len(g_idx) // (int(g_idx.max()) + 1))


READ_LAYER = Exercise(
    id="10.5", name="read_layer", title="From words to a weight", minutes=10, difficulty=3, points=3,
    returns=("weight",), inputs=layer_inputs, reference=read_layer, drive=_both_versions,
    # Exact: a product of two numbers of 11 bits and 5 bits fits a float32.
    mistakes=mistakes_by_option(_layer, {
        "g_idx was not used: column j takes the scale and zero-point of group g_idx[j], and here groups are no neighbors": {
            "groups_of": _in_order},
        "g_idx was taken for an order of columns and undone. It names the group of each column; the columns are in their places":
            lambda c, z, s, g, v: _layer(c, z, s, g, v, groups_of=_in_order)[:, g.long().argsort(stable=True).argsort()],
        "in version 1 all weights are one step too high: the stored zero-points lack 1": {"added": lambda version: 0},
        "in version 2 all weights are one step too low: 1 was added, and nothing had been subtracted": {"added": lambda version: 1},
        "the two versions are exchanged: it is version 1 that lacks 1": {"added": lambda version: version - 1},
        "in version 1 a stored 15 became 16. It stands for 0, from which 1 was subtracted: keep four bits of the sum": {"mask": 31},
        "a code below its zero-point gives a large positive number: uint8 has no negative values, and 3 - 8 is 251. Convert "
        "first": {"rule": lambda code, zero, scale: (code - zero) % 256 * scale},
        "the zero-point was subtracted after the multiplication: scale * (code - zero_point)": {
            "rule": lambda code, zero, scale: code * scale - zero},
        "the zero-points were added: scale * (code - zero_point)": {"rule": lambda code, zero, scale: (code + zero) * scale},
    }),
)  # fmt: skip


# 10.6 -----------------------------------------------------------------------------------------------------------------
def awq_inputs(seed: int) -> dict:
    codes = _codes(generator(seed), 40, 16)
    codes[[7, 14], 0] = torch.tensor([15, 9], dtype=torch.uint8)
    return {"words": packing.pack_awq(codes)}


def _eights(words, order=packing.AWQ_PLACES, of=lambda nibbles: nibbles) -> torch.Tensor:
    """What `of` makes of the eight nibbles of each word [n, words, 8], in an order and as a weight lies: int64 [out, n]."""
    return of(_shifted(words) & 15)[..., list(order)].flatten(1).t()


UNPACK_AWQ = Exercise(
    id="10.6", name="unpack_awq", title="AWQ's order", minutes=10, difficulty=3, points=3,
    returns=("codes",), inputs=awq_inputs, reference=packing.unpack_awq,
    mistakes=mistakes_by_option(_eights, {
        "the order was used the wrong way round: it says which output a nibble holds. Which nibble holds output i is its argsort": {
            "order": packing.AWQ_ORDER},
        "the nibbles were taken as they come: of every eight outputs they are 0 2 4 6 1 3 5 7": {"order": range(8)},
        "the eight outputs of a word came out back to front: the lowest bits hold output 0": {"order": packing.AWQ_PLACES[::-1]},
        LIES_AS_WORDS: lambda words: _eights(words).t(),
        "one nibble of every word comes out negative: >> of an int32 copies its highest bit. Mask after the shift": {
            "of": _masked_first},
        "1 was added: AWQ stores what it means, and nothing was subtracted": {"of": lambda nibbles: nibbles + 1 & 15},
        "these are eight neighbors along in_features, which is GPTQ's axis: the eight of a word belong to eight outputs":
            lambda words: _nibbles(words).flatten(1),
    }),
)  # fmt: skip


# 10.7 -----------------------------------------------------------------------------------------------------------------
FAULTS = ("fine", "version", "order", "groups")
SIZE, GROUPS, OUTPUTS = 16, 24, 32


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


HINTS = {
    frozenset({"fine", "version"}): "Read with the wrong version, every zero-point is off by the same 1: look at the mean over all "
                                    "groups of (mean code - zero_point)",
    frozenset({"fine", "order"}): "Zero-points of other outputs are as often too high as too low: their mean does not show it, "
                                  "their spread does",
    frozenset({"fine", "groups"}): "A grid laid from the least to the largest weight has a code near 0 and one near 15 in every "
                                   "group. In these groups?",
    frozenset({"order", "groups"}): "Both leave codes that do not scatter about their zero-points. Only where the groups are wrong "
                                    "do their codes not reach from end to end",
    frozenset({"version", "order"}): "Which of the two moves all zero-points by the same?",
    frozenset({"version", "groups"}): "Which of the two changes what a group's codes reach?",
}  # fmt: skip


def _where_sick(given: dict, got: dict, want: dict) -> str:
    pairs = list(zip(got["verdicts"], want["verdicts"], given["layers"], strict=True))
    for verdict, fault, layer in pairs:
        if (verdict, fault) == ("groups", "fine") and torch.equal(layer["g_idx"], _in_order(layer["g_idx"])):
            return ("a sound layer was called 'groups': its g_idx is plain, as without act-order it is, and right. Whether a g_idx "
                    "is right, only the codes of its groups can say")  # fmt: skip
        if verdict == "groups" != fault:
            return (f"a layer whose fault is {fault!r} was called 'groups'. The columns of a group are those with its number in "
                    "g_idx, wherever they stand; and rounding of its ends may take a step from what their codes reach")  # fmt: skip
    verdict, fault = next((verdict, fault) for verdict, fault, _ in pairs if verdict != fault)
    return f"a layer whose fault is {fault!r} was called {verdict!r}. {HINTS[frozenset({verdict, fault})]}"


def _guessed(codes, zero_point, g_idx, reach=True, spread=True, mean=True, neighbors=False):
    """The diagnosis with what can be left out as options. neighbors: a group's columns are taken to stand side by side."""
    columns = torch.arange(len(g_idx)) if neighbors else g_idx.argsort(stable=True)
    grouped = codes[:, columns].float().unflatten(1, (zero_point.shape[1], -1))
    off = grouped.mean(2) - zero_point.float()
    if reach and (grouped.amax(2) - grouped.amin(2) < 14).any():
        return "groups"
    if spread and off.std() > 2:
        return "order"
    return "version" if mean and off.mean().abs() > 0.5 else "fine"


def _confused(fault: str, other: str) -> Callable:
    return lambda *layer: other if (found := _guessed(*layer)) == fault else found


DIAGNOSE = Exercise(
    id="10.7", name="diagnose", title="Which file is corrupt, and how?", minutes=20, difficulty=4, points=4,
    returns=("verdicts",), inputs=sick_inputs, reference=diagnose, otherwise=_where_sick,
    drive=lambda answer, given: {"verdicts": [answer(*layer.values()) for layer in given["layers"]]},
    faults=(
        Fault(f"a verdict is {{word!r}}, wanted one of the words {', '.join(FAULTS)}",
              lambda given, got, want: next(({"word": w} for w in got["verdicts"] if w not in FAULTS), None),
              (lambda *layer: _guessed(*layer).upper(),)),
        Fault("every layer is said to be {word!r}: among the layers shown are all four kinds",
              lambda given, got, want: {"word": got["verdicts"][0]} if len(set(got["verdicts"])) == 1 else None,
              (lambda *layer: "fine", lambda *layer: "groups")),
    ),
    others=(
        Mutant(partial(_guessed, spread=False), "their spread does"), Mutant(partial(_guessed, mean=False), "off by the same 1"),
        Mutant(partial(_guessed, reach=False), "groups"), Mutant(partial(_guessed, neighbors=True), "wherever they stand"),
        Mutant(lambda c, z, g: "groups" if torch.equal(g, _in_order(g)) else _guessed(c, z, g, reach=False),
               "only the codes of its groups can say"),
        Mutant(_confused("groups", "order"), "from end to end"), Mutant(_confused("groups", "fine"), "In these groups?"),
        Mutant(_confused("order", "version"), "moves all zero-points by the same?"),
        Mutant(_confused("groups", "version"), "changes what a group's codes reach?"),
    ),
)  # fmt: skip

EXERCISES = (PACK_NIBBLES, UNPACK_NIBBLES, UNPACK_THREE, PACK_ZEROS, READ_LAYER, UNPACK_AWQ, DIAGNOSE)
