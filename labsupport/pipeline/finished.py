"""Finished blocks of a run, kept in a folder, so that a run that was stopped goes on after the last of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from labsupport.model import files, models
from labsupport.pipeline.block import Block
from labsupport.pipeline.linear import LayerReport, Settings
from labsupport.quant.grid import QuantizedTensor


class FinishedBlocks:
    """run.json says what the blocks are of. Of each block, block-NNN.safetensors holds its weights as they have become, and
    block-NNN.json, written last, its reports: a block that has one is whole.

    folder: made before the first block is worked on. identity: all that the blocks depend on, by name. A class that stores blocks
    in another form overrides `is_done`, `save` and `restore`.
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
        if json.loads(about.read_text()) != self.identity:
            raise ValueError(f"{self.folder} holds blocks of another model, text or settings: choose another folder or delete it")

    def path(self, index: int, kind: str) -> Path:
        """The file of a block. kind: "json" or "safetensors"."""
        return self.folder / f"block-{index:03}.{kind}"

    def is_done(self, index: int) -> bool:
        return self.path(index, "json").exists()

    def read(self, block: Block) -> dict[str, LayerReport] | None:
        """Put back what a block has become and return its reports, by full name; None where it is not finished."""
        self.begin()
        if not self.is_done(block.index):
            return None
        self.restore(block)
        rows = json.loads(self.path(block.index, "json").read_text())
        return {name: LayerReport(**row) for name, row in rows.items()}

    def write(self, block: Block, reports: Mapping[str, LayerReport], tensors: Mapping[str, QuantizedTensor]) -> None:
        """Keep a block. tensors: what is stored for its linears, which hold what it reads back as. Raises files.WriteError."""
        self.save(block, tensors)
        rows = {name: asdict(report) for name, report in reports.items()}
        files.write_text(self.path(block.index, "json"), json.dumps(rows), sync=True)

    def save(self, block: Block, tensors: Mapping[str, QuantizedTensor]) -> None:
        """Write all that a block has become."""
        files.save_tensors(self.path(block.index, "safetensors"), block.module.state_dict(), sync=True)

    def restore(self, block: Block) -> None:
        """Put back what `save` wrote."""
        from safetensors.torch import load_file

        block.module.load_state_dict(load_file(self.path(block.index, "safetensors")))


def digest(model: nn.Module, method: str, ids: torch.Tensor | None, settings_of: Callable[[str], Settings | None]) -> str:
    """SHA-256 of what a run depends on: all weights, the text, the method and its settings for each linear."""
    content = hashlib.sha256(json.dumps([method, {n: settings_of(n) for n in models.linears(model)}], default=str).encode())
    for tensor in (*model.state_dict().values(), *([] if ids is None else [ids])):
        content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()
