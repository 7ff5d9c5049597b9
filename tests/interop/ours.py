"""labsupport asked for what the peers were asked for, their choices included."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from interop import tiny
from interop.cases import DAMPING, AwqRun, Setting
from interop.golden import Found, Model, Solved

from labsupport.model import models
from labsupport.pipeline import fold
from labsupport.quant import awq, gptq


def by_gptq(weight: torch.Tensor, hessian: torch.Tensor, setting: Setting, autogptq: bool = True) -> Solved:
    """labsupport's GPTQ as AutoGPTQ does it; with autogptq False in its own arithmetic, with AutoGPTQ's choices."""
    choices = {"autogptq": True} if autogptq else {"stale_grids": True, "scale_dtype": torch.float32}
    q = gptq.quantize(
        weight,
        hessian,
        bits=setting.bits,
        group_size=setting.group_size,
        symmetric=setting.symmetric,
        act_order=setting.act_order,
        static_groups=setting.static_groups,
        damping=DAMPING,
        mse=setting.mse,
        **choices,
    )
    neighbors = torch.arange(weight.shape[1]) // q.group_size
    g_idx = neighbors if q.g_idx is None else q.g_idx
    return Solved(q.codes, q.scale, q.zero_point.to(torch.uint8), g_idx.to(torch.int16))


@torch.no_grad()
def by_awq(given: Model, shape: tiny.Shape, run: AwqRun) -> Found:
    """labsupport's AWQ as AutoAWQ does it: the block's output as loss, its rule, its grid, float activations between blocks.

    Named as by golden.Found.unpacked.
    """
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        tiny.save(shape, given.weights, Path(folder) / "model")
        model = LlamaForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
    calls, inputs = _watch(model, given.tokens)
    tensors, groups = {}, fold.groups(model)
    size = run.group_size
    searched = []
    for number, group in enumerate(groups):
        linears = [model.get_submodule(name) for name in group.linears]
        x = inputs[group.linears[0]]
        found = awq.search(
            [linear.weight for linear in linears],
            None,
            awq.saliency(x),
            group_size=size,
            rule="autoawq" if run.duo_scaling else "llm-awq",
            autoawq_grid=True,
            loss=fold.module_loss(model.get_submodule(group.output), linears, [calls[group.output]]),
        )
        tensors |= {f"group.{number}/scale": found.scale, f"group.{number}/losses": found.losses}
        searched.append(found.scale)
    # A block's searches all come before its first fold, and the blocks after it do not notice: nothing in the function changes.
    for group, scale in zip(groups, searched, strict=True):
        fold.fold(model, group, scale)
        for name in group.linears:
            inputs[name] = inputs[name] / scale
    for name, linear in models.linears(model).items():
        if run.clip and not name.endswith(fold.NOT_CLIPPED):
            x = awq.clip_tokens(inputs[name])
            limit = awq.search_clip(linear.weight, x.T @ x, group_size=size, autoawq_grid=True)
            linear.weight.copy_(awq.clip(linear.weight, limit))
            tensors[f"{name}/clip"] = limit
        if run.quantize:
            q = awq.quantize_as_autoawq(linear.weight, group_size=size)
            tensors |= {f"{name}/codes": q.codes, f"{name}/zero_point": q.zero_point.to(torch.uint8), f"{name}/scale": q.scale}
    for name, module in model.named_modules():
        if name.endswith(fold.NORMS):
            tensors[f"{name}/weight"] = module.weight
    return Found(tensors, [{"after": group.before, "linears": list(group.linears)} for group in groups])


def _watch(model, tokens: torch.Tensor):
    """What every module is called with, by name, when all samples run at once; and each linear's input, [tokens, in]."""
    calls = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, kwargs, name=name: calls.update({name: (args, kwargs)}), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls, {name: calls[name][0][0].flatten(0, 1) for name in models.linears(model)}
