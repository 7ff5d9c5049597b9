"""A directory that grows block by block beside where it will stand, OUT.partial, and appears there whole or not at all.

OUT.partial/model/   what OUT will hold: a file of tensors for each finished block, at the end everything else
OUT.partial/run/     what a run that was stopped needs to go on, and nobody else: settings, and of each block its report
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from labsupport.checkpoint import layouts, writing
from labsupport.checkpoint.weights import INDEX, CheckpointError, read_json
from labsupport.pipeline.calibrate import Block
from labsupport.pipeline.calibrated import LayerReport
from labsupport.quant.grid import QuantizedTensor

LOCK = "lock"
# What a run knows only by a digest, in words.
DIGESTS = {"model": "model, or of other files of this one", "config": "config.json", "calibration": "calibration text"}


class Parts:
    """Finished blocks of one run; what calibrated.quantize_blocks calls `keep`.

    identity: all that the blocks depend on, by name. names: of each block, its module's full name. Raises CheckpointError where
    `out` exists, where another run is at work, where OUT.partial is none of ours, and where it holds a run with another identity
    and not `restart`.
    """

    def __init__(
        self,
        out: Path,
        identity: Mapping[str, Any],
        layout: str,
        names: list[str],
        bits: int,
        dtype: torch.dtype,
        restart: bool = False,
    ):
        self.out, self.folder = out, out.with_name(out.name + ".partial")
        self.layout, self.names, self.bits, self.dtype = layout, names, bits, dtype
        self.model, self.run = self.folder / "model", self.folder / "run"
        check_free(out)
        with writing.told(self.folder):
            _check_ours(self.folder)
            self.run.mkdir(parents=True, exist_ok=True)
            self._lock = writing.lock(self.run / LOCK)  # before anything of an older run is touched
            try:
                self._begin({key: str(value) for key, value in identity.items()}, restart)
            except BaseException:
                self.release()
                raise

    def _begin(self, said: dict[str, str], restart: bool) -> None:
        about = self.run / "run.json"
        if restart or not about.is_file():
            if self.model.exists():
                writing.remove(self.model)
            for path in self.run.iterdir():
                if path.name != LOCK:
                    path.unlink()
        self.model.mkdir(exist_ok=True)
        if about.is_file():
            _check_same(read_json(about), said, self.folder)
        else:
            writing.replace(about, lambda path: path.write_text(json.dumps(said, indent=1)))

    def shard(self, index: int) -> Path:
        """The file of a block, or of everything outside the blocks for the index after the last."""
        return self.model / f"model-{index + 1:05}-of-{len(self.names) + 1:05}.safetensors"

    def _kept(self, index: int, kind: str) -> Path:
        return self.run / f"block-{index:03}.{kind}"

    def done(self) -> list[int]:
        """The finished blocks. A report alone, as a run leaves that was killed right after its last step, is none."""
        return [index for index in range(len(self.names)) if self._kept(index, "json").exists() and self.shard(index).exists()]

    def read(self, block: Block) -> dict[str, LayerReport] | None:
        """Put back what a block has become, as `write` found it. None where it is not finished."""
        if block.index not in self.done():
            return None
        report = self._kept(block.index, "json")
        tensors, start = load_file(self.shard(block.index)), self.names[block.index] + "."
        for name, layer in block.linears.items():
            state = {key.removeprefix(name + "."): value for key, value in tensors.items() if key.startswith(name + ".")}
            layer.weight.data.copy_(layouts.read(self.layout, name, state, self.bits).dequantize())
        # The other weights as they were, in float32: the file holds them rounded.
        own = block.module.state_dict()
        for name, value in load_file(self._kept(block.index, "safetensors")).items():
            own[name.removeprefix(start)].copy_(value)
        return {name: LayerReport(**row) for name, row in json.loads(report.read_text()).items()}

    def write(self, block: Block, reports: Mapping[str, LayerReport], stored: Mapping[str, QuantizedTensor]) -> None:
        """Keep a block. A report is written last: a block that has one is whole."""
        start = self.names[block.index] + "."
        others = {start + key: value.detach().cpu() for key, value in block.module.state_dict().items()}
        others = {key: value.contiguous() for key, value in others.items() if key.removesuffix(".weight") not in stored}
        tensors = self.rounded(others)
        for name, tensor in stored.items():
            tensors |= {key: value.cpu() for key, value in layouts.write(self.layout, name, tensor, self.dtype).items()}
        writing.save(self.shard(block.index), tensors)
        writing.save(self._kept(block.index, "safetensors"), others)
        rows = json.dumps({name: asdict(row) for name, row in reports.items()})
        writing.replace(self._kept(block.index, "json"), lambda path: path.write_text(rows))

    def write_outside(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Embedding, last norm, head: whatever is in no block."""
        writing.save(self.shard(len(self.names)), self.rounded(tensors))

    def rounded(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """In the dtype that they are stored in. Raises CheckpointError for what it does not hold."""
        found = {}
        for name, tensor in tensors.items():
            found[name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            if tensor.is_floating_point() and not found[name].isfinite().all():
                raise CheckpointError(
                    f"{name} holds values up to {tensor.abs().max():.3g}, which {self.dtype} does not: use bfloat16"
                )
        return found

    def reports(self) -> dict[str, LayerReport]:
        found = {}
        for index in self.done():
            found |= {name: LayerReport(**row) for name, row in json.loads(self._kept(index, "json").read_text()).items()}
        return found

    def finish(self, files: Mapping[str, str], copied: Mapping[str, Path]) -> Path:
        """Write the index and `files` (name to text), copy others, and let the directory appear. Returns it."""
        for path in self.model.iterdir():
            if path.suffix != ".safetensors":
                path.unlink()
        writing.replace(self.model / INDEX, lambda path: path.write_text(json.dumps(self._index(), indent=1)))
        for name, source in copied.items():
            writing.replace(self.model / name, lambda path, source=source: shutil.copyfile(source, path))
        for name, content in files.items():
            writing.replace(self.model / name, lambda path, content=content: path.write_text(content, "utf-8"))
        with writing.told(self.out):
            if self.out.exists():
                raise writing.WriteError(f"{self.out} exists by now: what was made for it is in {self.model}")
            os.rename(self.model, self.out)
        writing.remove(self.folder)
        self.release()
        return self.out

    def give_up(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def _index(self) -> dict[str, Any]:
        placed, size = {}, 0
        for index in range(len(self.names) + 1):
            path = self.shard(index)
            with safe_open(path, "pt") as file:
                placed |= dict.fromkeys(file.keys(), path.name)
            with path.open("rb") as stream:
                size += path.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
        return {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}

    def release(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def check_free(out: Path) -> None:
    """Raise CheckpointError where `out` exists, or cannot."""
    with writing.told(out):
        if out.exists() or out.is_symlink():
            raise CheckpointError(f"{out} exists: choose another directory or remove it")


def _check_ours(folder: Path) -> None:
    """Raise CheckpointError for what stands where a run is kept and is none: it is not ours to remove."""
    if not folder.exists():
        return
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    if held - {"model", "run"} or ("model" in held and not (folder / "run" / LOCK).exists()):
        raise CheckpointError(f"{folder} exists and is no unfinished run of labs quantize: move it, or choose another directory")


def _check_same(kept: Mapping[str, str], said: Mapping[str, str], folder: Path) -> None:
    for name in {**kept, **said}:
        was, asked = kept.get(name), said.get(name)
        if was != asked:
            differs = f"with {name} {was}, asked for is {asked}" if name not in DIGESTS else f"of another {DIGESTS[name]}"
            raise CheckpointError(f"{folder} holds an unfinished run {differs}: ask for that again, or start over with --restart")
