"""What a model's directory holds, looked at before its weights are read: a causal language model, small enough for the memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from labsupport.model import memory

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")
SMALL = 2**29  # parameters: in float32 they take 2 GiB, which every GPU has
# The classes of transformers for other tasks than to say what comes next.
OTHER_TASKS = r"For(MaskedLM|\w*Classification|QuestionAnswering|ConditionalGeneration|PreTraining|MultipleChoice)$"


class ModelError(ValueError):
    """A model does not exist, has no weights, cannot be read, or is not built as it has to be for what is done with it."""


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory that holds weights as well. Raises ModelError where either is missing."""
    if not (path / "config.json").is_file():
        raise ModelError(f"the directory {str(path)!r} holds no model: config.json is missing")
    if not any((path / file).is_file() for file in WEIGHT_FILES):
        raise ModelError(f"the directory {str(path)!r} holds no weights: wanted {' or '.join(WEIGHT_FILES)}")
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"config.json in {str(path)!r} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"config.json in {str(path)!r} holds a {type(config).__name__}, wanted an object")
    return config


def nbytes(path: Path) -> int:
    """Bytes of all files of weights in a directory."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def check_causal(name: str, config: dict[str, Any]) -> None:
    """Raise ModelError for an architecture that does not predict each token from those before it alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, known = config.get("model_type"), set()
    for classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update((classes,) if isinstance(classes, str) else classes)
    said = config.get("architectures") or []
    other = [each for each in said if each not in known and re.search(OTHER_TASKS, each)]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "auto_map" in config:
        raise ModelError(f"the model {name!r} is of type {kind!r}, which brings code of its own, and that is never run")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (other and not set(said) & known):
        what = f"a {other[0]}" if other else f"of type {kind!r}"
        raise ModelError(
            f"the model {name!r} is {what}: wanted a causal language model, which predicts each token from those before it"
        )


def check_memory(name: str, config: dict[str, Any], nbytes: int, dtype: torch.dtype | str, device: torch.device) -> None:
    """Raise ModelError where the weights, `nbytes` in the files, will not fit into the memory that is free."""
    if device.type == "meta" or "quantization_config" in config:
        return
    stored = getattr(
        torch, str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."), torch.float32
    )
    count = nbytes // stored.itemsize
    kept = dtype if isinstance(dtype, torch.dtype) else torch.float32 if count <= SMALL else stored
    needed = count * kept.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.here().free
    if needed > free:
        there = f"{free / memory.GIB:.1f} GiB of memory are free on {device.type}"
        raise ModelError(
            f"the model {name!r} takes {needed / memory.GIB:.1f} GiB in {str(kept).removeprefix('torch.')}, and {there}: "
            "take a smaller one, or `labs quantize`, which holds one block at a time"
        )


def first_line(error: Exception) -> str:
    """Of an error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
