"""The files of a model directory that are neither weights nor config: tokenizer and generation settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labsupport.checkpoint.weights import CheckpointError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
COPIED = (
    *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.txt",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE", "LICENSE.txt",
    "tekken.json", "sentencepiece.bpe.model", "vocab.bpe", "encoder.json", "tokenizer.model.v3",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip


def copied_files(directory: Path) -> dict[str, Path]:
    """The files that are copied unchanged from a model to its quantized form, by their name below its directory."""
    found = (path for pattern in COPIED for path in sorted(directory.glob(pattern)))
    return {path.relative_to(directory).as_posix(): path for path in found if path.is_file()}


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer of a directory, None where it has none. Raises CheckpointError for one that cannot be read."""
    if not any((directory / name).is_file() for name in TOKENIZERS):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the tokenizer in {directory} cannot be read: {reason}") from error
