"""A directory that grows block by block beside where it will stand, OUT.partial, and appears there whole or not at all.

OUT.partial/model/   what OUT will hold: a file of tensors for each finished block, at the end everything else
OUT.partial/run/     what a run that was stopped needs to go on, and nobody else: see pipeline.finished
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from labsupport.checkpoint import layouts
from labsupport.checkpoint.weights import INDEX, CheckpointError, SourceChanged, Weights, read_json
from labsupport.model import files
from labsupport.pipeline.block import Block
from labsupport.pipeline.finished import FinishedBlocks
from labsupport.quant.grid import QuantizedTensor

LOCK = "lock"
# What run.json holds only a digest of, in words.
DIGESTS = {"model": "model, or of other files of this one", "config": "config.json", "calibration": "calibration text"}


class Parts(FinishedBlocks):
    """Finished blocks of one run as they will be stored: packed, everything else rounded to `dtype`.

    What is rounded is kept exactly as well, in the run's folder, for the blocks that come after. names: the full name of each
    block's module. to_file: from a name in the model to the one in the files. source_of: a digest of what a block was read from.
    Raises CheckpointError where `out` exists, where another run is at work, where OUT.partial is not an unfinished run, and where
    it holds a run with another identity and not `restart`; files.WriteError where it cannot be written.
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
        to_file: Callable[[str], str] = str,
        source_of: Callable[[Block], str] = lambda block: "",
    ):
        self.out, self.partial = out, out.with_name(out.name + ".partial")
        super().__init__(self.partial / "run", identity)
        self.layout, self.names, self.bits, self.dtype, self.to_file = layout, names, bits, dtype, to_file
        self.model, self._source_of = self.partial / "model", source_of
        check_free(out)
        with files.explained(self.partial):
            _check_ours(self.partial)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.folder / LOCK)  # before anything of an older run is touched
            try:
                self._sweep(restart)
                self.model.mkdir(exist_ok=True)
                self.begin()
            except BaseException:
                self.release()
                raise

    def _sweep(self, restart: bool) -> None:
        """Remove what an older run left: all of it where it is of no use, otherwise half-written files."""
        if restart or not (self.folder / "run.json").is_file():
            remove(self.model)
            for path in self.folder.iterdir():
                if path.name != LOCK:
                    path.unlink()
        for folder in (self.folder, self.model):
            for path in folder.glob(f".*{files.SUFFIX}"):
                path.unlink()

    def check_same(self, about: Path) -> None:
        kept = read_json(about)
        for name in {**kept, **self.identity}:
            before, now = kept.get(name), self.identity.get(name)
            if before != now:
                differs = f"of another {DIGESTS[name]}" if name in DIGESTS else f"with {name} {before}, asked for is {now}"
                raise CheckpointError(
                    f"{self.partial} holds an unfinished run {differs}: ask for that again, or start over with --restart"
                )

    def shard(self, index: int) -> Path:
        """The file of a block, or of everything outside the blocks for the index after the last."""
        return self.model / f"model-{index + 1:05}-of-{len(self.names) + 1:05}.safetensors"

    def is_done(self, index: int) -> bool:
        """A report alone, as a run leaves that was killed right after its last step, does not count."""
        return super().is_done(index) and self.shard(index).exists()

    def files(self, index: int) -> list[Path]:
        return [self.shard(index), self.path(index, "safetensors")]

    def source_of(self, block: Block) -> str:
        return self._source_of(block)

    def check_source(self, block: Block, source: str) -> None:
        if self.source_of(block) != source:
            raise SourceChanged(
                f"{self.partial} holds an unfinished run in which {self.names[block.index]} was made of other weights than the "
                "model's files now hold: bring those back, or start over with --restart"
            )

    def any_done(self) -> bool:
        return any(self.is_done(index) for index in range(len(self.names)))

    def save(self, block: Block, tensors: Mapping[str, QuantizedTensor]) -> None:
        start = self.names[block.index] + "."
        others = {start + key: value.detach().cpu() for key, value in block.module.state_dict().items()}
        others = {key: value for key, value in others.items() if key.removesuffix(".weight") not in tensors}
        packed = self.rounded(others)
        for name, tensor in tensors.items():
            packed |= {key: value.cpu() for key, value in layouts.write(self.layout, name, tensor, self.dtype).items()}
        self._save(self.shard(block.index), {self.to_file(name): value for name, value in packed.items()})
        self._save(self.path(block.index, "safetensors"), others)

    def restore(self, block: Block) -> None:
        packed, start = load_file(self.shard(block.index)), self.names[block.index] + "."
        for name, layer in block.linears.items():
            prefix = self.to_file(name) + "."
            state = {key.removeprefix(prefix): value for key, value in packed.items() if key.startswith(prefix)}
            layer.weight.data.copy_(layouts.read(self.layout, name, state, self.bits).dequantize())
        # The other weights as they were, in float32: the shard holds them rounded.
        own = block.module.state_dict()
        for name, value in load_file(self.path(block.index, "safetensors")).items():
            own[name.removeprefix(start)].copy_(value)

    def save_outside(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write embedding, last norm, head: whatever is in no block."""
        self._save(self.shard(len(self.names)), {self.to_file(name): value for name, value in self.rounded(tensors).items()})

    def _save(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        files.save_tensors(path, tensors, {"format": "pt"}, sync=True)

    def rounded(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """In the dtype that they are stored in. Raises CheckpointError for a value that it does not hold."""
        rounded = {}
        for name, tensor in tensors.items():
            rounded[name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            if tensor.is_floating_point() and not rounded[name].isfinite().all():
                raise CheckpointError(
                    f"{name} holds values up to {tensor.abs().max():.3g}, which {self.dtype} does not: use bfloat16"
                )
        return rounded

    def stored(self) -> Weights:
        """The tensors of all files that are finished."""
        return Weights(self.model, files=[self.shard(index).name for index in range(len(self.names) + 1)])

    def finish(self, contents: Mapping[str, str], copied: Mapping[str, Path], whole: str | None = None) -> Path:
        """Write the index and the files in `contents` (name to text), copy others, and let the directory appear. Returns it.

        whole: a file in `model` that holds all tensors: it stands alone, and the files of the blocks go.
        """
        with files.explained(self.model):
            for path in self.model.iterdir():
                if path.is_dir():
                    remove(path)
                elif path.suffix != ".safetensors" and path.name != whole:
                    path.unlink()
        for name, source in copied.items():
            with files.explained(self.model / name):
                (self.model / name).parent.mkdir(exist_ok=True)
            files.replace(self.model / name, partial(shutil.copyfile, source), sync=True)
        index = {} if whole else {INDEX: json.dumps(self._index(), indent=1)}
        for name, content in {**index, **contents}.items():
            files.write_text(self.model / name, content, sync=True)
        if whole:
            with files.explained(self.model):
                for path in self.model.glob("*.safetensors"):
                    path.unlink()
        with files.explained(self.out):
            if self.out.exists():
                raise files.WriteError(self.out, f"it exists by now; what was made for it is in {self.model}")
            os.rename(self.model, self.out)
        remove(self.partial)
        self.release()
        return self.out

    def give_up(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.release()

    def _index(self) -> dict[str, Any]:
        placed: dict[str, str] = {}
        size = 0
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


@contextmanager
def in_one_line() -> Iterator[None]:
    """Inside, a file that cannot be written is a CheckpointError, as everything else is that is wrong with a checkpoint."""
    try:
        yield
    except files.WriteError as error:
        raise CheckpointError(f"{error}. Make room and run again" if error.disk_full else str(error)) from error


def check_free(out: Path) -> None:
    """Raise CheckpointError where `out` exists, files.WriteError where it cannot."""
    with files.explained(out):
        if out.exists() or out.is_symlink():
            raise CheckpointError(f"{out} exists: choose another directory or remove it")


def _check_ours(folder: Path) -> None:
    """Raise CheckpointError where what stands in the place of an unfinished run is not one: it is not ours to remove."""
    if not folder.exists():
        return
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    if held - {"model", "run"} or ("model" in held and not (folder / "run" / LOCK).exists()):
        raise CheckpointError(f"{folder} exists and is no unfinished run of labs quantize: move it, or choose another directory")


def lock(path: Path) -> IO[str] | None:
    """Held until it is closed or the process ends. None where the system has no such locks.

    Raises CheckpointError where another run holds it.
    """
    path.touch()
    try:
        import fcntl
    except ImportError:
        return None
    stream = path.open("w", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise CheckpointError(f"another run is writing to {path.parent.parent}") from None
    return stream


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it, if it is there."""
    with files.explained(folder):
        if folder.exists():
            shutil.rmtree(folder)
