"""Chapter 8: which input channels matter, how far one of them can be stretched, and where its inverse goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from labsupport.exercises.compare import difference, first_difference, got_and_wanted, within
from labsupport.exercises.form import Exercise, Fault, Mistake, Mutant, generator, mistakes_by_option, mistakes_of, right
from labsupport.pipeline import fold as folding
from labsupport.quant import awq, rtn

N_GRID, STEPS = 20, 10  # ratios i / N_GRID that are tried; limits 1 - i / N_GRID
# Float32 operations in another order may move a code that lies on a tie: of some thousand, worth less in a sum of squares.
LOSS = 1e-2
SAME_SCALE = 1e-5  # relatively: powers, a product and a square root in float32
SAME_LIMIT = 2**-20  # relatively: 1 - step / 20 or a sum of such steps, and a product; the next limit is 5 % off


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


SALIENCY = Exercise(
    id="8.1", name="saliency", title="How loud is a channel?", minutes=5, difficulty=1, points=2,
    returns=("saliency",), inputs=saliency_inputs, reference=awq.saliency,
    # A float32 sum of 60 magnitudes, the largest channel's being the most; a mistake's output may be that sum, 60 times a mean.
    allowed=lambda given, want: 60 * 2**-24 * want["saliency"].max().item(),
    close=lambda given, want: 60 * 60 * 2**-24 * want["saliency"].max().item(),
    faults=(
        Fault("there is one value for each token, wanted one for each channel: the mean runs over tokens",
              lambda given, got, want: got["saliency"].shape == (3, 20), (lambda x: x.abs().mean(2),), early=True),
        Fault("each window has a mean of its own: tokens of all windows count alike",
              lambda given, got, want: got["saliency"].shape == (3, 12), (lambda x: x.abs().mean(1),), early=True),
    ),
    mistakes=(
        Mistake("the mean was taken before the magnitude: a channel that swings between -5 and 5 then counts as silent. abs() "
                "first", lambda x: x.mean((0, 1)).abs()),
        Mistake("this is the largest magnitude: one token decides for a channel that is quiet in all others. Take the mean",
                lambda x: x.abs().amax((0, 1))),
        Mistake("this is the root mean square, in which rare large values count more. AWQ takes the mean magnitude",
                lambda x: x.pow(2).mean((0, 1)).sqrt()),
        Mistake("this is the sum over tokens, wanted the mean", lambda x: x.abs().sum((0, 1))),
        Mistake("the magnitudes were not taken: the mean of a channel may be negative or 0, however loud it is",
                lambda x: x.mean((0, 1))),
        Mistake("only the first window was looked at", lambda x: x[0].abs().mean(0)),
    ),
)  # fmt: skip


# 8.2 ------------------------------------------------------------------------------------------------------------------
def keep_inputs(seed: int) -> dict:
    """More rows than columns, which can be mistaken for channels; a share that is a whole number of them, and a little more."""
    g = generator(seed)
    weight = torch.randn(160, 150, generator=g)
    share = 0.02 * int(torch.randint(1, 5, (1,), generator=g))  # 3, 6, 9 or 12 columns, in float32 as well
    importance = torch.rand(150, generator=g)
    return {"weight": weight, "quantized": (weight * 2).round() / 2, "importance": importance, "shares": (share, share + 2e-5)}


def keep_channels(weight: torch.Tensor, quantized: torch.Tensor, importance: torch.Tensor, share: float) -> torch.Tensor:
    """quantized [out, in], with the columns of the most important channels as they were in weight. (AWQ, section 3.1.)"""
    return _kept(weight, quantized, importance, share)


def _kept(weight, quantized, importance, share, count=math.ceil, largest=True, axis=1):
    chosen = importance.topk(count(share * len(importance)), largest=largest).indices
    return quantized.index_copy(axis, chosen, weight.index_select(axis, chosen))


def _columns_differ(given: dict, got: dict, want: dict) -> str:
    name = next(name for name in want if (got[name] != want[name]).any())
    kept, to_keep = ((outputs[name] == given["weight"]).all(0) for outputs in (got, want))
    if kept.sum() != to_keep.sum():
        return f"{kept.sum()} of {len(kept)} columns are as before, wanted {to_keep.sum()}: {name.split()[-1]} of all, rounded up"
    column = int((got[name] != want[name]).any(0).nonzero()[0])
    rounded = (got[name] == given["quantized"])[:, column].all()
    found = "weight" if kept[column] else "quantized" if rounded else "neither weight nor quantized"
    return f"column {column} is as in {found}, wanted it as in {'weight' if to_keep[column] else 'quantized'}"


KEEP = Exercise(
    id="8.2", name="keep_channels", title="Keep one percent", minutes=6, difficulty=1, points=2,
    returns=("protected",), inputs=keep_inputs, reference=keep_channels, otherwise=_columns_differ,
    drive=lambda answer, given: {f"protected at share {s:g}": answer(*[*given.values()][:3], s) for s in given["shares"]},
    mistakes=mistakes_by_option(_kept, {
        "rows were kept, which are outputs. A channel of the input meets a column": {"axis": 0},
        "the least important channels were kept": {"largest": False},
        "the number of channels was rounded down: 1 % of 50 channels would be none. Round up": {"count": int},
        "where the share is a whole number of channels there is one too many: int(n) + 1 does not round up": {
            "count": lambda n: int(n) + 1},
        "the important channels were rounded and all others kept": lambda w, q, importance, share: _kept(q, w, importance, share),
        "all channels were rounded: nothing is kept": lambda w, q, importance, share: q.clone(),
        "the channels with the largest weights were kept. Which ones matter is said by importance":
            lambda w, q, importance, share: _kept(w, q, w.abs().mean(0), share),
    }),
    others=(
        Mutant(partial(_kept, count=lambda n: int(n) + 2), "columns are as before"),
        Mutant(lambda w, q, importance, share: _kept(w, q, importance.roll(1), share), "wanted it as in"),
        Mutant(lambda w, q, importance, share: _kept(w, q + 1, importance, share), "neither weight nor quantized"),
    ),
)  # fmt: skip


# 8.3 ------------------------------------------------------------------------------------------------------------------
def kink_inputs(seed: int) -> dict:
    """Rows whose weight of the channel is small or middling, of either sign, an end of the range, 0, or among those of one sign."""
    g = generator(seed)
    channel = int(torch.randint(1, 15, (1,), generator=g))
    group = torch.randn(9, 16, generator=g).clamp(-1.9, 2.9)
    group[:, 0] = 3 + torch.rand(9, generator=g)  # the ends of each row's range, at unequal distance
    group[:, 15] = -2 - torch.rand(9, generator=g)
    group[7], group[8] = group[7].abs(), -group[8].abs()
    above, below = (0.4 + torch.rand(2, generator=g)).tolist()
    group[:, channel] = torch.tensor([above, -below, 0.01, -0.01, 4.5, -3.5, 0, 0.8, -0.8])
    return {"group": group, "channel": channel}


def kink(group: torch.Tensor, channel: int) -> torch.Tensor:
    """By how much each row's weight of a channel can be multiplied before its step grows. [out, size] -> float [out]."""
    return _kink(group[:, channel], group)


def _kink(weight: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """How many times each weight [out] fits between 0 and the end of its row of others [out, size], on its side of 0."""
    end = torch.where(weight > 0, others.amax(1), others.amin(1))
    return torch.where(weight == 0, torch.inf, end / weight)


def _kinks(of: Callable) -> Callable:
    """An answer: of(right kinks [out], weights of the channel [out], group [out, size])."""
    return lambda group, channel: of(_kink(group[:, channel], group), group[:, channel], group)


def _kink_differs(given: dict, got: dict, want: dict) -> str:
    row = int((~torch.isclose(got["kink"].double(), want["kink"].double(), rtol=2**-22, atol=0)).nonzero()[0])
    found, weight = got["kink"][row].item(), given["group"][row, given["channel"]].item()
    if weight == 0:
        return f"a weight of 0 stays 0 however it is multiplied: wanted infinity, got {found:g}"
    return f"row {row}, whose weight is {weight:.3f}, {got_and_wanted(found, want['kink'][row].item())}"


KINK = Exercise(
    id="8.3", name="kink", title="Find the kink", minutes=10, difficulty=3, points=3,
    returns=("kink",), inputs=kink_inputs, reference=kink, otherwise=_kink_differs,
    # A quotient of two float32, and perhaps a reciprocal on the way. Where infinity is wanted, nothing else will do.
    allowed=lambda given, want: 2**-22 * want["kink"].nan_to_num(posinf=0.0),
    close=lambda given, want: 1e-5 * want["kink"],  # infinite in the row of 0: what is done about it is another thing
    faults=(
        Fault("there is one number, wanted one for each row: every row has a group, and a step, of its own",
              lambda given, got, want: got["kink"].numel() == 1, (_kinks(lambda k, w, group: k.min()),), early=True),
        Fault("there is a value for each channel, wanted one for each row: the range is taken along a row",
              lambda given, got, want: got["kink"].shape == (16,), (lambda group, _: group.amax(0) / group[0].abs(),), early=True),
    ),
    mistakes=(
        Mistake("the weight itself was left out of its row's range: where it is the end, s = 1 leaves the step as it is",
                lambda group, channel: _kink(group[:, channel], torch.cat([group[:, :channel], group[:, channel + 1 :]], 1))),
        *mistakes_of(_kinks, {
            "magnitudes were compared: a negative weight may only grow to the lower end of its row's range, a positive one to the "
            "upper": lambda k, w, group: group.abs().amax(1) / w.abs(),
            "every weight was held against the largest of its row: a negative one grows toward the other end":
                lambda k, w, group: group.amax(1) / w,
            "this is the inverse: the share of the range that the weight takes, not by how much it may grow":
                lambda k, w, group: 1 / k,
            "this is how far the other end of the range is away: a positive weight grows toward the largest of its row":
                lambda k, w, group: torch.where(w > 0, group.amin(1), group.amax(1)) / w,
            "the whole range was divided by the weight: only one end is in the way":
                lambda k, w, group: (group.amax(1) - group.amin(1)) / w.abs(),
        }),
    ),
    others=(Mutant(_kinks(lambda k, w, group: k * 1.01), "got"),
            Mutant(_kinks(lambda k, w, group: k.nan_to_num(posinf=1.0)), "a weight of 0 stays 0")),
)  # fmt: skip


# 8.4 ------------------------------------------------------------------------------------------------------------------
SETTINGS: dict[str, Any] = {"quantize": rtn.quantize, "bits": 3, "group_size": 8}


@cache
def search_inputs(seed: int) -> dict:
    """Two weights that share an input with loud channels, and one that never saw any. One ratio, not at an end, is the best."""
    g = generator(seed)
    while True:
        weights = [torch.randn(rows, 32, generator=g) for rows in (18, 11)]
        inputs = _uneven(40, 32, g)
        inputs[:, torch.randperm(31, generator=g)[:2]] *= 6
        inputs[:, 31] = 0
        given = {"weights": weights, "inputs": inputs, **SETTINGS}
        losses = _searched(**given)[1]
        least, second = losses.sort().values[:2]
        if 3 <= int(losses.argmin()) <= 15 and second > (1 + 2 * LOSS) * least:
            return given


def search(weights: list, inputs: torch.Tensor, quantize: Callable, bits: int, group_size: int) -> tuple:
    """labsupport's search, by llm-awq's rule and through the Gram matrix: the best scale, and the loss at each ratio."""
    found = awq.search(weights, inputs.T @ inputs, awq.saliency(inputs), bits, group_size, n_grid=N_GRID)
    return found.scale, found.losses.float()


def _searched(
    weights, inputs, quantize, bits, group_size, divide=True, invert=False, on_weights=False, first_only=False, last=N_GRID,
    loud=lambda x: x.abs().mean(0), smallest=1e-4, middle=True, choose=torch.argmin, carry_on=False,
):  # fmt: skip
    """The search, all ratios at once, with every step that can go wrong as an option."""
    stacked = weights[0] if first_only else torch.cat(weights)
    scales = loud(inputs).pow(torch.arange(N_GRID)[:, None] / last).clamp(min=smallest)  # [ratios, in]
    if middle:
        scales = scales / (scales.amax(1, keepdim=True) * scales.amin(1, keepdim=True)).sqrt()
    s = (1 / scales if invert else scales)[:, None]
    if carry_on:
        left = accumulate(s, lambda held, scale: quantize(held * scale, bits, group_size).dequantize() / scale, initial=stacked)
        values = torch.stack([*left][1:])
    else:
        values = quantize((stacked * s).flatten(0, 1), bits, group_size).dequantize().view(N_GRID, *stacked.shape)
        values = values / s if divide else values
    losses = (values - stacked if on_weights else (values - stacked) @ inputs.T).pow(2).sum((1, 2))
    return s[choose(losses), 0], losses


def _relative(losses: torch.Tensor) -> torch.Tensor:
    """A factor on all losses (a mean for a sum) changes nothing about which is least."""
    return losses.double() / losses[0].double()


def _search_gap(got: dict, theirs: dict) -> tuple[float, float, bool]:
    have, want = ({**outputs, "losses": _relative(outputs["losses"])} for outputs in (got, theirs))
    return difference(have, want, {"scale": SAME_SCALE * want["scale"], "losses": LOSS * want["losses"]})


def _search_differs(given: dict, got: dict, want: dict) -> str:
    if not got["losses"][0] > 0:
        return f"losses[0], of plain rounding: {got_and_wanted(got['losses'][0].item(), want['losses'][0].item())}"
    factors = _relative(got["losses"]) / _relative(want["losses"])
    place = int((factors - 1).abs().argmax())
    if abs(factors[place] - 1) > LOSS:
        return f"at the ratio {place / N_GRID:g} the loss is {factors[place]:.3f} times what it should be beside the one at 0"
    scales = [awq.scale_at(step / N_GRID, awq.saliency(given["inputs"])) for step in range(N_GRID)]
    gaps = [((got["scale"] - scale).abs() / scale).max().item() for scale in scales]
    if min(gaps) > SAME_SCALE:
        return "the losses are right, and the scale is that of none of the ratios"
    found, best = (place / N_GRID for place in (gaps.index(min(gaps)), int(want["losses"].argmin())))
    return f"the losses are right, and the scale is that of the ratio {found:g}: wanted {best:g}'s, whose loss is the least"


SEARCH = Exercise(
    id="8.4", name="search", title="Search the scale", minutes=15, difficulty=3, points=4,
    returns=("scale", "losses"), inputs=search_inputs, reference=search, otherwise=_search_differs,
    accepts=lambda given, got, want: right(*_search_gap(got, want)[:2]) if _search_gap(got, want)[2] else None,
    alike=lambda given, got, theirs: _search_gap(got, theirs)[2],
    faults=(
        Fault("losses are not finite. A channel that never saw an input has mean 0, so its scale at every ratio but the first is 0 "
              "unless clamp keeps it above", lambda given, got, want: not got["losses"].isfinite().all(),
              (partial(_searched, smallest=0.0, middle=False),), early=True),
    ),
    mistakes=mistakes_by_option(_searched, {
        "the rounded weight was not divided by s again: the output is then that of another input": {"divide": False},
        "s is upside down: the loud channels were shrunk and the quiet ones stretched": {"invert": True},
        "the loss is that of the weights. Rounding to nearest makes it least without any scale; the error of the output "
        "counts": {"on_weights": True},
        "only the first weight was looked at: all that read this input share the scale, and all their outputs count": {
            "first_only": True},
        "the last ratio is 1 and there are other steps before it: wanted i / 20 for i from 0 to 19": {"last": N_GRID - 1},
        "the scale is made of the largest magnitudes, wanted the means": {"loud": lambda x: x.abs().amax(0)},
        "the scale is made of means without magnitudes: abs() before mean()": {"loud": lambda x: x.mean(0).abs()},
        "the scales are right but for a common factor, which float16 steps round otherwise: divide each by the square root of "
        "its largest times its smallest": {"middle": False},
        "a ratio starts from what the ratio before it left behind, and not from the weight as it came": {"carry_on": True},
    }),
    others=(
        Mutant(partial(_searched, choose=torch.argmax), "whose loss is the least"),
        Mutant(lambda *given: (awq.saliency(given[1]).clamp(min=1e-4), _searched(*given)[1]), "none of the ratios"),
        Mutant(lambda *given: (_searched(*given)[0], _searched(*given)[1] ** 2), "beside the one at 0"),
        Mutant(lambda *given: (_searched(*given)[0], 0 * _searched(*given)[1]), "of plain rounding"),
    ),
)  # fmt: skip


# 8.5 ------------------------------------------------------------------------------------------------------------------
HEADS, WIDTH, INNER = 4, 20, 28
KEY_HEADS = {"every head its own": HEADS, "grouped-query": HEADS // 2}


class Block(nn.Module):
    """A small Llama block, its parts named as in transformers, without positions and mask. Heads may share key_heads."""

    self_attn: Any  # the ModuleDicts below, whose entries are attributes
    mlp: Any

    def __init__(self, key_heads: int):
        super().__init__()
        shared = WIDTH // HEADS * key_heads
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(WIDTH, WIDTH), "k_proj": nn.Linear(WIDTH, shared, bias=False),
            "v_proj": nn.Linear(WIDTH, shared), "o_proj": nn.Linear(WIDTH, WIDTH, bias=False)})  # fmt: skip
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(WIDTH, INNER, bias=False), "up_proj": nn.Linear(WIDTH, INNER),
            "down_proj": nn.Linear(INNER, WIDTH, bias=False)})  # fmt: skip

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, WIDTH] -> the same."""
        attention, mlp, x = self.self_attn, self.mlp, self.input_layernorm(hidden)
        q, k, v = (layer(x).unflatten(1, (-1, WIDTH // HEADS)) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
        k, v = (each.repeat_interleave(HEADS // each.shape[1], dim=1) for each in (k, v))  # heads that share one
        weights = torch.einsum("qhd,khd->hqk", q, k).softmax(-1)
        hidden = hidden + attention.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        x = self.post_attention_layernorm(hidden)
        return hidden + mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def fold_inputs(seed: int) -> dict:
    """The weights of two blocks, with and without heads that share keys and values; scales for the four inputs of a block."""
    g = generator(seed)
    blocks = {}
    for kind, key_heads in KEY_HEADS.items():
        values = [torch.randn(p.shape, generator=g) / 4 + 0.5 * (p.ndim == 1) for p in Block(key_heads).parameters()]
        blocks[kind] = nn.utils.parameters_to_vector(values)  # one tensor is copied much sooner than a module
    scales = {name: torch.exp(torch.randn(INNER if name == "down" else WIDTH, generator=g)) for name in GROUPS}
    return {"blocks": blocks, "scales": scales, "hidden": torch.randn(9, WIDTH, generator=g)}


def _block(kind: str, weights: torch.Tensor) -> Block:
    block = Block(KEY_HEADS[kind])
    nn.utils.vector_to_parameters(weights.clone(), block.parameters())
    return block


GROUPS = {
    "attention": folding.Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn"),
    "o": folding.Group(("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj"),
    "mlp": folding.Group(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp"),
    "down": folding.Group(("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj"),
}


def fold_block(block: Block, scales: dict[str, torch.Tensor]) -> None:
    """labsupport's folding, for each input of a block that can take a scale."""
    for name, group in GROUPS.items():
        if name != "o" or block.self_attn.v_proj.out_features == block.self_attn.o_proj.in_features:
            folding.fold(block, group, scales[name])


def drive_fold(answer: Callable, given: dict) -> dict:
    """All parameters of each block afterwards, one after the other."""
    blocks = {kind: _block(kind, weights) for kind, weights in given["blocks"].items()}
    for block in blocks.values():
        answer(block, {name: scale.clone() for name, scale in given["scales"].items()})
    return {kind: nn.utils.parameters_to_vector(block.parameters()) for kind, block in blocks.items()}


def _folded(
    block, scales, left_out=(), multiply=(), undivided=(), forget_bias=False, reader_bias=False, rows=False, invert=False,
    everywhere=False,
):  # fmt: skip
    """Folding with what can go wrong: linears left out, what is multiplied where it must be divided, and so on."""
    shared = block.self_attn.v_proj.out_features != block.self_attn.o_proj.in_features
    for name, group in GROUPS.items():
        if name == "o" and shared and not everywhere:
            continue
        s = 1 / scales[name] if invert else scales[name]
        for linear in (block.get_submodule(n) for n in group.linears if n.split(".")[1].removesuffix("_proj") not in left_out):
            by_row = rows and linear.weight.shape[0] == linear.weight.shape[1]
            linear.weight.mul_(s[:, None] if by_row else s)
            if reader_bias and linear.bias is not None and len(linear.bias) == len(s):
                linear.bias.mul_(s)
        if name in undivided:
            continue
        before = block.get_submodule(group.before)
        part = s[: len(before.weight)]
        factor = part if name in multiply else 1 / part
        before.weight.mul_(factor if before.weight.ndim == 1 else factor[:, None])
        if getattr(before, "bias", None) is not None and not forget_bias:
            before.bias.mul_(factor)


def _fold_differs(given: dict, got: dict, want: dict) -> str:
    kind = first_difference(got, want, FOLD.allowed(given, want))[0].split("[")[0]
    changed, wanted, before = (_block(kind, values[kind].float()) for values in (got, want, given["blocks"]))
    off = {name: ((changed.get_parameter(name) - p).abs().max() / p.abs().max()).item() for name, p in wanted.named_parameters()}
    outputs, outputs_before = changed(given["hidden"]), before(given["hidden"])
    moved = (outputs - outputs_before).abs().max() / outputs_before.abs().max()
    worst = max(off, key=lambda name: off[name])
    return f"{worst} is not what it should be ({kind}); the block's output moves by {100 * moved:.2g} %"


FOLD = Exercise(
    id="8.5", name="fold_block", title="Fold four scales into a block", minutes=15, difficulty=4, points=4,
    returns=(), inputs=fold_inputs, reference=fold_block, drive=drive_fold, otherwise=_fold_differs,
    # A product and a quotient of float32, or a product and a product with a reciprocal; and that twice.
    allowed=lambda given, want: {kind: 3 * 2**-24 * values.abs() for kind, values in want.items()},
    alike=lambda given, got, theirs: within(got, theirs, {kind: 2**-21 * values.abs() for kind, values in theirs.items()}),
    mistakes=mistakes_by_option(_folded, {
        "nothing has changed: weights are changed in place, with copy_, mul_ or div_": lambda block, scales: None,
        "the norms are multiplied by the scale like the linears behind them; what comes before is divided": {
            "multiply": ("attention", "mlp")},
        "everything before is multiplied by the scale, and so is what reads it: s counts twice": {"multiply": tuple(GROUPS)},
        "q_proj is scaled, k_proj and v_proj are not: all three read the norm that has been divided": {"left_out": "kv"},
        "gate_proj is scaled and up_proj is not: both read the norm that has been divided": {"left_out": ("up",)},
        "up_proj is scaled and gate_proj is not: both read the norm that has been divided": {"left_out": ("gate",)},
        "the linears are scaled, and nothing before them is divided": {"undivided": tuple(GROUPS)},
        "the norms are divided; v_proj and up_proj, which come before o_proj and down_proj, are not": {
            "undivided": ("o", "down")},
        "the bias of v_proj and up_proj is not divided: it is part of what o_proj and down_proj read": {"forget_bias": True},
        "the bias of a linear is multiplied by its input's scale: a bias does not meet the input": {"reader_bias": True},
        "the rows of the linears are scaled: a channel of the input meets a column": {"rows": True},
        "the scale is upside down: weights are divided by it and what comes before is multiplied. The function is unchanged, "
        "but the loud channels are now rounded more coarsely": {"invert": True},
        "with grouped-query attention two heads of o_proj read one head of v_proj, so no scale of o_proj can be folded: leave "
        "both": {"everywhere": True},
    }),
    others=(Mutant(partial(_folded, left_out=("down",)), "down_proj.weight is not"),),
)  # fmt: skip


# 8.6 ------------------------------------------------------------------------------------------------------------------
def clip_inputs(seed: int) -> dict:
    """Far tails, inputs that share directions, one best limit a group: the last of them for a large weight of a silent channel."""
    g = generator(seed)
    inputs = _uneven(30, 48, g) + _uneven(30, 6, g) @ torch.randn(6, 48, generator=g)
    inputs[:, 5] *= 1e-3
    weight = torch.randn(80, 48, generator=g)
    weight = weight * (1 + weight.abs())
    weight[:12, 5] = 40 * weight[:12, 5].sign()
    given = {"weight": weight, "inputs": inputs, "quantize": rtn.quantize, "bits": 3, "group_size": 12}
    least, second = clip_losses(**given).sort(0).values[:2]
    return {**given, "weight": weight[(second > (1 + 2 * LOSS) * least).all(1)][:11]}


def best_clip(weight: torch.Tensor, inputs: torch.Tensor, quantize: Callable, bits: int, group_size: int) -> torch.Tensor:
    """labsupport's search of clips, through the Gram matrix."""
    return awq.search_clip(weight, inputs.T @ inputs, bits, group_size)


def _clipped(weight, inputs, quantize, bits, group_size, whole_row=False, choose=torch.argmin, signed=False, **options):
    """The search of clips, written out, with every step that can go wrong as an option. float [out, groups]."""
    losses = clip_losses(weight, inputs, quantize, bits, group_size, **options)
    groups = weight.unflatten(1, (-1, group_size))
    largest = groups.amax(2) if signed else groups.abs().amax(2)
    if whole_row:
        losses = losses.sum(2, keepdim=True).expand_as(losses)
    return largest * (1 - choose(losses, 0) / N_GRID)


def clip_losses(
    weight, inputs, quantize, bits, group_size, against_clipped=False, on_weights=False, upper_only=False, steps=STEPS,
    furthest=False,
) -> torch.Tensor:  # fmt: skip
    """The squared error of each group's part of the output, at each step of the limit. float64 [steps, out, groups]."""
    groups, x = weight.unflatten(1, (-1, group_size)), inputs.double().unflatten(1, (-1, group_size))
    limit = (groups.abs().amax(2) * (1 - torch.arange(steps)[:, None, None] / N_GRID))[..., None]
    clipped = groups.minimum(limit) if upper_only else groups.clamp(-limit, limit)  # [steps, out, groups, size]
    values = quantize(clipped.flatten(2).flatten(0, 1), bits, group_size).dequantize().view_as(clipped)
    error = (values - (clipped if against_clipped else groups)).double()
    off = torch.einsum("ngc,sogc->nsog", x, error)
    return error.pow(2).sum(3) if on_weights else off.abs().amax(0) if furthest else off.pow(2).sum(0)


def _clip_differs(given: dict, got: dict, want: dict) -> str:
    limit, largest = got["limit"], given["weight"].unflatten(1, (-1, given["group_size"])).abs().amax(2)
    row, group = place = tuple(((limit - want["limit"]).abs() > SAME_LIMIT * want["limit"]).nonzero()[0].tolist())
    share = (limit / largest)[place].item()
    step, at = round((1 - share) * N_GRID), f"row {row}, group {group}: the limit"
    if step not in range(STEPS) or abs(1 - step / N_GRID - share) > 1e-4:
        return f"{at} is {share:.4f} of the largest magnitude, which is none of 1, 0.95, ..., 0.55"
    losses, best = clip_losses(**given)[:, row, group], want["limit"][place]
    return f"{at} {limit[place]:.4f} leaves {losses[step] / losses.min():.2f} times the error of the best, {best:.4f}"


CLIP = Exercise(
    id="8.6", name="best_clip", title="Where to clip a group", minutes=12, difficulty=3, points=3,
    returns=("limit",), inputs=clip_inputs, reference=best_clip, otherwise=_clip_differs,
    allowed=lambda given, want: SAME_LIMIT * want["limit"],
    faults=(
        Fault("there is a limit for each row, wanted one for each group", lambda given, got, want: got["limit"].numel() == 11,
              (lambda *given: _clipped(*given).amax(1),), early=True),
        Fault("there is a limit for each weight matrix, wanted one for each group",
              lambda given, got, want: got["limit"].numel() == 1, (lambda *given: _clipped(*given).amax(),), early=True),
    ),
    mistakes=mistakes_by_option(_clipped, {
        "the rounded weight was compared with the clipped one: then clipping itself costs nothing": {"against_clipped": True},
        "the error of the weights was taken, wanted that of the outputs: what a weight meets decides what clipping it costs": {
            "on_weights": True},
        "all groups of a row are clipped by the same share: each group has a grid, and a limit, of its own": {"whole_row": True},
        "large weights below 0 were not clipped: the limit holds on both sides": {"upper_only": True},
        "the limit with the largest loss was taken, wanted the least": {"choose": torch.argmax},
        "the limit starts from the largest weight, wanted the largest magnitude: where the longest tail is negative it is too "
        "small": {"signed": True},
        "the limit was chosen by the worst token, wanted the sum of squares over all of them": {"furthest": True},
        "nothing is clipped: these are the largest magnitudes themselves": {"steps": 1}}),
    others=(Mutant(lambda *given: 0.9 * _clipped(*given, steps=1) - 0.01, "none of 1, 0.95"),
            Mutant(partial(_clipped, steps=STEPS - 1), "times the error of the best")),
)  # fmt: skip


# 8.7 ------------------------------------------------------------------------------------------------------------------
READERS = {"attention": 2, "o": 1, "mlp": 2, "down": 1}  # how many linears read each input of a block


@cache
def bug_inputs(seed: int) -> dict:
    """Losses of a block's four searches. One, neither the largest nor the least, had another's input; no other fits by chance."""
    g = generator(seed)
    widths = {"attention": 32, "o": 32, "mlp": 32, "down": 48}
    pairs = [(name, fed) for name in widths for fed in widths if widths[name] == widths[fed]]
    while True:
        inputs = {name: 2 ** (2 * torch.rand(1, generator=g)) * _uneven(30, width, g) for name, width in widths.items()}
        weights = {name: [torch.randn(11, widths[name], generator=g) for _ in range(count)] for name, count in READERS.items()}
        group, other = (("attention", "o", "mlp")[place] for place in torch.randperm(3, generator=g)[:2].tolist())
        fed = {name: name for name in READERS} | {group: other}
        losses = {(name, x): _plain_loss(weights[name], inputs[x], **SETTINGS) for name, x in pairs}
        written = [losses[pair] for pair in fed.items()]
        near = {(name, x) for name, x in pairs if abs(losses[name, x] / losses[name, fed[name]] - 1) < 10 * LOSS}
        if losses[group, other] not in (min(written), max(written)) and near == set(fed.items()):
            searched = {name: _searched(weights[name], inputs[x], **SETTINGS)[1].tolist() for name, x in fed.items()}
            return {"weights": weights, "inputs": inputs, "losses": searched, **SETTINGS}


def _plain_loss(weights, x, quantize, bits: int, group_size: int) -> float:
    """What rounding costs the outputs when nothing is scaled: the loss at ratio 0."""
    stacked = torch.cat(weights)
    return (x @ (quantize(stacked, bits, group_size).dequantize() - stacked).T).pow(2).sum().item()


def find_the_bug(weights: dict, inputs: dict, losses: dict, quantize: Callable, bits: int, group_size: int) -> tuple[str, str]:
    """The group whose losses are of another group's input, and that other. At ratio 0 every scale is 1, so nothing is searched."""
    return _find(weights, inputs, losses, quantize, bits, group_size)


def _find(weights, inputs, losses, quantize, bits, group_size) -> tuple[str, str]:
    for group, layers in weights.items():
        for fed, x in inputs.items():
            fits = fed != group and x.shape[1] == layers[0].shape[1]
            if fits and abs(_plain_loss(layers, x, quantize, bits, group_size) / losses[group][0] - 1) < LOSS:
                return group, fed
    return "", ""


def _bug_differs(given: dict, got: dict, want: dict) -> str:
    for name, value in got.items():
        if value not in READERS:
            return f"{name} is {value!r}, wanted one of {', '.join(READERS)}"
    group, fed = got["group"], got["fed"]
    if (fed, group) == (want["group"], want["fed"]):
        return f"the two are exchanged: {fed}, whose losses are not its own, comes first, then the input that they are of"
    if group == fed:
        return f"{group} on the input of {fed} is as it should be: wanted the group that is on another's"
    if group == want["group"] and fed == "down":
        return f"{group} it is, but its weights cannot be multiplied with the input of {fed}: the widths differ"
    x = given["inputs"][fed if group == want["group"] else group]
    loss = _plain_loss(given["weights"][group], x, given["quantize"], given["bits"], given["group_size"])
    times = f"{loss / given['losses'][group][0]:.3f} times what is written down for ratio 0"
    if group != want["group"]:
        return f"on its own input {group} loses {times}: that one is sound"
    return f"{group} it is, but on the input of {fed} it would lose {times}"


BUG = Exercise(
    id="8.7", name="find_the_bug", title="Find the bug", minutes=10, difficulty=3, points=3,
    returns=("group", "fed"), inputs=bug_inputs, reference=find_the_bug, otherwise=_bug_differs,
    others=(
        Mutant(lambda *given: ("qkv", "o"), "group is 'qkv', wanted one of attention"),
        Mutant(lambda *given: (_find(*given)[0], "v_proj"), "fed is 'v_proj', wanted one of attention"),
        Mutant(lambda *given: _find(*given)[::-1], "the two are exchanged"),
        Mutant(lambda *given: (_find(*given)[0],) * 2, "is as it should be: wanted the group that is on another's"),
        Mutant(lambda *given: ("down", "attention"), "on its own input down loses 1.000 times"),
        Mutant(lambda *given: (_find(*given)[0], "down"), "the widths differ"),
        Mutant(lambda *given: (_find(*given)[0], ({"attention", "o", "mlp"} - {*_find(*given)}).pop()), "it would lose"),
    ),
)  # fmt: skip

EXERCISES = (SALIENCY, KEEP, KINK, SEARCH, FOLD, CLIP, BUG)
