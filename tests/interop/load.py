"""Checkpoints of the course model, written here and loaded by the libraries that are used today, and by those of the formats."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import torch
from interop import environment, measure
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from labsupport import checkpoint
from labsupport.model import models, text
from labsupport.pipeline.quantize import quantize_model

PROMPT, WINDOWS, LENGTH = 64, 8, 256
# (method, layout, settings). rtn is quick, and a loader does not see what gave the codes.
CASES: dict[str, tuple[str, str, dict]] = {
    "gptq-4b-sym": ("rtn", "gptq", {"bits": 4, "group_size": 128, "symmetric": True}),
    "gptq-4b-asym": ("rtn", "gptq", {"bits": 4, "group_size": 128}),
    "gptq-4b-order": ("gptq", "gptq", {"bits": 4, "group_size": 128, "symmetric": True, "act_order": True, "static_groups": False}),
    "gptq-4b-static": ("gptq", "gptq", {"bits": 4, "group_size": 128, "symmetric": True, "act_order": True, "static_groups": True}),
    "gptq-3b-sym": ("rtn", "gptq", {"bits": 3, "group_size": 128, "symmetric": True}),
    "gptq-3b": ("rtn", "gptq", {"bits": 3, "group_size": 128}),
    "gptq-2b": ("rtn", "gptq", {"bits": 2, "group_size": 128}),
    "gptq-8b-sym": ("rtn", "gptq", {"bits": 8, "group_size": 128, "symmetric": True}),
    "gptq_v2-4b-g32": ("rtn", "gptq_v2", {"bits": 4, "group_size": 32}),
    "gptq_v2-4b-sym": ("rtn", "gptq_v2", {"bits": 4, "group_size": 128, "symmetric": True}),
    "awq-4b": ("awq", "awq", {"bits": 4, "group_size": 128}),
    "compressed-w4": ("rtn", "compressed-tensors", {"bits": 4, "group_size": 128, "symmetric": True}),
    "compressed-w4-asym": ("awq", "compressed-tensors", {"bits": 4, "group_size": 32}),
    "compressed-w4-gptq": ("gptq", "compressed-tensors", {"symmetric": True, "act_order": True, "static_groups": True}),
    "compressed-w8": ("rtn", "compressed-tensors", {"bits": 8, "group_size": 128, "symmetric": True}),
    "compressed-w8a8": ("rtn", "compressed-tensors-w8a8", {"bits": 8, "group_size": None, "symmetric": True}),
}
# The formats' own libraries: AutoGPTQ is older than version 2 and than compressed-tensors.
OLD = [name for name in CASES if not name.startswith(("gptq_v2", "compressed"))]
NO_KERNEL = "has no attribute 'cpu_gemm_wna16'"  # how vLLM says that its library for AVX2 lacks the 4-bit kernel
# A case, a dtype, and whether vLLM takes it on a CPU: what it refuses is a result as well.
SERVED = [
    ("gptq-4b-sym", "float16", True), ("gptq-4b-static", "float16", True), ("gptq_v2-4b-sym", "float16", True),
    ("awq-4b", "float16", True), ("gptq-4b-asym", "float16", False), ("gptq-4b-order", "float16", False),
    ("gptq-3b-sym", "float16", False), ("gptq-8b-sym", "float16", False), ("gptq-4b-sym", "float32", False),
    ("compressed-w4", "float16", True), ("compressed-w8a8", "float16", True),
]  # fmt: skip


def write(folder: Path, ids: torch.Tensor, names: Iterable[str] = tuple(CASES)) -> None:
    """The checkpoints of these names, a folder for each. ids: calibration text."""
    model, _ = models.load_model(str(models.course_model_dir()), device="cpu")
    for name in names:
        method, layout, settings = CASES[name]
        stored: dict = {}
        asked = settings if method == "rtn" else {"calibration": ids, **settings}
        quantized, _ = quantize_model(model, method, stored=stored, **asked)
        checkpoint.save(quantized, stored, folder / name, layout, source=models.course_model_dir(), method=method)


def lines(threads: int) -> Iterator[tuple[str, bool]]:
    """What each loader makes of each checkpoint, beside our own forward of the same file.

    The weights are the same numbers, so what differs is float16 arithmetic against float32. How much that is, our own model in
    float16 tells: a loader may differ from us by as much again, twice over, and by 0.1 % in perplexity, or by what chance explains.
    The greedy continuation has to be ours until our two best tokens lie within that of each other.
    """
    _, tokenizer = models.load_model(str(models.course_model_dir()), device="cpu")
    train, heldout = (text.load_text(tokenizer, "code", split) for split in ("train", "heldout"))
    tokens = {
        "prompt": heldout.ids[:PROMPT][None].contiguous(),
        "text": heldout.ids[heldout.positions(LENGTH + 1, WINDOWS)],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, train.ids[train.positions(512, 16)])
        save_file(tokens, folder / "tokens.safetensors")
        ours = cache(lambda case: Ours(checkpoint.load(folder / case)[0], tokens))
        for loader, made in (("transformers", environment.MODERN), ("AutoGPTQ and AutoAWQ", environment.LEGACY)):
            out = folder / f"by-{made.name}"
            out.mkdir()
            module, names = ("run_load", list(CASES)) if made is environment.MODERN else ("run_load_peers", OLD)
            made.run(module, name, str(out), *names, threads=threads)
            for case in names:
                yield verdict(f"{loader} {case}", out / case, ours, case, taken=True)
        out = folder / "by-serve"
        out.mkdir()
        for case, dtype, taken in SERVED:
            environment.SERVE.run("run_serve", name, str(out), f"{case}-{dtype}", threads=threads)
            yield verdict(f"vLLM {case} {dtype}", out / f"{case}-{dtype}", ours, case, taken)


def verdict(what: str, found: Path, ours: Callable[[str], Ours], case: str, taken: bool) -> tuple[str, bool]:
    """A line, and whether the loader took or refused the checkpoint as it should, and agrees with us."""
    refused = found.with_name(f"{found.name}.refused")
    if refused.exists():
        words = " ".join(refused.read_text().split()).split(" [type=")[0]  # pydantic adds the whole input to them
        if words.endswith(NO_KERNEL) and "AVX512" not in torch.backends.cpu.get_cpu_capability():
            return f"{what}: not tried, vLLM's wheel has its 4-bit kernel for processors with AVX-512", True
        return f"{what}: refused, {words}", not taken
    path = found.with_name(f"{found.name}.safetensors")
    with safe_open(path, "pt") as file:
        kind = file.metadata()["linears"]
    said, good = ours(case).compare(load_file(path))
    return f"{what} ({kind}): {said}", good and taken


def more(losses: torch.Tensor, than: torch.Tensor) -> float:
    """By which share the perplexity of one set of losses is above another's."""
    return (losses.mean() - than.mean()).expm1().item()


class Ours:
    """A checkpoint in our own forward."""

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        tokens: measure.Measured,
        as_a_loader: Callable[[nn.Module], nn.Module] = lambda model: models.duplicate(model).half(),
        perplexity: float = 1e-3,
        coarse_text: bool = False,
    ):
        """as_a_loader: a model that computes as coarsely as the loader does. perplexity: the share by which it may differ from
        ours in float32, or, where coarse_text, from that of the coarse model.

        Where activations are rounded, float16 sends some of them to the other side of a tie, and each such step moves a loss. That
        has no direction: beside ours in float32, three standard errors of what it does to the mean over the windows are allowed.
        """
        self.model, self.prompt, self.measured = model, tokens["prompt"], measure.measure(model, tokens)
        coarse = as_a_loader(model)
        after = coarse(input_ids=self.prompt, use_cache=False).logits[0].float().log_softmax(1)
        self.bound = 2 * (after - self.measured["log_probabilities"]).abs().max().item()
        losses, coarse_losses = self.measured["losses"], measure.losses(coarse, tokens["text"])
        self.losses = coarse_losses if coarse_text else losses
        chance = 3 * (coarse_losses - losses).std().item() / len(losses) ** 0.5
        self.perplexity = perplexity if coarse_text else max(perplexity, chance)

    def compare(self, theirs: measure.Measured) -> tuple[str, bool]:
        """What a loader's measurements are beside ours, in words, and whether they agree."""
        ours = self.measured
        off = (theirs["log_probabilities"] - ours["log_probabilities"]).abs().max().item()
        perplexity = more(theirs["losses"], self.losses)
        same = ours["greedy"] == theirs["greedy"]
        agree = int(same.long().cumprod(0).sum())
        margin = None if agree == len(same) else self.margin(self.prompt, ours["greedy"][:agree])
        close = margin is None or margin <= self.bound
        said = f"log-probabilities within {off:.2g} (bound {self.bound:.2g}), perplexity {100 * perplexity:+.3f} % "
        said += f"(bound {100 * self.perplexity:.2g}), "
        said += f"{agree} of {len(same)} tokens equal" + ("" if margin is None else f", then our two best are {margin:.2g} apart")
        return said, off <= self.bound and abs(perplexity) < self.perplexity and close

    @torch.no_grad()
    def margin(self, prompt: torch.Tensor, then: torch.Tensor) -> float:
        """How far apart the two best next tokens are after a prompt [1, n] and what then follows."""
        best = self.model(input_ids=torch.cat([prompt, then[None]], 1), use_cache=False).logits[0, -1].topk(2).values
        return (best[0] - best[1]).item()
