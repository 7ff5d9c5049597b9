"""Claims that are settled by a computation on the course model, its text or a made-up weight: seconds each, on a CPU in float32."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import torch
from torch import nn

from labsupport import kernels
from labsupport.evidence.audit import Finding, Given, all_or_some, audits
from labsupport.model import models, peers
from labsupport.model.evaluate import evaluate, paired_bootstrap
from labsupport.model.text import load_text
from labsupport.pipeline import calibrate, fold, lora
from labsupport.quant import awq, gptq, grid, nf4, rtn

GROUP = 128


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def _course() -> tuple[nn.Module, Any]:
    """The course model and its tokenizer, whatever LABS_MODEL says. Not to be changed."""
    return models.load_model(str(models.course_model_dir()), device="cpu")


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach() for name, layer in models.linears(model).items()}


def _calibration() -> torch.Tensor:
    return calibrate.windows(load_text(_course()[1], "code", split="train"), 16)


def _fed(model: nn.Module, see: Any) -> dict[str, Any]:
    """What `see` makes of what each linear is fed, by its name; linears that share an input share what is made of it."""
    found: dict[str, Any] = {}
    for block in calibrate.blocks(model, _calibration()):
        shared = block.groups()
        fed = block.statistics(names[0] for names in shared)
        for names in shared:
            found |= dict.fromkeys(names, see(names[0], fed[names[0]]))
    return found


@audits(6)
def equal_quantiles(given: Given) -> Finding:
    """Places of the levels in a normal distribution whose quantile at 0.9677083 is 1; how often blocks of weights use a code."""
    curve, levels = NormalDist(), nf4.levels_of("nf4")
    places = [curve.cdf(level * curve.inv_cdf(0.9677083)) for level in levels.double().tolist()]
    between = [100 * (b - a) for a, b in pairwise(places)]
    negative, positive = between[:7], between[7:]
    blocks = torch.cat([w.reshape(-1, 64) for w in _weights(_course()[0]).values()])
    codes = torch.bucketize((blocks / blocks.abs().amax(1, keepdim=True)).flatten(), (levels[1:] + levels[:-1]) / 2)
    use = (100 * torch.bincount(codes, minlength=16) / codes.numel()).tolist()
    even = [max(part) / min(part) < 1.01 for part in (negative, positive, between)]
    figures = {
        "between neighbors below 0": f"{sum(negative) / 7:.2f} %", "between neighbors above 0": f"{sum(positive) / 8:.2f} %",
        "blocks of the course model use a code": f"{min(use):.1f} to {max(use):.1f} % of the time",
    }  # fmt: skip
    if all(even) and max(use) / min(use) < 1.1:
        return Finding(True, figures)
    return Finding(None if even[0] and even[1] else False, figures)


def ignores_magnitudes() -> tuple[bool, str]:
    """Whether GPTQ chooses the same codes where one channel is ten times as loud; how many codes change."""
    g = _seeded()
    weight, inputs = torch.randn(8, 16, generator=g), torch.randn(64, 16, generator=g)
    louder = inputs * torch.ones(16).index_fill(0, torch.tensor([3]), 10.0)
    quiet, loud = (gptq.quantize(weight, x.T @ x / 32, 3, None).codes for x in (inputs, louder))
    changed = int((quiet != loud).sum())
    return changed == 0, f"{changed} of {quiet.numel()}"


@audits(12)
def protects_one_percent(given: Given) -> Finding:
    """At 3 bits with outliers planted, on 8 windows: what 1 % of channels take away of what rounding costs, and what scales do."""
    model, tokenizer = _course()
    planted, text = models.plant_outliers(model, factor=8), load_text(tokenizer, "code")
    baseline = evaluate(model, text, windows=8)
    groups = {group.linears[0]: group for group in fold.groups(planted)}
    loudness: dict[str, torch.Tensor] = {}
    searched: dict[str, awq.Search] = {}

    def see(name: str, fed: Any) -> torch.Tensor:
        if name in groups:
            weights = [models.linears(planted)[linear].weight for linear in groups[name].linears]
            searched[name] = awq.search(weights, fed.gram, fed.mean_abs, 3, GROUP)
        return fed.mean_abs

    loudness = _fed(planted, see)

    def top(mean_abs: torch.Tensor) -> torch.Tensor:
        return mean_abs.topk(-(-len(mean_abs) // 100)).indices

    def rise(scales: dict[str, torch.Tensor], keep: bool = False) -> float:
        """Of the planted model with scales folded in, rounded; keep: 1 % of channels stays as it is."""
        copy = models.duplicate(planted)
        for name, scale in scales.items():
            fold.fold(copy, groups[name], scale)
        with torch.no_grad():
            for name, layer in models.linears(copy).items():
                rounded = rtn.quantize(layer.weight, 3, GROUP).dequantize()
                if keep:
                    rounded[:, top(loudness[name])] = layer.weight[:, top(loudness[name])]
                layer.weight.copy_(rounded)
        return paired_bootstrap(baseline, evaluate(copy, text, windows=8)).change

    def loudest_only(name: str, found: awq.Search) -> torch.Tensor:
        scale, chosen = torch.full_like(found.scale, found.scale.median().item()), top(loudness[name])
        scale[chosen] = found.scale[chosen]
        return scale

    rounded, kept = rise({}), rise({}, keep=True)
    few = rise({name: loudest_only(name, found) for name, found in searched.items()})
    scaled = rise({name: found.scale for name, found in searched.items()})
    gone = [1 - each / rounded for each in (kept, few, scaled)]
    apart = (
        torch.cat([(f.scale / f.scale.median() - 1).abs() > 0.01 for f in searched.values() if f.ratio > 0]).float().mean().item()
    )
    what = ("with 1 % kept in floating point", "with the scales of that 1 % alone", "with all scales")
    figures = {f"gone of the rise, {how}": f"{100 * share:.0f} %" for how, share in zip(what, gone, strict=True)}
    figures["channels with a scale apart from the median"] = f"{100 * apart:.0f} %"
    return Finding(all_or_some([gone[1] > 0.9 * gone[2], apart < 0.02]), figures)


@audits(17)
def only_nf4_lets_gradients_through(given: Given) -> Finding:
    """Gradients of the input and of an adapter's A and B against finite differences in float64, within 1e-6."""
    weight = next(iter(_weights(_course()[0]).values()))[:12, :32]
    x = torch.randn(64, 32, generator=_seeded())
    formats = {
        "NF4": nf4.quantize(weight, double_quant=True),
        "GPTQ, act-order": gptq.quantize(weight, x.T @ x, 4, 16, act_order=True),
        "AWQ": rtn.quantize(weight * (1 + x.abs().mean(0)), 4, 16),  # a scale for each input, as AWQ has
        "rounding, 3 bits": rtn.quantize(weight, 3, 16),
    }
    flows = {label: _passes(kept, x[:5]) for label, kept in formats.items()}
    figures = {f"equal finite differences, {label}": "yes" if flow else "no" for label, flow in flows.items()}
    return Finding(flows["NF4"] and not any(flow for label, flow in flows.items() if label != "NF4"), figures)


def _passes(kept: grid.QuantizedTensor, x: torch.Tensor) -> bool:
    layer = lora.LoRALinear(nn.Linear(32, 12, bias=False).double(), kept, 3, 6.0, _seeded())
    nn.init.normal_(layer.lora_b, generator=_seeded(1))

    def call(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"lora_a": a, "lora_b": b}, (x,))

    inputs = x.double().requires_grad_(), layer.lora_a, layer.lora_b
    return torch.autograd.gradcheck(call, inputs, atol=1e-6, rtol=0, raise_exception=False)


@audits(24)
def attention_varies_more(given: Given) -> Finding:
    """Deviation of the weights, and decibels from groups of 128 to groups of 16 at 3 bits; the mean over linears of either half."""
    spread: dict[str, list[float]] = {"attention": [], "mlp": []}
    gain: dict[str, list[float]] = {"attention": [], "mlp": []}
    for name, weight in _weights(_course()[0]).items():
        small, usual = (grid.sqnr_db(weight, rtn.quantize(weight, 3, size).dequantize()) for size in (16, GROUP))
        spread[models.role(name)].append(weight.std().item())
        gain[models.role(name)].append(small - usual)
    means = {what: {half: torch.tensor(values) for half, values in found.items()} for what, found in (("s", spread), ("g", gain))}
    error = sum(g.var() / len(g) for g in means["g"].values()) ** 0.5
    more = means["g"]["attention"].mean() - means["g"]["mlp"].mean()
    figures = {f"deviation, {half}": f"{values.mean():.3f}" for half, values in means["s"].items()}
    figures |= {f"gain, {half}": f"{values.mean():.2f} dB" for half, values in means["g"].items()}
    figures["attention gains more by, with its standard error"] = f"{more:+.2f} dB, {error:.2f} dB"
    deviates = means["s"]["attention"].mean() > means["s"]["mlp"].mean()
    return Finding(bool(deviates and more > 0), figures)


@audits(30)
def multiply_in_higher_precision(given: Given) -> Finding:
    """Products of bfloat16 activations with a 4-bit weight, against float64; beside a bfloat16 weight, and what rounding costs."""
    g = _seeded()
    weight, x = torch.randn(256, 4096, generator=g) / 64, torch.randn(8, 4096, generator=g).bfloat16()
    stored = rtn.quantize(weight, 4, GROUP)
    exact, in_float = (x.double() @ w.double().T for w in (stored.dequantize(), weight))

    def off(found: torch.Tensor, truth: torch.Tensor) -> float:
        return ((found.double() - truth).norm() / truth.norm()).item()

    backends: dict[str, kernels.Backend] = {"labsupport": "twin", "PyTorch's int4": "cpu"}
    errors = {name: off(kernels.matmul(x, kernels.prepare(stored, torch.bfloat16, kind)), exact) for name, kind in backends.items()}
    dense, rounding = off(x @ weight.bfloat16().T, in_float), off(exact, in_float)
    figures = {f"error of the product, {name}": f"{error:.1e}" for name, error in errors.items()}
    figures |= {"error of the product, a 16-bit weight": f"{dense:.1e}", "what rounding the weights costs": f"{rounding:.1e}"}
    return Finding(max(errors.values()) < min(1.5 * dense, rounding / 20), figures)


@audits(31)
def quantizes_the_sensitive_carefully(given: Given) -> Finding:
    """By tenths of columns of all linears, from the least to the most sensitive: the squared error, in steps, of being rounded."""
    model, tenths, bits = _course()[0], [], set()
    hessians = _fed(model, lambda _, fed: fed.hessian)
    for name, weight in _weights(model).items():
        h = hessians[name]
        q, r = gptq.quantize(weight, h, 4, None), rtn.quantize(weight, 4, None)
        bits.add((q.bits_per_weight, r.bits_per_weight))
        damped = (h + 0.01 * h.diagonal().mean() * torch.eye(len(h))).double()
        upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        # GPTQ's loop, undone: what is left in the end is each column's own error times a row of the factor, over its diagonal.
        end = (q.dequantize() - weight).double()
        own = torch.linalg.solve_triangular(upper, end, upper=True, left=False) * upper.diagonal()
        steps = (own / q.scale)[:, h.diagonal().argsort()].pow(2).mean(0)
        tenths.append(torch.stack([part.mean() for part in steps.tensor_split(10)]))
    means = torch.stack(tenths).mean(0).sqrt()
    gap, same_bits = (means[-1] / means[0]).item(), all(mine == theirs for mine, theirs in bits)
    figures = {"bits a weight, as with rounding": "yes" if same_bits else "no"}
    figures["error of the most sensitive tenth, over that of the least"] = f"{gap:.2f} times"
    return Finding(not same_bits or gap < 0.95, figures)


@audits(33)
def all_weight_only(given: Given) -> Finding:
    """A layer that rounds its weight alone is linear in its input: f(a + b) - f(0) = f(a) + f(b) - 2 f(0), up to float rounding."""
    bnb = peers.bitsandbytes()
    weight = next(w for name, w in reversed(_weights(_course()[0]).items()) if name.endswith("gate_proj")).half()
    shape = {"input_features": weight.shape[1], "output_features": weight.shape[0], "bias": False}
    eight = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False, threshold=6.0)
    four = bnb.nn.Linear4bit(**shape, quant_type="nf4", compute_dtype=torch.float32)
    for module in (eight, four):
        module.load_state_dict({"weight": weight})
        module.to("cpu")  # this is when bitsandbytes quantizes
    grouped = rtn.quantize(weight, 4, GROUP).dequantize()
    layers = {
        "bitsandbytes in 8 bits": eight.eval(),
        "bitsandbytes in 4 bits": four.train(),
        "GPTQ's and AWQ's grouped format": lambda x: x @ grouped.T,
    }
    a, b = torch.randn(2, 8, weight.shape[1], generator=_seeded())
    linear = {}
    with torch.no_grad():
        for name, layer in layers.items():
            zero = layer(torch.zeros_like(a))
            together, apart = layer(a + b) - zero, layer(a) + layer(b) - 2 * zero
            linear[name] = bool((together - apart).abs().max() < 1e-4 * together.abs().max())
    return Finding(all(linear.values()), {f"weight-only, {name}": "yes" if found else "no" for name, found in linear.items()})
