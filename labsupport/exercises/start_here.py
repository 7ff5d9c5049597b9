"""Chapter 0: the bytes of a model, perplexity from logits, bits per byte from losses."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from labsupport.exercises.base import Exercise, Mutant, Verdict, generator, right, shape_fault, wrong

# 0.1 ------------------------------------------------------------------------------------------------------------------


class TinyModel(nn.Module):
    """The parts of a language model that matter here: an embedding shared with the head, a norm kept in float32 and frozen."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, dtype=torch.bfloat16)
        self.linear = nn.Linear(width, 3 * width, dtype=torch.float16)
        self.norm = nn.LayerNorm(width, dtype=torch.float32).requires_grad_(False)
        self.head = nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embedding.weight


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters of a model, a parameter that two modules share counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def parameter_inputs(seed: int) -> dict:
    vocabulary, width = torch.randint(20, 60, (2,), generator=generator(seed)).tolist()
    return {"model": TinyModel(vocabulary, width)}


def judge_bytes(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    size, expected = got["size"], want["size"]
    if size == expected:
        return right()
    parameters = list(given["model"].parameters())
    count = sum(p.numel() for p in parameters)
    likely = {
        "it is the number of parameters. Each of them takes element_size() bytes": count,
        "the weight that embedding and head share is counted twice: it lies in memory once. What does model.parameters() do "
        "about it, and what model.state_dict()?": sum(p.numel() * p.element_size() for p in given["model"].state_dict().values()),
        "every number is taken to have 2 bytes. This model keeps its norm in float32: ask each tensor": 2 * count,
        "every number is taken to have 4 bytes. Most of this model is in 16 bits: ask each tensor": 4 * count,
        "it is in bits, eight times too many": 8 * expected,
        "frozen parameters are left out. They are not trained, but they take memory": sum(
            p.numel() * p.element_size() for p in parameters if p.requires_grad
        ),
        "only the matrices are counted: biases and norms are parameters too": sum(
            p.numel() * p.element_size() for p in parameters if p.ndim > 1
        ),
        "it is in kilobytes or megabytes. Wanted: bytes": next(
            (expected / unit for unit in (1e3, 2**10, 1e6, 2**20) if abs(size - expected / unit) < 1e-6 * expected / unit), None
        ),
    }
    for said, mistake in likely.items():
        if size == mistake or (isinstance(mistake, float) and abs(size - mistake) < 1e-6 * mistake):
            return wrong(said)
    return wrong(f"got {size:g} bytes, wanted {expected}")


def _summed(of) -> object:
    return lambda model: sum(of(p) for p in model.parameters())


PARAMETER_BYTES = Exercise(
    id="0.1", name="parameter_bytes", title="What a model weighs", minutes=4, difficulty=1, points=1,
    returns=("size",), inputs=parameter_inputs, reference=parameter_bytes, judge=judge_bytes,
    mutants=(
        Mutant(_summed(lambda p: p.numel()), "number of parameters"),
        Mutant(lambda model: sum(p.numel() * p.element_size() for p in model.state_dict().values()), "counted twice"),
        Mutant(_summed(lambda p: 2 * p.numel()), "2 bytes"),
        Mutant(_summed(lambda p: 4 * p.numel()), "4 bytes"),
        Mutant(_summed(lambda p: 8 * p.numel() * p.element_size()), "in bits"),
        Mutant(_summed(lambda p: p.numel() * p.element_size() * p.requires_grad), "frozen"),
        Mutant(_summed(lambda p: p.numel() * p.element_size() * (p.ndim > 1)), "biases and norms"),
        Mutant(_summed(lambda p: p.numel() * p.element_size() / 2**20), "megabytes"),
    ),
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


def _losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Loss of each token in nats, [windows, length - 1]."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def judge_perplexity(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    logits, ids = given["logits"], given["ids"]
    value, expected = got["perplexity"], want["perplexity"]
    # Losses here stay below 20 nats. A log-softmax over 11 classes and a mean of 18 round less than 16 times by 2**-23 of that,
    # and an error in the exponent is a relative error in the result.
    allowed = 20 * 16 * 2**-23 * expected
    if abs(value - expected) <= allowed:
        return right(abs(value - expected), allowed)
    losses = _losses(logits, ids)
    mean = losses.mean()
    straight = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    likely = {
        "logits and tokens are not shifted: entry t of the logits is about token t + 1": straight.exp(),
        "logits and tokens are shifted the wrong way: entry t of the logits is about token t + 1, not t - 1": (
            F.cross_entropy(logits[:, 1:].flatten(0, 1), ids[:, :-1].flatten()).exp()
        ),
        "the first token of a window is predicted from the end of the window before: shift within each window, then flatten": (
            F.cross_entropy(logits.flatten(0, 1)[:-1], ids.flatten()[1:]).exp()
        ),
        "the first token of a window is scored, with logits of the window's end: roll brings it round. Leave it out": (
            F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).exp()
        ),
        "the sum is divided by all tokens, though the first of each window is not predicted": (losses.sum() / ids.numel()).exp(),
        "it is the mean of exp(loss). Average the losses first, then take exp once: a few hopeless tokens must not decide": (
            losses.exp().mean()
        ),
        "it is the mean of the windows' perplexities. Average the losses of all tokens first, then take exp once": (
            losses.mean(1).exp().mean()
        ),
        "it is the loss, in nats. Perplexity is exp of it": mean,
        "2 to the power of a loss in nats: cross_entropy uses the natural logarithm, so the base is e": torch.exp2(mean),
        "exp of a loss in bits: base and logarithm must be the same": (mean / math.log(2)).exp(),
        "the sign is turned: it is the probability, and perplexity is one over it": (-mean).exp(),
        "it averages probabilities. Perplexity averages their logarithms": 1 / (-losses).exp().mean(),
    }
    for said, mistake in likely.items():
        if abs(value - mistake.item()) < 1e-5 * abs(mistake.item()):
            return wrong(said)
    return wrong(f"got {value:.4g}, wanted {expected:.4g}, for {logits.shape[2]} classes and random logits")


PERPLEXITY = Exercise(
    id="0.2", name="window_perplexity", title="Perplexity from logits", minutes=8, difficulty=2, points=2,
    returns=("perplexity",), inputs=perplexity_inputs, reference=window_perplexity, judge=judge_perplexity,
    mutants=(
        Mutant(lambda x, ids: F.cross_entropy(x.flatten(0, 1), ids.flatten()).exp().item(), "not shifted"),
        Mutant(lambda x, ids: F.cross_entropy(x[:, 1:].flatten(0, 1), ids[:, :-1].flatten()).exp().item(), "the wrong way"),
        Mutant(lambda x, ids: F.cross_entropy(x.flatten(0, 1)[:-1], ids.flatten()[1:]).exp().item(), "window before"),
        Mutant(lambda x, ids: F.cross_entropy(x.flatten(0, 1), ids.roll(-1, 1).flatten()).exp().item(), "roll"),
        Mutant(lambda x, ids: (_losses(x, ids).sum() / ids.numel()).exp().item(), "divided by all tokens"),
        Mutant(lambda x, ids: _losses(x, ids).exp().mean().item(), "mean of exp"),
        Mutant(lambda x, ids: _losses(x, ids).mean(1).exp().mean().item(), "windows' perplexities"),
        Mutant(lambda x, ids: _losses(x, ids).mean().item(), "it is the loss"),
        Mutant(lambda x, ids: 2 ** _losses(x, ids).mean().item(), "the base is e"),
        Mutant(lambda x, ids: (_losses(x, ids).mean() / math.log(2)).exp().item(), "loss in bits"),
        Mutant(lambda x, ids: (-_losses(x, ids).mean()).exp().item(), "the sign"),
        Mutant(lambda x, ids: 1 / (-_losses(x, ids)).exp().mean().item(), "averages probabilities"),
        Mutant(lambda x, ids: _losses(x, ids).mean().exp(), ".item()"),
    ),
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


def judge_bits(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    losses, passage = given["losses"], given["passage"]
    value, expected = got["bits"], want["bits"]
    # A sum of fewer than 64 float32 numbers in any order, and two divisions.
    allowed = 66 * 2**-24 * expected
    if abs(value - expected) <= allowed:
        return right(abs(value - expected), allowed)
    nats, size, tokens = losses.sum().item(), len(passage.encode()), len(losses)
    log2 = math.log(2)
    likely = {
        "divided by characters, not bytes: an é is one character and two bytes in UTF-8": nats / log2 / len(passage),
        "it is in nats for each byte: cross-entropy uses the natural logarithm, and a bit is log(2) nats": nats / size,
        "a bit is log(2) = 0.69 nats, so a loss in bits is the larger number: divide by log(2)": nats * log2 / size,
        "it is bits for each token. A token is several bytes, and how many depends on the tokenizer": nats / log2 / tokens,
        "the losses are averaged over tokens and then divided by bytes: sum them": nats / log2 / tokens / size,
        "it is bytes for each bit: turn it over": size * log2 / nats,
    }
    for said, mistake in likely.items():
        if abs(value - mistake) < 1e-4 * mistake:
            return wrong(said)
    return wrong(f"got {value:.4g}, wanted {expected:.4g}, for {nats:.4g} nats and {size} bytes")


def _bits(of) -> object:
    return lambda losses, passage: of(losses.sum().item(), len(passage.encode()), len(losses))


BITS_PER_BYTE = Exercise(
    id="0.3", name="bits_per_byte", title="Bits for each byte", minutes=6, difficulty=2, points=2,
    returns=("bits",), inputs=bits_inputs, reference=bits_per_byte, judge=judge_bits,
    mutants=(
        Mutant(lambda losses, passage: losses.sum().item() / math.log(2) / len(passage), "characters"),
        Mutant(_bits(lambda nats, size, _: nats / size), "in nats"),
        Mutant(_bits(lambda nats, size, _: nats * math.log(2) / size), "divide by log(2)"),
        Mutant(_bits(lambda nats, _, tokens: nats / math.log(2) / tokens), "for each token"),
        Mutant(_bits(lambda nats, size, tokens: nats / math.log(2) / tokens / size), "sum them"),
        Mutant(_bits(lambda nats, size, _: size * math.log(2) / nats), "turn it over"),
        Mutant(lambda losses, passage: losses.sum() / math.log(2) / len(passage.encode()), ".item()"),
    ),
)  # fmt: skip

EXERCISES = (PARAMETER_BYTES, PERPLEXITY, BITS_PER_BYTE)
