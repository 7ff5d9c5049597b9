"""Checkpoints of the course model, written here and loaded by the libraries that are used today."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from interop import environment, run_load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from labsupport import checkpoint, models, text
from labsupport.quantize import quantize_model

PROMPT, WINDOWS, LENGTH = 64, 8, 256
# (method, layout, settings). rtn is quick, and a loader does not see what gave the codes.
CASES: dict[str, tuple[str, str, dict]] = {
    "gptq-4b-sym": ("rtn", "gptq", {"bits": 4, "group_size": 128, "symmetric": True}),
    "gptq-4b-asym": ("rtn", "gptq", {"bits": 4, "group_size": 128}),
    "gptq-4b-order": ("gptq", "gptq", {"bits": 4, "group_size": 128, "act_order": True}),
    "gptq-3b": ("rtn", "gptq", {"bits": 3, "group_size": 128}),
    "gptq-2b": ("rtn", "gptq", {"bits": 2, "group_size": 128}),
    "gptq-8b": ("rtn", "gptq", {"bits": 8, "group_size": 128}),
    "gptq_v2-4b-g32": ("rtn", "gptq_v2", {"bits": 4, "group_size": 32}),
    "awq-4b": ("awq", "awq", {"bits": 4, "group_size": 128}),
}


def write(folder: Path, ids: torch.Tensor) -> None:
    """The checkpoints, a folder for each. ids: calibration text."""
    model, _ = models.load_model(str(models.course_model_dir()), device="cpu")
    for name, (method, layout, settings) in CASES.items():
        stored: dict = {}
        asked = settings if method == "rtn" else {"calibration": ids, **settings}
        quantized, _ = quantize_model(model, method, stored=stored, **asked)
        checkpoint.save(quantized, stored, folder / name, layout, source=models.course_model_dir(), method=method)


def lines(threads: int) -> Iterator[tuple[str, bool]]:
    """What transformers makes of each checkpoint, beside our own forward of the same file.

    The weights are the same numbers, so what differs is float16 arithmetic against float32. How much that is, our own model in
    float16 tells: a loader may differ from us by as much again, twice over, and by 0.1 % in perplexity. The greedy continuation
    has to be ours until our two best tokens lie within that of each other.
    """
    _, tokenizer = models.load_model(str(models.course_model_dir()), device="cpu")
    train, heldout = (text.load_text(tokenizer, "code", split) for split in ("train", "heldout"))
    starts = heldout.windows(LENGTH + 1, WINDOWS)
    tokens = {
        "prompt": heldout.ids[:PROMPT][None].contiguous(),
        "text": heldout.ids[starts[:, None] + torch.arange(LENGTH + 1)],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, train.ids[train.windows(512, 16)[:, None] + torch.arange(512)])
        save_file(tokens, folder / "tokens.safetensors")
        environment.MODERN.run("run_load", name, threads=threads)
        for case in CASES:
            refused = folder / f"{case}.refused"
            if refused.exists():
                yield f"transformers {case}: refused, {refused.read_text().splitlines()[0]}", False
                continue
            path = folder / f"{case}.out.safetensors"
            with safe_open(path, "pt") as file:
                linears = file.metadata()["linears"]
            said, good = compare(checkpoint.load(folder / case)[0], load_file(path), tokens)
            yield f"transformers {case} ({linears}): {said}", good


def compare(model: nn.Module, theirs: dict[str, torch.Tensor], tokens: dict[str, torch.Tensor]) -> tuple[str, bool]:
    """What a loader's measurements are beside ours, in words, and whether they agree."""
    ours = run_load.measure(model, tokens)
    with torch.no_grad():
        half = models.duplicate(model).half()(input_ids=tokens["prompt"], use_cache=False).logits[0].float()
    bound = 2 * (half - ours["logits"]).abs().max().item()
    off = (theirs["logits"] - ours["logits"]).abs().max().item()
    perplexity = (theirs["losses"].mean() - ours["losses"].mean()).expm1().item()
    same = ours["greedy"] == theirs["greedy"]
    agree = int(same.long().cumprod(0).sum())
    close = agree == len(same) or _margin(model, tokens["prompt"], ours["greedy"][:agree]) <= bound
    said = f"logits within {off:.2g} (bound {bound:.2g}), perplexity {100 * perplexity:+.3f} %, {agree} of {len(same)} tokens equal"
    return said, off <= bound and abs(perplexity) < 1e-3 and close


@torch.no_grad()
def _margin(model: nn.Module, prompt: torch.Tensor, more: torch.Tensor) -> float:
    """How far apart the two best next tokens are after prompt and more."""
    best = model(input_ids=torch.cat([prompt, more[None]], 1), use_cache=False).logits[0, -1].topk(2).values
    return (best[0] - best[1]).item()
