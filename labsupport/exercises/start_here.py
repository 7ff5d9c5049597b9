"""Chapter 0: the bytes of a model, perplexity from logits, bits per byte from losses."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from labsupport.exercises.form import Exercise, Mistake, Mutant, generator, mistakes_by_option, mistakes_of


# 0.1 ------------------------------------------------------------------------------------------------------------------
class TinyModel(nn.Module):
    """The parts of a language model that matter here: an embedding shared with the head, a norm kept in float32 and frozen."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.made_of = (vocabulary, width)  # to make one like it elsewhere
        self.embedding = nn.Embedding(vocabulary, width, dtype=torch.bfloat16)
        self.linear = nn.Linear(width, 3 * width, dtype=torch.float16)
        self.norm = nn.LayerNorm(width, dtype=torch.float32).requires_grad_(False)
        self.head = nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embedding.weight


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters of a model, a parameter that two modules share counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def parameter_inputs(seed: int) -> dict:
    width, more = torch.randint(10, 30, (2,), generator=generator(seed)).tolist()
    return {"model": TinyModel(3 * width + more, width)}


def _summed(of):
    return lambda model: sum(map(of, model.parameters()))


PARAMETER_BYTES = Exercise(
    id="0.1", name="parameter_bytes", title="What a model weighs", minutes=4, difficulty=1, points=1,
    returns=("size",), inputs=parameter_inputs, reference=parameter_bytes,
    mistakes=(
        Mistake("the weight that embedding and head share is counted twice: it lies in memory once. What does model.parameters() "
                "do about it, and what model.state_dict()?", lambda model: sum(p.nbytes for p in model.state_dict().values())),
        *mistakes_of(_summed, {
            "it is the number of parameters. Each of them takes element_size() bytes": lambda p: p.numel(),
            "every number is taken to have 2 bytes. This model keeps its norm in float32: ask each tensor": lambda p: 2 * p.numel(),
            "every number is taken to have 4 bytes. Most of this model is in 16 bits: ask each tensor": lambda p: 4 * p.numel(),
            "it is in bits, eight times too many": lambda p: 8 * p.nbytes,
            "frozen parameters are left out. They are not trained, but they take memory": lambda p: p.nbytes * p.requires_grad,
            "only the matrices are counted: biases and norms are parameters too": lambda p: p.nbytes * (p.ndim > 1),
            "it is in kB. Wanted: bytes": lambda p: p.nbytes / 1e3, "it is in KiB. Wanted: bytes": lambda p: p.nbytes / 2**10,
            "it is in MB. Wanted: bytes": lambda p: p.nbytes / 1e6, "it is in MiB. Wanted: bytes": lambda p: p.nbytes / 2**20,
        }),
    ),
    close=lambda given, want: 1e-15 * want["size"],  # a size that was divided by a unit: two roundings of a float64
)  # fmt: skip


# 0.2 ------------------------------------------------------------------------------------------------------------------
def window_perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Perplexity over all tokens of some windows but the first of each.

    logits float [windows, length, vocabulary]: entry t predicts token t + 1. ids int64 [windows, length].
    """
    predicted, target = logits[:, :-1], ids[:, 1:]
    return F.cross_entropy(predicted.flatten(0, 1), target.flatten()).exp().item()


def perplexity_inputs(seed: int) -> dict:
    """Windows of different difficulty, so that the order of averaging matters."""
    g = generator(seed)
    logits = torch.randn(3, 7, 11, generator=g) * torch.tensor([0.5, 1.5, 2.5])[:, None, None]
    return {"logits": logits, "ids": torch.randint(0, 11, (3, 7), generator=g)}


def _perplexity(logits, ids):
    """Of logits [..., vocabulary], each for the token in its place."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids.flatten()).exp().item()


def _of_losses(of):
    """An answer from the losses in nats, [windows, length - 1]."""
    return lambda logits, ids: of(F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")).item()


PERPLEXITY = Exercise(
    id="0.2", name="window_perplexity", title="Perplexity from logits", minutes=8, difficulty=2, points=2,
    returns=("perplexity",), inputs=perplexity_inputs, reference=window_perplexity,
    # Losses here stay below 20 nats. A log-softmax over 11 classes and a mean of 18 round less than 16 times by 2**-23 of that,
    # and an error in the exponent is a relative error in the result.
    allowed=lambda given, want: 20 * 16 * 2**-23 * want["perplexity"],
    mistakes=(
        *mistakes_by_option(_perplexity, {
            "logits and tokens are not shifted: entry t of the logits is about token t + 1": {},
            "logits and tokens are shifted the wrong way: entry t of the logits is about token t + 1, not t - 1":
                lambda x, ids: _perplexity(x[:, 1:], ids[:, :-1]),
            "the first token of a window is predicted from the end of the window before: shift within each window, then flatten":
                lambda x, ids: _perplexity(x.flatten(0, 1)[:-1], ids.flatten()[1:]),
            "the first token of a window is scored, with logits of the window's end: roll brings it round. Leave it out":
                lambda x, ids: _perplexity(x, ids.roll(-1, 1)),
        }),
        *mistakes_of(_of_losses, {
            "the sum is divided by all tokens, though the first of each window is not predicted":
                lambda losses: (losses.sum() / (losses.numel() + len(losses))).exp(),
            "it is the mean of exp(loss). Average the losses first, then take exp once: a few hopeless tokens must not decide":
                lambda losses: losses.exp().mean(),
            "it is the mean of the windows' perplexities. Average the losses of all tokens first, then take exp once":
                lambda losses: losses.mean(1).exp().mean(),
            "it is the loss, in nats. Perplexity is exp of it": lambda losses: losses.mean(),
            "2 to the power of a loss in nats: cross_entropy uses the natural logarithm, so the base is e":
                lambda losses: 2 ** losses.mean(),
            "exp of a loss in bits: base and logarithm must be the same": lambda losses: (losses.mean() / math.log(2)).exp(),
            "the sign is turned: it is the probability, and perplexity is one over it": lambda losses: (-losses.mean()).exp(),
            "it averages probabilities. Perplexity averages their logarithms": lambda losses: 1 / (-losses).exp().mean(),
        }),
    ),
    others=(Mutant(lambda x, ids: F.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp(), ".item()"),),
)  # fmt: skip


# 0.3 ------------------------------------------------------------------------------------------------------------------
def bits_per_byte(losses: torch.Tensor, passage: str) -> float:
    """Bits that a model needs for each byte of a passage. losses float [tokens]: nats of each of its tokens."""
    return losses.sum().item() / math.log(2) / len(passage.encode())


def bits_inputs(seed: int) -> dict:
    """A passage with letters of two and three bytes, and losses of about a third as many tokens."""
    g = generator(seed)
    words = ["naïve", "café", "Bézier", "“quoted”", "return", "None", "≤"]
    passage = " ".join(words[i] for i in torch.randint(0, len(words), (12,), generator=g).tolist()) + " é"
    return {"losses": 3 * torch.rand(len(passage) // 3, generator=g) + 0.1, "passage": passage}


def _bits(of):
    """An answer from nats, bits for a nat, bytes, tokens and characters."""
    return lambda losses, passage: of(losses.sum().item(), 1 / math.log(2), len(passage.encode()), len(losses), len(passage))


BITS_PER_BYTE = Exercise(
    id="0.3", name="bits_per_byte", title="Bits for each byte", minutes=6, difficulty=2, points=2,
    returns=("bits",), inputs=bits_inputs, reference=bits_per_byte,
    # A sum of fewer than 64 float32 numbers in any order, and two divisions.
    allowed=lambda given, want: 66 * 2**-24 * want["bits"],
    close=lambda given, want: 1e-4 * want["bits"],
    about=lambda given, *_: f"{given['losses'].sum().item():.4g} nats and {len(given['passage'].encode())} bytes, in bits a byte",
    mistakes=mistakes_of(_bits, {
        "divided by characters, not bytes: an é is one character and two bytes in UTF-8":
            lambda nats, bit, size, tokens, characters: nats * bit / characters,
        "it is in nats for each byte: cross-entropy uses the natural logarithm, and a bit is log(2) nats":
            lambda nats, bit, size, *_: nats / size,
        "a bit is log(2) = 0.69 nats, so a loss in bits is the larger number: divide by log(2)":
            lambda nats, bit, size, *_: nats / bit / size,
        "it is bits for each token. A token is several bytes, and how many depends on the tokenizer":
            lambda nats, bit, size, tokens, _: nats * bit / tokens,
        "the losses are averaged over tokens and then divided by bytes: sum them":
            lambda nats, bit, size, tokens, _: nats * bit / tokens / size,
        "it is bytes for each bit: turn it over": lambda nats, bit, size, *_: size / nats / bit,
    }),
    others=(Mutant(_bits(lambda nats, bit, size, *_: nats * bit / (size - 1)), "bytes"),),
)  # fmt: skip

EXERCISES = (PARAMETER_BYTES, PERPLEXITY, BITS_PER_BYTE)
