"""Is a model that was trained to live on its grid better than one that was rounded afterwards, at equal bytes and equal training?

Rows of a method after training (`method` rtn, gptq, awq) are of the model as it is, or with `further` of the model after the same
steps of further training in float; "qat" rows of the same steps with fake quantizers; "float" is further training alone. With
`embedding` the embedding is rounded to so many bits as well, to nearest, after training: notebook 14 sets such rows beside others
at equal bytes of the whole model. `nbytes` and `bits_per_weight` are of the linears in every row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from labsupport.evidence import shootout
from labsupport.evidence.finetuning import Given, settings_of
from labsupport.model import models
from labsupport.model.evaluate import Evaluation, evaluate, paired_bootstrap
from labsupport.pipeline import calibrate, qat, training
from labsupport.pipeline.methods import METHODS
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant.grid import QuantizedTensor

SCHEDULE = training.Schedule(steps=300, batch=2, length=512, warmup=20)
# The fewer levels, the further a weight must go. "float" and 4 bits: more makes the model itself worse in so few steps.
RATES = {16: 5e-5, 4: 5e-5, 3: 2e-4, 2: 1e-3, 1.58: 1e-3}
SAMPLES = 32
BITS = (4, 3, 2)
EMBEDDING = min(shootout.EMBEDDING_BITS)


def settings(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The rows."""
    size = models.group_size(model)
    for further in (None, True):
        if further:
            yield {"method": "float", "further": True}
        for bits in BITS:
            for method in ("rtn", "gptq", "awq"):
                yield {"method": method, "bits": bits, "group_size": size} | ({"further": True} if further else {})
        if not further:
            for bits in reversed(BITS):
                yield {"method": "qat", "bits": bits, "group_size": size, "way": "straight-through"}
    yield {"method": "qat", "bits": 1.58, "group_size": size, "way": "ternary"}
    for way in ("learned steps", "soft"):
        yield {"method": "qat", "bits": 2, "group_size": size, "way": way}
    for bits, way in ((3, "straight-through"), (2, "learned steps"), (1.58, "ternary")):
        yield {"method": "qat", "bits": bits, "group_size": size, "way": way, "embedding": EMBEDDING}


def grid_of(setting: dict[str, Any]) -> qat.Grid:
    """Where the weights of a row of QAT must stand."""
    way, bits = setting["way"], setting["bits"]
    return qat.Grid(way, 2 if way == "ternary" else bits, setting["group_size"], symmetric=way == "learned steps")


class Rows:
    """Makes the rows of the sweep "qat", one after the other; states of training are kept in `folder`."""

    def __init__(self, given: Given):
        self.given, self.model = given, given.model
        self.baseline = self._evaluation(given.model)
        self.further = cache(self._further)

    @property
    def about(self) -> dict[str, Any]:
        """What a file of these rows says beside what every sweep says."""
        return {
            "training": asdict(SCHEDULE)
            | {"learning_rate": {str(bits): rate for bits, rate in RATES.items()}, "text": "code and prose", "samples": SAMPLES}
        }

    def row(self, setting: dict[str, Any]) -> dict[str, Any]:
        """One row. Raises training.Diverged where a model does not learn."""
        model, nbytes = self._model(setting)
        if "embedding" in setting:
            with torch.no_grad():
                shootout.round_embedding(model, setting["embedding"])
        result = self._evaluation(model)
        change = paired_bootstrap(self.baseline, result)
        weights = sum(layer.weight.numel() for layer in models.linears(model).values())
        return setting | {
            "bits_per_weight": 8 * nbytes / weights, "nbytes": nbytes, "perplexity": result.perplexity,
            "change": change.change, "low": change.low, "high": change.high,
            "loss": [round(nats, 4) for nats in result.loss.tolist()],
        }  # fmt: skip

    def _evaluation(self, model: nn.Module) -> Evaluation:
        return evaluate(model, self.given.stream, self.given.length, self.given.windows)

    def _fit(self, model: nn.Module, name: str, bits: float) -> list[float]:
        schedule = replace(SCHEDULE, learning_rate=RATES[bits])
        ids = torch.cat([self.given.texts(domain, "train").ids for domain in ("code", "prose")])
        return training.fit(model, ids, schedule, self.given.folder / f"{name}.safetensors", on_step=self.given.on_step)

    def _further(self) -> nn.Module:
        model = models.duplicate(self.model).requires_grad_(True)
        self._fit(model, "float", 16)
        return model

    def _model(self, setting: dict[str, Any]) -> tuple[nn.Module, int]:
        """The model of a row, and the bytes of its linears."""
        if setting["method"] == "qat":
            model = qat.prepare(models.duplicate(self.model), grid_of(setting))
            self._fit(model, f"{setting['way']}-{setting['bits']}".replace(" ", "-"), setting["bits"])
            stored: dict[str, QuantizedTensor] = {}
            qat.convert(model, stored)
            return model, sum(tensor.nbytes for tensor in stored.values())
        model = self.further() if setting.get("further") else self.model
        if setting["method"] == "float":
            return model, 2 * sum(layer.weight.numel() for layer in models.linears(model).values())
        arguments = settings_of(model, setting["method"], setting["bits"])
        if METHODS[setting["method"]].needs_text:
            arguments["calibration"] = calibrate.windows(self.given.texts("code", "train"), SAMPLES)
        quantized, report = quantize_model(model, setting["method"], **arguments)
        return quantized, report.nbytes
