"""Chapter 8: which input channels matter, how far one of them can be stretched, and where its inverse goes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn

from labsupport.exercises.base import Exercise, Mutant, Verdict, generator, largest_difference, right, shape_fault, wrong
from labsupport.pipeline import fold as folding
from labsupport.quant import awq, rtn

N_GRID = 20
# Another order of the same float32 operations may move a code that lies on a tie, or the last bit of a float16 scale: of some
# thousand codes that is worth less than this in a sum of squares.
LOSS = 1e-2


def _read_back(weight: torch.Tensor, quantize: Callable, bits: int, group_size: int) -> torch.Tensor:
    return quantize(weight, bits, group_size).dequantize()


def _uneven(tokens: int, channels: int, generator: torch.Generator) -> torch.Tensor:
    """Inputs of unequal size, as behind a norm. [tokens, channels]."""
    return torch.randn(tokens, channels, generator=generator) * torch.exp(0.8 * torch.randn(channels, generator=generator))


# 8.1 ------------------------------------------------------------------------------------------------------------------


def saliency_inputs(seed: int) -> dict:
    """Windows of tokens: a channel that swings around 0, one that is loud once, one that is steady, one that never speaks."""
    g = generator(seed)
    inputs = _uneven(3 * 20, 12, g)
    inputs[:, 2] = 5 * torch.tensor([1.0, -1.0]).repeat(30)
    inputs[int(torch.randint(60, (1,), generator=g)), 4] = 90
    inputs[:, 7] = 2.5
    inputs[:, 9] = 0
    return {"inputs": inputs.view(3, 20, 12)}


SALIENCY_MISTAKES: dict[str, Callable] = {
    "the mean was taken before the magnitude: a channel that swings between -5 and 5 then counts as silent. abs() first": (
        lambda x: x.mean((0, 1)).abs()
    ),
    "this is the largest magnitude: one token decides for a channel that is quiet in all others. Take the mean": (
        lambda x: x.abs().amax((0, 1))
    ),
    "this is the root mean square, in which rare large values count more. AWQ takes the mean magnitude": (
        lambda x: x.pow(2).mean((0, 1)).sqrt()
    ),
    "this is the sum over tokens, wanted the mean": lambda x: x.abs().sum((0, 1)),
    "the magnitudes were not taken: the mean of a channel may be negative or 0, however loud it is": lambda x: x.mean((0, 1)),
    "only the first window was looked at": lambda x: x[0].abs().mean(0),
}


def judge_saliency(given: dict, got: dict, want: dict) -> Verdict:
    inputs, found = given["inputs"], got["saliency"]
    if isinstance(found, torch.Tensor) and found.shape == inputs.shape[:2]:
        return wrong("there is one value for each token, wanted one for each channel: the mean runs over tokens")
    if isinstance(found, torch.Tensor) and found.shape == (inputs.shape[0], inputs.shape[2]):
        return wrong("each window has a mean of its own: tokens of all windows count alike")
    if fault := shape_fault(got, want):
        return wrong(fault)
    # A float32 sum of 60 magnitudes, the largest channel's being the most.
    allowed = 60 * 2**-24 * want["saliency"].max().item()
    off = largest_difference(found, want["saliency"])
    if off <= allowed:
        return right(off, allowed)
    for said, mistake in SALIENCY_MISTAKES.items():
        if largest_difference(found, mistake(inputs)) <= 60 * allowed:
            return wrong(said)
    place = int((found - want["saliency"]).abs().argmax())
    return wrong(f"channel {place} got {found[place].item():.4f}, wanted {want['saliency'][place].item():.4f}")


SALIENCY = Exercise(
    id="8.1", name="saliency", title="How loud is a channel?", minutes=5, difficulty=1, points=2,
    returns=("saliency",), inputs=saliency_inputs, reference=awq.saliency, judge=judge_saliency,
    mutants=(
        *(Mutant(rule, said[:30]) for said, rule in SALIENCY_MISTAKES.items()),
        Mutant(lambda x: x.abs().mean(2), "for each token"),
        Mutant(lambda x: x.abs().mean(1), "each window"),
        Mutant(lambda x: x.abs().mean((0, 1)) + 0.01, "wanted"),
    ),
)  # fmt: skip


# 8.2 ------------------------------------------------------------------------------------------------------------------


def keep_inputs(seed: int) -> dict:
    """More rows than columns, so that rows can be mistaken for channels; shares that are no whole number of them."""
    g = generator(seed)
    weight = torch.randn(160, 150, generator=g)
    return {
        "weight": weight,
        "quantized": torch.round(weight * 2) / 2,
        "importance": torch.rand(150, generator=g),
        "share": (0.01, 0.03)[seed % 2],
    }


def keep_channels(weight: torch.Tensor, quantized: torch.Tensor, importance: torch.Tensor, share: float) -> torch.Tensor:
    """quantized [out, in], with the columns of the most important channels as they were in weight. (AWQ, section 3.1.)"""
    return _kept(weight, quantized, importance, share)


def _kept(weight, quantized, importance, share, count=lambda n: -int(-n // 1), largest=True, rows=False, others=False):
    chosen = importance.topk(count(share * len(importance)), largest=largest).indices
    if others:
        weight, quantized = quantized, weight
    mixed = quantized.clone()
    if rows:
        mixed[chosen] = weight[chosen]
    else:
        mixed[:, chosen] = weight[:, chosen]
    return mixed


KEEP_MISTAKES: dict[str, Callable] = {
    "rows were kept, which are outputs. A channel of the input meets a column": partial(_kept, rows=True),
    "the least important channels were kept": partial(_kept, largest=False),
    "the important channels were rounded and all others kept": partial(_kept, others=True),
    "the number of channels was rounded down: 1 % of 50 channels would be none. Round up": partial(_kept, count=int),
    "all channels were rounded: nothing is kept": lambda w, q, importance, share: q.clone(),
    "the channels with the largest weights were kept. Which ones matter is said by importance": (
        lambda w, q, importance, share: _kept(w, q, w.abs().mean(0), share)
    ),
}


def judge_keep(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    found = got["protected"].float()
    if torch.equal(found, want["protected"]):
        return right()
    for said, mistake in KEEP_MISTAKES.items():
        if torch.equal(found, mistake(*given.values())):
            return wrong(said)
    kept = (found == given["weight"]).all(0)
    right_kept = (want["protected"] == given["weight"]).all(0)
    if int(kept.sum()) != int(right_kept.sum()):
        return wrong(
            f"{int(kept.sum())} of {len(kept)} columns are as before, wanted {int(right_kept.sum())}: {given['share']:.0%}, up"
        )
    place = int((found != want["protected"]).any(0).nonzero()[0])
    return wrong(f"column {place} is {'kept' if kept[place] else 'not kept'}, wanted it otherwise")


KEEP = Exercise(
    id="8.2", name="keep_channels", title="Keep one percent", minutes=6, difficulty=1, points=2,
    returns=("protected",), inputs=keep_inputs, reference=keep_channels, judge=judge_keep,
    mutants=(
        *(Mutant(rule, said[:30]) for said, rule in KEEP_MISTAKES.items()),
        Mutant(partial(_kept, count=lambda n: int(n) + 2), "columns are as before"),
    ),
)  # fmt: skip


# 8.3 ------------------------------------------------------------------------------------------------------------------


def kink_inputs(seed: int) -> dict:
    """Rows in which the channel is a middling weight of either sign, an end of the range, 0, or among weights of one sign."""
    g = generator(seed)
    channel = int(torch.randint(1, 15, (1,), generator=g))
    group = torch.randn(7, 16, generator=g)
    group[:, 0], group[:, 15] = 3.0, -2.0  # the ends of each row's range, at unequal distance
    group[0, channel], group[1, channel] = 0.7 + torch.rand(1, generator=g).item(), -0.4 - torch.rand(1, generator=g).item()
    group[2, channel], group[3, channel] = 3.5, -2.5
    group[4, channel] = 0
    group[5:] = group[5:].abs() * torch.tensor([[1.0], [-1.0]])
    group[5:, channel] = torch.tensor([0.8, -0.8])
    return {"group": group, "channel": channel}


def kink(group: torch.Tensor, channel: int) -> torch.Tensor:
    """By how much each row's weight of a channel can be multiplied before its step grows. [out, size] -> float [out]."""
    return _kink(group, channel)


def _kink(group: torch.Tensor, channel: int) -> torch.Tensor:
    weight = group[:, channel]
    end = torch.where(weight > 0, group.amax(1), group.amin(1))
    return torch.where(weight == 0, torch.full_like(end, torch.inf), end / weight)


def _others(group: torch.Tensor, channel: int) -> torch.Tensor:
    rest = torch.cat([group[:, :channel], group[:, channel + 1 :]], dim=1)
    weight = group[:, channel]
    return torch.where(weight == 0, torch.inf, torch.where(weight > 0, rest.amax(1), rest.amin(1)) / weight)


KINK_MISTAKES: dict[str, Callable] = {
    "magnitudes were compared: a negative weight may only grow to the lower end of its row's range, a positive one to the upper": (
        lambda w, c: w.abs().amax(1) / w[:, c].abs()
    ),
    "every weight was held against the largest of its row: a negative one grows toward the other end": (
        lambda w, c: w.amax(1) / w[:, c]
    ),
    "this is the inverse: the share of the range that the weight takes, not by how much it may grow": lambda w, c: 1 / _kink(w, c),
    "the weight itself was left out of its row's range: where it is the end, s = 1 leaves the step as it is": _others,
    "this is how far the other end of the range is away: a positive weight grows toward the largest of its row": (
        lambda w, c: torch.where(w[:, c] > 0, w.amin(1), w.amax(1)) / w[:, c]
    ),
    "the whole range was divided by the weight: only one end is in the way": lambda w, c: (w.amax(1) - w.amin(1)) / w[:, c].abs(),
}


def judge_kink(given: dict, got: dict, want: dict) -> Verdict:
    wanted, found = want["kink"], got["kink"]
    if isinstance(found, torch.Tensor) and found.numel() == 1:
        return wrong("there is one number, wanted one for each row: every row has a group, and a step, of its own")
    if isinstance(found, torch.Tensor) and found.shape == given["group"].shape[1:]:
        return wrong("there is a value for each channel, wanted one for each row: the range is taken along a row")
    if fault := shape_fault({"kink": found.nan_to_num() if isinstance(found, torch.Tensor) else found}, want):
        return wrong(fault)
    free = wanted.isinf()
    for said, mistake in KINK_MISTAKES.items():
        if torch.allclose(found[~free], mistake(*given.values())[~free], rtol=1e-5):
            return wrong(said)
    off = ((found - wanted).abs() / wanted)[~free].max().item()
    allowed = 2**-22  # a quotient of two float32, and perhaps a reciprocal on the way
    if not off <= allowed:
        row = int(((found - wanted).abs() / wanted).masked_fill(free, 0).nan_to_num(nan=9e9).argmax())
        weight = given["group"][row, given["channel"]].item()
        return wrong(f"row {row}, whose weight is {weight:.3f}, got {found[row].item():.4f}, wanted {wanted[row].item():.4f}")
    if not (found[free] == torch.inf).all():
        return wrong(f"a weight of 0 stays 0 however it is multiplied: wanted infinity, got {found[free][0].item():g}")
    return right(off, allowed)


KINK = Exercise(
    id="8.3", name="kink", title="Find the kink", minutes=10, difficulty=3, points=3,
    returns=("kink",), inputs=kink_inputs, reference=kink, judge=judge_kink,
    mutants=(
        *(Mutant(rule, said[:40]) for said, rule in KINK_MISTAKES.items()),
        Mutant(lambda w, c: _kink(w, c).nan_to_num(posinf=1.0), "a weight of 0"),
        Mutant(lambda w, c: _kink(w, c).min(), "one for each row"),
        Mutant(lambda w, c: w.amax(0) / w[0].abs(), "along a row"),
        Mutant(lambda w, c: _kink(w, c) * 1.01, "got"),
    ),
)  # fmt: skip


# 8.4 ------------------------------------------------------------------------------------------------------------------


def search_inputs(seed: int) -> dict:
    """Two weights that share an input with a few loud channels, and one that never saw any. The best ratio lies inside."""
    weights, inputs = _layers(seed)
    return {
        "weights": [w.clone() for w in weights], "inputs": inputs.clone(), "quantize": rtn.quantize, "bits": 3, "group_size": 16,
    }  # fmt: skip


@cache
def _layers(seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    g = generator(seed)
    while True:
        weights = [torch.randn(rows, 32, generator=g) for rows in (20, 12)]
        inputs = _uneven(40, 32, g)
        inputs[:, torch.randperm(31, generator=g)[:2]] *= 6
        inputs[:, 31] = 0
        losses = awq.search(weights, inputs.T @ inputs, awq.saliency(inputs), 3, 16).losses
        order = losses.sort().values
        if 3 <= int(losses.argmin()) <= 15 and order[1] > 1.005 * order[0]:
            return weights, inputs


def search(
    weights: list[torch.Tensor], inputs: torch.Tensor, quantize: Callable, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """labsupport's search, by llm-awq's rule and through the Gram matrix: the best scale, and the loss at each ratio."""
    found = awq.search(weights, inputs.T @ inputs, awq.saliency(inputs), bits, group_size, n_grid=N_GRID)
    return found.scale, found.losses.float()


def _searched(
    weights, inputs, quantize, bits, group_size,
    divide=True, invert=False, on_weights=False, keep=False, first_only=False, ratios=None, loud=None, smallest=1e-4,
    middle=True, worst=False,
):  # fmt: skip
    """The search, written out, with every step that can go wrong as an option."""
    stacked = weights[0] if first_only else torch.cat(weights)
    mean_abs = inputs.abs().mean(0) if loud is None else loud(inputs)
    losses, scales, held = [], [], stacked
    for ratio in ratios or [i / N_GRID for i in range(N_GRID)]:
        s = mean_abs.pow(ratio).clamp(min=smallest)
        s = s / (s.max() * s.min()).sqrt() if middle else s
        s = 1 / s if invert else s
        values = _read_back((held if keep else stacked) * s, quantize, bits, group_size)
        values = values / s if divide else values
        held = values
        error = values - stacked
        losses.append((error if on_weights else inputs @ error.T).pow(2).sum().item())
        scales.append(s)
    best = losses.index((max if worst else min)(losses))
    return scales[best], torch.tensor(losses)


SOME = [0, 5, 10, 15, 19]  # steps at which mistakes are told apart; one that runs on from step to step needs all
SEARCH_MISTAKES: dict[str, dict] = {
    "the rounded weight was not divided by s again: the output is then that of another input": {"divide": False},
    "s is upside down: the loud channels were shrunk and the quiet ones stretched": {"invert": True},
    "the loss is that of the weights. Rounding to nearest makes it least without any scale; the error of the output counts": {
        "on_weights": True
    },
    "only the first weight was looked at: all that read this input share the scale, and all their outputs count": {
        "first_only": True
    },
    "the last ratio is 1 and there are other steps before it: wanted i / 20 for i from 0 to 19": {
        "ratios": [i / (N_GRID - 1) for i in range(N_GRID)]
    },
    "the scale is made of the largest magnitudes, wanted the means": {"loud": lambda x: x.abs().amax(0)},
    "the scale is made of means without magnitudes: abs() before mean()": {"loud": lambda x: x.mean(0).abs()},
    "the scales are right but for a common factor, which float16 steps round otherwise: divide each by the square root of its "
    "largest times its smallest": {"middle": False},
    "a ratio starts from what the ratio before it left behind, and not from the weight as it came": {"keep": True},
}


def judge_search(given: dict, got: dict, want: dict) -> Verdict:
    losses = got["losses"]
    if isinstance(losses, torch.Tensor) and losses.shape == want["losses"].shape and not losses.isfinite().all():
        return wrong(
            "losses are not finite: a channel that never saw an input has mean 0, so scale 0 at every ratio but the first. Keep it "
            "above 0 with clamp"
        )
    if fault := shape_fault(got, want):
        return wrong(fault)
    losses, wanted = losses.double(), want["losses"].double()
    # A factor on all losses (a mean for a sum) changes nothing about which is least.
    apart = _apart(losses, wanted)
    if apart > LOSS:
        for said, options in SEARCH_MISTAKES.items():
            ratios = options.get("ratios") or [i / N_GRID for i in range(N_GRID)]
            steps = list(range(N_GRID)) if "keep" in options else SOME
            mistaken = _searched(**given, **options | {"ratios": [ratios[i] for i in steps]})[1].double()
            if _apart(losses[steps], mistaken) <= LOSS:
                return wrong(said)
        place = int((losses * wanted[0] / losses[0] / wanted - 1).abs().argmax())
        factor = (losses / losses[0] / (wanted / wanted[0]))[place].item()
        return wrong(f"at the ratio {place / N_GRID:g} the loss is {factor:.3f} times what it should be beside the one at 0")
    best = int(wanted.argmin())
    mean_abs = awq.saliency(given["inputs"])
    near = [i for i in range(N_GRID) if wanted[i] <= wanted[best] * (1 + LOSS)]  # losses this near may change places
    scale = got["scale"]
    off = min(_relative(scale, awq.scale_at(i / N_GRID, mean_abs)) for i in near)
    if off <= 1e-5:  # powers, a product and a square root in float32
        return right(max(off, 0.0), 1e-5)
    if min(_relative(scale / scale[0], s / s[0]) for s in (awq.scale_at(i / N_GRID, mean_abs) for i in near)) <= 1e-5:
        return wrong(next(said for said, options in SEARCH_MISTAKES.items() if "middle" in options))
    for i in range(N_GRID):
        if _relative(scale, awq.scale_at(i / N_GRID, mean_abs)) <= 1e-5:
            return wrong(
                f"the losses are right, and the scale is that of the ratio {i / N_GRID:g}: wanted {best / N_GRID:g}'s, "
                "whose loss is the least"
            )
    return wrong("the losses are right, and the scale is that of none of the ratios")


def _apart(losses: torch.Tensor, wanted: torch.Tensor) -> float:
    return (losses / losses[0] / (wanted / wanted[0]) - 1).abs().max().item()


def _relative(scale: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((scale.float() - wanted).abs() / wanted).max().item()


SEARCH = Exercise(
    id="8.4", name="search", title="Search the scale", minutes=15, difficulty=3, points=4,
    returns=("scale", "losses"), inputs=search_inputs, reference=search, judge=judge_search,
    mutants=(
        *(Mutant(partial(_searched, **options), said[:30]) for said, options in SEARCH_MISTAKES.items()),
        Mutant(partial(_searched, smallest=0.0, middle=False), "never saw an input"),
        Mutant(partial(_searched, smallest=0.0), "weight holds NaN"),
        Mutant(partial(_searched, worst=True), "whose loss is the least"),
        Mutant(lambda *given: (awq.scale_at(0.95, awq.saliency(given[1])), _searched(*given)[1]), "the ratio 0.95"),
        Mutant(lambda *given: (awq.saliency(given[1]).clamp(min=1e-4), _searched(*given)[1]), "none of the ratios"),
        Mutant(lambda *given: (_searched(*given)[0], _searched(*given)[1] ** 2), "beside the one at 0"),
    ),
)  # fmt: skip


# 8.5 ------------------------------------------------------------------------------------------------------------------

HEADS, WIDTH, INNER = 4, 16, 24


class Block(nn.Module):
    """A Llama block in small, its parts named as in transformers; rotary positions and the mask are left out.

    key_heads: as many as there are heads, or fewer, shared by several of them: grouped-query attention.
    """

    def __init__(self, key_heads: int):
        super().__init__()
        shared = WIDTH // HEADS * key_heads
        self.input_layernorm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(WIDTH, WIDTH)
        self.self_attn.k_proj = nn.Linear(WIDTH, shared, bias=False)
        self.self_attn.v_proj = nn.Linear(WIDTH, shared)
        self.self_attn.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.mlp.up_proj = nn.Linear(WIDTH, INNER)
        self.mlp.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, WIDTH] -> the same."""
        attention, mlp, x = self.self_attn, self.mlp, self.input_layernorm(hidden)
        q, k, v = (layer(x).unflatten(1, (-1, WIDTH // HEADS)) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
        k, v = (each.repeat_interleave(HEADS // each.shape[1], dim=1) for each in (k, v))  # heads that share one
        weights = torch.einsum("qhd,khd->hqk", q, k).softmax(-1)
        hidden = hidden + attention.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        x = self.post_attention_layernorm(hidden)
        return hidden + mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


KEY_HEADS = {"every head its own": HEADS, "grouped-query": HEADS // 2}


def fold_inputs(seed: int) -> dict:
    """Weights of two blocks, with and without heads that share keys and values; scales for the four inputs of a block."""
    g = generator(seed)
    blocks = {}
    for kind, key_heads in KEY_HEADS.items():
        shapes = {name: parameter.shape for name, parameter in Block(key_heads).state_dict().items()}
        blocks[kind] = {name: torch.randn(shape, generator=g) / 4 + 0.5 * (len(shape) == 1) for name, shape in shapes.items()}
    sizes = {"attention": WIDTH, "o": WIDTH, "mlp": WIDTH, "down": INNER}
    scales = {name: torch.exp(torch.randn(size, generator=g)) for name, size in sizes.items()}
    return {"blocks": blocks, "scales": scales, "hidden": torch.randn(9, WIDTH, generator=g)}


GROUPS = {
    "attention": folding.Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn"),
    "o": folding.Group(("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj"),
    "mlp": folding.Group(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp"),
    "down": folding.Group(("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj"),
}


def fold_block(block: nn.Module, scales: dict[str, torch.Tensor]) -> None:
    """labsupport's folding, for each input of a block that can take a scale."""
    for name, group in GROUPS.items():
        if name != "o" or block.self_attn.v_proj.out_features == block.self_attn.o_proj.in_features:
            folding.fold(block, group, scales[name])


def drive_fold(answer: Callable, given: dict) -> dict:
    """Every parameter of both blocks afterwards, and how far their outputs have moved, relatively."""
    found = {}
    for kind, weights in given["blocks"].items():
        block = Block(KEY_HEADS[kind])
        block.load_state_dict({name: weight.clone() for name, weight in weights.items()})
        before = block(given["hidden"])
        answer(block, {name: scale.clone() for name, scale in given["scales"].items()})
        moved = (block(given["hidden"]) - before).abs().max() / before.abs().max()
        found |= {f"{kind}: {name}": parameter for name, parameter in block.state_dict().items()}
        found |= {f"{kind}: moved": moved.item()}
    return found


def _folded(
    block, scales, left_out=(), multiply=(), forget_bias=False, reader_bias=False, rows=False, invert=False, everywhere=False,
    undivided=(),
):  # fmt: skip
    """Folding with what can go wrong: linears left out, what is multiplied where it must be divided, and so on."""
    for name, group in GROUPS.items():
        shared = block.self_attn.v_proj.out_features != block.self_attn.o_proj.in_features
        if name == "o" and shared and not everywhere:
            continue
        s = 1 / scales[name] if invert else scales[name]
        for linear in (block.get_submodule(n) for n in group.linears if n.rsplit(".", 1)[1] not in left_out):
            if rows and linear.weight.shape[0] == linear.weight.shape[1]:
                linear.weight.mul_(s[:, None])
            else:
                linear.weight.mul_(s)
            if reader_bias and linear.bias is not None and len(linear.bias) == len(s):
                linear.bias.mul_(s)
        before = block.get_submodule(group.before)
        if name in undivided:
            continue
        part = s[: len(before.weight)]
        factor = part if name in multiply else 1 / part
        before.weight.mul_(factor if before.weight.ndim == 1 else factor[:, None])
        if getattr(before, "bias", None) is not None and not forget_bias:
            before.bias.mul_(factor)


FOLD_MISTAKES: dict[str, dict] = {
    "nothing has changed: weights are changed in place, with copy_, mul_ or div_": {
        "left_out": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "undivided": tuple(GROUPS),
    },
    "the norms are multiplied by the scale like the linears behind them; what comes before is divided": {
        "multiply": ("attention", "mlp")
    },
    "everything before is multiplied by the scale, and so is what reads it: s counts twice": {"multiply": tuple(GROUPS)},
    "q_proj is scaled, k_proj and v_proj are not: all three read the norm that has been divided": {
        "left_out": ("k_proj", "v_proj")
    },
    "gate_proj is scaled and up_proj is not: both read the norm that has been divided": {"left_out": ("up_proj",)},
    "up_proj is scaled and gate_proj is not: both read the norm that has been divided": {"left_out": ("gate_proj",)},
    "the linears are scaled, and nothing before them is divided": {"undivided": tuple(GROUPS)},
    "the norms are divided; v_proj and up_proj, which come before o_proj and down_proj, are not": {"undivided": ("o", "down")},
    "the bias of v_proj and up_proj is not divided: it is part of what o_proj and down_proj read": {"forget_bias": True},
    "the bias of a linear is multiplied by its input's scale: a bias does not meet the input": {"reader_bias": True},
    "the rows of the linears are scaled: a channel of the input meets a column": {"rows": True},
    "the scale is upside down: weights are divided by it and what comes before is multiplied. The function is unchanged, but "
    "the loud channels are now rounded more coarsely": {"invert": True},
    "with grouped-query attention two heads of o_proj read one head of v_proj, so no scale of o_proj can be folded: leave both": {
        "everywhere": True
    },
}  # fmt: skip


def judge_fold(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault({name: got.get(name) for name in want}, want):
        return wrong(fault)
    # A product and a quotient of float32, or a product and a product with a reciprocal.
    allowed = 3 * 2**-24
    if (off := _furthest(got, want)) <= allowed:
        return right(off, allowed)
    for said, options in FOLD_MISTAKES.items():
        if _furthest(got, drive_fold(partial(_folded, **options), given)) <= 2 * allowed:
            return wrong(said)
    name = max(_parameters(want), key=lambda n: ((got[n] - want[n]).abs().max() / want[n].abs().max()).item())
    kind, _, parameter = name.partition(": ")
    return wrong(f"{parameter} is not what it should be ({kind}); the block's output moves by {100 * got[f'{kind}: moved']:.2g} %")


def _parameters(outputs: dict) -> list[str]:
    return [name for name, value in outputs.items() if isinstance(value, torch.Tensor)]


def _furthest(got: dict, want: dict) -> float:
    return max(((got[name] - want[name]).abs() / want[name].abs().clamp(min=1e-30)).max().item() for name in _parameters(want))


FOLD = Exercise(
    id="8.5", name="fold_block", title="Fold four scales into a block", minutes=15, difficulty=4, points=4,
    returns=(), inputs=fold_inputs, reference=fold_block, judge=judge_fold, drive=drive_fold,
    mutants=(
        *(Mutant(partial(_folded, **options), said[:40]) for said, options in FOLD_MISTAKES.items()),
        Mutant(partial(_folded, left_out=("down_proj",)), "down_proj.weight is not"),
    ),
)  # fmt: skip


# 8.6 ------------------------------------------------------------------------------------------------------------------

STEPS = 10


def clip_inputs(seed: int) -> dict:
    """Weights whose groups differ in how far their tails reach, and inputs of unequal size that share directions."""
    g = generator(seed)
    weight = torch.randn(12, 48, generator=g)
    weight = weight * (1 + weight.abs())
    inputs = _uneven(30, 48, g) + _uneven(30, 6, g) @ torch.randn(6, 48, generator=g)
    return {"weight": weight, "inputs": inputs, "quantize": rtn.quantize, "bits": 3, "group_size": 16}


def best_clip(weight: torch.Tensor, inputs: torch.Tensor, quantize: Callable, bits: int, group_size: int) -> torch.Tensor:
    """labsupport's search of clips, through the Gram matrix."""
    return awq.search_clip(weight, inputs.T @ inputs, bits, group_size)


def _clipped(
    weight, inputs, quantize, bits, group_size,
    against=None, on_weights=False, whole_row=False, upper_only=False, worst=False, signed=False, steps=STEPS, furthest=False,
):  # fmt: skip
    """The search of clips, written out, with every step that can go wrong as an option. [out, groups]."""
    losses = clip_losses(weight, inputs, quantize, bits, group_size, against, on_weights, upper_only, steps, furthest)
    groups = weight.unflatten(1, (-1, group_size))
    largest = groups.amax(2) if signed else groups.abs().amax(2)
    if whole_row:
        losses = losses.sum(2, keepdim=True).expand_as(losses)
    chosen = losses.argmax(0) if worst else losses.argmin(0)
    return largest * (1 - chosen / N_GRID)


def clip_losses(
    weight, inputs, quantize, bits, group_size, against=None, on_weights=False, upper_only=False, steps=STEPS, furthest=False
) -> torch.Tensor:
    """The squared error of each group's part of the output, at each step of the limit. float64 [steps, out, groups]."""
    groups = weight.unflatten(1, (-1, group_size))
    x = inputs.double().unflatten(1, (-1, group_size))
    losses = []
    for step in range(steps):
        limit = (groups.abs().amax(2) * (1 - step / N_GRID))[..., None]
        clipped = (groups.minimum(limit) if upper_only else groups.clamp(-limit, limit)).flatten(1)
        values = _read_back(clipped, quantize, bits, group_size)
        error = (values - (clipped if against == "clipped" else weight)).double().unflatten(1, (-1, group_size))
        off = torch.einsum("ngc,ogc->nog", x, error)
        losses.append(error.pow(2).sum(2) if on_weights else off.abs().amax(0) if furthest else off.pow(2).sum(0))
    return torch.stack(losses)


CLIP_MISTAKES: dict[str, dict] = {
    "the rounded weight was compared with the clipped one: then clipping itself costs nothing": {"against": "clipped"},
    "the error of the weights was taken, wanted that of the outputs: what a weight meets decides what clipping it costs": {
        "on_weights": True
    },
    "all groups of a row are clipped by the same share: each group has a grid, and a limit, of its own": {"whole_row": True},
    "large weights below 0 were not clipped: the limit holds on both sides": {"upper_only": True},
    "the limit with the largest loss was taken, wanted the least": {"worst": True},
    "the limit starts from the largest weight, wanted the largest magnitude: where the longest tail is negative it is too small": {
        "signed": True
    },
    "the limit was chosen by the worst token, wanted the sum of squares over all of them": {"furthest": True},
    "nothing is clipped: these are the largest magnitudes themselves": {"steps": 1},
}


def judge_clip(given: dict, got: dict, want: dict) -> Verdict:
    limit = got["limit"]
    if isinstance(limit, torch.Tensor) and limit.numel() in (1, len(given["weight"])):
        return wrong(f"there is a limit for each {'row' if limit.numel() > 1 else 'weight matrix'}, wanted one for each group")
    if fault := shape_fault(got, want):
        return wrong(fault)
    limit = limit.float()
    largest = given["weight"].unflatten(1, (-1, given["group_size"])).abs().amax(2)
    step = (1 - limit / largest) * N_GRID
    chosen = step.round().long().clamp(0, STEPS - 1)
    losses = clip_losses(**given)
    ratio = losses.gather(0, chosen[None])[0] / losses.amin(0)
    off_grid = ((step - step.round()).abs() > 1e-3) | (step.round() < 0) | (step.round() >= STEPS)
    if not off_grid.any() and ratio.max() <= 1 + LOSS:
        return right(ratio.max().item() - 1, LOSS)
    for said, options in CLIP_MISTAKES.items():
        if torch.allclose(limit, _clipped(**given, **options), rtol=1e-5):
            return wrong(said)
    if off_grid.any():
        row, group = off_grid.nonzero()[0].tolist()
        return wrong(
            f"row {row}, group {group}: the limit is {(limit / largest)[row, group].item():.3f} of the largest magnitude, which is "
            f"none of 1, 0.95, ..., 0.55"
        )
    row, group = divmod(int(ratio.argmax()), limit.shape[1])
    return wrong(
        f"row {row}, group {group}: the limit {limit[row, group].item():.4f} leaves {ratio.max().item():.2f} times the error "
        f"of the best, {want['limit'][row, group].item():.4f}"
    )


CLIP = Exercise(
    id="8.6", name="best_clip", title="Where to clip a group", minutes=12, difficulty=3, points=3,
    returns=("limit",), inputs=clip_inputs, reference=best_clip, judge=judge_clip,
    mutants=(
        *(Mutant(partial(_clipped, **options), said[:40]) for said, options in CLIP_MISTAKES.items()),
        Mutant(lambda *given: _clipped(*given).amax(1), "for each row"),
        Mutant(lambda *given: _clipped(*given).amax(), "for each weight matrix"),
        Mutant(lambda *given: 0.9 * _clipped(*given, steps=1) - 0.01, "none of 1, 0.95"),
        Mutant(lambda *given: _clipped(*given).roll(1, 0), "row"),
    ),
)  # fmt: skip


# 8.7 ------------------------------------------------------------------------------------------------------------------

READERS = {"attention": 2, "o": 1, "mlp": 2, "down": 1}  # how many linears read each input of a block


def bug_inputs(seed: int) -> dict:
    """A block whose inputs are of one width, but for the last: and losses of which one was computed with another's input.

    The faulty one is neither the largest nor the smallest, and no loss of another input comes near it by chance.
    """
    found = _faulty(seed)
    return {
        "weights": {name: [w.clone() for w in layers] for name, layers in found[0].items()},
        "inputs": {name: x.clone() for name, x in found[1].items()},
        "losses": {name: list(losses) for name, losses in found[2].items()},
        "quantize": rtn.quantize, "bits": 3, "group_size": 16,
    }  # fmt: skip


@cache
def _faulty(seed: int) -> tuple[dict, dict, dict]:
    g = generator(seed)
    widths = {"attention": 32, "o": 32, "mlp": 32, "down": 48}
    while True:
        inputs = {name: 2 ** (2 * torch.rand(1, generator=g)) * _uneven(30, width, g) for name, width in widths.items()}
        weights = {name: [torch.randn(12, widths[name], generator=g) for _ in range(count)] for name, count in READERS.items()}
        names = ("attention", "o", "mlp")
        place, other = torch.randperm(3, generator=g)[:2].tolist()
        group, fed = names[place], names[other]
        really = inputs | {group: inputs[fed]}
        at_0 = {name: _plain_loss(weights[name], x, rtn.quantize, 3, 16) for name, x in really.items()}
        ends = (max(at_0, key=at_0.get), min(at_0, key=at_0.get))
        near = [
            (name, other)
            for name in names
            for other in names
            if abs(_plain_loss(weights[name], inputs[other], rtn.quantize, 3, 16) / at_0[name] - 1) < 10 * LOSS
        ]
        if group not in ends and set(near) == {(name, name) for name in names if name != group} | {(group, fed)}:
            losses = {
                name: awq.search(weights[name], x.T @ x, awq.saliency(x), 3, 16).losses.tolist() for name, x in really.items()
            }
            return weights, inputs, losses


def _plain_loss(weights, x, quantize, bits: int, group_size: int) -> float:
    """What rounding costs the outputs when nothing is scaled: the loss at ratio 0."""
    return sum((x @ (_read_back(w, quantize, bits, group_size) - w).T).pow(2).sum().item() for w in weights)


def find_the_bug(
    weights: dict[str, list[torch.Tensor]],
    inputs: dict[str, torch.Tensor],
    losses: dict[str, list[float]],
    quantize: Callable,
    bits: int,
    group_size: int,
) -> tuple[str, str]:
    """The group whose losses are of another group's input, and that other. At ratio 0 every scale is 1, so nothing is searched."""
    return _find(weights, inputs, losses, quantize, bits, group_size)


def _find(weights, inputs, losses, quantize, bits, group_size) -> tuple[str, str]:
    for group, layers in weights.items():
        for fed, x in inputs.items():
            fits = fed != group and x.shape[1] == layers[0].shape[1]
            if fits and abs(_plain_loss(layers, x, quantize, bits, group_size) / losses[group][0] - 1) < LOSS:
                return group, fed
    return "", ""


def judge_bug(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    group, fed = got["group"], got["fed"]
    if (group, fed) == (want["group"], want["fed"]):
        return right()
    if (group, fed) == (want["fed"], want["group"]):
        return wrong(f"the two are exchanged: the losses said to be of {fed} come first, then the input that they really are of")
    for name, value in (("group", group), ("fed", fed)):
        if value not in given["weights"]:
            return wrong(f"{name} is {value!r}, wanted one of {', '.join(given['weights'])}")
    if group == fed:
        return wrong(f"{group} on its own input is as it should be: wanted the group that is on another's")
    if group != want["group"]:
        settings = (given["quantize"], given["bits"], given["group_size"])
        ratio = _plain_loss(given["weights"][group], given["inputs"][group], *settings) / given["losses"][group][0]
        return wrong(f"on its own input {group} loses {ratio:.3f} times what is said of it at ratio 0: that one is sound")
    if given["inputs"][fed].shape != given["inputs"][group].shape:
        return wrong(f"{group} it is, but its weights cannot be multiplied with the input of {fed}: the widths differ")
    return wrong(f"{group} it is, but on the input of {fed} it would lose something else at ratio 0")


def _by_size(losses: dict[str, list[float]], end: Callable) -> tuple[str, str]:
    """The group that stands out by the size of its loss, and a guess."""
    group = end(losses, key=lambda name: losses[name][0])
    return group, "attention" if group == "down" else "down"


BUG = Exercise(
    id="8.7", name="find_the_bug", title="Find the bug", minutes=10, difficulty=3, points=3,
    returns=("group", "fed"), inputs=bug_inputs, reference=find_the_bug, judge=judge_bug,
    mutants=(
        Mutant(lambda *given: _find(*given)[::-1], "exchanged"),
        Mutant(lambda w, x, losses, *_: _by_size(losses, max), "that one is sound"),
        Mutant(lambda w, x, losses, *_: _by_size(losses, min), "that one is sound"),
        Mutant(lambda *given: (_find(*given)[0],) * 2, "wanted the group that is on another's"),
        Mutant(lambda *given: (_find(*given)[0], "down"), "the widths differ"),
        Mutant(
            lambda *given: (_find(*given)[0], ({"attention", "o", "mlp"} - set(_find(*given))).pop()), "something else"
        ),
        Mutant(lambda *given: ("qkv", "o"), "wanted one of attention"),
    ),
)  # fmt: skip

EXERCISES = (SALIENCY, KEEP, KINK, SEARCH, FOLD, CLIP, BUG)
