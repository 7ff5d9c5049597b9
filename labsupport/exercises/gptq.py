"""Chapter 6: what one rounded weight asks of the others, and the loop that asks it of every column."""

from __future__ import annotations

import torch

from labsupport.exercises.base import Exercise, Mutant, Verdict, generator, largest_difference, like, right, shape_fault, wrong
from labsupport.pipeline.calibrate import InputStatistics
from labsupport.quant import gptq, grid, rtn

ROUNDING = 2.0**-24  # of one float32 operation, relative
CONDITION = 100.0  # Hessians of these exercises are no worse, so that float32 is enough for whatever way an answer takes


def _hessian(columns: int, g: torch.Generator, least: float = 0.0) -> torch.Tensor:
    """2/n X^T X of inputs that share directions, float32, with a condition below CONDITION; no two columns correlated less than
    `least`."""
    while True:
        shared = torch.randn(40, 2, generator=g) @ torch.randn(2, columns, generator=g)
        x = shared + 0.6 * torch.randn(40, columns, generator=g)
        hessian = x.T @ x * (2 / len(x))
        size = hessian.diagonal().sqrt()
        if torch.linalg.cond(hessian) < CONDITION and (hessian / size / size[:, None]).abs().min() >= least:
            return hessian


# 6.1 ------------------------------------------------------------------------------------------------------------------


def batch_inputs(seed: int) -> dict:
    """Batches of 5, 1, 12 and 2 tokens, each louder or quieter than the last, none of them centered on 0. Seven channels."""
    g = generator(seed)
    sizes = (5, 1, 12, 2)
    return {"batches": [(0.5 + torch.randn(n, 7, generator=g)) * (1 + i) for i, n in enumerate(sizes)]}


def hessian(batches: list[torch.Tensor]) -> torch.Tensor:
    """labsupport's sums over batches, divided once."""
    fed = InputStatistics.empty(batches[0].shape[1])
    for x in batches:
        fed.add(x)
    return fed.hessian


def _grams(batches: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([x.T @ x for x in batches])


def _right(batches: list[torch.Tensor]) -> torch.Tensor:
    """The right answer, for what mutants make of it."""
    return 2 * _grams(batches).sum(0) / len(torch.cat(batches))


def _means(batches: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([2 * x.T @ x / len(x) for x in batches])


BATCH_MISTAKES = {
    "this is the mean of the batches' own means: a batch of one token counts as much as one of many. Sum first, then divide once": (
        lambda batches: _means(batches).mean(0)
    ),
    "the batches' own means are added up: sum first, then divide once, by the number of all tokens": (
        lambda batches: _means(batches).sum(0)
    ),
    "this is the last batch alone: the others were overwritten": lambda batches: _means(batches)[-1],
    "the sum is divided by the number of batches. n counts tokens, the rows of X": (
        lambda batches: 2 * _grams(batches).sum(0) / len(batches)
    ),
    "the sum is not divided by n, the number of tokens": lambda batches: 2 * _grams(batches).sum(0),
    "everything is half of what was asked for: the 2 of 2/n is missing. (No code would change, the loss would)": (
        lambda batches: _grams(batches).sum(0) / len(torch.cat(batches))
    ),
    "the mean of the inputs was taken off, as for a covariance. A layer is fed the inputs as they are": (
        lambda batches: 2 * torch.cov(torch.cat(batches).T, correction=0)
    ),
    "only the diagonal is there: products of two different channels are missing": (
        lambda batches: _right(batches).diagonal().diag()
    ),
}


def judge_hessian(given: dict, got: dict, want: dict) -> Verdict:
    x = torch.cat(given["batches"])
    if isinstance(got["hessian"], torch.Tensor) and got["hessian"].shape == (len(x), len(x)):
        return wrong(f"hessian is [{len(x)}, {len(x)}], as many as there are tokens: X X^T. Wanted X^T X, channel by channel")
    if fault := shape_fault(got, want):
        return wrong(fault)
    # A sum of len(x) products in float32 is off by at most len(x) roundings of their magnitudes' sum, two more for 2/n.
    allowed = (len(x) + 2) * ROUNDING * (2 / len(x) * (x.abs().T @ x.abs())).max().item()
    off = largest_difference(got["hessian"], want["hessian"])
    if off <= allowed:
        return right(off, allowed)
    for said, mistake in BATCH_MISTAKES.items():
        if torch.allclose(got["hessian"].float(), mistake(given["batches"]), rtol=1e-4, atol=1e-4):
            return wrong(said)
    ratio = (got["hessian"].double() / want["hessian"].double()).flatten()
    if torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4):
        return wrong(f"every entry is {ratio[0].item():.4g} times what was asked for, 2/n X^T X with n = {len(x)} tokens")
    i, j = divmod(int((got["hessian"] - want["hessian"]).abs().argmax()), x.shape[1])
    return wrong(f"entry ({i}, {j}) is {got['hessian'][i, j].item():.5g}, wanted {want['hessian'][i, j].item():.5g}")


HESSIAN = Exercise(
    id="6.1", name="hessian", title="One Hessian from uneven batches", minutes=8, difficulty=2, points=3,
    returns=("hessian",), inputs=batch_inputs, reference=hessian, judge=judge_hessian,
    mutants=(
        *(
            Mutant(like(BATCH_MISTAKES, said), said)
            for said in (
                "own means: a batch of one", "added up", "last batch alone", "number of batches", "not divided by n", "2 of 2/n",
                "a covariance", "only the diagonal",
            )
        ),
        Mutant(lambda batches: torch.cat(batches) @ torch.cat(batches).T, "X X^T"),
        Mutant(lambda batches: _right(batches) * 20 / 19, "times what was asked"),
        Mutant(lambda batches: _right(batches).triu(), "wanted"),
    ),
)  # fmt: skip


# 6.2 ------------------------------------------------------------------------------------------------------------------


def error_inputs(seed: int) -> dict:
    """Four rows, six columns, inputs that share directions."""
    g = generator(seed)
    weight = torch.randn(4, 6, generator=g)
    return {"weight": weight, "values": weight + 0.3 * torch.randn(4, 6, generator=g), "hessian": _hessian(6, g)}


def _energy(e: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return (e @ h * e).sum()


ERROR_MISTAKES = {
    "this is the squared error of the weights: H was not used": lambda w, v, h: (v - w).pow(2).sum(),
    "only the diagonal of H was used: that is each column's error on its own. What two columns do together is in the other "
    "entries": lambda w, v, h: ((v - w).pow(2) @ h.diagonal()).sum(),
    "all entries of E H E^T are added up; the trace is the diagonal alone. Rows do not meet": (
        lambda w, v, h: ((v - w) @ h @ (v - w).T).sum()
    ),
    "E H is squared: H comes in twice. E H, times E, summed": lambda w, v, h: ((v - w) @ h).pow(2).sum(),
    "this is the energy of one less that of the other, wanted the energy of their difference": (
        lambda w, v, h: _energy(v, h) - _energy(w, h)
    ),
    "this is the energy of the values, not that of their error": lambda w, v, h: _energy(v, h),
    "this is a mean over the rows, wanted their sum": lambda w, v, h: _energy(v - w, h) / len(w),
    "this is the root, wanted what is under it": lambda w, v, h: _energy(v - w, h).sqrt(),
    "this is a share of the weight's own energy, wanted the error itself": lambda w, v, h: _energy(v - w, h) / _energy(w, h),
}


def judge_error(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    weight, values, h = given.values()
    e = (values - weight).abs()
    # Sums of 6 and of 24 products, and the difference that E is: as many roundings of the magnitudes, whatever cancels.
    allowed = 34 * ROUNDING * _energy(e, h.abs()).item()
    mine, wanted = got["error"], want["error"]
    if abs(mine - wanted) <= allowed:
        return right(abs(mine - wanted), allowed)
    for said, mistake in ERROR_MISTAKES.items():
        for sign in (1, -1):
            if abs(mine - sign * mistake(weight, values, h).item()) < 1e-5 * abs(mine):
                return wrong(said)
    return wrong(f"the error is {mine:.6g}, wanted {wanted:.6g}")


OUTPUT_ERROR = Exercise(
    id="6.2", name="output_error", title="What the next layer sees", minutes=6, difficulty=2, points=2,
    returns=("error",), inputs=error_inputs, reference=gptq.output_error, judge=judge_error,
    mutants=(
        *(
            Mutant(lambda w, v, h, rule=rule: rule(w, v, h).item(), said[:40])
            for said, rule in ERROR_MISTAKES.items()
        ),
        Mutant(lambda w, v, h: _energy(v - w, h), "a plain number"),
        Mutant(lambda w, v, h: 2 * _energy(v - w, h).item(), "the error is"),
    ),
)  # fmt: skip


# 6.3 ------------------------------------------------------------------------------------------------------------------


def step_inputs(seed: int) -> dict:
    """Three rows, five columns; neither the first column nor the last is the one that is fixed."""
    g = generator(seed)
    weight = torch.randn(3, 5, generator=g)
    column = 1 + seed % 3
    moved = (0.3 + 0.7 * torch.rand(3, generator=g)) * torch.tensor([1.0, -1.0, 1.0])
    return {"weight": weight, "hessian": _hessian(5, g, 0.05), "column": column, "value": weight[:, column] + moved}


def make_up(weight: torch.Tensor, hessian: torch.Tensor, column: int, value: torch.Tensor) -> torch.Tensor:
    """Solved as it is asked, not by way of the inverse: the other columns at which the gradient 2 E H is zero."""
    others = [i for i in range(len(hessian)) if i != column]
    h, error = hessian.double(), (value - weight[:, column]).double()
    answered = torch.linalg.solve(h[others][:, others], -h[others, column][:, None] * error)  # [in - 1, out]
    moved = weight.double().clone()
    moved[:, column] = value.double()
    moved[:, others] += answered.T
    return moved.float()


def _step(weight, hessian, column, value, row=None, sign=-1.0) -> torch.Tensor:
    """The right answer by the inverse, or with another row in the place of [H^-1]_p / [H^-1]_pp; the column ends at its value."""
    inverse = torch.linalg.inv(hessian.double())
    row = inverse[column] / inverse[column, column] if row is None else row(hessian.double(), inverse, column)
    moved = weight.double() + sign * (weight[:, column] - value).double()[:, None] * row
    moved[:, column] = value.double()
    return moved.float()


def _next_alone(h, inverse, p):
    row = torch.zeros_like(h[p])
    row[p + 1] = -h[p, p + 1] / h[p + 1, p + 1]
    return row


STEP_MISTAKES = {
    "the other columns are where they were: nobody makes up for the error": {"row": lambda h, i, p: 0 * h[p]},
    "the other columns move the wrong way: they add to the error. Which sign makes 2 E H zero?": {"sign": 1.0},
    "the error was not divided by [H^-1]_pp, the diagonal entry of the column that is fixed": {"row": lambda h, i, p: i[p]},
    "the error is divided by the root of [H^-1]_pp, wanted the entry itself": {"row": lambda h, i, p: i[p] / i[p, p].sqrt()},
    "this is a row of H, not of its inverse": {"row": lambda h, i, p: h[p] / h[p, p]},
    "each of the others makes up for the error as if it were alone; together they do too much": {
        "row": lambda h, i, p: -h[p] / h.diagonal()
    },
    "only the next column moves. All others can help": {"row": _next_alone},
    "every weight's move is divided by its own entry of the diagonal, wanted that of the fixed one": {
        "row": lambda h, i, p: i[p] / i.diagonal()
    },
}


def judge_step(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    weight, hessian, column, value = given.values()
    moved, wanted = got["moved"].double(), want["moved"].double()
    # A solution in float32 is off by its condition, below 100, times a rounding for each of the 5 columns, twice over.
    allowed = 2 * 5 * CONDITION * ROUNDING * wanted.abs().max().item()
    off = largest_difference(moved, wanted)
    if off <= allowed:
        return right(off, allowed)
    fixed = (moved[:, column] - value).abs().max() <= allowed
    if (moved - weight).abs().max() <= allowed:
        return wrong("nothing has moved, not even the column that was to take its value")
    set_right = moved.clone()
    set_right[:, column] = value.double()
    for said, how in STEP_MISTAKES.items():
        if largest_difference(set_right, _step(weight, hessian, column, value, **how)) <= allowed:
            return wrong(said)
    if largest_difference(set_right, wanted) <= allowed:
        at = "where it was" if (moved[:, column] - weight[:, column]).abs().max() <= allowed else "somewhere else"
        return wrong(f"the others are right, but the fixed column is {at} and not at its value")
    if not fixed:
        return wrong(f"column {column} is at {moved[0, column].item():.4g} in row 0, wanted its value {value[0].item():.4g}")
    pull = 2 * (moved - weight.double()) @ hessian.double()
    pull[:, column] = 0
    row, where = divmod(int(pull.abs().argmax()), weight.shape[1])
    return wrong(
        f"row {row}: moving column {where} would still lower the loss (its derivative is {pull[row, where].item():.3g}, wanted 0)"
    )


MAKE_UP = Exercise(
    id="6.3", name="make_up", title="Fix one weight, solve for the others", minutes=15, difficulty=3, points=4,
    returns=("moved",), inputs=step_inputs, reference=make_up, judge=judge_step,
    mutants=(
        *(
            Mutant(lambda w, h, c, v, how=how: _step(w, h, c, v, **how), said[:45])
            for said, how in STEP_MISTAKES.items()
        ),
        Mutant(lambda w, h, c, v: w, "nothing has moved"),
        Mutant(lambda w, h, c, v: torch.where(torch.arange(5) == c, w, _step(w, h, c, v)), "fixed column is where it was"),
        Mutant(lambda w, h, c, v: _step(w, h, c, v) + 0.01 * (torch.arange(5) == (c + 1)), "would still lower the loss"),
        Mutant(lambda w, h, c, v: _step(w, h, c, 2 * v), "wanted its value"),
    ),
)  # fmt: skip


# 6.4 ------------------------------------------------------------------------------------------------------------------


def factor_inputs(seed: int) -> dict:
    return {"hessian": _hessian(6, generator(seed))}


def _inverse(hessian: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(hessian.double())


def _lower(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.cholesky(matrix.double())


def _upper(hessian: torch.Tensor) -> torch.Tensor:
    """The right answer, in float64."""
    return _lower(_inverse(hessian)).T


FACTOR_MISTAKES = {
    "this is the lower factor, L L^T = H^-1: right of its diagonal a row is empty, so no later column would ever answer, and GPTQ "
    "would be rounding. Transpose it": lambda h: _lower(_inverse(h)),
    "this is the upper factor of H itself, wanted that of its inverse": lambda h: _lower(h).T,
    "this is the lower factor of H itself, wanted the upper one of its inverse": lambda h: _lower(h),
    "this is the inverse itself, not its factor": _inverse,
    "U^T U is the inverse, but U is lower: it serves an order from the last column to the first": (
        lambda h: torch.linalg.inv(_lower(h))
    ),
    "it is upper and U U^T is the inverse, wanted U^T U: its rows are not those of the shrinking inverse": (
        lambda h: torch.linalg.inv(_lower(h)).T
    ),
    "each row is divided by its diagonal entry: the rows have the right direction, and U^T U is not the inverse": (
        lambda h: _upper(h) / _upper(h).diagonal()[:, None]
    ),
}


def judge_factor(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    upper, wanted = got["upper"].double(), want["upper"].double()
    # The inverse in float32 is off by the condition, below 100, times a rounding for each of 6 columns; its factor as much again.
    allowed = 2 * 6 * CONDITION * ROUNDING * wanted.abs().max().item()
    off = largest_difference(upper, wanted)
    if off <= allowed:
        return right(off, allowed)
    for said, mistake in FACTOR_MISTAKES.items():
        if largest_difference(upper, mistake(given["hessian"])) <= allowed:
            return wrong(said)
    if largest_difference(upper.abs(), wanted.abs()) <= allowed:
        return wrong("U^T U is the inverse, but rows have the other sign: Cholesky's diagonal is positive")
    below = upper.tril(-1).abs().max().item()
    if below > allowed:
        return wrong(f"below the diagonal there are entries up to {below:.3g}, wanted an upper triangle")
    gap = largest_difference(upper.T @ upper, _inverse(given["hessian"]))
    return wrong(f"U^T U is off the inverse of H by up to {gap:.3g}")


FACTOR = Exercise(
    id="6.4", name="inverse_factor", title="All shrinking inverses at once", minutes=8, difficulty=3, points=3,
    returns=("upper",), inputs=factor_inputs, reference=gptq.autogptq_factor, judge=judge_factor,
    mutants=(
        *(
            Mutant(lambda h, rule=rule: rule(h).float(), said[:42])
            for said, rule in FACTOR_MISTAKES.items()
        ),
        Mutant(lambda h: -_upper(h).float(), "other sign"),
        Mutant(lambda h: _upper(h).float() + 0.01 * torch.eye(6).roll(1, 0), "wanted an upper triangle"),
        Mutant(lambda h: 1.01 * _upper(h).float(), "off the inverse of H"),
    ),
)  # fmt: skip


# 6.5 ------------------------------------------------------------------------------------------------------------------


def _loop(weight, hessian, scale, zero_point, bits, factor=None, against=None, divide=1, sign=-1.0, reach=None, clamp=True):
    """The loop in float64, right or with one thing changed. Returns codes, and how near a rounding came to a tie."""
    original = weight.double()
    work = original.clone()
    upper = (factor or _upper)(hessian)
    codes, nearest, clipped = torch.zeros_like(work), 1.0, 0
    for i in range(work.shape[1]):
        steps = work[:, i] / scale[:, 0].double()
        rounded = steps.round() + zero_point[:, 0]
        codes[:, i] = rounded.clamp(0, 2**bits - 1) if clamp else rounded
        nearest = min(nearest, (0.5 - (steps - steps.round()).abs()).min().item())
        clipped += int((codes[:, i] != rounded).sum())
        value = (codes[:, i] - zero_point[:, 0]) * scale[:, 0]
        error = ((original if against else work)[:, i] - value) / upper[i, i] ** divide
        stop = work.shape[1] if reach is None else i + 1 + reach
        work[:, i + 1 : stop] += sign * error[:, None] * upper[i, i + 1 : stop]
    return codes, nearest, clipped


def loop_inputs(seed: int) -> dict:
    """Six rows, ten columns, 3 bits. No rounding is near a tie, some weights are driven off their grid, and every mistake shows."""
    g = generator(seed)
    while True:
        weight, hessian = torch.randn(6, 10, generator=g), _hessian(10, g)
        scale, zero_point = grid.scale_and_zero_point(weight, 3)
        given = {"weight": weight, "hessian": hessian, "scale": scale, "zero_point": zero_point, "bits": 3}
        codes, nearest, clipped = _loop(**given)
        # A float32 inverse of condition 100 moves a weight by some 1e-4 of a step.
        if nearest < 2e-3 or not clipped:
            continue
        mistaken = [_loop(**given, **how)[0] for how in LOOP_MISTAKES.values()]
        apart = all(not torch.equal(a, b) for i, a in enumerate([codes, *mistaken]) for b in mistaken[i:])
        if apart:
            return given


def gptq_loop(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int
) -> torch.Tensor:
    """The loop on the grid that is given, in float64. On a weight's own grids these are gptq.quantize's codes: test_lessons.py."""
    return _loop(weight, hessian, scale, zero_point, bits)[0].float()


LOOP_MISTAKES = {
    "these are the codes of rounding to nearest: no later column has answered. Does the update reach the tensor that the next "
    "column is read from? A lower factor does the same in silence: right of its diagonal a row is empty": {
        "factor": lambda h: _lower(_inverse(h))
    },
    "the later columns move the wrong way: the error times the factor's row is to be subtracted": {"sign": 1.0},
    "the error is taken against the original weight. It is that of the weight as the columns before it have left it": {
        "against": True
    },
    "the error was not divided by U_ii": {"divide": 0},
    "the error is divided by U_ii twice: rows of U are divided by the root already": {"divide": 2},
    "one inverse of H served all columns. Once a column is fixed the problem is smaller, and so is its inverse: take rows of its "
    "Cholesky factor": {"factor": _inverse},
    "the factor is that of H itself, not of its inverse": {"factor": lambda h: _lower(h).T},
    "this factor is upper and U U^T is the inverse, wanted U^T U": {"factor": lambda h: torch.linalg.inv(_lower(h)).T},
    "only the next column answers, wanted all that are still to come": {"reach": 1},
}


def judge_loop(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    codes, wanted, largest = got["codes"].double(), want["codes"].double(), 2 ** given["bits"] - 1
    if not torch.equal(codes, codes.round()):
        return wrong("codes are whole numbers; these look like values read back from them")
    if torch.equal(codes, wanted):
        return right()
    if codes.min() < 0 or codes.max() > largest:
        if torch.equal(codes, _loop(**given, clamp=False)[0]) or torch.equal(codes.clamp(0, largest), wanted):
            return wrong(f"codes go from {codes.min():g} to {codes.max():g}: a weight that was driven off its grid must be clamped")
        return wrong(f"codes go from {codes.min():g} to {codes.max():g}, wanted 0 to {largest}. Where is the zero-point added?")
    for said, how in LOOP_MISTAKES.items():
        if torch.equal(codes, _loop(**given, **how)[0]):
            return wrong(said)
    shifted = given | {"zero_point": torch.zeros_like(given["zero_point"])}
    if torch.equal(codes, _loop(**shifted)[0]):
        return wrong("the zero-point was not added: negative weights all got code 0")
    column = int((codes != wanted).any(0).nonzero()[0])
    row = int((codes != wanted)[:, column].nonzero()[0])
    said = f"column {column}, row {row} has code {codes[row, column]:g}, wanted {wanted[row, column]:g}"
    return wrong(f"{said}. " + ("All columns before it are right" if column else "Nothing has been made up for yet at column 0"))


GPTQ_LOOP = Exercise(
    id="6.5", name="gptq_loop", title="The column loop", minutes=20, difficulty=4, points=5,
    returns=("codes",), inputs=loop_inputs, reference=gptq_loop, judge=judge_loop,
    mutants=(
        *(
            Mutant(lambda *given, how=how: _loop(*given, **how)[0], said[:40])
            for said, how in LOOP_MISTAKES.items()
        ),
        Mutant(lambda *given: _loop(*given, clamp=False)[0], "must be clamped"),
        Mutant(lambda w, h, s, z, b: _loop(w, h, s, 0 * z, b)[0], "zero-point was not added"),
        Mutant(lambda w, h, s, z, b: (_loop(w, h, s, z, b)[0] - z) * s, "read back"),
        Mutant(lambda w, h, s, z, b: _loop(w, h, s, z, b)[0] - z, "Where is the zero-point added"),
        Mutant(lambda w, h, s, z, b: _loop(w, h, s, z, b)[0].flip(0), "column 0"),
    ),
)  # fmt: skip


# 6.6 ------------------------------------------------------------------------------------------------------------------

SPREAD, GAIN = 1000, 0.5


def two_inputs(seed: int) -> dict:
    return {"size": 16 + seed % 17}


def _unequal(size: int) -> torch.Tensor:
    return torch.logspace(0, 4, size).diag()


def _equal(size: int, shared: float = 0.9) -> torch.Tensor:
    return (1 - shared) * torch.eye(size) + shared


def two_hessians(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs that are not correlated, however unequal; and inputs that are, however equal."""
    return _unequal(size), _equal(size)


def _not_one(hessian: torch.Tensor) -> str | None:
    """Why a matrix cannot be a Hessian with an inverse, or None."""
    hessian = hessian.float()
    gap = (hessian - hessian.T).abs().max().item()
    if gap > 1e-5 * hessian.abs().max():
        return f"is not symmetric: it differs from its transpose by up to {gap:.3g}, and 2/n X^T X cannot"
    if torch.linalg.cholesky_ex(hessian)[1]:
        return "is not positive definite: it has no Cholesky factor, so no inputs with an inverse give it"
    return None


def judge_two(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    size = given["size"]
    weight = torch.randn(32, size, generator=generator(size))
    nearest = rtn.quantize(weight, 3, None)
    changed, losses = {}, {}
    for name, h in got.items():
        if fault := _not_one(h):
            return wrong(f"{name} {fault}")
        codes = gptq.quantize(weight, h, 3, None, damping=0.0)
        changed[name] = (codes.codes != nearest.codes).float().mean().item()
        losses[name] = gptq.output_error(weight, codes.dequantize(), h) / gptq.output_error(weight, nearest.dequantize(), h)
    spread = {name: (h.diagonal().max() / h.diagonal().min()).item() for name, h in got.items()}
    if changed["unequal"]:
        share = f"unequal: {100 * changed['unequal']:.0f} % of the codes differ from rounding, wanted none"
        return wrong(f"{share}. A column answers to another's error through the entry of H^-1 that they share")
    if spread["unequal"] < SPREAD:
        return wrong(
            f"unequal: GPTQ is rounding here, but the loudest column counts {spread['unequal']:.3g} times the quietest, "
            f"wanted {SPREAD} times at least"
        )
    if spread["equal"] > 1.0001:
        return wrong(f"equal: the diagonal is not: its largest entry is {spread['equal']:.4g} times its smallest")
    if not changed["equal"]:
        return wrong("equal: no code differs from rounding. What do columns need in common to help each other?")
    if losses["equal"] > GAIN:
        return wrong(f"equal: the output error is {losses['equal']:.2f} of that of rounding, wanted {GAIN} at most: correlate more")
    return right()


TWO = Exercise(
    id="6.6", name="two_hessians", title="When GPTQ is rounding, and when it is not", minutes=10, difficulty=3, points=3,
    returns=("unequal", "equal"), inputs=two_inputs, reference=two_hessians, judge=judge_two,
    mutants=(
        Mutant(lambda n: (torch.eye(n), _equal(n)), "wanted 1000 times"),
        Mutant(lambda n: (_equal(n), _equal(n)), "of the codes differ from rounding, wanted none"),
        Mutant(lambda n: (_unequal(n), _unequal(n)), "the diagonal is not"),
        Mutant(lambda n: (_unequal(n), torch.eye(n)), "help each other"),
        Mutant(lambda n: (_unequal(n), _equal(n, 0.4)), "correlate more"),
        Mutant(lambda n: (_unequal(n), torch.ones(n, n)), "equal is not positive definite"),
        Mutant(lambda n: (torch.linspace(-1, 1, n).diag(), _equal(n)), "unequal is not positive definite"),
        Mutant(lambda n: (_unequal(n), _equal(n).triu()), "not symmetric"),
        Mutant(lambda n: (_unequal(n).diagonal(), _equal(n)), "has shape"),
    ),
)  # fmt: skip


EXERCISES = (HESSIAN, OUTPUT_ERROR, MAKE_UP, FACTOR, GPTQ_LOOP, TWO)
