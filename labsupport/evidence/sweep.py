"""Measurements that take too long for a notebook: many settings of a method on one model and one text, a row each.

Rows are kept in data/measurements/NAME.json with everything needed to know what they mean: model, text, versions, machine, date.
The file is written after every row, and a sweep that was stopped continues with the rows that are missing.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labsupport.evidence import calibrating, finetuning, measurements, positions, retraining, shootout, sink
from labsupport.evidence.settings import CHOICES as CHOICES  # a notebook reads it here
from labsupport.evidence.settings import SAMPLES, SHORT_SWEEPS, SWEEPS
from labsupport.model import files, models, opened
from labsupport.model.evaluate import (
    LENGTH,
    Difference,
    Evaluation,
    Interval,
    divergence,
    evaluate,
    paired_bootstrap,
    paired_difference,
)
from labsupport.model.text import TokenStream
from labsupport.pipeline.methods import METHODS
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant.kv import Part, Scheme, Shape, cache_bytes

# The keys of a row that are not its setting.
MEASURED = (
    "bits_per_weight", "bits_per_value", "nbytes", "perplexity", "change", "low", "high", "loss", "seconds", "kl", "agreement",
    *sink.MEASURED, *positions.MEASURED, *finetuning.MEASURED, *shootout.MEASURED,
)  # fmt: skip
BY_BLOCK = ("sink", "positions")  # sweeps with a row for each block of the model in floating point
LEARNING = {"lora": finetuning.Rows, "calibration": calibrating.Rows, "qat": retraining.Rows}  # sweeps that train
# What must be equal for rows to belong in one file.
IDENTITY = ("model_sha256", "text_sha256", "windows", "length", "dtype", "device", "training", "other_sha256", "items")
Row = dict[str, Any]
OnRow = Callable[[int, int], None]
# Called with a domain and a number of windows: token ids of its training text, int64 [windows, length].
Calibration = Callable[[str, int], torch.Tensor]


@dataclass(frozen=True)
class Measurements:
    """Rows of a sweep. about: model, text, machine, versions, date. baseline: perplexity of the unquantized model."""

    about: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def baseline(self) -> float:
        return self.about["baseline_perplexity"]

    def find(self, **setting: Any) -> dict[str, Any]:
        """The one row with this setting; None stands for a key that a row does not have. Raises LookupError unless it is one."""
        matching = [row for row in self.rows if all(row.get(key) == value for key, value in setting.items())]
        if len(matching) != 1:
            raise LookupError(f"{len(matching)} rows have {setting}, wanted one")
        return matching[0]

    def without(self, key: str) -> Measurements:
        """The same measurements, but for the rows whose setting has this key."""
        return Measurements(self.about, [row for row in self.rows if key not in row])

    def only(self, **setting: Any) -> dict[str, Any]:
        """The row with this setting and nothing else in its setting. Raises LookupError where there is none."""
        for row in self.rows:
            if setting_of(row) == setting:
                return row
        raise LookupError(f"no row has the setting {setting} and no other")

    def paired(self, reference: Row, other: Row, of: Measurements | None = None) -> Interval:
        """The change in perplexity from one row to another, with its interval over documents. Both rows must hold "loss".

        of: the measurements that `other` is a row of, where it is of another file: another model, on the same text and windows.
        Raises ValueError where the two were not measured on the same tokens.
        """
        level = self.about.get("percentiles", 0.95)
        return paired_bootstrap(self._evaluation(reference), (of or self)._evaluation(other), level=level)

    def difference(self, reference: Row, other: Row, metric: str, of: Measurements | None = None) -> Difference:
        """The change in one of shootout.METRICS from one row of a shootout to another, in its own unit; of: see `paired`.

        Raises ValueError for another metric, where the two were not measured on the same tokens and items, and for a metric that
        compares with the float model where that is another in the two files.
        """
        if of is not None and metric in shootout.TO_FLOAT and of.about["model_sha256"] != self.about["model_sha256"]:
            raise ValueError(f"{metric} is against the float model of each file, and these are two: it cannot be paired")
        sums, counts = shootout.by_document(self.about, reference, metric)
        other_sums, other_counts = shootout.by_document((of or self).about, other, metric)
        if of is not None and (of.about["text_sha256"] != self.about["text_sha256"] or not torch.equal(counts, other_counts)):
            raise ValueError(f"reference and other have their {metric} of different texts, so they cannot be paired")
        return paired_difference(sums, other_sums, counts)

    def _evaluation(self, row: dict[str, Any]) -> Evaluation:
        about = self.about
        loss = torch.tensor(row["loss"], dtype=torch.float64)
        return Evaluation(loss, torch.tensor(about["tokens"]), about["windows"], about["length"], 0.0, about["text_sha256"])


def setting_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row is of, without what was measured."""
    return {key: value for key, value in row.items() if key not in MEASURED}


def path_of(name: str, model: str | None = None) -> Path:
    """data/measurements/NAME.json for the course model; for one that `labs fetch` makes, data/measurements/MODEL/NAME.json."""
    return models.data_dir() / "measurements" / (model or "") / f"{name}.json"


def load(name: str, model: str | None = None) -> Measurements:
    """The rows of a sweep, as `labs sweep` left them. model: see path_of.

    Where no model is named and LABS_MODEL names another than the course model, a line is printed that says so: a notebook shows
    these rows beside what it measures live.
    """
    path = path_of(name, model)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
        raise FileNotFoundError(f"no measurements {name!r}; there are {known}")
    measured = Measurements(*measurements.read(path))
    if model is None and (title := models.title()) != "the course model":
        about = measured.about
        print(f"The stored rows of {name!r} are of the {about['model']} on {about['text']}; what is measured live is of {title}.")
    return measured


def model_digest(model: nn.Module) -> str:
    """SHA-256 of the weights of all linears of the blocks, as float32."""
    digest = hashlib.sha256()
    for layer in opened.linears(model).values():
        digest.update(layer.weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Prepared:
    """A sweep before its first row. about: what all rows are of. settings: of its rows. row: measures one of them."""

    about: dict[str, Any]
    settings: list[Row]
    row: Callable[[Row], Row]


def run(
    name: str,
    model: nn.Module,
    stream: TokenStream,
    path: Path,
    model_name: str,
    windows: int | None = 256,
    length: int = LENGTH,
    calibration: Calibration | None = None,
    on_row: OnRow = lambda done, total: None,
    short: bool = False,
    texts: finetuning.Texts | None = None,
    on_step: finetuning.OnStep = lambda step, loss: None,
    tokenizer: Any = None,
    settings: Sequence[Row] | None = None,
) -> Measurements:
    """Measure every setting of the sweep `name`; rows are kept that `path` holds for the same model, text and kind of device.

    texts: see `prepare`; what a sweep of LEARNING learns is kept in a folder beside `path`, named after it, until its last row is
    there. settings: in place of the sweep's own. on_row(done, total) is called once with the rows that are there, and
    after each new one. The rest: see `prepare`.
    Raises what `prepare` and `collect` raise; OSError where nothing can be written at `path`.
    """
    files.check_writable(path)
    states = path.with_name(f".{path.stem}-states")
    given = {"calibration": calibration, "short": short, "texts": texts, "on_step": on_step, "tokenizer": tokenizer}
    prepared = prepare(name, model, stream, model_name, windows, length, **given, states=states)
    wanted = list(prepared.settings if settings is None else settings)
    measured = collect(path, prepared.about, wanted, partial(map, prepared.row), on_row)
    shutil.rmtree(states, ignore_errors=True)
    return measured


def prepare(
    name: str,
    model: nn.Module,
    stream: TokenStream,
    model_name: str,
    windows: int | None = 256,
    length: int = LENGTH,
    calibration: Calibration | None = None,
    short: bool = False,
    texts: finetuning.Texts | None = None,
    on_step: finetuning.OnStep = lambda step, loss: None,
    tokenizer: Any = None,
    states: Path = Path(),
) -> Prepared:
    """Evaluate the model as it is, and get ready for the rows of the sweep `name`.

    calibration: gives the text for the methods that need it. short: fewer settings, for a model larger than the course's.
    texts: gives those to train on, for a sweep of LEARNING, which keeps the states of its training in the folder `states`.
    on_step(step, loss) is called while it trains. tokenizer: of the stream, for tasks that are read off its text.
    Raises ValueError for an unknown sweep, and for one that needs what is not given.
    """
    sweeps = SHORT_SWEEPS if short else SWEEPS
    if name not in sweeps:
        raise ValueError(f"sweep is {name!r}, wanted one of {', '.join(sweeps)}")
    parameter = next(model.parameters())
    compared = None
    if name == "shootout":
        arguments = partial(_arguments, name, model, calibration=calibration)
        compared = shootout.Rows(model, stream, arguments, tokenizer, length, windows)
    baseline = evaluate(model, stream, length, windows) if compared is None else compared.reference.evaluation
    about = {
        "sweep": name, "command": _command(name, windows, model_name if short else None, stream.source),
        "model": model_name,
        "model_sha256": model_digest(model),
        "text": stream.source, "text_sha256": stream.sha256, "windows": baseline.windows, "length": length,
        "tokens": baseline.tokens.tolist(),
        "baseline_perplexity": baseline.perplexity, "baseline_bits_per_byte": baseline.bits_per_byte,
        "python": platform.python_version(), "torch": torch.__version__,
        "device": parameter.device.type, "dtype": str(parameter.dtype).removeprefix("torch."),
        "processor": _processor(parameter.device), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    learning = None
    if name in LEARNING:
        if texts is None:
            raise ValueError(f"texts is missing, and the sweep {name!r} trains on them")
        learning = LEARNING[name](finetuning.Given(model, stream, texts, length, windows, states, on_step))
        about |= learning.about
    if compared is not None:
        about |= compared.about
    settings = list(sweeps[name](model))
    ids = stream.ids[stream.positions(length, windows)]
    # No block is run before its row is asked for, and then those before it as well.
    blocks = _blocks(name, model, ids, settings[0], calibration) if name in BY_BLOCK else iter(())

    def row(setting: Row) -> Row:
        if compared is not None:
            return compared.row(setting)
        if learning is not None:
            return learning.row(setting)
        if "layer" in setting:
            return _measure_layer(model, stream, length, windows, setting)
        if name in BY_BLOCK:
            return next(row for row in blocks if row["block"] == setting["block"])
        if name == "kv":
            return _measure_cache(model, stream, length, windows, baseline, setting, calibration)
        return _measure(_arguments(name, model, setting, calibration), stream, length, windows, baseline, setting)

    return Prepared(about, settings, row)


def collect(
    path: Path,
    about: dict[str, Any],
    wanted: Sequence[Row],
    measure: Callable[[list[Row]], Iterable[Row]],
    on_row: OnRow = lambda done, total: None,
) -> Measurements:
    """The rows of the settings `wanted`: those that `path` holds, and those that `measure` gives of the others, in any order.

    The file is written after each. Raises ValueError where `path` holds rows of another model, text, length or kind of device.
    """
    rows: list[Row] = []
    if path.exists():
        about_before, rows = measurements.read(path)
        other = [key for key in IDENTITY if about_before.get(key) != about.get(key)]
        if other:
            raise ValueError(f"{path} holds rows measured with another {', '.join(other)}: choose another file or delete it")
    places = {_key(setting): place for place, setting in enumerate(wanted)}
    there = {_key(setting_of(row)) for row in rows}
    missing = [setting for setting in wanted if _key(setting) not in there]
    on_row(len(wanted) - len(missing), len(wanted))
    for number, row in enumerate(measure(missing), len(wanted) - len(missing) + 1):
        rows.append(row)
        rows.sort(key=lambda row: places.get(_key(setting_of(row)), -1))  # rows of other settings come first
        measurements.write(path, about, rows)
        on_row(number, len(wanted))
    return Measurements(about, rows)


def _key(setting: Row) -> str:
    return json.dumps(setting, sort_keys=True)


def _blocks(
    name: str, model: nn.Module, ids: torch.Tensor, setting: dict[str, Any], calibration: Calibration | None
) -> Iterator[dict[str, Any]]:
    """The rows of a sweep of BY_BLOCK."""
    if name == "sink":
        return sink.rows(model, ids)
    seen = _needed(calibration, name)("code", SAMPLES)
    return positions.rows(model, seen, ids, setting["bits"], setting["group_size"])


def _needed(calibration: Calibration | None, name: str) -> Calibration:
    if calibration is None:
        raise ValueError(f"calibration is missing, and the sweep {name!r} has rows that need it")
    return calibration


def _processor(device: torch.device) -> str:
    """What the name of the device type leaves open: which GPU, or how many threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _command(name: str, windows: int | None, model: str | None, source: str) -> str:
    """The command that measures these rows. model: None for the course model. source: of the text, "wiki/heldout"."""
    text = source.rsplit("/", 1)[0]
    return f"labs sweep {name} --windows {windows}" + f" --model {model}" * bool(model) + f" --text {text}" * (text != "code")


def _measure(arguments, stream, length, windows, baseline, setting) -> dict[str, Any]:
    quantized, report = quantize_model(**arguments)
    result = evaluate(quantized, stream, length, windows)
    change = paired_bootstrap(baseline, result)
    return {
        **setting, "bits_per_weight": report.bits_per_weight, "nbytes": report.nbytes, "perplexity": result.perplexity,
        "seconds": round(sum(layer.seconds for layer in report.layers.values()), 2),
        "change": change.change, "low": change.low, "high": change.high,
        "loss": [round(nats, 4) for nats in result.loss.tolist()],  # of each document, so that rows can be paired
    }  # fmt: skip


def _arguments(name: str, model: nn.Module, setting: dict[str, Any], calibration: Calibration | None) -> dict[str, Any]:
    """A row's setting as what `quantize_model` takes."""
    arguments = {"model": model, "method": name, **setting}
    if planted := arguments.pop("planted", None):
        arguments["model"] = models.plant_outliers(model, factor=planted)
    if arguments.get("group_size") == "row":
        arguments["group_size"] = None
    if samples := arguments.pop("samples", None):
        arguments["calibration"] = _needed(calibration, name)(arguments.pop("text", "code"), samples)
    if stored := arguments.pop("absmax", None):
        arguments |= {"double_quant": True} if stored == "double" else {"absmax_dtype": getattr(torch, stored)}
    return arguments


def _measure_layer(model, stream, length, windows, setting) -> dict[str, Any]:
    """A divergence and not a loss: one linear moves the loss by less than the choice of text does."""
    group_size = None if setting["group_size"] == "row" else setting["group_size"]
    others = {name: None for name in opened.linears(model) if name != setting["layer"]}
    quantized, report = quantize_model(model, "rtn", bits=setting["bits"], group_size=group_size, overrides=others)
    kl, agreement = divergence(model, quantized, stream, length, windows)
    return {**setting, "nbytes": report.layers[setting["layer"]].nbytes, "kl": kl, "agreement": agreement}


def scheme_of(setting: dict[str, Any]) -> Scheme:
    """How the cache of a row of the sweep "kv" is stored: groups of 32."""
    residual = setting.get("residual", 0)
    parts = []
    for bits, axis in ((setting["keys"], setting.get("key_axis")), (setting["values"], setting.get("value_axis"))):
        waits = bits not in (16, "fp8") and "residual" not in setting
        parts.append(Part(bits, axis or "token", 32, residual, block=32 if waits else None))
    return Scheme(*parts, before_rope=bool(setting.get("before_rope")))


def _measure_cache(model, stream, length, windows, baseline, setting, calibration) -> dict[str, Any]:
    from labsupport.pipeline.cache import evaluate_cached, losses_by_place

    if weights := setting["weights"]:
        method, bits = weights[:-1], int(weights[-1])
        given = {"calibration": calibration("code", 64)} if METHODS[method].needs_text else {}
        model = quantize_model(model, method, bits=bits, **given)[0]
    if setting["planted"]:
        model = models.plant_key_outliers(model)
    shape, scheme = Shape.of(model.config), scheme_of(setting)
    if bins := setting.get("bins"):
        nats = losses_by_place(model, stream, scheme, bins, length, windows)
        return {**setting, "by_window": [[round(x, 4) for x in window] for window in nats.tolist()]}  # nats of each bin
    nbytes = cache_bytes(shape, length, 1, scheme)
    result = evaluate_cached(model, stream, scheme, length, windows)
    change = paired_bootstrap(baseline, result)
    return {
        **setting, "bits_per_value": 16 * nbytes / cache_bytes(shape, length), "nbytes": nbytes,
        "perplexity": result.perplexity, "change": change.change, "low": change.low, "high": change.high,
        "loss": [round(nats, 4) for nats in result.loss.tolist()],
    }  # fmt: skip
