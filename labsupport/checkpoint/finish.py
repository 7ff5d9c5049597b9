"""The last step of writing a checkpoint: its config, its card and report, its tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from labsupport.checkpoint import card, compressed_tensors, gguf_file, layouts
from labsupport.checkpoint.card import Facts
from labsupport.checkpoint.parts import Parts
from labsupport.checkpoint.tokenizers import copied_files
from labsupport.checkpoint.weights import CheckpointError, Weights
from labsupport.model import files, models, opened
from labsupport.quant import gguf_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALONE = "labsupport.checkpoint.load"


def finish(parts: Parts, model: PreTrainedModel, source: Path | None, config: Mapping[str, Any], facts: Facts) -> Path:
    """Write what stands beside the tensors and let the directory appear. Returns it.

    model: what was quantized; its weights are not looked at, but which linears it has and whether its head is the embedding.
    source: the directory of the original model, whose tokenizer and generation settings are copied. config: its config.json.
    """
    facts = replace(facts, readers=_readers(parts.layout, model, facts.settings))
    with closing(parts.stored()) as stored:
        if parts.layout == "gguf":
            return _finish_gguf(parts, stored, source, config, facts)
        sizes = card.sizes(stored)
    dtype = facts.settings["dtype"]
    quantized = models.linears(model)
    floats = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in quantized]
    new_config = dict(config) | {"quantization_config": layouts.config(parts.layout, facts.settings, dtype, floats)}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and getattr(head, "weight", None) is not embedding.weight:
        new_config["tie_word_embeddings"] = False  # the config of a model that was trained further may still say otherwise
    # transformers 5 writes dtype, older ones torch_dtype.
    for key in {"torch_dtype", "dtype"} & new_config.keys() or {"torch_dtype"}:
        new_config[key] = dtype
    contents = {"config.json": json.dumps(new_config, indent=1), **_about(facts, sizes)}
    for name, content in layouts.other_configs(parts.layout, facts.settings).items():
        contents[name] = json.dumps(content, indent=1)
    return parts.finish(contents, copied_files(source) if source else {})


def _about(facts: Facts, sizes: Mapping[str, int]) -> dict[str, str]:
    return {card.REPORT: json.dumps(facts.report(sizes), indent=1), "README.md": facts.text(sizes)}


def _finish_gguf(parts: Parts, stored: Weights, source: Path | None, config: Mapping[str, Any], facts: Facts) -> Path:
    """One file that holds everything, and the card. Raises CheckpointError without the directory of a tokenizer."""
    if source is None:
        raise CheckpointError("source is None, and a GGUF file holds the tokenizer: pass the model's directory")
    gguf_file.check(config, source)
    kinds = Counter(ending for name in stored if (ending := name.rpartition(".")[2]) in gguf_blocks.WEIGHTS)
    kind = kinds.most_common(1)[0][0]
    path = parts.model / gguf_file.NAME
    files.replace(path, lambda temporary: gguf_file.write(temporary, stored, config, source, facts.source, kind), sync=True)
    stored.close()
    contents = _about(facts, card.sizes(gguf_file.GGUFWeights(path)))
    return parts.finish(contents, {}, whole=gguf_file.NAME)


def _readers(layout: str, model: PreTrainedModel, settings: Mapping[str, Any]) -> str:
    """What reads a checkpoint of this model, which is taken apart; where that is not what reads the layout in general, and why."""
    linears = models.linears(model).values()
    classes = {type(linear) for linear in linears}
    if opened.routed(model):
        reason = "transformers from 5 on does not: it holds the experts of a block in one tensor"
        return f"{ALONE}. {reason}. Each expert has the names and the form that {layout} loaders with a layer for each ask for"
    if opened.Turned in classes and layout in ("awq", *layouts.COMPRESSED):
        whose = "AutoAWQ put AWQ's layer" if layout == "awq" else "compressed-tensors put theirs"
        return f"{ALONE}. transformers and {whose} in the place of an nn.Linear, and this model has Conv1D"
    others = sorted(kind.__name__ for kind in classes - {nn.Linear, opened.Turned})
    if others and layout == "bitsandbytes":
        return f"{ALONE}. transformers puts bitsandbytes' layer in the place of an nn.Linear itself, and this model has {others[0]}"
    block = settings["group_size"]
    if layout == "bitsandbytes" and (split := sorted({linear.in_features for linear in linears if linear.in_features % block})):
        # bitsandbytes 0.50: tests/test_bitsandbytes.py, and chapter 05. Its code for GPUs and for other processors is right.
        return (
            f"{card.LOADERS[layout]}, but not on a processor with AVX-512: there it takes wrong scales, without an error, for "
            f"rows that are not whole blocks of {block} weights, and this model has rows of {split[0]}"
        )
    if layout == compressed_tensors.PACKED and not settings.get("symmetric"):
        # compressed-tensors 0.20 makes no room for packed zero-points before transformers reads the file.
        return (
            "vLLM; transformers with quantization_config=CompressedTensorsConfig(run_compressed=False), since grids are asymmetric"
        )
    return card.LOADERS[layout]
