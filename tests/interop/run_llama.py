"""GGUF files loaded by llama.cpp: `python -m interop.run_llama FOLDER OUT NAME...`.

Runs in `llama`. FOLDER/NAME is a directory with model.gguf, or such a file; FOLDER/words.txt a text to cut into tokens. What is
written to OUT, `interop.measure` says; `words` beside it, int64, are the tokens of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from cyllama.llama import llama_cpp
from interop import measure


class Model(llama_cpp.LlamaModel):
    """cyllama 0.2.18 asks a model for n_vocab when it gives the logits of one place of several, and the vocabulary has it."""

    @property
    def n_vocab(self) -> int:
        return self.get_vocab().n_vocab


class Running:
    """A model of which llama.cpp computes on one thread."""

    def __init__(self, path: Path, length: int):
        self.model = Model(str(path))
        self.vocab = self.model.get_vocab()
        params = llama_cpp.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = length
        params.n_threads = params.n_threads_batch = 1
        self.context = llama_cpp.LlamaContext(self.model, params)

    def logits(self, tokens: Sequence[int], start: int = 0) -> torch.Tensor:
        """After each of the tokens, float32 [n, vocabulary]. start: how many stand before them; 0 forgets what was there."""
        if start == 0:
            self.context.kv_cache_clear()
        batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for place, token in enumerate(tokens):
            batch.add(token, start + place, [0], True)
        self.context.decode(batch)
        # Row by row: lists of all rows together would be millions of Python's numbers.
        return torch.stack([torch.tensor(self.context.get_logits_ith(place)) for place in range(len(tokens))])


def found(folder: Path, tokens: measure.Measured) -> tuple[measure.Measured, str]:
    prompt, text = tokens["prompt"][0].tolist(), tokens["text"]
    running = Running(next(folder.glob("*.gguf")), max(len(prompt) + measure.NEW_TOKENS, text.shape[1]))
    after = running.logits(prompt)
    greedy = [int(after[-1].argmax())]
    while len(greedy) < measure.NEW_TOKENS:
        greedy.append(int(running.logits(greedy[-1:], len(prompt) + len(greedy) - 1)[0].argmax()))
    losses = [torch.nn.functional.cross_entropy(running.logits(window[:-1].tolist()).double(), window[1:]) for window in text]
    words = (folder.parent / "words.txt").read_bytes().decode()
    measured = {"log_probabilities": after.log_softmax(1), "greedy": torch.tensor(greedy), "losses": torch.stack(losses)}
    return measured | {"words": torch.tensor(running.vocab.tokenize(words, True, True))}, "llama.cpp"


if __name__ == "__main__":
    measure.main(found)
