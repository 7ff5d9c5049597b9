"""Chapter 14: who is ahead, what nobody beats, divergence in the middle and at the far end, how many windows a difference takes."""

from __future__ import annotations

import itertools
import math
from functools import cache, partial
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from labsupport.exercises.compare import got_and_wanted, within
from labsupport.exercises.equal_bytes import EXERCISES as VERDICTS
from labsupport.exercises.form import FLOAT32, Exercise, Mutant, generator, mistakes_by_option
from labsupport.model import evaluate

ROUNDING = 1e-9  # of a few dozen operations in float64


# 14.1 -----------------------------------------------------------------------------------------------------------------
METHODS, DOCUMENTS, DRAWS = 5, 18, 400


@cache
def ahead_inputs(seed: int) -> dict:
    """Nats of every token under five methods. Documents differ in length thirtyfold; short ones favor another method than long ones
    do. The interval from the first to the second holds 0 on some seeds, and each mistake gives another answer.
    """
    g = generator(seed)
    while True:
        lengths = torch.exp(3 + 3.4 * torch.rand(DOCUMENTS, generator=g)).long()
        document = torch.arange(DOCUMENTS).repeat_interleave(lengths)
        hard = 1 + 3 * torch.rand(DOCUMENTS, generator=g, dtype=torch.float64)
        of_method = 0.06 * torch.rand(METHODS, 1, generator=g, dtype=torch.float64)
        by_length = 0.12 * torch.randn(METHODS, 1, generator=g, dtype=torch.float64) * (lengths.log() - 4.7)
        by_document = 0.05 * torch.randn(METHODS, DOCUMENTS, generator=g, dtype=torch.float64)
        means = (hard + of_method + by_length + by_document).clamp(min=0.2)
        tokens = torch.empty(len(document), dtype=torch.float64).exponential_(generator=g)
        given = {
            "losses": means[:, document] * tokens,
            "document": document,
            "draws": torch.randint(0, DOCUMENTS, (DRAWS, DOCUMENTS), generator=g),
        }
        sums = _by_document(given["losses"], document)
        orders = [rank(*sums).argsort().tolist() for rank in (_summed, *BY_DOCUMENT)]
        of_others = [order[:2] for order in orders[1:]]
        if any(pair in of_others for pair in (orders[0][:2], orders[0][:-3:-1], [orders[0][0], orders[0][-1]])):
            continue
        right = _outcome(_ahead(**given))
        limits = _ahead_limits(given, right)
        if not any(within(_outcome(mistake.answer(*given.values())), right, limits) for mistake in AHEAD_MISTAKES):
            return given


def ahead(losses: Tensor, document: Tensor, draws: Tensor) -> tuple[int, int, float, float]:
    """labsupport's interval, over nats that are summed by document."""
    tokens = torch.bincount(document)
    nats = torch.stack([torch.bincount(document, of_tokens) for of_tokens in losses])
    first, second = nats.sum(1).argsort()[:2].tolist()
    return first, second, *evaluate.paired_interval(nats[first], nats[second], tokens, draws)


def _outcome(values) -> dict:
    return dict(zip(("first", "second", "low", "high"), values, strict=True))


def _change(first, second, tokens):
    """first, second, tokens: [draws, documents]."""
    return ((second - first).sum(1) / tokens.sum(1)).expm1()


def _mean_change(first, second, tokens):
    """Each document counts the same."""
    return ((second - first) / tokens).mean(1).expm1()


def _mean_of_changes(first, second, tokens):
    return ((second - first) / tokens).expm1().mean(1)


def _percentiles(changes, low=0.025, high=0.975):
    return torch.quantile(changes, torch.tensor([low, high], dtype=torch.float64)).tolist()


def _summed(nats, tokens):
    return nats.sum(1) / tokens.sum()


def _by_document(losses, document):
    sums = torch.zeros(len(losses), DOCUMENTS, dtype=losses.dtype).index_add_(1, document, losses)
    return sums, torch.bincount(document, minlength=DOCUMENTS)


def _first_tokens(losses, document):
    return losses[:, :DOCUMENTS], torch.ones(DOCUMENTS)


def _ahead(
    losses, document, draws, rank=_summed, pick=lambda order: order[:2], change=_change, ends=_percentiles,
    others=lambda draws: draws, anew=False, drawn=_by_document,
):  # fmt: skip
    """The same in the open, and ways to get it wrong. rank: smallest first; drawn: what a draw's numbers are of."""
    first, second = pick(rank(*_by_document(losses, document)).argsort()).tolist()
    nats, tokens = drawn(losses, document)
    a, b, n = nats[first][draws], nats[second][others(draws)], tokens[draws]
    if others(draws) is not draws:  # scored on draws of its own, with the tokens of those
        b = b / tokens[others(draws)].sum(1, keepdim=True) * n.sum(1, keepdim=True)
    changes = change(a, b, n)
    if anew:
        two = nats[:, draws].sum(2).sort(0).values[:2]
        changes = ((two[1] - two[0]) / n.sum(1)).expm1()
    return first, second, *ends(changes)


def _apart(first, second, tokens):
    """Two columns, a perplexity of each method."""
    return torch.stack([(each.sum(1) / tokens.sum(1)).exp() for each in (first, second)], 1)


def _ends_apart(perplexities):
    (low, high), (other_low, other_high) = (_percentiles(each) for each in perplexities.unbind(1))
    return other_low / high - 1, other_high / low - 1


BY_DOCUMENT = (lambda nats, tokens: (nats / tokens).mean(1), lambda nats, tokens: (nats / tokens).exp().mean(1))

AHEAD_MISTAKES = mistakes_by_option(_ahead, {
    "every document counts the same where the methods are ranked, long or short. Sum the nats of all tokens first": [
        {"rank": rank} | change for rank in BY_DOCUMENT for change in ({}, {"change": _mean_change}, {"change": _mean_of_changes})],
    "first and second are the two with the highest loss: the lowest is best": {"rank": lambda nats, tokens: -nats.sum(1)},
    "second is the worst of all: the one to beat is the next best": {"pick": lambda order: order[[0, -1]]},
    "the numbers in draws are of documents, and they were used as numbers of tokens: sum the nats of each document first": {
        "drawn": _first_tokens},
    "every document counts the same in a draw, long or short: divide the sum of its nats by the sum of its tokens": [
        {"change": _mean_change}, {"change": _mean_of_changes}],
    "each method was scored on draws of its own: hard documents then make either look worse. Both on the same draw": [
        {"others": lambda draws: draws.flip(0)}, {"others": lambda draws: draws.roll(1, 0)}],
    "an interval was made for each method, and the ends of the two were set against each other. Take the change in every draw, "
    "then the percentiles of the changes": {"change": _apart, "ends": _ends_apart},
    "first and second were chosen anew in every draw, so that no change is below 0: choose them once, on all documents": {
        "anew": True},
    "the sign is turned: the change goes from the first to the second": {"change": lambda a, b, n: _change(b, a, n)},
    "this is in nats: exp of it, minus 1, is the change in perplexity": {"change": lambda a, b, n: _change(a, b, n).log1p()},
    "this is the ratio of perplexities: the change is 1 less": {"change": lambda a, b, n: 1 + _change(a, b, n)},
    "this is a difference of perplexities, wanted a share of the first one's": {
        "change": lambda a, b, n: (b.sum(1) / n.sum(1)).exp() - (a.sum(1) / n.sum(1)).exp()},
    "it leaves 5 % outside at either end: an interval of 95 % leaves 2.5 %": {
        "ends": lambda values: _percentiles(values, 0.05, 0.95)},
    "these are 1.96 standard deviations either side of the mean, wanted percentiles of the changes": {
        "ends": lambda values: [(values.mean() + side * 1.96 * values.std()).item() for side in (-1, 1)]},
})  # fmt: skip


def _ahead_limits(given: dict, want: dict) -> dict:
    """Percentiles are read off between neighbors in different ways; the neighbors' distance is allowed."""
    nats, tokens = _by_document(given["losses"], given["document"])
    first, second = (nats[want[name]][given["draws"]] for name in ("first", "second"))
    change = _change(first, second, tokens[given["draws"]]).sort().values  # of 400 draws: 2.5 % of them are 10
    return {"first": 0, "second": 0, "low": (change[11] - change[8]).item(), "high": (change[-9] - change[-12]).item()}


def _where_ahead(given: dict, got: dict, want: dict) -> str | None:
    for name in ("first", "second"):
        if got[name] != want[name]:
            if got[name] not in range(METHODS):
                return f"{name} is {got[name]:g}: the methods are counted from 0 to {METHODS - 1}"
            mean = given["losses"].mean(1)
            pair = got_and_wanted(mean[int(got[name])].item(), mean[want[name]].item())
            return f"{name} is method {int(got[name])}, wanted {want[name]}. Nats a token over all tokens: {pair}"
    if got["low"] > got["high"]:
        return f"first and second are right. low is {got['low']:.4g} and high is {got['high']:.4g}: low is the smaller end"
    wider = (got["high"] - got["low"]) / (want["high"] - want["low"])
    end = next(end for end in ("low", "high") if abs(got[end] - want[end]) > _ahead_limits(given, want)[end])
    ends = got_and_wanted(got[end], want[end])
    return f"first and second are right. {end}: {ends}; the interval is {wider:.3g} times as wide as it should be"


def _tokens_resampled(losses, document, draws):
    """Tokens instead of documents, as if they were independent."""
    g, (first, second, _, _) = generator(0), _ahead(losses, document, draws)
    drawn = torch.randint(0, len(document), (DRAWS, len(document)), generator=g)
    change = (losses[second] - losses[first])[drawn].mean(1).expm1()
    return first, second, *_percentiles(change)


AHEAD_OF = Exercise(
    id="14.1", name="ahead", title="Is the winner ahead?", minutes=12, difficulty=3, points=4,
    returns=("first", "second", "low", "high"), inputs=ahead_inputs, reference=ahead, otherwise=_where_ahead,
    allowed=_ahead_limits, close=lambda given, want: ROUNDING, mistakes=AHEAD_MISTAKES,
    others=(
        Mutant(_tokens_resampled, "times as wide"),
        Mutant(lambda *given: (*_ahead(*given)[:2], *_ahead(*given)[:1:-1]), "low is the smaller end"),
        Mutant(lambda *given: (_ahead(*given)[1], *_ahead(*given)[1:]), "Nats a token over all tokens"),
        Mutant(lambda *given: (_ahead(*given)[0], METHODS, *_ahead(*given)[2:]), f"second is {METHODS}: the methods are counted"),
    ),
)  # fmt: skip


# 14.2 -----------------------------------------------------------------------------------------------------------------
@cache
def front_inputs(seed: int) -> dict:
    """Seventeen configurations in no order. Pairs with equal bytes, with equal perplexity, and with both. One on the front lies
    above the line between its neighbors, and each mistake gives another front.
    """
    g = generator(seed)
    while True:
        sizes = (torch.randperm(90, generator=g)[:7].sort().values + 10) * 1000
        better = (20 + 15 * torch.rand(7, generator=g, dtype=torch.float64).sort(descending=True).values).mul(100).round() / 100
        place = torch.randint(0, 7, (8,), generator=g)
        behind = [
            (sizes[place[:5]] + 100 * torch.randint(1, 50, (5,), generator=g), better[place[:5]] + 0.5),
            (sizes[place[5:7]], better[place[5:7]] + 0.25),  # as large, and worse
            (sizes[3:4] + 700, better[3:4]),  # as good, and larger
            (sizes[5:6], better[5:6]),  # the same again
            (sizes[place[7:]] - 50, better[place[7:]] + 12),
        ]
        nbytes = torch.cat([sizes, *(each for each, _ in behind)])
        perplexity = torch.cat([better, *(each for _, each in behind)])
        order = torch.randperm(len(nbytes), generator=g)
        given = {"nbytes": nbytes[order], "perplexity": perplexity[order]}
        fronts = [on_front(**given), *(mistake.answer(*given.values()) for mistake in FRONT_MISTAKES)]
        if len({tuple(front.tolist()) for front in fronts}) == len(fronts):
            return given


def on_front(nbytes: Tensor, perplexity: Tensor) -> Tensor:
    """All pairs: entry [i, j] says how j is beside i."""
    no_larger = nbytes <= nbytes[:, None]
    no_worse = perplexity <= perplexity[:, None]
    equal = (nbytes == nbytes[:, None]) & (perplexity == perplexity[:, None])
    return ~(no_larger & no_worse & ~equal).any(1)


def _front(nbytes, perplexity, beaten):
    """beaten(bytes of i, of j, perplexity of i, of j): whether j drops i, where j is another than i."""
    another = ~torch.eye(len(nbytes), dtype=torch.bool)
    return ~(beaten(nbytes[:, None], nbytes[None], perplexity[:, None], perplexity[None]) & another).any(1)


def _undominated(nbytes, perplexity):
    return _front(
        nbytes, perplexity, lambda n, other_n, p, other_p: (other_n <= n) & (other_p <= p) & ((other_n < n) | (other_p < p))
    )


def _running(nbytes, perplexity, order, keeps):
    """In an order, what keeps(perplexity, best so far) keeps."""
    front, best = torch.zeros(len(nbytes), dtype=torch.bool), math.inf
    for place in order.tolist():
        front[place] = keeps(perplexity[place].item(), best)
        best = min(best, perplexity[place].item())
    return front


def _by_bytes_and_perplexity(nbytes, perplexity):
    by_perplexity = perplexity.argsort(stable=True)
    return by_perplexity[nbytes[by_perplexity].argsort(stable=True)]


def _last_better(nbytes, perplexity):
    """Beside the next smaller one alone."""
    front, order = torch.ones(len(nbytes), dtype=torch.bool), nbytes.argsort(stable=True).tolist()
    for before, place in itertools.pairwise(order):
        front[place] = perplexity[place] < perplexity[before]
    return front


def _hull(nbytes, perplexity):
    """Of the front, what lies on the lower convex hull."""
    front = _undominated(nbytes, perplexity)
    points = sorted({(n, p) for n, p, on in zip(nbytes.tolist(), perplexity.tolist(), front.tolist(), strict=True) if on})
    kept = []
    for x, y in points:
        while len(kept) > 1 and (kept[-1][1] - kept[-2][1]) * (x - kept[-2][0]) >= (y - kept[-2][1]) * (kept[-1][0] - kept[-2][0]):
            kept.pop()
        kept.append((x, y))
    return torch.tensor([(n, p) in kept for n, p in zip(nbytes.tolist(), perplexity.tolist(), strict=True)])


FRONT_MISTAKES = mistakes_by_option(_front, {
    "a configuration is dropped only where another is smaller and better: as large and better is enough, and as good and smaller": {
        "beaten": lambda n, other_n, p, other_p: (other_n < n) & (other_p < p)},
    "of two that are equally good the larger one stays: as good and smaller is enough to drop it": {
        "beaten": lambda n, other_n, p, other_p: (other_n <= n) & (other_p < p)},
    "of two that are equally large the worse one stays: as large and better is enough to drop it": {
        "beaten": lambda n, other_n, p, other_p: (other_n < n) & (other_p <= p)},
    "two that are equal in both drop each other: neither is smaller or better": {
        "beaten": lambda n, other_n, p, other_p: (other_n <= n) & (other_p <= p)},
    "high perplexity was taken for good": {
        "beaten": lambda n, other_n, p, other_p: (other_n <= n) & (other_p >= p) & ((other_n < n) | (other_p > p))},
    "large was taken for good": {
        "beaten": lambda n, other_n, p, other_p: (other_n >= n) & (other_p <= p) & ((other_n > n) | (other_p < p))},
    "each is compared with the next smaller one alone: compare it with the best of all that are no larger":
        _last_better,
    "the best so far was kept in the order of the list: sort by bytes first":
        lambda n, p: _running(n, p, torch.arange(len(n)), lambda own, best: own < best),
    "sorted by bytes alone, so that of equally large ones a worse one that comes first stays: sort by bytes, then perplexity":
        lambda n, p: _running(n, p, n.argsort(stable=True), lambda own, best: own < best),
    "of two that are equal in both only one was kept: neither drops the other":
        lambda n, p: _running(n, p, _by_bytes_and_perplexity(n, p), lambda own, best: own < best),
    "these are in the order of bytes: wanted in the order of the configurations":
        lambda n, p: _undominated(n, p)[n.argsort(stable=True)],
    "these are right for the opposite question: True is for the front":
        lambda n, p: ~_undominated(n, p),
    "this is the convex hull: a configuration above the line between its neighbors is on the front too, where nothing drops it":
        _hull,
    "this is the best one alone: smaller ones that are worse are on the front, where nothing as small is as good":
        lambda n, p: p == p.min(),
})  # fmt: skip


def _front_differs(given: dict, got: dict, want: dict) -> str:
    nbytes, perplexity = given["nbytes"].tolist(), given["perplexity"].tolist()
    at = [f"configuration {i} ({n} bytes, perplexity {p:g})" for i, (n, p) in enumerate(zip(nbytes, perplexity, strict=True))]
    place = int((got["front"] != want["front"]).nonzero()[0])
    if want["front"][place]:
        return f"{at[place]} was dropped: nothing that is no larger is as good, unless it is equal in both"
    by = next(
        j for j, (n, p) in enumerate(zip(nbytes, perplexity, strict=True))
        if n <= nbytes[place] and p <= perplexity[place] and (n, p) != (nbytes[place], perplexity[place])
    )  # fmt: skip
    return f"{at[place]} is called on the front: {at[by]} drops it"


ON_FRONT = Exercise(
    id="14.2", name="on_front", title="What nobody beats", minutes=8, difficulty=2, points=3,
    returns=("front",), inputs=front_inputs, reference=on_front, mistakes=FRONT_MISTAKES, otherwise=_front_differs,
    hint="True or False for each configuration, in their order",
    others=(
        Mutant(lambda n, p: torch.ones(len(n), dtype=torch.bool), "is called on the front"),
        Mutant(lambda n, p: torch.zeros(len(n), dtype=torch.bool), "was dropped"),
    ),
)  # fmt: skip


# 14.3 -----------------------------------------------------------------------------------------------------------------
TOKENS, VOCABULARY = 1001, 23  # 99.9 % of the way from the smallest to the largest of 1001 is exactly the last but one


def divergence_inputs(seed: int) -> dict:
    """Logits in float16. Most tokens differ a little, some by much; some probabilities are 0 in float32."""
    g = generator(seed)
    logits = 4 * torch.randn(TOKENS, VOCABULARY, generator=g)
    logits[::7, 5] -= 140.0
    size = 0.1 * torch.exp(1.2 * torch.randn(TOKENS, 1, generator=g))
    other = logits + size * torch.randn(TOKENS, VOCABULARY, generator=g) + torch.randn(TOKENS, 1, generator=g)
    return {"logits": logits.half(), "other_logits": other.half()}


def divergences(logits: Tensor, other_logits: Tensor) -> tuple[float, float, float]:
    """By PyTorch's kl_div, which takes its arguments the other way round."""
    p, q = (F.log_softmax(each.float(), dim=1) for each in (logits, other_logits))
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(1)
    return kl.mean().item(), kl.median().item(), torch.quantile(kl, 0.999).item()


def _kl(p, q):
    return (p.exp() * (p - q)).sum(1)


def _summary(kl, share=0.999):
    return kl.mean().item(), kl.median().item(), torch.quantile(kl, share).item()


def _divergences(
    logits, other_logits, kl=_kl, logs=lambda logits: logits.float().log_softmax(1), summary=_summary, unit=1.0
):  # fmt: skip
    return summary(unit * kl(logs(logits), logs(other_logits)).float())


def _between_means(logits, other_logits):
    p, q = (each.float().softmax(1).mean(0, keepdim=True) for each in (logits, other_logits))
    return _summary((p * (p.log() - q.log())).sum(1))


def _divergence_limits(given: dict, want: dict) -> dict:
    """Logarithms of probabilities of magnitude below 16, weighted by probabilities, which add up to 1: two such, FLOAT32 of each.

    Where a logarithm is larger, its probability is next to nothing.
    """
    return dict.fromkeys(want, 2 * FLOAT32 * 2**4)


DIVERGENCES = Exercise(
    id="14.3", name="divergences", title="The middle and the far end", minutes=10, difficulty=3, points=3,
    returns=("mean", "median", "extreme"), inputs=divergence_inputs, reference=divergences, allowed=_divergence_limits,
    mistakes=mistakes_by_option(_divergences, {
        "the direction is turned: the float model's probabilities weight the logarithms, since it is what should be kept": {
            "kl": lambda p, q: _kl(q, p)},
        "these are bits: the natural logarithm gives nats": {"unit": 1 / math.log(2)},
        "this is divided by the vocabulary: sum over it, and take the mean over tokens": {
            "kl": lambda p, q: _kl(p, q) / VOCABULARY},
        "the terms were not added up: a token's divergence is a sum over the vocabulary": {
            "kl": lambda p, q: (p.exp() * (p - q)).flatten()},
        "the softmax ran over the tokens: it runs over the vocabulary, the last axis": {
            "logs": lambda logits: logits.float().log_softmax(0)},
        "the softmax was taken in float16, which has three digits: make the logits float32 first": {
            "logs": lambda logits: logits.log_softmax(1).float()},
        "a probability that is 0 in float32 has no logarithm: log_softmax in place of softmax and log": {
            "logs": lambda logits: logits.float().softmax(1).log()},
        "these are logits and not logarithms of probabilities: log_softmax first": {
            "logs": lambda logits: logits.float(), "kl": lambda p, q: (p.softmax(1) * (p - q)).sum(1)},
        "the terms were made positive before the sum: single terms may be negative, the sum is not": {
            "kl": lambda p, q: (p.exp() * (p - q)).abs().sum(1)},
        "this is the mean of both directions: wanted is the one that the float model's probabilities weight": {
            "kl": lambda p, q: (_kl(p, q) + _kl(q, p)) / 2},
        "these are of mean probabilities: take the divergence of every token, then its mean and percentiles": _between_means,
        "this is the cross-entropy: what the float model's own probabilities would give has to be taken off": {
            "kl": lambda p, q: -(p.exp() * q).sum(1)},
        "these are added up over the tokens: mean is their sum divided by how many there are": {
            "summary": lambda kl: (kl.sum().item(), *_summary(kl)[1:])},
        "mean and median are exchanged": {"summary": lambda kl: (_summary(kl)[1], _summary(kl)[0], _summary(kl)[2])},
        "extreme is the 99th percentile: 99.9 % of the tokens lie below the one wanted": {"summary": partial(_summary, share=0.99)},
        "extreme is at the small end: 99.9 % of the tokens lie below the one wanted": {"summary": partial(_summary, share=0.001)},
        "extreme is the largest of all: wanted is the 99.9th percentile": {"summary": partial(_summary, share=1.0)},
    }),
    others=(Mutant(lambda *given: tuple(1.1 * each for each in _divergences(*given)), "mean: got"),),
)  # fmt: skip


# 14.4 -----------------------------------------------------------------------------------------------------------------
MEASURES, WINDOWS = 4, 50


@cache
def windows_inputs(seed: int) -> dict:
    """Four measures in units of their own, of which some fall. The one that needs fewest windows has neither the largest mean nor
    the smallest deviation, and no number of windows is close to a whole one before it is rounded up.
    """
    g = generator(seed)
    level = (0.99, 0.9)[seed % 2]
    while True:
        unit = 10.0 ** torch.tensor([0, 1, 2, -1])[torch.randperm(MEASURES, generator=g)].double()[:, None]
        hard = torch.randn(MEASURES, WINDOWS, generator=g, dtype=torch.float64)
        sign = torch.tensor([1.0, -1.0, 1.0, -1.0])[torch.randperm(MEASURES, generator=g)].double()[:, None]
        effect = 0.05 + 0.15 * torch.rand(MEASURES, 1, generator=g, dtype=torch.float64)
        noise = 0.25 * torch.randn(MEASURES, WINDOWS, generator=g, dtype=torch.float64)
        given = {"first": unit * (5 + hard), "second": unit * (5 + hard + sign * effect + noise), "level": level}
        right, exact = _as_outputs(_needed(**given)), _needed(**given, whole=lambda number: number)[0]
        others = [_as_outputs(mistake.answer(*given.values())) for mistake in NEEDED_MISTAKES]
        apart = exact.max() > 2 * WINDOWS and not any(within(other, right) for other in others)
        best = [other["best"] for other in others[-3:]]  # of those whose numbers are right
        if apart and len({*best}) == 3 and (exact - exact.round()).abs().min() > 1e-6 and len(right["needed"].unique()) == MEASURES:
            return given


def windows_needed(first: Tensor, second: Tensor, level: float) -> tuple[Tensor, int]:
    """From the differences of the windows that are there."""
    apart = second - first
    z = NormalDist().inv_cdf((1 + level) / 2)
    needed = (z * apart.std(1) / apart.mean(1)).square().ceil().long()
    return needed, int(needed.argmin())


def _as_outputs(values) -> dict:
    return dict(zip(("needed", "best"), values, strict=True))


def _needed(
    first, second, level, z=lambda level: NormalDist().inv_cdf((1 + level) / 2), power=2,
    deviation=lambda first, second: (second - first).std(1),
    whole=torch.ceil, times=1.0, best=lambda needed, apart: needed.argmin(),
):  # fmt: skip
    apart = second - first
    ratio = z(level) * deviation(first, second) / apart.mean(1).abs()
    needed = whole(times * ratio**power)
    return needed, int(best(needed, apart))


NEEDED_MISTAKES = mistakes_by_option(_needed, {
    "the deviation is that of two models measured on different windows: both were measured on the same ones, so take the deviation "
    "of the differences": {"deviation": lambda first, second: (first.var(1) + second.var(1)).sqrt()},
    "the deviation is that of the first model's windows: take that of the differences": {
        "deviation": lambda first, second: first.std(1)},
    "the deviation was divided by the root of the windows that are there: that is how far the mean is off, wanted is how far one "
    "window is": {"deviation": lambda first, second: (second - first).std(1) / WINDOWS**0.5},
    "the deviation was divided by all windows, wanted by one less: they are a sample": {
        "deviation": lambda first, second: (second - first).std(1, correction=0)},
    "z cuts off one tail: an interval has two, with half of what is left out in each": {
        "z": lambda level: NormalDist().inv_cdf(level)},
    "z is that of 95 %, whatever the level": [
        {"z": lambda level: NormalDist().inv_cdf(0.975)}, {"z": lambda level: 1.96}],
    "the square is missing: four times the windows halve the interval": {"power": 1},
    "this was rounded down: so many windows are not quite enough": {"whole": torch.floor},
    "the quotient is the wrong way up: the larger the deviation, the more windows": {"power": -2},
    "best is the measure with the largest mean: it has units of its own, and says nothing beside the deviation": {
        "best": lambda needed, apart: apart.mean(1).abs().argmax()},
    "best is the measure with the smallest deviation: it has units of its own, and says nothing beside the mean": {
        "best": lambda needed, apart: apart.std(1).argmin()},
    "best is the measure that needs most windows": {"best": lambda needed, apart: needed.argmax()},
})  # fmt: skip

WINDOWS_NEEDED = Exercise(
    id="14.4", name="windows_needed", title="Which measure tells soonest?", minutes=10, difficulty=3, points=3,
    returns=("needed", "best"), inputs=windows_inputs, reference=windows_needed, mistakes=NEEDED_MISTAKES,
    others=(
        Mutant(lambda *given: (_needed(*given)[0] + 1, _needed(*given)[1]), "needed[0]: got"),
        Mutant(lambda *given: (_needed(*given)[0], MEASURES), "best: got 4"),
    ),
)  # fmt: skip


EXERCISES = (AHEAD_OF, ON_FRONT, DIVERGENCES, WINDOWS_NEEDED, *VERDICTS)
