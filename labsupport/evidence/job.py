"""What a sweep is of, by names alone, so that another process, on another machine, can open the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labsupport.evidence import sweep
from labsupport.evidence.settings import SPLITS, TEXTS, WINDOWS
from labsupport.model import models, text
from labsupport.model.evaluate import LENGTH
from labsupport.pipeline import calibrate


@dataclass(frozen=True)
class Job:
    """sweep: its name. model: as `load_model` takes it; None for the course model. source: as `load_text` takes it; None for the
    text that this sweep is of, without which it is `usual`. windows: None for as many as this sweep looks at."""

    sweep: str
    model: str | None = None
    source: str | None = None
    usual: str = "code"
    windows: int | None = None
    length: int = LENGTH

    @classmethod
    def of(cls, sweep: str, model: str | None = None, source: str | None = None, windows: int | None = None) -> Job:
        """The same where None stands for what LABS_MODEL and LABS_TEXT say here."""
        chosen = models.model_name(model)
        own = Path(chosen) == models.course_model_dir()
        return cls(sweep, None if own else chosen, source, os.environ.get("LABS_TEXT") or "code", windows)

    def open(self) -> Opened:
        """Load the model and the text. Raises ModelError and TextError."""
        model, tokenizer = models.load_model(self.model or str(models.course_model_dir()))
        source = self.source or TEXTS.get(self.sweep) or self.usual
        stream = text.load_text(tokenizer, source, SPLITS.get(self.sweep, "heldout"))
        own_text = self.model in (None, models.SMALL_COURSE_MODEL)

        @cache
        def texts(domain: str, split: str) -> text.TokenStream:
            return text.load_text(tokenizer, domain, split)

        @cache
        def calibration(domain: str, samples: int) -> torch.Tensor:
            return calibrate.windows(texts(domain if own_text else self.source or self.usual, "train"), samples)

        return Opened(self, model, tokenizer, stream, calibration, texts)


@dataclass(frozen=True)
class Opened:
    """A job's model and texts. calibration(domain, samples): windows to calibrate on. texts(domain, split): to train on."""

    job: Job
    model: nn.Module
    tokenizer: Any
    stream: text.TokenStream
    calibration: Callable[[str, int], torch.Tensor]
    texts: Callable[[str, str], text.TokenStream]

    def run(self, path: Path, **how: Any) -> sweep.Measurements:
        """sweep.run of the job. how: on_row, on_step, settings."""
        return sweep.run(*self._subject[:3], path, *self._subject[3:], **self._given, **how)

    def prepare(self) -> sweep.Prepared:
        return sweep.prepare(*self._subject, **self._given)

    @property
    def _subject(self) -> tuple[str, nn.Module, text.TokenStream, str, int, int]:
        job = self.job
        windows = job.windows or WINDOWS.get(job.sweep, 256)
        return job.sweep, self.model, self.stream, job.model or "course-model", windows, job.length

    @property
    def _given(self) -> dict[str, Any]:
        short = self.job.model is not None
        return {"calibration": self.calibration, "texts": self.texts, "tokenizer": self.tokenizer, "short": short}
