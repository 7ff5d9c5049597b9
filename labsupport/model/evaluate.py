"""How good a model is: perplexity, defined once; KL divergence and agreement with another model; intervals.

The definition. Documents are joined, an end-of-text token after each. The stream is cut into windows of `length` tokens
that follow each other without overlap; a tail that does not fill a window is left out. Each token but the first of its
window is predicted from those before it in the window. Perplexity is exp of the mean negative log-likelihood (natural
logarithm, float32 log-softmax) over all predicted tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from labsupport.model import models, quick
from labsupport.model.text import TokenStream
from labsupport.quant import checks

LARGEST_LOSS = math.log(sys.float_info.max)

LENGTH = 512
BATCH = 4
LOGITS = 2**25  # numbers that a batch may have as logits: 128 MiB in float32
CHUNK = 2**23  # of them, for which losses are taken at a time, since that takes two copies


@dataclass(frozen=True)
class Evaluation:
    """Losses of one model on one text, summed by document so that documents can be resampled.

    loss: float64 [documents], summed negative log-likelihood in nats. tokens: int64 [documents], predicted tokens.
    """

    loss: torch.Tensor
    tokens: torch.Tensor
    windows: int
    length: int
    tokens_per_byte: float
    sha256: str

    @property
    def mean_loss(self) -> float:
        """Nats a token."""
        return (self.loss.sum() / self.tokens.sum()).item()

    @property
    def perplexity(self) -> float:
        """Infinity where it is more than a float holds, as of a broken model."""
        return math.exp(self.mean_loss) if not self.mean_loss > LARGEST_LOSS else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers: mean bits a token, times tokens a byte of the whole text."""
        return self.mean_loss / math.log(2) * self.tokens_per_byte


@dataclass(frozen=True)
class Interval:
    """A change in perplexity relative to a reference, 0.01 for 1 %, with a paired bootstrap interval."""

    change: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.change:+.2f} % [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


def _check_stream(stream: TokenStream) -> None:
    if not isinstance(stream, TokenStream):
        raise TypeError(f"stream is {checks.kind(stream)}, wanted a TokenStream, as load_text gives it")


def batch_size(model: nn.Module, length: int) -> int:
    """How many windows to run at a time: BATCH, fewer where the vocabulary is so large that their logits fill the memory."""
    return max(1, min(BATCH, LOGITS // (length * models.vocabulary(model))))


def batches(
    model: nn.Module, stream: TokenStream, length: int, count: int | None, progress: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Windows and the document of each token, both [batch, length]."""
    _check_stream(stream)
    length = checks.whole(length, "length", 2, wanted="at least 2 tokens: one to read and one to predict")
    parts = stream.positions(length, quick.windows(count)).split(batch_size(model, length))
    for positions in tqdm(parts, desc="evaluating", leave=False, disable=not progress):
        yield stream.ids[positions], stream.document[positions]


@torch.no_grad()
def evaluate(
    model: nn.Module, stream: TokenStream, length: int = LENGTH, windows: int | None = None, progress: bool = False
) -> Evaluation:
    """Losses of `model` on `windows` windows spread evenly over the stream, or on all of them; on few of them with LABS_QUICK.

    Raises text.TextError where the stream is shorter than one window.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {checks.kind(model)}, wanted a causal language model")
    _check_stream(stream)
    device = next(model.parameters()).device
    if device.type == "meta":
        raise models.ModelError("the model is on the meta device, which holds shapes and no values: load its weights first")
    loss = torch.zeros(len(stream.names), dtype=torch.float64)
    tokens = torch.zeros(len(stream.names), dtype=torch.int64)
    seen = 0
    for ids, document in batches(model, stream, length, windows, progress):
        checks.tokens(ids, "stream", models.vocabulary(model))
        logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1]
        nll = _losses(logits, ids[:, 1:].to(device)).double().cpu()
        owner = document[:, 1:].flatten()
        loss.index_add_(0, owner, nll)
        tokens.index_add_(0, owner, torch.ones_like(owner))
        seen += len(ids)
    return Evaluation(loss, tokens, seen, length, len(stream) / stream.bytes, stream.sha256)


def _losses(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Nats of every target, float32 [batch * length], from logits [batch, length, vocabulary], some tokens at a time."""
    step = max(1, CHUNK // logits.shape[-1])
    windows = zip(logits, target, strict=True)
    pieces = (pair for window in windows for pair in zip(*(t.split(step) for t in window), strict=True))
    return torch.cat([F.cross_entropy(of_some.float(), wanted, reduction="none") for of_some, wanted in pieces])


def perplexity(model: nn.Module, stream: TokenStream, length: int = LENGTH, windows: int | None = None) -> float:
    """exp of the mean loss; see the module's text for the definition."""
    return evaluate(model, stream, length, windows).perplexity


@torch.no_grad()
def divergence(
    reference: nn.Module, model: nn.Module, stream: TokenStream, length: int = LENGTH, windows: int | None = None
) -> tuple[float, float]:
    """Mean KL(reference || model) in nats a token, and the share of tokens on which both rank the same token first."""
    total = agreed = count = 0.0
    for ids, _ in batches(model, stream, length, windows, False):
        p, q = (_log_probabilities(each, ids) for each in (reference, model))
        q = q.to(p.device)  # the models may be on two devices
        total += F.kl_div(q, p, log_target=True, reduction="sum").item()
        agreed += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += p.shape[0] * p.shape[1]
    return total / count, agreed / count


def _log_probabilities(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """ids [batch, length] -> log-probabilities of what follows each token but the last, float32 on the model's device."""
    checks.tokens(ids, "stream", models.vocabulary(model))
    logits = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
    return F.log_softmax(logits[:, :-1].float(), dim=-1)


def paired_interval(
    loss: torch.Tensor, other_loss: torch.Tensor, tokens: torch.Tensor, draws: torch.Tensor, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the relative change in perplexity over draws of documents.

    loss, other_loss: nats of each document under either model, [documents]. tokens: how many each has. draws: int64
    [samples, documents], the documents of each draw, with repetition; the same for both models.
    """
    extra = (other_loss - loss).double()
    change = torch.expm1(extra[draws].sum(1) / tokens[draws].sum(1))
    tail = (1 - level) / 2
    low, high = torch.quantile(change, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def covering_level(tokens: torch.Tensor, level: float = 0.95) -> float:
    """The level at which to take the percentiles, so that they cover the truth in about a share `level` of all cases.

    Percentiles of a bootstrap are too narrow where there are few documents, and where a few hold most of the tokens: with the
    documents of this course those at 0.95 cover the truth in some 92 of 100 simulated cases. They are widened as in Hesterberg's
    expanded percentile interval (What Teachers Should Know About the Bootstrap, 2015, arXiv:1411.5279: quantiles of t in place of
    the normal distribution, and the factor n / (n - 1) of a variance), where n is the effective number of documents,
    (sum tokens)^2 / sum tokens^2 (Kish, Survey Sampling, 1965). tests/test_metrics.py measures what that covers.

    tokens: of each document, or the weight of each in a mean. 1, the range of all draws, for fewer than two effective documents.
    """
    level = checks.number(level, "level", 0, 1, "a share from 0 to 1")
    weights = tokens.double()
    count = (weights.sum().square() / weights.square().sum()).item()
    if not count >= 2:
        return 1.0
    normal, free = NormalDist(), count - 1
    z = normal.inv_cdf((1 + level) / 2)
    # The quantile of Student's t with `free` degrees of freedom: Abramowitz and Stegun, 26.7.5.
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    return 2 * normal.cdf(math.sqrt(count / free) * t) - 1


def paired_bootstrap(reference: Evaluation, other: Evaluation, samples: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """The change in perplexity from `reference` to `other`, with a percentile interval over resampled documents.

    Documents, not tokens, are drawn with replacement, and both models are scored on each draw, so that what a hard document does
    to both cancels out. level: of the percentiles; see `covering_level` for what they cover. Raises ValueError where the two were
    not evaluated on the same tokens.
    """
    if reference.sha256 != other.sha256 or not torch.equal(reference.tokens, other.tokens):
        raise ValueError("reference and other were evaluated on different tokens, so they cannot be paired")
    level = checks.number(level, "level", 0, 1, "a share from 0 to 1")
    used = reference.tokens > 0
    tokens = reference.tokens[used]
    draws = _draws(len(tokens), samples, seed)
    low, high = paired_interval(reference.loss[used], other.loss[used], tokens, draws, level)
    return Interval(math.expm1(((other.loss - reference.loss)[used].sum() / tokens.sum()).item()), low, high)


def _draws(documents: int, samples: int, seed: int) -> torch.Tensor:
    """int64 [samples, documents]: the documents of each draw, with repetition."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, documents, (checks.whole(samples, "samples"), documents), generator=generator)


@dataclass(frozen=True)
class Difference:
    """How much larger a mean is than a reference's, in its own unit, with a paired bootstrap interval."""

    change: float
    low: float
    high: float


def paired_difference(
    reference: torch.Tensor, other: torch.Tensor, counts: torch.Tensor, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> Difference:
    """The change of a mean, such as a share of items that are right, with an interval over resampled documents.

    reference, other: the sum over each document, [documents]. counts: of how many it is the sum, for both; documents without any
    are left out. The interval covers the truth in about a share `level` of all cases: see `covering_level`.
    """
    used = counts > 0
    weights, extra = counts[used].double(), (other - reference)[used].double()
    tail = (1 - covering_level(weights, level)) / 2
    draws = _draws(len(weights), samples, seed)
    changes = extra[draws].sum(1) / weights[draws].sum(1)
    low, high = torch.quantile(changes, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Difference((extra.sum() / weights.sum()).item(), low, high)
