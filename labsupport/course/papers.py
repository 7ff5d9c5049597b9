"""Tables of papers, measured again: `labs paper`. What a paper prints stands in data/papers.yaml, with table and page.

A model is never in memory as a whole: it is read, quantized and evaluated a block at a time, and the finished blocks of a row are
kept in a folder until its perplexity is known. So a run that was stopped goes on after the last finished block.
"""

from __future__ import annotations

import datetime
import hashlib
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from labsupport.checkpoint.measure import evaluate_streamed
from labsupport.checkpoint.skeleton import Skeleton
from labsupport.checkpoint.tokenizers import COPIED, read_tokenizer
from labsupport.checkpoint.weights import find
from labsupport.evidence import machine, sweep
from labsupport.install import get_extra
from labsupport.model import files, hub, models, text
from labsupport.model.text import Document, TextError, TokenStream
from labsupport.pipeline.block import Block
from labsupport.pipeline.driver import quantize_blocks
from labsupport.pipeline.finished import FinishedBlocks
from labsupport.pipeline.methods import METHODS
from labsupport.quant import checks

QUICK_WINDOWS, QUICK_SAMPLES = 8, 16
SEED = 0
# Hub id, what to load of it, split. C4's first file alone: the whole has 1,024.
DATASETS: dict[str, tuple[str, dict[str, Any], str]] = {
    "wikitext": ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}, "test"),
    "c4": ("allenai/c4", {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "streaming": True}, "train"),
    "pile": ("mit-han-lab/pile-val-backup", {"streaming": True}, "validation"),
}
KEYS = {"name", "paper", "table", "page", "read_in", "model", "text", "length", "calibration", "differs", "rows"}
OnBlock = Callable[[int, int], None]  # blocks that are done, of how many


class PaperError(ValueError):
    """A table is unknown, or cannot be measured. The message is one line."""


@dataclass(frozen=True)
class Calibration:
    """text: one of DATASETS. cut: see data/papers.yaml. samples: windows of `length` tokens."""

    text: str
    cut: Literal["segments", "joined"]
    samples: int
    length: int


@dataclass(frozen=True)
class Table:
    """A table of a paper; see data/papers.yaml. rows: settings of each, {} for the model in 16 bits, and the printed perplexity."""

    name: str
    paper: str
    table: int
    page: int
    read_in: str
    model: str
    text: str
    length: int
    calibration: Calibration
    differs: tuple[str, ...]
    rows: tuple[tuple[dict[str, Any], float], ...]

    @property
    def source(self) -> str:
        return f"{self.paper}, table {self.table}, page {self.page}"

    def published(self, setting: dict[str, Any]) -> float:
        return next(value for other, value in self.rows if other == setting)


@cache
def tables() -> dict[str, Table]:
    """All of data/papers.yaml by name. Raises PaperError for one that is not as it should be."""
    import yaml

    found = {}
    for row in yaml.safe_load((models.data_dir() / "papers.yaml").read_text("utf-8")):
        if row.keys() != KEYS:
            raise PaperError(f"data/papers.yaml: {row.get('name')} has {sorted(row.keys() ^ KEYS)} too many or too few")
        rows = tuple(({k: v for k, v in each.items() if k != "perplexity"}, float(each["perplexity"])) for each in row["rows"])
        parts = {"calibration": Calibration(**row["calibration"]), "differs": tuple(row["differs"]), "rows": rows}
        found[row["name"]] = Table(**row | parts)
    return found


def table_named(name: str) -> Table:
    if name not in tables():
        raise PaperError(f"table is {name!r}, wanted one of {', '.join(tables())}")
    return tables()[name]


@dataclass(frozen=True)
class Job:
    """What to measure: a table, on its own model and texts or on others. windows, samples: fewer than the paper's, None for all.

    model: a directory or an id in place of the table's. text, calibration: directories, files of text or names of text.NAMES.
    """

    table: Table
    model: str | None = None
    text: str | None = None
    calibration: str | None = None
    windows: int | None = None
    samples: int | None = None
    device: str | None = None

    @property
    def differs(self) -> list[str]:
        """What is not as in the paper, a sentence each."""
        table, said = self.table, list(self.table.differs)
        if self.model:
            said.insert(0, f"the model is {Path(self.model).name}, the paper's figures are of {table.model}: they need not be near")
        if self.text:
            said.insert(0, f"the text is {self.text}, not {table.text}: no perplexity here can be compared with the paper's")
        if self.calibration or self.text:
            said.append(f"the text to calibrate on is {self.calibration or self.text}, not {table.calibration.text}")
        if self.windows:
            said.append(f"at most {self.windows} windows of the text are looked at, the paper took all")
        if self.samples and self.samples < table.calibration.samples:
            said.append(f"{self.samples} windows to calibrate on, the paper had {table.calibration.samples}")
        return said

    def open(self) -> Opened:
        """Find the model and its texts, downloading what is of the hub. Raises PaperError, or what reading the files raises."""
        source = find(self.model or self.table.model, COPIED)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        skeleton, tokenizer = Skeleton(source, device), read_tokenizer(source)
        if tokenizer is None:
            raise PaperError(f"{source} holds no tokenizer, and without one no text can be read")
        length = self.table.length
        longest = getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", None) or length
        if length > longest:
            raise PaperError(f"the table's windows have {length} tokens, and the model in {source} has {longest} positions")
        stream = _joined(tokenizer, _documents(self.text or self.table.text, "heldout"), self.text or self.table.text)
        return Opened(self, source, skeleton, tokenizer, stream)


@dataclass(frozen=True)
class Opened:
    """A job with its model, a skeleton whose weights are read block by block, and its text."""

    job: Job
    source: Path
    skeleton: Skeleton
    tokenizer: Any
    stream: TokenStream

    @property
    def settings(self) -> list[dict[str, Any]]:
        return [setting for setting, _ in self.job.table.rows]

    @property
    def windows(self) -> int:
        return len(self.stream.windows(self.job.table.length, self.job.windows))

    @property
    def about(self) -> dict[str, Any]:
        """What all rows are of, as a sweep has it."""
        table = self.job.table
        options = {"--model": self.job.model, "--text": self.job.text, "--calibration": self.job.calibration}
        options |= {"--windows": self.job.windows, "--samples": self.job.samples}
        given = "".join(f" {name} {value}" for name, value in options.items() if value)
        return {
            "sweep": f"paper {table.name}", "command": f"labs paper --table {table.name}{given}", "source": table.source,
            "model": self.job.model or table.model, "model_sha256": self.skeleton.weights.digest(),
            "text": self.stream.source, "text_sha256": self.stream.sha256, "windows": self.windows, "length": table.length,
            "items": [self.job.calibration or self.job.text or table.calibration.text, self.samples],
            "python": platform.python_version(), "torch": torch.__version__, "device": self.skeleton.device.type,
            "dtype": "float32", "date": datetime.date.today().isoformat(),
        }  # fmt: skip

    @property
    def samples(self) -> int:
        return self.job.samples or self.job.table.calibration.samples

    def seconds(self, rows: int) -> float:
        """About how long `rows` rows take on this machine, by the products that are computed at the rate of large ones."""
        config, table = self.skeleton.model.config.get_text_config(), self.job.table
        inside = sum(layer.weight.numel() for layer in models.linears(self.skeleton.model).values())
        head, hidden = models.vocabulary(self.skeleton.model) * config.hidden_size, config.hidden_size
        attention = 2 * config.num_hidden_layers * hidden * table.length  # of a token: scores and their sum, half of them masked
        evaluated = self.windows * table.length * (2 * (inside + head) + attention)
        # A calibrated row runs its text through each block twice, and sums up products of inputs of about the size of one pass.
        calibrated = 3 * self.samples * table.calibration.length * (2 * inside + attention)
        needing = sum(bool(s) and METHODS[s["method"]].needs_text for s in self.settings) / len(self.settings)
        return rows * (evaluated + needing * calibrated) / machine.matmul_rate(device=self.skeleton.device)

    @cached_property
    def ids(self) -> torch.Tensor:
        """The windows to calibrate on, int64 [samples, length]."""
        chosen, job = self.job.table.calibration, self.job
        name, local = job.calibration or job.text or chosen.text, bool(job.calibration or job.text)
        documents = _documents(name, "train")
        if local or chosen.cut == "joined":
            return _windows(self.tokenizer, documents, name, self.samples, chosen.length)
        return _segments(self.tokenizer, documents, name, self.samples, chosen.length)

    def row(self, setting: dict[str, Any], folder: Path, on_block: OnBlock) -> dict[str, Any]:
        """A row: the setting, perplexity, seconds. folder: for finished blocks; gone when the row is there."""
        start, skeleton, table = time.perf_counter(), self.skeleton, self.job.table
        blocks, done = len(skeleton.blocks), 0
        passes = 2 if setting else 1

        def at_block(block: Block, kept: FinishedBlocks | None = None) -> None:
            nonlocal done
            if kept is not None and kept.read(block) is None:
                raise PaperError(f"a file in {kept.folder} is not what was written to it: delete the folder and run again")
            done += 1
            on_block(done, passes * blocks)

        kept = None
        if setting:
            method = METHODS[setting["method"]]
            own = {key: value for key, value in setting.items() if key != "method"} | {"group_size": setting.get("group_size")}
            ids = self.ids if method.needs_text else None
            of_text = None if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest()
            kept = FinishedBlocks(folder, {"of": skeleton.weights.digest(), "setting": setting, "text": of_text})
            last = set({models.short(name).partition(".")[0]: name for name in models.linears(skeleton.model)}.values())

            def on_linear(name: str) -> None:
                nonlocal done
                if name in last:
                    done += 1
                    on_block(done, passes * blocks)

            quantize_blocks(skeleton.model, method, lambda name: own, ids, kept, on_linear, skeleton)
        found = evaluate_streamed(
            skeleton.model, skeleton, self.stream, table.length, self.job.windows, partial(at_block, kept=kept)
        )
        shutil.rmtree(folder, ignore_errors=True)
        return {**setting, "perplexity": found.perplexity, "seconds": round(time.perf_counter() - start, 1)}

    def run(self, path: Path, on_row: sweep.OnRow = lambda done, total: None, on_block: OnBlock = lambda done, total: None):
        """All rows of the table: those that `path` has, and the others, each written as it is there. Returns sweep.Measurements."""
        files.check_writable(path)

        def measured(missing: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for setting in missing:
                place = path.with_name(f".{path.stem}-{'-'.join(map(str, setting.values())) or 'float'}")
                yield self.row(setting, place, on_block)

        return sweep.collect(path, self.about, self.settings, measured, on_row)


def _documents(name: str, split: str) -> Iterator[Document]:
    """Of one of DATASETS, or of a text on this machine: a directory, a file, or one of text.NAMES."""
    if name in DATASETS:
        yield from _of_hub(name)
    elif Path(name).is_file():
        yield Document(Path(name).name, Path(name).read_text("utf-8"))
    elif name in text.NAMES or all((Path(name) / each).is_dir() for each in text.SPLITS):
        yield from text.documents(name, split)
    elif Path(name).is_dir():
        yield from text.directory(Path(name))
    else:
        raise TextError(f"the text {name!r} is neither a directory, nor a file, nor one of {', '.join((*DATASETS, *text.NAMES))}")


def _of_hub(name: str) -> Iterator[Document]:
    """Rows of a dataset as they come. Raises PaperError where the hub does not give it."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise PaperError(f"the text {name!r} comes from the Hugging Face hub: {get_extra('hub')}") from error
    path, which, split = DATASETS[name]
    try:
        hub.check_reached(path)
        with hub.quiet():
            rows = load_dataset(path, split=split, **which)
            if name == "wikitext":  # a line a row; joined they are the text that published perplexities are of
                yield Document(f"{name}:{split}", "\n\n".join(rows["text"]))
                return
            for number, row in enumerate(rows):
                yield Document(f"{name}:{split}/{number}", row["text"])
    except hub.HubError as error:
        raise PaperError(f"the text {name!r} cannot be had, since {error}: --text and --calibration take one of yours") from error
    except Exception as error:  # of a network, a proxy, a server: each has its own
        raise PaperError(
            f"the text {name!r} cannot be read from the hub ({type(error).__name__}: {error})".splitlines()[0]
        ) from error


def _joined(tokenizer: Any, documents: Iterator[Document], name: str) -> TokenStream:
    """Documents as the papers' code reads them: one text, which begins with the token that the tokenizer puts before a text."""
    whole = "\n\n".join(document.text for document in documents)
    stream = text.tokenize(tokenizer, [Document(name, whole)], name)
    before = tokenizer("")["input_ids"][:1] if tokenizer.bos_token_id is not None else []
    ids = torch.cat([torch.tensor(before, dtype=torch.long), stream.ids[:-1]])  # the last is ours: it ends a document
    return TokenStream(ids, torch.zeros_like(ids), stream.names, stream.bytes, stream.sha256, name)


def _segments(tokenizer: Any, documents: Iterator[Document], name: str, samples: int, length: int) -> torch.Tensor:
    """A piece of each document that has more tokens than a window, from a place that is drawn. int64 [samples, length]."""
    generator, found = torch.Generator().manual_seed(SEED), list[torch.Tensor]()
    for document in documents:
        ids = torch.tensor(tokenizer(document.text, verbose=False)["input_ids"])
        if len(ids) > length:
            start = int(torch.randint(len(ids) - length, (1,), generator=generator))
            found.append(ids[start : start + length])
            if len(found) == samples:
                return torch.stack(found)
    raise TextError(
        f"the text {name!r} has {len(found)} documents of more than {length} tokens, fewer than the {samples} asked for"
    )


def _windows(tokenizer: Any, documents: Iterator[Document], name: str, samples: int, length: int) -> torch.Tensor:
    """The first windows of all documents, one after the other. int64 [samples, length]."""
    found, count = list[torch.Tensor](), 0
    for document in documents:
        found.append(torch.tensor(tokenizer(document.text, verbose=False)["input_ids"], dtype=torch.long))
        count += len(found[-1])
        if count >= checks.whole(samples, "samples") * length:
            return torch.cat(found)[: samples * length].view(samples, length)
    raise TextError(f"the text {name!r} has {count // length} windows of {length} tokens, fewer than the {samples} asked for")


def lines(job: Job, measured: sweep.Measurements) -> list[tuple[str, str, str, str]]:
    """A row of what, the paper's perplexity, ours, and the difference in percent, for each that is there."""
    found = []
    for row in measured.rows:
        setting = sweep.setting_of(row)
        paper = job.table.published(setting)
        groups = f", groups of {setting['group_size']}" if "group_size" in setting else ", a grid for each row"
        what = f"{setting['method'].upper()}, {setting['bits']} bits{groups}" if setting else "16 bits"
        ours = row["perplexity"]
        found.append((what, f"{paper:.4g}", f"{ours:.4g}", f"{100 * (ours / paper - 1):+.1f} %"))
    return found
