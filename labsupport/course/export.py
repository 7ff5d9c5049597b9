"""Write the course model as a plain LlamaForCausalLM directory that old and new transformers read alike, with its card.

Weights are stored in float16. transformers 4.51 cannot use a directory as transformers 5 writes it: the tokenizer class is one that
4.51 refuses, and rope theta stands where 4.51 does not look, so that it silently takes the default. Therefore config and tokenizer
settings are written here, with both spellings.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labsupport.course.train import END_OF_TEXT, SIZES, Recipe
from labsupport.model.evaluate import evaluate
from labsupport.model.files import replaced_directory, save_tensors
from labsupport.model.text import load_text


def _config(model: nn.Module) -> dict[str, Any]:
    c = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.hidden_size // c.num_attention_heads,
        "max_position_embeddings": c.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": c.rms_norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": c.initializer_range,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float16",
        # The same fact for readers of both kinds.
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }


def _tokenizer_config(context: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }


# What `export` writes: a directory with anything else in it is not one of ours.
NAMES = {
    "model.safetensors", "tokenizer.json", "config.json", "generation_config.json", "tokenizer_config.json", "training.json",
    "loss.png", "README.md",
}  # fmt: skip


def check_replaceable(directory: Path) -> None:
    """Raises ValueError where `directory` is there and neither empty nor a model that `export` wrote."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ValueError(f"{directory} is a file or a link: choose another directory for the model")
    found = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if found and not ({"training.json", "model.safetensors"} <= found <= NAMES):
        raise ValueError(f"{directory} is not a model that labs train wrote, and is left as it is: choose another directory")


def export(model: nn.Module, tokenizer_file: Path, progress: dict[str, Any], directory: Path) -> None:
    """Write weights, config, tokenizer, card, recipe and loss curve to `directory`, all or nothing.

    progress: what labsupport.course.train.train returned. A model that this wrote before is replaced when the new one
    is complete. Raises ValueError where a weight does not fit float16, and where `directory` holds anything else.
    """
    check_replaceable(directory)
    tensors = {k: v.detach().cpu().half().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    if any(not t.isfinite().all() for t in tensors.values()):
        raise ValueError("model has a weight that float16 cannot hold")
    with replaced_directory(directory) as temporary:
        save_tensors(temporary / "model.safetensors", tensors, {"format": "pt"})
        shutil.copyfile(tokenizer_file, temporary / "tokenizer.json")
        files = {
            "config.json": _config(model),
            "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
            "tokenizer_config.json": _tokenizer_config(model.config.max_position_embeddings),
            "training.json": progress,
        }
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, indent=1) + "\n")
        (temporary / "loss.png").write_bytes(_loss_curve(progress).png())
        (temporary / "README.md").write_text(_card(temporary, progress), "utf-8")


def _loss_curve(progress: dict[str, Any]):
    from labsupport.figures import base

    steps, losses = zip(*progress["losses"], strict=True)
    recipe = progress["recipe"]
    smooth = torch.tensor(losses).unfold(0, 5, 1).mean(1).tolist() if len(losses) >= 5 else list(losses)
    figure, axis = base.new(f"Training loss falls from {losses[0]:.2f} to {smooth[-1]:.2f} nats a token.")
    scale = recipe["batch"] * recipe["context"] / 1e6
    axis.plot([s * scale for s in steps], losses, color=base.SKY, linewidth=0.7, label="every 20th batch")
    axis.plot([s * scale for s in steps[len(steps) - len(smooth) :]], smooth, color=base.BLUE, label="mean of five")
    axis.set_ylim(min(smooth) - 0.2, min(6.5, max(losses)))
    base.label(axis, "Training loss", "tokens seen (millions)", "loss (nats a token)")
    base.legend(axis)
    return figure


def _card(directory: Path, progress: dict[str, Any]) -> str:
    from labsupport.model import models
    from labsupport.pipeline import quantize

    model, tokenizer = models.load_model(str(directory), device="cpu")
    recipe = Recipe(**progress["recipe"])
    rows = []
    streams = {source: load_text(tokenizer, source) for source in ("code", "prose")}
    for source, stream in streams.items():
        result = evaluate(model, stream, progress=True)
        rows.append(
            f"| {source} | {len(stream.names)} | {stream.bytes:,} | {result.windows} | {result.perplexity:.2f} | "
            f"{result.bits_per_byte:.3f} | `{stream.sha256[:12]}` |"
        )
    before = evaluate(model, streams["code"], windows=256)
    losses = []
    for bits in (4, 3):
        after = evaluate(quantize.quantize_model(model, "rtn", bits=bits, group_size=128)[0], streams["code"], windows=256)
        losses.append(f"| {bits} | {100 * (after.perplexity / before.perplexity - 1):+.2f} % |")
    parameters = sum(p.numel() for p in model.parameters())
    small = recipe.hidden == SIZES["small"].hidden
    title, command = ("The small course model", "labs train --size small") if small else ("The course model", "labs train")
    table, quantized = "\n".join(rows), "\n".join(losses)
    recipe_line = (
        f"{recipe.tokens:,} tokens in {recipe.steps} steps of {recipe.batch} windows of {recipe.context}; AdamW (0.9, 0.95), "
        f"weight decay {recipe.weight_decay}, peak learning rate {recipe.learning_rate}, {recipe.warmup} steps of warm-up, "
        f"linear decay over the last {100 * recipe.decay_share:.0f} %; gradient norm clipped at 1; bfloat16 products with "
        f"float32 weights; seed {recipe.seed}. "
        f"{progress['seconds'] / 60:.0f} minutes on `{progress['device']}` with torch {progress['torch']}."
    )
    data_line = (
        f"read from Python {progress['python']}: {progress['train_bytes']:,} bytes, {progress['train_tokens']:,} tokens "
        f"(SHA-256 of the training text `{progress['train_sha256'][:12]}`)."
    )
    shape_line = (
        f"{recipe.layers} blocks, hidden {recipe.hidden}, intermediate {recipe.intermediate}, {recipe.heads} query heads and "
        f"{recipe.kv_heads} key and value head{'s' * (recipe.kv_heads > 1)} of {recipe.hidden // recipe.heads}, "
        f"vocabulary {recipe.vocab} (byte-level BPE), context {recipe.context}, tied embeddings, RoPE with theta 10000."
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
language: en
---
# {title}

A small Llama ({parameters / 1e6:.2f} million parameters, float16) that continues Python source and Python documentation.
It exists to be quantized: trained far enough that losing bits shows, small enough that two cores evaluate it in
seconds. It is not useful for anything else, and nothing it writes should be run.

## Shape

{shape_line}

## Data

The standard library's source without its own tests and without character-set tables ("code"), and the language
reference in `pydoc_data.topics` ("prose"), {data_line}
Documents are held out by a hash of their names; see `labsupport/model/text.py`. Both are part of Python and come under the
Python Software Foundation License.

## Recipe

{recipe_line}
`{command}` does it again, and continues a finished run when given more tokens. Every setting and the losses are in
`training.json`.

![Training loss against tokens seen](loss.png)

## Held-out figures

Perplexity as `labsupport.model.evaluate` defines it: windows of {recipe.context} tokens, float32 on a CPU.

| text | documents | bytes | windows | perplexity | bits a byte | text SHA-256 |
|---|---|---|---|---|---|---|
{table}

Rise in perplexity on held-out code when the linears of all blocks are rounded to nearest, groups of 128, asymmetric:

| bits | rise |
|---|---|
{quantized}
"""
