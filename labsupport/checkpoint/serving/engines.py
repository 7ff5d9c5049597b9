"""What stands behind our own server: a model of transformers in this process, or llama.cpp in a process of node."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from labsupport.checkpoint import stored
from labsupport.checkpoint.serving import choose
from labsupport.model import models

BEFORE = "a"
SCRIPT = Path(__file__).with_name("llama.mjs")


@dataclass(frozen=True)
class Sampling:
    """limit: tokens at most. temperature: 0 for the best token. top_p: the share of probability that is drawn from.

    ignore_end: go on after a token that ends the text.
    """

    limit: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_end: bool = False


class Engine(Protocol):
    """context: tokens of prompt and answer together. vocabulary: tokens there are. has_tokenizer: whether it can read text."""

    context: int
    vocabulary: int
    has_tokenizer: bool

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""

    def generate(self, ids: Sequence[int], sampling: Sampling) -> tuple[list[int], bool]:
        """How it goes on after ids, and whether it came to an end before the limit."""


class Transformers:
    """What `models.load_model` or `checkpoint.load` reads; the latter computes in float32 with each weight as it reads back."""

    def __init__(self, path: Path):
        found = choose.look_at(path)
        self.model: Any
        self.model, self.tokenizer = models.load_model(str(path)) if found.layout == "float" else stored.load(path)
        self.device = next(self.model.parameters()).device
        config: Any = self.model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or 2**20
        self.vocabulary, self.has_tokenizer = models.vocabulary(self.model), self.tokenizer is not None
        ends = self.model.generation_config.eos_token_id
        self.ends: list[int] = [ends] if isinstance(ends, int) else list(ends or [])

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if self.tokenizer is not None else ""

    @torch.no_grad()
    def generate(self, ids: Sequence[int], sampling: Sampling) -> tuple[list[int], bool]:
        """Token by token with a cache, each the best or drawn at its temperature from the most likely that make up top_p."""
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        prompt = torch.tensor([list(ids)], device=self.device)
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
        end = None if sampling.ignore_end else self.ends or None
        whole = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=sampling.limit, do_sample=bool(drawn), eos_token_id=end,
            pad_token_id=self.ends[0] if self.ends else 0, **drawn,
        )  # fmt: skip
        new = whole[0, len(ids) :].tolist()
        ended = end is not None and bool(new) and new[-1] in end
        return new[:-1] if ended else new, ended


class Cyllama:
    """llama.cpp as the package cyllama carries it, in this process."""

    has_tokenizer = True

    def __init__(self, path: Path):
        from cyllama.llama import llama_cpp

        llama_cpp.disable_logging()
        self.lib, self.model = llama_cpp, llama_cpp.LlamaModel(str(path), verbose=False)
        self.vocab, self.context = self.model.get_vocab(), int(self.model.n_ctx_train)
        self.vocabulary, self.before = int(self.vocab.n_vocab), list(self.vocab.tokenize(BEFORE, False, False))
        settings = llama_cpp.LlamaContextParams()
        settings.n_ctx, settings.n_threads = self.context, torch.get_num_threads()
        settings.n_threads_batch = settings.n_threads
        self.state = llama_cpp.LlamaContext(self.model, settings, verbose=False)

    def encode(self, text: str) -> list[int]:
        return list(self.vocab.tokenize(text, True, True))

    def decode(self, ids: Sequence[int]) -> str:
        # It strips spaces from the start of a text, so another text stands before this one, and is taken away again.
        return str(self.vocab.detokenize([*self.before, *ids])).removeprefix(BEFORE)

    def generate(self, ids: Sequence[int], sampling: Sampling) -> tuple[list[int], bool]:
        self.state.kv_cache_clear()  # every request begins anew, so that no answer depends on the one before
        sampler, new = self._sampler(sampling), list[int]()
        for start in range(0, len(ids), self.state.n_batch):
            self._read(list(ids[start : start + self.state.n_batch]), start)
        while True:
            token = int(sampler.sample(self.state, -1))
            if self.vocab.is_eog(token) and not sampling.ignore_end:
                return new, True
            new.append(token)
            if len(new) == sampling.limit:
                return new, False
            self._read([token], len(ids) + len(new) - 1)

    def _sampler(self, sampling: Sampling) -> Any:
        sampler = self.lib.LlamaSampler(self.lib.LlamaSamplerChainParams())
        if sampling.temperature == 0:
            sampler.add_greedy()
        else:
            sampler.add_top_p(sampling.top_p, 1)
            sampler.add_temp(sampling.temperature)
            sampler.add_dist(random.getrandbits(32) if sampling.seed is None else sampling.seed)
        return sampler

    def _read(self, ids: list[int], position: int) -> None:
        """Raises OSError where llama.cpp does not take them."""
        if code := self.state.decode(self.lib.llama_batch_get_one(ids, position)):
            raise OSError(f"llama.cpp's decode ended with code {code}")


class Node:
    """llama.cpp as node-llama-cpp carries it, in a child process that is asked a line of JSON and answers one."""

    has_tokenizer = True

    def __init__(self, path: Path, node: str, package: str):
        command = [node, str(SCRIPT), package, str(path), str(torch.get_num_threads())]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        about = self._answer()
        self.context, self.vocabulary = int(about["context"]), int(about["vocabulary"])

    def _answer(self) -> dict[str, Any]:
        assert self.child.stdout
        line = self.child.stdout.readline()
        if not line:
            raise OSError(f"node ended with code {self.child.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise OSError(f"llama.cpp: {answer['error']}")
        return answer

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self.child.stdin
        self.child.stdin.write(json.dumps(question) + "\n")
        self.child.stdin.flush()
        return self._answer()

    def encode(self, text: str) -> list[int]:
        return list(self._ask(encode=text)["ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._ask(decode=list(ids))["text"])

    def generate(self, ids: Sequence[int], sampling: Sampling) -> tuple[list[int], bool]:
        answer = self._ask(generate=list(ids), **vars(sampling))
        return list(answer["ids"]), bool(answer["ended"])
