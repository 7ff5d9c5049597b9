"""Chapter 4: int8 on both sides of a product, columns that spoil it, and how to tell from outside what a layer rounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from labsupport.exercises.base import Exercise, Mutant, Verdict, generator, largest_difference, right, shape_fault, wrong
from labsupport.quant import int8, rtn
from labsupport.quant.int8 import PER_PRODUCT, Int8Tensor

# bitsandbytes multiplies by 6.200124e-05 where 1 / 127**2 is 6.2000124e-05, 1.8e-5 apart; float32 adds less than 1e-6 to that.
CONSTANT = 2.2e-5


# 4.1 ------------------------------------------------------------------------------------------------------------------

ROWS = ["values half way between two codes", "mixed signs", "largest value negative", "tiny values", "an all-zero row"]


def row_inputs(seed: int) -> dict:
    """More columns than rows. The first row's magnitude is 127, so its halves are exact ties, whichever way one divides."""
    g = generator(seed)
    ties = torch.randint(-126, 126, (9,), generator=g) + 0.5
    ties[int(torch.randint(9, (1,), generator=g))] = 127.0
    mixed, leaning, tiny = torch.randn(3, 9, generator=g)
    mixed[2] = mixed.abs().max() + 0.3
    leaning[4] = -leaning.abs().max() - 0.7
    return {"matrix": torch.stack([ties, mixed, leaning, 1e-3 * tiny, torch.zeros(9)])}


def quantize_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """labsupport's vector-wise int8, taken apart: codes and absmax."""
    quantized = int8.quantize(matrix)
    return quantized.codes, quantized.absmax


def _codes(matrix, absmax=None, top=127.0, rounded=torch.round):
    """The right answer, or one with another magnitude, largest code or rounding."""
    absmax = matrix.abs().amax(1) if absmax is None else absmax
    ratio = (matrix * (top / absmax.view(-1, 1))).nan_to_num(0.0, 0.0, 0.0)
    return rounded(ratio).int().to(torch.int8), absmax


CODE_MISTAKES: dict[str, Callable] = {
    "the largest value gets code 128, which int8 does not hold: it wraps around to -128. The codes go from -127 to 127": (
        lambda m: _codes(m, top=128.0)
    ),
    "the fraction is cut off: a cast to int8 does not round": lambda m: _codes(m, rounded=torch.trunc),
    "half-way values go up. torch.round takes the even neighbor, and so does bitsandbytes": (
        lambda m: _codes(m, rounded=lambda x: torch.floor(x + 0.5))
    ),
    "half-way values go away from zero. torch.round takes the even neighbor, and so does bitsandbytes": (
        lambda m: _codes(m, rounded=lambda x: torch.sign(x) * torch.floor(x.abs() + 0.5))
    ),
}


def judge_rows(given: dict, got: dict, want: dict) -> Verdict:
    matrix, codes, absmax = given["matrix"], got["codes"], got["absmax"]
    if isinstance(absmax, torch.Tensor):
        if absmax.numel() == matrix.shape[1]:
            return wrong("there is one magnitude for each column. A row is one token, or one output's weights: reduce along dim 1")
        if absmax.numel() == 1:
            return wrong("there is one magnitude for the whole matrix. Vector-wise means one for each row")
        if absmax.shape == (len(matrix), 1):
            return wrong("absmax has shape [rows, 1], wanted [rows]: keep the axis for the division, drop it at the end")
    if fault := shape_fault({"codes": codes, "absmax": absmax.nan_to_num() if hasattr(absmax, "nan_to_num") else absmax}, want):
        return wrong(fault)
    if codes.dtype != torch.int8:
        return wrong(f"codes are {codes.dtype}, wanted torch.int8: round first, cast last")
    if torch.allclose(absmax, want["absmax"] / 127):
        return wrong("absmax is the distance between two codes. bitsandbytes keeps the magnitude itself, absmax, 127 times as much")
    if not torch.equal(absmax.float(), want["absmax"]):
        if torch.equal(absmax[:4].float(), matrix[:4].amax(1)):
            return wrong("largest value negative: absmax follows the largest value, not the largest magnitude. max() for abs()?")
        row = int((absmax.float() != want["absmax"]).nonzero()[0])
        said = f"{ROWS[row]}: absmax is {absmax[row].item():.4g}, wanted {want['absmax'][row].item():.4g}"
        return wrong(said + ". Guard the division, not the magnitude: it is 0 here" * (row == 4))
    # Dividing by absmax / 127, not multiplying, may send what lies that close to a tie to either side. The first row is exact.
    steps = matrix * 127 / want["absmax"].clamp(min=1e-30)[:, None]
    tied = ((steps - steps.floor()) - 0.5).abs() < 1e-4
    tied[0] = False
    off = (codes.int() - want["codes"].int()).abs()
    if ((off == 0) | (tied & (off == 1))).all():
        return right()
    for said, mistake in CODE_MISTAKES.items():
        if torch.equal(codes, mistake(matrix)[0]):
            return wrong(said)
    row, column = (off > tied.int()).nonzero()[0].tolist()
    if row == 4:
        return wrong("an all-zero row: its codes are not 0. 0 times 127 / 0 is not a number, and a cast makes anything of it")
    about = f"{matrix[row, column].item():.4g} with absmax {absmax[row].item():.4g}"
    return wrong(f"{ROWS[row]}: {about} got code {codes[row, column].item()}, wanted {want['codes'][row, column].item()}")


def _unguarded(matrix):
    codes, absmax = _codes(matrix)
    return codes.masked_fill(absmax[:, None] == 0, -128), absmax  # what a cast of NaN gives on some processors


QUANTIZE_ROWS = Exercise(
    id="4.1", name="quantize_rows", title="Vector-wise int8", minutes=8, difficulty=2, points=2,
    returns=("codes", "absmax"), inputs=row_inputs, reference=quantize_rows, judge=judge_rows,
    mutants=(
        Mutant(lambda m: _codes(m, top=128.0), "code 128"),
        Mutant(lambda m: _codes(m, rounded=torch.trunc), "cut off"),
        Mutant(lambda m: _codes(m, rounded=lambda x: torch.floor(x + 0.5)), "go up"),
        Mutant(lambda m: _codes(m, rounded=lambda x: torch.sign(x) * torch.floor(x.abs() + 0.5)), "away from zero"),
        Mutant(lambda m: _codes(m, m.amax(1)), "not the largest magnitude"),
        Mutant(lambda m: _codes(m, m.abs().max().view(1)), "for the whole matrix"),
        Mutant(lambda m: (_codes(m.t())[0].t(), m.abs().amax(0)), "for each column"),
        Mutant(lambda m: (_codes(m)[0], m.abs().amax(1) / 127), "distance between two codes"),
        Mutant(lambda m: (_codes(m)[0].float(), m.abs().amax(1)), "wanted torch.int8"),
        Mutant(lambda m: (_codes(m)[0], m.abs().amax(1, keepdim=True)), "drop it at the end"),
        Mutant(lambda m: _codes(m, m.abs().amax(1).clamp(min=1e-8)), "not the magnitude"),
        Mutant(_unguarded, "an all-zero row"),
    ),
)  # fmt: skip


# 4.2 ------------------------------------------------------------------------------------------------------------------


def product_inputs(seed: int) -> dict:
    """As many tokens as outputs, so that a scale on the wrong axis raises nothing. The longest sum is odd and above 2**24."""
    g = generator(seed)
    codes, weight_codes = (torch.randint(-127, 128, (4, 2048), generator=g, dtype=torch.int8) for _ in range(2))
    codes[1], weight_codes[2] = 127, 127
    codes[1, int(torch.randint(2048, (1,), generator=g))] = 126
    return {
        "codes": codes,
        "absmax": torch.tensor([0.5, 40.0, 3.0, 0.02]) * (1 + torch.rand(4, generator=g)),
        "weight_codes": weight_codes,
        "weight_absmax": torch.tensor([2.0, 0.1, 0.7, 9.0]) * (1 + torch.rand(4, generator=g)),
    }


def int8_matmul(
    codes: torch.Tensor, absmax: torch.Tensor, weight_codes: torch.Tensor, weight_absmax: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """labsupport's integer product, and what it stands for as bitsandbytes scales it."""
    product = int8.matmul_int32(codes, weight_codes)
    return product, product * (absmax[:, None] * weight_absmax[None]) * PER_PRODUCT


def _summed_in(dtype: torch.dtype) -> Callable:
    """All products, summed in another dtype: exact, then wrapped or rounded as that dtype does."""
    if dtype.is_floating_point:
        return lambda a, b: a.to(dtype) @ b.to(dtype).t()
    return lambda a, b: (a.long() @ b.long().t()).to(dtype)


PRODUCT_MISTAKES = {
    "the sums wrapped around: they were made in int8, which ends at 127. Convert the codes before the product": torch.int8,
    "the sums wrapped around: they were made in int16, which ends at 32767. int32 is the least that holds them": torch.int16,
    "the sums are rounded: float16 knows each whole number up to 2048 only, and ends at 65504": torch.float16,
    "the sums are rounded: bfloat16 knows each whole number up to 256 only": torch.bfloat16,
}
SCALE_MISTAKES: dict[str, Callable] = {
    "the two scales stand on each other's axes: row i belongs to token i, column j to output j": (
        lambda p, a, w: p * a[None] * w[:, None] / 127**2
    ),
    "it is 127 times too large: both sides were multiplied by 127, so divide by it twice": lambda p, a, w: p * a[:, None] * w / 127,
    "it is 127**2 times too large: a code stands for code * absmax / 127, on both sides": lambda p, a, w: p * a[:, None] * w,
    "the weight's scale is missing": lambda p, a, w: p * a[:, None] / 127**2,
    "the activations' scale is missing": lambda p, a, w: p * w / 127**2,
    "it multiplies where it should divide: a code stands for code * absmax / 127": lambda p, a, w: p * 127**2 / (a[:, None] * w),
    "it takes 128 steps to absmax: there are 127": lambda p, a, w: p * a[:, None] * w / 128**2,
    "the scales are added. A product of codes stands for the product of both scales": (
        lambda p, a, w: p * (a[:, None] + w) / 127**2
    ),
}  # fmt: skip


def judge_product(given: dict, got: dict, want: dict) -> Verdict:
    a, scale, b, weight_scale = given.values()
    product, output = got["product"], got["output"]
    finite = {k: v.nan_to_num() if isinstance(v, torch.Tensor) else v for k, v in got.items()}
    if fault := shape_fault(finite, want):
        return wrong("product: " + fault if "product" in fault else fault)
    if not torch.equal(product.double(), want["product"].double()):
        for said, dtype in PRODUCT_MISTAKES.items():
            mistake = _summed_in(dtype)(a, b)
            if product.dtype == dtype or torch.equal(product.double().nan_to_num(), mistake.double().nan_to_num()):
                return wrong(said)
        longest = int(want["product"].max())
        if product.is_floating_point() and torch.allclose(product.double(), want["product"].double(), rtol=1e-6):
            return wrong(
                f"the sum {longest} came out as {product.max().item():.0f}: float32 knows each whole number up to 2**24 only. "
                "Sum integers in an integer dtype"
            )
        row, column = (product.double() != want["product"].double()).nonzero()[0].tolist()
        return wrong(
            f"product[{row}, {column}] is {product[row, column].item():g}, wanted {want['product'][row, column].item()}: "
            "the sum over in_features of codes times weight_codes"
        )
    # In units of the sum of all products taken positive. Whoever sums dequantized values in float32 rounds each of them once more.
    allowed = CONSTANT + a.shape[1] * 2**-24
    size = (a.double().abs() @ b.double().abs().t()).float() * scale[:, None] * weight_scale / 127**2
    off = (output.float() - want["output"]).abs() / size
    if (off <= allowed).all():
        return right(off.max().item(), allowed)
    for said, mistake in SCALE_MISTAKES.items():
        if torch.allclose(output.float(), mistake(want["product"], scale, weight_scale).float(), rtol=2 * CONSTANT, atol=0):
            return wrong("product is right. " + said)
    row, column = (off > allowed).nonzero()[0].tolist()
    said = f"product is right; output[{row}, {column}] is {output[row, column].item():.5g}"
    return wrong(f"{said}, wanted {want['output'][row, column].item():.5g}")


def _scaled(product: torch.Tensor, a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return product.float() * a[:, None] * w / 127**2


def _made_in(dtype: torch.dtype) -> Callable:
    def answer(codes, absmax, weight_codes, weight_absmax):
        product = _summed_in(dtype)(codes, weight_codes)
        return product, _scaled(product, absmax, weight_absmax)

    return answer


def _scaled_by(said: str) -> Mutant:
    mistake = next(v for k, v in SCALE_MISTAKES.items() if said in k)

    def answer(codes, absmax, weight_codes, weight_absmax):
        product = int8.matmul_int32(codes, weight_codes)
        return product, mistake(product, absmax, weight_absmax)

    return Mutant(answer, said)


INT8_MATMUL = Exercise(
    id="4.2", name="int8_matmul", title="A product in int8", minutes=8, difficulty=2, points=3,
    returns=("product", "output"), inputs=product_inputs, reference=int8_matmul, judge=judge_product,
    mutants=(
        Mutant(_made_in(torch.int8), "made in int8"),
        Mutant(_made_in(torch.int16), "made in int16"),
        Mutant(_made_in(torch.float16), "float16"),
        Mutant(_made_in(torch.bfloat16), "bfloat16"),
        Mutant(_made_in(torch.float32), "2**24"),
        Mutant(lambda a, s, b, t: _made_in(torch.int32)(b, t, a, s), "the sum over in_features"),
        *(
            _scaled_by(said)
            for said in (
                "each other's axes", "127 times too large", "127**2 times too large", "weight's scale is missing",
                "activations' scale is missing", "128 steps", "are added",
            )
        ),
    ),
)  # fmt: skip


# 4.3 ------------------------------------------------------------------------------------------------------------------


def column_inputs(seed: int) -> dict:
    """More features than tokens. One column only just reaches the threshold, one is large below zero, one twice, one nearly
    always, one always."""
    g = generator(seed)
    threshold = 6.0
    activations = torch.randn(6, 10, generator=g).clamp(-3, 3)
    places = torch.randperm(10, generator=g)
    activations[int(torch.randint(6, (1,), generator=g)), places[0]] = threshold
    activations[int(torch.randint(6, (1,), generator=g)), places[1]] = -9.0
    activations[:2, places[2]] = 8.0
    activations[:, places[3]] = 20 + torch.rand(6, generator=g)
    activations[:5, places[4]] = 30.0
    activations[:, places[5]] = 5.9  # large everywhere, and yet below
    return {"activations": activations, "threshold": threshold}


def _where(chosen: torch.Tensor) -> torch.Tensor:
    return chosen.nonzero().view(-1)


COLUMN_MISTAKES: dict[str, Callable] = {
    "a column that reaches the threshold exactly is missing: an outlier is at or above it": lambda x, t: _where(
        (x.abs() > t).any(0)
    ),
    "columns that are large below zero are missing: it is the magnitude that counts": lambda x, t: _where((x >= t).any(0)),
    "only columns that are large in every token are found. One token is enough: its row would be spoiled": (
        lambda x, t: _where((x.abs() >= t).all(0))
    ),
    "it compares a column's mean magnitude. One token is enough, and a mean over tokens hides it": (
        lambda x, t: _where(x.abs().mean(0) >= t)
    ),
    "these are tokens, not columns: reduce over the tokens, dim 0": lambda x, t: _where((x.abs() >= t).any(1)),
    "a column is listed once for each token in which it is large: once is enough": lambda x, t: (x.abs() >= t).nonzero()[:, 1],
}


def judge_columns(given: dict, got: dict, want: dict) -> Verdict:
    x, threshold = given.values()
    columns = got["columns"]
    if not isinstance(columns, torch.Tensor):
        return wrong(f"columns is a {type(columns).__name__}, wanted an int64 tensor of places")
    if columns.dtype == torch.bool:
        return wrong("this is a mask, True or False for each column. Wanted are the places: .nonzero(), in one axis")
    if columns.ndim != 1:
        return wrong(f"columns has shape {list(columns.shape)}, wanted one axis: nonzero gives a table, take its column")
    if columns.is_floating_point():
        return wrong("columns holds values of the activations, wanted the places of the columns")
    if torch.equal(columns.long(), want["columns"]):
        return right()
    for said, mistake in COLUMN_MISTAKES.items():
        if torch.equal(columns.long().sort().values, mistake(x, threshold).sort().values):
            return wrong(said)
    if torch.equal(columns.long().sort().values, want["columns"]):
        return wrong("these are the right columns in another order, wanted ascending")
    return wrong(f"got columns {columns.tolist()}, wanted {want['columns'].tolist()}")


def _column_like(said: str) -> Mutant:
    return Mutant(next(v for k, v in COLUMN_MISTAKES.items() if said in k), said)


OUTLIER_COLUMNS = Exercise(
    id="4.3", name="outlier_columns", title="Outlier columns", minutes=4, difficulty=1, points=1,
    returns=("columns",), inputs=column_inputs, reference=int8.outlier_columns, judge=judge_columns,
    mutants=(
        *(
            _column_like(said)
            for said in (
                "at or above", "below zero", "in every token", "mean magnitude", "these are tokens", "once is enough",
            )
        ),
        Mutant(lambda x, t: (x.abs() >= t).any(0), "a mask"),
        Mutant(lambda x, t: (x.abs() >= t).any(0).nonzero(), "one axis"),
    ),
)  # fmt: skip


# 4.4 ------------------------------------------------------------------------------------------------------------------


def mixed_inputs(seed: int) -> dict:
    """Four tokens: without an outlier, with two beyond the threshold on either side of 0, with one exactly at minus the threshold,
    and one whose largest value stands in an outlier column. Values that float16 holds, none of them near a tie, so that neither
    decides anything."""
    g = generator(seed)
    threshold = 6.0
    weight_codes = torch.randint(-127, 128, (5, 12), generator=g, dtype=torch.int8)
    first, second, third = torch.randperm(12, generator=g)[:3].tolist()
    rows = []
    while len(rows) < 4:
        row = torch.randn(12, generator=g).clamp(-2, 2).half().float()
        row[first] = (0.3, 24.0, 0.2, 4.5)[len(rows)]
        row[second] = (-0.2, 0.4, -6.0, 0.1)[len(rows)]
        row[third] = (0.5, -11.0, 0.6, -0.3)[len(rows)]
        shares = [row[row.abs() < limit].abs().max() for limit in (threshold, threshold + 0.1, 3.0, 100.0)]
        steps = torch.stack([row * 127 / share for share in shares])
        if ((steps - steps.floor() - 0.5).abs() > 1e-3).all():
            rows.append(row)
    return {
        "activations": torch.stack(rows),
        "weight_codes": weight_codes,
        "weight_absmax": 0.2 + torch.rand(5, generator=g),
        "threshold": threshold,
    }


def mixed_matmul(
    activations: torch.Tensor, weight_codes: torch.Tensor, weight_absmax: torch.Tensor, threshold: float
) -> torch.Tensor:
    """labsupport's product in bitsandbytes' form, from a weight that is taken apart."""
    return int8.linear(activations, Int8Tensor(weight_codes, weight_absmax), threshold=threshold)


def _mixed(x, codes, absmax, threshold, *, large=None, share=None, inside=None, kept=None, outside=None):
    """The right answer, with parts that can be replaced: which values are large, what a row's magnitude is taken over, what
    is rounded, and the two factors of the floating-point product."""
    large = (x.abs() >= threshold) if large is None else large
    columns = large.any(0)
    share = x.masked_fill(large, 0).abs().amax(1) if share is None else share(x, large, columns)
    inside = x.masked_fill(columns[None], 0) if inside is None else inside(x, large, columns)
    rounded = torch.round(inside * (127 / share[:, None])).clamp(-127, 127)
    product = (rounded.double() @ codes.double().t()).float() * share[:, None] * absmax / 127**2
    kept = codes * absmax[:, None] / 127 if kept is None else kept(codes, absmax)
    outside = x.masked_fill(~columns[None], 0) if outside is None else outside(x, large, columns)
    return product + outside @ kept.t()


MIXED_MISTAKES: dict[str, Callable] = {
    "the outliers still count for their row's magnitude, so the other values are rounded as coarsely as before. Take them out "
    "first, then look for the largest": partial(_mixed, share=lambda x, large, columns: x.abs().amax(1)),
    "this is the paper's rule, where the whole column leaves before a row's magnitude is taken. In bitsandbytes only the values "
    "that reach the threshold leave: a small value in an outlier column still counts": partial(
        _mixed, share=lambda x, large, columns: x.masked_fill(columns[None], 0).abs().amax(1)
    ),
    "small values in outlier columns are counted twice: in the int8 product, and again in the floating-point one. Their codes "
    "must be 0": partial(_mixed, inside=lambda x, large, columns: x.masked_fill(large, 0)),
    "the outlier columns are in both products: set their codes to 0": partial(_mixed, inside=lambda x, large, columns: x),
    "the floating-point part is missing: the outlier columns were taken out and never put back": partial(
        _mixed, outside=lambda x, large, columns: torch.zeros_like(x)
    ),
    "small values in outlier columns are lost: the floating-point product takes the whole column, not only its large values": (
        partial(_mixed, outside=lambda x, large, columns: x.masked_fill(~large, 0))
    ),
    "it takes out single values, and leaves the small ones of the same columns in int8. That adds up too, but then the "
    "floating-point part is no product of a few columns": partial(
        _mixed, inside=lambda x, large, columns: x.masked_fill(large, 0), outside=lambda x, large, columns: x.masked_fill(~large, 0)
    ),
    "the floating-point part multiplies by codes. They stand for code * absmax / 127": partial(
        _mixed, kept=lambda codes, absmax: codes.float()
    ),
    "the floating-point part is 127 times too large: a code stands for code * absmax / 127": partial(
        _mixed, kept=lambda codes, absmax: codes * absmax[:, None]
    ),
    "the floating-point part is 127 times too small: there only the weight was multiplied by 127, so divide once": partial(
        _mixed, kept=lambda codes, absmax: codes * absmax[:, None] / 127**2
    ),
    "a value that reaches the threshold exactly is left in int8: an outlier is at or above it": (
        lambda x, codes, absmax, threshold: _mixed(x, codes, absmax, threshold, large=x.abs() > threshold)
    ),
    "outliers below zero are left in int8: it is the magnitude that counts": (
        lambda x, codes, absmax, threshold: _mixed(x, codes, absmax, threshold, large=x >= threshold)
    ),
    "nothing is taken out: this is the product of 4.2": (
        lambda x, codes, absmax, threshold: _mixed(x, codes, absmax, threshold, large=torch.zeros_like(x, dtype=torch.bool))
    ),
    "nothing is rounded: this multiplies floating-point activations by the dequantized weight": (
        lambda x, codes, absmax, threshold: x @ (codes * absmax[:, None] / 127).t()
    ),
}


def judge_mixed(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    output, expected = got["output"].float(), want["output"]
    weight = given["weight_codes"] * given["weight_absmax"][:, None] / 127
    # Of the sum of all products, taken positive: the constant's distance, and float32 rounding.
    allowed = CONSTANT * (given["activations"].abs() @ weight.abs().t())
    if ((output - expected).abs() <= allowed).all():
        return right(largest_difference(output, expected), allowed.max().item())
    for said, mistake in MIXED_MISTAKES.items():
        if ((output - mistake(**_named(given))).abs() <= 2 * allowed).all():
            return wrong(said)
    row, column = ((output - expected).abs() > allowed).nonzero()[0].tolist()
    about = ("a token without outliers", "a token with a large value", "a token that reaches the threshold exactly",
             "a token whose largest value stands in an outlier column")[row]  # fmt: skip
    return wrong(f"{about}: output[{row}, {column}] is {output[row, column]:.5g}, wanted {expected[row, column]:.5g}")


def _named(given: dict) -> dict:
    return {
        "x": given["activations"],
        "codes": given["weight_codes"],
        "absmax": given["weight_absmax"],
        "threshold": given["threshold"],
    }


def _mixed_like(said: str) -> Mutant:
    mistake = next(v for k, v in MIXED_MISTAKES.items() if said in k)
    return Mutant(lambda x, codes, absmax, threshold: mistake(x=x, codes=codes, absmax=absmax, threshold=threshold), said)


MIXED_MATMUL = Exercise(
    id="4.4", name="mixed_matmul", title="The rescue", minutes=14, difficulty=3, points=4,
    returns=("output",), inputs=mixed_inputs, reference=mixed_matmul, judge=judge_mixed,
    mutants=tuple(
        _mixed_like(said)
        for said in (
            "still count", "paper's rule", "counted twice", "in both products", "never put back", "are lost", "takes out single",
            "multiplies by codes", "too large", "too small", "at or above", "below zero", "nothing is taken out",
            "nothing is rounded",
        )
    ),
)  # fmt: skip


# 4.5 ------------------------------------------------------------------------------------------------------------------

THRESHOLDS = (3.0, 6.0, 12.0)
MOST_MOVED, LEAST_MOVED, LEAST_RESCUED = 1.05, 3.0, 5.0


def batch_inputs(seed: int) -> dict:
    """Activations without any outlier: the largest is below 2.4."""
    return {"bulk": (0.6 * torch.randn(16, 32, generator=generator(seed))).clamp(-2.4, 2.4)}


def two_batches(bulk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Far above all thresholds, and between two of them."""
    indifferent, sensitive = bulk.clone(), bulk.clone()
    indifferent[:, 0] = 40.0
    sensitive[:, 0] = 9.0
    return indifferent, sensitive


def output_error(activations: torch.Tensor, threshold: float) -> float:
    """Output error of LLM.int8(), root mean square, with a weight that int8 holds exactly: all of it comes from the activations."""
    codes = torch.randint(-127, 128, (24, activations.shape[1]), generator=generator(0), dtype=torch.int8)
    weight = Int8Tensor(codes, torch.ones(24))
    exact = activations.double() @ weight.dequantize().double().t()
    error = int8.linear(activations.half().float(), weight, threshold=threshold) - exact
    return error.pow(2).mean().sqrt().item()


def judge_batches(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    bulk = given["bulk"]
    moved, rescued = {}, {}
    for name, batch in got.items():
        changed = (batch != bulk).any(0).nonzero().view(-1)
        if len(changed) != 1:
            return wrong(f"{name} differs from bulk in {len(changed)} columns, wanted one: change a copy of bulk, in one column")
        errors = [output_error(batch.float(), threshold) for threshold in THRESHOLDS]
        moved[name] = max(errors) / min(errors)
        rescued[name] = output_error(batch.float(), 0.0) / min(errors)
    if moved["sensitive"] <= MOST_MOVED and moved["indifferent"] >= LEAST_MOVED:
        return wrong("the two are exchanged: indifferent comes first")
    if moved["indifferent"] > MOST_MOVED:
        said = f"indifferent: between thresholds 3, 6 and 12 the error changes by a factor {moved['indifferent']:.2g}"
        return wrong(said + ", wanted none. Which values would be taken out at all three?")
    if rescued["indifferent"] < LEAST_RESCUED:
        said = f"indifferent: taking its column out makes the error {rescued['indifferent']:.2g} times smaller"
        return wrong(said + f", wanted at least {LEAST_RESCUED:g} times. What must one value do to the step of its row?")
    if moved["sensitive"] < LEAST_MOVED:
        said = f"sensitive: between thresholds 3, 6 and 12 the error changes by a factor {moved['sensitive']:.2g}"
        column = got["sensitive"][:, (got["sensitive"] != bulk).any(0)].abs()
        if column.max() < min(THRESHOLDS):
            return wrong(said + ". Its column is left in at all three: no value of it reaches one of them")
        if column.max() >= max(THRESHOLDS):
            return wrong(said + ". Its column is taken out at all three")
        return wrong(said + f", wanted {LEAST_MOVED:g}. Left in at one of them, it must do harm: how large, how often?")
    return right()


def _one_column(indifferent: float, sensitive: float, rows: int = 16) -> Callable:
    def answer(bulk):
        first, second = bulk.clone(), bulk.clone()
        first[:, 0] = indifferent
        second[:rows, 0] = sensitive
        return first, second

    return answer


TWO_BATCHES = Exercise(
    id="4.5", name="two_batches", title="When the threshold matters", minutes=10, difficulty=3, points=3,
    returns=("indifferent", "sensitive"), inputs=batch_inputs, reference=two_batches, judge=judge_batches,
    mutants=(
        Mutant(_one_column(9.0, 40.0), "exchanged"),
        Mutant(_one_column(9.0, 9.0), "at all three"),
        Mutant(_one_column(2.0, 9.0), "step of its row"),
        Mutant(_one_column(40.0, 2.5), "left in at all three"),
        Mutant(_one_column(40.0, 13.0), "taken out at all three"),
        Mutant(_one_column(40.0, 9.0, rows=1), "how often"),
        Mutant(lambda bulk: (20 * bulk, 5 * bulk), "in one column"),
        Mutant(lambda bulk: (bulk.clone(), bulk.clone()), "in 0 columns"),
    ),
)  # fmt: skip


# 4.6 ------------------------------------------------------------------------------------------------------------------


def layer_inputs(seed: int) -> dict:
    g = generator(seed)
    return {"weight": torch.randn(24, 64, generator=g), "bias": torch.randn(24, generator=g)}


def _layers(weight: torch.Tensor, bias: torch.Tensor) -> dict[str, tuple[Callable, bool]]:
    """Layers to look at from outside, and whether each rounds its weight at most."""
    four, eight, whole = rtn.quantize(weight, 4, 32).dequantize(), int8.quantize(weight), int8.quantize(weight, "tensor")
    return {
        "float": (lambda x: x @ weight.t(), True),
        "float with a bias": (lambda x: x @ weight.t() + bias, True),
        "4-bit weights": (lambda x: x @ four.t() + bias, True),
        "int8 weights": (lambda x: x @ eight.dequantize().t(), True),
        "int8 on both sides": (lambda x: int8.linear(x, eight, bias, threshold=0.0), False),
        "int8 on both sides, per tensor": (lambda x: int8.linear(x, whole, threshold=0.0, granularity="tensor"), False),
        "LLM.int8()": (lambda x: int8.linear(x, eight, bias), False),
    }


def is_weight_only(layer: Callable, in_features: int) -> bool:
    """Whether a layer does arithmetic on its input as it comes: then it is linear, up to a bias and floating-point rounding.

    Sums, because doubling an input doubles its magnitudes and leaves its codes alone; noise, because zeros and ones are exact in
    int8; of size 1, because everything above a threshold would be multiplied in floating point.
    """
    a, b = torch.randn(2, 8, in_features, generator=generator(0))
    together, apart = layer(a + b) - layer(torch.zeros_like(a)), layer(a) + layer(b) - 2 * layer(torch.zeros_like(a))
    return bool((together - apart).abs().max() < 1e-4 * together.abs().max())


def drive_layers(answer: Callable, given: dict) -> dict:
    """The answer's word on every layer, and the least rounding that its inputs would have seen in int8."""
    weight = given["weight"]
    errors, found = [], {}
    for name, (layer, _) in _layers(**given).items():

        def watched(x: torch.Tensor, layer: Callable = layer) -> torch.Tensor:
            rows = x.detach().reshape(-1, weight.shape[1]).float()
            error = (int8.quantize(rows).dequantize() - rows).abs().amax(1) / rows.abs().amax(1).clamp(min=1e-30)
            errors.append(error.max().item())
            return layer(rows).view(*x.shape[:-1], -1)

        found[name] = answer(watched, weight.shape[1])
    return found | {"rounding": max(errors, default=0.0)}


def judge_layers(given: dict, got: dict, want: dict) -> Verdict:
    truth = {name: weight_only for name, (_, weight_only) in _layers(**given).items()}
    said = {name: got[name] for name in truth}
    if fault := shape_fault(said, truth):
        return wrong(fault)
    missed = [name for name in truth if said[name] != truth[name]]
    if not missed:
        return right()
    if not any(said.values()):
        return wrong(
            "it finds no layer weight-only, not even one in plain float32. A float32 sum depends on rounding too, in the seventh "
            "digit: allow for that"
        )
    if {"float with a bias", "4-bit weights"} <= set(missed) and "float" not in missed:
        return wrong("a layer with a bias is taken for one that rounds its input: f(0) is not 0 there, take it off first")
    if missed == ["LLM.int8()"]:
        return wrong(
            "LLM.int8() is taken for weight-only. Inputs this large make every column an outlier: nothing was left in int8"
        )
    if all(said[name] for name in missed):
        taken = f"{missed[0]} is taken for weight-only. "
        if got["rounding"] < 1e-4:
            return wrong(
                taken + "All inputs you tried are exact in int8: zeros and ones, or one value in all places, lose nothing. Which "
                "inputs would rounding move?"
            )
        return wrong(
            taken + "A row times 2, or -1, has the same codes up to their sign, so rounding does not show in f(2x) = 2 f(x). "
            "What else does a linear function promise?"
        )
    name = next(name for name in missed if truth[name])
    return wrong(f"{name} is taken for a layer that rounds its input, and it does not")


def _by_doubling(layer, n):
    x = torch.randn(4, n, generator=generator(1))
    zero = layer(torch.zeros_like(x))
    return bool(((layer(2 * x) - zero) - 2 * (layer(x) - zero)).abs().max() < 1e-4)


def _by_one_hot(layer, n):
    a, b = torch.eye(n)[:2]
    zero = layer(torch.zeros(1, n))
    return bool((layer((a + b)[None]) - layer(a[None]) - layer(b[None]) + zero).abs().max() < 1e-4)


def _by_sums(layer, n, size=1.0, allowed=1e-4, bias=True):
    a, b = size * torch.randn(2, 8, n, generator=generator(1))
    zero = layer(torch.zeros_like(a)) if bias else 0
    gap = layer(a + b) - layer(a) - layer(b) + zero
    return bool(gap.abs().max() <= allowed * layer(a + b).abs().max())


def _large_inputs(layer, n):
    # In LLM.int8() the columns of large inputs all leave; per row and per tensor their rounding is left as it was.
    a, b = 40 + 10 * torch.rand(2, 8, n, generator=generator(1))
    gap = layer(a + b) - layer(a) - layer(b) + layer(torch.zeros_like(a))
    return bool(gap.abs().max() <= 1e-4 * layer(a + b).abs().max())


WEIGHT_ONLY = Exercise(
    id="4.6", name="is_weight_only", title="Weight-only, seen from outside", minutes=10, difficulty=3, points=3,
    returns=("weight_only",), inputs=layer_inputs, reference=is_weight_only, judge=judge_layers, drive=drive_layers,
    mutants=(
        Mutant(_by_doubling, "same codes"),
        Mutant(_by_one_hot, "exact in int8"),
        Mutant(lambda layer, n: True, "exact in int8"),
        Mutant(partial(_by_sums, allowed=0.0), "seventh digit"),
        Mutant(partial(_by_sums, bias=False), "a bias"),
        Mutant(_large_inputs, "nothing was left in int8"),
        Mutant(lambda layer, n: torch.tensor(_by_sums(layer, n)), "wanted bool"),
    ),
)  # fmt: skip

EXERCISES = (QUANTIZE_ROWS, INT8_MATMUL, OUTLIER_COLUMNS, MIXED_MATMUL, TWO_BATCHES, WEIGHT_ONLY)
