"""Chapter 12: a quantized model that must learn: gradients, bytes, what a merge moves, calibration, and reading a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from labsupport.exercises.compare import Limits, got_and_wanted
from labsupport.exercises.form import FLOAT32, Exercise, Mutant, drive_cases, generator, mistakes_by_option, right
from labsupport.model.evaluate import paired_interval
from labsupport.pipeline import lora
from labsupport.quant import gptq, grid, nf4, rtn


# 12.1 -----------------------------------------------------------------------------------------------------------------
def backward_inputs(seed: int) -> dict:
    """Five tokens, 12 inputs in two blocks of six, seven outputs, rank 3, alpha 7.5: the adapter is multiplied by 2.5."""
    g = generator(seed)
    return {
        "x": torch.randn(5, 12, generator=g),
        "gradient": torch.randn(5, 7, generator=g),
        "codes": torch.randint(0, 16, (7, 12), generator=g).to(torch.uint8),
        "absmax": 0.5 + torch.rand(7, 2, generator=g),
        "levels": nf4.normal_quantiles(),
        "a": torch.randn(3, 12, generator=g),
        "b": torch.randn(7, 3, generator=g),
        "alpha": 7.5,
    }  # fmt: skip


def backward(x, gradient, codes, absmax, levels, a, b, alpha: float) -> tuple[Tensor, ...]:
    """By autograd, through the layer that labsupport trains with."""
    packed, block_size = nf4.pack_nibbles(codes.flatten()), codes.shape[1] // absmax.shape[1]
    stored = nf4.BlockTensor(packed, absmax.flatten(), tuple(levels.tolist()), "", block_size, tuple(codes.shape))
    with torch.enable_grad():
        x, a, b = (tensor.clone().requires_grad_() for tensor in (x, a, b))
        y = lora.ReadBack.apply(x, stored) + alpha / len(a) * lora.Narrow.apply(x, a) @ b.T
        return torch.autograd.grad(y, (x, a, b), gradient)


def _backward(
    x, gradient, codes, absmax, levels, a, b, alpha, scaling=lambda alpha, rank: alpha / rank, base=1, adapter=1, of_a=1, of_b=1,
    read=lambda levels, absmax: levels * absmax,
):  # fmt: skip
    """The same written out, and ways to get it wrong. base, adapter: times their parts of x's gradient."""
    levels = levels[codes.long()].unflatten(1, (absmax.shape[1], -1))
    weight, s = read(levels, absmax[..., None]).flatten(1), scaling(alpha, len(a))
    of_x = base * gradient @ weight + adapter * s * gradient @ b @ a
    return of_x, of_a * s * (gradient @ b).T @ x, of_b * s * gradient.T @ (x @ a.T)


def _backward_allowed(given: dict, want: dict) -> Limits:
    """Each sum has at most 7 + 3 * 7 products of at most four factors; every rounding is at most 2**-24 of the sum of |terms|."""
    of_magnitudes = {name: value if name in ("codes", "alpha") else value.abs() for name, value in given.items()}
    return dict(zip(want, (40 * 2.0**-24 * terms for terms in _backward(**of_magnitudes)), strict=True))


BACKWARD = Exercise(
    id="12.1", name="backward", title="Backward through dequantize", minutes=12, difficulty=3, points=4,
    returns=("of_x", "of_a", "of_b"), inputs=backward_inputs, reference=backward, allowed=_backward_allowed,
    hint="A gradient has the shape of what it is the gradient of",
    mistakes=mistakes_by_option(_backward, {
        "x's gradient lacks the base, as if none could pass a quantized weight. W is a constant: y depends on x by x W^T": {
            "base": 0},
        "x's gradient lacks the adapter: x goes through A and B as well": {"adapter": 0},
        "alpha / r is missing in x's gradient alone: the adapter's part is multiplied by it": {"adapter": 1 / 2.5},
        "alpha / r is missing: y = x W^T + (alpha / r) (x A^T) B^T": {"scaling": lambda alpha, rank: 1.0},
        "the adapter is multiplied by alpha, not by alpha / r": {"scaling": lambda alpha, rank: alpha},
        "the adapter is multiplied by r / alpha, wanted alpha / r": {"scaling": lambda alpha, rank: rank / alpha},
        "alpha / r is missing in A's gradient": {"of_a": 1 / 2.5},
        "alpha / r is missing in B's gradient": {"of_b": 1 / 2.5},
        "the weight was read back without absmax: a level is a share of its block's largest magnitude": {
            "read": lambda levels, absmax: levels.expand(-1, -1, levels.shape[2])},
        "the levels were divided by absmax: to read back, multiply": {"read": lambda levels, absmax: levels / absmax},
    }),
    others=(
        Mutant(lambda *given: _backward(*given)[::-1], "A gradient has the shape of"),
        Mutant(lambda *given: tuple(1.01 * each for each in _backward(*given)), "of_x["),
    ),
)  # fmt: skip


# 12.2 -----------------------------------------------------------------------------------------------------------------
def bytes_inputs(seed: int) -> dict:
    """The linears of a 7B model, and a few whose weights fill neither the last byte nor the last block nor the last 256 blocks."""
    g = generator(seed)
    rank = 2 ** int(torch.randint(3, 7, (1,), generator=g))
    odd = [tuple((2 * torch.randint(20, 150, (2,), generator=g) + 1).tolist()) for _ in range(5)]
    block = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    return {"7B": (32 * block, rank), "odd": (odd, 3), "one": ([(300, 331)], 5)}


def qlora_bytes(linears: Sequence[tuple[int, int]], rank: int) -> tuple[int, int]:
    """Bytes of the base in NF4 with double quantization, and of everything that learns in float32."""
    base = learned = 0
    for shape in linears:
        weights, parameters = math.prod(shape), rank * sum(shape)
        blocks = math.ceil(weights / 64)
        base += math.ceil(weights / 2) + blocks + 4 * math.ceil(blocks / 256) + 4
        learned += 4 * (parameters + parameters + 2 * parameters)  # the adapter, its gradient, AdamW's mean and mean square
    return base, learned


def _bytes(
    linears, rank, scales=lambda blocks: blocks + 4 * math.ceil(blocks / 256) + 4, blocks=lambda r, c: math.ceil(r * c / 64),
    parameters=lambda r, c, rank: rank * (r + c), each=16, unit=1,
):  # fmt: skip
    base = sum(math.ceil(r * c / 2) + scales(blocks(r, c)) for r, c in linears)
    return unit * base, unit * each * sum(parameters(r, c, rank) for r, c in linears)


QLORA_BYTES = Exercise(
    id="12.2", name="qlora_bytes", title="What must be in memory to learn", minutes=10, difficulty=2, points=3,
    returns=("bytes",), inputs=bytes_inputs, reference=qlora_bytes, drive=drive_cases,
    mistakes=mistakes_by_option(_bytes, {
        "base holds the codes alone: each block of 64 needs its magnitude as well": {"scales": lambda blocks: 0},
        "base has a float32 for each block: with double quantization it is one byte": {"scales": lambda blocks: 4 * blocks},
        "base lacks what the bytes of magnitudes are multiplied by: a float32 for every 256 of them, and one that is added": {
            "scales": lambda blocks: blocks},
        "base lacks the one float32 of each weight that is added to all its magnitudes": {
            "scales": lambda blocks: blocks + 4 * math.ceil(blocks / 256)},
        "blocks begin anew on every row: they run on from one row to the next, so only the last of a weight can be short": {
            "blocks": lambda r, c: r * math.ceil(c / 64)},
        "learned is the adapters alone: each parameter has a gradient, and AdamW remembers two numbers of it": {"each": 4},
        "learned has three numbers a parameter, wanted four: weight, gradient, mean, and mean square": {"each": 12},
        "learned has 2 bytes a number: adapters, gradients and states are in float32": {"each": 8},
        "learned counts one of A and B: A is r x in, B is out x r": [
            {"parameters": lambda r, c, rank: rank * r}, {"parameters": lambda r, c, rank: rank * c}],
        "learned counts gradient and states for the whole weight, which is frozen": {"parameters": lambda r, c, rank: r * c},
        "learned has r times the whole weight: A is r x in, B is out x r": {"parameters": lambda r, c, rank: r * c * rank},
        "these are bits, wanted bytes": {"unit": 8},
        "base and learned are exchanged": lambda linears, rank: _bytes(linears, rank)[::-1],
    }),
    others=(Mutant(lambda linears, rank: (_bytes(linears, rank)[0] + 1, _bytes(linears, rank)[1]), "7B[0]"),),
)  # fmt: skip


# 12.3 -----------------------------------------------------------------------------------------------------------------
BLOCK = 5


def moves_inputs(seed: int) -> dict:
    """Six rows of 20 weights on NF4's levels, in blocks of five. Each level in both directions; updates close to the threshold on
    either side, and far from it; outward ones at both ends.
    """
    g = generator(seed)
    codes = torch.cat([torch.arange(16).repeat(2), torch.randint(0, 16, (88,), generator=g)])
    signs = torch.cat([torch.ones(16), -torch.ones(16), torch.randint(0, 2, (88,), generator=g) * 2.0 - 1])
    order = torch.randperm(120, generator=g)
    codes, signs = codes[order].view(6, 20).to(torch.uint8), signs[order].view(6, 20)
    given = {"codes": codes, "absmax": 0.2 + torch.rand(6, 4, generator=g), "levels": nf4.normal_quantiles(), "update": signs}
    threshold, _ = moves(**given)
    factor = torch.tensor([0.3, 0.98, 1.02, 1.7])[torch.randint(0, 4, (6, 20), generator=g)]
    return given | {"update": signs * factor * threshold.clamp(max=0.5)}


def moves(codes: Tensor, absmax: Tensor, levels: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Half the way to the next level in the update's direction; beyond the last level there is none."""
    end, size = torch.tensor([torch.inf]), absmax.repeat_interleave(codes.shape[1] // absmax.shape[1], dim=1)
    ladder, place = torch.cat([-end, levels, end]), codes.long()
    there = ladder[place + 1 + update.sign().long()]
    threshold = (there - levels[place]).abs() / 2 * size
    return threshold, update.abs() > threshold


def _moves(
    codes, absmax, levels, update, share=0.5, even=False, nearest=False, turn=1, wall=True, size=True,
    moved=lambda update, threshold: update.abs() > threshold,
):  # fmt: skip
    """The same from the gaps above and below; ways to get it wrong."""
    place, end = codes.long(), torch.tensor([torch.inf])
    gaps = torch.full((15,), 2 / 15) if even else levels.diff()
    above, below = torch.cat([gaps, end])[place], torch.cat([end, gaps])[place]
    gap = torch.minimum(above, below) if nearest else torch.where(turn * update > 0, above, below)
    if not wall:
        gap = torch.where(gap.isinf(), torch.minimum(above, below), gap)
    threshold = share * gap * (absmax.repeat_interleave(BLOCK, 1) if size else 1)
    return threshold, moved(update, threshold)


MOVES = Exercise(
    id="12.3", name="moves", title="Which weights move?", minutes=12, difficulty=3, points=4,
    returns=("threshold", "moved"), inputs=moves_inputs, reference=moves,
    # A difference of levels, of magnitude 1 at most, times a magnitude below 1.2: FLOAT32 of that.
    allowed=lambda given, want: {"threshold": 1.2 * FLOAT32, "moved": 0.0},
    mistakes=mistakes_by_option(_moves, {
        "this is the whole way to the next level: a weight moves when it has passed the middle": {"share": 1.0},
        "all levels are taken to be a fifteenth of the range apart: NF4's are not. They lie close near 0 and far apart outside": {
            "even": True},
        "this is the nearer of the two neighbors: an update has a direction, and the levels are uneven": {"nearest": True},
        "this is the neighbor in the other direction: an update above 0 goes up": {"turn": -1},
        "at the end of the grid the inner neighbor is taken: beyond the last level there is none, however large the update": {
            "wall": False},
        "the threshold is in levels, not in weights: multiply by the block's absmax": {"size": False},
        "moved compares the update with its sign, so that nothing moves down": {
            "moved": lambda update, threshold: update > threshold},
        "moved is turned round: it is true where the update is smaller than the threshold": {
            "moved": lambda update, threshold: update.abs() < threshold},
    }),
    others=(
        Mutant(lambda *given: (_moves(*given)[0], torch.zeros(6, 20)), "moved["),
        Mutant(lambda *given: (_moves(*given)[0] * 1.01, _moves(*given)[1]), "threshold["),
        Mutant(lambda *given: (_moves(*given)[0].nan_to_num(posinf=9.0), _moves(*given)[1]), "threshold["),
    ),
)  # fmt: skip


# 12.4 -----------------------------------------------------------------------------------------------------------------
LEAST, MOST = 0.9, 1.1


def survivor_inputs(seed: int) -> dict:
    """48 rows of 160 weights whose sizes differ by rows up to eightfold; a 4-bit grid for each row."""
    g = generator(seed)
    weight = torch.randn(48, 160, generator=g) * torch.linspace(0.1, 0.8, 48)[torch.randperm(48, generator=g), None]
    scale, zero_point = grid.scale_and_zero_point(weight, 4)
    return {"weight": weight, "scale": scale, "zero_point": zero_point, "bits": 4}


def survivor(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Every weight of a row by the same share of its step, less than a half."""
    return _survivor(weight, scale, zero_point, bits)


def _survivor(weight, scale, zero_point, bits, share=0.4, sizes=lambda scale: scale) -> Tensor:
    return share * sizes(scale).expand_as(weight).clone()


def _on_grid(weight, scale, zero_point, bits) -> Tensor:
    return grid.dequantize(grid.quantize(weight, scale, zero_point, bits), scale, zero_point)


def fates(weight, scale, zero_point, bits: int, update) -> tuple[int, float]:
    """Weights that leave their level when `update` is merged into the rounded base and rounded again; and how much of it is left
    when it is merged into the float base: the change that it makes to the rounded weights, along it, as a share of it.
    """
    base = _on_grid(weight, scale, zero_point, bits)
    moved = int(((_on_grid(base + update, scale, zero_point, bits) - base).abs() > 0.1 * scale).sum())
    change = _on_grid(weight + update, scale, zero_point, bits) - base
    return moved, ((change * update).double().sum() / update.double().square().sum()).item()


def _no_survivor(given: dict, got: dict, want: dict) -> str | None:
    update = got["update"]
    if not update.any():
        return "this update is 0 everywhere: there is nothing to survive"
    moved, share = fates(**given, update=update)
    if moved:
        largest = (update.abs() / given["scale"]).max().item()
        return f"on the rounded base {moved} weights leave their level: the largest change is {largest:.3g} steps of its row's grid"
    if not LEAST <= share <= MOST:
        return f"on the rounded base all is lost, as wanted; on the float base {share:.3g} of it is left, wanted {LEAST} to {MOST}"
    return None


SURVIVOR = Exercise(
    id="12.4", name="survivor", title="An update that survives on one base only", minutes=12, difficulty=4, points=4,
    returns=("update",), inputs=survivor_inputs, reference=survivor, otherwise=_no_survivor,
    accepts=lambda given, got, want: None if _no_survivor(given, got, want) else right(),
    mistakes=mistakes_by_option(_survivor, {
        "half a step takes a weight that stands on its level to the middle, and float rounding decides there: stay below": {
            "share": 0.5},
        "one step takes every weight to the next level on both bases: it survives everywhere": {"share": 1.0},
    }),
    others=(
        Mutant(lambda weight, *grids: torch.zeros_like(weight), "0 everywhere"),
        Mutant(partial(_survivor, share=0.55), "leave their level"),
        Mutant(partial(_survivor, sizes=lambda scale: scale.max()), "leave their level"),
        Mutant(lambda weight, *grids: weight - _on_grid(weight, *grids), "on the float base"),
        Mutant(lambda weight, *grids: _on_grid(weight, *grids) - weight, "on the float base"),
        Mutant(partial(_survivor, share=1e-5), "on the float base"),
    ),
)  # fmt: skip


# 12.5 -----------------------------------------------------------------------------------------------------------------
SEEDS, DOCUMENTS, DRAWS = 5, 14, 400


def comparison_inputs(seed: int) -> dict:
    """Two arms' nats, [seeds, documents] each, and what both share. Five cases: a real fall; an interval on one side of 0 and a
    seed that disagrees; seeds that agree and an interval that holds 0; neither; a real rise. Tokens differ up to tenfold.
    """
    g = generator(seed)
    tokens = torch.randint(300, 3000, (DOCUMENTS,), generator=g)
    draws = torch.randint(0, DOCUMENTS, (DRAWS, DOCUMENTS), generator=g)
    hard = (2 + torch.rand(DOCUMENTS, generator=g, dtype=torch.float64)) * tokens
    effects = {
        "a": (-0.04, 0.004, 0.01),
        "b": (-0.04, 0.06, 0.01),
        "c": (-0.02, 0.002, 0.12),
        "d": (0.0, 0.02, 0.05),
        "e": (0.04, 0.004, 0.01),
    }
    wanted = {"a": (True, True), "b": (True, False), "c": (False, True), "d": (False, False), "e": (True, True)}
    found: dict[str, Any] = {}
    for name, (effect, by_seed, by_document) in effects.items():
        while name not in found:
            noise = 0.002 * torch.randn(2, SEEDS, DOCUMENTS, generator=g, dtype=torch.float64)
            seeds = by_seed * torch.randn(SEEDS, 1, generator=g, dtype=torch.float64)
            documents = by_document * torch.randn(DOCUMENTS, generator=g, dtype=torch.float64)
            first, second = hard + tokens * noise[0], hard + tokens * (noise[1] + effect + seeds + documents)
            given = (first, second, tokens, draws)
            _, low, high, _ = _compare(*given)
            narrow = _compare(*given, level=0.9)[1:3]
            apart = (low > 0 or high < 0, _seeds_agree(first, second, tokens))
            same = apart == wanted[name] and (narrow[0] > 0 or narrow[1] < 0) == apart[0]
            if same and min(abs(low), abs(high)) > 1e-4:
                found[name] = given
    return found


def compare(loss, other_loss, tokens, draws) -> tuple[float, float, float, bool]:
    """The interval of labsupport's sweeps over the mean of the seeds; and each seed's own change."""
    low, high = paired_interval(loss.mean(0), other_loss.mean(0), tokens, draws)
    by_seed = (other_loss - loss).sum(1)
    change = math.expm1((by_seed.mean() / tokens.sum()).item())
    return change, low, high, bool((low > 0 or high < 0) and by_seed.sign().sum().abs() == len(by_seed))


def _seeds_agree(loss, other_loss, tokens) -> bool:
    return len((other_loss - loss).sum(1).sign().unique()) == 1


def _compare(
    loss, other_loss, tokens, draws, paired=True, weighted=True, percent=True, seeds=slice(None), level=0.95, turn=1,
    real=lambda low, high, agree: (low > 0 or high < 0) and agree,
):  # fmt: skip
    """The same in the open, and ways to get it wrong."""
    agree = _seeds_agree(loss, other_loss, tokens)
    first, second = loss[seeds].mean(0), other_loss[seeds].mean(0)
    counts = tokens if weighted else torch.ones_like(tokens)
    if not weighted:
        first, second = first / tokens, second / tokens
    others = draws if paired else draws.flip(0)
    changes = turn * (second[others].sum(1) / counts[others].sum(1) - first[draws].sum(1) / counts[draws].sum(1))
    change = turn * (second - first).sum() / counts.sum()
    if percent:
        changes, change = changes.expm1(), change.expm1()
    tail = (1 - level) / 2
    low, high = torch.quantile(changes, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return change.item(), low, high, bool(real(low, high, agree))


def _reading_differs(given: dict, got: dict, want: dict) -> str | None:
    for case, (*numbers, real) in got.items():
        *wanted, verdict = want[case]
        if all(abs(a - b) <= 1e-9 for a, b in zip(numbers, wanted, strict=True)) and real != verdict:
            loss, other_loss, tokens, _ = given[case]
            signs = "agree" if _seeds_agree(loss, other_loss, tokens) else "do not agree"
            place = "lies on one side of 0" if wanted[1] > 0 or wanted[2] < 0 else "holds 0"
            return f"case {case!r} is called {'real' if real else 'not real'}: its interval {place}, and its seeds {signs}"
    return None


COMPARE = Exercise(
    id="12.5", name="compare", title="Read the comparison", minutes=15, difficulty=3, points=4,
    returns=("comparison",), inputs=comparison_inputs, reference=compare, drive=drive_cases, otherwise=_reading_differs,
    # Of float64, whose sums of 14 terms are right to 1e-14.
    allowed=lambda given, want: 1e-9,
    mistakes=mistakes_by_option(_compare, {
        "the two arms are drawn apart, so that the one with the harder documents looks worse: draw the same documents for both": {
            "paired": False},
        "every document counts the same, long or short: divide the sum of nats by the sum of tokens": {"weighted": False},
        "this is the difference in nats a token: the change in perplexity is exp of it, minus 1": {"percent": False},
        "the change is from the second arm to the first: wanted is from loss to other_loss": {"turn": -1},
        "this is the interval of 90 %: 2.5 % lie beyond each end of one of 95 %": {"level": 0.9},
        "this is the first seed alone: the arms are compared by the mean of all seeds": {"seeds": slice(0, 1)},
        "real looks at the interval alone: it is over documents, and knows nothing of a seed that disagrees": {
            "real": lambda low, high, agree: low > 0 or high < 0},
        "real looks at the seeds alone: they share their documents, and one document can carry them all": {
            "real": lambda low, high, agree: agree},
        "real is either of the two, wanted both: the interval and the seeds": {
            "real": lambda low, high, agree: low > 0 or high < 0 or agree},
        "real is turned round": {"real": lambda low, high, agree: not ((low > 0 or high < 0) and agree)},
    }),
    others=(
        Mutant(lambda *given: (*_compare(*given)[:3], False), "case 'a' is called not real"),
        Mutant(lambda *given: (1.5 * _compare(*given)[0], *_compare(*given)[1:]), "a[0]"),
    ),
)  # fmt: skip


# 12.6 -----------------------------------------------------------------------------------------------------------------
OUT, IN, TEXTS = 12, 10, 4
DECIDES = 1.15  # the best text leaves this many times less error than any other


def _text(tokens: int, directions: Tensor, g: torch.Generator) -> Tensor:
    """Inputs [tokens, in] that share a few directions."""
    return torch.randn(tokens, len(directions), generator=g) @ directions + 0.25 * torch.randn(tokens, IN, generator=g)


def _round(weight: Tensor, hessian: Tensor) -> Tensor:
    """GPTQ, 3 bits, one grid a row. What no Hessian could be is no error here: then it rounds."""
    try:
        return gptq.quantize(weight, hessian, 3, None).dequantize()
    except (ValueError, TypeError):
        return rtn.quantize(weight, 3, None).dequantize()


@cache
def texts_inputs(seed: int) -> dict:
    """Four texts in any order: much that is general, a little of the domain, enough of the domain, and noise. And held-out domain.

    Whatever else one could judge by (the text itself, how much there is, the base before it learned) names another text, and no
    code is so near to the middle of two levels that a factor on the Hessian could change it.
    """
    g = generator(seed)
    while True:
        general, domain = torch.randn(3, IN, generator=g), torch.randn(3, IN, generator=g)
        texts = [
            _text(300, general, g), _text(3, domain, g), _text(60, domain, g), 2 * torch.randn(150, IN, generator=g),
        ]  # fmt: skip
        order = torch.randperm(TEXTS, generator=g).tolist()
        weight, update = torch.randn(OUT, IN, generator=g), torch.randn(OUT, IN, generator=g)
        given = {"base": weight, "update": update, "texts": [texts[i] for i in order], "domain": _text(200, domain, g)}
        errors, best = _choose(**given)
        others = errors[torch.arange(TEXTS) != best]
        if order[best] != 2 or others.min() < DECIDES * errors[best]:
            continue
        own, _ = _choose(**given, measured=lambda text, domain: text)
        _, by_base = _choose(**given, against=lambda base, update: base)
        if (
            order[int(own.argmin())] == 1 and by_base != best
            and all(torch.allclose(_choose(**given, factor=factor)[0], errors, rtol=1e-5) for factor in (0.37, 17.0))
        ):  # fmt: skip
            return given


def choose_text(base, update, texts: Sequence[Tensor], domain, solve: Callable) -> tuple[Tensor, int]:
    """What is quantized is the model that learned; what it is judged by is held-out text of what it learned."""
    return _choose(base, update, texts, domain, solve)


def _choose(
    base, update, texts, domain, solve=_round, of=lambda base, update: base + update, against=lambda base, update: base + update,
    measured=lambda text, domain: domain, factor=None, pick=lambda errors, texts: errors.argmin(), own_hessian=True,
):  # fmt: skip
    """Ways to get it wrong: of: what is quantized; against: what it is compared with; measured: on which text."""
    weight, wanted, errors = of(base, update), against(base, update), []
    for text in texts:
        fed = text if own_hessian else domain
        values = solve(weight, (2 / len(fed) if factor is None else factor) * fed.T @ fed)
        errors.append(((values - wanted) @ measured(text, domain).T).square().mean())
    found = torch.stack(errors)
    return found, int(pick(found, texts))


def drive_choice(answer: Callable, given: dict) -> dict:
    errors, best = answer(*given.values(), _round)
    return {"errors": errors, "best": best}


def _other_text(given: dict, got: dict, want: dict) -> str | None:
    """The sentence where the errors are right and the choice is not."""
    errors, best = got["errors"], got["best"]
    if not torch.allclose(errors.double(), want["errors"].double(), rtol=2e-4):
        return None
    if best not in range(TEXTS):
        return f"best is {best:g}: the texts are counted from 0 to {TEXTS - 1}"
    pair = got_and_wanted(errors[int(best)].item(), errors.min().item())
    return f"errors are right, and text {int(best)} is not the one with the smallest: {pair}"


CHOOSE_TEXT = Exercise(
    id="12.6", name="choose_text", title="Calibrate on the right text", minutes=12, difficulty=3, points=4,
    returns=("errors", "best"), inputs=texts_inputs, reference=choose_text, drive=drive_choice, otherwise=_other_text,
    # The codes are the same whoever adds up the Hessian (see the inputs); a mean of squares of float32 sums of ten products.
    allowed=lambda given, want: {"errors": 1e-4 * want["errors"], "best": 0.0},
    mistakes=mistakes_by_option(_choose, {
        "each text is judged by itself: the one with the fewest tokens wins, since little is easy to fit. Judge by held-out text": {
            "measured": lambda text, domain: text},
        "the base is quantized, not the model that learned: base + update is what will be used": {
            "of": lambda base, update: base, "against": lambda base, update: base},
        "the error is taken against the base, which never learned: the outputs to keep are those of base + update": {
            "against": lambda base, update: base},
        "the base is quantized, and compared with the model that learned: quantize base + update": {
            "of": lambda base, update: base},
        "the error is that of the weights: what counts is the output on the held-out text": {
            "measured": lambda text, domain: IN**0.5 * torch.eye(IN)},
        "the held-out text is calibrated on, so that all four are alike: it is there to judge by, and no longer held out then": {
            "own_hessian": False},
        "best is the text with the most tokens: more of another kind is not better": {
            "pick": lambda errors, texts: max(range(TEXTS), key=lambda i: len(texts[i]))},
    }),
    others=(
        Mutant(lambda *given: (_choose(*given)[0], TEXTS), "counted from 0"),
        Mutant(lambda *given: (_choose(*given)[0], [len(text) for text in given[2]].index(150)), "errors are right"),
        Mutant(lambda *given: (2 * _choose(*given)[0], _choose(*given)[1]), "errors["),
    ),
)  # fmt: skip

EXERCISES = (BACKWARD, QLORA_BYTES, MOVES, SURVIVOR, COMPARE, CHOOSE_TEXT)
