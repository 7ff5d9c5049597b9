"""What an answer left in the sandbox, read as a stranger's data: bounded files of JSON and safetensors, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from labsupport.exercises.attempts import LARGEST_INTEGER, LONGEST_OUTPUT, Attempt
from labsupport.exercises.compare import leaves, map_leaves
from labsupport.grading.records import GradingError
from labsupport.grading.sandbox import regular

LEAST_BYTES, TIMES = 4 * 2**20, 16  # outputs may be as large, or as many times as large as the reference's
LEAST_ENTRIES = 1024  # of one tensor, likewise
LONGEST_ERROR, LONGEST_TEXT = 400, 10_000  # characters
STATUSES = ("ran", "blank", "raised", "returned")
KNOWN = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES = {getattr(torch, name) for name in KNOWN}


class Unfit(Exception):
    """What is wrong with a file, in one line that a learner may read."""


def most_bytes(want: Mapping[str, Any]) -> int:
    """How many bytes an answer's outputs may take. want: the reference's."""
    return max(LEAST_BYTES, TIMES * sum(_bytes(leaf) for _, _, leaf in leaves(want)))


def _bytes(leaf: Any) -> int:
    return leaf.nbytes if isinstance(leaf, torch.Tensor) else len(str(leaf))


def is_there(stem: Path) -> bool:
    return Path(f"{stem}.json").is_symlink() or Path(f"{stem}.json").exists()


def attempt(stem: Path, want: Mapping[str, Any]) -> Attempt:
    """What `Attempt.save` wrote, or what somebody else put there. Whatever cannot be used is an attempt that says so."""
    try:
        return _attempt(stem, want)
    except Unfit as error:
        return Attempt("returned", error=str(error))
    except GradingError as error:
        return Attempt("returned", error=f"what it left cannot be read: {error}")
    except Exception as error:  # a stranger's file: the reader of a format may fail in any way, and the sentence says which
        return Attempt("returned", error=f"what it left cannot be read ({type(error).__name__})")


def _attempt(stem: Path, want: Mapping[str, Any]) -> Attempt:
    from safetensors.torch import load

    limit = most_bytes(want) + 2**16
    about = json.loads(regular(Path(f"{stem}.json"), limit).decode("utf-8"))
    if not isinstance(about, dict) or set(about) != set(Attempt.__dataclass_fields__):
        raise Unfit("what it left is no record of an attempt")
    status, changed = about["status"], about["changed"]
    if status not in STATUSES or not isinstance(changed, list) or not all(isinstance(name, str) for name in changed):
        raise Unfit("what it left is no record of an attempt")
    if not all(isinstance(about[name], str) for name in ("error", "printed")) or not isinstance(about["borrowed"], bool):
        raise Unfit("what it left is no record of an attempt")
    told: dict[str, Any] = {
        "error": _shortened(about["error"], LONGEST_ERROR),
        "changed": tuple(_shortened(name, 40) for name in changed[:10]),
        "borrowed": about["borrowed"],
        "printed": _shortened(about["printed"], LONGEST_OUTPUT + 50),
    }
    if status != "ran":
        return Attempt(status, **told)
    if not isinstance(about["outputs"], dict):
        raise Unfit("its outputs are no table")
    tensors = load(regular(Path(f"{stem}.safetensors"), limit))
    dtypes = DTYPES | {leaf.dtype for _, _, leaf in leaves(want) if isinstance(leaf, torch.Tensor)}
    sizes = {name: [leaf for output, _, leaf in leaves({name: value}) if output == name] for name, value in want.items()}
    most = {
        name: max([LEAST_ENTRIES, *(TIMES * leaf.numel() for leaf in found if isinstance(leaf, torch.Tensor))])
        for name, found in sizes.items()
    }

    outputs = dict[str, Any]()
    for name in want:
        if name in about["outputs"]:
            whole = partial(_whole, tensors, dtypes, name, most[name])
            outputs[name] = map_leaves(f"[{name!r}]", about["outputs"][name], whole)  # paths as `Attempt.save` has them
    for name, value in outputs.items():
        wanted = len(leaves({name: want[name]}))
        if len(leaves({name: value})) > max(LEAST_ENTRIES, TIMES * wanted, most[name]):
            raise Unfit(f"{name} has far more entries than what is wanted")
    return Attempt("ran", outputs, **told)


def _whole(tensors: Mapping[str, torch.Tensor], dtypes: Collection[torch.dtype], name: str, most: int, path: str, leaf: Any) -> Any:
    """A leaf of the output `name`, with its tensor where the file has null. Raises Unfit."""
    if leaf is None:
        leaf = tensors[path]
        if leaf.dtype not in dtypes:
            raise Unfit(f"{name} is {leaf.dtype}, wanted one of {', '.join(KNOWN)}")
        if leaf.numel() > most:
            raise Unfit(f"{name} has shape {list(leaf.shape)}, far more than what is wanted")
    elif isinstance(leaf, int) and abs(leaf) >= LARGEST_INTEGER:
        raise Unfit(f"{name} is a whole number of more than 63 bits")
    elif isinstance(leaf, str):
        leaf = _shortened(leaf, LONGEST_TEXT)
    return leaf


def _shortened(text: str, most: int) -> str:
    """Also without halves of characters, which no file could hold."""
    return text[:most].encode("utf-8", "replace").decode("utf-8")


def ended(path: Path) -> tuple[float, str] | None:
    """Seconds, and what ended an answer, as runner.py wrote it down; None where it did not get so far."""
    try:
        about = json.loads(regular(path, 1000))
        seconds, word = about["seconds"], about["ended"]
        if isinstance(seconds, float) and 0 <= seconds < 1e6 and isinstance(word, str):
            return seconds, _shortened(word, 20)
    except (GradingError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
