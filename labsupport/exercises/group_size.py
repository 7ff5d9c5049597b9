"""Chapter 3: groups, what they store, where they pay, and when a difference is real."""

from __future__ import annotations

from functools import partial

import torch

from labsupport.exercises.compare import first_difference, got_and_wanted, shown
from labsupport.exercises.form import FLOAT32, Exercise, Fault, Mutant, drive_cases, generator, mistakes_by_option, right
from labsupport.model import evaluate
from labsupport.pipeline import budget
from labsupport.quant import grid, rtn


# 3.1 ------------------------------------------------------------------------------------------------------------------
def group_inputs(seed: int) -> dict:
    """Eight rows of seven groups of four, each group's two ends and two weights within, none near the middle between two levels.

    Rows differ in size by powers of ten. One group is all zero, one constant, one all negative. One reaches as far down as up, on a
    grid with a power of two for a step: there ties are exact, and the code of the upper end has to be clamped.
    """
    g, bits = generator(seed), 5 + seed % 2
    steps = 2**bits - 1
    lowest = -torch.randint(1, steps, (8, 7, 1), generator=g) + 0.8 * torch.rand(8, 7, 1, generator=g) - 0.4
    within = lowest.round() + torch.randint(1, steps, (8, 7, 2), generator=g) + 0.8 * torch.rand(8, 7, 2, generator=g) - 0.4
    groups = torch.cat([lowest, lowest + steps, within], 2)
    groups = groups.gather(2, torch.rand(8, 7, 4, generator=g).argsort(2)) * 10.0 ** (torch.rand(8, 7, 1, generator=g) - 2)
    groups *= torch.tensor([1.0, 0.1, 10.0, 3.0])[torch.arange(8) % 4, None, None]
    groups[0, 6], groups[1, 3] = 0, 0.25
    groups[2, 1] = -1 - torch.rand(4, generator=g)
    groups[3, 4] = torch.tensor([0.5, -steps / 2, 1.5, steps / 2]) / 16
    return {"weight": groups.flatten(1), "bits": bits, "group_size": 4}


def quantize_groups(weight: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """labsupport's round-to-nearest, taken apart: codes as floats, scale, zero_point."""
    stored = rtn.quantize(weight, bits, group_size, scale_dtype=torch.float32)
    return stored.codes.float(), stored.scale, stored.zero_point


def _cut(weight, size):
    return weight.unflatten(1, (-1, size))


def _spread(of_groups, size):
    return of_groups.repeat_interleave(size, dim=1)


def _grouped(weight, bits, size, *, cut=_cut, spread=_spread, one_sided=False, clamp=torch.clamp):
    """A right answer, with what can go wrong as options: groups along the last axis, [out, groups] for each weight, ranges that
    need not reach 0, codes that are not clamped."""
    low, high = cut(weight, size).aminmax(dim=2)
    scale, zero = grid.grids(low, high, bits, symmetric=False)
    if one_sided:
        scale = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
        zero = (-low / scale).round().clamp(0, 2**bits - 1)
    scale, zero = scale.reshape(len(weight), -1), zero.reshape(len(weight), -1)
    return clamp((weight / spread(scale, size)).round() + spread(zero, size), 0, 2**bits - 1), scale, zero


def _rearranged(change):
    """An answer: what change(codes, scale, zero_point, group_size) makes of the right one."""
    return lambda weight, bits, size: change(*_grouped(weight, bits, size), size)


def _shape(name: str, of):
    """Whether an output has the shape that `of` makes of (out_features, in_features, group_size)."""
    return lambda given, got, want: got[name].shape == of(*given["weight"].shape, given["group_size"])


def _zero_group(given: dict, got: dict, want: dict) -> dict | None:
    if any(got[name].shape != want[name].shape for name in want):
        return None
    scale, zero = got["scale"][0, 6].item(), got["zero_point"][0, 6].item()
    return None if 0 < scale < torch.inf and abs(zero) < torch.inf else {"scale": scale, "zero": zero}


def _group_limits(given: dict, want: dict, relative: float) -> dict:
    return {"codes": 0.0, "scale": relative * want["scale"], "zero_point": 0.0}


def _about_groups(given: dict, want: dict, name: str, place: tuple) -> str:
    zeros = "the scales are right, the zero-points are not (round(-low / scale), low being at most 0): "
    return {"scale": "", "zero_point": zeros, "codes": "scale and zero_point are right; "}[name] + name + str(list(place))


QUANTIZE_GROUPS = Exercise(
    id="3.1", name="quantize_groups", title="A grid for every group", minutes=12, difficulty=2, points=4,
    returns=("codes", "scale", "zero_point"), inputs=group_inputs, reference=quantize_groups, about=_about_groups,
    order=("scale", "zero_point"), allowed=partial(_group_limits, relative=FLOAT32), close=partial(_group_limits, relative=1e-5),
    faults=(
        Fault("there is one scale for each row, wanted one for each group: scale [out_features, groups]",
              _shape("scale", lambda rows, columns, size: (rows, 1)),
              (partial(_grouped, cut=lambda w, g: w[:, None], spread=lambda t, g: t),), early=True),
        Fault("groups run down the columns, over out_features. They run along in_features: the inputs of one output",
              _shape("scale", lambda rows, columns, size: (rows // size, columns)),
              (lambda w, b, g: (w, *(of_columns.t() for of_columns in _grouped(w.t(), b, g)[1:])),), early=True),
        Fault("a row has as many groups as a group should have weights: the last axis of the reshape is group_size long",
              _shape("scale", lambda rows, columns, size: (rows, size)),
              (partial(_grouped, cut=lambda w, g: w.unflatten(1, (g, -1)), spread=lambda t, g: _spread(t, 7)),), early=True),
        Fault("scale still has the axis that was reduced, wanted [out_features, groups]: squeeze it at the end",
              _shape("scale", lambda rows, columns, size: (rows, columns // size, 1)),
              (_rearranged(lambda codes, scale, zero, g: (codes, scale[..., None], zero[..., None])),), early=True),
        Fault("the codes are still cut into groups, wanted the shape of the weight: reshape them back",
              _shape("codes", lambda rows, columns, size: (rows, columns // size, size)),
              (_rearranged(lambda codes, scale, zero, g: (_cut(codes, g), scale, zero)),), early=True),
        Fault("an all-zero group: its scale is {scale:g}, its zero_point {zero:g}. A grid without range gets scale 1", _zero_group,
              tuple(_rearranged(lambda codes, scale, zero, g, odd=odd: (codes, scale * (scale != 1), zero.where(scale != 1, odd)))
                    for odd in torch.tensor([0.0, torch.nan])), early=True),
    ),
    mistakes=mistakes_by_option(_grouped, {
        "all groups of a row have the same scale: it was taken over the whole row. Reduce over the weights of one group":
            {"cut": lambda w, g: w[:, None].expand(-1, w.shape[1] // g, -1)},
        "a group holds every (in_features / group_size)-th weight of its row. Its weights are neighbors: the last axis of the "
        "reshape is group_size long": {"cut": lambda w, g: w.unflatten(1, (g, -1)).mT, "spread": lambda t, g: t.repeat(1, g)},
        "a group holds weights of different rows: the weight was transposed before it was reshaped":
            {"cut": lambda w, g: w.t().reshape(len(w), -1, g)},
        "a group whose weights all have one sign: its range must still reach 0, as in 2.5": {"one_sided": True},
        "scale and zero_point are right, but column j gets those of group j % groups; it belongs to group j // group_size. "
        "repeat_interleave for repeat?": {"spread": lambda t, g: t.repeat(1, g)},
    }),
    others=(
        Mutant(partial(_grouped, clamp=lambda codes, low, top: codes), "scale and zero_point are right; codes[3, "),
        Mutant(_rearranged(lambda codes, scale, zero, g: (codes, scale, zero.clamp(min=1))), "the zero-points are not"),
    ),
)  # fmt: skip


# 3.2 ------------------------------------------------------------------------------------------------------------------
def storage_inputs(seed: int) -> dict:
    """Rows in whole bytes of zero-points; no two numbers alike, and no group as long as a scale has bits."""
    g, choices = generator(seed), ((40, 56, 72), (768, 1536), (2, 3, 4, 5, 8), (24, 48, 64, 96))
    sizes = [values[int(torch.randint(len(values), (1,), generator=g))] for values in choices]
    return {"asymmetric": (*sizes, False), "symmetric": (*sizes, True)}


def counted_bits(out_features: int, in_features: int, bits: int, group_size: int, symmetric: bool) -> float:
    """No formula: quantizes a weight of that shape and counts the bytes of what is stored."""
    return rtn.quantize(torch.zeros(out_features, in_features), bits, group_size, symmetric).bits_per_weight


def _bits(rows, columns, bits, size, symmetric, *, scale=16, zero=lambda bits: bits, shared_by=lambda rows, columns, size: size):
    """A right answer, with what can go wrong as options: bits of a scale and of a zero-point, and how many weights share them."""
    return bits + (scale + (0 if symmetric else zero(bits))) / shared_by(rows, columns, size)


BITS_PER_WEIGHT = Exercise(
    id="3.2", name="bits_per_weight", title="The bill, to the bit", minutes=6, difficulty=1, points=2,
    returns=("bits",), inputs=storage_inputs, reference=counted_bits, drive=drive_cases,
    about=lambda given, want, kind, _: f"{kind}, {given[kind][2]} bits, groups of {given[kind][3]}, in bits a weight",
    allowed=lambda given, want: 1e-9, close=lambda given, want: 1e-6,  # a handful of float64 operations; the whole weight's bits
    mistakes=mistakes_by_option(_bits, {
        "the zero-points of the asymmetric grid are missing: one code of `bits` bits for each group": {"zero": lambda bits: 0},
        "a zero-point is counted as 16 bits. It is a code, so it takes `bits` bits": {"zero": lambda bits: 16},
        "a scale is counted as 32 bits. It is stored in float16": {"scale": 32},
        "there is one scale for each group, not one for each row": {"shared_by": lambda rows, columns, size: columns},
        "this is one scale for the whole weight": {"shared_by": lambda rows, columns, size: rows * columns},
        "a scale is shared by the weights of its group: divide its bits by their number": {"shared_by": lambda *sizes: 1},
        "the symmetric grid pays for zero-points too. It needs none: they are 2**(bits - 1) everywhere":
            lambda rows, columns, bits, size, symmetric: _bits(rows, columns, bits, size, False),
        "this is the bits of the whole weight: divide by the number of weights":
            lambda rows, columns, *sizes: _bits(rows, columns, *sizes) * rows * columns,
        "the codes are missing": lambda *sizes: _bits(*sizes) - sizes[2],
        "these are bytes: 8 bits each": lambda *sizes: _bits(*sizes) / 8,
    }),
    others=(Mutant(partial(_bits, scale=17), "asymmetric, "),),
)  # fmt: skip


# 3.3 ------------------------------------------------------------------------------------------------------------------
MOST_LEFT, LEAST_LEFT = 0.2, 2 / 3


def two_orders(row: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted, neighbors are alike. Dealt out like cards from the sorted row, every group gets its share of both ends."""
    order = row.argsort()
    return order, order.reshape(group_size, -1).t().reshape(-1)


def order_inputs(seed: int) -> dict:
    """Sixteen large weights of either sign among 224 small ones, in no order: as many of each as there are groups."""
    g = generator(seed)
    small, large = 0.3 * torch.randn(224, generator=g), 3 + torch.rand(16, 2, generator=g)
    row = torch.cat([small, large[:, 0], -large[:, 1]])
    return {"row": row[torch.randperm(256, generator=g)], "group_size": 16}


def _error_left(row: torch.Tensor, order: torch.Tensor, group_size: int) -> float:
    """Squared error in groups of the reordered row, as a share of what one grid for all leaves."""
    errors = []
    for size in (group_size, len(row)):
        stored = rtn.quantize(row[order][None], 4, size, scale_dtype=torch.float32)
        errors.append((stored.dequantize() - row[order]).double().pow(2).sum().item())
    return errors[0] / errors[1]


def _sorted_alike(a, b) -> bool:
    return torch.equal(a.sort().values, b.sort().values)


def _which(got: dict, is_so) -> dict | None:
    return next(({"name": name} for name, order in got.items() if is_so(order)), None)


def _orders_fault(given: dict, got: dict, want: dict) -> str | None:
    """None where both orders do what they should. The reference's leave 0.05 and 0.72; orders by chance seldom more than 0.66."""
    helpful, useless = (_error_left(given["row"], got[name], given["group_size"]) for name in ("helpful", "useless"))
    left = "{} leaves {} of the squared error of one grid for all, wanted {} than {}. {}"
    if helpful > MOST_LEFT and useless < MOST_LEFT:
        return "the two are exchanged: helpful comes first"
    if helpful >= MOST_LEFT:
        hint = "A group's step is set by its range. Which weights should share a group, so that few groups have a long one?"
        return left.format("helpful", (digits := shown(helpful, MOST_LEFT, 2))[0], "less", digits[1], hint)
    if useless <= LEAST_LEFT:
        hint = "A group gains nothing where its range is nearly the row's. Which weights would see to that in every group?"
        return left.format("useless", (digits := shown(useless, LEAST_LEFT, 2))[0], "more", digits[1], hint)
    return None


TWO_ORDERS = Exercise(
    id="3.3", name="two_orders", title="The same weights in two orders", minutes=10, difficulty=3, points=3,
    returns=("helpful", "useless"), inputs=order_inputs, reference=two_orders, otherwise=_orders_fault,
    accepts=lambda given, got, want: None if _orders_fault(given, got, want) else right(),
    faults=(
        Fault("{name} holds weights, wanted their places: argsort for sort?",
              lambda given, got, want: _which(got, lambda order: _sorted_alike(order.float().flatten(), given["row"])),
              (lambda row, g: (row.sort().values, row), lambda row, g: (row.argsort(), row)), early=True),
        Fault("{name} is not an order: each place from 0 to 255 once",
              lambda given, got, want: _which(got, lambda order: not _sorted_alike(order, torch.arange(256))),
              (lambda row, g: (row.argsort(), row.argsort() // g),)),
    ),
    others=(
        Mutant(lambda row, g: (torch.arange(256), torch.arange(256)), "should share a group"),
        Mutant(lambda row, g: (row.argsort().reshape(g, -1).t().reshape(-1), row.argsort()), "exchanged"),
        Mutant(lambda row, g: (row.argsort(), torch.randperm(256, generator=generator(0))), "in every group"),
    ),
)  # fmt: skip


# 3.4 ------------------------------------------------------------------------------------------------------------------
def bootstrap_inputs(seed: int) -> dict:
    """Thirty documents of very different length and difficulty. The longest has an effect of its own: the changes are skewed."""
    g = generator(seed)
    tokens = torch.exp(3 + 3 * torch.rand(30, generator=g)).long()
    tokens[4] = 2500
    each = (1 + 6 * torch.rand(30, generator=g)).double()
    extra = (0.25 + 0.03 * torch.randn(30, generator=g)).double()
    extra[4] = 0.6
    draws = torch.randint(0, 30, (400, 30), generator=g)
    return {"loss": each * tokens, "other_loss": (each + extra) * tokens, "tokens": tokens, "draws": draws}


def _change(loss, other, tokens):
    return torch.expm1((other - loss).sum(1) / tokens.sum(1))


def _percentiles(values, low=0.025, high=0.975):
    return torch.quantile(values, torch.tensor([low, high], dtype=values.dtype)).tolist()


def _interval(loss, other_loss, tokens, draws, *, change=_change, ends=_percentiles):
    """A right answer, with what can go wrong as options: change(loss, other_loss, tokens [samples, documents]), and its ends."""
    return tuple(ends(change(loss[draws], other_loss[draws], tokens[draws])))


def _unpaired(redrawn):
    """The change with the other model scored on redrawn(documents of all draws)."""
    return lambda loss, other, tokens: torch.expm1((redrawn(other.sum(1) / tokens.sum(1))) - loss.sum(1) / tokens.sum(1))


def _percentile_limits(given: dict, want: dict) -> dict:
    """Percentiles are read off between neighbors in different ways; the neighbors' distance is allowed."""
    *sums, draws = given.values()
    change = _change(*(t[draws] for t in sums)).sort().values  # of 400 draws: 2.5 % of them are 10
    return {"low": (change[11] - change[8]).item(), "high": (change[-9] - change[-12]).item()}


def _where_interval(given: dict, got: dict, want: dict) -> str:
    place, have, wanted = first_difference(got, want, _percentile_limits(given, want))
    wider = (got["high"] - got["low"]) / (want["high"] - want["low"])
    return f"{place}: {got_and_wanted(have, wanted)}. The interval is {wider:.3g} times as wide as it should be"


PAIRED_INTERVAL = Exercise(
    id="3.4", name="paired_interval", title="Is the difference real?", minutes=10, difficulty=3, points=3,
    returns=("low", "high"), inputs=bootstrap_inputs, reference=evaluate.paired_interval,
    allowed=_percentile_limits, otherwise=_where_interval,
    close=lambda given, want: 1e-9,  # some mistakes lie closer to each other than neighbors do
    faults=(Fault("low is above high", lambda given, got, want: got["low"] > got["high"],
                  (partial(_interval, ends=lambda values: _percentiles(values)[::-1]),)),),
    mistakes=mistakes_by_option(_interval, {
        "every document counts the same here, long or short. Perplexity is of tokens: sum losses and tokens first, divide once":
            {"change": lambda loss, other, tokens: torch.expm1(((other - loss) / tokens).mean(1))},
        "this is a mean of the documents' own perplexity changes: sum losses and tokens first, divide once, then exp":
            {"change": lambda loss, other, tokens: torch.expm1((other - loss) / tokens).mean(1)},
        "this is in nats. exp of it, minus 1, is the relative change in perplexity": {"change": lambda *of: _change(*of).log1p()},
        "this is the ratio of perplexities: the change is 1 less": {"change": lambda *of: 1 + _change(*of)},
        "this is the difference of perplexities, not relative to the first model's":
            {"change": lambda loss, other, tokens: _change(loss, other, tokens) * (loss.sum(1) / tokens.sum(1)).exp()},
        "this is the relative change of the loss, not of perplexity":
            {"change": lambda loss, other, tokens: (other - loss).sum(1) / loss.sum(1)},
        "the sign is turned: the change goes from loss to other_loss":
            {"change": lambda loss, other, tokens: _change(other, loss, tokens)},
        "it leaves 5 % outside at either end: an interval of 95 % leaves 2.5 %":
            {"ends": lambda values: _percentiles(values, 0.05, 0.95)},
        "these are 1.96 standard deviations either side of the mean. The draws have percentiles of their own, no bell needed":
            {"ends": lambda values: [(values.mean() + side * 1.96 * values.std()).item() for side in (-1, 1)]},
        "the interval is several times too wide, as if each model were scored on draws of its own. Both on the same draw":
            [{"change": _unpaired(redrawn)} for redrawn in (lambda t: t.flip(0), lambda t: t.roll(1), lambda t: t.roll(-1))],
    }),
    others=(Mutant(partial(_interval, ends=lambda values: _percentiles(values, 0.005, 0.995)), "times as wide"),),
)  # fmt: skip


# 3.5 ------------------------------------------------------------------------------------------------------------------
def _ranked(error, nbytes, *, gain=lambda saved, added, error, nbytes: saved / added, turned=False):
    """A right answer, with what can go wrong as options: the layers by another gain, or the least first."""
    return gain(error[:, 0] - error[:, 1], nbytes[:, 1] - nbytes[:, 0], error, nbytes).argsort(descending=not turned)


def rank_inputs(seed: int) -> dict:
    """Eight layers, one hurt by the upgrade, whose bytes before and after do not go together; each mistake gives another order."""
    g = generator(seed)
    while True:
        added = torch.tensor([40, 40, 20, 120, 120, 20, 40, 20])[torch.randperm(8, generator=g)] * 16
        before = added * torch.randint(3, 30, (8,), generator=g)
        error = (0.5 + torch.rand(8, generator=g)) * added**0.5
        kept = 0.3 + 0.6 * torch.rand(8, generator=g)
        kept[int(torch.randint(8, (1,), generator=g))] = 1.1
        given = {"error": torch.stack([error, error * kept], 1), "nbytes": torch.stack([before, before + added], 1)}
        orders = [budget.rank_layers(**given), *(mistake.answer(*given.values()) for mistake in RANK_MISTAKES)]
        if len({tuple(order.tolist()) for order in orders}) == len(orders):
            return given


RANK_MISTAKES = mistakes_by_option(_ranked, {
    "these are ranks: entry i says how layer i did. Wanted is the layer in place i, as argsort gives it":
        lambda *given: _ranked(*given).argsort(),
    "the order is turned: the layer that gains most for a byte comes first": {"turned": True},
    "this ranks by the error saved, whatever it costs: a large layer saves more and pays more": {"gain": lambda saved, *_: saved},
    "this ranks by the share of its error that a layer saves: a layer with hardly any error comes first":
        {"gain": lambda saved, added, error, _: saved / error[:, 0]},
    "this ranks by the error before the upgrade; what counts is what the upgrade takes away":
        {"gain": lambda saved, added, error, _: error[:, 0]},
    "this ranks by the error that is left, not by the error saved": {"gain": lambda saved, added, error, _: error[:, 1] / added},
    "this ranks by the bytes added, whatever they buy": {"gain": lambda saved, added, *_: -added},
    "the error saved is divided by all bytes of a layer: the upgrade is paid with the bytes that it adds":
        [{"gain": lambda saved, added, error, nbytes, column=column: saved / nbytes[:, column]} for column in (0, 1)],
})  # fmt: skip

RANK_LAYERS = Exercise(
    id="3.5", name="rank_layers", title="Where does a byte help most?", minutes=6, difficulty=2, points=2,
    returns=("order",), inputs=rank_inputs, reference=budget.rank_layers, mistakes=RANK_MISTAKES,
    about=lambda given, want, order, place: f"the layer in place {place[0]} by error saved per byte",
    faults=(
        Fault("order is not an order of the layers: each place from 0 to 7 once, as argsort returns them",
              lambda given, got, want: not torch.equal(got["order"].sort().values, torch.arange(8)),
              (lambda e, n: (100 * (e[:, 0] - e[:, 1])).long(),)),
    ),
    others=(Mutant(lambda e, n: torch.arange(8), "error saved per byte"),),
)  # fmt: skip


# 3.6 ------------------------------------------------------------------------------------------------------------------
def spend_inputs(seed: int) -> dict:
    """Ten layers, five choices from coarse to fine. Small layers suffer most, and one is not helped by its first upgrade."""
    g = generator(seed)
    weights = torch.tensor([256, 256, 128, 128, 768, 768, 768, 256, 128, 768])[torch.randperm(10, generator=g)] * 256
    groups = weights[:, None] // torch.tensor([256, 128, 64, 32, 16])
    harm = (0.5 + torch.rand(10, generator=g)) * (128 * 256 / weights)
    harm[weights.argmax()] = 0.3  # one of the biggest suffers, so that it is not served first by those who seek the least error
    error = harm[:, None] * torch.tensor([1.0, 0.8, 0.62, 0.48, 0.35]) ** (0.5 + torch.rand(10, 1, generator=g))
    stuck = int(torch.randint(10, (1,), generator=g))
    error[stuck, 1] = 1.05 * error[stuck, 0]
    nbytes = weights[:, None] * 3 // 8 + groups * 19 // 8
    return {"error": error, "nbytes": nbytes, "budget": int(nbytes[:, 1].sum())}


def _bought(error, nbytes, limit, *, order):
    """Layer after layer, in the order order(error, nbytes), gets the finest choice that still fits."""
    choice, left = torch.zeros(len(error), dtype=torch.int64), limit - int(nbytes[:, 0].sum())
    for layer in order(error, nbytes).tolist():
        fits = (nbytes[layer] - nbytes[layer, 0] <= left).nonzero().flatten()
        choice[layer] = fits[-1]
        left -= int(nbytes[layer, choice[layer]] - nbytes[layer, 0])
    return choice


def _over_budget(given: dict, got: dict, want: dict) -> dict | None:
    spent = int(given["nbytes"].gather(1, got["choice"][:, None]).sum())
    return {"spent": spent, "over": spent - given["budget"]} if spent > given["budget"] else None


def _errors_add_up_to(given: dict, choice: torch.Tensor) -> tuple[float, float]:
    """The sum of errors with these choices, and with the second choice everywhere."""
    error = given["error"].double()
    return error.gather(1, choice[:, None]).sum().item(), error[:, 1].sum().item()


SPEND = Exercise(
    id="3.6", name="spend", title="A budget, spent by layer", minutes=15, difficulty=4, points=4,
    returns=("choice",), inputs=spend_inputs, reference=budget.spend,
    accepts=lambda given, got, want: right() if (sums := _errors_add_up_to(given, got["choice"]))[0] < sums[1] else None,
    otherwise=lambda given, got, want: (
        "the errors add up to {}, the uniform choice of the same size to {}. Compare upgrades by the error they save for each "
        "byte".format(*shown(*_errors_add_up_to(given, got["choice"])))
    ),
    faults=(
        Fault("choice holds something else than places from 0 to 4, one for each layer",
              lambda given, got, want: ((got["choice"] < 0) | (got["choice"] > 4)).any(),
              (lambda e, n, b: n[:, 0], lambda e, n, b: -e.argmin(1))),
        Fault("it takes {spent} bytes, {over} more than the budget. The bytes of the first choices count too", _over_budget,
              (lambda e, n, b: e.argmin(1),)),
    ),
    mistakes=mistakes_by_option(_bought, {
        "this is the uniform choice itself: take bytes from where they help little and spend them where they help":
            lambda e, n, b: torch.ones(len(e), dtype=torch.int64),
        "nothing was bought: every layer still has its first choice": lambda e, n, b: torch.zeros(len(e), dtype=torch.int64),
        "the biggest layers were served first; they pay the most bytes for an upgrade":
            {"order": lambda error, nbytes: nbytes[:, 0].argsort(descending=True, stable=True)},
        "the layers with the least error were served first; there is little to save there":
            {"order": lambda error, nbytes: error[:, 0].argsort()},
    }),
    others=(Mutant(lambda e, n, b: (torch.arange(len(e)) == n[:, 0].argmin()).long(), "Compare upgrades"),),
)  # fmt: skip

EXERCISES = (QUANTIZE_GROUPS, BITS_PER_WEIGHT, TWO_ORDERS, PAIRED_INTERVAL, RANK_LAYERS, SPEND)
