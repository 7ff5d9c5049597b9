"""Chapter 4: int8 on both sides of a product, columns that spoil it, and how to tell from outside what a layer rounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from labsupport.exercises.compare import shown
from labsupport.exercises.form import Exercise, Fault, Mutant, generator, mistakes_by_option, right
from labsupport.quant import int8, rtn
from labsupport.quant.int8 import PER_PRODUCT, Int8Tensor

# bitsandbytes multiplies by 6.200124e-05 where 1 / 127**2 is 6.2000124e-05, 1.8e-5 apart; float32 adds less than 1e-6 to that.
CONSTANT = 2.2e-5


def _far_from_ties(steps: torch.Tensor) -> bool:
    """Whether each of these rounds to one number only, in whatever order float32 computes it."""
    return bool(((steps - steps.floor() - 0.5).abs() > 1e-3).all())


# 4.1 ------------------------------------------------------------------------------------------------------------------
ROWS = ["values half way between two codes", "mixed signs", "largest value negative", "tiny values", "an all-zero row"]


def row_inputs(seed: int) -> dict:
    """More columns than rows. The first row's magnitude is 127, so its halves are exact ties, whichever way one divides: even and
    odd, above and below 0. In the other rows nothing is near a tie."""
    g = generator(seed)
    ties = 2 * torch.randint(0, 62, (4,), generator=g) + torch.tensor([0.5, 1.5, 0.5, 1.5])
    first = torch.cat([ties * torch.tensor([1, 1, -1, -1]), torch.randint(-126, 127, (4,), generator=g), torch.tensor([127.0])])
    while True:
        mixed, leaning, tiny = torch.randn(3, 9, generator=g)
        mixed[2] = mixed.abs().max() + 0.3
        leaning[4] = -leaning.abs().max() - 0.7
        rest = torch.stack([mixed, leaning, 1e-3 * tiny])
        if _far_from_ties(rest * (127 / rest.abs().amax(1, keepdim=True))):
            return {"matrix": torch.stack([first[torch.randperm(9, generator=g)], *rest, torch.zeros(9)])}


def quantize_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """labsupport's vector-wise int8, taken apart: codes and absmax."""
    quantized = int8.quantize(matrix)
    return quantized.codes, quantized.absmax


def _absmax(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.abs().amax(1)


def _rows(matrix, *, absmax=_absmax, stored=None, top=127.0, rounded=torch.round, code_of_nan=0):
    """A right answer, with what can go wrong as options: what a row is divided by, what is stored instead, the largest code."""
    codes = rounded((matrix * (top / absmax(matrix).view(-1, 1))).nan_to_num(code_of_nan, 0.0, 0.0))
    return codes.int().to(torch.int8), (stored or absmax)(matrix)  # codes out of range wrap around


def _about_row(given, want, name, place):
    code = f"the code of {given['matrix'][place]:.4g} with absmax {want['absmax'][place[0]]:.4g}" if name == "codes" else ""
    return f"{ROWS[place[0]]}: {code or f'absmax[{place[0]}]'}"


QUANTIZE_ROWS = Exercise(
    id="4.1", name="quantize_rows", title="Vector-wise int8", minutes=8, difficulty=2, points=2,
    returns=("codes", "absmax"), inputs=row_inputs, reference=quantize_rows, dtypes=("codes",), order=("absmax",), about=_about_row,
    close=lambda given, want: {"codes": 0.0, "absmax": 2**-22 * want["absmax"]},  # absmax / 127 is rounded
    faults=(
        Fault("largest value negative: absmax is the largest value of a row, not its largest magnitude. max() for abs()?",
              lambda given, got, want: (got["absmax"] == given["matrix"].amax(1)).all(),
              (partial(_rows, absmax=lambda m: m.amax(1)),)),
        Fault("an all-zero row: absmax is {value}, wanted 0. Guard the division, not the magnitude",
              lambda given, got, want: got["absmax"][4] != 0 and {"value": f"{got['absmax'][4].item():.4g}"},
              (partial(_rows, stored=lambda m: _absmax(m).clamp(min=1e-8)),)),
        Fault("an all-zero row: its codes are not 0. Is 0 divided by 0? That is not a number, and a cast makes anything of it",
              lambda given, got, want: got["codes"][4].any(), (partial(_rows, code_of_nan=-128.0),)),
    ),
    mistakes=mistakes_by_option(_rows, {
        "there is one magnitude for each column. A row is one token, or one output's weights: reduce along dim 1":
            lambda m: (_rows(m.t())[0].t(), m.abs().amax(0)),
        "there is one magnitude for the whole matrix. Vector-wise means one for each row":
            {"absmax": lambda m: m.abs().max().view(1)},
        "absmax has shape [rows, 1], wanted [rows]: keep the axis for the division, drop it at the end":
            {"absmax": lambda m: m.abs().amax(1, keepdim=True)},
        "codes are right, but not in torch.int8: round first, cast last": lambda m: (_rows(m)[0].float(), _absmax(m)),
        "absmax is the distance between two codes. bitsandbytes keeps the magnitude itself, absmax, 127 times as much":
            {"stored": lambda m: _absmax(m) / 127},
        "the largest value gets code 128, which int8 does not hold: it wraps around to -128. The codes go from -127 to 127":
            {"top": 128.0},
        "there are 128 steps to absmax, and code 128 is clamped. The codes go from -127 to 127":
            {"top": 128.0, "rounded": lambda steps: steps.round().clamp(-128, 127)},
        "the fraction is cut off: a cast to int8 does not round": {"rounded": torch.trunc},
        "half-way values go up. torch.round takes the even neighbor, and so does bitsandbytes":
            {"rounded": lambda steps: torch.floor(steps + 0.5)},
        "half-way values go away from zero. torch.round takes the even neighbor, and so does bitsandbytes":
            {"rounded": lambda steps: steps.sign() * torch.floor(steps.abs() + 0.5)},
    }),
    others=(
        Mutant(partial(_rows, stored=lambda m: 1.01 * _absmax(m)), "values half way between two codes: absmax[0]: got"),
        Mutant(lambda m: (_rows(m)[0] // 2, _absmax(m)), "with absmax 127: got"),
    ),
)  # fmt: skip


# 4.2 ------------------------------------------------------------------------------------------------------------------
def product_inputs(seed: int) -> dict:
    """Tokens as many as outputs: a scale on the wrong axis raises nothing, but is far off. One sum is odd and above 2**24."""
    g = generator(seed)
    codes, weight_codes = (torch.randint(-127, 128, (4, 2048), generator=g, dtype=torch.int8) for _ in range(2))
    codes[1], weight_codes[2] = 127, 127
    codes[1, int(torch.randint(2048, (1,), generator=g))] = 126
    absmax, weight_absmax = torch.tensor([[0.5, 40.0, 3.0, 0.02], [2.0, 0.1, 0.7, 9.0]]) * (1 + torch.rand(2, 4, generator=g))
    return {"codes": codes, "absmax": absmax, "weight_codes": weight_codes, "weight_absmax": weight_absmax}


def int8_matmul(
    codes: torch.Tensor, absmax: torch.Tensor, weight_codes: torch.Tensor, weight_absmax: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """labsupport's integer product, and what it stands for as bitsandbytes scales it."""
    product = int8.matmul_int32(codes, weight_codes)
    return product, product * (absmax[:, None] * weight_absmax[None]) * PER_PRODUCT


def _product_allowed(given: dict, want: dict) -> dict:
    """The product is exact. Of the sum of all products taken positive: the constant's distance, and a rounding for each of them,
    since values may be multiplied and summed in float32."""
    codes, absmax, weight_codes, weight_absmax = given.values()
    size = (codes.double().abs() @ weight_codes.double().abs().t()) * absmax[:, None] * weight_absmax / 127**2
    return {"product": 0.0, "output": (CONSTANT + codes.shape[1] * 2**-24) * size}


def _product(codes, absmax, weight_codes, weight_absmax, *, casts=(), scaled=lambda p, a, w: p * a[:, None] * w / 127**2):
    """A right answer, or one with sums that go through other dtypes, or with other scales on them."""
    product = int8.matmul_int32(codes, weight_codes)
    for dtype in casts:
        product = product.to(dtype)
    return product, scaled(product.float(), absmax, weight_absmax)


def _longest_rounded(given, got, want):
    """Where only the sum above 2**24 is off, and a number that float32 holds stands in its place."""
    have, exact = got["product"].double(), want["product"].double()
    off = have != exact
    near = (exact > 2**24) & ((have - exact).abs() <= 1e-6 * exact) & (have == have.float())
    return off.any() and near[off].all() and {"sum": int(exact.max()), "got": int(have.max())}


INT8_MATMUL = Exercise(
    id="4.2", name="int8_matmul", title="A product in int8", minutes=8, difficulty=2, points=3,
    returns=("product", "output"), inputs=product_inputs, reference=int8_matmul, allowed=_product_allowed,
    alike=lambda given, got, theirs: torch.equal(got["product"], theirs["product"])
    and torch.allclose(got["output"].double(), theirs["output"].double(), rtol=2 * CONSTANT, atol=0),
    faults=(
        Fault("the sums are rounded: float16 knows each whole number up to 2048 only, and ends at 65504",
              lambda given, got, want: got["product"].dtype == torch.float16,
              (partial(_product, casts=[torch.float16]),), early=True),
        Fault("the sum {sum} came out as {got}: float32 knows each whole number up to 2**24 only. Sum integers in an integer dtype",
              _longest_rounded, tuple(partial(_product, casts=casts) for casts in ([torch.float32], [torch.float32, torch.int32]))),
    ),
    mistakes=mistakes_by_option(_product, {
        "the sums wrapped around: they were made in int8, which ends at 127. Convert the codes before the product":
            {"casts": [torch.int8]},
        "the sums wrapped around: they were made in int16, which ends at 32767. int32 is the least that holds them":
            {"casts": [torch.int16]},
        "the sums are rounded: bfloat16 knows each whole number up to 256 only": {"casts": [torch.bfloat16]},
        "product is turned over: its rows are outputs, wanted tokens": lambda a, s, b, t: _product(b, t, a, s),
        "product is right. the two scales stand on each other's axes: row i belongs to token i, column j to output j":
            {"scaled": lambda p, a, w: p * a[None] * w[:, None] / 127**2},
        "product is right. it is 127 times too large: both sides were multiplied by 127, so divide by it twice":
            {"scaled": lambda p, a, w: p * a[:, None] * w / 127},
        "product is right. it is 127**2 times too large: a code stands for code * absmax / 127, on both sides":
            {"scaled": lambda p, a, w: p * a[:, None] * w},
        "product is right. the weight's scale is missing": {"scaled": lambda p, a, w: p * a[:, None] / 127**2},
        "product is right. the activations' scale is missing": {"scaled": lambda p, a, w: p * w / 127**2},
        "product is right. it multiplies where it should divide: a code stands for code * absmax / 127":
            {"scaled": lambda p, a, w: p * 127**2 / (a[:, None] * w)},
        "product is right. it takes 128 steps to absmax: there are 127": {"scaled": lambda p, a, w: p * a[:, None] * w / 128**2},
        "product is right. the scales are added. A product of codes stands for the product of both scales":
            {"scaled": lambda p, a, w: p * (a[:, None] + w) / 127**2},
    }),
)  # fmt: skip


# 4.3 ------------------------------------------------------------------------------------------------------------------
def column_inputs(seed: int) -> dict:
    """More features than tokens. One column only reaches the threshold, one only just does not, one is large below zero, one twice,
    one nearly always, one always, and one is always a little below the threshold."""
    g = generator(seed)
    threshold = (5.0, 6.0, 7.0)[seed % 3]
    activations = torch.randn(6, 10, generator=g).clamp(-3, 3)
    reaching, short, negative, twice, often, always, below = torch.randperm(10, generator=g)[:7].tolist()
    tokens = torch.randint(6, (3,), generator=g)
    activations[tokens, [reaching, short, negative]] = torch.tensor([threshold, threshold - 1e-3, -9.0])
    activations[:2, twice] = 8.0
    activations[:5, often] = 30.0
    activations[:, always] = 20 + torch.rand(6, generator=g)
    activations[:, below] = threshold - 0.1
    return {"activations": activations, "threshold": threshold}


def _columns(activations, threshold, *, large=lambda x, t: (x.abs() >= t).any(0)):
    """A right answer, or one by another mask."""
    return large(activations, threshold).nonzero().view(-1)


OUTLIER_COLUMNS = Exercise(
    id="4.3", name="outlier_columns", title="Outlier columns", minutes=4, difficulty=1, points=1,
    returns=("columns",), inputs=column_inputs, reference=int8.outlier_columns, free=("columns",),
    otherwise=lambda given, got, want: f"got columns {got['columns'].tolist()}, wanted {want['columns'].tolist()}",
    alike=lambda given, got, theirs: torch.equal(got["columns"].sort().values, theirs["columns"].sort().values),
    faults=(
        Fault("this is a mask, True or False for each column. Wanted are the places: .nonzero(), in one axis",
              lambda given, got, want: got["columns"].dtype == torch.bool, (lambda x, t: (x.abs() >= t).any(0),), early=True),
        Fault("columns has shape {shape}, wanted one axis: nonzero gives a table, take its column",
              lambda given, got, want: got["columns"].ndim != 1 and {"shape": list(got["columns"].shape)},
              (lambda x, t: (x.abs() >= t).any(0).nonzero(),), early=True),
        Fault("columns is {dtype}, wanted the places of the columns, whole numbers: not the values that stand there",
              lambda given, got, want: got["columns"].is_floating_point() and {"dtype": got["columns"].dtype},
              (lambda x, t: x[x.abs() >= t],), early=True),
    ),
    mistakes=mistakes_by_option(_columns, {
        "a column that reaches the threshold exactly is missing: an outlier is at or above it":
            {"large": lambda x, t: (x.abs() > t).any(0)},
        "columns that are large below zero are missing: it is the magnitude that counts": {"large": lambda x, t: (x >= t).any(0)},
        "only columns that are large in every token are found. One token is enough: its row would be spoiled":
            {"large": lambda x, t: (x.abs() >= t).all(0)},
        "it compares a column's mean magnitude. One token is enough, and a mean over tokens hides it":
            {"large": lambda x, t: x.abs().mean(0) >= t},
        "these are tokens, not columns: reduce over the tokens, dim 0": {"large": lambda x, t: (x.abs() >= t).any(1)},
        "a column is listed once for each token in which it is large: once is enough": lambda x, t: (x.abs() >= t).nonzero()[:, 1],
        "these are the right columns in another order, wanted ascending": lambda x, t: _columns(x, t).flip(0),
    }),
    others=(Mutant(partial(_columns, large=lambda x, t: (x.abs() >= t - 0.01).any(0)), "got columns"),),
)  # fmt: skip


# 4.4 ------------------------------------------------------------------------------------------------------------------
TOKENS = (
    "a token without outliers", "a token with a large value", "a token that reaches the threshold exactly",
    "a token whose largest value stands in an outlier column",
)  # fmt: skip


def mixed_inputs(seed: int) -> dict:
    """TOKENS; the first has a value just below the threshold, the second two beyond it on either side of 0, the third one at minus
    the threshold. Values that float16 holds, none of them near a tie, so that neither decides anything."""
    g = generator(seed)
    threshold = (5.5, 6.0, 6.5)[seed % 3]
    weight_codes = torch.randint(-127, 128, (5, 12), generator=g, dtype=torch.int8)
    places = torch.randperm(12, generator=g)[:4]
    planted = [[0.3, -0.2, 0.5, threshold - 2**-7], [24.0, 0.4, -11.0, 0.7], [0.2, -threshold, 0.6, -0.4], [4.5, 0.1, -0.3, 0.9]]
    rows: list[torch.Tensor] = []
    while len(rows) < 4:
        row = torch.randn(12, generator=g).clamp(-2, 2)
        row[places] = torch.tensor(planted[len(rows)])
        row = row.half().float()
        largest = [row[row.abs() < limit].abs().max() for limit in (threshold, threshold + 0.1, 3.0, 100.0)]
        if _far_from_ties(torch.stack([row * 127 / absmax for absmax in largest])):
            rows.append(row)
    weight_absmax = 0.2 + torch.rand(5, generator=g)
    return {"activations": torch.stack(rows), "weight_codes": weight_codes, "weight_absmax": weight_absmax, "threshold": threshold}


def mixed_matmul(
    activations: torch.Tensor, weight_codes: torch.Tensor, weight_absmax: torch.Tensor, threshold: float
) -> torch.Tensor:
    """labsupport's product in bitsandbytes' form, from a weight that is taken apart."""
    return int8.linear(activations, Int8Tensor(weight_codes, weight_absmax), threshold=threshold)


def _mixed_allowed(given: dict, want: dict) -> torch.Tensor:
    """Of the sum of all products, taken positive: the constant's distance, and float32 rounding."""
    weight = given["weight_codes"] * given["weight_absmax"][:, None] / 127
    return CONSTANT * (given["activations"].abs() @ weight.abs().t())


def _mixed(x, codes, absmax, threshold, *, large=lambda x, t: x.abs() >= t, share=None, inside=None, kept=None, outside=None):
    """The right answer, with parts that can be replaced: which values are large, what a row's magnitude is taken over, what
    is rounded, and the two factors of the floating-point product."""
    is_large = large(x, threshold)
    columns = is_large.any(0)
    magnitude = (share(x, columns) if share else x.masked_fill(is_large, 0)).abs().amax(1)
    small = inside(x, is_large) if inside else x.masked_fill(columns[None], 0)
    rounded = torch.round(small * (127 / magnitude[:, None])).clamp(-127, 127)
    product = (rounded.double() @ codes.double().t()).float() * magnitude[:, None] * absmax / 127**2
    weight = kept(codes, absmax) if kept else codes * absmax[:, None] / 127
    return product + (outside(x, is_large) if outside else x.masked_fill(~columns[None], 0)) @ weight.t()


MIXED_MATMUL = Exercise(
    id="4.4", name="mixed_matmul", title="The rescue", minutes=14, difficulty=3, points=4,
    returns=("output",), inputs=mixed_inputs, reference=mixed_matmul,
    about=lambda given, want, name, place: f"{TOKENS[place[0]]}: {name}{list(place)}",
    allowed=_mixed_allowed, close=lambda given, want: 2 * _mixed_allowed(given, want),
    mistakes=mistakes_by_option(_mixed, {
        "the outliers still count for their row's magnitude, so the other values are rounded as coarsely as before. Take them out "
        "first, then look for the largest": {"share": lambda x, columns: x},
        "this is the paper's rule, where the whole column leaves before a row's magnitude is taken. In bitsandbytes only the "
        "values that reach the threshold leave: a small value in an outlier column still counts":
            {"share": lambda x, columns: x.masked_fill(columns[None], 0)},
        "small values in outlier columns are counted twice: in the int8 product, and again in the floating-point one. Their codes "
        "must be 0": {"inside": lambda x, large: x.masked_fill(large, 0)},
        "the outlier columns are in both products: set their codes to 0": {"inside": lambda x, large: x},
        "the floating-point part is missing: the outlier columns were taken out and never put back":
            {"outside": lambda x, large: 0 * x},
        "small values in outlier columns are lost: the floating-point product takes the whole column, not only its large values":
            {"outside": lambda x, large: x * large},
        "it takes out single values, and leaves the small ones of the same columns in int8. That adds up too, but then the "
        "floating-point part is no product of a few columns":
            {"inside": lambda x, large: x.masked_fill(large, 0), "outside": lambda x, large: x * large},
        "the floating-point part multiplies by codes. They stand for code * absmax / 127":
            {"kept": lambda codes, absmax: codes.float()},
        "the floating-point part is 127 times too large: a code stands for code * absmax / 127":
            {"kept": lambda codes, absmax: codes * absmax[:, None]},
        "the floating-point part is 127 times too small: there only the weight was multiplied by 127, so divide once":
            {"kept": lambda codes, absmax: codes * absmax[:, None] / 127**2},
        "a value that reaches the threshold exactly is left in int8: an outlier is at or above it":
            {"large": lambda x, t: x.abs() > t},
        "outliers below zero are left in int8: it is the magnitude that counts": {"large": lambda x, t: x >= t},
        "nothing is taken out: this is the product of 4.2": {"large": lambda x, t: x > torch.inf},
        "nothing is rounded: this multiplies floating-point activations by the dequantized weight":
            lambda x, codes, absmax, threshold: x @ (codes * absmax[:, None] / 127).t(),
    }),
    others=(Mutant(partial(_mixed, large=lambda x, t: x.abs() >= t - 0.01), "a token without outliers: output["),),
)  # fmt: skip


# 4.5 ------------------------------------------------------------------------------------------------------------------
THRESHOLDS = (3.0, 6.0, 12.0)
MOST_MOVED, LEAST_MOVED, LEAST_RESCUED = 1.05, 3.0, 5.0
LARGEST_HALF = 65504.0  # of float16


def batch_inputs(seed: int) -> dict:
    """Activations without any outlier: the largest is below 2.4."""
    return {"bulk": (0.6 * torch.randn(16, 32, generator=generator(seed))).clamp(-2.4, 2.4)}


def two_batches(bulk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Far above all thresholds, and between two of them."""
    return _two_columns(bulk, 40.0, 9.0)


def _two_columns(bulk: torch.Tensor, indifferent: float, sensitive: float, rows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = bulk.clone(), bulk.clone()
    first[:, 0], second[:rows, 0] = indifferent, sensitive
    return first, second


def output_error(activations: torch.Tensor, threshold: float) -> float:
    """Output error of LLM.int8(), root mean square: all of it from rounding float16 activations, since int8 holds the weight."""
    activations = activations.half().float()
    codes = torch.randint(-127, 128, (24, activations.shape[1]), generator=generator(0), dtype=torch.int8)
    weight = Int8Tensor(codes, torch.ones(24))
    error = int8.linear(activations, weight, threshold=threshold) - activations.double() @ weight.dequantize().double().t()
    return error.pow(2).mean().sqrt().item()


def _batches_fault(given, got, want) -> str | None:
    bulk = given["bulk"]
    for name, batch in got.items():
        if (count := int((batch != bulk).any(0).sum())) != 1:
            return f"{name} differs from bulk in {count} columns, wanted one: change a copy of bulk, in one column"
        if (largest := batch.abs().max().item()) > LARGEST_HALF:
            return f"{name} holds {largest:.6g}. LLM.int8() takes activations in float16, which ends at {LARGEST_HALF:g}"
    errors = {name: [output_error(batch.float(), threshold) for threshold in THRESHOLDS] for name, batch in got.items()}
    moved = {name: max(each) / min(each) for name, each in errors.items()}
    about = {name: f"{name}: between thresholds 3, 6 and 12 the error changes by a factor {moved[name]:.4g}" for name in got}
    if moved["sensitive"] <= MOST_MOVED and moved["indifferent"] >= LEAST_MOVED:
        return "the two are exchanged: indifferent comes first"
    if moved["indifferent"] > MOST_MOVED:
        return about["indifferent"] + ", wanted none. Which values would be taken out at all three?"
    rescued = output_error(got["indifferent"].float(), 0.0) / min(errors["indifferent"])
    if rescued < LEAST_RESCUED:
        factor = f"{shown(rescued, LEAST_RESCUED, 2)[0]} times smaller, wanted at least {LEAST_RESCUED:g} times"
        return f"indifferent: taking its column out makes the error {factor}. What must one value do to the step of its row?"
    if moved["sensitive"] >= LEAST_MOVED:
        return None
    largest = got["sensitive"][:, (got["sensitive"] != bulk).any(0)].abs().max()
    if largest < min(THRESHOLDS):
        return about["sensitive"] + ". Its column is left in at all three: no value of it reaches one of them"
    if largest >= max(THRESHOLDS):
        return about["sensitive"] + ". Its column is taken out at all three"
    return about["sensitive"] + f", wanted {LEAST_MOVED:g}. Left in at one of them, it must do harm: how large, how often?"


TWO_BATCHES = Exercise(
    id="4.5", name="two_batches", title="When the threshold matters", minutes=10, difficulty=3, points=3,
    returns=("indifferent", "sensitive"), inputs=batch_inputs, reference=two_batches,
    accepts=lambda given, got, want: None if _batches_fault(given, got, want) else right(), otherwise=_batches_fault,
    others=(
        *(Mutant(lambda bulk, parts=parts: _two_columns(bulk, *parts), says) for says, parts in {
            "exchanged": (9.0, 40.0), "taken out at all three?": (9.0, 9.0), "step of its row": (2.0, 9.0), "in float16": (1e5, 9),
            "left in at all three": (40.0, 2.5), "Its column is taken out at all three": (40.0, 13.0), "how often": (40.0, 9.0, 1),
        }.items()),
        Mutant(lambda bulk: (20 * bulk, 5 * bulk), "in one column"), Mutant(lambda bulk: (bulk + 0, bulk + 0), "in 0 columns"),
    ),
)  # fmt: skip


# 4.6 ------------------------------------------------------------------------------------------------------------------
def layer_inputs(seed: int) -> dict:
    g = generator(seed)
    return {"weight": torch.randn(24, 64, generator=g), "bias": torch.randn(24, generator=g)}


def _layers(weight: torch.Tensor, bias: torch.Tensor) -> dict[str, tuple[Callable, Callable | None]]:
    """Layers to look at from outside; and what each would be that rounds its input if it did not, None where it does not."""
    four, eight, whole = rtn.quantize(weight, 4, 32).dequantize(), int8.quantize(weight), int8.quantize(weight, "tensor")
    by_row, by_tensor = eight.dequantize().t(), whole.dequantize().t()
    per_tensor = partial(int8.linear, weight=whole, threshold=0.0, granularity="tensor")
    return {
        "float": (lambda x: x @ weight.t(), None),
        "float with a bias": (lambda x: x @ weight.t() + bias, None),
        "4-bit weights": (lambda x: x @ four.t() + bias, None),
        "int8 weights": (lambda x: x @ by_row, None),
        "int8 on both sides": (lambda x: int8.linear(x, eight, bias, threshold=0.0), lambda x: x @ by_row + bias),
        "int8 on both sides, per tensor": (per_tensor, lambda x: x @ by_tensor),
        "LLM.int8()": (lambda x: int8.linear(x, eight, bias), lambda x: x @ by_row + bias),
    }  # fmt: skip


def is_weight_only(layer: Callable, in_features: int) -> bool:
    """Whether a layer does arithmetic on its input as it comes: then it is linear, up to a bias and floating-point rounding.

    Sums, because doubling an input doubles its magnitudes and leaves its codes alone; noise, because zeros and ones are exact in
    int8; of size 1, because everything above a threshold would be multiplied in floating point.
    """
    a, b = torch.randn(2, 8, in_features, generator=generator(0))
    zero = layer(torch.zeros_like(a))
    together, apart = layer(a + b) - zero, layer(a) + layer(b) - 2 * zero
    return bool((together - apart).abs().max() < 1e-4 * together.abs().max())


def _fed(batches: list[torch.Tensor], layer: Callable, exact: Callable) -> str:
    """What a layer was fed that is `exact` but for the rounding of its input: a key of FED."""
    rows = torch.cat(batches) if batches else torch.zeros(1, 1)
    if not rows.any():
        return "zeros"
    if all((layer(x) - exact(x)).abs().max() <= 1e-4 * exact(x).abs().max() for x in batches):
        return "exact"
    rows = rows[rows.any(1)].double().unique(dim=0)[:512]
    rows = rows / rows.norm(dim=1, keepdim=True)
    parallel = (rows @ rows.t()).abs() > 1 - 1e-9
    return "multiples" if (parallel.sum(1) > 1).all() else "enough"


def drive_layers(answer: Callable, given: dict) -> dict:
    """The answer's word on every layer, by name; and what it had fed to those that round their input, where it says they do not."""
    columns, found, fed = given["weight"].shape[1], {}, {}
    for name, (layer, exact) in _layers(**given).items():
        batches: list[torch.Tensor] = []

        def watched(x: torch.Tensor, layer: Callable = layer, batches: list = batches) -> torch.Tensor:
            batches.append(x.detach().reshape(-1, columns).float())
            return layer(batches[-1]).view(*x.shape[:-1], -1)

        found[name] = answer(watched, columns)
        if exact is not None:
            fed[name] = _fed(batches, layer, exact) if found[name] is True else ""
    return found | {"fed": fed}


FED = {
    "zeros": "and was fed nothing but zeros, if anything. Which inputs would rounding move?",
    "exact": "and nothing that it was fed is rounded there. Zeros and ones, or one value in all places, are exact in int8, and "
    "columns with an outlier are left out of it. Which inputs would rounding move?",
    "multiples": "and was fed multiples of the same rows. A row times 2, or -1, has the same codes up to their sign, so rounding "
    "does not show in f(2x) = 2 f(x). What else does a linear function promise?",
    "enough": "though it rounds what it was fed: by how much may a linear function be off?",
}


def _layers_fault(given, got, want) -> str | None:
    layers = [name for name in got if name != "fed"]
    missed = [name for name in layers if got[name] == (name in got["fed"])]
    if not missed:
        return None
    if not any(got[name] for name in layers):
        none = "it finds no layer weight-only, not even one in plain float32"
        return f"{none}. A float32 sum depends on rounding too, in the seventh digit: allow for that"
    if missed[:2] == ["float with a bias", "4-bit weights"]:
        return "a layer with a bias is taken for one that rounds its input: f(0) is not 0 there, take it off first"
    if missed[0] not in got["fed"]:
        return f"{missed[0]} is taken for a layer that rounds its input, and it does not"
    return f"{missed[0]} is taken for weight-only, {FED.get(got['fed'][missed[0]], 'and it rounds its input')}"


def _by_levels(layer, n):
    """Reads the weight off and asks whether it stands on a grid, which is another question."""
    weight = layer(torch.eye(n)) - layer(torch.zeros(1, n))
    return weight.unique().numel() > 0.99 * weight.numel()


def _by_sums(layer, n, *, between=(-1, 1), ones=False, twice=False, allowed=1e-4, bias=True):
    """A right answer, with what can go wrong as options: what values are added up, and by how much the sum may be off."""
    a, b = torch.empty(2, 8, n).uniform_(*between, generator=generator(1)) if not ones else torch.eye(n)[:2, None]
    b = a if twice else b
    gap = layer(a + b) - layer(a) - layer(b) + (layer(torch.zeros_like(a)) if bias else 0)
    return bool(gap.abs().max() <= allowed * layer(a + b).abs().max())


WEIGHT_ONLY = Exercise(
    id="4.6", name="is_weight_only", title="Weight-only, seen from outside", minutes=10, difficulty=3, points=3,
    returns=("weight_only",), inputs=layer_inputs, reference=is_weight_only, drive=drive_layers,
    accepts=lambda given, got, want: None if _layers_fault(given, got, want) else right(), otherwise=_layers_fault,
    others=(
        Mutant(partial(_by_sums, twice=True), "same codes"), Mutant(partial(_by_sums, ones=True), "exact in int8"),
        Mutant(lambda layer, n: True, "nothing but zeros, if anything"),
        Mutant(partial(_by_sums, allowed=0.0), "seventh digit"), Mutant(partial(_by_sums, bias=False), "a bias"),
        Mutant(partial(_by_sums, between=(40, 50)), "columns with an outlier"),
        Mutant(partial(_by_sums, allowed=0.5), "by how much may a linear function be off"), Mutant(_by_levels, "and it does not"),
    ),
)  # fmt: skip

EXERCISES = (QUANTIZE_ROWS, INT8_MATMUL, OUTLIER_COLUMNS, MIXED_MATMUL, TWO_BATCHES, WEIGHT_ONLY)
