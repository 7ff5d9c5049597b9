"""Chapter 6: what one rounded weight asks of the others, and the loop that asks it of every column."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch.linalg import cholesky, inv

from labsupport.exercises.compare import largest_difference, shown
from labsupport.exercises.form import Exercise, Fault, Mistake, Mutant, generator, mistakes_by_option, mistakes_of, right
from labsupport.pipeline.block import InputStatistics
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
    return {"batches": [(0.5 + torch.randn(n, 7, generator=g)) * (1 + i) for i, n in enumerate((5, 1, 12, 2))]}


def hessian(batches: list[torch.Tensor]) -> torch.Tensor:
    """labsupport's sums over batches, divided once."""
    fed = InputStatistics.empty(batches[0].shape[1])
    for x in batches:
        fed.add(x)
    return fed.hessian


def _of_grams(finish):
    """An answer: what `finish` makes of the batches' X^T X [batches, in, in] and numbers of tokens [batches, 1, 1]."""
    return lambda batches: finish(torch.stack([x.T @ x for x in batches]), torch.tensor([[[float(len(x))]] for x in batches]))


def _by_one_factor(given: dict, got: dict, want: dict) -> str | None:
    ratio = (got["hessian"].double() / want["hessian"].double()).flatten()
    if not torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4):
        return None
    tokens = sum(map(len, given["batches"]))
    return f"every entry is {ratio[0].item():.4g} times what was asked for, 2/n X^T X with n = {tokens} tokens"


def _hessian_limit(given: dict, want: dict) -> float:
    """A sum of n products in float32 is off by at most n roundings of their magnitudes' sum, two more for 2/n."""
    x = torch.cat(given["batches"])
    return (len(x) + 2) * ROUNDING * (2 / len(x) * (x.abs().T @ x.abs())).max().item()


HESSIAN = Exercise(
    id="6.1", name="hessian", title="One Hessian from uneven batches", minutes=8, difficulty=2, points=3,
    returns=("hessian",), inputs=batch_inputs, reference=hessian,
    allowed=_hessian_limit, close=lambda given, want: 1e-4 * want["hessian"].abs().max().item(), otherwise=_by_one_factor,
    faults=(
        Fault("hessian is [{n}, {n}], as many as there are tokens: X X^T. Wanted X^T X, channel by channel",
              lambda given, got, want: {"n": n} if got["hessian"].shape == ((n := sum(map(len, given["batches"]))), n) else None,
              (lambda batches: torch.cat(batches) @ torch.cat(batches).T,), early=True),
    ),
    mistakes=(
        *mistakes_of(_of_grams, {
            "this is the mean of the batches' own means: a batch of one token counts as much as one of many. Sum first, then "
            "divide once": lambda grams, tokens: (2 * grams / tokens).mean(0),
            "the batches' own means are added up: sum first, then divide once, by the number of all tokens":
                lambda grams, tokens: (2 * grams / tokens).sum(0),
            "this is the last batch alone: the others were overwritten": lambda grams, tokens: (2 * grams / tokens)[-1],
            "the sum is divided by the number of batches. n counts tokens, the rows of X": lambda grams, tokens: 2 * grams.mean(0),
            "the sum is not divided by n, the number of tokens": lambda grams, tokens: 2 * grams.sum(0),
            "everything is half of what was asked for: the 2 of 2/n is missing. (No code would change, the loss would)":
                lambda grams, tokens: grams.sum(0) / tokens.sum(),
            "only the diagonal is there: products of two different channels are missing":
                lambda grams, tokens: (2 * grams.sum(0) / tokens.sum()).diagonal().diag(),
        }),
        Mistake("the mean of the inputs was taken off, as for a covariance. A layer is fed the inputs as they are",
                lambda batches: 2 * torch.cov(torch.cat(batches).T, correction=0)),
    ),
    others=(Mutant(_of_grams(lambda grams, tokens: 2 * grams.sum(0) / 19), "times what was asked"),
            Mutant(_of_grams(lambda grams, tokens: 2 * grams.sum(0).triu() / 20), "hessian[1, 0]: got 0, wanted")),
)  # fmt: skip


# 6.2 ------------------------------------------------------------------------------------------------------------------
def error_inputs(seed: int) -> dict:
    """Four rows, six columns, inputs that share directions."""
    g = generator(seed)
    weight = torch.randn(4, 6, generator=g)
    return {"weight": weight, "values": weight + 0.3 * torch.randn(4, 6, generator=g), "hessian": _hessian(6, g)}


def _energy(e: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return (e @ h * e).sum()


def _error(of):
    """An answer: what `of` makes of weight, values and hessian, as a number."""
    return lambda w, v, h: of(w, v, h).item()


OUTPUT_ERROR = Exercise(
    id="6.2", name="output_error", title="What the next layer sees", minutes=6, difficulty=2, points=2,
    returns=("error",), inputs=error_inputs, reference=gptq.output_error,
    # Sums of 6 and of 24 products, and the difference that E is: as many roundings of the magnitudes, whatever cancels.
    allowed=lambda given, want: 34 * ROUNDING * _energy((given["values"] - given["weight"]).abs(), given["hessian"].abs()).item(),
    close=lambda given, want: 1e-4,  # of energies near 10
    mistakes=mistakes_of(_error, {
        "this is the squared error of the weights: H was not used": lambda w, v, h: (v - w).pow(2).sum(),
        "only the diagonal of H was used: that is each column's error on its own. What two columns do together is in the other "
        "entries": lambda w, v, h: ((v - w).pow(2) @ h.diagonal()).sum(),
        "all entries of E H E^T are added up; the trace is the diagonal alone. Rows do not meet":
            lambda w, v, h: ((v - w) @ h @ (v - w).T).sum(),
        "E H is squared: H comes in twice. E H, times E, summed": lambda w, v, h: ((v - w) @ h).pow(2).sum(),
        "this is the energy of one less that of the other, wanted the energy of their difference": [
            lambda w, v, h: _energy(v, h) - _energy(w, h), lambda w, v, h: _energy(w, h) - _energy(v, h)],
        "this is the energy of the values, not that of their error": lambda w, v, h: _energy(v, h),
        "this is a mean over the rows, wanted their sum": lambda w, v, h: _energy(v - w, h) / len(w),
        "this is the root, wanted what is under it": lambda w, v, h: _energy(v - w, h).sqrt(),
        "this is a share of the weight's own energy, wanted the error itself": lambda w, v, h: _energy(v - w, h) / _energy(w, h),
    }),
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


def _step(weight, hessian, column, value, row=lambda h, inverse, p: inverse[p] / inverse[p, p], sign=-1.0) -> torch.Tensor:
    """The right answer by the inverse, or with another row in the place of [H^-1]_p / [H^-1]_pp; the column ends at its value."""
    h = hessian.double()
    moved = weight.double() + sign * (weight[:, column] - value).double()[:, None] * row(h, inv(h), column)
    moved[:, column] = value.double()
    return moved.float()


def _step_limit(given: dict, want: dict) -> float:
    """A solution in float32 is off by its condition, below 100, times a rounding for each of the 5 columns, twice over."""
    return 2 * 5 * CONDITION * ROUNDING * want["moved"].abs().max().item()


def _differ(given: dict, a: torch.Tensor, b: torch.Tensor) -> tuple[bool, bool]:
    """Whether two tensors differ in the fixed column, and in any other."""
    far = ((a.double() - b.double()).abs() > _step_limit(given, {"moved": b})).any(0)
    fixed = far[given["column"]]
    return bool(fixed), bool(far.sum() > fixed)


def _fixed_elsewhere(given: dict, got: dict, want: dict) -> dict | None:
    if _differ(given, got["moved"], want["moved"]) != (True, False):
        return None
    return {"at": "somewhere else" if _differ(given, got["moved"], given["weight"])[0] else "where it was"}


def _where_step(given: dict, got: dict, want: dict) -> str:
    (weight, hessian, column, value), moved = given.values(), got["moved"]
    if _differ(given, moved, want["moved"])[0]:
        row = int((moved[:, column] - value).abs().argmax())
        have, wanted = shown(moved[row, column].item(), value[row].item())
        return f"column {column} is at {have} in row {row}, wanted its value {wanted}"
    pull = 2 * (moved.double() - weight.double()) @ hessian.double()
    pull[:, column] = 0
    row, where = divmod(int(pull.abs().argmax()), weight.shape[1])
    slope = f"its derivative is {pull[row, where].item():.3g}, wanted 0"
    return f"row {row}: moving column {where} would still lower the loss ({slope})"


MAKE_UP = Exercise(
    id="6.3", name="make_up", title="Fix one weight, solve for the others", minutes=15, difficulty=3, points=4,
    returns=("moved",), inputs=step_inputs, reference=make_up, allowed=_step_limit, otherwise=_where_step,
    # Whether the fixed column has its value or not: the mistake is in the others.
    alike=lambda given, got, theirs: not _differ(given, got["moved"], theirs["moved"])[1],
    faults=(
        Fault("nothing has moved, not even the column that was to take its value",
              lambda given, got, want: not any(_differ(given, got["moved"], given["weight"])), (lambda w, h, c, v: w,)),
        Fault("the others are right, but the fixed column is {at} and not at its value", _fixed_elsewhere,
              (lambda w, h, c, v: torch.where(torch.arange(5) == c, w, _step(w, h, c, v)),
               lambda w, h, c, v: _step(w, h, c, v) + (torch.arange(5) == c))),
    ),
    mistakes=mistakes_by_option(_step, {
        "the other columns are where they were: nobody makes up for the error": {"row": lambda h, i, p: 0 * h[p]},
        "the other columns move the wrong way: they add to the error. Which sign makes 2 E H zero?": {"sign": 1.0},
        "the error was not divided by [H^-1]_pp, the diagonal entry of the column that is fixed": {"row": lambda h, i, p: i[p]},
        "the error is divided by the root of [H^-1]_pp, wanted the entry itself": {"row": lambda h, i, p: i[p] / i[p, p].sqrt()},
        "this is a row of H, not of its inverse": {"row": lambda h, i, p: h[p] / h[p, p]},
        "each of the others makes up for the error as if it were alone; together they do too much": {
            "row": lambda h, i, p: -h[p] / h.diagonal()},
        "only the next column moves. All others can help": {
            "row": lambda h, i, p: -h[p] / h.diagonal() * (torch.arange(5) == p + 1)},
        "every weight's move is divided by its own entry of the diagonal, wanted that of the fixed one": {
            "row": lambda h, i, p: i[p] / i.diagonal()},
    }),
    others=(Mutant(lambda w, h, c, v: _step(w, h, c, v) + 0.01 * (torch.arange(5) == c + 1), "would still lower the loss"),
            Mutant(lambda w, h, c, v: _step(w, h, c, 2 * v), "wanted its value")),
)  # fmt: skip


# 6.4 ------------------------------------------------------------------------------------------------------------------
def factor_inputs(seed: int) -> dict:
    return {"hessian": _hessian(6, generator(seed))}


def _factor(of):
    """An answer: what `of` makes of H and its inverse, in float64."""
    return lambda hessian: of(hessian.double(), inv(hessian.double())).float()


def _factor_limit(given: dict, want: dict) -> float:
    """The inverse in float32 is off by the condition, below 100, times a rounding for each of 6 columns; its factor, as much."""
    return 2 * 6 * CONDITION * ROUNDING * want["upper"].abs().max().item()


def _where_factor(given: dict, got: dict, want: dict) -> str:
    upper = got["upper"].double()
    below = upper.tril(-1).abs().max().item()
    if below > _factor_limit(given, want):
        return f"below the diagonal there are entries up to {below:.3g}, wanted an upper triangle"
    return f"U^T U is off the inverse of H by up to {largest_difference(upper.T @ upper, inv(given['hessian'].double())):.3g}"


FACTOR = Exercise(
    id="6.4", name="inverse_factor", title="All shrinking inverses at once", minutes=8, difficulty=3, points=3,
    returns=("upper",), inputs=factor_inputs, reference=gptq.autogptq_factor, allowed=_factor_limit, otherwise=_where_factor,
    faults=(
        Fault("U^T U is the inverse, but rows have the other sign: Cholesky's diagonal is positive",
              lambda given, got, want: (got["upper"].diagonal() < 0).any()
              and largest_difference(got["upper"].abs(), want["upper"].abs()) <= _factor_limit(given, want),
              (_factor(lambda h, i: -cholesky(i).T), _factor(lambda h, i: cholesky(i).T * (1 - 2 * torch.eye(6)[1])[:, None]))),
    ),
    mistakes=mistakes_of(_factor, {
        "this is the lower factor, L L^T = H^-1: right of its diagonal a row is empty, so no later column would ever answer, and "
        "GPTQ would be rounding. Transpose it": lambda h, i: cholesky(i),
        "this is the upper factor of H itself, wanted that of its inverse": lambda h, i: cholesky(h).T,
        "this is the lower factor of H itself, wanted the upper one of its inverse": lambda h, i: cholesky(h),
        "this is the inverse itself, not its factor": lambda h, i: i,
        "U^T U is the inverse, but U is lower: it serves an order from the last column to the first":
            lambda h, i: inv(cholesky(h)),
        "it is upper and U U^T is the inverse, wanted U^T U: its rows are not those of the shrinking inverse":
            lambda h, i: inv(cholesky(h)).T,
        "each row is divided by its diagonal entry: the rows have the right direction, and U^T U is not the inverse":
            lambda h, i: (cholesky(i) / cholesky(i).diagonal()).T,
    }),
    others=(Mutant(_factor(lambda h, i: cholesky(i).T + 0.01 * torch.eye(6).roll(1, 0)), "wanted an upper triangle"),
            Mutant(_factor(lambda h, i: 1.01 * cholesky(i).T), "off the inverse of H")),
)  # fmt: skip


# 6.5 ------------------------------------------------------------------------------------------------------------------
def _loop(
    weight, hessian, scale, zero_point, bits, factor=lambda h: cholesky(inv(h)).T, original=False, divide=1, sign=-1.0, reach=None,
    clamp=True, stored=lambda rounded, code, zero: code, steps=None,
):  # fmt: skip
    """The loop in float64, right or with one thing changed. steps: gets each column as it is before it is rounded, in steps.

    stored: what is returned of a code before and after the clamp. reach: how many of the later columns answer, None for all.
    """
    work, scale, zero = weight.double().clone(), scale[:, 0].double(), zero_point[:, 0].double()
    upper, codes = factor(hessian.double()), []
    for i in range(work.shape[1]):
        in_steps = work[:, i] / scale
        rounded = in_steps.round() + zero
        code = rounded.clamp(0, 2**bits - 1) if clamp else rounded
        codes.append(stored(rounded, code, zero))
        error = ((weight if original else work)[:, i] - (code - zero) * scale) / upper[i, i] ** divide
        work[:, i + 1 :][:, :reach] += sign * error[:, None] * upper[i, i + 1 :][:reach]
        if steps is not None:
            steps.append(in_steps)
    return torch.stack(codes, 1)


@cache
def loop_inputs(seed: int) -> dict:
    """Six rows, ten columns, 3 bits. No rounding is near a tie, some weights are driven off their grid, and every mistake shows."""
    g = generator(seed)
    while True:
        weight, hessian = torch.randn(6, 10, generator=g), _hessian(10, g)
        scale, zero_point = grid.scale_and_zero_point(weight, 3)
        given = {"weight": weight, "hessian": hessian, "scale": scale, "zero_point": zero_point, "bits": 3}
        columns: list[torch.Tensor] = []
        codes, steps = [_loop(**given, steps=columns)], torch.stack(columns)
        # A float32 inverse of condition 100 moves a weight by some 1e-4 of a step.
        if (steps - steps.round()).abs().max() < 0.5 - 2e-3:
            codes += [mistake.answer(*given.values()) for mistake in GPTQ_LOOP.mistakes]
            if len({each.numpy().tobytes() for each in codes}) == len(codes):
                return given


def gptq_loop(weight, hessian, scale, zero_point, bits: int) -> torch.Tensor:
    """The loop on the grid that is given, in float64. On a weight's own grids these are gptq.quantize's codes: test_lessons.py."""
    return _loop(weight, hessian, scale, zero_point, bits).float()


def _where_loop(given: dict, got: dict, want: dict) -> str:
    codes, largest = got["codes"], 2 ** given["bits"] - 1
    if codes.min() < 0 or codes.max() > largest:
        return f"codes go from {codes.min():g} to {codes.max():g}, wanted 0 to {largest}"
    column = int((codes != want["codes"]).any(0).nonzero()[0])
    row = int((codes != want["codes"])[:, column].nonzero()[0])
    before = "All columns before it are right" if column else "At column 0 nothing has been made up for yet"
    return f"column {column}, row {row} has code {codes[row, column]:g}, wanted {want['codes'][row, column]:g}. {before}"


GPTQ_LOOP = Exercise(
    id="6.5", name="gptq_loop", title="The column loop", minutes=20, difficulty=4, points=5,
    returns=("codes",), inputs=loop_inputs, reference=gptq_loop, otherwise=_where_loop,
    faults=(
        Fault("codes are whole numbers, and {value:.4g} is not. Are these values that were read back from codes?",
              lambda given, got, want: (odd := got["codes"][got["codes"].frac() != 0]).numel() and {"value": odd[0].item()},
              (lambda w, h, s, z, b: (_loop(w, h, s, z, b) - z) * s,)),
    ),
    mistakes=mistakes_by_option(_loop, {
        "these are the codes of rounding to nearest: no later column has answered. Does the update reach the tensor that the "
        "next column is read from? A lower factor does the same in silence: right of its diagonal a row is empty": {
            "factor": lambda h: cholesky(inv(h))},
        "the later columns move the wrong way: the error times the factor's row is to be subtracted": {"sign": 1.0},
        "the error is taken against the original weight. It is that of the weight as the columns before it have left it": {
            "original": True},
        "the error was not divided by U_ii": {"divide": 0},
        "the error is divided by U_ii twice: rows of U are divided by the root already": {"divide": 2},
        "one inverse of H served all columns. Once a column is fixed the problem is smaller, and so is its inverse: take rows "
        "of its Cholesky factor": {"factor": inv},
        "the factor is that of H itself, not of its inverse": {"factor": lambda h: cholesky(h).T},
        "this factor is upper and U U^T is the inverse, wanted U^T U": {"factor": lambda h: inv(cholesky(h)).T},
        "only the next column answers, wanted all that are still to come": {"reach": 1},
        "a weight that was driven off its grid has a code below 0 or above 2**bits - 1: it must be clamped": [
            {"clamp": False}, {"stored": lambda rounded, code, zero: rounded}],
        "the zero-point is missing in the codes that are returned, though the values were read back with it": {
            "stored": lambda rounded, code, zero: code - zero},
        "the zero-point was not added: negative weights all got code 0": lambda w, h, s, z, b: _loop(w, h, s, 0 * z, b),
    }),
    others=(Mutant(partial(_loop, stored=lambda rounded, code, zero: code + 3), "wanted 0 to 7"),
            Mutant(lambda *given: _loop(*given).flip(0), "At column 0"),
            Mutant(lambda *given: _loop(*given) * (torch.arange(10) < 9), "All columns before it are right")),
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


def _fault_of_two(given: dict, got: dict, want: dict) -> str | None:
    for name, matrix in got.items():
        hessian = matrix.float()
        if not hessian.isfinite().all():
            return f"{name} holds numbers beyond float32, in which GPTQ computes"
        if (gap := largest_difference(hessian, hessian.T)) > 1e-5 * hessian.abs().max():
            return f"{name} is not symmetric: it differs from its transpose by up to {gap:.3g}, and 2/n X^T X cannot"
        if torch.linalg.cholesky_ex(hessian)[1]:
            return f"{name} is not positive definite: it has no Cholesky factor, so no inputs with an inverse give it"
    weight = torch.randn(32, given["size"], generator=generator(given["size"]))
    nearest = rtn.quantize(weight, 3, None)
    unequal, equal = (gptq.quantize(weight, hessian, 3, None, damping=0.0) for hessian in got.values())
    changed, helped = (100 * (q.codes != nearest.codes).float().mean().item() for q in (unequal, equal))
    loss, of_rounding = (gptq.output_error(weight, q.dequantize(), got["equal"]) for q in (equal, nearest))
    spread, uneven = ((h.diagonal().max() / h.diagonal().min()).item() for h in got.values())
    return next((message for fault, message in (
        (changed, f"unequal: {changed:.2g} % of the codes differ from rounding, wanted none. A column answers to another's error "
                  "through the entry of H^-1 that they share"),
        (spread < SPREAD, f"unequal: GPTQ is rounding here, but the loudest column counts {spread:.6g} times the quietest, wanted "
                          f"{SPREAD} times at least"),
        (uneven > 1.0001, f"equal: the diagonal is not: its largest entry is {uneven:.6g} times its smallest"),
        (not helped, "equal: no code differs from rounding. What do columns need in common to help each other?"),
        (loss > GAIN * of_rounding, f"equal: the output error is {loss / of_rounding:.3g} of that of rounding, wanted {GAIN} at "
                                    "most: correlate more"),
    ) if fault), None)  # fmt: skip


TWO = Exercise(
    id="6.6", name="two_hessians", title="When GPTQ is rounding, and when it is not", minutes=10, difficulty=3, points=3,
    returns=("unequal", "equal"), inputs=two_inputs, reference=two_hessians,
    accepts=lambda given, got, want: None if _fault_of_two(given, got, want) else right(), otherwise=_fault_of_two,
    others=(
        Mutant(lambda n: (torch.eye(n), _equal(n)), "wanted 1000 times"),
        Mutant(lambda n: (_equal(n), _equal(n)), "of the codes differ from rounding, wanted none"),
        Mutant(lambda n: (_unequal(n), _unequal(n)), "the diagonal is not"),
        Mutant(lambda n: (_unequal(n), torch.eye(n)), "help each other"),
        Mutant(lambda n: (_unequal(n), _equal(n, 0.4)), "correlate more"),
        Mutant(lambda n: (_unequal(n), torch.ones(n, n)), "equal is not positive definite"),
        Mutant(lambda n: (torch.linspace(-1, 1, n).diag(), _equal(n)), "unequal is not positive definite"),
        Mutant(lambda n: (_unequal(n), _equal(n).triu()), "not symmetric"),
        Mutant(lambda n: (_unequal(n).diagonal(), _equal(n)), "has shape"),
        Mutant(lambda n: (1e300 * _unequal(n).double(), _equal(n)), "unequal holds numbers beyond float32"),
    ),
)  # fmt: skip


EXERCISES = (HESSIAN, OUTPUT_ERROR, MAKE_UP, FACTOR, GPTQ_LOOP, TWO)
