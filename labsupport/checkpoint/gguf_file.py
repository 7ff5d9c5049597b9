"""A model in one GGUF file, as llama.cpp reads it: written from finished blocks, and read tensor by tensor.

A file holds all there is: weights, what config.json says, the tokenizer. `labsupport.model.gguf_llama` has the names and what is
read of the metadata; here is what is written, for Llamas with a byte-level BPE tokenizer, and nothing else.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from labsupport.checkpoint.tokenizers import read_tokenizer
from labsupport.checkpoint.weights import ROWS, CheckpointError, Placed, read_json
from labsupport.model import gguf_llama
from labsupport.quant import gguf_blocks

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

NAME = "model.gguf"
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FILE_TYPES = {"q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0", "q4_1": "MOSTLY_Q4_1", "q4_k": "MOSTLY_Q4_K_S"}
# How llama.cpp calls the pre-tokenizers that are known here, by what tokenizer.json has before ByteLevel.
RULES = {"[]": "gpt-2", '[{"type": "Digits", "individual_digits": true}]': gguf_llama.DIGIT_BY_DIGIT}
KNOWN = {  # what config.json of a Llama may say beside its sizes
    "model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None),
    "pretraining_tp": (1, None), "rope_scaling": (None,), "partial_rotary_factor": (1.0, None),
}  # fmt: skip


def available() -> None:
    """Raise CheckpointError where the package gguf is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError("GGUF files are read and written with the package gguf: pip install 'labsupport[fetch]'")


# Writing -------------------------------------------------------------------------------------------------------------


def check(config: Mapping[str, Any], source: Path) -> None:
    """Raise CheckpointError for a model or a tokenizer that is not written as GGUF. source: the directory of the tokenizer."""
    available()
    for key, known in KNOWN.items():
        if config.get(key, known[-1]) not in known:
            wanted = " or ".join(map(repr, known))
            raise CheckpointError(f"{source} has {key} {config[key]!r}; GGUF is written for plain Llamas, with {wanted}")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"{source} has rope_type {rope['rope_type']!r}; GGUF is written for plain Llamas, with 'default'")
    _rule(_tokenizer(source), source)


def _tokenizer(source: Path) -> dict[str, Any]:
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(f"{source} holds no tokenizer.json, and a GGUF file holds the tokenizer")
    return read_json(source / "tokenizer.json")


def _rule(tokenizer: Mapping[str, Any], source: Path) -> str:
    """What tokenizer.ggml.pre is to say. Raises CheckpointError where llama.cpp would cut text otherwise than tokenizer.json."""
    model, before = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", []) if before.get("type") == "Sequence" else [before]
    *first, last = steps or [{}]
    rule = RULES.get(json.dumps(first))
    plain_bytes = last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and last.get("use_regex", True)
    odd = {
        key: model.get(key) for key in ("byte_fallback", "ignore_merges", "continuing_subword_prefix", "dropout") if model.get(key)
    }
    if model.get("type") != "BPE" or rule is None or not plain_bytes or odd or tokenizer.get("normalizer") is not None:
        kind = f"{model.get('type')} after {json.dumps(before)[:200]}" + (f" with {odd}" if odd else "")
        raise CheckpointError(
            f"the tokenizer in {source} is {kind}; "
            "GGUF is written for byte-level BPE that splits text as GPT-2 does, or digit by digit"
        )
    return rule


def write(path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], source: Path, name: str, kind: str) -> None:
    """Write a model. tensors: blocks as "LINEAR.q4_0", everything else as "NAME.weight"; each is read when its turn comes.

    config, source: of the original model, which `check` takes. name: what the model is called. kind: of most blocks.
    """
    from gguf import GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(2)  # GGML_QNT_VERSION, of the block formats
    _add_shape(writer, config)
    _add_tokenizer(writer, source, config)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads") or config["num_attention_heads"]}
    stored: list[tuple[str, str]] = []
    for full in sorted(tensors, key=lambda full: [int(part) if part.isdecimal() else -1 for part in full.split(".")]):
        module, _, ending = full.rpartition(".")
        kept = _for_file(tensors[full], ending, 0)
        writer.add_tensor_info(gguf_llama.stored_name(module), kept.shape, kept.numpy().dtype, kept.nbytes, _type(kept, ending))
        stored.append((full, ending))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for full, ending in stored:
            writer.write_tensor_data(_for_file(tensors[full], ending, heads.get(full.split(".")[-2], 0)).numpy())
    finally:
        writer.close()


def _for_file(tensor: torch.Tensor, ending: str, heads: int) -> torch.Tensor:
    """As it stands in the file: vectors in float32, as llama.cpp multiplies with them; bfloat16, which NumPy lacks, as bytes."""
    if heads:
        tensor = gguf_llama.pairs_together(tensor, heads)
    if tensor.ndim == 1:
        tensor = tensor.float()
    return tensor.contiguous().view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor.contiguous()


def _type(kept: torch.Tensor, ending: str) -> Any:
    from gguf import GGMLQuantizationType

    if ending in gguf_blocks.WEIGHTS:
        return GGMLQuantizationType[ending.upper()]
    return GGMLQuantizationType.BF16 if kept.dtype == torch.uint8 else None


def _add_shape(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    size = config.get("head_dim") or hidden // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base((config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: GGUFWriter, source: Path, config: Mapping[str, Any]) -> None:
    from gguf import TokenType

    tokenizer = _tokenizer(source)
    model, added = tokenizer["model"], {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    ids = {number: token for token, number in model["vocab"].items()} | {
        number: token["content"] for number, token in added.items()
    }
    count = config["vocab_size"]
    if beyond := [number for number in ids if number >= count]:
        raise CheckpointError(f"the tokenizer in {source} has token {beyond[0]}, the embedding {count} rows")
    tokens, types = [], []
    for number in range(count):
        special = added.get(number, {}).get("special")
        kind = TokenType.NORMAL if special is None else TokenType.CONTROL if special else TokenType.USER_DEFINED
        tokens.append(ids.get(number, f"[PAD{number}]"))  # rows of the embedding that no token has
        types.append(kind if number in ids else TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_rule(tokenizer, source))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    loaded = read_tokenizer(source)
    for role, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("pad", writer.add_pad_token_id),
                      ("unk", writer.add_unk_token_id)):  # fmt: skip
        token = getattr(loaded, f"{role}_token_id")
        token = config.get(f"{role}_token_id") if token is None else token
        if isinstance(token, int):
            add(token)
    first = loaded("")["input_ids"]
    writer.add_add_bos_token(first[:1] == [loaded.bos_token_id])
    writer.add_add_eos_token(False)
    if isinstance(loaded.chat_template, str):
        writer.add_chat_template(loaded.chat_template)


# Reading -------------------------------------------------------------------------------------------------------------


def located(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the only one in a directory without safetensors; None where there is none."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_dir() and not any(path.glob("*.safetensors")):
        found = sorted(path.glob("*.gguf"))
        return found[0] if len(found) == 1 and found[0].is_file() else None
    return None


class GGUFWeights(Placed):
    """Every tensor of a GGUF file by the name that it has in transformers, as checkpoint.weights.Weights has those of a directory.

    A linear in blocks is "NAME.q4_0", uint8 [out_features, bytes of a row], rows in the order of transformers. Blocks outside the
    linears, as of an embedding, are dequantized: "NAME.weight". Raises CheckpointError for a file that is damaged or no Llama's.
    """

    def __init__(self, path: Path):
        available()
        from gguf import GGUFReader

        self.directory = self.described_by = path
        try:
            self.reader: GGUFReader = GGUFReader(path)
            self.config: dict[str, Any] = gguf_llama.read_config(self.reader) | {"quantization_config": {"quant_method": "gguf"}}
            self.places = {self._name(stored.name, stored.tensor_type.name): stored for stored in self.reader.tensors}
        except gguf_llama.GGUFError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except Exception as error:  # the reader trusts what a file says of its lengths, and raises whatever comes of it
            raise CheckpointError(f"{path} is damaged or not GGUF: {type(error).__name__}: {error}".splitlines()[0]) from error
        self._heads = {"q_proj": self.config["num_attention_heads"], "k_proj": self.config["num_key_value_heads"]}

    @staticmethod
    def _name(stored: str, kind: str) -> str:
        name = gguf_llama.name_of(stored)
        return f"{name.removesuffix('weight')}{kind.lower()}" if "_proj." in name and kind.lower() in gguf_blocks.WEIGHTS else name

    def __getitem__(self, name: str) -> torch.Tensor:
        held = self._stored(name)
        heads = self._heads.get(name.split(".")[-2] if "." in name else "", 0)
        return gguf_llama.halves_together(held, heads) if heads else held

    def _stored(self, name: str) -> torch.Tensor:
        place = self.places[name]
        kind = place.tensor_type.name
        data = torch.from_numpy(place.data.copy())  # a view of a mapped file is not writable, and torch would warn
        if kind in PLAIN:
            return data.view(PLAIN[kind])
        if name.endswith(".weight") and kind.lower() in gguf_blocks.WEIGHTS:
            return gguf_blocks.GGUFTensor(data, kind.lower()).dequantize()
        return data

    def shape(self, name: str) -> list[int]:
        if name.endswith(".weight"):
            return [int(size) for size in reversed(self.places[name].shape)]
        return list(self.places[name].data.shape)

    def kind(self, name: str) -> str:
        """The dtype as safetensors would name it; for blocks that are not read here, as GGUF does."""
        stored = self.places[name].tensor_type.name
        if stored.lower() in gguf_blocks.WEIGHTS:
            return "F32" if name.endswith(".weight") else "U8"
        return stored

    def nbytes(self, name: str) -> int:
        """In the file."""
        return int(self.places[name].n_bytes)

    def in_parts(self, name: str) -> Iterator[torch.Tensor]:
        yield from self[name].split(ROWS)

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        start = prefix + "."
        return {name.removeprefix(start): self[name] for name in self.places if name.startswith(start)}

    def rename(self, rename: Callable[[str], str]) -> None:
        self.places = {rename(name): place for name, place in self.places.items()}

    def tokenizer(self) -> Any:
        """The file's tokenizer. Raises CheckpointError for one that is not known here."""
        from transformers import PreTrainedTokenizerFast

        try:
            settings = gguf_llama.tokenizer_config(self.reader, self.config)
            settings.pop("tokenizer_class")
            return PreTrainedTokenizerFast(tokenizer_object=gguf_llama.read_tokenizer(self.reader), **settings)
        except (gguf_llama.GGUFError, KeyError, IndexError, TypeError) as error:
            raise CheckpointError(f"the tokenizer in {self.directory} cannot be read: {error}") from error
