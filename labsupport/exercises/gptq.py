"""Chapter 6: what one rounded weight asks of the others, and the loop that asks it of every column."""

from __future__ import annotations

import copy
import functools

import torch

from labsupport.exercises.compare import first_difference, got_and_wanted, largest_difference, shown
from labsupport.exercises.form import Exercise, Fault, Mistake, Mutant, generator, right
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


def _of_grams(finish):
    """An answer: what `finish` makes of the batches' X^T X [batches, in, in] and numbers of tokens [batches, 1, 1]."""
    return lambda batches: finish(
        torch.stack([x.T @ x for x in batches]), torch.tensor([float(len(x)) for x in batches])[:, None, None]
    )


_right = _of_grams(lambda grams, tokens: 2 * grams.sum(0) / tokens.sum())


def _where_hessian(given: dict, got: dict, want: dict) -> str:
    ratio = (got["hessian"].double() / want["hessian"].double()).flatten()
    if torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4):
        tokens = sum(map(len, given["batches"]))
        return f"every entry is {ratio[0].item():.4g} times what was asked for, 2/n X^T X with n = {tokens} tokens"
    place, have, wanted = first_difference(got, want, _hessian_limit(given, want))
    return f"{place}: {got_and_wanted(have, wanted)}"


def _hessian_limit(given: dict, want: dict) -> float:
    """A sum of n products in float32 is off by at most n roundings of their magnitudes' sum, two more for 2/n."""
    x = torch.cat(given["batches"])
    return (len(x) + 2) * ROUNDING * (2 / len(x) * (x.abs().T @ x.abs())).max().item()


HESSIAN = Exercise(
    id="6.1", name="hessian", title="One Hessian from uneven batches", minutes=8, difficulty=2, points=3,
    returns=("hessian",), inputs=batch_inputs, reference=hessian,
    allowed=_hessian_limit, close=lambda given, want: 1e-4 * want["hessian"].abs().max().item(), otherwise=_where_hessian,
    faults=(
        Fault("hessian is [{n}, {n}], as many as there are tokens: X X^T. Wanted X^T X, channel by channel",
              lambda given, got, want: {"n": n} if got["hessian"].shape == ((n := sum(map(len, given["batches"]))), n) else None,
              (lambda batches: torch.cat(batches) @ torch.cat(batches).T,), early=True),
    ),
    mistakes=(
        Mistake("this is the mean of the batches' own means: a batch of one token counts as much as one of many. Sum first, then "
                "divide once", _of_grams(lambda grams, tokens: (2 * grams / tokens).mean(0))),
        Mistake("the batches' own means are added up: sum first, then divide once, by the number of all tokens",
                _of_grams(lambda grams, tokens: (2 * grams / tokens).sum(0))),
        Mistake("this is the last batch alone: the others were overwritten",
                _of_grams(lambda grams, tokens: (2 * grams / tokens)[-1])),
        Mistake("the sum is divided by the number of batches. n counts tokens, the rows of X",
                _of_grams(lambda grams, tokens: 2 * grams.mean(0))),
        Mistake("the sum is not divided by n, the number of tokens", _of_grams(lambda grams, tokens: 2 * grams.sum(0))),
        Mistake("everything is half of what was asked for: the 2 of 2/n is missing. (No code would change, the loss would)",
                _of_grams(lambda grams, tokens: grams.sum(0) / tokens.sum())),
        Mistake("the mean of the inputs was taken off, as for a covariance. A layer is fed the inputs as they are",
                lambda batches: 2 * torch.cov(torch.cat(batches).T, correction=0)),
        Mistake("only the diagonal is there: products of two different channels are missing",
                lambda batches: _right(batches).diagonal().diag()),
    ),
    others=(Mutant(lambda batches: _right(batches) * 20 / 19, "times what was asked"),
            Mutant(lambda batches: _right(batches).triu(), "hessian[1, 0]: got 0, wanted")),
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
    mistakes=(
        Mistake("this is the squared error of the weights: H was not used", _error(lambda w, v, h: (v - w).pow(2).sum())),
        Mistake("only the diagonal of H was used: that is each column's error on its own. What two columns do together is in the "
                "other entries", _error(lambda w, v, h: ((v - w).pow(2) @ h.diagonal()).sum())),
        Mistake("all entries of E H E^T are added up; the trace is the diagonal alone. Rows do not meet",
                _error(lambda w, v, h: ((v - w) @ h @ (v - w).T).sum())),
        Mistake("E H is squared: H comes in twice. E H, times E, summed", _error(lambda w, v, h: ((v - w) @ h).pow(2).sum())),
        *(Mistake("this is the energy of one less that of the other, wanted the energy of their difference",
                  _error(lambda w, v, h, sign=sign: sign * (_energy(v, h) - _energy(w, h)))) for sign in (1, -1)),
        Mistake("this is the energy of the values, not that of their error", _error(lambda w, v, h: _energy(v, h))),
        Mistake("this is a mean over the rows, wanted their sum", _error(lambda w, v, h: _energy(v - w, h) / len(w))),
        Mistake("this is the root, wanted what is under it", _error(lambda w, v, h: _energy(v - w, h).sqrt())),
        Mistake("this is a share of the weight's own energy, wanted the error itself",
                _error(lambda w, v, h: _energy(v - w, h) / _energy(w, h))),
    ),
    others=(Mutant(lambda w, v, h: _energy(v - w, h), "a plain number"),
            Mutant(_error(lambda w, v, h: 2 * _energy(v - w, h)), "error: got")),
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


def _step_answer(**how):
    return lambda weight, hessian, column, value: _step(weight, hessian, column, value, **how)


def _step_limit(given: dict, want: dict) -> float:
    """A solution in float32 is off by its condition, below 100, times a rounding for each of the 5 columns, twice over."""
    return 2 * 5 * CONDITION * ROUNDING * want["moved"].abs().max().item()


def _far(given: dict, a: torch.Tensor, b: torch.Tensor, want: dict, fixed: bool) -> bool:
    """Whether two tensors differ: in the fixed column, or in the others."""
    there = (torch.arange(len(given["hessian"])) == given["column"]) == fixed
    return largest_difference(a[:, there], b[:, there]) > _step_limit(given, want)


def _fixed_elsewhere(given: dict, got: dict, want: dict) -> dict | None:
    if _far(given, got["moved"], want["moved"], want, fixed=False) or not _far(
        given, got["moved"], want["moved"], want, fixed=True
    ):
        return None
    return {"at": "somewhere else" if _far(given, got["moved"], given["weight"], want, fixed=True) else "where it was"}


def _where_step(given: dict, got: dict, want: dict) -> str:
    (weight, hessian, column, value), moved = given.values(), got["moved"]
    if _far(given, moved, want["moved"], want, fixed=True):
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
    alike=lambda given, got, theirs: not _far(given, got["moved"], theirs["moved"], theirs, fixed=False),
    faults=(
        Fault("nothing has moved, not even the column that was to take its value",
              lambda given, got, want: largest_difference(got["moved"], given["weight"]) <= _step_limit(given, want),
              (lambda w, h, c, v: w,)),
        Fault("the others are right, but the fixed column is {at} and not at its value", _fixed_elsewhere,
              (lambda w, h, c, v: torch.where(torch.arange(5) == c, w, _step(w, h, c, v)),
               lambda w, h, c, v: _step(w, h, c, v) + (torch.arange(5) == c))),
    ),
    mistakes=(
        Mistake("the other columns are where they were: nobody makes up for the error", _step_answer(row=lambda h, i, p: 0 * h[p])),
        Mistake("the other columns move the wrong way: they add to the error. Which sign makes 2 E H zero?",
                _step_answer(sign=1.0)),
        Mistake("the error was not divided by [H^-1]_pp, the diagonal entry of the column that is fixed",
                _step_answer(row=lambda h, i, p: i[p])),
        Mistake("the error is divided by the root of [H^-1]_pp, wanted the entry itself",
                _step_answer(row=lambda h, i, p: i[p] / i[p, p].sqrt())),
        Mistake("this is a row of H, not of its inverse", _step_answer(row=lambda h, i, p: h[p] / h[p, p])),
        Mistake("each of the others makes up for the error as if it were alone; together they do too much",
                _step_answer(row=lambda h, i, p: -h[p] / h.diagonal())),
        Mistake("only the next column moves. All others can help", _step_answer(row=_next_alone)),
        Mistake("every weight's move is divided by its own entry of the diagonal, wanted that of the fixed one",
                _step_answer(row=lambda h, i, p: i[p] / i.diagonal())),
    ),
    others=(Mutant(lambda w, h, c, v: _step(w, h, c, v) + 0.01 * (torch.arange(5) == c + 1), "would still lower the loss"),
            Mutant(lambda w, h, c, v: _step(w, h, c, 2 * v), "wanted its value")),
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


def _factor(of):
    return lambda hessian: of(hessian).float()


def _factor_limit(given: dict, want: dict) -> float:
    """The inverse in float32 is off by the condition, below 100, times a rounding for each of 6 columns; its factor, as much."""
    return 2 * 6 * CONDITION * ROUNDING * want["upper"].abs().max().item()


def _where_factor(given: dict, got: dict, want: dict) -> str:
    upper = got["upper"].double()
    below = upper.tril(-1).abs().max().item()
    if below > _factor_limit(given, want):
        return f"below the diagonal there are entries up to {below:.3g}, wanted an upper triangle"
    return f"U^T U is off the inverse of H by up to {largest_difference(upper.T @ upper, _inverse(given['hessian'])):.3g}"


FACTOR = Exercise(
    id="6.4", name="inverse_factor", title="All shrinking inverses at once", minutes=8, difficulty=3, points=3,
    returns=("upper",), inputs=factor_inputs, reference=gptq.autogptq_factor, allowed=_factor_limit, otherwise=_where_factor,
    faults=(
        Fault("U^T U is the inverse, but rows have the other sign: Cholesky's diagonal is positive",
              lambda given, got, want: (got["upper"].diagonal() < 0).any()
              and largest_difference(got["upper"].abs(), want["upper"].abs()) <= _factor_limit(given, want),
              (_factor(lambda h: -_upper(h)), _factor(lambda h: _upper(h) * torch.tensor([1, -1, 1, 1, 1, 1])[:, None]))),
    ),
    mistakes=(
        Mistake("this is the lower factor, L L^T = H^-1: right of its diagonal a row is empty, so no later column would ever "
                "answer, and GPTQ would be rounding. Transpose it", _factor(lambda h: _lower(_inverse(h)))),
        Mistake("this is the upper factor of H itself, wanted that of its inverse", _factor(lambda h: _lower(h).T)),
        Mistake("this is the lower factor of H itself, wanted the upper one of its inverse", _factor(_lower)),
        Mistake("this is the inverse itself, not its factor", _factor(_inverse)),
        Mistake("U^T U is the inverse, but U is lower: it serves an order from the last column to the first",
                _factor(lambda h: torch.linalg.inv(_lower(h)))),
        Mistake("it is upper and U U^T is the inverse, wanted U^T U: its rows are not those of the shrinking inverse",
                _factor(lambda h: torch.linalg.inv(_lower(h)).T)),
        Mistake("each row is divided by its diagonal entry: the rows have the right direction, and U^T U is not the inverse",
                _factor(lambda h: _upper(h) / _upper(h).diagonal()[:, None])),
    ),
    others=(Mutant(_factor(lambda h: _upper(h) + 0.01 * torch.eye(6).roll(1, 0)), "wanted an upper triangle"),
            Mutant(_factor(lambda h: 1.01 * _upper(h)), "off the inverse of H")),
)  # fmt: skip


# 6.5 ------------------------------------------------------------------------------------------------------------------


def _loop(
    weight, hessian, scale, zero_point, bits, factor=None, original=False, divide=1, sign=-1.0, reach=None, clamp=True, stored=None
):
    """The loop in float64, right or with one thing changed. Returns codes, and each weight as it was when rounded, in steps.

    stored: what is returned of a code before and after the clamp; by default the latter.
    """
    work, scale, zero = weight.double().clone(), scale[:, 0].double(), zero_point[:, 0].double()
    upper = (factor or _upper)(hessian)
    codes, steps = [], []
    for i in range(work.shape[1]):
        steps.append(work[:, i] / scale)
        rounded = steps[-1].round() + zero
        code = rounded.clamp(0, 2**bits - 1) if clamp else rounded
        codes.append(stored(rounded, code) if stored else code)
        error = ((weight if original else work)[:, i] - (code - zero) * scale) / upper[i, i] ** divide
        stop = work.shape[1] if reach is None else i + 1 + reach
        work[:, i + 1 : stop] += sign * error[:, None] * upper[i, i + 1 : stop]
    return torch.stack(codes, 1), torch.stack(steps, 1)


def _loop_answer(**how):
    return lambda *given: _loop(*given, **how)[0]


@functools.cache
def _loop_case(seed: int) -> dict:
    g = generator(seed)
    while True:
        weight, hessian = torch.randn(6, 10, generator=g), _hessian(10, g)
        scale, zero_point = grid.scale_and_zero_point(weight, 3)
        given = {"weight": weight, "hessian": hessian, "scale": scale, "zero_point": zero_point, "bits": 3}
        codes, steps = _loop(**given)
        rounded = steps.round()
        # A float32 inverse of condition 100 moves a weight by some 1e-4 of a step.
        if (steps - rounded).abs().max() > 0.5 - 2e-3 or torch.equal(rounded + zero_point, codes):
            continue
        mistaken = [mistake.answer(*given.values()) for mistake in LOOP_MISTAKES]
        if all(not torch.equal(a, b) for i, a in enumerate([codes, *mistaken]) for b in mistaken[i:]):
            return given


def loop_inputs(seed: int) -> dict:
    """Six rows, ten columns, 3 bits. No rounding is near a tie, some weights are driven off their grid, and every mistake shows."""
    return copy.deepcopy(_loop_case(seed))  # the search is long


def gptq_loop(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int
) -> torch.Tensor:
    """The loop on the grid that is given, in float64. On a weight's own grids these are gptq.quantize's codes: test_lessons.py."""
    return _loop(weight, hessian, scale, zero_point, bits)[0].float()


LOOP_MISTAKES = (
    Mistake("these are the codes of rounding to nearest: no later column has answered. Does the update reach the tensor that the "
            "next column is read from? A lower factor does the same in silence: right of its diagonal a row is empty",
            _loop_answer(factor=lambda h: _lower(_inverse(h)))),
    Mistake("the later columns move the wrong way: the error times the factor's row is to be subtracted", _loop_answer(sign=1.0)),
    Mistake("the error is taken against the original weight. It is that of the weight as the columns before it have left it",
            _loop_answer(original=True)),
    Mistake("the error was not divided by U_ii", _loop_answer(divide=0)),
    Mistake("the error is divided by U_ii twice: rows of U are divided by the root already", _loop_answer(divide=2)),
    Mistake("one inverse of H served all columns. Once a column is fixed the problem is smaller, and so is its inverse: take rows "
            "of its Cholesky factor", _loop_answer(factor=_inverse)),
    Mistake("the factor is that of H itself, not of its inverse", _loop_answer(factor=lambda h: _lower(h).T)),
    Mistake("this factor is upper and U U^T is the inverse, wanted U^T U",
            _loop_answer(factor=lambda h: torch.linalg.inv(_lower(h)).T)),
    Mistake("only the next column answers, wanted all that are still to come", _loop_answer(reach=1)),
    *(Mistake("a weight that was driven off its grid has a code below 0 or above 2**bits - 1: it must be clamped", answer)
      for answer in (_loop_answer(clamp=False), _loop_answer(stored=lambda rounded, code: rounded))),
    Mistake("the zero-point was not added: negative weights all got code 0", lambda w, h, s, z, b: _loop(w, h, s, 0 * z, b)[0]),
    Mistake("the zero-point is missing in the codes that are returned, though the values were read back with it",
            lambda w, h, s, z, b: _loop(w, h, s, z, b)[0] - z),
)  # fmt: skip


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
    returns=("codes",), inputs=loop_inputs, reference=gptq_loop, mistakes=LOOP_MISTAKES, otherwise=_where_loop,
    faults=(
        Fault("codes are whole numbers, and {value:.4g} is not. Are these values that were read back from codes?",
              lambda given, got, want: {"value": (odd := got["codes"])[odd != odd.round()][0].item()}
              if (got["codes"] != got["codes"].round()).any() else None,
              (lambda w, h, s, z, b: (_loop(w, h, s, z, b)[0] - z) * s,)),
    ),
    others=(Mutant(lambda w, h, s, z, b: _loop(w, h, s, z, b)[0] + 3, "wanted 0 to 7"),
            Mutant(lambda w, h, s, z, b: _loop(w, h, s, z, b)[0].flip(0), "At column 0"),
            Mutant(lambda *given: torch.cat([_loop(*given)[0][:, :9], 0 * given[0][:, 9:]], 1), "All columns before it are right")),
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
    if not hessian.isfinite().all():
        return "holds numbers beyond float32, in which GPTQ computes"
    gap = (hessian - hessian.T).abs().max().item()
    if gap > 1e-5 * hessian.abs().max():
        return f"is not symmetric: it differs from its transpose by up to {gap:.3g}, and 2/n X^T X cannot"
    if torch.linalg.cholesky_ex(hessian)[1]:
        return "is not positive definite: it has no Cholesky factor, so no inputs with an inverse give it"
    return None


def _fault_of_two(given: dict, got: dict, want: dict) -> str | None:
    for name, hessian in got.items():
        if fault := _not_one(hessian):
            return f"{name} {fault}"
    weight = torch.randn(32, given["size"], generator=generator(given["size"]))
    nearest = rtn.quantize(weight, 3, None)
    changed, losses = {}, {}
    for name, hessian in got.items():
        stored = gptq.quantize(weight, hessian, 3, None, damping=0.0)
        changed[name] = (stored.codes != nearest.codes).float().mean().item()
        error, of_rounding = (gptq.output_error(weight, q.dequantize(), hessian) for q in (stored, nearest))
        losses[name] = error / of_rounding
    spread = {name: (h.diagonal().max() / h.diagonal().min()).item() for name, h in got.items()}
    if changed["unequal"]:
        return (
            f"unequal: {100 * changed['unequal']:.2g} % of the codes differ from rounding, wanted none. A column answers to "
            "another's error through the entry of H^-1 that they share"
        )
    if spread["unequal"] < SPREAD:
        return (
            f"unequal: GPTQ is rounding here, but the loudest column counts {spread['unequal']:.6g} times the quietest, "
            f"wanted {SPREAD} times at least"
        )
    if spread["equal"] > 1.0001:
        return f"equal: the diagonal is not: its largest entry is {spread['equal']:.6g} times its smallest"
    if not changed["equal"]:
        return "equal: no code differs from rounding. What do columns need in common to help each other?"
    if losses["equal"] > GAIN:
        return f"equal: the output error is {losses['equal']:.3g} of that of rounding, wanted {GAIN} at most: correlate more"
    return None


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
