"""Small models as the hub has them, made on the spot: an OPT, two Qwen and a Llama, random weights, each its kind of tokenizer.

Their classes, biases, norms and ties are those of the real ones; widths are 576 and 960, which 128 does not divide. What is not
real is their depth and vocabulary, so that a notebook on them takes as long as on the course model.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from labsupport.model import models, text

VOCABULARY = 1024  # of the tokenizers that are trained here; the Llama reads the course model's tokens
BLOCKS = 3
CONTEXT = 2048
LLAMA = {
    "intermediate_size": 1536, "num_hidden_layers": BLOCKS, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6,
}  # fmt: skip
# Name: transformers' model_type, and its settings.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # facebook/opt-125m: a norm with biases before each half, biases in every linear, ReLU, learned positions, tied.
    "opt-576": (
        "opt",
        {
            "hidden_size": 576, "ffn_dim": 2304, "num_hidden_layers": BLOCKS, "num_attention_heads": 9,
            "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 576, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
        },
    ),
    # Qwen/Qwen2.5-0.5B: biases on queries, keys and values, two heads of keys, tied, and no token that opens a text.
    "qwen2-576": (
        "qwen2",
        LLAMA | {
            "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
            "bos_token_id": 0, "eos_token_id": 0,
        },
    ),
    # Qwen/Qwen3-0.6B: norms of queries and keys after their projections, heads wider in all than the model.
    "qwen3-960": (
        "qwen3",
        LLAMA | {
            "hidden_size": 960, "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 128, "tie_word_embeddings": True,
            "bos_token_id": 0, "eos_token_id": 0,
        },
    ),
    # meta-llama/Llama-3.2-1B's shape at SmolLM2-360M's width, a head of its own.
    "llama-960": (
        "llama",
        LLAMA | {
            "hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64,
            "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
        },
    ),
}  # fmt: skip
SPECIAL = {"opt": ["<s>", "<pad>", "</s>", "<unk>"], "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}


# A third as wide, and still no multiple of 128: for the tests of every day.
NARROW = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 512}
NARROW_OPT = {"hidden_size": 192, "num_attention_heads": 3, "ffn_dim": 768, "word_embed_proj_dim": 192}
NARROW_HEADS = {"num_key_value_heads": 1}


def write(name: str, directory: Path, narrow: bool = False) -> Path:
    """The model with this name and its tokenizer, as a directory. Weights are in float16, as OPT's are. Returns the directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = CONFIGS[name]
    if narrow:
        settings = settings | (NARROW_OPT if kind == "opt" else NARROW | NARROW_HEADS)
    _write_tokenizer(kind, directory)
    vocabulary = VOCABULARY if kind != "llama" else 4096
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=vocabulary, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases off their defaults, so that one that is forgotten shows
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.half().save_pretrained(directory)
    return directory


def _write_tokenizer(kind: str, directory: Path) -> None:
    """OPT's is GPT-2's with a token before each text; Qwen's is one of bytes too, with nothing before; Llama's is the course's."""
    if kind == "llama":
        directory.mkdir(parents=True, exist_ok=True)
        for file in models.course_model_dir().glob("tokenizer*.json"):
            shutil.copy(file, directory)
        return
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL["opt" if kind == "opt" else "qwen"]
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in text.documents("prose", "heldout")), trainer)
    names: dict[str, str] = {"eos_token": special[0], "pad_token": special[0]}
    if kind == "opt":
        names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", special.index("</s>"))]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)


def write_articles(folder: Path) -> Path:
    """A directory with a text of its own: the topics of the language reference, in the two splits. Returns it."""
    for split in text.SPLITS:
        (folder / split).mkdir(parents=True)
        for document in text.documents("prose", split):
            (folder / split / f"{document.name.partition(':')[2]}.txt").write_text(document.text, "utf-8")
    return folder
