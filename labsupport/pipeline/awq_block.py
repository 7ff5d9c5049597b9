"""A block by AWQ: linears that share an input get a scale, which is searched and folded; then weights are clipped and rounded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from labsupport.model.models import ModelError
from labsupport.pipeline import fold
from labsupport.pipeline.block import EVEN, NOT_FIRST, Block, InputStatistics, counts_first, token_weights
from labsupport.pipeline.linear import Quantized, Settings, defaults_of, errors_name, replace_weight
from labsupport.quant import awq, gptq, rtn
from labsupport.quant.grid import QuantizedTensor

# Settings that are not for the search of scales, and their defaults.
OWN = {"loss": "gram", "clip": True, "base": "rtn", "token_weights": EVEN}
UNCHANGED = 0.02  # weights of bfloat16 are rounded by 2**-8 when they are folded
GRID = ("bits", "group_size", "symmetric")


class AWQBlocks:
    """For models of the shapes in fold.SHAPES. Raises ModelError for others.

    Settings: those of awq.search, where loss is "gram", or "block" for the output of attention and MLP; clip, False for scales
    alone; base, "rtn", or "gptq" for GPTQ of the scaled weights; token_weights, "even", or "not_first" for statistics without the
    first token of each window.
    """

    SETTINGS: ClassVar[Mapping[str, Any]] = defaults_of(awq.search) | OWN

    def __init__(self, model: nn.Module):
        self.model, self.groups = model, fold.groups(model)

    def __call__(self, block: Block, settings: Mapping[str, Settings | None]) -> dict[str, Quantized]:
        """All searches on the block as it came, then all folds, then clips and rounding.

        A group has one scale, searched with the settings of its first linear. A group of which a linear is left as it is gets
        no scale, since folding would change that one too.
        """
        start = time.perf_counter()
        groups = [
            group
            for group in self.groups
            if group.linears[0] in block.linears and all(settings[name] is not None for name in group.linears)
        ]
        source = {name: names[0] for names in block.groups() for name in names}  # of linears that share an input, one is watched
        fed = block.statistics(set(source.values()), counts_first(token_weights(settings, (EVEN, NOT_FIRST))))
        scales: dict[str, torch.Tensor] = {}
        for group in groups:
            weights = [block.linears[name].weight for name in group.linears]
            scale = self._search(block, group, weights, fed[source[group.linears[0]]], settings[group.linears[0]])
            scales |= dict.fromkeys(group.linears, scale)
        before = next(block.outputs())
        for group in groups:
            fold.fold(self.model, group, scales[group.linears[0]])
        _check_unchanged(block, before, next(block.outputs()))
        waited = (time.perf_counter() - start) / len(block.linears)
        made = {}
        for name, layer in block.linears.items():
            statistics = fed[source[name]]
            gram = awq.scaled_gram(statistics.gram, scales[name]) if name in scales else statistics.gram
            quantize = partial(_round_scaled, name, gram, statistics.tokens)
            made[name] = replace_weight(name, layer.weight, settings[name], quantize, gram, waited)
        return made

    def _search(
        self, block: Block, group: fold.Group, weights: list[torch.Tensor], statistics: InputStatistics, settings: Settings
    ) -> torch.Tensor:
        """The scale of one group, float32 [in_features]."""
        loss = self._block_loss(block, group) if settings.get("loss", OWN["loss"]) == "block" else None
        chosen = {key: value for key, value in settings.items() if key not in OWN}
        with errors_name(", ".join(group.linears)):
            return awq.search(weights, statistics.gram, statistics.mean_abs, loss=loss, **chosen).scale

    def _block_loss(self, block: Block, group: fold.Group) -> Callable:
        """The loss of llm-awq and AutoAWQ for one group: on the output of its attention, its MLP or itself."""
        module, calls = self.model.get_submodule(group.output), []
        handle = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True)
        try:
            for _ in block.outputs():
                pass
        finally:
            handle.remove()
        return fold.module_loss(module, [block.linears[name] for name in group.linears], calls)


def _check_unchanged(block: Block, before: torch.Tensor, after: torch.Tensor) -> None:
    """Raise ModelError where folding changed what the block gives: it does not compute as blocks of its shape do."""
    off = ((after - before).float().norm() / before.float().norm()).item()
    if not off < UNCHANGED:
        kind = type(block.module).__name__
        raise ModelError(f"folding scales into block {block.index}, a {kind}, changed what it gives by {off:.2g} of its size")


def _round_scaled(name: str, gram: torch.Tensor, tokens: int, weight: torch.Tensor, settings: Settings) -> QuantizedTensor:
    """Clip and round a weight that has its scale. gram: X^T X of what it reads now."""
    grid = {key: settings[key] for key in GRID if key in settings}
    as_peer = settings.get("autoawq_grid", False)
    if settings.get("clip", OWN["clip"]) and not name.endswith(fold.NOT_CLIPPED):
        weight = awq.clip(weight, awq.search_clip(weight, gram, autoawq_grid=as_peer, **grid))
    if settings.get("base", OWN["base"]) == "gptq":
        return gptq.quantize(weight, gram * (2 / tokens), **grid)
    return awq.quantize_as_autoawq(weight, **grid) if as_peer else rtn.quantize(weight, **grid)
