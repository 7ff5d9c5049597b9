"""Chapter 15, export: a block of GGUF to the byte, and a proof that a file holds what was meant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from labsupport.exercises.form import Exercise, Fault, Mutant, generator, mistakes_by_option
from labsupport.quant import gguf_blocks

BLOCK, BYTES = 32, 18


# 15.3 -----------------------------------------------------------------------------------------------------------------
def block_inputs(seed: int) -> dict:
    """Blocks whose largest magnitude is of either sign; 3 has ties, 4 a code that d rounded to float16 would change, 5 is of zeros.

    Apart from the ties, no weight lies near the middle between two levels: dividing and multiplying by 1 / d give the same codes.
    """
    g = generator(seed)
    weight = torch.randn(7, BLOCK, generator=g) * torch.logspace(-2, 1, 7)[:, None]
    places = torch.randint(0, BLOCK, (7,), generator=g)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0])[torch.randperm(7, generator=g)]
    weight[torch.arange(7), places] = signs * weight.abs().amax(1) * 1.3
    step = weight[torch.arange(7), places][:, None] / -8
    steps = weight / step
    near = (steps - steps.floor() - 0.5).abs() < 1e-3
    weight = torch.where(near, (steps + 0.01) * step, weight)
    halves = torch.arange(-8, 8)[torch.randperm(16, generator=g)] + 0.5
    ties = torch.cat([torch.tensor([-8.0]), halves, torch.arange(-7.0, 8.0)])[torch.randperm(BLOCK, generator=g)]
    weight[3], weight[5] = 2.0**-4 * ties, 0.0
    weight[4, :2] = 2.0**-4 * (1 + 0.9 * 2.0**-11) * torch.tensor([-8.0, 6.498])  # as float16, d is 2**-4
    weight[4, 2:].clamp_(-0.4, 0.4)
    return {"weight": weight}


def write_blocks(weight: torch.Tensor) -> torch.Tensor:
    """labsupport's blocks of Q4_0, whose bytes are those of gguf."""
    return gguf_blocks.quantize_q4_0(weight).blocks


def _drive_blocks(answer: Callable, given: dict) -> dict:
    """The bytes; where d is -0.0, those of 0.0: a block of zeros may have either."""
    blocks = answer(given["weight"])
    if isinstance(blocks, torch.Tensor) and blocks.dtype == torch.uint8 and blocks.ndim == 2 and blocks.shape[1] == BYTES:
        minus_zero = (blocks[:, 0] == 0) & (blocks[:, 1] == 128)
        blocks = torch.where(minus_zero[:, None] & (torch.arange(BYTES) == 1), 0, blocks)
    return {"blocks": blocks}


def _largest(weight: torch.Tensor) -> torch.Tensor:
    return weight.gather(1, weight.abs().argmax(1, keepdim=True))


def _halves_together(codes: torch.Tensor) -> torch.Tensor:
    return codes[:, :16] | codes[:, 16:] << 4


def _half_bytes(step: torch.Tensor) -> torch.Tensor:
    return step.half().view(torch.uint8)


def _rounded(steps: torch.Tensor) -> torch.Tensor:
    return (steps + 8.5).floor().clamp(0, 15)


def _written(
    weight, step=lambda weight: _largest(weight) / -8, stored=lambda step: step, code=_rounded,
    together=_halves_together, layout=lambda step, codes: torch.cat([_half_bytes(step), codes], 1),
):  # fmt: skip
    """A right answer with what can go wrong as options."""
    d = step(weight)
    steps = weight / torch.where(stored(d) == 0, 1, stored(d))
    return layout(d, together(code(steps).to(torch.uint8)))


def _where_in_block(given: dict, got: dict, want: dict) -> str:
    have, wanted = (gguf_blocks.GGUFTensor(part["blocks"].to(torch.uint8), "q4_0") for part in (got, want))
    block = int((have.blocks != wanted.blocks).any(1).nonzero()[0])
    scale, right_scale = (tensor.halves[block].item() for tensor in (have, wanted))
    if scale != right_scale:
        return f"block {block}: its first two bytes are {scale:.6g} as float16, wanted d = {right_scale:.6g}"
    place = int((have.blocks[block] != wanted.blocks[block]).nonzero()[0]) - 2
    byte, right_byte = (int(tensor.blocks[block, place + 2]) for tensor in (have, wanted))
    return (
        f"block {block}, byte {place} of its codes: low half {byte & 15} and high half {byte >> 4}, "
        f"wanted {right_byte & 15} (weight {place}) and {right_byte >> 4} (weight {place + 16})"
    )


WRITE_BLOCKS = Exercise(
    id="15.3", name="write_blocks", title="A block of GGUF, to the byte", minutes=15, difficulty=3, points=4,
    returns=("blocks",), inputs=block_inputs, reference=write_blocks, drive=_drive_blocks, dtypes=("blocks",),
    otherwise=_where_in_block, hint="A block is 2 bytes of d and 16 bytes of codes",
    mistakes=mistakes_by_option(_written, {
        "d is positive in every block. It is the value of largest magnitude, with its sign, over -8: where that value is positive, "
        "d is negative": {"step": lambda weight: weight.abs().amax(1, keepdim=True) / 8},
        "d has the wrong sign: largest over -8, so that the largest weight gets code 0, which stands for -8 steps": {
            "step": lambda weight: _largest(weight) / 8},
        "d is the largest weight over -7. Q4_0 uses all 16 codes: the largest is -8 steps from 0": {
            "step": lambda weight: _largest(weight) / -7},
        "d comes from the largest weight, not from the one of largest magnitude": {
            "step": lambda weight: weight.amax(1, keepdim=True) / -8},
        "weights that lie half-way between two levels went to the even code. ggml adds 8.5 and cuts: they go up": {
            "code": lambda steps: (steps.round() + 8).clamp(0, 15)},
        "a weight beyond the last level wrapped round: + 8.5 can reach 16, whose low four bits are 0. Clamp to 15": {
            "code": lambda steps: (steps + 8.5).floor() % 16},
        "the codes are cut without + 0.5: every weight goes down to the level below": {
            "code": lambda steps: (steps + 8).floor().clamp(0, 15)},
        "the codes were chosen by d as float16 stores it. ggml chooses them by d in float32 and rounds d afterwards": {
            "stored": lambda step: step.half().float()},
        "the halves of each byte are exchanged: weight i stands in the low half, weight i + 16 in the high half": {
            "together": lambda codes: codes[:, 16:] | codes[:, :16] << 4},
        "a byte holds two neighbors here. In Q4_0 byte i holds weight i and weight i + 16": {
            "together": lambda codes: codes[:, ::2] | codes[:, 1::2] << 4},
        "the codes stand before d. A block begins with d": {
            "layout": lambda step, codes: torch.cat([codes, _half_bytes(step)], 1)},
        "the two bytes of d are exchanged: the file is little-endian, as this machine is": {
            "layout": lambda step, codes: torch.cat([_half_bytes(step).flip(1), codes], 1)},
        "codes are signed, from -8 to 7 in four bits. Q4_0 stores code + 8, from 0 to 15": {
            "code": lambda steps: _rounded(steps).long() ^ 8},
    }),
    others=(
        Mutant(lambda weight: _written(weight).int(), "blocks is torch.int32, wanted torch.uint8"),
        Mutant(lambda weight: _written(weight, layout=lambda step, codes: codes), "2 bytes of d and 16 bytes of codes"),
        Mutant(lambda weight: _written(weight, code=lambda steps: _rounded(steps).clamp(min=1)), "low half"),
        Mutant(lambda weight: _written(weight, step=lambda weight: _largest(weight) / -8.01), "as float16, wanted d"),
    ),
)  # fmt: skip


# 15.4 -----------------------------------------------------------------------------------------------------------------
WORDS = ("faithful", "missing", "not finite", "rows", "different")
NONE = "no verdict"
HALF = 2.0**-11  # float16 has 11 significant bits: rounding to the nearest moves a number by at most this part of it
GROUP = 8
KINDS = {  # what becomes of a tensor on the way into the file and back: the word for it, and what it is
    "exact": ("faithful", "its scales are float16 numbers, and it came back exactly"),
    "near": ("faithful", "it came back with scales rounded to float16, which is what the file stores"),
    "half": ("faithful", "it came back with scales rounded to float16, which is what the file stores"),
    "tie": ("faithful", "its scales lie half-way between two float16 numbers: as far off as rounding can be"),
    "lost": ("missing", "the file does not hold it"),
    "infinite": ("not finite", "one of its scales is beyond float16's largest number, and came back as infinity"),
    "nan": ("not finite", "the scale of a group of zeros was found by 0 / 0, and the group came back as NaN"),
    "rows": ("rows", "every row is there, in another order, as in the queries and keys of a GGUF file"),
    "twice": ("different", "one row is there twice, and another one not at all"),
    "coarse": ("different", "its scales were rounded to bfloat16, which has 8 significant bits; float16 has 11"),
    "small": ("different", "a group of small weights came back with a zero-point that is off by 1, beside a row of large ones"),
    "nibble": ("different", "one code of one weight is off by one step, all others are right"),
    "zero": ("different", "one group was read with a zero-point that is off by 1"),
    "columns": ("different", "its columns came back in another order: every row holds the same numbers, each at another input"),
    "transposed": ("different", "it came back transposed"),
}


def _halves(g: torch.Generator, shape: tuple[int, int], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """codes - zero_point and scales of a tensor, in groups of GROUP: [out, in], and [out, in / GROUP] in float32."""
    steps = torch.randint(-8, 8, shape, generator=g).float()
    scale = torch.rand(shape[0], shape[1] // GROUP, generator=g) * 0.09 + 0.01
    return steps, scale.half().float() if kind in ("exact", "nibble", "columns", "zero") else scale


def _file(g: torch.Generator, kind: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A tensor as it was meant, and as it is read back."""
    steps, scale = _halves(g, shape, kind)
    row, group = (int(torch.randint(0, size, (1,), generator=g)) for size in scale.shape)
    first = GROUP * group
    if kind == "tie":
        odd = torch.randint(0, 2, scale.shape, generator=g)  # rounded down to the even neighbor, or up
        scale = 2.0**-6 * (1 + (1 + 2 * odd) * HALF)
    if kind == "near":
        scale = 2.0**-6 * (1 + 0.4 * HALF * torch.rand(scale.shape, generator=g))
    if kind == "coarse":  # a little more than float16 could be off
        scale = 2.0**-6 * (1 + HALF * (1.2 + 0.7 * torch.rand(scale.shape, generator=g)))
    if kind == "small":  # one step of the small group is less than 2**-11 of the largest weight
        scale[row], scale[row - 1, group] = 0.5, 2.0**-11
    if kind == "infinite":
        scale[row, group] = 7e4
        steps[steps == 0] = 1.0  # 0 times infinity would be NaN
    if kind == "nan":
        steps[row, first : first + GROUP] = 0
    stored = scale.bfloat16().float() if kind == "coarse" else scale.half().float()
    if kind == "nan":
        stored[row, group] = torch.nan
    meant, back = (steps * part.repeat_interleave(GROUP, 1) for part in (scale, stored))
    if kind == "rows":  # of two halves of the rows, one after the other, as RoPE pairs them in llama.cpp
        back = back.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
    if kind == "twice":
        back[row] = back[row - 1]
    if kind == "nibble":
        back[row, first] += stored[row, group]
    if kind == "small":
        back[row - 1, first : first + GROUP] += stored[row - 1, group]
    if kind == "zero":
        back[row, first : first + GROUP] += stored[row, group]
    if kind == "columns":
        back = back[:, torch.arange(shape[1]).roll(1)]
    return meant, None if kind == "lost" else back.t() if kind == "transposed" else back


def prove_inputs(seed: int) -> dict:
    """A tensor of each kind, of different sizes and in any order, and a norm, which has one axis and came back exactly.

    They are large enough that one wrong code of one weight does not move the mean by 2**-11.
    """
    g = generator(seed)
    order = [list(KINDS)[i] for i in torch.randperm(len(KINDS), generator=g).tolist()]
    meant, read, kinds = {"norm": torch.randn(24, generator=g)}, {}, {"norm": "exact"}
    for number, kind in enumerate(order):
        name = f"linear {number}"
        meant[name], back = _file(g, kind, (40 + 2 * number, GROUP * (4 + number % 4)))
        kinds[name] = kind
        if back is not None:
            read[name] = back
    read["norm"] = meant["norm"].clone()
    return {"meant": meant, "read": read, "kinds": kinds}


def prove(meant: dict[str, torch.Tensor], read: dict[str, torch.Tensor]) -> dict[str, str]:
    """A verdict on each tensor that was meant, from entry by entry within the rounding of float16 scales."""
    verdicts = {}
    for name, right in meant.items():
        back = read.get(name)
        if back is None:
            verdicts[name] = "missing"
        elif back.shape != right.shape:
            verdicts[name] = "different"
        elif not back.isfinite().all():
            verdicts[name] = "not finite"
        elif ((back - right).abs() <= HALF * right.abs()).all():
            verdicts[name] = "faithful"
        else:
            # Row of the file, row that was meant; one of the file at a time, or it takes a product of three sizes.
            near = torch.stack([((row - right).abs() <= HALF * right.abs()).all(-1) for row in back])
            verdicts[name] = "rows" if near.any(0).all() else "different"
    return verdicts


def _within(back: torch.Tensor, right: torch.Tensor, limit: float = HALF) -> torch.Tensor:
    return (back - right).abs() <= limit * right.abs()


def _in_another_order(back: torch.Tensor, right: torch.Tensor, limit: float = HALF) -> bool:
    return bool(_within(back[:, None], right, limit).all(2).any(0).all())


def _proved(
    meant, read, names=lambda meant, read: list(meant), same=lambda back, right: bool(_within(back, right).all()),
    finite=lambda back: bool(back.isfinite().all()), rows=_in_another_order, fits=lambda back, right: back.shape == right.shape,
    first_same=False,
):  # fmt: skip
    """A right answer with what can go wrong as options."""
    verdicts = {}
    for name in names(meant, read):
        back, right = read.get(name), meant[name]
        if back is None:
            verdicts[name] = "missing"
        elif not fits(back, right):
            verdicts[name] = "different"
        elif first_same and same(back, right):
            verdicts[name] = "faithful"
        elif not finite(back):
            verdicts[name] = "not finite"
        elif same(back, right):
            verdicts[name] = "faithful"
        else:
            verdicts[name] = "rows" if rows(back, right) else "different"
    return verdicts


def _drive_prove(answer: Callable, given: dict) -> dict:
    """The verdicts; names that have none are there with the word NONE."""
    verdicts = answer(given["meant"], given["read"])
    return {"verdicts": {**dict.fromkeys(given["meant"], NONE), **verdicts} if isinstance(verdicts, dict) else verdicts}


def _where_proved(given: dict, got: dict, want: dict) -> str:
    name = next(name for name, word in want["verdicts"].items() if got["verdicts"][name] != word)
    word, what = KINDS[given["kinds"][name]]
    return f"{name} was called {got['verdicts'][name]!r}, wanted {word!r}: {what}"


def _strange_word(given: dict, got: dict, want: dict) -> dict | None:
    return next(({"name": n, "word": w} for n, w in got["verdicts"].items() if w not in WORDS), None)


def _of_the_largest(back: torch.Tensor, right: torch.Tensor) -> bool:
    return bool(((back - right).abs() <= HALF * right.abs().max()).all())


PROVE = Exercise(
    id="15.4", name="prove", title="Export, and prove it", minutes=20, difficulty=4, points=4,
    returns=("verdicts",), inputs=prove_inputs, reference=prove, drive=_drive_prove, otherwise=_where_proved,
    faults=(
        Fault("{name} has no verdict. What the file lacks is missing: go through the names that were meant, not those found",
              lambda given, got, want: next(({"name": n} for n, w in got["verdicts"].items() if w == NONE), None),
              (partial(_proved, names=lambda meant, read: list(read)),)),
        Fault("{name} has the verdict {word!r}, wanted one of " + ", ".join(WORDS), _strange_word,
              (lambda meant, read: {name: word.upper() for name, word in _proved(meant, read).items()},)),
    ),
    mistakes=mistakes_by_option(_proved, {
        "a group of NaN was called 'faithful': every comparison with NaN is false, also `difference > limit`. Ask for `<=` of all, "
        "or look at isfinite() first": {
            "first_same": True, "same": lambda back, right: not bool(((back - right).abs() > HALF * right.abs()).any())},
        "tensors were called faithful only where they are equal. The file stores scales as float16, and so a weight may be off by "
        "2**-11 of itself": {"same": lambda back, right: torch.equal(back, right)},
        "the mean difference was held against the limit: one wrong code among many does not move a mean. Each entry must pass": {
            "same": lambda back, right: bool((back - right).abs().mean() <= HALF * right.abs().mean())},
        "the limit was taken of the largest weight of a tensor, and small weights were allowed as much: it is 2**-11 of each": {
            "same": _of_the_largest},
        "the limit is twice what float16 needs: its 11 significant bits put neighbors 2**-10 apart, and rounding errs by half of "
        "that": {"same": lambda back, right: bool(_within(back, right, 2**-10).all())},
        "the limit is half of what float16 needs: 11 significant bits, rounded to the nearest, err by 2**-11 of a number at most": {
            "same": lambda back, right: bool(_within(back, right, 2**-12).all())},
        "sorted rows are compared, so that columns in another order pass as well. A row that has moved is equal entry by entry": {
            "rows": lambda back, right: bool(_within(back.sort(1)[0].sort(0)[0], right.sort(1)[0].sort(0)[0]).all())},
        "each row of the file was looked for among those meant, but not the other way round: one row twice, and another lost": {
            "rows": lambda back, right: bool(_within(back[:, None], right).all(2).any(1).all())},
        "rows in another order were called 'different'": {"rows": lambda back, right: False},
    }),
    others=(
        Mutant(partial(_proved, same=lambda back, right: bool(torch.allclose(back, right))), "only where they are equal"),
        Mutant(partial(_proved, same=lambda back, right: bool(torch.allclose(back, right, atol=1e-2))), "wanted 'different'"),
        Mutant(lambda meant, read: dict.fromkeys(meant, "faithful"), "was called 'faithful'"),
        Mutant(partial(_proved, finite=lambda back: not bool(back.isnan().any())), "wanted 'not finite': one of its scales"),
    ),
)  # fmt: skip

EXERCISES = (WRITE_BLOCKS, PROVE)
