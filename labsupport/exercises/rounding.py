"""Chapter 2: grids, codes, errors, clipping."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch

from labsupport.exercises.compare import shown
from labsupport.exercises.form import FLOAT32, Exercise, Fault, Mistake, Mutant, generator, mistakes_by_option, right
from labsupport.quant import grid


def _or_one(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _max(weight: torch.Tensor) -> torch.Tensor:
    return weight.amax(1, keepdim=True)


def _absmax(weight: torch.Tensor) -> torch.Tensor:
    return _max(weight.abs())


# 2.1 ------------------------------------------------------------------------------------------------------------------
def symmetric_inputs(seed: int) -> dict:
    """Rows: one whose largest magnitude is positive, one where it is negative, one all negative, one of zeros."""
    g = generator(seed)
    mixed, leaning = torch.randn(2, 9, generator=g)
    mixed[0] = mixed.abs().max() + 0.1
    leaning[3] = -leaning.abs().max() - 0.5
    negative = -0.2 - torch.rand(9, generator=g)
    return {"weight": torch.stack([mixed, leaning, negative, torch.zeros(9)]), "bits": 3 + 2 * (seed % 2)}


def _zero_row(given: dict, got: dict, want: dict) -> dict | None:
    if got["scale"].shape != want["scale"].shape:
        return None
    scale = got["scale"][~given["weight"].any(1)].item()
    return None if 0 < scale < torch.inf else {"scale": scale}


ZERO_ROW = "an all-zero row: its scale is {scale:g}, and codes divide by it. What should a row without range use?"


def _within(relative: float):
    """Limits of scales. Any positive scale serves a row of zeros."""
    return lambda given, want: (relative * want["scale"]).masked_fill(~given["weight"].any(1, keepdim=True), torch.inf)


def _symmetric(weight, bits, *, reach=_absmax, steps=lambda bits: 2**bits - 1):
    """A right answer, with what can go wrong as options: how far a row's grid reaches on either side, and in how many steps."""
    return _or_one(2 * reach(weight) / steps(bits))


SYMMETRIC_SCALE = Exercise(
    id="2.1", name="symmetric_scale", title="A symmetric grid", minutes=8, difficulty=1, points=2,
    returns=("scale",), inputs=symmetric_inputs, reference=grid.symmetric_scale,
    allowed=_within(FLOAT32), close=_within(1e-5),  # mistakes lie percents apart
    hint="One scale a row: keepdim=True keeps the second axis",
    faults=(
        Fault("there is one scale for each column. A row is one output's weights: reduce along dim 1, keepdim=True",
              lambda given, got, want: got["scale"].shape in ((1, 9), (9,)),
              tuple(partial(_symmetric, reach=lambda w, keep=keep: w.abs().amax(0, keep)) for keep in (True, False)), early=True),
        Fault(ZERO_ROW, _zero_row, (lambda w, b: 2 * _absmax(w) / (2**b - 1),), early=True),
        Fault("in a row whose largest magnitude is negative, the scale follows the largest value, not the largest magnitude. max() "
              "for abs().max()?",
              lambda given, got, want: math.isclose(got["scale"][1], _symmetric(**given, reach=_max)[1], rel_tol=1e-5),
              (partial(_symmetric, reach=_max), partial(_symmetric, reach=lambda w: _max(w).clamp(min=0.01)))),
        Fault("a scale is negative: it is the distance between two levels", lambda given, got, want: (got["scale"] < 0).any(),
              (partial(_symmetric, reach=lambda w: -_absmax(w)), partial(_symmetric, reach=lambda w: -_max(-w)))),
    ),
    mistakes=mistakes_by_option(_symmetric, {
        "the grid is a step too short: how many steps lie between 2**bits levels?": {"steps": lambda bits: 2**bits},
        "this leaves the lowest code unused. Here all 2**bits levels count: absmax lies (2**bits - 1) / 2 steps from 0":
            {"steps": lambda bits: 2**bits - 2},
        "the scale is half of what it should be: the grid reaches from -absmax to absmax, twice absmax":
            {"reach": lambda w: _absmax(w) / 2},
        "the scale spans from min to max. A symmetric grid reaches absmax on either side, whatever the row":
            [{"reach": lambda w: (_max(w) + _max(-w)) / 2}, {"reach": lambda w: (_max(w).clamp(min=0) + _max(-w)) / 2}],
    }),
    others=(Mutant(partial(_symmetric, reach=lambda w: w.abs().amax(1)), "keepdim=True keeps the second axis"),),
)  # fmt: skip


# 2.2 and 2.5 ----------------------------------------------------------------------------------------------------------
ROWS = ("mixed signs", "mostly positive", "mostly negative", "as far down as up", "an all-zero row",
        "values in 3..5", "values in -5..-3", "a constant row", "a constant negative row")  # fmt: skip


def straddling_inputs(seed: int) -> dict:
    """The first five of ROWS, with 0 inside their range; the learner meets the others in 2.5.

    -min / scale lies just above a whole number, just below one, and half way between two, where either neighbor is right.
    """
    g, bits = generator(seed), 3 + seed % 2
    steps = 2**bits - 1
    lowest = torch.tensor([[-2.3], [-1.7], [1.7 - steps], [-steps / 2]])  # in steps from 0
    rows = lowest + steps * torch.cat([torch.tensor([0.0, 1.0]).expand(4, 2), torch.rand(4, 9, generator=g)], 1)
    return {"weight": torch.cat([rows * (0.1 + 0.1 * torch.rand(4, 1, generator=g)), torch.zeros(1, 11)]), "bits": bits}


def one_sided_inputs(seed: int) -> dict:
    given, positive = straddling_inputs(seed), 3 + 2 * torch.rand(1, 11, generator=generator(1000 + seed))
    constant = torch.full((1, 11), 0.5)
    return given | {"weight": torch.cat([given["weight"], positive, -positive, constant, -1.7 * constant])}


def _grid_fault(given: dict, got: dict, want: dict) -> str | None:
    """None if no value ends further than scale/2 from where it began, with steps as short as that needs."""
    (weight, bits), (scale, zero) = given.values(), got.values()
    top = 2**bits - 1
    restored = ((torch.round(weight / scale) + zero).clamp(0, top) - zero) * scale
    error, rounding = (restored - weight).abs(), FLOAT32 * weight.abs()
    worst, column = (error - scale / 2 - rounding).max(1, keepdim=True)
    value, comes_back = (t.gather(1, column) for t in (weight, restored))
    # Longer by more than an epsilon that somebody added. A row that is stored exactly may have any step.
    longer = (scale > 1.001 * want["scale"]) & (error > rounding).any(1, keepdim=True)
    for bad, message in (
        (scale <= 0, "scale {scale:.3g}, zero_point {zero:.3g}. A scale is a positive number: the distance between two levels"),
        (zero != zero.round(), "zero_point {zero:.3g} is not a whole number, as a code is"),
        ((zero < 0) | (zero > top), "zero_point {zero:g} cannot be stored: it is a code, from 0 to {top}. What must the grid have "
                                    "a level at, so that there is such a code?"),
        (worst > 0, "{value} comes back as {comes_back}, {worst:.3g} further than scale/2 from where it began"),
        (longer, "no error is too large, but the grid is coarser than it need be. Does it reach further than the row?"),
    ):  # fmt: skip
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            texts = dict(zip(("value", "comes_back"), shown(value[row].item(), comes_back[row].item()), strict=True))
            numbers = {"scale": scale[row].item(), "zero": zero[row].item(), "worst": worst[row].item(), "top": top}
            return f"{ROWS[row]}: {message.format(**texts, **numbers)}"
    return None


def _accepts_grid(given, got, want):
    off, allowed = (got["scale"] - want["scale"]).abs(), FLOAT32 * want["scale"]
    off = off.masked_fill(off > allowed, 0.0)  # another grid, and as right: of zeros, or of a row that is stored exactly
    return None if _grid_fault(given, got, want) else right(off.max().item(), allowed.max().item())


def _close_grid(given: dict, want: dict) -> dict:
    """Mistakes lie percents apart; rows without range are left out, which are guarded in different ways."""
    flat = (given["weight"] == given["weight"][:, :1]).all(1, keepdim=True)
    return {name: (share * want[name]).masked_fill(flat, torch.inf) for name, share in (("scale", 1e-5), ("zero_point", 0.0))}


def _asymmetric(weight, bits, *, more_steps=0, sign=-1, finish=lambda zero, bits: zero.round(), guard=_or_one, reach_zero=True):
    """A right answer, with what can go wrong as options. The notebook's naive_grid is without reach_zero, and has no guard."""
    low, high = weight.aminmax(dim=1, keepdim=True)
    if reach_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = guard((high - low) / (2**bits - 1 + more_steps))
    return scale, finish(sign * low / scale, bits)


def _stored(zero, bits):
    return zero.round().clamp(0, 2**bits - 1)


SCALE_AND_ZERO_POINT = Exercise(
    id="2.2", name="scale_and_zero_point", title="Scale and zero-point", minutes=10, difficulty=2, points=3,
    returns=("scale", "zero_point"), inputs=straddling_inputs, reference=grid.scale_and_zero_point,
    accepts=_accepts_grid, close=_close_grid, otherwise=_grid_fault, hint="One scale and one zero-point for each row",
    faults=(Fault(ZERO_ROW, _zero_row, (partial(_asymmetric, guard=lambda scale: scale),), early=True),),
    mistakes=mistakes_by_option(_asymmetric, {
        "the zero-point is a code, so a whole number: it is not rounded": {"finish": lambda zero, bits: zero},
        "the zero-point is cut off, not rounded to the nearest code": {"finish": lambda zero, bits: zero.floor()},
        "the sign of the zero-point is turned: it is the code of 0.0, so it grows as the minimum falls": {"sign": 1},
        "the grid is too short for the row: how many steps lie between 2**bits levels?":
            [{"more_steps": 1}, {"more_steps": 1, "finish": _stored}],
        "the zero-point is the same for all rows: it says which code stands for 0, and depends on the minimum":
            [{"finish": lambda zero, bits: 0 * zero}, {"finish": lambda zero, bits: 0 * zero + 2 ** (bits - 1)}],
    }),
    others=(
        Mutant(lambda w, b: tuple(t.squeeze(1) for t in _asymmetric(w, b)), "for each row"),
        Mutant(lambda w, b: (-1e-3 + 0 * _absmax(w) + (_absmax(w) == 0), 0 * _absmax(w)), "A scale is a positive number"),
        Mutant(partial(_asymmetric, finish=lambda zero, bits: zero + 0.1), "is not a whole number"),
        Mutant(partial(_asymmetric, finish=lambda zero, bits: zero.round() - 2 ** (bits - 1)), "cannot be stored"),
        Mutant(partial(_asymmetric, finish=lambda zero, bits: zero.ceil().clamp(max=2**bits - 1)), "comes back as"),
        Mutant(partial(_asymmetric, more_steps=-1), "coarser than it need be"),
    ),
)  # fmt: skip

MENDED_GRID = replace(
    SCALE_AND_ZERO_POINT,
    id="2.5", name="mended_grid", title="Find the bug: a row without zero", minutes=8, inputs=one_sided_inputs,
    mistakes=SCALE_AND_ZERO_POINT.mistakes + mistakes_by_option(partial(_asymmetric, reach_zero=False, finish=_stored), {
        "values in 3..5 get a grid from 0 to 2: it is as long as max - min, and its zero-point, clamped to a code, puts one end at "
        "0. Should the scale not come from a range that has 0 in it?": [{}, {"guard": lambda scale: scale.clamp(min=1e-9)}],
    }),
    others=(*SCALE_AND_ZERO_POINT.others, Mutant(partial(_asymmetric, reach_zero=False), "cannot be stored")),
)  # fmt: skip


# 2.3 ------------------------------------------------------------------------------------------------------------------
def quantize_inputs(seed: int) -> dict:
    """Values half-way between levels (scales are powers of two, so that half-way is exact), on levels, between, and beyond."""
    g, bits = generator(seed), 3 + 2 * (seed % 2)
    scale = torch.tensor([[0.5], [0.25], [1.0], [2.0]])
    zero_point = torch.tensor([[3.0], [6.0], [1.0], [4.0]])
    halves, whole, beyond = torch.arange(-2, 4) + 0.5, torch.arange(-1, 2), torch.tensor([-80.0, 80.0])
    inside = torch.rand(4, 7, generator=g) * 6 - zero_point
    steps = [*(t.expand(4, -1) for t in (halves, whole, beyond)), inside, -1 - zero_point, 2**bits - zero_point]
    return {"weight": torch.cat(steps, 1) * scale, "scale": scale, "zero_point": zero_point, "bits": bits}


def _made_of(given: dict, want: dict, name: str, place: tuple) -> str:
    source, scale, zero = (t[place[0], place[1] % t.shape[1]].item() for t in list(given.values())[:3])
    return f"the {'code of' if name == 'codes' else 'value of code'} {source:.4g} with scale {scale:.4g} and zero_point {zero:g}"


def _codes(weight, scale, zero_point, bits, *, rounded=torch.round, times=1, clamp=torch.clamp):
    """A right answer, with what can go wrong as options."""
    return clamp(rounded(weight / scale) + times * zero_point, 0, 2**bits - 1)


QUANTIZE = Exercise(
    id="2.3", name="quantize", title="Values to codes", minutes=6, difficulty=2, points=2,
    returns=("codes",), inputs=quantize_inputs, reference=grid.quantize, about=_made_of,
    faults=(
        Fault("the codes are int8, which ends at 127: with 8 bits the upper half would wrap to negative numbers. uint8, or floats",
              lambda given, got, want: got["codes"].dtype == torch.int8,
              (lambda *given: _codes(*given).to(torch.int8),), early=True),
    ),
    mistakes=mistakes_by_option(_codes, {
        "codes beyond 0 and 2**bits - 1 cannot be stored: clamp them, at the end": {"clamp": lambda codes, *_: codes},
        "half-way values go up: floor(x + 0.5). PyTorch and every peer here round half to even, as torch.round does":
            {"rounded": lambda steps: torch.floor(steps + 0.5)},
        "the fraction is cut off, not rounded: all weights move toward zero, by up to one step": {"rounded": torch.trunc},
        "the fraction is cut off downward, not rounded: half of all codes come out one too low": {"rounded": torch.floor},
        "the zero-point is subtracted. It is the code of 0.0, so it is added on the way in and subtracted on the way out":
            {"times": -1},
        "the zero-point is missing: the code of 0.0 is zero_point, not 0": {"times": 0},
        "the largest code is 2**bits - 1, since counting starts at 0": {"clamp": lambda codes, _, top: codes.clamp(0, top + 1)},
        "these are signed codes. With a zero-point they run from 0 to 2**bits - 1":
            {"clamp": lambda codes, _, top: codes.clamp(-(top + 1) / 2, (top - 1) / 2)},
        "the codes are clamped before the zero-point is added: the clamp comes last": lambda w, s, z, b: _codes(w, s, 0, b) + z,
        "the weight is multiplied by the scale: how many steps of size scale is a weight from 0?":
            lambda w, s, z, b: _codes(w, 1 / s, z, b),
        "ties fall the other way wherever the zero-point is odd: round first, then add it":
            lambda w, s, z, b: _codes(w + z * s, s, 0, b),
    }),
    others=(Mutant(lambda *given: _codes(*given) + 1, "the code of"),),
)  # fmt: skip


# 2.4 ------------------------------------------------------------------------------------------------------------------
def dequantize_inputs(seed: int) -> dict:
    """Codes and zero-points in uint8, as they are stored: subtracting them there wraps around."""
    g = generator(seed)
    codes = torch.randint(0, 16, (3, 8), generator=g, dtype=torch.uint8)
    codes[:, 0], codes[:, 1] = 0, 15
    codes[1, 2] = 255  # as large as a stored code can be: a signed byte would not hold it
    scale = 0.1 + torch.rand(3, 1, generator=g)
    return {"codes": codes, "scale": scale, "zero_point": torch.tensor([[7], [3], [12]], dtype=torch.uint8)}


DEQUANTIZE = Exercise(
    id="2.4", name="dequantize", title="Codes to values", minutes=4, difficulty=1, points=1,
    returns=("values",), inputs=dequantize_inputs, reference=grid.dequantize, about=_made_of,
    # (q - z) * s rounds once; q * s - z * s is as right, and rounds each product and the difference by 2**-24 of itself.
    allowed=lambda given, want: 2**-23 * (given["codes"] + given["zero_point"].float()) * given["scale"],
    close=lambda given, want: 1e-4,  # a thousandth of the smallest step
    mistakes=(
        Mistake("below zero it jumps to large values: codes and zero_point are uint8, where 3 - 7 is 252. Convert before you "
                "subtract", lambda q, s, z: (q - z) * s),
        Mistake("the zero-point is added. It was added on the way in, so it is subtracted on the way out",
                lambda q, s, z: (q.float() + z.float()) * s),
        Mistake("the zero-point is a code, counted in steps: subtract it before the multiplication", lambda q, s, z: q * s - z),
        Mistake("the zero-point is missing: code zero_point should come back as 0.0", lambda q, s, z: q.float() * s),
        Mistake("code 255 is read as -1: int8 ends at 127", lambda q, s, z: (q.to(torch.int8) - z.to(torch.int8)) * s),
    ),
    others=(Mutant(lambda q, s, z: ((q.float() - z) * s).half(), "compute in float32"),),
)  # fmt: skip


# 2.6 ------------------------------------------------------------------------------------------------------------------
def sqnr_inputs(seed: int) -> dict:
    """A weight with a mean far from 0, so that power and variance differ, and noise with a mean of its own."""
    g = generator(seed)
    weight = torch.randn(6, 50, generator=g) + 1.5
    return {"weight": weight, "reconstruction": weight + 0.02 + 0.05 * torch.randn(6, 50, generator=g)}


def _decibels(weight, reconstruction, *, times=10, log=torch.log10, of=lambda values: values.pow(2).sum()):
    """A right answer, with what can go wrong as options."""
    return (times * log(of(weight.double()) / of((weight - reconstruction).double()))).item()


SQNR = Exercise(
    id="2.6", name="sqnr_db", title="Signal to noise, in decibels", minutes=5, difficulty=1, points=1,
    returns=("ratio",), inputs=sqnr_inputs, reference=grid.sqnr_db, about=lambda *_: "in decibels",
    # 300 float32 terms summed in any order: relative error below 300 * 2**-24 in each sum, times 10 / ln 10 in decibels.
    allowed=lambda given, want: 2 * 300 * 2**-24 * 10 / 2.302585,
    close=lambda given, want: 0.02,  # mistakes lie whole decibels apart; the ratio itself is near 1000, with six digits
    mistakes=mistakes_by_option(_decibels, {
        "it is the ratio itself. Decibels are 10 log10 of it": {"times": 1, "log": lambda ratio: ratio},
        "twice too many decibels: 20 log10 belongs to amplitudes; these are sums of squares already": {"times": 20},
        "the sign is turned: it is noise over signal": {"times": -10},
        "10 times the natural logarithm is not decibels: log10": {"log": torch.log},
        "it subtracts the mean first (a variance). An offset is damage too, and the product with an activation sees all of w":
            {"of": torch.var},
        "it compares absolute values, not squares": {"of": lambda values: values.abs().sum()},
    }),
)  # fmt: skip


# 2.7 ------------------------------------------------------------------------------------------------------------------
LEAST_DISTINCT, MOST_GAIN = 64, 1.0


def stubborn_row() -> torch.Tensor:
    """A row for which a fifth bit is nearly worthless: one weight sets the step, the others all lie inside the step around 0."""
    row = torch.linspace(0.001, 0.01, 127)
    return torch.cat([row, torch.tensor([-1.0])])


def _fifth_bit_helps(given: dict, got: dict, want: dict) -> dict | None:
    """Decibels that going from 4 bits to 5 gains on the asymmetric grid of the whole row, where they are too many."""
    row, ratios = got["row"].double()[None], []
    for bits in (4, 5):
        scale, zero_point = grid.scale_and_zero_point(row, bits)
        ratios.append(grid.sqnr_db(row, grid.dequantize(grid.quantize(row, scale, zero_point, bits), scale, zero_point)))
    gain = ratios[1] - ratios[0]  # NaN where squares overflow
    return None if gain < MOST_GAIN else dict(zip(("gain", "most"), shown(gain, MOST_GAIN, 3), strict=True))


STUBBORN_ROW = Exercise(
    id="2.7", name="stubborn_row", title="A row that a fifth bit does not help", minutes=8, difficulty=3, points=3,
    returns=("row",), inputs=lambda seed: {}, reference=stubborn_row, free=("row",), accepts=lambda given, got, want: right(),
    faults=(
        Fault("wanted a 1-D tensor of weights, got shape {shape}",
              lambda given, got, want: {"shape": list(got["row"].shape)} if got["row"].ndim != 1 else None,
              (lambda: torch.cat([torch.linspace(0.001, 0.01, 99), torch.tensor([-1.0])])[None],)),
        Fault(f"the row has {{count}} different values, wanted at least {LEAST_DISTINCT}: few values can all sit on levels",
              lambda given, got, want: {"count": count} if (count := len(got["row"].unique())) < LEAST_DISTINCT else None,
              (lambda: torch.tensor([0.001] * 99 + [1.0]), lambda: torch.linspace(-1, 1, LEAST_DISTINCT - 1))),
        Fault("the fifth bit gains {gain} dB on this row, wanted less than {most}. Halving the step helps wherever errors fill the "
              "step. When does a weight's error stay the same on both grids?", _fifth_bit_helps,
              tuple(lambda low=low, high=high: torch.linspace(low, high, 100) for low, high in ((-1, 1), (3, 5), (0, 1)))),
    ),
)  # fmt: skip


# 2.8 ------------------------------------------------------------------------------------------------------------------
def clip_inputs(seed: int) -> dict:
    """Rows with tails of different weight, so that each wants a factor of its own. One is worst off with the largest factor."""
    g, factors = generator(seed), torch.linspace(0.2, 1.0, 33)
    normal, heavy, lonely = torch.randn(3, 480, generator=g)
    heavy *= torch.exp(0.8 * torch.randn(480, generator=g))
    flat = torch.rand(480, generator=g) * 2 - 1
    lonely = (0.3 * lonely).clamp(-0.6, 0.6)
    lonely[17] = -3.0
    return {"weight": torch.stack([normal, heavy, flat, lonely]), "bits": 3 + seed % 2, "factors": factors}


def _squared(errors, inside=1):
    return (errors * inside).pow(2).sum(2)


def _errors(weight: torch.Tensor, bits: int, factors: torch.Tensor, clamped: bool = True) -> torch.Tensor:
    """Error of every weight at every factor, [factors, rows, columns]."""
    scale, reach = factors[:, None, None] * grid.symmetric_scale(weight, bits), 2 ** (bits - 1) if clamped else torch.inf
    return torch.round(weight / scale).clamp(-reach, reach - 1) * scale - weight


def _clipped(weight, bits, factors, *, loss=lambda errors, inside: _squared(errors), clamped=True):
    """A right answer, or one with another loss(errors, inside) [factors, rows]. inside: whether a weight is not cut off."""
    inside = weight.abs() <= factors[:, None, None] * _absmax(weight)
    return factors[loss(_errors(weight, bits, factors, clamped), inside).argmin(0)][:, None]


def _excess(given: dict, got: dict) -> torch.Tensor:
    """By what share each row's squared error exceeds the least, [rows]; infinite where an entry is not one of the factors."""
    squared, is_factor = _squared(_errors(**given)), given["factors"][:, None] == got["factor"][:, 0]
    return squared.masked_fill(~is_factor, torch.inf).amin(0) / squared.amin(0) - 1


def _accepts_clip(given, got, want):
    excess = _excess(given, got).max().item()
    allowed = 480 * 2**-23  # as many squares are summed in float32: two factors that close are both right
    return right(excess, allowed) if excess <= allowed else None


def _where_clipped(given: dict, got: dict, want: dict) -> str:
    excess, row = _excess(given, got).max(0)
    if excess.isinf():
        have, wanted = shown(got["factor"][row].item(), want["factor"][row].item())
        return f"row {row}: {have} is not one of `factors`, wanted {wanted}"
    return f"row {row}: factor {got['factor'][row].item():.3g} leaves {100 * excess:.2g} % more squared error than the best"


BEST_CLIP = Exercise(
    id="2.8", name="best_clip", title="Cut the ends off", minutes=12, difficulty=3, points=3,
    returns=("factor",), inputs=clip_inputs, reference=grid.best_clip, accepts=_accepts_clip, otherwise=_where_clipped,
    faults=(
        Fault("one factor for the whole weight: each row has a scale of its own, so it can have a factor of its own",
              lambda given, got, want: got["factor"].numel() == 1,
              (lambda *given: given[2][_squared(_errors(*given)).sum(1).argmin()],), early=True),
    ),
    mistakes=mistakes_by_option(_clipped, {
        "these are places in `factors`, not the factors themselves": lambda *given: _squared(_errors(*given)).argmin(0)[:, None],
        "this minimizes the largest error of a row. One extreme weight is saved, all others pay":
            {"loss": lambda errors, inside: errors.abs().amax(2)},
        "this minimizes the absolute error, not the squared: large errors weigh more in an output's variance":
            {"loss": lambda errors, inside: errors.abs().sum(2)},
        "every row got the smallest factor, as if what is cut off cost nothing. Are the codes clamped, and the weights outside the "
        "clipped range counted?": [{"loss": _squared}, {"clamped": False}],
        "this is the worst factor: argmax for argmin?": {"loss": lambda errors, inside: -_squared(errors)},
        "all rows got the factor that is best for their sum; each row has its own best one":
            {"loss": lambda errors, inside: _squared(errors).sum(1, keepdim=True).expand(-1, 4)},
        "this clips nothing in any row, though that leaves more squared error": lambda w, b, f: torch.ones(len(w), 1),
    }),
    others=(Mutant(partial(_clipped, loss=lambda errors, inside: _squared(errors).roll(1, 0)), "more squared error than"),
            Mutant(lambda *given: _clipped(*given) + 0.001, "is not one of")),
)  # fmt: skip

EXERCISES = (SYMMETRIC_SCALE, SCALE_AND_ZERO_POINT, QUANTIZE, DEQUANTIZE, MENDED_GRID, SQNR, STUBBORN_ROW, BEST_CLIP)
