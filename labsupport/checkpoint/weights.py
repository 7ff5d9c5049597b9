"""The tensors of a model directory, each read from its safetensors file when it is asked for.

Nothing but safetensors and JSON is ever read: a pickle can run code when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from labsupport.model import hub, models, source

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FLOATS = ("F64", "F32", "F16", "BF16")
ROWS = 256  # of a matrix that are read at a time
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}  # others: 1


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written or quantized."""


class SourceChanged(CheckpointError):
    """The files that are read are not what they were when the run began. What was made of them so far is kept."""


def check_regular(directory: Path) -> None:
    """Raise CheckpointError for a pipe, a socket or a device in a model directory: reading one may never end."""
    for path in sorted(directory.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is a pipe, a socket or a device, wanted a file")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is a directory, a pipe or a device, wanted a file")
        content = json.loads(path.read_text("utf-8"))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, wanted an object")
    return content


def pickles(directory: Path) -> list[str]:
    """Names of files that only a pickle loader would read."""
    return sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)


class Placed(Mapping[str, torch.Tensor]):
    """Tensors by name, in the order of `places`, which says where each is. To ask whether one is there does not read it."""

    places: Mapping[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places


class Weights(Placed):
    """Every tensor of a directory by name. A tensor is a view of its mapped file: copy it before the file changes.

    any_name: where there is one file alone, take it whatever it is called: AutoGPTQ writes gptq_model-4bit-128g.safetensors.
    files: the names of the files, where there is no index yet.
    Raises CheckpointError for a directory without safetensors, for files that are damaged or missing, and for an index that
    does not name what the files hold.
    """

    def __init__(self, directory: Path, any_name: bool = False, files: list[str] | None = None):
        self.directory = directory
        self._sizes: dict[str, int] = {}  # of files, in bytes
        self.files = self._list(any_name) if files is None else files
        self._open: dict[str, Any] = {}  # handles of safetensors, which has no types
        self._stack = ExitStack()
        self.places: dict[str, tuple[str, str]] = {}  # the file of each tensor, and what it is called there
        for file in sorted(set(self.files.values()) if isinstance(self.files, dict) else self.files):
            for name in self._enter(file).keys():  # noqa: SIM118
                if name in self.places:
                    raise CheckpointError(f"{name} is in {self.places[name][0]} and in {file} of {directory}")
                self.places[name] = file, name
        if isinstance(self.files, dict):
            self._check_index(self.files)

    @property
    def described_by(self) -> Path:
        """The file that says which model this is."""
        return self.directory / "config.json"

    @cached_property
    def config(self) -> dict[str, Any]:
        """What stands in it. Raises CheckpointError."""
        return read_json(self.described_by)

    def _list(self, any_name: bool) -> dict[str, str] | list[str]:
        """From tensors to files, as the index has it; or the one file."""
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is not a directory")
        check_regular(self.directory)
        if (self.directory / SINGLE).is_file():
            return [SINGLE]
        index = self.directory / INDEX
        if any_name and not index.is_file():
            indices, singles = (sorted(self.directory.glob(f"*{ending}")) for ending in (".safetensors.index.json", ".safetensors"))
            if len(indices) == 1:
                index = indices[0]
            elif not indices and len(singles) == 1:
                return [singles[0].name]
        if index.is_file():
            placed = read_json(index).get("weight_map")
            if not isinstance(placed, dict) or not all(
                isinstance(file, str) and Path(file).name == file for file in placed.values()
            ):
                raise CheckpointError(f"{index} has no weight_map from tensors to files beside it")
            return placed
        if names := pickles(self.directory):
            raise CheckpointError(
                f"{self.directory} holds its weights as pickles ({names[0]}), which can run code: wanted safetensors"
            )
        raise CheckpointError(f"{self.directory} holds no weights: wanted {SINGLE} or {INDEX}")

    def _enter(self, file: str) -> Any:
        """The open file."""
        path = self.directory / file
        if path.suffix != ".safetensors":
            raise CheckpointError(f"the index of {self.directory} names {file}, wanted .safetensors files only")
        if not os.path.isfile(path):  # False for a name that no file can have, where Path.is_file raises
            raise CheckpointError(f"{file} is missing in {self.directory}, and its index names it")
        try:
            self._sizes[file] = path.stat().st_size
            self._open[file] = self._stack.enter_context(safe_open(path, "pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or not safetensors: {error}") from error
        return self._open[file]

    def _check_index(self, placed: dict[str, str]) -> None:
        for name, file in placed.items():
            if self.places.get(name) != (file, name):
                raise CheckpointError(f"{name} is missing in {file} of {self.directory}, where the index places it")
        if foreign := sorted(self.places.keys() - placed.keys()):
            raise CheckpointError(
                f"{self.places[foreign[0]][0]} of {self.directory} holds {foreign[0]}, which the index does not name"
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.places:
            raise KeyError(name)
        file, stored = self._place(name)
        return self._open[file].get_tensor(stored)

    def rename(self, rename: Callable[[str], str]) -> None:
        """Give every tensor the name that `rename` makes of its own. Raises CheckpointError where two would have one name."""
        renamed: dict[str, tuple[str, str]] = {}
        for name, place in self.places.items():
            new = rename(name)
            if new in renamed:
                raise CheckpointError(f"{renamed[new][1]} and {place[1]} of {self.directory} are both {new} in the model")
            renamed[new] = place
        self.places = renamed

    def shape(self, name: str) -> list[int]:
        return list(self._slice(name).get_shape())

    def kind(self, name: str) -> str:
        """The dtype as safetensors names it, for example BF16."""
        return self._slice(name).get_dtype()

    def nbytes(self, name: str) -> int:
        size = 1
        for n in self.shape(name):
            size *= n
        return size * WIDTHS.get(self.kind(name), 1)

    def in_parts(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor, ROWS of its rows at a time: an embedding can be the largest tensor of all."""
        shape = self.shape(name)
        if not shape:
            yield self[name]
            return
        for start in range(0, shape[0], ROWS):
            yield self._slice(name)[start : start + ROWS]

    def _slice(self, name: str) -> Any:
        file, stored = self._place(name)
        return self._open[file].get_slice(stored)

    def _place(self, name: str) -> tuple[str, str]:
        """Where a tensor is. Raises SourceChanged where its file is not as long as it was: to read past its end kills a process."""
        file, stored = self.places[name]
        try:
            size = (self.directory / file).stat().st_size
        except OSError as error:
            raise SourceChanged(f"{file} of {self.directory} is gone since it was opened: {error.strerror}") from error
        if size != self._sizes[file]:
            raise SourceChanged(f"{file} of {self.directory} has {size} bytes, it had {self._sizes[file]} when it was opened")
        return file, stored

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors under a module's name, by the rest of their names."""
        start = prefix + "."
        return {name.removeprefix(start): self[name] for name in self.places if name.startswith(start)}

    def digest(self) -> str:
        """Of every file's name, size and header: what tells these weights from those of another model without reading them."""
        digest = hashlib.sha256()
        for file in sorted({file for file, _ in self.places.values()}):
            with (self.directory / file).open("rb") as stream:
                header = stream.read(8)
                header += stream.read(int.from_bytes(header, "little"))
            digest.update(f"{file} {self._sizes[file]} ".encode() + header)
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the files."""
        self._stack.close()
        self._open.clear()


def find(name: str, others: Iterable[str] = ()) -> Path:
    """The directory of a model: `name` itself, one that `labs fetch` made, or a snapshot of a model on the hub.

    From the hub only safetensors, JSON and the files named in `others` are fetched. What was downloaded before is found without a
    network, and with HF_HUB_OFFLINE=1 no network is used. Raises CheckpointError where there is neither.
    """
    try:
        path = Path(models.located(name))
        if path.is_dir():
            return path
        if path.exists():
            raise CheckpointError(f"{name} is a file, wanted a model directory or a hub id")
        return hub.snapshot(name, others, lambda config, nbytes: source.check_causal(name, config))
    except OSError as error:  # a name that no file can have
        raise CheckpointError(f"no model {name!r}: {source.first_line(error)}") from error
    except (models.ModelError, hub.HubError) as error:
        raise CheckpointError(str(error)) from error
