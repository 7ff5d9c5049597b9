"""An exercise's inputs as files, and back, bit for bit: safetensors for tensors, JSON for the rest.

Both sides use this module, so it imports nothing of the course. JSON keeps numbers, texts, True, False and None as they are, and
a list as a list. All else is a table whose key says what it is: a tensor's name in the safetensors file, the parts of a tuple, the
pairs of a dict (its keys may be of any kind), or a function or a module of torch by where it is defined. Those are made again by
import; so a reader must trust who wrote the file. What an answer returns is never read by this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def write(given: Mapping[str, Any], stem: Path) -> None:
    """Write `stem`.json and `stem`.safetensors. Raises TypeError naming a value that has no form here."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps({name: _packed(value, name, tensors) for name, value in given.items()})
    save_file(tensors, f"{stem}.safetensors")
    Path(f"{stem}.json").write_text(text, "utf-8")


def read(stem: Path) -> dict[str, Any]:
    """What `write` was given; every tensor has its dtype, strides and requires_grad."""
    tensors = load_file(f"{stem}.safetensors")
    about = json.loads(Path(f"{stem}.json").read_text("utf-8"))
    return {name: _unpacked(value, tensors) for name, value in about.items()}


def _packed(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_packed(part, f"{path}[{index}]", tensors) for index, part in enumerate(value)]
    if kind is tuple:
        return {"tuple": [_packed(part, f"{path}[{index}]", tensors) for index, part in enumerate(value)]}
    if kind is dict:
        pairs = [[_packed(key, path, tensors), _packed(part, f"{path}[{key!r}]", tensors)] for key, part in value.items()]
        return {"dict": pairs}
    if kind is torch.Tensor:
        return {"tensor": _kept(value, tensors), "strides": list(value.stride()), "gradient": value.requires_grad}
    if isinstance(value, nn.Module) and hasattr(value, "made_of"):
        state = {key: _kept(tensor, tensors) for key, tensor in value.state_dict().items()}
        return {"module": [*_place(kind, path), _packed(value.made_of, path, tensors), state]}
    if callable(value):
        return {"function": _place(value, path)}
    raise TypeError(f"{path} is a {kind.__name__}, which has no form as data")


def _kept(tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> str:
    name = str(len(tensors))
    tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return name


def _place(made: Any, path: str) -> list[str]:
    module, name = getattr(made, "__module__", ""), getattr(made, "__qualname__", "")
    if getattr(import_module(module), name, None) is not made:
        raise TypeError(f"{path} is {name or made!r}, wanted a function or class at the top of a file")
    return [module, name]


def place_of(value: Any) -> tuple[str, str] | None:
    """Where the function or the class of a value is defined that `read` imports; None for plain data."""
    if isinstance(value, nn.Module):
        return type(value).__module__, type(value).__qualname__
    return (value.__module__, value.__qualname__) if callable(value) else None


def _unpacked(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_unpacked(part, tensors) for part in value["tuple"])
    if "dict" in value:
        return {_unpacked(key, tensors): _unpacked(part, tensors) for key, part in value["dict"]}
    if "function" in value:
        return _found(*value["function"])
    if "module" in value:
        module, name, made_of, state = value["module"]
        made = _found(module, name)(*_unpacked(made_of, tensors))
        made.load_state_dict({key: tensors[place] for key, place in state.items()})
        return made
    tensor, strides = tensors[value["tensor"]], tuple(value["strides"])
    if tensor.stride() != strides:
        tensor = torch.empty_strided(tuple(tensor.shape), strides, dtype=tensor.dtype).copy_(tensor)
    return tensor.requires_grad_(value["gradient"])


def _found(module: str, name: str) -> Callable:
    return getattr(import_module(module), name)
