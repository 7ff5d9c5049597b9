"""Chapter 13: a weight that learns while it is rounded: what passes backward, what is kept, what is stored, was it worth it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from labsupport.exercises.compare import got_and_wanted
from labsupport.exercises.form import FLOAT32, Exercise, Mutant, generator, mistakes_by_option, right
from labsupport.quant import qat


# 13.1 -----------------------------------------------------------------------------------------------------------------
def fake_inputs(seed: int) -> dict:
    """Six rows, eleven columns. Steps are powers of two, so that the quotients are exact; the last row is zero.

    Rows have their largest weight above 0, below 0, or at both ends. Some weights stand between two levels, some between the last
    code and the end of the range, which is half a step further; no other comes near to the middle of two levels.
    """
    g = generator(seed)
    bits = (3, 4)[seed % 2]
    end = 2 ** (bits - 1) - 0.5  # of the range, in steps
    steps = (2 * torch.rand(6, 11, generator=g) - 1) * (end - 0.1)
    steps = steps.round() + 0.9 * (steps - steps.round())
    steps[:, 3:7] = torch.tensor([0.5, 1.5, -2.5, end - 0.3])
    steps[:, 0] = torch.tensor([end, -end, end, -end, end, 0])
    steps[2:4, 9] = -steps[2:4, 0]
    steps[5] = 0
    exponents = torch.tensor([-3, -1, 1, -2, 2, -4])[torch.randperm(6, generator=g)][:, None]
    factors = torch.randn(6, 11, generator=g)
    return {"weight": steps * 2.0**exponents, "bits": bits, "factors": factors.sign() * factors.abs().clamp(min=0.1)}


def fake_quantize(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """labsupport's, with a grid for each row."""
    return qat.fake_quantize(weight, bits, None)


def drive_fake(answer: Callable, given: dict) -> dict:
    """Values, and the gradient of the weight where the values' gradient is `factors`; 0 where none arrives."""
    weight, factors = given["weight"].clone().requires_grad_(), given["factors"]
    with torch.enable_grad():
        values = answer(weight, given["bits"])
        gradient = torch.zeros_like(factors)
        if isinstance(values, torch.Tensor) and values.requires_grad and values.shape == weight.shape:
            gradient = torch.autograd.grad(values, weight, factors.to(values.dtype), allow_unused=True)[0]
    return {"values": values, "gradient": torch.zeros_like(factors) if gradient is None else gradient}


def _fake(
    weight, bits, levels=lambda bits: 2**bits - 1, reach=(0, 0), way="right", follow=False, guard=True, scaled=True,
    largest=lambda weight: weight.abs().amax(1, keepdim=True),
):  # fmt: skip
    """The same, plainly, and ways to get it wrong. reach: added to both end codes. follow: the scale passes a gradient on."""
    scale = 2 * largest(weight if follow else weight.detach()) / levels(bits)
    if guard:
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    low, high = reach[0] - 2 ** (bits - 1), reach[1] + 2 ** (bits - 1) - 1
    x = weight / scale
    codes = {
        "right": lambda: qat.round_through(x).clamp(low, high),
        "past": lambda: x + (x.round().clamp(low, high) - x).detach(),
        "first": lambda: qat.round_through(x.clamp(low, high)),
        "none": lambda: x.round().clamp(low, high),
    }[way]()
    return codes * scale if scaled else codes


FAKE_QUANTIZE = Exercise(
    id="13.1", name="fake_quantize", title="A gradient that stops at the clip", minutes=15, difficulty=3, points=4,
    returns=("values",), inputs=fake_inputs, reference=fake_quantize, drive=drive_fake,
    # w + (q - w) is rounded twice; a factor that meets scale and 1 / scale three times.
    allowed=lambda given, want: {
        "values": FLOAT32 * given["weight"].abs().amax(1, keepdim=True), "gradient": FLOAT32 * given["factors"].abs()},
    mistakes=mistakes_by_option(_fake, {
        "the gradient is 0 everywhere: round() has the derivative 0, so nothing would learn. The backward pass must act as if "
        "nothing had been rounded": {"way": "none"},
        "the gradient passes where a code was clipped as well: such a weight can move a little and its value does not follow": {
            "way": "past"},
        "a weight between the last code and the end of the range gets no gradient: it rounds to the last code, so nothing is "
        "clipped. Round first, clip then": {"way": "first"},
        "the scale passes a gradient on to the largest weight of its row: take the scale from weight.detach()": {"follow": True},
        "the scale is absmax / (2**(bits - 1) - 1): then the code at the lower end is never used. Wanted is half a step less": {
            "levels": lambda bits: 2**bits - 2},
        "the scale is absmax / 2**(bits - 1): the divisor is half a step smaller": {"levels": lambda bits: 2**bits},
        "the lowest code is missing: codes go from -2**(bits - 1)": {"reach": (1, 0)},
        "the codes have one more at the upper end: the last one is 2**(bits - 1) - 1": {"reach": (0, 1)},
        "these are codes: multiply by the scale again": {"scaled": False},
        "one scale was taken for the whole matrix: each row has its own": {"largest": lambda weight: weight.abs().max()},
        "a row of zeros became NaN: 0 / 0. Its scale is 1": {"guard": False},
    }),
    others=(Mutant(lambda weight, bits: 0.9 * _fake(weight, bits), "values["),),
)  # fmt: skip


# 13.2 -----------------------------------------------------------------------------------------------------------------
MOST_STEPS, RISE = 1e6, 1.1


def wrong_inputs(seed: int) -> dict:
    """Distance of the levels, and learning rate."""
    scale, rate = torch.rand(2, generator=generator(seed), dtype=torch.float64).tolist()
    return {"scale": 0.02 + 3 * scale, "rate": 0.01 + 0.2 * rate}


def wrong_way(scale: float, rate: float) -> tuple[float, float]:
    """Above the middle of 0 and the first level by less than one update, with a target that is nearer to the first level."""
    target = 0.7 * scale
    return 0.5 * scale + rate * (scale - target), target


def _moved(given: dict, weight: float, target: float) -> tuple[float, float, float]:
    """One update by the straight-through gradient: the level before, the weight after it, and its level."""
    level = given["scale"] * round(weight / given["scale"])
    after = weight - given["rate"] * 2 * (level - target)
    return level, after, given["scale"] * round(after / given["scale"])


def _not_the_wrong_way(given: dict, got: dict, want: dict) -> str | None:
    weight, target = float(got["weight"]), float(got["target"])
    if max(abs(weight), abs(target)) > MOST_STEPS * given["scale"]:
        return f"weight is {weight:g} and target {target:g}: stay within {MOST_STEPS:,.0f} levels around 0"
    level, after, new = _moved(given, weight, target)
    at = f"the weight stands at {weight:.4g} on level {level:.4g}"
    if level == target:
        return f"{at}, which is the target: the gradient is 0"
    if level == new:
        return f"{at}, an update moves it to {after:.4g}, and its level stays: no loss changes. Stand nearer to a middle"
    losses = (level - target) ** 2, (new - target) ** 2
    there = f"{at}, an update moves it to {after:.4g} on level {new:.4g}, and the loss goes from {losses[0]:.4g} to {losses[1]:.4g}"
    if losses[1] <= losses[0]:
        return f"{there}: it points the right way. On which level should the weight stand?"
    return None if losses[1] > RISE * losses[0] else f"{there}: wanted that it rises by a tenth or more. Move the target"


WRONG_WAY = Exercise(
    id="13.2", name="wrong_way", title="A gradient that points the wrong way", minutes=12, difficulty=3, points=3,
    returns=("weight", "target"), inputs=wrong_inputs, reference=wrong_way, otherwise=_not_the_wrong_way,
    accepts=lambda given, got, want: None if _not_the_wrong_way(given, got, want) else right(),
    others=(
        Mutant(lambda scale, rate: (0.4 * scale, 0.0), "which is the target"),
        Mutant(lambda scale, rate: (scale, 0.7 * scale), "Stand nearer to a middle"),
        Mutant(lambda scale, rate: (0.501 * scale, 0.2 * scale), "it points the right way"),
        Mutant(lambda scale, rate: (0.5 * scale + 1e-4 * rate * scale, 0.505 * scale), "Move the target"),
        Mutant(lambda scale, rate: (1e300, 0.0), "stay within"),
    ),
)  # fmt: skip


# 13.3 -----------------------------------------------------------------------------------------------------------------
def step_inputs(seed: int) -> dict:
    """Four rows, thirteen columns, 3 bits. Each row has weights beyond both ends, and some that round to the last code there."""
    g = generator(seed)
    ratio = 2.6 * torch.randn(4, 13, generator=g)
    ratio = ratio.round() + 0.9 * (ratio - ratio.round())
    ratio += 0.02 * (ratio - ratio.round() == 0)  # none stands on a level
    ratio[:, :4] = torch.tensor([3.3, -4.3, 5.2, -6.1]) + 0.1 * torch.rand(4, 4, generator=g)
    step = 0.1 + torch.rand(4, 1, generator=g)
    return {"weight": ratio * step, "step": step, "gradient": torch.randn(4, 13, generator=g), "bits": 3}


def step_gradient(weight: torch.Tensor, step: torch.Tensor, gradient: torch.Tensor, bits: int) -> torch.Tensor:
    """What arrives at labsupport's learned steps."""
    step = step.clone().requires_grad_()
    with torch.enable_grad():
        values = qat.learned_step(weight, step, bits)
    (found,) = torch.autograd.grad(values, step, gradient)
    return found


def _slope(ratio, code, inside, rounded):
    return code - ratio * inside


def _step(
    weight, step, gradient, bits, slope=_slope, factor=lambda rows, columns, largest: (columns * largest) ** -0.5, least=-1,
):  # fmt: skip
    """The same by its derivative. slope(w / s, the code, what is inside the range, the rounded quotient)."""
    ratio, largest = weight / step, 2 ** (bits - 1) - 1
    low = -largest + least
    inside, code = (ratio >= low) & (ratio <= largest), ratio.round().clamp(low, largest)
    total = (gradient * slope(ratio, code, inside, ratio.round())).sum(1, keepdim=True)
    return total * factor(*weight.shape, largest)


def _rounds_inside(ratio, code, inside, rounded):
    return code - ratio * (code == rounded)


def _sizes(given: dict) -> torch.Tensor:
    """What is added up for each step, without signs, times LSQ's factor for 13 weights and a largest code of 3."""
    return (given["gradient"].abs() * (given["weight"] / given["step"]).abs().add(4)).sum(1, keepdim=True) / 39**0.5


STEP_GRADIENT = Exercise(
    id="13.3", name="step_gradient", title="The derivative of a step", minutes=15, difficulty=4, points=4,
    returns=("step_gradient",), inputs=step_inputs, reference=step_gradient,
    drive=lambda answer, given: {"step_gradient": _with_gradients(answer, given)},
    # 13 products of numbers that are rounded twice, added in any order.
    allowed=lambda given, want: 20 * 2.0**-24 * _sizes(given),
    mistakes=mistakes_by_option(_step, {
        "codes were held fixed: a longer step makes each code count for more, but it also makes w / s smaller, and rounding passes "
        "that on: round(w / s) - w / s": {"slope": lambda ratio, code, inside, rounded: code},
        "only -w / s is there: the value is code times step, and the step itself is the other factor: round(w / s) - w / s": {
            "slope": lambda ratio, code, inside, rounded: -ratio * inside},
        "clipped weights were taken like the others: past the end the code no longer answers to w / s, and the code alone is "
        "left": [{"slope": lambda ratio, code, inside, rounded: code - ratio},
                 {"slope": lambda ratio, code, inside, rounded: rounded - ratio}],
        "clipped weights count 0 here: their value is the last code times the step, so the step moves them most of all": {
            "slope": lambda ratio, code, inside, rounded: (code - ratio) * inside},
        "a weight past the end that rounds to the last code was taken as inside: LSQ clips w / s before it rounds": {
            "slope": _rounds_inside},
        "the factor 1 / sqrt(n Q) is missing": {"factor": lambda rows, columns, largest: 1.0},
        "the factor is 1 / (n Q), wanted its root": {"factor": lambda rows, columns, largest: 1 / (columns * largest)},
        "the factor is 1 / sqrt(n): Q is missing": {"factor": lambda rows, columns, largest: columns**-0.5},
        "n counts the whole matrix: a step is shared by the weights of one row": {
            "factor": lambda rows, columns, largest: (rows * columns * largest) ** -0.5},
        "Q is 2**bits - 1 here, wanted the largest code, 2**(bits - 1) - 1": {
            "factor": lambda rows, columns, largest: (columns * (2 * largest + 1)) ** -0.5},
        "the sign is wrong: a gradient says where the loss rises": {"slope": lambda *parts: -_slope(*parts)},
        "codes were clipped at -Q: the lowest one is -Q - 1": {"least": 0},
    }),
    others=(Mutant(lambda *given: 1.3 * _step(*given), "step_gradient["),),
)  # fmt: skip


def _with_gradients(answer: Callable, given: dict, **more: Any) -> Any:
    with torch.enable_grad():
        return answer(*given.values(), **more)


# 13.4 -----------------------------------------------------------------------------------------------------------------
STEPS, LEVEL, UNDECIDED = 4, 0.25, 2e-3


def _levels(weight: torch.Tensor) -> torch.Tensor:
    """The nearest multiples of a quarter, without a gradient."""
    return LEVEL * (weight.detach() / LEVEL).round()


@cache
def train_inputs(seed: int) -> dict:
    """A weight [5, 7] on the way to another one. No weight comes near to the middle of two levels before an update."""
    g = generator(seed)
    while True:
        given: dict[str, Any] = {"weight": torch.randn(5, 7, generator=g) / 2, "x": torch.randn(12, 7, generator=g)}
        given |= {"y": given["x"] @ torch.randn(7, 5, generator=g) / 2, "rate": 0.3, "steps": STEPS}
        seen: list[torch.Tensor] = []
        drive_train(train, given, seen)
        middles = ((torch.stack(seen) / LEVEL).frac().abs() - 0.5).abs()
        changed = sum((_levels(a) != _levels(b)).sum() for a, b in pairwise(seen))
        if middles.min() > UNDECIDED and changed > 5:
            return given


def train(weight, x, y, quantize: Callable, rate: float, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient by its formula, 2/n (x q^T - y)^T x, at the rounded weight; the update goes to the other one."""
    losses = []
    for _ in range(steps):
        error = x @ quantize(weight).T - y
        losses.append(error.square().mean())
        weight = weight - rate * 2 * error.T @ x / error.numel()
    return weight, torch.stack(losses)


def drive_train(answer: Callable, given: dict, seen: list[torch.Tensor] | None = None) -> dict:
    """seen: gets each weight that was rounded."""

    def quantize(weight: torch.Tensor) -> torch.Tensor:
        if seen is not None:
            seen.append(weight)
        return _levels(weight)

    weight, x, y, rate, steps = given.values()
    with torch.enable_grad():
        returned = answer(weight, x, y, quantize, rate, steps)
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise ValueError("wanted two values, weight and losses")
    return {"weight": returned[0], "losses": returned[1]}


def _train(
    weight, x, y, quantize, rate, steps, keep=True, of=("rounded", "rounded"), fresh=True, once=False, late=False, sign=1, total=1,
    after=lambda weight, _: weight, last=lambda weight, _: weight,
):  # fmt: skip
    """The same, and ways to get it wrong. of: whose gradient, and whose loss. total: times the mean of the squares."""
    losses, summed, first = [], torch.zeros_like(weight), quantize(weight)
    for _ in range(steps):
        values = {"rounded": first if once else quantize(weight), "float": weight}
        errors = [x @ values[which].T - y for which in of]
        losses.append(errors[1].square().mean() * total)
        gradient = 2 * errors[0].T @ x / errors[0].numel() * total
        summed = gradient if fresh else summed + gradient
        weight = after((weight if keep else values["rounded"]) - sign * rate * summed, quantize)
    if late:
        losses = [*losses[1:], (x @ quantize(weight).T - y).square().mean()]
    return last(weight, quantize), torch.stack(losses)


TRAIN = Exercise(
    id="13.4", name="train", title="One loop, two weights", minutes=15, difficulty=3, points=4,
    returns=("weight", "losses"), inputs=train_inputs, reference=train, drive=drive_train, order=("losses",),
    # Each update is a sum of 12 products of sums of 7, all rounded: 30 roundings of what is added, and each follows from the last.
    allowed=lambda given, want: {
        "weight": STEPS * 30 * 2.0**-24 * (1 + want["weight"].abs().max().item()),
        "losses": STEPS * 30 * 2.0**-24 * (1 + want["losses"].abs().max().item())},
    mistakes=mistakes_by_option(_train, {
        "the update was added to the rounded weight, and the float one is gone: whatever is less than half a level is lost in "
        "the next rounding": {"keep": False},
        "the weight was rounded after each update: whatever is less than half a level is lost. The float weight goes on learning": {
            "after": lambda weight, quantize: quantize(weight)},
        "nothing is rounded in the loop: this is training in float": {"of": ("float", "float")},
        "the losses are those of rounded weights, but the gradient was taken at the float weight": {"of": ("float", "rounded")},
        "the gradient is that of the rounded weight, but the losses are the float weight's": {"of": ("rounded", "float")},
        "gradients of earlier steps are still in the sum: begin each step without one": {"fresh": False},
        "the weight was rounded once, before the loop: each step computes with the same rounded weight": {"once": True},
        "the weight that is returned is rounded: wanted is the one that learned; rounding is what conversion does": {
            "last": lambda weight, quantize: quantize(weight)},
        "losses[0] is the one before the first update": {"late": True},
        "the weight climbs: subtract the gradient": {"sign": -1},
        "the loss is the sum of squares, wanted their mean over all outputs": {"total": 60},
    }),
    others=(
        Mutant(lambda *given: (_train(*given)[0] + 1, _train(*given)[1]), "weight["),
        Mutant(lambda *given: _train(*given)[0], "wanted two values"),
    ),
)  # fmt: skip


# 13.5 -----------------------------------------------------------------------------------------------------------------
@cache
def convert_inputs(seed: int) -> dict:
    """Five rows of three groups of 8, bits 2, 3 or 4. One group has an exact step, ties, and its largest weight above 0.

    No other weight is near to the middle of two levels. Every wrong way gives an output of its own.
    """
    g = generator(seed)
    bits = (4, 3, 2)[seed % 3]
    end = 2 ** (bits - 1) - 0.5
    while True:
        weight = 0.1 * torch.randn(5, 24, generator=g)
        weight[1, 8:16] = torch.tensor([end, 0.5, -0.5, -end, 1.0, 0.0, -1.5, -1.0]) / 16
        given = {"weight": weight, "bits": bits, "group_size": 8}
        stored = qat.uniform(weight, bits=bits, group_size=8, scale_dtype=torch.float16)
        steps = weight.unflatten(1, (-1, 8)) / stored.scale[..., None]
        middle = (steps.frac().abs() - 0.5).abs()
        middle[1, 1] = 1
        ways = [_converted(*given.values()), *(_converted(*given.values(), **option) for option in CONVERSIONS.values())]
        kept = {(codes.numpy().tobytes(), scale.numpy().tobytes()) for codes, scale in ways}
        if middle.min() > 1e-4 and len(kept) == len(ways):
            return given


def convert(weight: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as labsupport stores them."""
    stored = qat.uniform(weight, bits=bits, group_size=group_size, symmetric=True, scale_dtype=torch.float16)
    return stored.codes, stored.scale


def _converted(
    weight, bits, group_size, divisor=lambda bits: 2 ** (bits - 1) - 0.5, late=False, least=0, offset=True, twice=False, most=0,
    rounded=torch.round, dtype=torch.float16,
):  # fmt: skip
    """The same, plainly, and ways to get it wrong. late: codes of the scale as it was in float32. twice: from rounded values."""
    groups = weight.unflatten(1, (-1, group_size))
    if twice:
        codes, scale = _converted(weight, bits, group_size)
        groups = (codes.unflatten(1, (-1, group_size)).float() - 2 ** (bits - 1)) * scale.float()[..., None]
    scale = groups.abs().amax(2, keepdim=True) / divisor(bits)
    stored = scale.to(dtype)
    half = 2 ** (bits - 1)
    codes = rounded(groups / (scale if late else stored.float())).clamp(least - half, half - 1 + most)
    return (codes + half * offset).flatten(1), stored.squeeze(2)


CONVERSIONS: dict[str, dict[str, Any]] = {
    "scales are float32, and the file has room for float16: a model that trained with them meets others when it is stored": {
        "dtype": torch.float32},
    "the codes belong to the scale as it was before float16: the stored scale is another, and some weights are nearer to another "
    "level of it. Round the scale first": {"late": True},
    "this converts the values on the grid instead of the weight that learned: their largest is a whole number of steps, so the "
    "scale comes out as another one": {"twice": True},
    "the scale is absmax / (2**(bits - 1) - 1): training divided by half a step more": {
        "divisor": lambda bits: 2 ** (bits - 1) - 1},
    "the lowest code is missing: training clipped at -2**(bits - 1), which is code 0": {"least": 1},
    "the largest code is 2**bits, which does not fit into the bits: the largest weight of a group is clipped": {"most": 1},
    "codes are signed: add 2**(bits - 1), so that they begin at 0": {"offset": False},
    "half-way values go up: training rounds them to the even level": {"rounded": lambda x: (x + 0.5).floor()},
}  # fmt: skip


def _conversion_differs(given: dict, got: dict, want: dict) -> str:
    """How far the stored values are from those that the model computed with."""
    groups = got["scale"].double().shape[1]
    values = [
        (found["codes"].double().unflatten(1, (groups, -1)) - 2 ** (given["bits"] - 1)) * found["scale"].double()[..., None]
        for found in (got, want)
    ]
    off = (values[0] - values[1]).flatten(1).abs()
    i, j = divmod(int(off.argmax()), off.shape[1])
    numbers = got_and_wanted(*(found.flatten(1)[i, j].item() for found in values))
    count = f"{int((off > 0).sum())} of {off.numel()} weights"
    return f"{count} read back as others than those that trained; weight[{i}, {j}]: {numbers}"


CONVERT = Exercise(
    id="13.5", name="convert", title="Convert and lose nothing", minutes=12, difficulty=3, points=4,
    returns=("codes", "scale"), inputs=convert_inputs, reference=convert, otherwise=_conversion_differs, dtypes=("scale",),
    mistakes=mistakes_by_option(_converted, CONVERSIONS),
    others=(Mutant(lambda *given: (_converted(*given)[0].flip(0), _converted(*given)[1]), "read back as others"),),
)  # fmt: skip


# 13.6 -----------------------------------------------------------------------------------------------------------------
def ternary_inputs(seed: int) -> dict:
    """Seven rows of 18 codes, 126 in all, so that the last byte holds one; groups of 9."""
    codes = torch.randint(0, 3, (7, 18), generator=generator(seed), dtype=torch.uint8)
    codes[0, :10] = torch.tensor([2, 0, 1, 1, 0, 0, 2, 2, 1, 2], dtype=torch.uint8)
    codes[-1, -1] = 1 + seed % 2
    return {"codes": codes, "group_size": 9}


def pack_ternary(codes: torch.Tensor, group_size: int) -> tuple[torch.Tensor, float]:
    """As labsupport stores a weight that has these codes."""
    stored = qat.ternary_tensor(codes.float() - 1, group_size, torch.float16)
    return stored.packed_codes, stored.bits_per_weight


def _packed(
    codes, group_size, base=3, digits=5, backwards=False, fill=0, by_row=False, scale_bits=16,
    bits=lambda count, nbytes, groups, scale_bits: (8 * nbytes + scale_bits * groups) / count,
):  # fmt: skip
    """The same, plainly, and ways to get it wrong. fill: the digit that fills the last byte. by_row: each row begins a byte."""
    flat = codes.long() if by_row else codes.long().reshape(1, -1)
    full = torch.nn.functional.pad(flat, (0, -flat.shape[1] % digits), value=fill).view(-1, digits)
    powers = base ** torch.arange(digits)
    packed = (full * (powers.flip(0) if backwards else powers)).sum(1)
    return packed, bits(codes.numel(), len(packed), codes.numel() // group_size, scale_bits)


PACK_TERNARY = Exercise(
    id="13.6", name="pack_ternary", title="What 1.58 bits take", minutes=12, difficulty=2, points=3,
    returns=("packed", "bits_per_weight"), inputs=ternary_inputs, reference=pack_ternary,
    allowed=lambda given, want: {"packed": 0.0, "bits_per_weight": 1e-6},
    hint="Five codes fit into a byte, and the stream begins once",
    mistakes=mistakes_by_option(_packed, {
        "the first code is the highest digit: wanted it lowest, code i times 3**i": {"backwards": True},
        "a byte holds four codes of two bits: that is 2 bits a weight. Three to the fifth is 243, so five codes fit": {
            "base": 4, "digits": 4},
        "a byte holds four codes: five fit, since three to the fifth is 243": {"digits": 4},
        "the last byte was filled with code 1, which stands for 0: filled with the digit 0 it is": {"fill": 1},
        "each row begins a byte of its own: the stream goes on over the ends of rows": {"by_row": True},
        "bits are log2(3), what three levels would take at best: count the bytes that are there": {
            "bits": lambda count, nbytes, groups, scale_bits: math.log2(3)},
        "the scales are missing: each group has one, and it is stored": {"scale_bits": 0},
        "scales were counted with 32 bits: they are float16": {"scale_bits": 32},
        "8 / 5 bits for a code leaves out what fills the last byte": {
            "bits": lambda count, nbytes, groups, scale_bits: 8 / 5 + scale_bits * groups / count},
        "this is all bits together, wanted bits for each weight": {
            "bits": lambda count, nbytes, groups, scale_bits: 8.0 * nbytes + scale_bits * groups},
    }),
    others=(Mutant(lambda *given: (_packed(*given)[0].flip(0), _packed(*given)[1]), "packed["),),
)  # fmt: skip


# 13.7 -----------------------------------------------------------------------------------------------------------------
BASELINE, WEIGHTS = 20.0, 1_000_000
LOSSES = {"rtn": 1.0, "gptq": 0.7, "awq": 0.8}  # of what rounding loses


@cache
def worth_inputs(seed: int) -> dict:
    """Rows as `labs sweep qat` writes them, shuffled; beside them rows in groups of 32, which take more bytes and lose less."""
    g = generator(seed)
    bits = (2, 3, 4)[seed % 3]
    while True:
        rows = [{"method": "float", "further": True, "nbytes": 2 * WEIGHTS, "perplexity": 0.97 * BASELINE}]
        for width, lost in ((4, 0.02), (3, 0.1), (2, 0.9)):
            for method, share in LOSSES.items():
                for size, further in ((128, False), (128, True), (32, True)):
                    noise = 0.8 + 0.4 * torch.rand(1, generator=g).item()
                    more = lost * share * noise * (0.6 if size == 32 else 1)
                    nbytes = WEIGHTS * (width + (16 + width) / size) / 8
                    row = {"method": method, "bits": width, "group_size": size, "nbytes": int(nbytes)}
                    start = 0.97 if further else 1.0
                    rows.append(row | ({"further": True} if further else {}) | {"perplexity": BASELINE * start * (1 + more)})
            found = BASELINE * 0.97 * (1 + lost * (0.1 + 0.8 * torch.rand(1, generator=g).item()))
            nbytes = WEIGHTS * (width + (16 + width) / 128) / 8
            rows.append({"method": "qat", "bits": width, "group_size": 128, "nbytes": int(nbytes), "perplexity": found})
        rows = [rows[i] | {"change": rows[i]["perplexity"] / BASELINE - 1} for i in torch.randperm(len(rows), generator=g).tolist()]
        answers = [_worth(rows, bits), *(_worth(rows, bits, **option) for option in JUDGEMENTS.values())]
        if all(abs(a[1] - b[1]) > 1e-4 for i, a in enumerate(answers) for b in answers[:i]) and answers[0][0] != "rtn":
            return {"rows": rows, "bits": bits}


def worth_it(rows: list[dict], bits: int) -> tuple[str, float]:
    """The best of those that are as small and were trained as long, and the change from it to QAT."""
    ours = next(row for row in rows if row["method"] == "qat" and row["bits"] == bits)
    fair = [
        row for row in rows
        if row["method"] in LOSSES and row.get("further") and row["nbytes"] <= ours["nbytes"] and row["bits"] == bits
    ]  # fmt: skip
    best = min(fair, key=lambda row: row["perplexity"])
    return best["method"], ours["perplexity"] / best["perplexity"] - 1


def _worth(
    rows, bits, further=(True,), size=lambda row, ours: row["nbytes"] <= ours["nbytes"], methods=("rtn", "gptq", "awq"),
    change=lambda ours, best, rows: ours["perplexity"] / best["perplexity"] - 1, best=min,
):  # fmt: skip
    """The same, and ways to get it wrong. further, size, methods: who may be compared with."""
    ours = next(row for row in rows if row["method"] == "qat" and row["bits"] == bits)
    fair = [
        row for row in rows
        if row["method"] in methods and row.get("further", False) in further and row.get("bits") == bits and size(row, ours)
    ]  # fmt: skip
    opponent = best(fair, key=lambda row: row["perplexity"])
    return opponent["method"], change(ours, opponent, rows)


def _float_row(rows: list[dict]) -> dict:
    return next(row for row in rows if row["method"] == "float")


JUDGEMENTS: dict[str, dict[str, Any]] = {
    "the opponent was not trained further: QAT then gets the credit for what more text alone brings. Compare rows with as much "
    "training": {"further": (False,)},
    "the opponent takes more bytes: its groups are smaller. Compare at equal stored bytes": {
        "size": lambda row, ours: True},
    "the opponent is plain rounding: the best of the methods that are as small is the one to beat": {"methods": ("rtn",)},
    "the opponent is the worst of those that are as small: the best is the one to beat": {"best": max},
    "the change goes the other way: from the opponent to QAT, so that less than 0 means that QAT is better": {
        "change": lambda ours, best, rows: best["perplexity"] / ours["perplexity"] - 1},
    "both changes are against the float model, and their difference is no change from one to the other: divide the perplexities": {
        "change": lambda ours, best, rows: ours["change"] - best["change"]},
    "this is what QAT loses against the model in float, wanted the change from the opponent to QAT": {
        "change": lambda ours, best, rows: ours["change"]},
    "this is what QAT loses against the float model with the same training, wanted the change from the opponent to QAT": {
        "change": lambda ours, best, rows: ours["perplexity"] / _float_row(rows)["perplexity"] - 1},
    "this is in percent, wanted a share: 1 % is 0.01": {
        "change": lambda ours, best, rows: 100 * (ours["perplexity"] / best["perplexity"] - 1)},
    "this is a difference of perplexities, wanted the change as a share of the opponent's": {
        "change": lambda ours, best, rows: ours["perplexity"] - best["perplexity"]},
}  # fmt: skip

WORTH_IT = Exercise(
    id="13.7", name="worth_it", title="Was it worth it?", minutes=12, difficulty=3, points=4,
    returns=("opponent", "change"), inputs=worth_inputs, reference=worth_it,
    allowed=lambda given, want: {"opponent": 0.0, "change": 1e-6},  # float32 would be off by some 1e-7
    mistakes=mistakes_by_option(_worth, JUDGEMENTS),
    others=(
        Mutant(lambda rows, bits: ("nf4", _worth(rows, bits)[1]), "opponent: got 'nf4'"),
        Mutant(lambda rows, bits: (_worth(rows, bits)[0], 7.0), "change: got 7"),
    ),
)  # fmt: skip

EXERCISES = (FAKE_QUANTIZE, WRONG_WAY, STEP_GRADIENT, TRAIN, CONVERT, PACK_TERNARY, WORTH_IT)
