"""`labs quantize`: a model directory in, a quantized one out, with no more than one block in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from labsupport import __version__
from labsupport.checkpoint import card, gguf_file, layouts, rounded_before
from labsupport.checkpoint.finish import finish
from labsupport.checkpoint.measure import OURS, compare_with_transformers, evaluate_streamed, in_short
from labsupport.checkpoint.parts import Parts, check_free, in_one_line
from labsupport.checkpoint.recipe import DTYPES, Recipe
from labsupport.checkpoint.skeleton import Skeleton
from labsupport.checkpoint.texts import Texts, read_texts
from labsupport.checkpoint.tokenizers import COPIED
from labsupport.checkpoint.weights import CheckpointError, SourceChanged, find, read_json
from labsupport.model import models
from labsupport.model.files import WriteError
from labsupport.model.text import TextError, TokenStream
from labsupport.pipeline.block import Block
from labsupport.pipeline.driver import quantize_blocks
from labsupport.pipeline.linear import LayerReport
from labsupport.quant import int8


@in_one_line()
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
    warn: Callable[[str], object] = lambda line: None,
    **settings: Any,
) -> Path:
    """Quantize the model in a directory, or of a hub id, block by block, and write it in one of layouts.LAYOUTS.

    settings: what Recipe.of takes. The codes are those of quantize_model with the same settings. A run that was stopped continues
    after its last finished block if everything is the same; restart: forget it. Returns `out`.
    A measurement that fails is said in the card, and the checkpoint is written. warn: called before the work begins with a line
    on the group size, where none was named, and one for each thing that is allowed and most often a mistake.
    Raises CheckpointError or TextError with a message of one line; `out` is then not there.
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
    recipe = recipe.for_model(models.linears(skeleton.model))
    if recipe.layout == "gguf":
        gguf_file.check(config, source)
    texts = Texts(calibration, samples, length, windows)
    if recipe.why:
        warn(f"groups of {recipe.group_size} weights: {recipe.why}")
    on_lattice = rounded_before.remark(skeleton)
    for line in (*_warnings(source, skeleton, texts if recipe.method.needs_text else None), on_lattice):
        if line:
            warn(line)
    ids, held_out = read_texts(skeleton, source, texts, recipe.method.needs_text)

    identity = {**recipe.about(), "model": skeleton.weights.digest(), "config": _digest(config), "version": __version__}
    if ids is not None:
        identity |= {"calibration": _digest(ids.tolist())}
    names = [skeleton.name(block) for block in skeleton.blocks]

    def source_of(block: Block) -> str:
        """What a block depends on: its own tensors, and where text is looked at those that feed the first block."""
        return skeleton.digest(block) + (skeleton.digest_outside() if recipe.method.needs_text else "")

    dtype = DTYPES[recipe.dtype]
    parts = Parts(out, identity, recipe.layout, names, recipe.bits, dtype, restart, skeleton.to_file, source_of)
    with _tidied(parts):
        compared = {"compared": compare_with_transformers(source, skeleton, held_out, length)} if held_out is not None else {}
        reports = _quantize_blocks(skeleton, recipe, ids, parts, progress)
        parts.save_outside(skeleton.read(skeleton.outer))
        measured = compared | _measured_or_why_not(skeleton, parts, texts, held_out, progress)
        weights = sum(layer.weight.numel() for layer in models.linears(skeleton.model).values())
        # A hub id is a name; the directory of its snapshot is called by a digest.
        name = source.resolve().name if Path(model_name).is_dir() else model_name
        left = models.left_in_float(skeleton.model)
        about_texts = vars(texts) if ids is not None else {}
        facts = card.Facts(
            name, recipe.about(), weights, left, reports, about_texts, measured, on_lattice, group_size_why=recipe.why
        )
        return finish(parts, skeleton.model, source, config, facts)


def _warnings(source: Path, skeleton: Skeleton, texts: Texts | None) -> Iterator[str]:
    """texts: None where the method looks at none."""
    if (source / "adapter_config.json").is_file():
        yield f"{source} holds an adapter (adapter_config.json), which is not applied: merge it into the weights first"
    widest = max(layer.in_features for layer in models.linears(skeleton.model).values())
    if texts is not None and texts.samples * texts.length < widest:
        fewer = f"{texts.samples * texts.length} tokens of calibration text are fewer than the {widest} inputs of a linear"
        yield f"{fewer}, and leave most of what is measured of them open: take more --samples or a longer --length"


def _usable(device: str | torch.device) -> torch.device:
    """The device, after a computation on it. Raises CheckpointError where it cannot compute."""
    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable).item()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise CheckpointError(f"device is {str(device)!r}, which cannot be used here: {str(error).splitlines()[0]}") from error
    return usable


def _digest(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _quantize_blocks(
    skeleton: Skeleton, recipe: Recipe, ids: torch.Tensor | None, parts: Parts, progress: bool
) -> dict[str, LayerReport]:
    model, settings = skeleton.model, recipe.settings()
    with tqdm(total=len(models.linears(model)), desc=recipe.method.name, unit="layer", disable=not progress) as bar:
        return quantize_blocks(model, recipe.method, lambda name: settings, ids, parts, lambda name: bar.update(), skeleton)


def _measured_or_why_not(
    skeleton: Skeleton, parts: Parts, texts: Texts, stream: TokenStream | None, progress: bool
) -> dict[str, Any]:
    """What _measure returns, or {"failed": why}: the blocks are written and whole, and a model that cannot be run does not cost
    them. Raises what reading the model's files or the finished blocks raises.
    """
    try:
        return _measure(skeleton, parts, texts, stream, progress)
    except OURS:
        raise
    except Exception as error:
        return {"failed": in_short(error)}


def _measure(skeleton: Skeleton, parts: Parts, texts: Texts, stream: TokenStream | None, progress: bool) -> dict[str, Any]:
    """Perplexity "before" and "after" on the same windows, and which text they are from; nothing without a text."""
    if stream is None:
        return {}
    measured: dict[str, Any] = {}
    with tqdm(total=2 * len(skeleton.blocks), desc="perplexity", unit="block", disable=not progress) as bar:
        for name in ("before", "after"):

            def at_block(block: Block, name: str = name) -> None:
                if name == "after" and parts.read(block) is None:
                    raise CheckpointError(f"{parts.shard(block.index)} is not what was written to it")
                if name == "after" and layouts.rounds_activations(parts.layout):
                    for layer in block.linears.values():
                        layer.register_forward_pre_hook(int8.round_inputs)
                bar.update()

            evaluation = evaluate_streamed(skeleton.model, skeleton, stream, texts.length, texts.windows, at_block)
            measured[name] = evaluation.perplexity
    windows = len(stream.windows(texts.length, texts.windows))
    return measured | {"text": stream.source, "sha256": stream.sha256, "windows": windows, "length": texts.length}


@contextmanager
def _tidied(parts: Parts) -> Iterator[None]:
    """Inside, whatever is raised releases the lock; where no block is finished, or none will be of use, nothing is left."""
    try:
        yield
    except SafetensorError as error:  # of a file of ours: the model's files are open by now
        parts.give_up()
        raise CheckpointError(f"a file in {parts.partial} was damaged, and the run is dropped: run again ({error})") from error
    except BaseException as error:
        # What is wrong with the model or the settings will be wrong again. A full disk and Ctrl-C need not happen again.
        keep = (isinstance(error, SourceChanged) or not isinstance(error, ValueError)) and parts.any_done()
        if keep:
            parts.release()
        else:
            parts.give_up()
        if isinstance(error, WriteError) and error.disk_full and keep:
            raise CheckpointError(f"{error}. Make room and run again; finished blocks are kept") from error
        if isinstance(error, ValueError) and not isinstance(error, CheckpointError | TextError):
            raise CheckpointError(str(error)) from error
        raise
