"""What text to calibrate on: a fine-tuned model is quantized by GPTQ on several texts, and judged on held-out text of its domain.

The model: an adapter trained on the float model, as in the sweep "lora", seed 0, and merged. `text` of a row is a domain,
"generated" for what the model itself writes after an end-of-text token, or "random" for tokens drawn evenly from the vocabulary.
`draw` says which windows: they begin at places that are drawn from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from labsupport.evidence import finetuning
from labsupport.evidence.finetuning import DOMAIN, OTHER, Given
from labsupport.model import models
from labsupport.pipeline import lora, training
from labsupport.pipeline.quantize import quantize_model

TEXTS = (DOMAIN, OTHER, "generated", "random")
SAMPLES = (8, 32, 128)
USUAL = 32
MOST = 512  # of the two domains alone: to write so much takes long
AT_ONCE = 32  # windows that are generated together


def settings(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The rows: GPTQ in the order of activations."""
    yield {"bits": 3, "method": "rtn"}
    yield {"bits": 4, "method": "rtn"}
    for text in TEXTS:
        given = {"bits": 3, "method": "gptq", "text": text}
        for draw in range(3):
            yield given | {"samples": USUAL, "draw": draw}
        yield given | {"samples": USUAL, "draw": 0, "token_weights": "not_first"}
        for samples in SAMPLES:
            if samples != USUAL:
                yield given | {"samples": samples, "draw": 0}
        yield given | {"bits": 4, "samples": USUAL, "draw": 0}
    for text in (DOMAIN, OTHER):
        yield {"bits": 3, "method": "gptq", "text": text, "samples": MOST, "draw": 0}


class Rows:
    """Makes the rows of the sweep "calibration", one after the other."""

    def __init__(self, given: Given):
        learned = finetuning.Rows(given)
        self.texts, self.length, self.about = given.texts, given.length, learned.about
        self.model = lora.merge(models.duplicate(learned.trained("float", 16, 0)))
        self.evaluations = learned.evaluations
        self.fine_tuned = self.evaluations(self.model)
        self.about |= {"fine_tuned_perplexity": self.fine_tuned[0].perplexity}
        self.generated = cache(self._generated)

    def row(self, setting: dict[str, Any]) -> dict[str, Any]:
        """One row; its changes are from the fine-tuned model in float."""
        given = {key: value for key, value in setting.items() if key not in ("method", "text", "samples", "draw", "bits")}
        if text := setting.get("text"):
            given["calibration"] = self._windows(text, setting["samples"], setting["draw"])
        arguments = finetuning.settings_of(self.model, setting["method"], setting["bits"]) | given
        quantized, _ = quantize_model(self.model, setting["method"], **arguments)
        return setting | finetuning.measured(self.fine_tuned, self.evaluations(quantized))

    def _windows(self, text: str, samples: int, draw: int) -> Tensor:
        """int64 [samples, length]."""
        if text == "generated":
            return self.generated(samples, draw)
        if text == "random":
            generator = torch.Generator().manual_seed(draw)
            return torch.randint(models.vocabulary(self.model), (samples, self.length), generator=generator)
        return training.batch_at(self.texts(text, "train").ids, samples, self.length, draw, 0)[:, :-1]

    @torch.no_grad()
    def _generated(self, samples: int, draw: int) -> Tensor:
        """What the fine-tuned model writes after an end-of-text token, drawn from its own probabilities as they are."""
        device, end, written = next(self.model.parameters()).device, self.model.config.eos_token_id, []
        generator = torch.Generator(device).manual_seed(draw)
        for start in range(0, samples, AT_ONCE):
            ids, held = torch.full((min(AT_ONCE, samples - start), 1), end, device=device), None
            for _ in range(self.length - 1):
                output = self.model(ids[:, -1:], past_key_values=held, use_cache=True)
                held = output.past_key_values
                drawn = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
                ids = torch.cat([ids, drawn], 1)
            written.append(ids.cpu())
        return torch.cat(written)
