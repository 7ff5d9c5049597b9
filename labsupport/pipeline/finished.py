"""Finished blocks of a run, kept in a folder, so that a run that was stopped goes on after the last of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labsupport.model import files, models
from labsupport.pipeline.block import Block
from labsupport.pipeline.linear import LayerReport, Settings
from labsupport.quant.grid import QuantizedTensor


class FinishedBlocks:
    """run.json says what the blocks are of. Of each block, block-NNN.safetensors holds its weights as they have become, and
    block-NNN.json, written last, its reports and the checksums of its files: a block that has one is whole.

    folder: made before the first block is worked on. identity: all that the blocks depend on, by name. A class that stores blocks
    in another form overrides `is_done`, `files`, `save` and `restore`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object]):
        self.folder, self.identity = folder, {key: str(value) for key, value in identity.items()}
        self._begun = False

    def begin(self) -> None:
        """Make the folder ready. Raises ValueError where it holds blocks of another run, files.WriteError where it cannot be."""
        if self._begun:
            return
        about = self.folder / "run.json"
        with files.explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if about.is_file():
            self.check_same(about)
        else:
            files.write_text(about, json.dumps(self.identity, indent=1), sync=True)
        self._begun = True

    def check_same(self, about: Path) -> None:
        """Raise ValueError where run.json is of another run."""
        if json.loads(about.read_text(encoding="utf-8")) != self.identity:
            raise ValueError(f"{self.folder} holds blocks of another model, text or settings: choose another folder or delete it")

    def path(self, index: int, kind: str) -> Path:
        """The file of a block. kind: "json" or "safetensors"."""
        return self.folder / f"block-{index:03}.{kind}"

    def is_done(self, index: int) -> bool:
        return self.path(index, "json").exists()

    def read(self, block: Block) -> dict[str, LayerReport] | None:
        """Put back what a block has become and return its reports, by full name.

        None where it is not finished, or where its files are not as they were written: it is to be made again.
        """
        self.begin()
        if not self.is_done(block.index) or (kept := self._intact(block.index)) is None:
            return None
        self.check_source(block, kept["source"])
        self.restore(block)
        return {name: LayerReport(**row) for name, row in kept["reports"].items()}

    def _intact(self, index: int) -> dict[str, Any] | None:
        """What block-NNN.json holds, where the block's files have the checksums that stand in it."""
        try:
            kept = json.loads(self.path(index, "json").read_text("utf-8"))
            held = {path.name: file_digest(path) for path in self.files(index)}
            return kept if kept["sha256"] == held else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def check_source(self, block: Block, source: str) -> None:
        """Raise ValueError where a block was made of other weights than it now has. source: what source_of gave then."""

    def source_of(self, block: Block) -> str:
        """What the block's weights were read from, where the run's identity does not say it."""
        return ""

    def files(self, index: int) -> list[Path]:
        """Of a block, beside its reports."""
        return [self.path(index, "safetensors")]

    def write(self, block: Block, reports: Mapping[str, LayerReport], tensors: Mapping[str, QuantizedTensor]) -> None:
        """Keep a block. tensors: what is stored for its linears, which hold what it reads back as. Raises files.WriteError."""
        self.save(block, tensors)
        kept = {
            "reports": {name: asdict(report) for name, report in reports.items()},
            "sha256": {path.name: file_digest(path) for path in self.files(block.index)},
            "source": self.source_of(block),
        }
        files.write_text(self.path(block.index, "json"), json.dumps(kept), sync=True)

    def save(self, block: Block, tensors: Mapping[str, QuantizedTensor]) -> None:
        """Write all that a block has become."""
        files.save_tensors(self.path(block.index, "safetensors"), block.module.state_dict(), sync=True)

    def restore(self, block: Block) -> None:
        """Put back what `save` wrote."""
        from safetensors.torch import load_file

        block.module.load_state_dict(load_file(self.path(block.index, "safetensors")))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(model: nn.Module, method: str, ids: torch.Tensor | None, settings_of: Callable[[str], Settings | None]) -> str:
    """SHA-256 of what a run depends on: all weights, the text, the method and its settings for each linear."""
    content = hashlib.sha256(json.dumps([method, {n: settings_of(n) for n in models.linears(model)}], default=str).encode())
    for tensor in (*model.state_dict().values(), *([] if ids is None else [ids])):
        content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()
