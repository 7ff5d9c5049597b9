"""A quantized model that must learn: adapters trained on several bases, merged, and stored again in each way people argue about.

Arms, as rows name them, of an adapter that was trained on a base: "a" beside its base, as trained; "b" merged into that base as it
reads back, in float; "c" merged into the original float weights, on which it was not trained; "d" b or c stored again by a method,
with new scales; "e" b rounded to the base's old grid; "f" c rounded to that grid, whose scales are used again; "g" an adapter
trained on the float model, merged there and then stored. `rate`: another learning rate than the schedule's. A tenth of it is a
common one for large models, and makes updates that are small beside the distance between levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from labsupport.model import models
from labsupport.model.evaluate import Evaluation, evaluate, paired_bootstrap
from labsupport.model.text import TokenStream
from labsupport.pipeline import calibrate, lora, training
from labsupport.pipeline.methods import METHODS
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant import old_grid
from labsupport.quant.grid import QuantizedTensor

DOMAIN, OTHER = "numpy", "code"  # what is learned, and what may be forgotten
RANK, ALPHA = 16, 32.0
SCHEDULE = training.Schedule(steps=100, batch=2, length=512, learning_rate=3e-3)
SAMPLES = 32  # windows of calibration text
SEEDS = range(5)
GENTLE = 3e-4
BASES = (("nf4", 4), ("rtn", 3))
MEASURED = ("other_perplexity", "other_change", "other_loss", "survived", "moved")
# Called with a domain and a split; with each step of a training and its loss.
Texts = Callable[[str, str], TokenStream]
OnStep = Callable[[int, float], None]


def settings_of(model: nn.Module, method: str, bits: int) -> dict[str, Any]:
    """What `quantize_model` is given for a method at these bits: the group size is the usual one of the model."""
    if method == "nf4":
        return {"double_quant": True}
    order = {"act_order": True, "static_groups": True} if method == "gptq" else {}
    return {"bits": bits, "group_size": models.group_size(model)} | order


def settings(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The rows, seed by seed."""
    yield {"base": "float", "bits": 16, "arm": "untuned"}
    for base, bits in BASES:
        yield {"base": base, "bits": bits, "arm": "untuned"}
    for seed in SEEDS:
        yield {"base": "float", "bits": 16, "arm": "a", "seed": seed}
        for base, bits in BASES:
            again = (base, "gptq", "awq") if bits == 4 else (base, "gptq")
            for arm in ("a", "b", "c", "e", "f"):
                yield {"base": base, "bits": bits, "arm": arm, "seed": seed}
            for merged in ("own", "original"):
                for method in again:
                    yield {"base": base, "bits": bits, "arm": "d", "merged": merged, "stored": method, "seed": seed}
            for method in again:
                yield {"base": "float", "bits": bits, "arm": "g", "stored": method, "seed": seed}
    for seed in SEEDS:
        gentle = {"base": "nf4", "bits": 4, "seed": seed, "rate": GENTLE}
        for arm in ("a", "c", "e", "f"):
            yield gentle | {"arm": arm}
        for merged in ("own", "original"):
            for method in ("nf4", "gptq"):
                yield gentle | {"arm": "d", "merged": merged, "stored": method}


@dataclass(frozen=True)
class Given:
    """What a sweep that trains is given. stream: held-out text, in windows of `length` tokens. folder: for states of training."""

    model: nn.Module
    stream: TokenStream
    texts: Texts
    length: int
    windows: int | None
    folder: Path
    on_step: OnStep = lambda step, loss: None


class Rows:
    """Makes the rows of the sweep "lora", one after the other; an adapter is trained once and its state kept in `folder`."""

    def __init__(self, given: Given):
        self.given, self.model = given, given.model
        self.baseline = self.evaluations(given.model)
        self.originals = {name: layer.weight.detach() for name, layer in models.linears(given.model).items()}
        self.base = cache(self._base)
        self.trained = cache(self._trained)

    @property
    def about(self) -> dict[str, Any]:
        """What a file of these rows says beside what every sweep says."""
        other = self.baseline[1]
        return {
            "training": asdict(SCHEDULE) | {"rank": RANK, "alpha": ALPHA, "text": DOMAIN, "samples": SAMPLES},
            "other_text": OTHER, "other_sha256": other.sha256, "other_windows": other.windows,
            "other_tokens": other.tokens.tolist(), "other_baseline_perplexity": other.perplexity,
        }  # fmt: skip

    def row(self, setting: dict[str, Any]) -> dict[str, Any]:
        """One row. Raises training.Diverged where its adapter does not learn."""
        model, more = self._model(**setting)
        return setting | measured(self.baseline, self.evaluations(model)) | more

    def evaluations(self, model: nn.Module) -> tuple[Evaluation, Evaluation]:
        """Of the text that is learned, and of the other, on half as many windows."""
        given, other = self.given, self.given.texts(OTHER, "heldout")
        half = None if given.windows is None else max(1, given.windows // 2)
        return evaluate(model, given.stream, given.length, given.windows), evaluate(model, other, given.length, half)

    def _base(self, base: str, bits: int) -> tuple[nn.Module, dict[str, QuantizedTensor]]:
        stored: dict[str, QuantizedTensor] = {}
        if base == "float":
            return self.model, stored
        return quantize_model(self.model, base, stored=stored, **settings_of(self.model, base, bits))[0], stored

    def _trained(self, base: str, bits: int, seed: int, rate: float | None = None) -> nn.Module:
        """An adapter on its base, which stays packed."""
        self.trained.cache_clear()  # one at a time
        model, stored = self.base(base, bits)
        adapted = lora.add(models.duplicate(model), stored, RANK, ALPHA, seed)
        rate = SCHEDULE.learning_rate if rate is None else rate
        schedule = replace(SCHEDULE, seed=seed, learning_rate=rate)
        state = self.given.folder / f"{base}-{bits}-{seed}-{rate:g}.safetensors"
        training.fit(adapted, self.given.texts(DOMAIN, "train").ids, schedule, state, on_step=self.given.on_step)
        return adapted

    def _model(
        self,
        base: str,
        bits: int,
        arm: str,
        seed: int | None = None,
        merged: str | None = None,
        stored: str | None = None,
        rate: float | None = None,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The model of a row, and what else is measured of it."""
        if arm == "untuned" or seed is None:
            return self.base(base, bits)[0], {}
        adapted = self.trained(base, 16 if base == "float" else bits, seed, rate)
        if arm == "a":
            return adapted, {}
        on_original = arm in ("c", "f", "g") or merged == "original"
        updates = {name: layer.update for name, layer in lora.adapters(adapted).items()}
        before = self.originals if on_original else {name: layer.base_weight() for name, layer in lora.adapters(adapted).items()}
        model = lora.merge(models.duplicate(adapted), self.originals if on_original else None)
        more: dict[str, Any] = {}
        if arm in ("e", "f"):
            more["moved"] = round_to(model, self.base(base, bits)[1])
        elif stored is not None:
            arguments = settings_of(self.model, stored, bits)
            if METHODS[stored].needs_text:
                arguments["calibration"] = calibrate.windows(self.given.texts(DOMAIN, "train"), SAMPLES)
            quantize_model(model, stored, in_place=True, **arguments)
        more["survived"] = survived(model, before, updates)
        return model, more


@torch.no_grad()
def round_to(model: nn.Module, stored: dict[str, QuantizedTensor]) -> float:
    """Round every linear to the grid of `stored`, in place. Returns the share of weights that left the level they stood on."""
    moved = total = 0
    for name, layer in models.linears(model).items():
        values, before = old_grid.values(layer.weight, stored[name]), stored[name].dequantize()
        # Between two levels lie at least 1/20 of the larger one or of the step; float rounding is thousands of times smaller.
        moved += ((values - before).abs() > 1e-3 * before.abs().amax(1, keepdim=True)).sum().item()
        total += values.numel()
        layer.weight.copy_(values)
    return moved / total


@torch.no_grad()
def survived(model: nn.Module, before: dict[str, Tensor], updates: dict[str, Tensor]) -> float:
    """How much of the adapters' update is in the model's weights: sum <W - before, U> / sum <U, U> over all linears; 1 is all."""
    layers = models.linears(model)
    found = sum(((layers[name].weight - before[name]) * update).sum().item() for name, update in updates.items())
    return found / sum(update.square().sum().item() for update in updates.values())


def measured(baseline: tuple[Evaluation, Evaluation], found: tuple[Evaluation, Evaluation]) -> dict[str, Any]:
    """What a row says of both texts, with the losses of each document, so that rows can be paired."""
    change, other = (paired_bootstrap(before, after) for before, after in zip(baseline, found, strict=True))
    return {
        "perplexity": found[0].perplexity, "change": change.change, "low": change.low, "high": change.high,
        "other_perplexity": found[1].perplexity, "other_change": other.change,
        "loss": [round(nats, 4) for nats in found[0].loss.tolist()],
        "other_loss": [round(nats, 4) for nats in found[1].loss.tolist()],
    }  # fmt: skip
