"""What a loader makes of a checkpoint, measured in the loader's own environment: `interop.load` compares it with labsupport's.

OUT/NAME.safetensors: log_probabilities float32 [n, vocabulary] of the token after each of the prompt's, greedy int64 [32], how it
goes on, and losses float64 [windows], nats a token of the text; in the metadata, linears: what multiplies. OUT/NAME.refused: the
words of a loader that does not take it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NEW_TOKENS = 32
Measured = dict[str, torch.Tensor]


@torch.no_grad()
def measure(model: torch.nn.Module, tokens: Measured) -> Measured:
    """The tensors described above, of a transformers model."""
    logits = model(input_ids=tokens["prompt"], use_cache=False).logits[0].float()
    greedy = model.generate(tokens["prompt"], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    greedy = greedy[0, tokens["prompt"].shape[1] :]
    return {"log_probabilities": logits.log_softmax(1), "greedy": greedy, "losses": losses(model, tokens["text"])}


@torch.no_grad()
def losses(model: torch.nn.Module, text: torch.Tensor) -> torch.Tensor:
    """Nats a token of each window: int64 [windows, length] to float64 [windows]."""
    found = []
    for window in text:
        said = model(input_ids=window[None, :-1], use_cache=False).logits[0].double()
        found.append(torch.nn.functional.cross_entropy(said, window[1:]))
    return torch.stack(found)


def linears(model: torch.nn.Module) -> str:
    """The classes of a model's linears."""
    return ", ".join(sorted({type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}))


def record(out: Path, name: str, found: Callable[[], tuple[Measured, str]]) -> None:
    """Write what a loader found, and what multiplied, or its words of refusal."""
    try:
        measured, kind = found()
    except Exception as error:  # whatever a loader does not take, in its own words: they are the result
        (out / f"{name}.refused").write_text(f"{type(error).__name__}: {error}")
        return
    save_file({key: tensor.contiguous() for key, tensor in measured.items()}, out / f"{name}.safetensors", {"linears": kind})


def main(found: Callable[[Path, Measured], tuple[Measured, str]]) -> None:
    """`FOLDER OUT NAME...` on the command line: record each FOLDER/NAME, on the text that lies beside them.

    FOLDER/tokens.safetensors holds prompt int64 [1, n] and text int64 [windows, length].
    """
    folder, out = map(Path, sys.argv[1:3])
    tokens = load_file(folder / "tokens.safetensors")
    for name in sys.argv[3:]:
        record(out, name, lambda name=name: found(folder / name, tokens))
