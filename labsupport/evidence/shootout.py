"""All methods on one axis of stored bytes: the rows of `labs sweep shootout`, for notebook 14.

A row's setting is what `quantize_model` takes, and
  planted    None, or the factor of the outlier channels that were planted (models.plant_outliers); the float function is the same
  method     of METHODS, or "float": nothing is quantized
  samples    windows of calibration text, for a method that needs text
  embedding  bits of the embedding and the output head, rounded to nearest in groups of EMBEDDING_GROUP; 16 where it is not there
"awq" with `base` "gptq" is GPTQ of the weights that AWQ scaled; "gptq" with `token_weights` "attention" counts by who listens.

What was measured:
  nbytes                    stored bytes of the whole model: linears as stored, all else in 16 bits but a rounded embedding
  linear_nbytes, bits_per_weight        of the matrices of the blocks alone
  perplexity, change, low, high, loss   as in every sweep; change: from the float model; loss: nats of each document
  kl_mean, kl_median, kl_p999           KL(float || this model) in nats, over all predicted tokens
  kl_by_document            its sum over the tokens of each document
  agreement, agreed_by_document         on how many tokens both rank the same one first: the share, and counts
  identifiers, copies, parses           the share of items done of each task (see evidence.tasks); None for one without items
  done                      by task, which items are done, as hexadecimal digits: see `unpack`
  seconds                   of the whole row; quantizing: of those, what the method took
  versions                  of Python, torch, transformers and labsupport, with which this row was measured
All lists by document are in the order of the text, as `about["tokens"]` is, which says how many tokens each document has.
Intervals cover 95 % (evaluate.covering_level): `about["percentiles"]` is the level of the percentiles that do.
`Measurements.paired` and `Measurements.difference` compare rows, those of two files as well where the text is the same.
`about["items"]` says by task how many items each document has: the items of a row are in that order.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labsupport import __version__
from labsupport.evidence.tasks import Tasks
from labsupport.model import models, opened
from labsupport.model.comparison import Comparison, Reference
from labsupport.model.evaluate import LENGTH, covering_level, paired_bootstrap
from labsupport.model.text import TokenStream
from labsupport.pipeline.methods import method_named
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant import checks, grid, rtn

TASKS = ("identifiers", "copies", "parses")
MEASURED = (
    "linear_nbytes", "kl_mean", "kl_median", "kl_p999", "kl_by_document", "agreed_by_document", *TASKS, "done", "quantizing",
    "versions",
)  # fmt: skip
PER_TOKEN = {"loss": "loss", "kl_mean": "kl_by_document", "agreement": "agreed_by_document"}  # and where its sums are
METRICS = (*PER_TOKEN, *TASKS)
TO_FLOAT = ("kl_mean", "agreement")  # these compare with the float model that a row was made from
FLOAT = "float"
EMBEDDING_GROUP = 64
EMBEDDING_BITS = (8, 4)
SAMPLES, SAMPLES_SHORT = 32, 16  # 32 as in the sweep "qat"
PLANTED = 8
COLUMNS: dict[str, Any] = {"method": "gptq"}  # GPTQ in the order of the columns
ORDERED = COLUMNS | {"act_order": True, "static_groups": True}
LISTENED = ORDERED | {"token_weights": "attention"}
AWQ: dict[str, Any] = {"method": "awq"}
BOTH = AWQ | {"base": "gptq"}
NF4: dict[str, Any] = {"method": "nf4", "codebook": "nf4", "block_size": 64, "absmax": "double"}
# Keys of a setting that are not the method's own.
OWN = ("planted", "method", "samples", "text", "embedding", "absmax")


def settings(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The grid of the course model: as trained, then with planted outliers."""
    usual = models.group_size(model)
    as_trained = {"planted": None}

    def rtn(bits: int, size: int | str, **more: Any) -> dict[str, Any]:
        return {"method": "rtn", "bits": bits, "group_size": size} | more

    def calibrated(method: Mapping[str, Any], bits: int, size: int | str, **more: Any) -> dict[str, Any]:
        return dict(method) | {"bits": bits, "group_size": size, "samples": SAMPLES} | more

    yield as_trained | {"method": FLOAT}
    for bits, size in ((8, "row"), (8, usual), (6, usual), (5, usual)):
        yield as_trained | rtn(bits, size)
    for bits in (4, 3, 2):
        for size in (32, 64, usual, "row"):
            yield as_trained | rtn(bits, size)
    for bits in (4, 3):
        yield as_trained | rtn(bits, usual, symmetric=True)
    for block, absmax in ((64, "double"), (64, "float32"), (128, "double")):
        yield as_trained | NF4 | {"block_size": block, "absmax": absmax}
    yield from (as_trained | setting for setting in _int8())
    for bits in (4, 3, 2):
        for size in (32, 64, usual, "row"):
            yield as_trained | calibrated(COLUMNS, bits, size)
        for size in (32, usual):
            yield as_trained | calibrated(ORDERED, bits, size)
        yield as_trained | calibrated(LISTENED, bits, usual)
        for size in (32, 64, usual, "row"):
            yield as_trained | calibrated(AWQ, bits, size)
        for size in (32, usual):
            yield as_trained | calibrated(BOTH, bits, size)
    # A smaller embedding: at a few bits it is most of the course model.
    for embedding in EMBEDDING_BITS:
        yield as_trained | {"method": FLOAT, "embedding": embedding}
        yield as_trained | rtn(8, usual, embedding=embedding)
        for bits in (4, 3, 2):
            yield as_trained | rtn(bits, usual, embedding=embedding)
            yield as_trained | calibrated(ORDERED, bits, usual, embedding=embedding)
    planted = {"planted": PLANTED}
    yield planted | {"method": FLOAT}
    for bits, size in ((8, "row"), (4, 32), (4, usual), (3, 32), (3, usual)):
        yield planted | rtn(bits, size)
    yield planted | NF4
    yield from (planted | setting for setting in _int8())
    for bits in (4, 3):
        for method in (COLUMNS, ORDERED, LISTENED, AWQ, BOTH):
            yield planted | calibrated(method, bits, usual)
        yield planted | calibrated(AWQ, bits, 32)


def settings_short(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The grid of another model."""
    usual = models.group_size(model)
    as_trained = {"planted": None}
    yield as_trained | {"method": FLOAT}
    for bits, size in ((8, "row"), (8, usual), (4, 32), (4, usual), (4, "row"), (3, 32), (3, usual)):
        yield as_trained | {"method": "rtn", "bits": bits, "group_size": size}
    yield as_trained | NF4
    for bits in (4, 3):
        for method in (COLUMNS, ORDERED, LISTENED, AWQ, BOTH):
            yield as_trained | dict(method) | {"bits": bits, "group_size": usual, "samples": SAMPLES_SHORT}
    for embedding in EMBEDDING_BITS:
        yield as_trained | {"method": "rtn", "bits": 8, "group_size": usual, "embedding": embedding}
        yield as_trained | {"method": "rtn", "bits": 4, "group_size": usual, "embedding": embedding}
        yield as_trained | dict(ORDERED) | {"bits": 4, "group_size": usual, "samples": SAMPLES_SHORT, "embedding": embedding}


def _int8() -> Iterator[dict[str, Any]]:
    yield {"method": "int8-weights", "granularity": "row"}
    for threshold in (0.0, 6.0):
        yield {"method": "int8", "granularity": "row", "threshold": threshold}


def check(setting: Any) -> dict[str, Any]:
    """A setting from outside, as it is. Raises ValueError where it cannot be one of this sweep."""
    if not isinstance(setting, dict) or "method" not in setting:
        raise ValueError(f"a configuration is {setting!r}, wanted a mapping with a method, such as {{method: rtn, bits: 4}}")
    own = {key: value for key, value in setting.items() if key not in OWN}
    method = setting["method"]
    if method == FLOAT:
        if own:
            raise ValueError(f"{next(iter(own))} is given, but float takes no settings but embedding")
    else:
        record = method_named(method)
        record.check(own)
        if record.needs_text != ("samples" in setting):
            raise ValueError(
                f"samples is {'missing' if record.needs_text else 'given'} in {setting}: wanted for a method with text"
            )
    if "embedding" in setting:
        checks.whole(setting["embedding"], "embedding", 2, 8)
    return setting


def read_settings(path: Path) -> list[dict[str, Any]]:
    """A list of settings from a JSON or YAML file. Raises ValueError for another file, and for what `check` refuses; OSError."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} holds {checks.kind(content)}, wanted a list of settings")
    chosen = [check({"planted": None} | setting if isinstance(setting, dict) else setting) for setting in content]
    if twice := next((setting for number, setting in enumerate(chosen) if setting in chosen[:number]), None):
        raise ValueError(f"{path} holds {twice} twice")
    return chosen


def pack(done: Iterable[bool]) -> str:
    """0 and 1 of each item as hexadecimal digits, the first item in the highest bit of the first digit, filled up with zeros."""
    digits = "".join(str(int(item)) for item in done)
    digits += "0" * (-len(digits) % 4)
    return "".join(f"{int(digits[place : place + 4], 2):x}" for place in range(0, len(digits), 4))


def unpack(digits: str, items: int) -> list[bool]:
    """What `pack` packed."""
    return [bit == "1" for digit in digits for bit in f"{int(digit, 16):04b}"][:items]


def by_document(about: Mapping[str, Any], row: Mapping[str, Any], metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one of METRICS: its sum over each document, float64 [documents], and of how many tokens or items that is, int64.

    Raises ValueError for another metric, and for a task for which the text has no item.
    """
    tokens = torch.tensor(about["tokens"])
    if metric in PER_TOKEN:
        return torch.tensor(row[PER_TOKEN[metric]], dtype=torch.float64), tokens
    if metric not in TASKS or not sum(about["items"].get(metric, ())):
        there = [*PER_TOKEN, *(task for task in TASKS if sum(about["items"].get(task, ())))]
        raise ValueError(f"metric is {metric!r}, wanted one of {', '.join(there)}")
    counts = torch.tensor(about["items"][metric])
    done = torch.tensor(unpack(row["done"][metric], int(counts.sum())), dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return torch.zeros(len(counts), dtype=torch.float64).index_add_(0, owner, done), counts


class Rows:
    """Makes rows, each by itself. arguments: from a setting to what quantize_model takes, see sweep._arguments."""

    def __init__(
        self,
        model: nn.Module,
        stream: TokenStream,
        arguments: Callable[[dict[str, Any]], dict[str, Any]],
        tokenizer: Any = None,
        length: int = LENGTH,
        windows: int | None = None,
    ):
        self.model, self.arguments = model, arguments
        self.reference = Reference(model, stream, length, windows)
        self.tasks = None if tokenizer is None else Tasks(tokenizer, stream, length, windows)
        self.documents = len(stream.names)

    @property
    def about(self) -> dict[str, Any]:
        """What a file of these rows says beside what every sweep says."""
        items = {} if self.tasks is None else self.tasks.documents
        counts = {task: torch.bincount(torch.tensor(of, dtype=torch.int64), minlength=self.documents) for task, of in items.items()}
        return {
            "items": {task: count.tolist() for task, count in counts.items()},
            "percentiles": covering_level(self.reference.evaluation.tokens),
        }

    def row(self, setting: dict[str, Any]) -> dict[str, Any]:
        start = time.process_time()
        model, linear, nbytes = self._model(setting)
        quantizing = time.process_time() - start
        compared = self.reference.compare(model)
        done = {} if self.tasks is None else self.tasks.done(model, compared)
        measured = self._scores(compared) | {task: _share(done.get(task)) for task in TASKS}
        measured |= {"done": {task: pack(items) for task, items in done.items()}}
        return setting | {"bits_per_weight": linear[1], "linear_nbytes": linear[0], "nbytes": nbytes} | measured | {
            "quantizing": round(quantizing, 2), "seconds": round(time.process_time() - start, 2), "versions": versions(),
        }  # fmt: skip

    def _scores(self, compared: Comparison) -> dict[str, Any]:
        result = compared.evaluation
        change = paired_bootstrap(self.reference.evaluation, result, level=self.about["percentiles"])
        return {
            "perplexity": result.perplexity, "change": change.change, "low": change.low, "high": change.high,
            "loss": [round(nats, 4) for nats in result.loss.tolist()],
            "kl_mean": compared.kl_mean, "kl_median": compared.kl_median, "kl_p999": compared.kl_p999,
            "kl_by_document": [round(nats, 4) for nats in compared.by_document(compared.kl).tolist()],
            "agreement": compared.agreement,
            "agreed_by_document": [int(count) for count in compared.by_document(compared.agrees).tolist()],
        }  # fmt: skip

    def _model(self, setting: dict[str, Any]) -> tuple[nn.Module, tuple[int, float], int]:
        """The model of a row; bytes and bits a weight of its blocks' matrices; bytes of it all."""
        setting = dict(setting)
        bits = setting.pop("embedding", 16)
        arguments = self.arguments(setting)
        model = models.duplicate(arguments.pop("model"))
        saved = 0 if bits == 16 else round_embedding(model, bits)
        weights = sum(p.numel() for p in model.parameters())  # a tied weight once
        if arguments["method"] == FLOAT:
            matrices = sum(layer.weight.numel() for layer in opened.linears(model).values())
            matrices += sum(models.left_in_float(model).values())
            return model, (2 * matrices, 16.0), 2 * weights - saved
        quantized, report = quantize_model(model, **arguments, in_place=True)
        others = weights - report.weights - sum(report.left_in_float.values())
        return quantized, (report.nbytes, report.bits_per_weight), report.nbytes + 2 * others - saved


def _share(done: list[bool] | None) -> float | None:
    return sum(done) / len(done) if done else None


@torch.no_grad()
def round_embedding(model: nn.Module, bits: int) -> int:
    """Round the embedding to nearest, in place, and the output head where it is another weight; return the bytes that it saves.

    Asymmetric, groups of EMBEDDING_GROUP or the largest below it that fits. Raises ValueError for bits that rtn does not take.
    """
    saved, seen = 0, set()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is None or models.address(module.weight) in seen:
            continue
        weight = module.weight
        stored = rtn.quantize(weight, bits=bits, group_size=grid.largest_group_size([weight.shape[1]], EMBEDDING_GROUP))
        weight.copy_(stored.dequantize())
        saved += 2 * weight.numel() - stored.nbytes
        seen.add(models.address(weight))
    return saved


def versions() -> dict[str, str]:
    import transformers

    return {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "labsupport": __version__,
    }  # fmt: skip
