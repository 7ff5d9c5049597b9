"""Claims that are settled from rows that `labs sweep` and `labs bench` have left, and nothing that is measured again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from labsupport.evidence import finetuning, planner
from labsupport.evidence.audit import Finding, Given, all_or_some, audits, of_row, texts, within_or_beyond
from labsupport.evidence.audit.computed import ignores_magnitudes
from labsupport.evidence.sweep import Measurements
from labsupport.model import models
from labsupport.model.evaluate import Interval, paired_interval

MACHINES = {
    "AMD EPYC, AVX-512": "amd-epyc-avx512.json",
    "AMD EPYC, AVX2": "amd-epyc-avx2.json",
    "NVIDIA H200": "nvidia-h200.json",
}
PLANTED = {"as trained": None, "planted": 8}
IN_ORDER = {"act_order": True, "static_groups": True}
ORDERS: dict[str, dict[str, Any]] = {"column order": {}, "act-order": IN_ORDER}
BARE = dict.fromkeys(("clip", "base", "rule"))  # what a plain row of AWQ does not have
SHIPPED = {"as shipped": "smollm2", "off its lattice": "smollm2-off-lattice"}
WAYS = ORDERS | {"by who listens": IN_ORDER | {"token_weights": "attention"}}


def _machines(given: Given) -> dict[str, tuple[Mapping[str, Any], dict[tuple[str, int], float]]]:
    return {name: given.products(file) for name, file in MACHINES.items()}


@audits(3)
def four_times_the_speed(given: Given) -> Finding:
    """About: within a quarter of it."""
    published = given.says("gpt-fast, README")
    machines = _machines(given)
    read = machines["AMD EPYC, AVX-512"][0]["read"]
    gains = {f"{name}, {b} tokens" if b > 1 else f"{name}, one token": times["bf16", b] / times["int4", b]
             for name, (_, times) in machines.items() for b in (1, 64)}  # fmt: skip
    speeds, rates = published["tokens a second"], published["GB/s"]
    gains["published, A100, whole model, batch 1"] = speeds["int4"] / speeds["bf16"]
    figures = {"fewer bytes, grouped int4": f"{read['bf16'] / read['int4']:.2f} times"}
    figures["fewer bytes, published"] = f"{rates['bf16'] / speeds['bf16'] / (rates['int4'] / speeds['int4']):.2f} times"
    figures |= {f"speed, {where}": f"{gain:.2f} times" for where, gain in gains.items()}
    return Finding(all_or_some(abs(gain / 4 - 1) < 0.25 for gain in gains.values()), figures)


@audits(4)
def dequantization_is_negligible(given: Given) -> Finding:
    """At most half as long again: fused at one token over reading its bytes, at 64 and unfused over the 16-bit product."""
    figures: dict[str, str] = {}
    small: list[bool] = []
    for name, (about, times) in _machines(given).items():
        found = {
            "fused, one token, over reading its bytes": times["int4", 1] / (about["read"]["int4"] / about["bandwidth"]),
            "fused, 64 tokens, over 16 bits": times["int4", 64] / times["bf16", 64],
            "unfused, one token, over 16 bits": times["int4, unfused", 1] / times["bf16", 1],
        }
        small += [value < 1.5 for value in found.values()]
        figures |= {f"{name}, {what}": f"{value:.1f} times as long" for what, value in found.items()}
    return Finding(all_or_some(small), figures)


@audits(5)
def int8_under_one_percent(given: Given) -> Finding:
    rows, forms = given.rows("int8.json"), {"bitsandbytes' form": None, "the paper's form": True}
    models_ = PLANTED | {"planted, factor 40": 40}
    tried = {f"{form}, {name}": of_row(rows.find(planted=factor, method="int8", granularity="row", threshold=6.0, paper=paper))
             for form, paper in forms.items() for name, factor in models_.items()}  # fmt: skip
    return Finding(within_or_beyond(tried.values(), 0.01), texts(tried))


@audits(7)
def nf4_beats_int4(given: Given) -> Finding:
    rows = given.rows("nf4.json")
    rivals = {f"g128, {name}": {"method": "rtn", "group_size": 128, "symmetric": symmetric}
              for name, symmetric in (("symmetric", True), ("zero-points", False))}  # fmt: skip
    rivals["b64, double"] = {"codebook": "int4", "block_size": 64, "absmax": "double"}
    to_nf4: dict[str, Interval] = {}
    for name, factor in PLANTED.items():
        ours = rows.find(planted=factor, codebook="nf4", block_size=64, absmax="double")
        to_nf4 |= {f"from int4, {rival}, {name}": rows.paired(rows.find(planted=factor, **setting), ours)
                   for rival, setting in rivals.items()}  # fmt: skip
    return Finding(all_or_some(change.high < 0 for change in to_nf4.values()), texts(to_nf4))


@audits(8)
def nf4_is_slower(given: Given) -> Finding:
    """From 1.2 to 1.4 times as long as AWQ's format takes. No card has both at their best, so that it never plainly fails."""
    longer = {f"{name}, {'one token' if b == 1 else f'{b} tokens'}, over grouped int4": t["bitsandbytes nf4", b] / t["int4", b]
              for name, (_, t) in _machines(given).items() for b in (1, 64)}  # fmt: skip
    cards = {f"published, {card}, over 16 bits": pair["16 bits"] / pair["NF4"]
             for card, pair in given.says("bitsandbytes, benchmarking/README.md").items()}  # fmt: skip
    figures = {where: f"{value:.2f} times as long" for where, value in (longer | cards).items()}
    return Finding(True if all(1.2 <= value <= 1.4 for value in longer.values()) else None, figures)


def _against_awq(given: Given, bits: int) -> dict[str, Interval]:
    """From 4-bit AWQ to GPTQ, both in groups of 128."""
    awq, gptq, found = given.rows("awq.json"), given.rows("gptq.json"), {}
    absent = dict.fromkeys(("act_order", "mse", "text", "stale_grids", "token_weights", "damping"))
    for name, factor in PLANTED.items():
        reference = awq.find(method="awq", bits=4, group_size=128, planted=factor, **BARE)
        for order, setting in ORDERS.items():
            row = gptq.find(
                **absent | {"method": "gptq", "bits": bits, "group_size": 128, "planted": factor, "samples": 64} | setting
            )
            found[f"{name}, {order}"] = awq.paired(reference, row)
    return found


def _published(given: Given, bits: int) -> dict[str, str]:
    """The same of Llama-2-7B, as published and without an interval."""
    said = given.says("AWQ, arXiv:2306.00978")
    return {"published, Llama-2-7B, column order": f"{100 * (said[f'GPTQ, {bits} bits'] / said['AWQ, 4 bits'] - 1):+.2f} %"}


@audits(10)
def worse_as_it_ignores_magnitudes(given: Given) -> Finding:
    ignored, changed = ignores_magnitudes()
    to_gptq = _against_awq(given, 4)
    figures = {"codes that change with a channel's magnitude": changed} | texts(to_gptq) | _published(given, 4)
    return Finding(ignored and all(change.low > 0 for change in to_gptq.values()), figures)


@audits(11)
def three_bit_gptq(given: Given) -> Finding:
    """Competitive: at most 1 % more perplexity."""
    to_gptq = _against_awq(given, 3)
    return Finding(within_or_beyond(to_gptq.values(), 0.01), texts(to_gptq) | _published(given, 3))


def _of_smollm2(given: Given, bits: int, reference_bits: int) -> dict[str, Interval]:
    """From AWQ to GPTQ on SmolLM2, groups of 64."""
    absent = dict.fromkeys(("symmetric", "act_order", "static_groups", "token_weights", "damping", "autogptq", "clip", "base"))
    found = {}
    for form, model in SHIPPED.items():
        awq, gptq = given.rows(f"{model}/awq.json"), given.rows(f"{model}/gptq.json")
        reference = awq.find(method="awq", bits=reference_bits, samples=16, **absent)
        for way, setting in WAYS.items():
            row = gptq.find(method="gptq", bits=bits, samples=16, **absent | setting)
            found[f"{bits} bits, {form}, {way}"] = awq.paired(reference, row)
    return found


@audits(10, "smollm2")
def worse_on_smollm2(given: Given) -> Finding:
    to_gptq = _of_smollm2(given, 4, 4)
    return Finding(all(change.low > 0 for change in to_gptq.values()), texts(to_gptq))


@audits(11, "smollm2")
def three_bit_gptq_on_smollm2(given: Given) -> Finding:
    to_gptq = _of_smollm2(given, 3, 4)
    return Finding(within_or_beyond(to_gptq.values(), 0.01), texts(to_gptq))


@audits(13)
def awq_beats_gptq(given: Given) -> Finding:
    rows, ordered = given.rows("awq.json"), given.rows("gptq.json")
    to_awq: dict[str, Interval] = {}
    for name, factor in PLANTED.items():
        for bits in (4, 3):
            at = {"bits": bits, "group_size": 128, "planted": factor}
            awq = rows.find(method="awq", **at, **BARE)
            gptq = {"column order": rows.find(method="gptq", **at, **BARE)}
            gptq["act-order"] = ordered.find(method="gptq", samples=64, token_weights=None, **at, **IN_ORDER)
            to_awq |= {f"{name}, {bits} bits, {order}": rows.paired(row, awq) for order, row in gptq.items()}
    said = given.says("AWQ, arXiv:2306.00978")
    ratios = {bits: said[f"AWQ, {bits} bits"] / said[f"GPTQ, {bits} bits"] for bits in (4, 3)}
    published = {f"published, Llama-2-7B, {bits} bits": f"{100 * (ratio - 1):+.2f} %" for bits, ratio in ratios.items()}
    return Finding(all_or_some(change.high < 0 for change in to_awq.values()), texts(to_awq) | published)


@audits(13, "smollm2")
def awq_beats_gptq_on_smollm2(given: Given) -> Finding:
    to_gptq = _of_smollm2(given, 4, 4) | _of_smollm2(given, 3, 3)
    return Finding(all_or_some(change.low > 0 for change in to_gptq.values()), texts(to_gptq))


@audits(16)
def eight_bits(given: Given) -> Finding:
    """Under 0.5 % in every form, and within a twentieth of half the bytes."""
    rows = given.rows("int8.json")
    forms: dict[str, dict[str, Any]] = {
        "weights alone": {"method": "int8-weights", "granularity": "row"},
        "both sides, a row": {"method": "int8", "granularity": "row", "threshold": 0.0},
        "both sides, a tensor": {"method": "int8", "granularity": "tensor", "threshold": 0.0},
        "LLM.int8()": {"method": "int8", "granularity": "row", "threshold": 6.0, "paper": None},
    }
    tried = {f"{form}, {name}": of_row(rows.find(planted=factor, **setting))
             for form, setting in forms.items() for name, factor in PLANTED.items()}  # fmt: skip
    config = json.loads((models.course_model_dir() / "config.json").read_text("utf-8"))
    shapes = {"Llama-2-7B": planner.LLAMA_7B, "the course model": planner.shape_of(SimpleNamespace(**config), "course model")}
    shares = {name: _share_in_int8(shape) for name, shape in shapes.items()}
    flags = [change.high < 0.005 for change in tried.values()], [abs(share - 0.5) < 0.05 for share in shares.values()]
    holds = True if all(map(all, flags)) else None if all(map(any, flags)) else False
    return Finding(
        holds, texts(tried) | {f"bytes of {name}, of those in 16 bits": f"{100 * s:.1f} %" for name, s in shares.items()}
    )


def _share_in_int8(shape: planner.Shape) -> float:
    """Linears in int8 with 4 bytes a row for absmax, the rest in 16 bits, over everything in 16 bits."""
    outputs = shape.layers * sum(rows for rows, _ in shape.block_linears.values())
    return (shape.linear_parameters + 4 * outputs + 2 * shape.other_parameters) / (2 * shape.parameters)


def _over_seeds(rows: Measurements, first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[Interval, bool]:
    """From one arm of notebook 12 to another: the change of the mean over seeds, with its interval; whether it is real, which
    means that the interval is clear of 0 and all seeds agree on the side."""
    tokens = torch.tensor(rows.about["tokens"])
    used = tokens > 0

    def losses(arm: Mapping[str, Any]) -> torch.Tensor:
        wanted = dict.fromkeys(("merged", "stored", "rate")) | dict(arm)
        kept = [rows.find(seed=seed, **wanted)["loss"] for seed in finetuning.SEEDS]
        return torch.tensor(kept, dtype=torch.float64)[:, used]

    one, two = losses(first), losses(second)
    draws = torch.randint(int(used.sum()), (2000, int(used.sum())), generator=torch.Generator().manual_seed(0))
    low, high = paired_interval(one.mean(0), two.mean(0), tokens[used], draws)
    by_seed = (two - one).sum(1)
    change = Interval(torch.expm1(by_seed.mean() / tokens.sum()).item(), low, high)
    return change, (low > 0 or high < 0) and len(by_seed.sign().unique()) == 1


@audits(18)
def cannot_be_reused(given: Given) -> Finding:
    rows, reused = given.rows("lora.json"), {}
    for kind, bits, rate, name in (
        ("nf4", 4, None, "NF4"), ("nf4", 4, finetuning.GENTLE, "NF4, gentle"), ("rtn", 3, None, "rounding, 3 bits"),
    ):  # fmt: skip
        own = {"base": kind, "bits": bits, "rate": rate}
        for arm, merged in (("e", "own"), ("f", "original")):
            new = own | {"arm": "d", "merged": merged, "stored": kind}
            reused[f"{name}, {merged} base"] = _over_seeds(rows, new, own | {"arm": arm})
    figures = {at: f"{change}{'' if real else ', not real'}" for at, (change, real) in reused.items()}
    return Finding(all_or_some(real and change.change > 0 for change, real in reused.values()), figures)


@audits(19)
def domain_samples(given: Given) -> Finding:
    rows, better = given.rows("calibration.json"), {}
    for bits, samples in ((3, 128), (3, 512), (4, 32)):
        general, domain = (rows.find(text=text, samples=samples, bits=bits, draw=0, token_weights=None, method="gptq")
                           for text in (finetuning.OTHER, finetuning.DOMAIN))  # fmt: skip
        better[f"{bits} bits, {samples} windows"] = rows.paired(general, domain)
    return Finding(all_or_some(change.high < 0 for change in better.values()), texts(better))


@audits(20)
def merge_then_quantize(given: Given) -> Finding:
    """At least 5 % better than the adapter beside its quantized base, in one interval or in none."""
    rows, gained = given.rows("lora.json"), {}
    for base, bits, methods in (("nf4", 4, ("nf4", "gptq", "awq")), ("rtn", 3, ("rtn", "gptq"))):
        beside = {"arm": "a", "base": base, "bits": bits}
        for method in methods:
            for merged in ("own", "original"):
                arm = {"arm": "d", "base": base, "bits": bits, "merged": merged, "stored": method}
                gained[f"{bits} bits, {merged} base, then {method}"] = _over_seeds(rows, beside, arm)
            arm = {"arm": "g", "base": "float", "bits": bits, "stored": method}
            gained[f"{bits} bits, in float, then {method}"] = _over_seeds(rows, beside, arm)
    figures = {at: f"{change}{'' if real else ', not real'}" for at, (change, real) in gained.items()}
    reaches, cannot = (
        [test(change) for change, _ in gained.values()] for test in (lambda c: c.high <= -0.05, lambda c: c.low > -0.05)
    )
    return Finding(True if all(reaches) else False if all(cannot) else None, figures)


def _opponents(rows: Measurements, bits: int, further: bool | None) -> list[dict[str, Any]]:
    """Rounding, GPTQ and AWQ; further: of the model after as much training in float as QAT had."""
    return [rows.find(method=method, bits=bits, further=further) for method in ("rtn", "gptq", "awq")]


def _best(opponents: list[dict[str, Any]], at_most: int) -> dict[str, Any]:
    return min((row for row in opponents if row["nbytes"] <= at_most), key=lambda row: row["perplexity"])


@audits(21)
def qat_beats_ptq(given: Given) -> Finding:
    """At every width, against the best at its bytes or fewer: as it is, and trained further."""
    rows, found = given.rows("qat.json").without("embedding"), {}
    for bits in (4, 3, 2):
        ours = rows.find(method="qat", bits=bits, way="straight-through")
        for label, further in (("as it is", None), ("trained further", True)):
            found[bits, label] = rows.paired(_best(_opponents(rows, bits, further), ours["nbytes"]), ours)
    wins = [all(found[bits, label].high < 0 for label in ("as it is", "trained further")) for bits in (4, 3, 2)]
    figures = {f"{bits} bits, from the best opponent {label}": str(change) for (bits, label), change in found.items()}
    return Finding(all_or_some(wins), figures)


@audits(29)
def fp8_cache_is_additive(given: Given) -> Finding:
    """Half: fp8 adds from 0.5 to 1 %, as far as the intervals tell. The other half: weights and cache do not interact."""
    rows, figures = given.rows("kv.json"), dict[str, str]()
    amount, adds_up = [], []
    absent = dict.fromkeys(("planted", "key_axis", "value_axis", "before_rope", "residual", "bins"))
    for name, weights in (("AWQ", "awq4"), ("rounding", "rtn4")):
        neither, cache, alone, both = (rows.find(weights=w, keys=kept, values=kept, **absent)
                                       for w in (None, weights) for kept in (16, "fp8"))  # fmt: skip
        added = rows.paired(alone, both)
        figures |= {f"weights in 4 bits by {name}": str(of_row(alone)), f"fp8 adds, on {name}": str(added)}
        amount.append(added.high >= 0.005 and added.low <= 0.01)
        extra = [b - a - c + n for b, a, c, n in zip(both["loss"], alone["loss"], cache["loss"], neither["loss"], strict=True)]
        interaction = rows.paired(alone | {"loss": [0.0] * len(extra)}, alone | {"loss": extra})
        figures[f"interaction with {name}"] = str(interaction)
        adds_up.append(interaction.low <= 0 <= interaction.high)
    return Finding(all_or_some([all(amount), all(adds_up)]), figures)


@audits(36)
def costs_a_full_training(given: Given) -> Finding:
    """At least half of the tokens that the model was trained on."""
    rows = given.rows("qat.json").without("embedding")
    plan = rows.about["training"]
    spent = plan["steps"] * plan["batch"] * plan["length"]
    trained = json.loads((models.course_model_dir() / "training.json").read_text("utf-8"))["recipe"]["tokens"]
    figures = {"tokens read": f"{spent:,} of {trained:,}, {100 * spent / trained:.1f} %"}
    for bits in (4, 3, 2):
        best = _best(_opponents(rows, bits, None), 2**62)
        left = rows.find(method="qat", bits=bits, way="straight-through")["change"] / best["change"]
        figures[f"left of the best method's loss at {bits} bits"] = f"{100 * left:.0f} %"
    figures["tokens that GPTQ and AWQ looked at"] = f"{plan['samples'] * plan['length']:,}"
    return Finding(spent >= 0.5 * trained, figures)
