"""What a submission may hold, and what of it counts. Nothing of a submission is run, and nothing outside its directory is read."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labsupport.checkpoint.tokenizers import TOKENIZERS
from labsupport.checkpoint.weights import PICKLES, CheckpointError, read_json
from labsupport.model import models

BUDGETS = {"large": 3_400_000, "medium": 2_400_000, "small": 1_700_000}  # bytes; each is the one before over the root of 2
FREE = ("README.md", "LICENSE", "LICENSE.txt")  # for people: never opened
# Of the course model; a submission needs none of them, and has them unchanged or not at all.
OURS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
TOKENIZER_FILES = {*TOKENIZERS, "added_tokens.json", "special_tokens_map.json", "merges.txt", "vocab.txt"} - {*OURS}
READ = (".safetensors", ".index.json")  # beside config.json, all that is ever opened
MOST, MOST_CONFIG = 2**26, 2**16  # bytes of a directory, and of its config.json
DTYPES = ("torch_dtype", "dtype")  # how a loader holds floats: it is float32 here

RULES = """\
The capstone: the best held-out perplexity of the course model under a byte budget.

Budgets: {budgets}.

A submission is a directory with config.json and safetensors. It is the course model: the same architecture and the same tokenizer.
How its weights came about is free: any method, any bits for any matrix, training too.

What counts
  Every file in the directory counts with its whole length: codes, scales, zero-points, codebooks, floats, config.json, the header
  of each safetensors file with its names and its metadata, and files that nobody needs. Compression does not count: a smaller
  archive is no smaller model.
  Free are {free}, which are never opened, and the course model's own
  {ours}, byte for byte.

What is read
  Formats: those of labsupport.checkpoint ({layouts}),
  and "labs", in which every matrix has bits and groups of its own, the embedding as well: see labsupport/checkpoint/mixed.py.
  GPTQ's, AWQ's and bitsandbytes' leave the embedding in float16, which alone takes {table:,} bytes.
  Config and architecture are the course model's own; of config.json only quantization_config is used. Code is never run, no link is
  followed, nothing outside the directory is read, and the text is cut by the course model's tokenizer.

What is scored
  The files are copied and read by a process of its own, and the model is evaluated in float32 on held-out modules of the standard
  library in which all names that a module defines have been changed. Calibrate and train on the training split alone:
  text.load_text(tokenizer, "code", "train"), and "prose".
  One submission is better than another only where the 95 % interval of the paired difference in perplexity, over documents, leaves
  out 0. Otherwise they are tied.
  A model that has learned the held-out text is refused: against the course model in float it is better there than on modules of
  installed packages, which are drawn afresh in every run. That shows text learned by heart. It does not show a model that learned
  those packages as well, one that learned little, or one that was only chosen by its score here. Who gives marks runs this command
  on a machine of their own, with --text DIRECTORY, a text that nobody has.
"""


class Refused(ValueError):
    """A submission breaks a rule. The message is one line."""


@dataclass(frozen=True)
class Count:
    """Bytes by file. counted: what counts. free: what does not."""

    counted: dict[str, int] = field(default_factory=dict)
    free: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counted.values())

    @property
    def budget(self) -> str | None:
        """The smallest budget that it keeps; None where it is over all of them."""
        return next((name for name, most in reversed(BUDGETS.items()) if self.total <= most), None)


def text() -> str:
    """The rules, for people."""
    from labsupport.checkpoint.layouts import LAYOUTS

    config = _course_config()
    return RULES.format(
        budgets=", ".join(f"{name} {most:,} bytes" for name, most in BUDGETS.items()), free=", ".join(FREE), ours=", ".join(OURS),
        layouts=", ".join(LAYOUTS), table=2 * config["vocab_size"] * config["hidden_size"],
    )  # fmt: skip


def _course_config() -> dict[str, Any]:
    return read_json(models.course_model_dir() / "config.json")


def take(directory: Path, into: Path) -> Count:
    """Copy what is read of a submission into the empty directory `into`, with a config.json of ours, and count the original.

    Raises Refused. What is counted is what was copied: a file that changes afterwards changes nothing.
    """
    if not directory.is_dir():
        raise Refused(f"{directory} is not a directory")
    count = Count()
    with os.scandir(directory) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        _check_kind(entry)
        content = _content(Path(entry.path), MOST - count.total)
        own = models.course_model_dir() / entry.name
        if entry.name in FREE:
            count.free[entry.name] = len(content)
        elif entry.name in OURS:
            if content != own.read_bytes():
                raise Refused(
                    f"{entry.name} is not the course model's: perplexity is of its tokens, leave the file out or as it is"
                )
            count.free[entry.name] = len(content)
        elif entry.name in TOKENIZER_FILES:
            raise Refused(f"{entry.name} is of another tokenizer: the text is cut by the course model's, leave it out")
        else:
            count.counted[entry.name] = len(content)
            if entry.name.endswith(READ):
                (into / entry.name).write_bytes(content)
    if "config.json" not in count.counted:
        raise Refused(f"{directory} holds no config.json")
    (into / "config.json").write_text(json.dumps(_config(directory / "config.json", count)), "utf-8")
    return count


def _check_kind(entry: os.DirEntry[str]) -> None:
    if entry.is_symlink():
        raise Refused(f"{entry.name} is a link: a submission holds its files itself")
    if entry.is_dir():
        raise Refused(f"{entry.name} is a directory: a submission holds files alone")
    if not entry.is_file():
        raise Refused(f"{entry.name} is a pipe, a socket or a device, wanted a file")
    if entry.name.endswith(PICKLES):
        raise Refused(f"{entry.name} is a pickle, which can run code when it is loaded: wanted safetensors")


def _content(path: Path, most: int) -> bytes:
    """A file's bytes, which may have become a link since it was looked at. Its length counts, holes included."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Refused(f"{path.name} is a pipe, a socket or a device, wanted a file")
            content = stream.read(most + 1)
    except OSError as error:
        raise Refused(f"{path.name} cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise Refused(f"the submission has more than {MOST:,} bytes, the largest budget is {max(BUDGETS.values()):,}")
    return content


def _config(path: Path, count: Count) -> dict[str, Any]:
    """The course model's config.json with the submission's quantization_config. Raises Refused where another model is described."""
    if count.counted["config.json"] > MOST_CONFIG:
        raise Refused(f"config.json has {count.counted['config.json']:,} bytes, wanted at most {MOST_CONFIG:,}")
    try:
        given = read_json(path)
    except CheckpointError as error:
        raise Refused(f"config.json: {error}") from error
    ours = _course_config()
    if "auto_map" in given:
        raise Refused("config.json has auto_map, which names code: code of a submission is never run")
    for key, value in ours.items():
        if key not in DTYPES and key in given and given[key] != value:
            raise Refused(f"config.json has {key} {given[key]!r}, the course model has {value!r}")
    if given.get("model_type") != ours["model_type"]:
        raise Refused(f"config.json has model_type {given.get('model_type')!r}, the course model has {ours['model_type']!r}")
    quantization = given.get("quantization_config")
    if quantization is None:
        return ours
    if not isinstance(quantization, dict):
        raise Refused(f"config.json has the quantization_config {quantization!r}, wanted an object")
    return ours | {"quantization_config": quantization}
