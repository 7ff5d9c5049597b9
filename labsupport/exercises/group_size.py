"""Chapter 3: groups, what they store, where they pay, and when a difference is real."""

from __future__ import annotations

import torch

from labsupport.exercises.base import Exercise, Mutant, Verdict, generator, right, shape_fault, wrong
from labsupport.model import evaluate
from labsupport.pipeline import budget
from labsupport.quant import grid, rtn

# One division in float32 rounds by at most 2**-24 of its result; four units of 2**-23 cover any order of operations.
FLOAT32 = 4 * 2**-23


# 3.1 ------------------------------------------------------------------------------------------------------------------


def group_inputs(seed: int) -> dict:
    """Four rows of four groups of four, so that a scale which broadcasts along the wrong axis raises nothing.

    Rows and groups differ in size by powers of ten; one group is all zero, one constant, one all negative.
    """
    g = generator(seed)
    weight = torch.randn(4, 16, generator=g) * torch.tensor([1.0, 0.1, 10.0, 3.0])[:, None]
    weight[:, 4:8] *= torch.tensor([5.0, 0.3, 0.2, 7.0])[:, None]
    weight[0, 12:] = 0
    weight[1, 8:12] = 0.25
    weight[2, :4] = -1 - torch.rand(4, generator=g)
    return {"weight": weight, "bits": 3, "group_size": 4}


def quantize_groups(weight: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """labsupport's round-to-nearest, taken apart: codes as floats, scale, zero_point."""
    stored = rtn.quantize(weight, bits, group_size, scale_dtype=torch.float32)
    return stored.codes.float(), stored.scale, stored.zero_point


def _grid(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero-point over the last axis, which is kept at length 1."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return grid.grids(low, high, bits, symmetric=False)


def _in_groups(weight: torch.Tensor, bits: int, size: int, groups: torch.Tensor | None = None, spread=None):
    """The right answer, or one with other groups, or with the scales laid over the columns in another way."""
    groups = weight.reshape(len(weight), -1, size) if groups is None else groups
    scale, zero = (t.reshape(len(weight), -1) for t in _grid(groups, bits))
    spread = spread or (lambda t: t.repeat_interleave(size, dim=1))
    return grid.quantize(weight, spread(scale), spread(zero), bits), scale, zero


def _along_rows(w: torch.Tensor, b: int, g: int):
    scale, zero = (t.squeeze(-1) for t in _grid(w.reshape(-1, g, w.shape[1]).transpose(1, 2), b))
    return grid.quantize(w, scale.repeat_interleave(g, 0), zero.repeat_interleave(g, 0), b), scale, zero


def _whole_rows(w: torch.Tensor, b: int, g: int):
    return _in_groups(w, b, g, groups=w[:, None].expand(-1, w.shape[1] // g, -1))


def _strided(w: torch.Tensor, b: int, g: int):
    return _in_groups(w, b, g, w.reshape(len(w), g, -1).transpose(1, 2), lambda t: t.repeat(1, g))


def _mixed_rows(w: torch.Tensor, b: int, g: int):
    return _in_groups(w, b, g, w.t().reshape(-1, g))


def _repeated_whole(w: torch.Tensor, b: int, g: int):
    return _in_groups(w, b, g, spread=lambda t: t.repeat(1, g))


def _broadcast(w: torch.Tensor, b: int, g: int):
    groups = w.reshape(len(w), -1, g)
    scale, zero = (t.squeeze(-1) for t in _grid(groups, b))
    return grid.quantize(groups, scale, zero, b).reshape(w.shape), scale, zero


def _without_zero(w: torch.Tensor, b: int, g: int):
    low, high = w.reshape(len(w), -1, g).aminmax(dim=2)
    scale = ((high - low) / (2**b - 1)).clamp(min=1e-9)
    zero = torch.round(-low / scale).clamp(0, 2**b - 1)
    wide = (t.repeat_interleave(g, dim=1) for t in (scale, zero))
    return grid.quantize(w, *wide, b), scale, zero


def _unguarded(w: torch.Tensor, b: int, g: int):
    codes, scale, zero = _in_groups(w, b, g)
    empty = (w.reshape(len(w), -1, g) == 0).all(2)
    return codes, scale.masked_fill(empty, 0.0), zero.masked_fill(empty, torch.nan)


SCALE_MISTAKES = {
    "all groups of a row have the same scale: it was taken over the whole row. Reduce over the weights of one group": _whole_rows,
    "a group holds every (in_features / group_size)-th weight of its row. Its weights are neighbors: the last axis of the "
    "reshape is group_size long": _strided,
    "a group holds weights of different rows: the weight was transposed before it was reshaped": _mixed_rows,
    "a group whose weights all have one sign: its range must still reach 0, as in 2.5": _without_zero,
}
CODE_MISTAKES = {
    "scale and zero_point are right, but column j gets those of group j % groups; it belongs to group j // group_size. "
    "repeat_interleave for repeat?": _repeated_whole,
    "scale and zero_point are right, but they broadcast along the wrong axis: [out, groups] against [out, groups, group_size] "
    "lines groups up with the weights in a group. keepdim=True, or [..., None]": _broadcast,
}


def judge_groups(given: dict, got: dict, want: dict) -> Verdict:
    weight, bits, size = given.values()
    out, groups = want["scale"].shape
    codes, scale, zero = got["codes"], got["scale"], got["zero_point"]
    if isinstance(scale, torch.Tensor):
        if scale.shape == (out, 1):
            return wrong("there is one scale for each row, wanted one for each group: scale [out_features, groups]")
        if scale.shape == (out // size, weight.shape[1]):
            return wrong("groups run down the columns, over out_features. They run along in_features: the inputs of one output")
        if scale.shape == (out, groups, 1):
            return wrong("scale still has the axis that was reduced, wanted [out_features, groups]: squeeze it at the end")
    if isinstance(codes, torch.Tensor) and codes.shape == (out, groups, size):
        return wrong("the codes are still cut into groups, wanted the shape of the weight: reshape them back")
    finite = {k: v.nan_to_num() if isinstance(v, torch.Tensor) else v for k, v in got.items()}
    if fault := shape_fault(finite, want):
        return wrong(fault)
    codes, scale, zero = codes.float(), scale.float(), zero.float()
    if not ((scale > 0) & scale.isfinite() & zero.isfinite()).all():
        return wrong("an all-zero group: its scale is 0 or its zero_point not a number. A grid without range gets scale 1")
    off, allowed = (scale - want["scale"]).abs(), FLOAT32 * want["scale"]
    if (off > allowed).any():
        for said, mistake in SCALE_MISTAKES.items():
            if torch.allclose(scale, mistake(weight, bits, size)[1], rtol=1e-5):
                return wrong(said)
        row, group = (off > allowed).nonzero()[0].tolist()
        return wrong(
            f"row {row}, group {group}: the scale is {scale[row, group].item():.4g}, wanted {want['scale'][row, group].item():.4g}"
        )
    if not torch.equal(zero, want["zero_point"]):
        return wrong("the scales are right, the zero-points are not: round(-low / scale), low being at most 0")
    # Dividing and multiplying by the reciprocal may send a quotient that close to a tie to either side of it.
    steps = weight / want["scale"].repeat_interleave(size, dim=1)
    tied = ((steps - steps.floor()) - 0.5).abs() < 1e-4
    if ((codes == want["codes"]) | (tied & ((codes - want["codes"]).abs() == 1))).all():
        return right(off.max().item(), allowed.max().item())
    for said, mistake in CODE_MISTAKES.items():
        if torch.equal(codes, mistake(weight, bits, size)[0]):
            return wrong(said)
    row, column = (codes != want["codes"]).nonzero()[0].tolist()
    return wrong(
        f"scale and zero_point are right; the code of weight[{row}, {column}], in group {column // size}, is "
        f"{codes[row, column].item():g}, wanted {want['codes'][row, column].item():g}"
    )


QUANTIZE_GROUPS = Exercise(
    id="3.1", name="quantize_groups", title="A grid for every group", minutes=12, difficulty=2, points=4,
    returns=("codes", "scale", "zero_point"), inputs=group_inputs, reference=quantize_groups, judge=judge_groups,
    mutants=(
        Mutant(lambda w, b, g: _in_groups(w, b, w.shape[1]), "one scale for each row"),
        Mutant(_whole_rows, "over the whole row"),
        Mutant(_along_rows, "down the columns"),
        Mutant(_strided, "Its weights are neighbors"),
        Mutant(_mixed_rows, "weights of different rows"),
        Mutant(_repeated_whole, "j // group_size"),
        Mutant(_broadcast, "wrong axis"),
        Mutant(_without_zero, "must still reach 0"),
        Mutant(_unguarded, "all-zero group"),
        Mutant(lambda w, b, g: (_in_groups(w, b, g)[0].reshape(len(w), -1, g), *_in_groups(w, b, g)[1:]), "reshape them back"),
    ),
)  # fmt: skip


# 3.2 ------------------------------------------------------------------------------------------------------------------


def storage_inputs(seed: int) -> dict:
    g = generator(seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    return {
        "out_features": pick(8, 24, 40),
        "in_features": pick(256, 768),
        "bits": pick(2, 3, 4, 5, 8),
        "group_size": pick(16, 32, 64, 128),
    }


def counted_bits(out_features: int, in_features: int, bits: int, group_size: int, symmetric: bool) -> float:
    """No formula: quantizes a weight of that shape and counts the bytes of what is stored."""
    return rtn.quantize(torch.zeros(out_features, in_features), bits, group_size, symmetric).bits_per_weight


def drive_storage(answer, given: dict) -> dict:
    kinds = {"asymmetric": False, "symmetric": True}
    return {kind: answer(**given, symmetric=symmetric) for kind, symmetric in kinds.items()}


def judge_storage(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    rows, columns, bits, size = given.values()
    off = max(abs(got[k] - want[k]) for k in want)
    if off <= 1e-9:  # a handful of float64 operations on numbers below 100
        return right(off, 1e-9)

    def like(asymmetric: float, symmetric: float) -> bool:
        return abs(got["asymmetric"] - asymmetric) < 1e-9 and abs(got["symmetric"] - symmetric) < 1e-9

    scale, both = bits + 16 / size, bits + (16 + bits) / size
    likely = {
        "the zero-points of the asymmetric grid are missing: one code of `bits` bits for each group": like(scale, scale),
        "the symmetric grid pays for zero-points too. It needs none: they are 2**(bits - 1) everywhere": like(both, both),
        "a zero-point is counted as 16 bits. It is a code, so it takes `bits` bits": like(bits + 32 / size, scale),
        "a scale is counted as 32 bits. It is stored in float16": like(both + 16 / size, scale + 16 / size),
        "there is one scale for each group, not one for each row": like(bits + (16 + bits) / columns, bits + 16 / columns),
        "this is one scale for the whole weight": like(bits + (16 + bits) / (rows * columns), bits + 16 / (rows * columns)),
        "a scale is shared by the weights of its group: divide its bits by their number": like(2 * bits + 16, bits + 16),
        "this is the bits of the whole weight: divide by the number of weights": like(
            both * rows * columns, scale * rows * columns
        ),
        "the codes are missing": like(both - bits, scale - bits),
        "these are bytes: 8 bits each": like(both / 8, scale / 8),
    }
    for said, looks in likely.items():
        if looks:
            return wrong(said)
    kind = "symmetric" if abs(got["asymmetric"] - want["asymmetric"]) < 1e-9 else "asymmetric"
    return wrong(f"{kind}, {bits} bits, groups of {size}: got {got[kind]:.6g} bits a weight, counted {want[kind]:.6g}")


BITS_PER_WEIGHT = Exercise(
    id="3.2", name="bits_per_weight", title="The bill, to the bit", minutes=6, difficulty=1, points=2,
    returns=("asymmetric", "symmetric"), inputs=storage_inputs, reference=counted_bits, judge=judge_storage, drive=drive_storage,
    mutants=(
        Mutant(lambda out_features, in_features, bits, group_size, symmetric: bits + 16 / group_size, "are missing"),
        Mutant(lambda out_features, in_features, bits, group_size, symmetric: bits + (16 + bits) / group_size, "needs none"),
        Mutant(
            lambda out_features, in_features, bits, group_size, symmetric: bits + (16 if symmetric else 32) / group_size,
            "counted as 16 bits",
        ),
        Mutant(
            lambda out_features, in_features, bits, group_size, symmetric: bits + (32 + bits * (not symmetric)) / group_size,
            "counted as 32 bits",
        ),
        Mutant(
            lambda out_features, in_features, bits, group_size, symmetric: bits + (16 + bits * (not symmetric)) / in_features,
            "not one for each row",
        ),
        Mutant(
            lambda out_features, in_features, bits, group_size, symmetric: bits + 16 + bits * (not symmetric),
            "divide its bits",
        ),
    ),
)  # fmt: skip


# 3.3 ------------------------------------------------------------------------------------------------------------------


def two_orders(row: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted, neighbors are alike. Dealt out like cards from the sorted row, every group gets its share of both ends."""
    order = row.argsort()
    return order, order.reshape(group_size, -1).t().reshape(-1)


def order_inputs(seed: int) -> dict:
    """Sixteen large weights of either sign among 224 small ones, in no order: as many of each as there are groups."""
    g = generator(seed)
    small = 0.3 * torch.randn(224, generator=g)
    large = 3 + torch.rand(16, 2, generator=g)
    row = torch.cat([small, large[:, 0], -large[:, 1]])
    return {"row": row[torch.randperm(256, generator=g)], "group_size": 16}


def _order_error(row: torch.Tensor, order: torch.Tensor, group_size: int) -> float:
    ordered = row[order][None]
    stored = rtn.quantize(ordered, 4, group_size, scale_dtype=torch.float32)
    return (stored.dequantize() - ordered).double().pow(2).sum().item()


MOST_LEFT, LEAST_LEFT = 0.2, 0.68


def judge_orders(given: dict, got: dict, want: dict) -> Verdict:
    row, size = given["row"], given["group_size"]
    if fault := shape_fault(got, want):
        return wrong(fault)
    places = torch.arange(len(row))
    for name, order in got.items():
        if order.is_floating_point():
            return wrong(f"{name} holds weights, wanted their places: argsort for sort?")
        if not torch.equal(order.sort().values, places):
            return wrong(f"{name} is not an order: each place from 0 to {len(row) - 1} once")
    one_grid = _order_error(row, places, len(row))
    helpful, useless = (_order_error(row, got[k], size) / one_grid for k in ("helpful", "useless"))
    # Room for other ideas than the reference's, which reaches 0.05 and 0.75; an order by chance leaves 0.3 to 0.66.
    if helpful > MOST_LEFT and useless < MOST_LEFT:
        return wrong("the two are exchanged: helpful comes first")
    if helpful >= MOST_LEFT:
        hint = "A group's step is set by its range. Which weights should share a group, so that few groups have a long one?"
        return wrong(f"helpful leaves {helpful:.2f} of the squared error of one grid for all, wanted less than {MOST_LEFT}. {hint}")
    if useless <= LEAST_LEFT:
        hint = "A group gains nothing where its range is nearly the row's. Which weights would see to that in every group?"
        return wrong(
            f"useless leaves {useless:.2f} of the squared error of one grid for all, wanted more than {LEAST_LEFT}. {hint}"
        )
    return right()


TWO_ORDERS = Exercise(
    id="3.3", name="two_orders", title="The same weights in two orders", minutes=10, difficulty=3, points=3,
    returns=("helpful", "useless"), inputs=order_inputs, reference=two_orders, judge=judge_orders,
    mutants=(
        Mutant(lambda row, g: (torch.arange(len(row)), torch.arange(len(row))), "should share a group"),
        Mutant(lambda row, g: (row.argsort().reshape(g, -1).t().reshape(-1), row.argsort()), "exchanged"),
        Mutant(lambda row, g: (row.sort().values, row), "argsort"),
        Mutant(lambda row, g: (row.argsort(), row.argsort(descending=True)), "in every group"),
        Mutant(lambda row, g: (row.argsort(), torch.randperm(len(row), generator=generator(0))), "in every group"),
        Mutant(lambda row, g: (row.argsort(), row.argsort() // g), "is not an order"),
    ),
)  # fmt: skip


# 3.4 ------------------------------------------------------------------------------------------------------------------


def bootstrap_inputs(seed: int) -> dict:
    """Thirty documents of very different length and difficulty. The longest has an effect of its own: the changes are skewed."""
    g = generator(seed)
    tokens = torch.exp(3 + 3 * torch.rand(30, generator=g)).long()
    tokens[4] = 2000
    each = (1 + 6 * torch.rand(30, generator=g)).double()
    extra = (0.25 + 0.03 * torch.randn(30, generator=g)).double()
    extra[4] = 0.6
    draws = torch.randint(0, 30, (2000, 30), generator=g)
    return {"loss": each * tokens, "other_loss": (each + extra) * tokens, "tokens": tokens, "draws": draws}


def _changes(loss, other_loss, tokens, draws) -> torch.Tensor:
    return torch.expm1((other_loss - loss)[draws].sum(1) / tokens[draws].sum(1))


def _ends(values: torch.Tensor, low: float = 0.025, high: float = 0.975) -> tuple[float, float]:
    return tuple(torch.quantile(values.double(), torch.tensor([low, high], dtype=torch.float64)).tolist())


def _interval_mistakes(loss, other_loss, tokens, draws) -> dict[str, tuple[float, float]]:
    change = _changes(loss, other_loss, tokens, draws)
    extra, drawn = (other_loss - loss)[draws], tokens[draws]
    both = [torch.exp(t[draws].sum(1) / drawn.sum(1)) for t in (loss, other_loss)]
    spread = 1.96 * change.std().item()
    return {
        "every document counts the same here, long or short. Perplexity is of tokens: sum losses and tokens first, divide once": (
            _ends(torch.expm1((extra / drawn).mean(1)))
        ),
        "this is a mean of the documents' own perplexity changes: sum losses and tokens first, divide once, then exp": (
            _ends(torch.expm1(extra / drawn).mean(1))
        ),
        "this is in nats. exp of it, minus 1, is the relative change in perplexity": _ends(extra.sum(1) / drawn.sum(1)),
        "this is the ratio of perplexities: the change is 1 less": _ends(both[1] / both[0]),
        "this is the difference of perplexities, not relative to the first model's": _ends(both[1] - both[0]),
        "this is the relative change of the loss, not of perplexity": _ends(extra.sum(1) / loss[draws].sum(1)),
        "the sign is turned: the change goes from loss to other_loss": _ends(_changes(other_loss, loss, tokens, draws)),
        "it leaves 5 % outside at either end: an interval of 95 % leaves 2.5 %": _ends(change, 0.05, 0.95),
        "these are 1.96 standard deviations either side of the mean. The draws have percentiles of their own, no bell needed": (
            (change.mean().item() - spread, change.mean().item() + spread)
        ),
    }


def judge_interval(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    low, high = got["low"], got["high"]
    # Percentiles are read off between neighbors in different ways; the neighbors' distance is allowed.
    change = _changes(**given).sort().values
    allowed = max((change[51] - change[48]).item(), (change[-49] - change[-52]).item())
    off = max(abs(low - want["low"]), abs(high - want["high"]))
    if off <= allowed:
        return right(off, allowed)
    for said, (mistaken_low, mistaken_high) in _interval_mistakes(**given).items():
        if abs(low - mistaken_low) < 1e-9 and abs(high - mistaken_high) < 1e-9:
            return wrong(said)
    if low > high:
        return wrong("low is above high")
    wider = (high - low) / (want["high"] - want["low"])
    said = f"got [{low:.4f}, {high:.4f}], wanted [{want['low']:.4f}, {want['high']:.4f}]"
    if wider > 1.5:
        return wrong(f"{said}: {wider:.1f} times as wide. Are both models scored on the same draw of documents?")
    return wrong(said)


def _interval_like(said: str):
    return Mutant(lambda *given: next(v for k, v in _interval_mistakes(*given).items() if said in k), said)


def _unpaired(loss, other_loss, tokens, draws):
    others = draws.flip(0)
    before = loss[draws].sum(1) / tokens[draws].sum(1)
    return _ends(torch.expm1(other_loss[others].sum(1) / tokens[others].sum(1) - before))


PAIRED_INTERVAL = Exercise(
    id="3.4", name="paired_interval", title="Is the difference real?", minutes=10, difficulty=3, points=3,
    returns=("low", "high"), inputs=bootstrap_inputs, reference=evaluate.paired_interval, judge=judge_interval,
    mutants=(
        Mutant(_unpaired, "the same draw"),
        *(
            _interval_like(said)
            for said in (
                "counts the same", "documents' own perplexity", "in nats", "ratio of perplexities", "difference of perplexities",
                "change of the loss", "sign is turned", "5 % outside", "1.96",
            )
        ),
    ),
)  # fmt: skip


# 3.5 ------------------------------------------------------------------------------------------------------------------


def rank_inputs(seed: int) -> dict:
    """Eight layers of three sizes, one of them hurt by the upgrade; drawn again until every mistake gives an order of its own."""
    g = generator(seed)
    while True:
        extra = torch.tensor([40, 40, 20, 120, 120, 20, 40, 20])[torch.randperm(8, generator=g)] * 16
        before = (0.5 + torch.rand(8, generator=g)) * extra**0.5
        kept = 0.3 + 0.6 * torch.rand(8, generator=g)
        kept[int(torch.randint(8, (1,), generator=g))] = 1.1
        given = {"error": torch.stack([before, before * kept], 1), "nbytes": torch.stack([extra * 12, extra * 13], 1)}
        orders = [budget.rank_layers(**given), *_rank_mistakes(**given).values()]
        if len({tuple(order.tolist()) for order in orders}) == len(orders):
            return given


def _rank_mistakes(error: torch.Tensor, nbytes: torch.Tensor) -> dict[str, torch.Tensor]:
    saved, extra = error[:, 0] - error[:, 1], nbytes[:, 1] - nbytes[:, 0]
    best = (saved / extra).argsort(descending=True)
    return {
        "the order is turned: the layer that gains most for a byte comes first": best.flip(0),
        "these are ranks: entry i says how layer i did. Wanted is the layer in place i, as argsort gives it": best.argsort(),
        "this ranks by the error saved, whatever it costs: a large layer saves more and pays more": saved.argsort(descending=True),
        "this ranks by the share of its error that a layer saves: a layer with hardly any error comes first": (
            (saved / error[:, 0]).argsort(descending=True)
        ),
        "this ranks by the error before the upgrade; what counts is what the upgrade takes away": error[:, 0].argsort(
            descending=True
        ),
        "this ranks by the error that is left, not by the error saved": (error[:, 1] / extra).argsort(descending=True),
        "this ranks by the bytes added, whatever they buy": extra.argsort(),
    }


def judge_rank(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    order = got["order"]
    if order.is_floating_point() or not torch.equal(order.sort().values, torch.arange(len(order))):
        return wrong(f"order is not an order of the layers: each place from 0 to {len(order) - 1} once, as argsort returns them")
    if torch.equal(order, want["order"]):
        return right()
    for said, mistake in _rank_mistakes(given["error"], given["nbytes"]).items():
        if torch.equal(order, mistake):
            return wrong(said)
    place = int((order != want["order"]).nonzero()[0])
    return wrong(
        f"place {place} holds layer {order[place].item()}, wanted layer {want['order'][place].item()}: error saved per byte"
    )


def _rank_by(said: str):
    return Mutant(lambda e, n: next(v for k, v in _rank_mistakes(e, n).items() if said in k), said)


RANK_LAYERS = Exercise(
    id="3.5", name="rank_layers", title="Where does a byte help most?", minutes=6, difficulty=2, points=2,
    returns=("order",), inputs=rank_inputs, reference=budget.rank_layers, judge=judge_rank,
    mutants=tuple(
        _rank_by(said)
        for said in ("is turned", "are ranks", "whatever it costs", "the share of", "before the upgrade", "error that is left")
    ),
)  # fmt: skip


# 3.6 ------------------------------------------------------------------------------------------------------------------


def spend_inputs(seed: int) -> dict:
    """Ten layers, five choices from coarse to fine. Small layers suffer most, and one is not helped by its first upgrade."""
    g = generator(seed)
    weights = torch.tensor([256, 256, 128, 128, 768, 768, 768, 256, 128, 768])[torch.randperm(10, generator=g)] * 256
    groups = weights[:, None] // torch.tensor([256, 128, 64, 32, 16])
    harm = (0.5 + torch.rand(10, generator=g)) * (128 * 256 / weights)
    harm[weights.argmax()] = (
        0.3  # one of the biggest suffers some, so that it is not served first by those who seek the least error
    )
    error = harm[:, None] * torch.tensor([1.0, 0.8, 0.62, 0.48, 0.35]) ** (0.5 + torch.rand(10, 1, generator=g))
    stuck = int(torch.randint(10, (1,), generator=g))
    error[stuck, 1] = 1.05 * error[stuck, 0]
    nbytes = weights[:, None] * 3 // 8 + groups * 19 // 8
    return {"error": error, "nbytes": nbytes, "budget": int(nbytes[:, 1].sum())}


def _buy_in_order(error: torch.Tensor, nbytes: torch.Tensor, budget: int, order: torch.Tensor) -> torch.Tensor:
    """Layer after layer gets the finest choice that still fits."""
    choice, left = torch.zeros(len(error), dtype=torch.int64), budget - int(nbytes[:, 0].sum())
    for layer in order.tolist():
        fits = (nbytes[layer] - nbytes[layer, 0] <= left).nonzero().flatten()
        choice[layer] = fits[-1]
        left -= int(nbytes[layer, choice[layer]] - nbytes[layer, 0])
    return choice


def _biggest_first(error: torch.Tensor, nbytes: torch.Tensor, budget: int) -> torch.Tensor:
    return _buy_in_order(error, nbytes, budget, nbytes[:, 0].argsort(descending=True, stable=True))


def _smallest_error_first(error: torch.Tensor, nbytes: torch.Tensor, budget: int) -> torch.Tensor:
    return _buy_in_order(error, nbytes, budget, error[:, 0].argsort())


def judge_spend(given: dict, got: dict, want: dict) -> Verdict:
    error, nbytes, limit = given.values()
    if fault := shape_fault(got, want):
        return wrong(fault)
    choice, rows = got["choice"], torch.arange(len(error))
    if choice.is_floating_point() or (choice < 0).any() or (choice >= error.shape[1]).any():
        return wrong(f"choice holds something else than places from 0 to {error.shape[1] - 1}, one for each layer")
    spent = int(nbytes[rows, choice].sum())
    if spent > limit:
        return wrong(f"it takes {spent} bytes, {spent - limit} more than the budget. The bytes of the first choices count too")
    if (choice == 1).all():
        return wrong("this is the uniform choice itself: take bytes from where they help little and spend them where they help")
    total, uniform = error[rows, choice].double().sum().item(), error[:, 1].double().sum().item()
    if total < uniform:
        return right()
    said = f"the errors add up to {total:.4g}, the uniform choice of the same size to {uniform:.4g}"
    if not choice.any():
        return wrong(said + ". Nothing was bought: every layer still has its first choice")
    if torch.equal(choice, _biggest_first(**given)):
        return wrong(said + ". The biggest layers were served first; they pay the most bytes for an upgrade")
    if torch.equal(choice, _smallest_error_first(**given)):
        return wrong(said + ". The layers with the least error were served first; there is little to save there")
    return wrong(said + ". Compare upgrades by the error they save for each byte")


SPEND = Exercise(
    id="3.6", name="spend", title="A budget, spent by layer", minutes=15, difficulty=4, points=4,
    returns=("choice",), inputs=spend_inputs, reference=budget.spend, judge=judge_spend,
    mutants=(
        Mutant(_biggest_first, "biggest layers"),
        Mutant(_smallest_error_first, "least error"),
        Mutant(lambda e, n, b: e.argmin(1), "more than the budget"),
        Mutant(lambda e, n, b: torch.ones(len(e), dtype=torch.int64), "uniform choice itself"),
        Mutant(lambda e, n, b: torch.zeros(len(e), dtype=torch.int64), "Nothing was bought"),
    ),
)  # fmt: skip

EXERCISES = (QUANTIZE_GROUPS, BITS_PER_WEIGHT, TWO_ORDERS, PAIRED_INTERVAL, RANK_LAYERS, SPEND)
