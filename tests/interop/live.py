"""The peers on what the golden files hold, and AutoGPTQ on every linear of the course model: run again, not read."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from interop import cases, golden, layers, peers, tiny
from interop.golden import Found, Layer, Model
from torch import nn

from labsupport.model import models, text
from labsupport.model.evaluate import perplexity
from labsupport.pipeline import fold
from labsupport.pipeline.block import InputStatistics
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant.gptq import quantize

TIMES = 5


def gptq(threads: int) -> dict[str, Layer]:
    """The layers of the golden file, made where there is none yet, with fresh results."""
    if golden.GPTQ.exists():
        given = {name: (layer.weight, layer.inputs) for name, layer in golden.read_gptq().items()}
    else:
        given = layers.make()
    hessians = {name: cases.exact_hessian(inputs) for name, (_, inputs) in given.items()}
    asked = {name: (weight, hessians[name], layers.SETTINGS[name]) for name, (weight, _) in given.items()}
    return {name: Layer(*given[name], answer.results, answer.rounding) for name, answer in peers.gptq(asked, threads)}


def awq(threads: int) -> dict[str, Model]:
    """The tiny models of the golden file, made where there is none yet, with fresh results."""
    given = {name: tiny.make(shape, seed) for seed, (name, shape) in enumerate(tiny.SHAPES.items())}
    if golden.AWQ.exists():
        given = {name: (model.weights, model.tokens) for name, model in golden.read_awq().items()}
    fresh = {}
    for name, (weights, tokens) in given.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / name
            tiny.save(tiny.SHAPES[name], weights, directory)
            fresh[name] = Model(weights, tokens, peers.awq(directory, tokens, tiny.RUNS[name], threads))
    return fresh


@torch.no_grad()
def course_inputs(windows: int = 16, length: int = 512, batch: int = 8) -> Iterator[tuple[str, torch.Tensor, list[torch.Tensor]]]:
    """Every linear of the course model: name, weight, inputs over windows of the training code, float32 [batch, length, in]."""
    model, tokenizer = models.load_model(str(models.course_model_dir()), device="cpu")
    stream = text.load_text(tokenizer, "code", "train")
    ids = stream.ids[stream.positions(length, windows)]
    linears = models.linears(model)
    fed: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: fed[name].append(inputs[0].float()))
        for name, layer in linears.items()
    ]
    for some in ids.split(batch):
        model(input_ids=some, use_cache=False)
    for handle in handles:
        handle.remove()
    yield from ((name, layer.weight.detach(), fed[name]) for name, layer in linears.items())


def streamed(inputs: list[torch.Tensor]) -> torch.Tensor:
    """The Hessian that calibration sums up, batch by batch."""
    statistics = InputStatistics.empty(inputs[0].shape[-1])
    for batch in inputs:
        statistics.add(batch)
    return statistics.hessian


def course(threads: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, peers.Answer]]:
    """Every linear of the course model at every setting: its name, weight, Hessian, and what AutoGPTQ makes of them."""
    given = {name: (weight, streamed(inputs)) for name, weight, inputs in course_inputs()}
    asked = {name: (weight, hessian, cases.ALL) for name, (weight, hessian) in given.items()}
    for name, answer in peers.gptq(asked, threads):
        yield name, *given[name], answer


def course_from_inputs(threads: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, peers.Answer]]:
    """Likewise, but AutoGPTQ sums up its own Hessian, and the one given is labsupport's. At a few settings."""
    given = {name: (weight, inputs) for name, weight, inputs in course_inputs()}
    asked = {name: (weight, torch.cat(inputs), cases.FEW) for name, (weight, inputs) in given.items()}
    for name, answer in peers.gptq(asked, threads):
        weight, inputs = given[name]
        yield name, weight, streamed(inputs), answer


def seconds(size: int, threads: int) -> Iterator[tuple[cases.Setting, float, float]]:
    """What AutoGPTQ's solver and labsupport's take for a random size x size layer, without and with act_order: the least of 5."""
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(size, size, generator=generator) / size**0.5
    x = torch.randn(2 * size, size, generator=generator) * torch.exp(torch.randn(size, generator=generator) / 2)
    hessian = x.T @ x / size
    settings = [cases.Setting(4, 128, False, act_order, False) for act_order in (False, True)]
    ((_, answer),) = peers.gptq({"layer": (weight, hessian, settings * TIMES)}, threads)
    for setting in settings:
        mine = []
        for _ in range(TIMES):
            start = time.perf_counter()
            quantize(weight, hessian, setting.bits, setting.group_size, setting.symmetric, act_order=setting.act_order)
            mine.append(time.perf_counter() - start)
        yield setting, answer.seconds[setting], min(mine)


@torch.no_grad()
def as_read_back(model: nn.Module, found: Found, run: cases.AwqRun) -> nn.Module:
    """A copy of a model with the weights that AutoAWQ's codes stand for, and its norms."""
    copy, found = models.duplicate(model), found.unpacked()
    for name, linear in models.linears(copy).items():
        codes, zero_point, scale = (found.tensors[f"{name}/{part}"] for part in ("codes", "zero_point", "scale"))
        groups = codes.unflatten(1, (-1, run.group_size)).float() - zero_point[..., None]
        linear.weight.copy_((groups * scale[..., None]).flatten(1))
    for name, module in copy.named_modules():
        if name.endswith(fold.NORMS):
            module.weight.copy_(found.tensors[f"{name}/weight"])
    return copy


def course_awq(windows: int, threads: int) -> Iterator[tuple[str, float, float]]:
    """AutoAWQ and labsupport on the course model, 4 bits g128, same calibration text: who, perplexity on held-out code, seconds."""
    model, tokenizer = models.load_model(str(models.course_model_dir()), device="cpu")
    heldout, train = (text.load_text(tokenizer, "code", split) for split in ("heldout", "train"))
    ids = train.ids[train.positions(512, windows)]
    run = cases.AwqRun(128)
    yield "unquantized", perplexity(model, heldout, windows=64), 0.0
    found = peers.awq(models.course_model_dir(), ids, [run], threads)[run]
    theirs = as_read_back(model, found, run)
    yield "AutoAWQ", perplexity(theirs, heldout, windows=64), found.tensors["seconds"].item()
    # The first is asked for what AutoAWQ does: its rule, its grid.
    for asked in ({"rule": "autoawq", "autoawq_grid": True}, {"rule": "autoawq"}, {"rule": "llm-awq"}, {"loss": "block"}):
        start = time.perf_counter()
        mine, _ = quantize_model(model, "awq", calibration=ids, bits=4, group_size=128, **asked)
        seconds = time.perf_counter() - start
        yield f"labsupport, {asked}", perplexity(mine, heldout, windows=64), seconds
