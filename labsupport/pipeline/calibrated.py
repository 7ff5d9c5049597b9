"""GPTQ and AWQ over a whole model, one block at a time: each answers to what the blocks before it have become.

What a finished block has become can be kept in a folder, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from labsupport.model import models
from labsupport.pipeline import calibrate, fold
from labsupport.pipeline.calibrate import Block, InputStatistics, Resident
from labsupport.quant import awq, gptq, rtn
from labsupport.quant.grid import QuantizedTensor

Settings = Mapping[str, Any]
AFTER_SEARCH = ("clip", "base")  # of AWQ's settings those that its search of scales does not take


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear.

    nbytes: stored. bits_per_weight. error: the share of its output's energy that is lost on the calibration text, or of its
    weight's energy where there is none; 0 for a linear that was left as it is. seconds: that it took, by GPTQ with the pass that
    fed it, which is the first's of those that share an input.
    """

    nbytes: int
    bits_per_weight: float
    error: float
    seconds: float

    @classmethod
    def of(cls, weight: torch.Tensor, nbytes: int, error: float, seconds: float) -> LayerReport:
        return cls(nbytes, 8 * nbytes / weight.numel(), error, seconds)


def lost_share(weight: torch.Tensor, values: torch.Tensor, gram: torch.Tensor | None = None) -> float:
    """tr(E G E^T) / tr(W G W^T) with E = values - weight; without a Gram matrix |E|^2 / |W|^2. 0 for a weight of zeros."""
    weight, error = weight.float(), values.float() - weight.float()
    lost, all_of_it = (((t if gram is None else t @ gram) * t).sum(dtype=torch.float64).item() for t in (error, weight))
    return lost / all_of_it if all_of_it else 0.0


@contextmanager
def naming(name: str) -> Iterator[None]:
    """What a method raises, with the name of the linear, which it does not know."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@torch.no_grad()
def quantize_blocks(
    model: nn.Module,
    method: str,
    ids: torch.Tensor,
    settings_of: Callable[[str], Settings | None],
    keep: Path | Finished | None = None,
    on_linear: Callable[[str], None] = lambda name: None,
    weights: Resident | None = None,
    stored: dict[str, QuantizedTensor] | None = None,
) -> dict[str, LayerReport]:
    """Quantize a model in place by "gptq" or "awq". Returns what became of each linear, by full name.

    ids: calibration text, int64 [windows, length]. settings_of(name): what goes to the method for a linear, None to leave it as
    it is. keep: a folder for finished blocks, made if it is missing; finished blocks found there are read back and passed over.
    weights: see calibrate.blocks. stored: gets each linear's QuantizedTensor by name.
    Raises ValueError where `keep` holds blocks of another model, text or settings, and what calibrate.blocks and the method raise.
    """
    work = {"gptq": _gptq_block, "awq": _awq_block}[method]
    groups = fold.groups(model) if method == "awq" else []
    kept = None
    reports: dict[str, LayerReport] = {}
    for block in calibrate.blocks(model, ids, weights=weights):
        chosen = {name: settings_of(name) for name in block.linears}
        if keep is not None and kept is None:
            kept = _Kept(keep, _identity(model, method, ids, settings_of)) if isinstance(keep, Path) else keep
        found = kept.read(block) if kept else None
        if found is None:
            made: dict[str, QuantizedTensor] = {}
            found = work(model, block, chosen, [g for g in groups if g.linears[0] in block.linears], made)
            if kept:
                kept.write(block, found, made)
            if stored is not None:
                stored |= made
        for name in block.linears:
            reports[name] = found[name]
            on_linear(name)
    return reports


class Finished(Protocol):
    """Where finished blocks are kept."""

    def read(self, block: Block) -> dict[str, LayerReport] | None:
        """Put a finished block's weights back and return its reports; None for one that is not finished."""

    def write(self, block: Block, reports: Mapping[str, LayerReport], stored: Mapping[str, QuantizedTensor]) -> None:
        """Keep a block whose linears read back as what is stored."""


def _gptq_block(
    model: nn.Module, block: Block, settings: Mapping[str, Settings | None], groups: Iterable, stored: dict[str, QuantizedTensor]
) -> dict[str, LayerReport]:
    """True sequential: each linear is fed by what those before it have become."""
    reports, start = {}, time.perf_counter()
    for name, fed in block.fed():
        weight, waited = block.linears[name].weight, time.perf_counter() - start
        reports[name] = _replaced(name, weight, settings[name], fed.gram, waited, partial(_gptq, weight, fed), stored)
        start = time.perf_counter()
    return reports


def _gptq(weight: torch.Tensor, fed: InputStatistics, settings: Settings) -> QuantizedTensor:
    return gptq.quantize(weight, fed.hessian, **settings)


def _replaced(
    name: str,
    weight: torch.Tensor,
    settings: Settings | None,
    gram: torch.Tensor,
    waited: float,
    stored_by: Callable[[Settings], QuantizedTensor],
    stored: dict[str, QuantizedTensor],
) -> LayerReport:
    """Put into a linear what stored_by(settings), kept in `stored`, reads back as. Without settings it is left as it is."""
    if settings is None:
        return LayerReport.of(weight, 2 * weight.numel(), 0.0, 0.0)
    start = time.perf_counter()
    with naming(name):
        tensor = stored[name] = stored_by(settings)
    values = tensor.dequantize()
    error = lost_share(weight, values, gram)
    weight.copy_(values)
    return LayerReport.of(weight, tensor.nbytes, error, waited + time.perf_counter() - start)


def _awq_block(
    model: nn.Module,
    block: Block,
    settings: Mapping[str, Settings | None],
    groups: list[fold.Group],
    stored: dict[str, QuantizedTensor],
) -> dict[str, LayerReport]:
    """All searches on the block as it came, then all folds, then clips and rounding.

    A group has one scale, searched with the settings of its first linear. One of which a linear is left as it is gets no scale,
    since folding would change that one too.
    """
    start = time.perf_counter()
    reader = {name: names[0] for names in block.groups() for name in names}
    fed = block.statistics(set(reader.values()))
    before = {name: layer.weight.clone() for name, layer in block.linears.items()}
    scales: dict[str, torch.Tensor] = {}
    for group in groups:
        if all(settings[name] is not None for name in group.linears):
            first = group.linears[0]
            asked = {key: value for key, value in settings[first].items() if key not in AFTER_SEARCH}
            loss = _block_loss(model, block, group) if asked.pop("loss", "gram") == "block" else None
            statistics, weights = fed[reader[first]], [before[name] for name in group.linears]
            with naming(", ".join(group.linears)):
                found = awq.search(weights, statistics.gram, statistics.mean_abs, loss=loss, **asked)
            scales |= dict.fromkeys(group.linears, found.scale)
    for group in groups:
        if group.linears[0] in scales:
            fold.fold(model, group, scales[group.linears[0]])
    waited = (time.perf_counter() - start) / len(block.linears)
    reports = {}
    for name, layer in block.linears.items():
        statistics = fed[reader[name]]
        gram = awq.scaled_gram(statistics.gram, scales[name]) if name in scales else statistics.gram
        stored_by = partial(_round_scaled, name, layer.weight, gram, statistics.tokens)
        reports[name] = _replaced(name, layer.weight, settings[name], gram, waited, stored_by, stored)
    return reports


def _block_loss(model: nn.Module, block: Block, group: fold.Group) -> Callable:
    """The loss of llm-awq and AutoAWQ for one group: the output of its attention, its MLP or itself."""
    module, calls = model.get_submodule(group.output), []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True)
    try:
        for _ in block.outputs():
            pass
    finally:
        handle.remove()
    return fold.module_loss(module, [block.linears[name] for name in group.linears], calls)


def _round_scaled(name: str, weight: torch.Tensor, gram: torch.Tensor, tokens: int, settings: Settings) -> QuantizedTensor:
    """Clip and round a weight that has its scale. gram: X^T X of what it reads now."""
    grid = {key: settings[key] for key in ("bits", "group_size", "symmetric") if key in settings}
    as_peer = settings.get("autoawq_grid", False)
    if settings.get("clip", True) and not name.endswith(fold.NOT_CLIPPED):
        weight = awq.clip(weight, awq.search_clip(weight, gram, autoawq_grid=as_peer, **grid))
    if settings.get("base", "rtn") == "gptq":
        return gptq.quantize(weight, gram * (2 / tokens), **grid)
    return awq.quantize_as_autoawq(weight, **grid) if as_peer else rtn.quantize(weight, **grid)


class _Kept:
    """Finished blocks in a folder: block-NNN.safetensors and block-NNN.json for each, and run.json that says of what."""

    def __init__(self, folder: Path, identity: str):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "run.json"
        if about.exists():
            if json.loads(about.read_text())["identity"] != identity:
                raise ValueError(f"{folder} holds blocks of another model, text or settings: choose another folder or delete it")
        else:
            _replace(about, lambda path: path.write_text(json.dumps({"identity": identity})))

    def read(self, block: Block) -> dict[str, LayerReport] | None:
        from safetensors.torch import load_file

        report, weights = (self.folder / f"block-{block.index:03}.{kind}" for kind in ("json", "safetensors"))
        if not report.exists():
            return None
        block.module.load_state_dict(load_file(weights))
        return {name: LayerReport(**row) for name, row in json.loads(report.read_text()).items()}

    def write(self, block: Block, reports: Mapping[str, LayerReport], stored: object) -> None:
        from safetensors.torch import save_file

        report, weights = (self.folder / f"block-{block.index:03}.{kind}" for kind in ("json", "safetensors"))
        state = {name: value.contiguous().cpu() for name, value in block.module.state_dict().items()}
        _replace(weights, lambda path: save_file(state, path))
        rows = {name: asdict(row) for name, row in reports.items()}
        _replace(report, lambda path: path.write_text(json.dumps(rows)))  # last: a block with a report is whole


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def _identity(model: nn.Module, method: str, ids: torch.Tensor, settings_of: Callable[[str], Settings | None]) -> str:
    """A digest of what a run depends on: all weights, the text, the method and its settings for each linear."""
    digest = hashlib.sha256(json.dumps([method, {n: settings_of(n) for n in models.linears(model)}], default=str).encode())
    for tensor in (*model.state_dict().values(), ids):
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
