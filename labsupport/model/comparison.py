"""A model against the float model that it was made from, token by token, in one pass over a text.

At every predicted token of the windows of `evaluate` it keeps the loss, KL(reference || model), and which token is ranked first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labsupport.model import evaluate as evaluation
from labsupport.model import models
from labsupport.model.evaluate import LENGTH, Evaluation
from labsupport.model.text import TokenStream
from labsupport.quant import checks

KINDS = {"nll": torch.float32, "kl": torch.float32, "first": torch.int64, "agrees": torch.bool}  # of what is kept of a token
KEPT = 2**28  # numbers of hidden states that are kept of a reference: 1 GiB in float32


@dataclass(frozen=True)
class Comparison:
    """What a model says of each predicted token of a text. Tensors are [windows, length - 1], on the CPU.

    ids: the token that follows, int64. document: of that token, an index into the stream's names. nll: nats, float32.
    kl: KL(reference || model) in nats, float32, at least 0 but for rounding. first: the token that the model ranks first, int64.
    agrees: whether the reference ranks the same one first. evaluation: losses by document, as `evaluate` gives them.
    """

    ids: Tensor
    document: Tensor
    nll: Tensor
    kl: Tensor
    first: Tensor
    agrees: Tensor
    evaluation: Evaluation

    @property
    def kl_mean(self) -> float:
        return self.kl.double().mean().item()

    @property
    def kl_median(self) -> float:
        return self.kl_quantile(0.5)

    @property
    def kl_p999(self) -> float:
        """What 999 of 1000 tokens stay below: where a model breaks, it breaks at few tokens."""
        return self.kl_quantile(0.999)

    def kl_quantile(self, share: float) -> float:
        """Exact, over all tokens: the linear interpolation of torch.quantile, which takes only 2**24 of them."""
        ordered = self.kl.flatten().double().sort().values
        place = checks.number(share, "share", 0, 1, "a share from 0 to 1") * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return torch.lerp(ordered[below], ordered[above], place - below).item()

    @property
    def agreement(self) -> float:
        """The share of tokens on which both rank the same token first."""
        return self.agrees.double().mean().item()

    def by_document(self, values: Tensor) -> Tensor:
        """Sums of `values`, [windows, length - 1], over the tokens of each document. float64 [documents]."""
        sums = torch.zeros(len(self.evaluation.tokens), dtype=torch.float64)
        return sums.index_add_(0, self.document.flatten(), values.flatten().double())


class Reference:
    """A float model and a text, to compare other models with. What the model says of the text is computed once.

    Its last hidden states are kept, where they are at most KEPT numbers, and its output head is applied again for each comparison,
    which gives the same logits to the bit and takes a fifth of the time of a small model. Where something follows the head, as in
    models that cap their logits, nothing is kept and the model is run again. Raises what `evaluate` raises.
    """

    def __init__(
        self, model: nn.Module, stream: TokenStream, length: int = LENGTH, windows: int | None = None, progress: bool = False
    ):
        self.model, self.stream, self.length, self.windows = model, stream, length, windows
        self._hidden: list[Tensor] | None = []  # of each batch; None where nothing is kept
        self.own = self._pass(self._first_time, progress)  # the reference beside itself: its kl is 0

    @property
    def evaluation(self) -> Evaluation:
        return self.own.evaluation

    def compare(self, model: nn.Module, progress: bool = False) -> Comparison:
        """One pass of `model` over the text."""
        return self._pass(lambda number, ids: (self._again(number, ids), _logits(model, ids)), progress)

    @torch.no_grad()
    def _pass(self, both: Callable[[int, Tensor], tuple[Tensor, Tensor]], progress: bool) -> Comparison:
        """both: from the number of a batch and its ids to logits of the reference and of the other model."""
        parts: dict[str, list[Tensor]] = {name: [] for name in ("ids", "document", *KINDS)}
        batches = evaluation.batches(self.model, self.stream, self.length, self.windows, progress)
        for number, (ids, document) in enumerate(batches):
            reference, logits = both(number, ids)
            target = ids[:, 1:].to(logits.device)
            parts["ids"].append(ids[:, 1:])
            parts["document"].append(document[:, 1:])
            for name, kind in KINDS.items():
                parts[name].append(torch.empty(target.shape, dtype=kind))
            for window in range(len(ids)):  # of one at a time, since probabilities take as much memory as logits
                scores = _scores(reference[window, :-1].to(logits.device), logits[window, :-1], target[window])
                for name, values in scores.items():
                    parts[name][-1][window] = values.cpu()
        whole = {name: torch.cat(tensors) for name, tensors in parts.items()}
        return Comparison(**whole, evaluation=self._evaluation(whole["nll"], whole["document"]))

    def _first_time(self, number: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the reference, twice; hidden states are kept where the head alone makes the same logits of them."""
        seen: list[Tensor] = []
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0])) if head is not None else None
        try:
            logits = _logits(self.model, ids)
        finally:
            if handle is not None:
                handle.remove()
        if self._hidden is not None:
            fits = len(seen) == 1 and sum(map(torch.numel, self._hidden)) + seen[0].numel() <= KEPT
            if fits and (number > 0 or torch.equal(head(seen[0]), logits)):
                self._hidden.append(seen[0])
            else:
                self._hidden = None
        return logits, logits

    def _again(self, number: int, ids: Tensor) -> Tensor:
        """The same logits of the reference."""
        return _logits(self.model, ids) if self._hidden is None else self.model.get_output_embeddings()(self._hidden[number])

    def _evaluation(self, nll: Tensor, document: Tensor) -> Evaluation:
        stream, owner = self.stream, document.flatten()
        loss = torch.zeros(len(stream.names), dtype=torch.float64).index_add_(0, owner, nll.flatten().double())
        tokens = torch.bincount(owner, minlength=len(stream.names))
        return Evaluation(loss, tokens, len(nll), self.length, len(stream) / stream.bytes, stream.sha256)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """ids [batch, length] -> logits [batch, length, vocabulary] on the model's device."""
    checks.tokens(ids, "stream", models.vocabulary(model))
    return model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits


def _scores(reference: Tensor, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Of one window: what `Comparison` holds. reference, logits: [tokens, vocabulary]. target: [tokens]."""
    p, q = F.log_softmax(reference.float(), dim=-1), F.log_softmax(logits.float(), dim=-1)
    first = logits.argmax(-1)
    return {
        "nll": -q.gather(1, target[:, None])[:, 0],
        "kl": (p.exp() * (p - q)).sum(-1),
        "first": first,
        "agrees": first == reference.argmax(-1),
    }
