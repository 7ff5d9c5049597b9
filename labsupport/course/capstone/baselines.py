"""What a submission is placed among: one method of each notebook at each budget, the same bits and groups for every matrix.

Each is written as a submission and counted as one. `labs capstone --baselines` measures them; the rows are in
data/measurements/capstone.json.
"""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labsupport.checkpoint import mixed
from labsupport.checkpoint.weights import SINGLE
from labsupport.course.capstone import reference, rules, scoring, texts, worker
from labsupport.course.capstone.reference import RATES, SAMPLES, SCHEDULE, TABLE, Choice, Given, matrices
from labsupport.evidence import measurements
from labsupport.evidence.sweep import model_digest
from labsupport.model import files, models
from labsupport.model.evaluate import evaluate, paired_bootstrap
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant import nf4, rtn
from labsupport.quant.grid import QuantizedTensor

COMMAND = "labs capstone --baselines"
# The finest configuration that keeps each budget, in groups and with a grid for each row.
UNIFORM = {"large": (4, 32), "medium": (3, 64), "small": (2, 64)}


@dataclass(frozen=True)
class Baseline:
    """group_size: None for a whole row."""

    budget: str
    method: str
    notebook: str
    bits: int
    group_size: int | None

    @property
    def name(self) -> str:
        size = "rows" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.notebook} {self.method}, {self.bits} bits, {size}"


def settings() -> Iterator[Baseline]:
    """Every baseline."""
    for budget, (bits, size) in UNIFORM.items():
        yield Baseline(budget, "rtn", "02", bits, None)
        yield Baseline(budget, "rtn", "03", bits, size)
        if bits == 4:
            yield Baseline(budget, "nf4", "05", 4, 64)
        yield Baseline(budget, "gptq", "07", bits, size)
        yield Baseline(budget, "awq", "08", bits, size)
        yield Baseline(budget, "qat", "13", bits, size)


def make(baseline: Baseline, given: Given) -> tuple[nn.Module, dict[str, QuantizedTensor]]:
    """The model of a baseline, and what is stored of it. The embedding is rounded to nearest on the same grid."""
    model, stored = models.duplicate(given.model).requires_grad_(False), {}
    bits, size = baseline.bits, baseline.group_size
    if baseline.method == "qat":
        choices = dict.fromkeys(matrices(model), Choice(bits, size))
        return reference.trained(given, choices, f"qat-{bits}")

    def rounded(weight: torch.Tensor) -> QuantizedTensor:
        if baseline.method == "nf4":
            return mixed.on_levels(weight, nf4.levels_of("nf4"), size)
        return rtn.quantize(weight, bits, size)

    with torch.no_grad():
        for name, module in matrices(model).items():
            if name == TABLE or baseline.method in ("rtn", "nf4"):
                stored[name] = rounded(module.weight)
                module.weight.copy_(stored[name].dequantize())
    if baseline.method in ("gptq", "awq"):
        more = reference.GPTQ if baseline.method == "gptq" else {}
        arguments = {"bits": bits, "group_size": size, "calibration": given.calibration, **more}
        quantize_model(model, baseline.method, in_place=True, stored=stored, **arguments)
    return model, stored


def write(model: nn.Module, stored: dict[str, QuantizedTensor], out: Path) -> Path:
    """A submission: config.json and one file of tensors. Raises files.WriteError, and CheckpointError for what cannot be stored."""
    config = json.loads((models.course_model_dir() / "config.json").read_text("utf-8"))
    with files.replaced_directory(out) as folder:
        mixed.save_tensors(model, stored, folder / SINGLE)
        files.write_text(folder / "config.json", json.dumps(config | {"quantization_config": mixed.CONFIG}, indent=1))
    return out


Build = Callable[[Given], tuple[nn.Module, dict[str, QuantizedTensor]]]


def answers() -> Iterator[tuple[str, str, Build]]:
    """Budget, name and maker of every row; those that train come last."""
    uniform = sorted(settings(), key=lambda baseline: baseline.method == "qat")
    quick = sum(baseline.method != "qat" for baseline in uniform)
    makers: list[tuple[str, str, Build]] = [(each.budget, each.name, partial(make, each)) for each in uniform]
    mixed_ones: list[tuple[str, str, Build]] = [
        (budget, "reference, bits by matrix, GPTQ", partial(reference.answer, budget=most, train=False))
        for budget, most in rules.BUDGETS.items()
    ]
    learned: list[tuple[str, str, Build]] = [
        (budget, "reference, bits by matrix, trained", partial(reference.answer, budget=rules.BUDGETS[budget], train=True))
        for budget in ("medium", "small")
    ]
    return iter([*mixed_ones, *makers[:quick], *makers[quick:], *learned])


def measure(
    path: Path,
    windows: int = worker.WINDOWS,
    on_row: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Measure every baseline and the reference answer, and keep a row of each in `path`, which is written after every row.

    Rows of the same model, text and windows that are there are kept. Raises ValueError where they are of others, OSError.
    """
    files.check_writable(path)
    have = reference.given(path.with_name(f".{path.stem}-states"), on_step)
    _, tokenizer = models.load_model(str(models.course_model_dir()), device="cpu")
    stream = texts.held_out(tokenizer, texts.KEY)
    course = evaluate(have.model, stream, windows=windows)
    about = {
        "command": COMMAND, "model": "course-model", "model_sha256": model_digest(have.model), "text": stream.source,
        "text_sha256": stream.sha256, "windows": course.windows, "length": course.length, "tokens": course.tokens.tolist(),
        "baseline_perplexity": course.perplexity, "samples": SAMPLES,
        "training": asdict(SCHEDULE) | {"learning_rate": {str(bits): rate for bits, rate in RATES.items()}},
        "budgets": rules.BUDGETS, "python": platform.python_version(), "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    others = {worker.OWN: texts.held_out(tokenizer, None), worker.OTHER: texts.other_code(tokenizer, "baselines")}
    rows: list[dict[str, Any]] = []
    if path.exists():
        before, rows = measurements.read(path)
        if other := [key for key in ("model_sha256", "text_sha256", "tokens", "budgets") if before.get(key) != about[key]]:
            raise ValueError(f"{path} holds rows of another {', '.join(other)}: choose another file or delete it")
    wanted = list(answers())
    for number, (budget, name, build) in enumerate(wanted):
        if not any((row["budget"], row["name"]) == (budget, name) for row in rows):
            model, stored = build(have)
            with tempfile.TemporaryDirectory() as folder:
                out, copy = write(model, stored, Path(folder) / "out"), Path(folder) / "copy"
                copy.mkdir()
                nbytes, read = rules.take(out, copy).total, worker.read(copy)[0]
            if nbytes > rules.BUDGETS[budget]:
                raise ValueError(f"{name} takes {nbytes:,} bytes, over the budget {budget}")
            result = evaluate(read, stream, windows=windows)
            change = paired_bootstrap(course, result)
            row = {
                "budget": budget, "name": name, "nbytes": nbytes, "perplexity": result.perplexity, "change": change.change,
                "low": change.low, "high": change.high, "loss": [round(nats, 4) for nats in result.loss.tolist()],
            }  # fmt: skip
            if name.startswith("03"):  # what a model that never saw the text loses here and there
                on_texts = [
                    {name: evaluate(each, s, windows=windows // 2) for name, s in others.items()} for each in (read, have.model)
                ]
                pair = [found | {worker.SCORED: each} for found, each in zip(on_texts, (result, course), strict=True)]
                row["gaps"] = [asdict(scoring.gap(*pair, text)) for text in (worker.SCORED, worker.OWN)]
            rows.append(row)
            measurements.write(path, about, rows)
        on_row(number + 1, len(wanted))
    shutil.rmtree(have.folder, ignore_errors=True)  # states of training, no longer needed
