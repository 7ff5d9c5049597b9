"""Train the course model, or the smaller one beside it: a small Llama on the standard library's source and the language reference.

A run has a directory with `state.safetensors`: weights, optimizer, and in its metadata settings and losses, so that they are always
of one step. `progress.json` holds settings and losses again, for people to read. A run that was
stopped continues where it was; a finished run continues when it is given more tokens. Everything random comes from `seed` and the
step number, so a resumed run sees the same batches as an uninterrupted one.

The learning rate rises for `warmup` steps, stays, and falls linearly to zero over the last quarter
(the trapezoid of Hägele et al. 2024, arXiv:2405.18392), so that a longer run shares its beginning with a shorter one.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from labsupport.model import files, text
from labsupport.pipeline import training

STATE, PROGRESS, TOKENIZER = "state.safetensors", "progress.json", "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """What a run is. Sizes in tokens, `hidden` and `intermediate` in channels."""

    vocab: int = 4096
    hidden: int = 256
    intermediate: int = 768
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    context: int = 512
    batch: int = 16
    tokens: int = 24_000_000
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 100
    decay_share: float = 0.25
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.context)

    @property
    def schedule(self) -> training.Schedule:
        rates = self.learning_rate, self.weight_decay, self.warmup, self.decay_share
        return training.Schedule(self.steps, self.batch, self.context, *rates, self.seed)

    def rate(self, step: int) -> float:
        """Learning rate of one step, counted from 0."""
        return self.schedule.rate(step)


# The course model, and one of about a quarter of its parameters. Text, tokenizer and tokens seen are the same: what they differ
# in is size, so that "a larger model in fewer bits" can be set against "a smaller one in more" at equal bytes.
SIZES = {"full": Recipe(), "small": Recipe(hidden=128, intermediate=384, layers=5, heads=2, kv_heads=1)}


def train_tokenizer(documents: list[text.Document], vocab: int):
    """Byte-level BPE: any text can be encoded, and every token is a known number of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return tokenizer


def build_model(recipe: Recipe):
    """A float32 LlamaForCausalLM of the recipe's shape, tied embeddings, freshly initialised from its seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def training_documents() -> list[text.Document]:
    return text.documents("code", "train") + text.documents("prose", "train")


def _load_progress(directory: Path) -> dict[str, Any] | None:
    """What a run in `directory` left; None where no run has begun there. Raises ValueError where it holds anything but a run."""
    found = {path.name for path in directory.iterdir() if not (path.name.startswith(".") and path.suffix == files.SUFFIX)}
    if found - {STATE, PROGRESS, TOKENIZER} or (found and TOKENIZER not in found):
        raise ValueError(f"{directory} holds files that are not of a training run: choose another directory for --run")
    return training.read_progress(directory / STATE)


def train(
    directory: Path,
    recipe: Recipe,
    device: str = "cpu",
    compile_model: bool = False,
    save_every: int = 200,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
):
    """Run or resume the recipe in `directory`; returns (model, tokenizer, progress) when all steps are done.

    Matrix products run in bfloat16 with float32 weights. `on_step(step, loss)` is called after each step.
    Raises ValueError for a device that cannot be used here, and where `directory` holds a damaged run, other files, or a run of
    another text or recipe (more `tokens` is the one change allowed); files.WriteError where nothing can be written there.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise ValueError(f"device is {device!r}, which cannot be used here: {str(error).splitlines()[0]}") from error
    files.check_writable(directory / STATE)
    before = _load_progress(directory)
    documents = training_documents()
    if not (directory / TOKENIZER).exists():
        made = train_tokenizer(documents, recipe.vocab)
        files.replace(directory / TOKENIZER, lambda temporary: made.save(str(temporary)))
    try:
        tokenizer = Tokenizer.from_file(str(directory / TOKENIZER))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{directory / TOKENIZER} cannot be read as a tokenizer: {error}") from error
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=recipe.context,
    )
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    stream = text.tokenize(fast, [documents[i] for i in order], "train")

    model = build_model(recipe).to(device)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=training.BETAS, fused=True)

    progress = {"recipe": asdict(recipe), "losses": [], "seconds": 0.0}
    first = 0
    if before is not None:
        progress = before
        changed = {k for k, v in asdict(recipe).items() if progress["recipe"].get(k) != v} - {"tokens"}
        if changed:
            raise ValueError(f"{directory} holds a run with another {', '.join(sorted(changed))}: choose another directory")
        if progress["train_sha256"] != stream.sha256:
            raise ValueError(f"{directory} holds a run on another text, perhaps of another Python: choose another directory")
        first = training.load_state(directory / STATE, dict(model.named_parameters()), optimizer)
    progress["recipe"] = asdict(recipe)
    progress |= {
        "device": str(device), "torch": torch.__version__, "python": platform.python_version(),
        "train_sha256": stream.sha256, "train_tokens": len(stream), "train_bytes": stream.bytes,
    }  # fmt: skip

    def loss_of(window: torch.Tensor) -> torch.Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = model(input_ids=window[:, :-1], use_cache=False).logits
            return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())

    # The loss is compiled with the model: the logits, 134 MB a batch, are then never written in float32.
    loss_of = torch.compile(loss_of) if compile_model else loss_of
    model.train()
    began = time.perf_counter()
    for step in range(first, recipe.steps):
        window = training.batch_at(stream.ids, recipe.batch, recipe.context, recipe.seed, step).to(device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = loss_of(window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        on_step(step, value)
        if step % 20 == 0:
            progress["losses"].append([step, round(value, 4)])
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            now = time.perf_counter()
            progress["seconds"], began = progress["seconds"] + now - began, now
            training.save_state(directory / STATE, dict(model.named_parameters()), optimizer, step + 1, progress)
            files.write_text(directory / PROGRESS, json.dumps(progress, indent=1))
    return model.eval(), fast, progress
