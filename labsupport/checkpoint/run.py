"""`labs quantize`: a model directory in, a quantized one out, with no more than one block in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from labsupport import __version__
from labsupport.checkpoint import card, layouts
from labsupport.checkpoint.measure import evaluate_streamed
from labsupport.checkpoint.parts import Parts, check_free
from labsupport.checkpoint.recipe import DTYPES, Recipe
from labsupport.checkpoint.skeleton import Skeleton
from labsupport.checkpoint.texts import Texts, read_texts
from labsupport.checkpoint.tokenizers import COPIED, copied_files
from labsupport.checkpoint.weights import CheckpointError, find, read_json
from labsupport.model import models
from labsupport.model.files import WriteError
from labsupport.model.text import TextError, TokenStream
from labsupport.pipeline import calibrate
from labsupport.pipeline.calibrate import Block
from labsupport.pipeline.driver import quantize_blocks
from labsupport.pipeline.linear import LayerReport
from labsupport.quant.grid import QuantizedTensor, UniformTensor
from labsupport.quant.nf4 import BlockTensor, NestedAbsmax


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Inside, what cannot be written is a CheckpointError, like everything else that is wrong."""
    try:
        yield
    except WriteError as error:
        raise CheckpointError(str(error)) from error


@_in_one_line()
def quantize(
    source: str | Path,
    out: str | Path,
    method: str = "gptq",
    *,
    calibration: str = "code",
    samples: int = 64,
    length: int = 512,
    windows: int = 32,
    device: str | torch.device | None = None,
    restart: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Path:
    """Quantize the model in a directory, or of a hub id, block by block, and write what AutoGPTQ, AutoAWQ or bitsandbytes would.

    settings: what Recipe.of takes. The codes are those of quantize_model with the same settings. A run that was stopped goes on
    after its last finished block, if it is asked for the same; restart: forget it. Returns `out`.
    Raises CheckpointError, or TextError, in one line; `out` is then not there.
    """
    recipe, out, model_name = Recipe.of(method, **settings), Path(out), str(source)
    check_free(out)
    source = find(model_name, COPIED)
    if out.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{out} is inside the model's directory {source}: choose another")
    config = read_json(source / "config.json")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{source} is quantized already: config.json has a quantization_config")
    skeleton = Skeleton(source, _usable(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    recipe.check_model(models.linears(skeleton.model))
    texts = Texts(calibration, samples, length, windows)
    ids, held_out = read_texts(skeleton, source, texts, recipe.method.needs_text)

    identity = {**recipe.about(), "model": skeleton.weights.digest(), "config": _digest(config), "version": __version__}
    if ids is not None:
        identity |= {"calibration": _digest(ids.tolist())}
    names = [skeleton.name(block) for block in skeleton.blocks]
    parts = Parts(out, identity, recipe.layout, names, recipe.bits, DTYPES[recipe.dtype], restart)
    with _tidied(parts):
        reports = _quantize_blocks(skeleton, recipe, ids, parts, progress)
        parts.save_outside(skeleton.read(skeleton.outer))
        measured = _measure(skeleton, parts, texts, held_out, progress)
        weights = sum(layer.weight.numel() for layer in models.linears(skeleton.model).values())
        # A hub id is a name; the directory of its snapshot is called by a digest.
        name = source.resolve().name if Path(model_name).is_dir() else model_name
        facts = card.Facts(name, recipe.about(), weights, reports, vars(texts) if ids is not None else {}, measured)
        return _finish(parts, source, config, facts)


def _usable(device: str | torch.device) -> torch.device:
    """A device that computes here. Raises CheckpointError for any other."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise CheckpointError(f"device is {str(device)!r}, which cannot be used here: {str(error).splitlines()[0]}") from error
    return found


def _digest(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _quantize_blocks(
    skeleton: Skeleton, recipe: Recipe, ids: torch.Tensor | None, parts: Parts, progress: bool
) -> dict[str, LayerReport]:
    model, settings = skeleton.model, recipe.settings()
    with tqdm(total=len(models.linears(model)), desc=recipe.method.name, unit="layer", disable=not progress) as bar:
        return quantize_blocks(model, recipe.method, lambda name: settings, ids, parts, lambda name: bar.update(), skeleton)


def _measure(skeleton: Skeleton, parts: Parts, texts: Texts, stream: TokenStream | None, progress: bool) -> dict[str, Any]:
    """Perplexity before and after on the same windows, and of what text."""
    if stream is None:
        return {}
    found = {}
    with tqdm(total=2 * len(skeleton.blocks), desc="perplexity", unit="block", disable=not progress) as bar:
        for name, change in (("before", lambda block: None), ("after", parts.read)):

            def at_block(block: Block, change=change) -> None:
                change(block)
                bar.update()

            evaluation = evaluate_streamed(skeleton.model, skeleton, stream, texts.length, texts.windows, at_block)
            # A model that is broken may be so far off that exp does not reach it.
            found[name] = evaluation.perplexity if evaluation.mean_loss < 700 else float("inf")
    windows = len(stream.windows(texts.length, texts.windows))
    return found | {"text": stream.source, "sha256": stream.sha256, "windows": windows, "length": texts.length}


@contextmanager
def _tidied(parts: Parts) -> Iterator[None]:
    """Whatever happens, the lock is let go; where no block was finished, or none can be of use, nothing is left."""
    try:
        yield
    except SafetensorError as error:  # ours: the model's are open by now
        parts.give_up()
        raise CheckpointError(f"a file in {parts.partial} was damaged, and the run is dropped: run again ({error})") from error
    except BaseException as error:
        # What is wrong with the model or the settings will be wrong again. A full disk and a key that was pressed will not.
        keep = not isinstance(error, ValueError) and parts.any_done()
        if keep:
            parts.release()
        else:
            parts.give_up()
        if isinstance(error, WriteError) and error.disk_full:
            hint = "Make room and run again" + ("; finished blocks are kept" if keep else "")
            raise CheckpointError(f"{error}. {hint}") from error
        if isinstance(error, ValueError) and not isinstance(error, CheckpointError | TextError):
            raise CheckpointError(str(error)) from error
        raise


def _finish(parts: Parts, source: Path | None, config: Mapping[str, Any], facts: card.Facts) -> Path:
    said = dict(config) | {"quantization_config": layouts.config(parts.layout, facts.settings, facts.settings["dtype"])}
    for key in {"torch_dtype", "dtype"} & said.keys() or {"torch_dtype"}:
        said[key] = facts.settings["dtype"]
    sizes = card.sizes(parts.layout, (parts.shard(index) for index in range(len(parts.names) + 1)))
    files = {
        "config.json": json.dumps(said, indent=1),
        "quantization_report.json": json.dumps(facts.report(sizes), indent=1),
        "README.md": facts.text(sizes),
    }
    files |= {name: json.dumps(content, indent=1) for name, content in layouts.beside(parts.layout, facts.settings).items()}
    return parts.finish(files, copied_files(source) if source else {})


@_in_one_line()
@torch.no_grad()
def save(
    model: nn.Module,
    stored: Mapping[str, QuantizedTensor],
    out: str | Path,
    layout: str,
    source: str | Path | None = None,
    method: str = "",
    dtype: str = "float16",
) -> Path:
    """Write a model that is in memory, quantized: `stored` is what quantize_model(..., stored=stored) left there.

    source: a directory whose config, tokenizer and generation settings go with it; without it the model's own config, and no
    tokenizer. method: what the card calls it. Raises CheckpointError where a linear is missing in `stored`, where they differ in
    bits or groups, and for what the layout cannot hold. Returns `out`.
    """
    for name, value, known in (("layout", layout, layouts.LAYOUTS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise CheckpointError(f"{name} is {value!r}, wanted one of {', '.join(known)}")
    linears = models.linears(model)
    if missing := sorted(linears.keys() - stored.keys()):
        raise CheckpointError(f"stored lacks {missing[0]}: the {layout} layout is for models of which every linear is quantized")
    if foreign := sorted(stored.keys() - linears.keys()):
        raise CheckpointError(f"stored holds {foreign[0]}, which is no linear of the model's blocks")
    settings = {"method": method or layout, "layout": layout, "dtype": dtype} | _settings_of(stored)
    for name, layer in linears.items():
        layouts.check(layout, name, (layer.out_features, layer.in_features), settings["bits"])
    names = {id(module): name for name, module in model.named_modules()}
    blocks = [names[id(module)] for module in models.blocks(model)]
    parts = Parts(Path(out), {}, layout, blocks, settings["bits"], DTYPES[dtype], restart=True)
    try:
        for block in calibrate.bare_blocks(model):
            parts.write(block, {}, {name: stored[name] for name in block.linears})
        inside = tuple(name + "." for name in blocks)
        parts.save_outside({name: p.detach().cpu() for name, p in model.named_parameters() if not name.startswith(inside)})
        config = read_json(Path(source) / "config.json") if source else json.loads(model.config.to_json_string(use_diff=False))
        facts = card.Facts(
            Path(source).resolve().name if source else "", settings, sum(t.shape[0] * t.shape[1] for t in stored.values())
        )
        return _finish(parts, Path(source) if source else None, config, facts)
    except BaseException:
        parts.give_up()
        raise


def _settings_of(stored: Mapping[str, QuantizedTensor]) -> dict[str, Any]:
    """Bits, group size and the rest, as the tensors show them. group_size None: each whole row."""
    tensors = list(stored.values())
    if all(isinstance(tensor, BlockTensor) for tensor in tensors):
        found = {(tensor.kind, tensor.block_size, isinstance(tensor.absmax, NestedAbsmax)) for tensor in tensors}
        if len(found) == 1:
            kind, size, nested = found.pop()
            return {"bits": 4, "group_size": size, "codebook": kind, "double_quant": nested}
    elif all(isinstance(tensor, UniformTensor) for tensor in tensors):
        sizes, bits = {tensor.group_size for tensor in tensors}, {tensor.bits for tensor in tensors}
        whole = all(tensor.group_size == tensor.shape[1] for tensor in tensors)
        if len(bits) == 1 and (whole or len(sizes) == 1):
            return {
                "bits": bits.pop(),
                "group_size": None if whole else sizes.pop(),
                "symmetric": all(tensor.packed_zero_points is None for tensor in tensors),
                "act_order": any(getattr(tensor, "g_idx", None) is not None for tensor in tensors),
            }
    raise CheckpointError("stored holds tensors of several kinds, bits or group sizes: a checkpoint has one of each")
