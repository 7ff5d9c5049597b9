"""A process of its own that reads a submission and evaluates it: python -m labsupport.course.capstone.worker SPEC.json.

It gets the copy that rules.take made, and the course's own model and text. It knows nothing of the process that started it.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labsupport import checkpoint
from labsupport.checkpoint import mixed
from labsupport.checkpoint.weights import CheckpointError, Weights, read_json
from labsupport.course.capstone import texts
from labsupport.course.capstone.rules import Refused
from labsupport.model import files, models
from labsupport.model.evaluate import Evaluation, evaluate
from labsupport.model.text import TokenStream

WINDOWS, CHECKED = 96, 48  # that are scored, and those of each text that tells learned text
MEMORY = 2**34  # bytes of address space: torch alone maps some
SCORED, OWN, OTHER = "scored", "own names", "other code"


@dataclass(frozen=True)
class Spec:
    """What to do.

    directory: the copy. seed: of the other code that is drawn. text: a directory of text to score on, None for the course's.
    windows, checked: see WINDOWS and CHECKED. out: where the answer goes, as JSON.
    """

    directory: str
    out: str
    seed: str
    text: str | None = None
    windows: int = WINDOWS
    checked: int = CHECKED


def read(directory: Path) -> tuple[nn.Module, str, dict[str, int]]:
    """The course model with a submission's weights in float32; its layout; bytes of its tensors by what they are.

    Raises Refused for what is not the whole course model, and CheckpointError for files that cannot be read.
    """
    course = Weights(models.course_model_dir())
    shapes = {name: tuple(course.shape(name)) for name in course}
    settings = read_json(directory / "config.json").get("quantization_config")
    weights = Weights(directory, any_name=True)
    method = None if settings is None else settings.get("quant_method")
    nbytes: dict[str, int] = {}
    for name in weights:
        kind = name.rpartition(".")[2]
        kind = "floats" if name in shapes else kind
        nbytes[kind] = nbytes.get(kind, 0) + weights.nbytes(name)
    if method in (None, mixed.METHOD):
        values = mixed.values(weights, shapes)
    else:
        loaded, _ = checkpoint.load(directory)
        values = mixed.parameters_of(loaded)
        if foreign := sorted(values.keys() - shapes.keys()):
            raise Refused(f"{foreign[0]} is a matrix of its own: the course model's head is its embedding")
    model, _ = models.load_model(str(models.course_model_dir()), device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return model, "float" if method is None else str(method), nbytes


def streams(tokenizer: Any, spec: Spec) -> dict[str, tuple[TokenStream, int]]:
    """The texts, and how many windows of each are used."""
    if spec.text is not None:
        from labsupport.model.text import load_text

        return {SCORED: (load_text(tokenizer, str(Path(spec.text).resolve())), spec.windows)}
    return {
        SCORED: (texts.held_out(tokenizer, texts.KEY), spec.windows),
        OWN: (texts.held_out(tokenizer, None), spec.checked),
        OTHER: (texts.other_code(tokenizer, spec.seed), spec.checked),
    }


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """An Evaluation, with its tensors as lists."""
    return asdict(evaluation) | {"loss": evaluation.loss.tolist(), "tokens": evaluation.tokens.tolist()}


def from_json(kept: dict[str, Any]) -> Evaluation:
    """The inverse of `as_json`."""
    loss, tokens = torch.tensor(kept["loss"], dtype=torch.float64), torch.tensor(kept["tokens"])
    return Evaluation(**kept | {"loss": loss, "tokens": tokens})


def _without(directory: str, message: str) -> str:
    """A message about the copy, as one about the submission."""
    for path in (f"{directory}/", f" in {directory}", f" of {directory}"):
        message = message.replace(path, "")
    return message.replace(directory, "the submission")


def work(spec: Spec) -> dict[str, Any]:
    """What the process answers: {"refused": why}, or layout, bytes by kind, and the evaluations of submission and course model."""
    try:
        model, layout, nbytes = read(Path(spec.directory))
    except (CheckpointError, Refused) as error:
        return {"refused": _without(spec.directory, str(error))}
    course, tokenizer = models.load_model(str(models.course_model_dir()), device="cpu")
    answer: dict[str, Any] = {"layout": layout, "tensors": nbytes, "submission": {}, "float": {}}
    for name, (stream, windows) in streams(tokenizer, spec).items():
        for who, each in (("submission", model), ("float", course)):
            evaluation = evaluate(each, stream, windows=windows)
            if not evaluation.loss.isfinite().all():
                return {"refused": "its loss is not a number: weights this large overflow"}
            answer[who][name] = as_json(evaluation)
    return answer


def limit_memory() -> None:
    """Where the system can: a file that asks for more ends this process and no other."""
    with suppress(ImportError, ValueError, OSError):  # no such module on Windows; a lower limit that is set already
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


if __name__ == "__main__":
    limit_memory()
    given = Spec(**json.loads(Path(sys.argv[1]).read_text("utf-8")))
    files.write_text(Path(given.out), json.dumps(work(given)))
