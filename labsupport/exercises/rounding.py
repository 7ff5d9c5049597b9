"""Chapter 2: grids, codes, errors, clipping."""

from __future__ import annotations

import torch

from labsupport.exercises.base import Exercise, Mutant, Verdict, generator, largest_difference, right, shape_fault, wrong
from labsupport.quant import grid

# Division and a product in float32: each rounds by at most 2**-24 of the result; four units of 2**-23 cover any order of them.
FLOAT32 = 4 * 2**-23


def _row_fault(names: list[str], excess: torch.Tensor) -> str | None:
    """Name of the first row in which any entry of `excess` [rows, anything] is positive."""
    bad = (excess > 0).flatten(1).any(1).nonzero().flatten().tolist()
    return names[bad[0]] if bad else None


# 2.1 ------------------------------------------------------------------------------------------------------------------

SYMMETRIC_ROWS = ["mixed signs", "largest value negative", "all negative", "an all-zero row"]


def symmetric_inputs(seed: int) -> dict:
    g = generator(seed)
    mixed, leaning = torch.randn(2, 9, generator=g)
    mixed[0] = mixed.abs().max() + 0.1  # the positive end is the longer one here, the negative in the next row
    leaning[3] = -leaning.abs().max() - 0.5
    negative = -0.2 - torch.rand(9, generator=g)
    return {"weight": torch.stack([mixed, leaning, negative, torch.zeros(9)]), "bits": 3 + seed % 2}


def judge_symmetric(given: dict, got: dict, want: dict) -> Verdict:
    weight, bits, scale = given["weight"], given["bits"], got["scale"]
    if scale.shape == (1, weight.shape[1]) or scale.shape == (weight.shape[1],):
        return wrong("there is one scale for each column. A row is one output's weights: reduce along dim 1, keepdim=True")
    if fault := shape_fault({"scale": scale.nan_to_num()}, want):
        return wrong(fault + ". One scale a row: keepdim=True keeps the second axis")
    if (scale[:3] < 0).any():
        return wrong(
            "all negative: the scale is negative. It follows the largest value, not the largest magnitude. max() for abs().max()?"
        )
    if not (scale.isfinite().all() and (scale > 0).all()):
        return wrong(
            "an all-zero row: its scale is 0 or not a number, and codes divide by it. What should a row without range use?"
        )
    ratio = scale[:3] / want["scale"][:3]
    allowed = FLOAT32 * want["scale"][:3]
    off = largest_difference(scale[:3], want["scale"][:3])
    if ((scale[:3] - want["scale"][:3]).abs() <= allowed).all():
        return right(off, allowed.max().item())
    # The step count is told apart from the choice of the maximum by the first row, whose largest value is positive.
    top = (ratio[0] * 1.0).item()
    if abs(top - (2**bits - 1) / 2**bits) < 1e-4:
        return wrong("the grid is a step too short: how many steps lie between 2**bits levels?")
    if abs(top - (2**bits - 1) / (2**bits - 2)) < 1e-4:
        return wrong(
            "this leaves the lowest code unused. Here all 2**bits levels count: absmax lies (2**bits - 1) / 2 steps from 0"
        )
    if abs(top - 0.5) < 1e-4:
        return wrong("the scale is half of what it should be: the grid reaches from -absmax to absmax, twice absmax")
    low, high = weight[0].min(), weight[0].max()
    if abs(top - ((high - low) / (2 * high)).item()) < 1e-4:
        return wrong(
            "mixed signs: the scale spans from min to max. A symmetric grid reaches absmax on either side, whatever the row"
        )
    if abs(top - 1) < 1e-4:
        return wrong(
            "largest value negative: the scale follows the largest value, not the largest magnitude. max() for abs().max()?"
        )
    return wrong(f"mixed signs: the scale is {top:.3g} times what it should be")


def _symmetric(scale_of) -> object:
    def answer(weight, bits):
        scale = scale_of(weight, bits)
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    return answer


SYMMETRIC_SCALE = Exercise(
    id="2.1", name="symmetric_scale", title="A symmetric grid", minutes=8, difficulty=1, points=2,
    returns=("scale",), inputs=symmetric_inputs, reference=grid.symmetric_scale, judge=judge_symmetric,
    mutants=(
        Mutant(_symmetric(lambda w, b: 2 * w.amax(1, keepdim=True).clamp(min=0.01) / (2**b - 1)), "not the largest magnitude"),
        Mutant(_symmetric(lambda w, b: (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / (2**b - 1)), "from min to max"),
        Mutant(_symmetric(lambda w, b: 2 * w.abs().amax(0, keepdim=True) / (2**b - 1)), "for each column"),
        Mutant(_symmetric(lambda w, b: 2 * w.abs().amax(1) / (2**b - 1)), "keepdim"),
        Mutant(_symmetric(lambda w, b: 2 * w.abs().amax(1, keepdim=True) / 2**b), "a step too short"),
        Mutant(_symmetric(lambda w, b: w.abs().amax(1, keepdim=True) / (2 ** (b - 1) - 1)), "lowest code unused"),
        Mutant(_symmetric(lambda w, b: w.abs().amax(1, keepdim=True) / (2**b - 1)), "half of what"),
        Mutant(lambda w, b: 2 * w.abs().amax(1, keepdim=True) / (2**b - 1), "all-zero row"),
    ),
)  # fmt: skip


# 2.2 and 2.5 ----------------------------------------------------------------------------------------------------------

STRADDLING_ROWS = ["mixed signs", "mostly positive", "mostly negative", "an all-zero row"]
ONE_SIDED_ROWS = ["mixed signs", "values in 3..5", "values in -5..-3", "a constant row", "an all-zero row"]


def straddling_inputs(seed: int) -> dict:
    """Rows with 0 inside their range; the learner meets the others in 2.5."""
    g = generator(seed)
    mixed = torch.randn(1, 7, generator=g)
    mixed[0, 0], mixed[0, 1] = -1.3, 1.7
    positive = torch.rand(1, 7, generator=g) + 0.5
    positive[0, 2] = -0.3
    return {"weight": torch.cat([mixed, positive, -positive, torch.zeros(1, 7)]), "bits": 3 + seed % 2}


def one_sided_inputs(seed: int) -> dict:
    g = generator(seed)
    mixed = torch.randn(1, 7, generator=g)
    mixed[0, 0], mixed[0, 1] = -1.3, 1.7
    positive = 3 + 2 * torch.rand(1, 7, generator=g)
    return {"weight": torch.cat([mixed, positive, -positive, torch.full((1, 7), 0.5), torch.zeros(1, 7)]), "bits": 3 + seed % 2}


def excess_of(weight: torch.Tensor, bits: int, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """By how much each value's error exceeds scale/2, the most that rounding to a level can cost, and what float32 adds."""
    codes = (torch.round(weight / scale) + zero_point).clamp(0, 2**bits - 1)
    return ((codes - zero_point) * scale - weight).abs() - scale / 2 - FLOAT32 * weight.abs()


def _judge_grid(names: list[str]):
    def judge(given: dict, got: dict, want: dict) -> Verdict:
        weight, bits, scale, zero_point = given["weight"], given["bits"], got["scale"], got["zero_point"]
        finite = {k: v.nan_to_num() if isinstance(v, torch.Tensor) else v for k, v in got.items()}
        if fault := shape_fault(finite, want):
            return wrong(fault + ". One scale and one zero-point for each row")
        scale, zero_point = scale.float(), zero_point.float()
        ok = scale.isfinite() & (scale > 0) & zero_point.isfinite()
        if name := _row_fault(names, (~ok).float()):
            shown = f"scale {scale[~ok][0].item():.3g}, zero_point {zero_point[~ok][0].item():.3g}"
            if weight[names.index(name)].any():
                return wrong(f"{name}: {shown}. A scale is a positive number: the distance between two levels")
            return wrong(f"{name}: {shown}. What should a row without range use?")
        if not torch.equal(zero_point, zero_point.round()):
            return wrong("the zero-point is a code, so a whole number: it is not rounded")
        outside = (zero_point < 0) | (zero_point > 2**bits - 1)
        if outside.any() and not (excess_of(weight, bits, scale, -zero_point) <= 0).all():
            name = _row_fault(names, outside.float())
            said = f"{name}: zero_point {zero_point[outside][0].item():g} cannot be stored: it is a code, from 0 to {2**bits - 1}"
            return wrong(said + ". What must the grid have a level at, so that there is such a code?")

        def excess(zero: torch.Tensor) -> torch.Tensor:
            return excess_of(weight, bits, scale, zero)

        if name := _row_fault(names, excess(zero_point)):
            row = weight[names.index(name)]
            worst = excess(zero_point)[names.index(name)].max().item()
            said = f"{name}: a value ends {worst:.3g} further than scale/2 from where it began"
            steps = scale / want["scale"]
            if (steps[:3] - (2**bits - 1) / 2**bits).abs().max() < 1e-3:
                return wrong(said + ". The grid is too short for the row: how many steps lie between 2**bits levels?")
            if (excess(-zero_point) <= 0).all():
                return wrong(said + ". With the sign of the zero-point turned it would be right")
            exact = -weight.amin(1, keepdim=True).clamp(max=0) / scale
            if torch.equal(zero_point, exact.floor()):
                return wrong(said + ". The zero-point is cut off, not rounded to the nearest code")
            if row.min() > 0 or row.max() < 0:
                return wrong(said + ". Does its grid have a level at 0?")
            if (zero_point == 0).all() or (zero_point == 2 ** (bits - 1)).all():
                return wrong(
                    said + ". The zero-point is the same for all rows: it says which code stands for 0, and depends on the minimum"
                )
            return wrong(said)
        if name := _row_fault(names, torch.where(weight.any(1, keepdim=True), scale - want["scale"] * 1.001, torch.zeros(()))):
            return wrong(
                f"{name}: no error is too large, but the grid is coarser than it need be. Does it reach further than the row?"
            )
        ranged = weight.any(1, keepdim=True)  # any positive scale serves a row of zeros
        off = largest_difference(scale[ranged], want["scale"][ranged])
        return right(off, (FLOAT32 * want["scale"]).max().item() if off else 0.0)

    return judge


def _asymmetric(weight, bits, steps=None, low=None, sign=-1.0, rounded=True, guarded=True):
    """The reference with one thing changed: what the mutants below are made of."""
    high = weight.amax(1, keepdim=True).clamp(min=0)
    low = weight.amin(1, keepdim=True).clamp(max=0) if low is None else low
    scale = (high - low) / (2**bits - 1 if steps is None else steps)
    if guarded:
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = sign * low / scale
    return scale, torch.round(zero_point) if rounded else zero_point


def _naive_grid(weight, bits):
    high, low = weight.amax(1, keepdim=True), weight.amin(1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


def _too_wide(weight, bits):
    reach = weight.abs().amax(1, keepdim=True)
    scale = torch.where(reach == 0, torch.ones_like(reach), 2 * reach / (2**bits - 1))
    return scale, torch.full_like(scale, 2 ** (bits - 1))


SCALE_AND_ZERO_POINT = Exercise(
    id="2.2", name="scale_and_zero_point", title="Scale and zero-point", minutes=10, difficulty=2, points=3,
    returns=("scale", "zero_point"), inputs=straddling_inputs, reference=grid.scale_and_zero_point,
    judge=_judge_grid(STRADDLING_ROWS),
    mutants=(
        Mutant(lambda w, b: _asymmetric(w, b, steps=2**b), "how many steps"),
        Mutant(lambda w, b: _asymmetric(w, b, sign=1.0), "sign of the zero-point"),
        Mutant(lambda w, b: _asymmetric(w, b, rounded=False), "not rounded"),
        Mutant(lambda w, b: tuple(t if i == 0 else t.floor() for i, t in enumerate(_asymmetric(w, b, rounded=False))), "cut off"),
        Mutant(lambda w, b: _asymmetric(w, b, guarded=False), "row without range"),
        Mutant(lambda w, b: (_asymmetric(w, b)[0], torch.zeros(len(w), 1)), "which code stands for 0"),
        Mutant(_too_wide, "coarser than it need be"),
        Mutant(lambda w, b: tuple(t.squeeze(1) for t in _asymmetric(w, b)), "for each row"),
    ),
)  # fmt: skip

MENDED_GRID = Exercise(
    id="2.5", name="mended_grid", title="Find the bug: a row without zero", minutes=8, difficulty=2, points=3,
    returns=("scale", "zero_point"), inputs=one_sided_inputs, reference=grid.scale_and_zero_point,
    judge=_judge_grid(ONE_SIDED_ROWS),
    mutants=(
        Mutant(_naive_grid, "level at 0"),
        Mutant(lambda w, b: _asymmetric(w, b, low=w.amin(1, keepdim=True)), "cannot be stored"),
        Mutant(_too_wide, "coarser than it need be"),
        Mutant(lambda w, b: _asymmetric(w, b, guarded=False), "row without range"),
    ),
)  # fmt: skip


# 2.3 ------------------------------------------------------------------------------------------------------------------


def quantize_inputs(seed: int) -> dict:
    """Values on levels, between them, exactly half-way (powers of two, so that half-way is exact), and beyond both ends."""
    g = generator(seed)
    scale = torch.tensor([[0.5], [0.25], [1.0]])
    zero_point = torch.tensor([[3.0], [6.0], [1.0]])
    halves = torch.arange(-2, 4) + 0.5
    inside = (torch.rand(3, 8, generator=g) * 6 - zero_point) * scale
    beyond = torch.tensor([-40.0, 40.0]).repeat(3, 1)
    return {
        "weight": torch.cat([halves * scale, inside, beyond], 1),
        "scale": scale,
        "zero_point": zero_point,
        "bits": 3 + seed % 2,
    }


def judge_quantize(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    if got["codes"].dtype == torch.int8:
        return wrong(
            "the codes are int8, which ends at 127: with 8 bits the upper half would wrap to negative numbers. uint8, or floats"
        )
    codes, expected = got["codes"].float(), want["codes"]
    weight, scale, zero = given["weight"], given["scale"], given["zero_point"]
    top = 2 ** given["bits"] - 1
    if torch.equal(codes, expected):
        return right()
    likely = {
        "codes beyond 0 and 2**bits - 1 cannot be stored: clamp them, at the end": torch.round(weight / scale) + zero,
        "it looks as if the codes were clamped before the zero-point was added: the clamp comes last": (
            torch.round(weight / scale).clamp(0, top) + zero
        ),
        "half-way values go up: floor(x + 0.5). PyTorch and every peer here round half to even, as torch.round does": (
            (torch.floor(weight / scale + 0.5) + zero).clamp(0, top)
        ),
        "the fraction is cut off, not rounded: all weights move toward zero, by up to one step": (
            (torch.trunc(weight / scale) + zero).clamp(0, top)
        ),
        "the fraction is cut off downward, not rounded: half of all codes come out one too low": (
            (torch.floor(weight / scale) + zero).clamp(0, top)
        ),
        "the zero-point is subtracted. It is the code of 0.0, so it is added on the way in and subtracted on the way out": (
            (torch.round(weight / scale) - zero).clamp(0, top)
        ),
        "the weight is multiplied by the scale: how many steps of size scale is a weight from 0?": (
            (torch.round(weight * scale) + zero).clamp(0, top)
        ),
        "ties fall the other way wherever the zero-point is odd: round first, then add it": (
            torch.round(weight / scale + zero).clamp(0, top)
        ),
        "the zero-point is missing: the code of 0.0 is zero_point, not 0": torch.round(weight / scale).clamp(0, top),
        "the largest code is 2**bits - 1, since counting starts at 0": (torch.round(weight / scale) + zero).clamp(0, top + 1),
        "these are signed codes. With a zero-point they run from 0 to 2**bits - 1": (
            (torch.round(weight / scale) + zero).clamp(-(top + 1) // 2, top // 2)
        ),
    }
    for said, mistake in likely.items():
        if torch.equal(codes, mistake):
            return wrong(said)
    row, column = (codes != expected).nonzero()[0].tolist()
    return wrong(
        f"the value {weight[row, column].item():.4g} with scale {scale[row].item():g} and zero_point {zero[row].item():g} "
        f"got code {codes[row, column].item():g}, wanted {expected[row, column].item():g}"
    )


QUANTIZE = Exercise(
    id="2.3", name="quantize", title="Values to codes", minutes=6, difficulty=2, points=2,
    returns=("codes",), inputs=quantize_inputs, reference=grid.quantize, judge=judge_quantize,
    mutants=(
        Mutant(lambda w, s, z, b: torch.round(w / s).clamp(0, 2**b - 1) + z, "clamp comes last"),
        Mutant(lambda w, s, z, b: (torch.floor(w / s + 0.5) + z).clamp(0, 2**b - 1), "half to even"),
        Mutant(lambda w, s, z, b: ((w / s).int() + z).clamp(0, 2**b - 1), "cut off"),
        Mutant(lambda w, s, z, b: torch.round(w / s) + z, "clamp them"),
        Mutant(lambda w, s, z, b: (torch.round(w / s) - z).clamp(0, 2**b - 1), "subtracted"),
        Mutant(lambda w, s, z, b: (torch.round(w * s) + z).clamp(0, 2**b - 1), "multiplied by the scale"),
        Mutant(lambda w, s, z, b: torch.round(w / s + z).clamp(0, 2**b - 1), "round first"),
        Mutant(lambda w, s, z, b: torch.round(w / s).clamp(0, 2**b - 1), "zero-point is missing"),
        Mutant(lambda w, s, z, b: (torch.round(w / s) + z).clamp(0, 2**b), "counting starts at 0"),
        Mutant(lambda w, s, z, b: (torch.round(w / s) + z).clamp(-(2 ** (b - 1)), 2 ** (b - 1) - 1), "signed codes"),
        Mutant(lambda w, s, z, b: (torch.round(w / s) + z).clamp(0, 2**b - 1).to(torch.int8), "ends at 127"),
        Mutant(lambda w, s, z, b: (torch.round(w / s) + z).clamp(0, 2**b - 1).half() + 1, "compute in float32"),
    ),
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


def judge_dequantize(given: dict, got: dict, want: dict) -> Verdict:
    values, expected = got["values"], want["values"]
    if fault := shape_fault(got, want):
        return wrong(fault)
    codes, scale, zero = given["codes"], given["scale"], given["zero_point"]
    # (q - z) * s rounds once; q * s - z * s is as right, and rounds each product and the difference by 2**-24 of itself.
    allowed = 2**-23 * (codes.float() + zero.float()) * scale
    if ((values - expected).abs() <= allowed).all():
        return right(largest_difference(values, expected), allowed.max().item())
    if torch.allclose(values.float(), (codes - zero) * scale):
        return wrong(
            "below zero it jumps to large values: codes and zero_point are uint8, where 3 - 7 is 252. Convert before you subtract"
        )
    if torch.allclose(values.float(), (codes.float() + zero.float()) * scale):
        return wrong("the zero-point is added. It was added on the way in, so it is subtracted on the way out")
    if torch.allclose(values.float(), codes.float() * scale - zero.float()):
        return wrong("the zero-point is a code, counted in steps: subtract it before the multiplication")
    if torch.allclose(values.float(), codes.float() * scale):
        return wrong("the zero-point is missing: code zero_point should come back as 0.0")
    about = f"code {codes[0, 1].item()} with scale {scale[0].item():.3g} and zero_point {zero[0].item()}"
    return wrong(f"{about} gave {values[0, 1].item():.3g}, wanted {expected[0, 1].item():.3g}")


DEQUANTIZE = Exercise(
    id="2.4", name="dequantize", title="Codes to values", minutes=4, difficulty=1, points=1,
    returns=("values",), inputs=dequantize_inputs, reference=grid.dequantize, judge=judge_dequantize,
    mutants=(
        Mutant(lambda q, s, z: (q - z) * s, "uint8"),
        Mutant(lambda q, s, z: (q.float() + z) * s, "subtracted on the way out"),
        Mutant(lambda q, s, z: q * s - z, "counted in steps"),
        Mutant(lambda q, s, z: q * s, "zero-point is missing"),
        Mutant(lambda q, s, z: ((q.float() - z) * s).half(), "compute in float32"),
    ),
)  # fmt: skip


# 2.6 ------------------------------------------------------------------------------------------------------------------


def sqnr_inputs(seed: int) -> dict:
    """A weight with a mean far from 0, so that power and variance differ, and noise with a mean of its own."""
    g = generator(seed)
    weight = torch.randn(6, 50, generator=g) + 1.5
    return {"weight": weight, "reconstruction": weight + 0.02 + 0.05 * torch.randn(6, 50, generator=g)}


def judge_sqnr(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    w, r = given["weight"].double(), given["reconstruction"].double()
    value, expected = got["ratio"], want["ratio"]
    # 300 float32 terms summed in any order: relative error below 300 * 2**-24 in each sum, times 10 / ln 10 in decibels.
    allowed = 2 * 300 * 2**-24 * 10 / 2.302585
    if abs(value - expected) <= allowed:
        return right(abs(value - expected), allowed)
    error = w - r
    likely = {
        "it is the ratio itself. Decibels are 10 log10 of it": (w.pow(2).sum() / error.pow(2).sum()).item(),
        "twice too many decibels: 20 log10 belongs to amplitudes; these are sums of squares already": 2 * expected,
        "the sign is turned: it is noise over signal": -expected,
        "10 times the natural logarithm is not decibels: log10": expected * 2.302585,
        "it subtracts the mean first (a variance). An offset is damage too, and the product with an activation sees all of w": (
            10 * torch.log10(w.var() / error.var())
        ).item(),
        "it compares absolute values, not squares": (10 * torch.log10(w.abs().sum() / error.abs().sum())).item(),
    }
    for said, mistake in likely.items():
        if abs(value - mistake) < 1e-3 * max(1.0, abs(mistake)):
            return wrong(said)
    return wrong(f"got {value:.3f} dB, wanted {expected:.3f} dB")


SQNR = Exercise(
    id="2.6", name="sqnr_db", title="Signal to noise, in decibels", minutes=5, difficulty=1, points=1,
    returns=("ratio",), inputs=sqnr_inputs, reference=grid.sqnr_db, judge=judge_sqnr,
    mutants=(
        Mutant(lambda w, r: (w.pow(2).sum() / (w - r).pow(2).sum()).item(), "ratio itself"),
        Mutant(lambda w, r: (20 * torch.log10(w.pow(2).sum() / (w - r).pow(2).sum())).item(), "20 log10"),
        Mutant(lambda w, r: (10 * torch.log10((w - r).pow(2).sum() / w.pow(2).sum())).item(), "noise over signal"),
        Mutant(lambda w, r: (10 * torch.log10(w.var() / (w - r).var())).item(), "variance"),
        Mutant(lambda w, r: (10 * torch.log(w.pow(2).sum() / (w - r).pow(2).sum())).item(), "natural logarithm"),
        Mutant(lambda w, r: 10 * torch.log10(w.pow(2).sum() / (w - r).pow(2).sum()), ".item()"),
    ),
)  # fmt: skip


# 2.7 ------------------------------------------------------------------------------------------------------------------

LEAST_DISTINCT, MOST_GAIN = 64, 1.0


def stubborn_row() -> torch.Tensor:
    """A row for which a fifth bit is nearly worthless: one weight sets the step, the others all lie inside the step around 0."""
    row = torch.linspace(0.001, 0.01, 127)
    return torch.cat([row, torch.tensor([-1.0])])


def _gain(row: torch.Tensor) -> float:
    """Decibels that going from 4 bits to 5 gains on the asymmetric grid of a whole row."""
    ratios = []
    for bits in (4, 5):
        scale, zero_point = grid.scale_and_zero_point(row[None], bits)
        codes = grid.quantize(row[None], scale, zero_point, bits)
        ratios.append(grid.sqnr_db(row, grid.dequantize(codes, scale, zero_point)[0]))
    return ratios[1] - ratios[0]


def judge_stubborn(given: dict, got: dict, want: dict) -> Verdict:
    row = got["row"]
    if not isinstance(row, torch.Tensor) or row.ndim != 1:
        return wrong(
            f"wanted a 1-D tensor of weights, got {list(row.shape) if isinstance(row, torch.Tensor) else type(row).__name__}"
        )
    row = row.float()
    if not row.isfinite().all():
        return wrong("the row holds NaN or infinity")
    if len(row.unique()) < LEAST_DISTINCT:
        return wrong(
            f"the row has {len(row.unique())} different values, wanted at least {LEAST_DISTINCT}: few values can all sit on levels"
        )
    gain = _gain(row)
    if not gain < MOST_GAIN:  # also where both ratios are infinite and the gain is NaN
        hint = "Halving the step helps wherever errors fill the step. When does a weight's error stay the same on both grids?"
        return wrong(f"the fifth bit gains {gain:.2f} dB on this row, wanted less than {MOST_GAIN}. {hint}")
    return right()


STUBBORN_ROW = Exercise(
    id="2.7", name="stubborn_row", title="A row that a fifth bit does not help", minutes=8, difficulty=3, points=3,
    returns=("row",), inputs=lambda seed: {}, reference=stubborn_row, judge=judge_stubborn,
    mutants=(
        Mutant(lambda: torch.randn(256, generator=generator(0)), "on both grids"),
        Mutant(lambda: torch.linspace(-1, 1, 100), "on both grids"),
        Mutant(lambda: torch.tensor([0.001] * 99 + [1.0]), "different values"),
        Mutant(lambda: torch.linspace(3, 5, 100), "on both grids"),
        Mutant(lambda: torch.cat([torch.linspace(0.001, 0.01, 99), torch.tensor([-1.0])])[None], "1-D"),
    ),
)  # fmt: skip


# 2.8 ------------------------------------------------------------------------------------------------------------------


def clip_inputs(seed: int) -> dict:
    """Rows with tails of different weight, so that each wants a factor of its own."""
    g = generator(seed)
    normal = torch.randn(200, generator=g)
    heavy = torch.randn(200, generator=g) * torch.exp(0.8 * torch.randn(200, generator=g))
    flat = torch.rand(200, generator=g) * 2 - 1
    lonely = torch.randn(200, generator=g) * 0.3
    lonely[17] = 3.0
    factors = torch.linspace(0.2, 1.0, 33)
    return {"weight": torch.stack([normal, heavy, flat, lonely]), "bits": 3, "factors": factors}


def _clip_errors(given: dict) -> torch.Tensor:
    """Error of every weight at every factor, [factors, rows, columns]."""
    weight, bits = given["weight"], given["bits"]
    scale = given["factors"][:, None, None] * grid.symmetric_scale(weight, bits)
    zero = torch.tensor(2.0 ** (bits - 1))
    return grid.dequantize(grid.quantize(weight, scale, zero, bits), scale, zero) - weight


def judge_clip(given: dict, got: dict, want: dict) -> Verdict:
    factors, factor = given["factors"], got["factor"]
    if isinstance(factor, float) or (isinstance(factor, torch.Tensor) and factor.numel() == 1):
        return wrong("one factor for the whole weight: each row has a scale of its own, so it can have a factor of its own")
    if fault := shape_fault(got, want):
        return wrong(fault)
    squared = _clip_errors(given).pow(2).sum(2)  # [factors, rows]
    if not factor.is_floating_point() or (factor > 1).any():
        return wrong("these are places in `factors`, not the factors themselves")
    index = (factors[:, None] - factor[:, 0]).abs().argmin(0)
    if (factors[index][:, None] != factor).any():
        return wrong("a factor is not one of `factors`")
    # 200 squares summed in float32 in any order; two factors that close are both right.
    excess = squared.gather(0, index[None])[0] / squared.amin(0) - 1
    if (excess <= 200 * 2**-23).all():
        return right(max(excess.max().item(), 0.0), 200 * 2**-23)
    errors = _clip_errors(given)
    reach = factors[:, None, None] * given["weight"].abs().amax(1)[None, :, None]
    inside = given["weight"].abs()[None] <= reach
    likely = {
        "this minimizes the largest error and so clips nothing. One extreme weight is saved, all others pay": errors.abs().amax(2),
        "this minimizes the absolute error, not the squared: large errors weigh more in an output's variance": errors.abs().sum(2),
        "this counts only the weights inside the clipped range. The ones cut off pay too (are the codes clamped?)": (
            (errors * inside).pow(2).sum(2)
        ),
    }
    for said, loss in likely.items():
        if torch.equal(index, loss.argmin(0)):
            return wrong(said)
    if (index == 0).all():
        return wrong("every row got the smallest factor. Without a clamp nothing is cut off: are the codes clamped?")
    if (index == squared.argmax(0)).all():
        return wrong("this is the worst factor: argmax for argmin?")
    if (index == squared.sum(1).argmin()).all():
        return wrong("all rows got the factor that is best for their sum; each row has its own best one")
    if (index == len(factors) - 1).all():
        return wrong("this clips nothing in any row, though that leaves more squared error")
    row = int(excess.argmax())
    return wrong(
        f"row {row}: factor {factor[row].item():.3g} leaves {100 * excess[row].item():.1f} % more squared error than the best"
    )


def _clip_by(loss):
    def answer(weight, bits, factors):
        given = {"weight": weight, "bits": bits, "factors": factors}
        return factors[loss(_clip_errors(given), given).argmin(0)][:, None]

    return answer


def _unclamped(weight, bits, factors):
    scale = factors[:, None, None] * grid.symmetric_scale(weight, bits)
    errors = torch.round(weight / scale) * scale - weight
    return factors[errors.pow(2).sum(2).argmin(0)][:, None]


def _inside_only(errors, given):
    reach = given["factors"][:, None, None] * given["weight"].abs().amax(1)[None, :, None]
    return (errors * (given["weight"].abs()[None] <= reach)).pow(2).sum(2)


BEST_CLIP = Exercise(
    id="2.8", name="best_clip", title="Cut the ends off", minutes=12, difficulty=3, points=3,
    returns=("factor",), inputs=clip_inputs, reference=grid.best_clip, judge=judge_clip,
    mutants=(
        Mutant(_clip_by(lambda e, _: e.abs().amax(2)), "largest error"),
        Mutant(_clip_by(lambda e, _: e.abs().sum(2)), "absolute error"),
        Mutant(_clip_by(_inside_only), "cut off pay too"),
        Mutant(_unclamped, "are the codes clamped"),
        Mutant(_clip_by(lambda e, _: -e.pow(2).sum(2)), "argmax"),
        Mutant(_clip_by(lambda e, _: e.pow(2).sum((1, 2))[:, None].expand(-1, e.shape[1])), "for their sum"),
        Mutant(lambda w, b, f: _clip_errors({"weight": w, "bits": b, "factors": f}).pow(2).sum(2).argmin(0)[:, None], "places in"),
    ),
)  # fmt: skip

EXERCISES = (SYMMETRIC_SCALE, SCALE_AND_ZERO_POINT, QUANTIZE, DEQUANTIZE, MENDED_GRID, SQNR, STUBBORN_ROW, BEST_CLIP)
