"""The texts that `labs quantize` reads: one to calibrate on, and held-out code to measure perplexity on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from labsupport.checkpoint.skeleton import Skeleton
from labsupport.checkpoint.tokenizers import read_tokenizer
from labsupport.checkpoint.weights import CheckpointError
from labsupport.model import models, text
from labsupport.model.text import TextError, TokenStream
from labsupport.pipeline import calibrate

WANTED = f"wanted a file, a directory, {', '.join(text.NAMES)} or a dataset"


@dataclass(frozen=True)
class Texts:
    """Which texts, and how much of them.

    calibration: one of text.NAMES, a directory, a file of text, or a dataset on the hub; `samples` windows of `length`
    tokens are taken from it. windows: on how many windows of that length perplexity is measured; 0 to leave it out.
    """

    calibration: str = "code"
    samples: int = 64
    length: int = 512
    windows: int = 32


def read_texts(skeleton: Skeleton, source: Path, texts: Texts, calibrating: bool) -> tuple[torch.Tensor | None, TokenStream | None]:
    """Windows to calibrate on, int64 [samples, length], where `calibrating`; and a text for perplexity, where it is measured.

    Raises CheckpointError or TextError with a message of one line.
    """
    measuring = texts.windows > 0
    for name, least in (("samples", 1), ("windows", 0)):
        if getattr(texts, name) < least:
            raise CheckpointError(f"{name} is {getattr(texts, name)}, wanted {least} or more")
    if not (calibrating or measuring):
        return None, None
    tokenizer = read_tokenizer(source)
    if tokenizer is None:
        raise CheckpointError(f"{source} holds no tokenizer (tokenizer.json), and without one no text can be read")
    longest = getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", None) or max(texts.length, 2)
    if not 2 <= texts.length <= longest:
        raise CheckpointError(f"length is {texts.length}, wanted 2 to {longest}, the positions that the model has")
    calibration = held_out = None
    if calibrating:
        calibration = calibrate.windows(_stream(tokenizer, texts.calibration, "train"), texts.samples, texts.length)
    if measuring:
        held_out = text.load_text(tokenizer)
    known = models.vocabulary(skeleton.model)
    for ids in (calibration, None if held_out is None else held_out.ids):
        if ids is not None and ids.max() >= known:
            raise CheckpointError(f"the tokenizer in {source} gives token {int(ids.max())}, the model knows {known}")
    return calibration, held_out


def _stream(tokenizer: Any, name: str, split: str) -> TokenStream:
    """The tokens of the named text. Raises TextError where there is no such text."""
    if name in text.NAMES:
        return text.load_text(tokenizer, name, split)
    path = Path(name)
    if os.path.isfile(name):  # False for a name that no file can have, where Path.is_file raises
        try:
            document = text.Document(path.name, path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"the calibration file {name!r} is not UTF-8 text: {error}") from error
        return text.tokenize(tokenizer, [document], name)
    if not name or (not os.path.isdir(name) and (path.suffix in text.TEXT_SUFFIXES or name.startswith((".", "/")))):
        raise TextError(f"the calibration text {name!r} does not exist: {WANTED}")
    return text.load_text(tokenizer, name, split)
