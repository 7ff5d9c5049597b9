"""Chapter 7, last part: the Hessian of values that counts a token by the attention it gets, and who pays for an even one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from labsupport.exercises.compare import got_and_wanted
from labsupport.exercises.form import Exercise, Mutant, generator, mistakes_by_option
from labsupport.quant import gptq, rtn


def _attention(heads: int, tokens: int, g: torch.Generator, favored: dict[int, float]) -> torch.Tensor:
    """Causal attention maps [heads, queries, tokens]. favored: what is added to the scores of some tokens."""
    scores = torch.randn(heads, tokens, tokens, generator=g)
    for token, more in favored.items():
        scores[:, :, token] += more
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1) > 0, -torch.inf).softmax(-1)


# 7.7 ------------------------------------------------------------------------------------------------------------------
def heard_inputs(seed: int) -> dict:
    """Three heads, nine tokens, five channels. The third token gets most of the attention; the first is no exception."""
    g = generator(seed)
    return {"attention": _attention(3, 9, g, {2: 2.0}), "x": torch.randn(9, 5, generator=g)}


def heard_hessian(attention: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Head by head and query by query: what arrives of a token's error is squared there."""
    total = torch.zeros(x.shape[1], x.shape[1])
    for head in attention:
        for query in head:
            scaled = query[:, None] * x
            total += scaled.T @ scaled
    return total


def _heard(attention, x, weights=lambda a: a.square().sum((0, 1)), both=False):
    """The same from one weight for each token; ways to get it wrong. both: the weights go to both sides of the product."""
    w = weights(attention)[:, None]
    return (w * x).T @ (w * x if both else x)


HEARD_HESSIAN = Exercise(
    id="7.7", name="heard_hessian", title="A Hessian that knows who listens", minutes=10, difficulty=3, points=3,
    returns=("hessian",), inputs=heard_inputs, reference=heard_hessian,
    # 27 products and sums of float32 for an entry, each rounding by at most 2**-24 of the largest.
    allowed=lambda given, want: 60 * 2.0**-24 * want["hessian"].abs().max().item(),
    close=lambda given, want: 200 * 2.0**-24 * want["hessian"].abs().max().item(),
    mistakes=mistakes_by_option(_heard, {
        "every token counts the same: this is X^T X, whoever listens": {"weights": lambda a: torch.ones(a.shape[2])},
        "the attention was summed and not squared: an error arrives multiplied by A, and it is its square that counts": {
            "weights": lambda a: a.sum((0, 1))},
        "the attention was summed first and squared then: each query hears a token by itself, so square first": {
            "weights": lambda a: a.sum((0, 1)).square()},
        "the sum goes over the tokens that a query reads: it is a weight for each query. Sum over the queries that read a token": {
            "weights": lambda a: a.square().sum((0, 2))},
        "the weights went to both sides of the product, so they were squared once more": {"both": True},
        "only the last query is counted: every query before it listens too": {"weights": lambda a: a[:, -1].square().sum(0)},
        "only the first head is counted: all heads that read these values listen": {"weights": lambda a: a[0].square().sum(0)},
        "this is the mean over heads, wanted the sum. GPTQ would not see the difference: a factor on H changes no code": {
            "weights": lambda a: a.square().sum(1).mean(0)},
        "this is the mean over queries, wanted the sum. GPTQ would not see the difference: a factor on H changes no code": {
            "weights": lambda a: a.square().mean(1).sum(0)},
        "this is twice the sum. GPTQ would not see the difference: a factor on H changes no code, but none is wanted here": {
            "weights": lambda a: 2 * a.square().sum((0, 1))},
    }),
    others=(Mutant(lambda attention, x: 1.5 * _heard(attention, x), "hessian["),),
)  # fmt: skip


# 7.8 ------------------------------------------------------------------------------------------------------------------
TOKENS, CHANNELS, ROWS, USUAL = 24, 12, 10, 11
BITS = 3


@cache
def pays_inputs(seed: int) -> dict:
    """24 tokens. One is heard most and points where all others point; one is heard much and alone in its direction; one is the
    largest, and hardly heard. One Hessian counts all tokens alike, the other by the attention; which comes first is by chance.
    """
    g = generator(seed)
    while True:
        heard, alone, large = (torch.randperm(TOKENS // 2, generator=g)[:3] + 2).tolist()
        x = torch.zeros(TOKENS, CHANNELS)
        x[:, :USUAL] = torch.randn(TOKENS, USUAL, generator=g)
        x[:, USUAL:] = 0.05 * torch.randn(TOKENS, CHANNELS - USUAL, generator=g)
        x[alone] = torch.cat([torch.zeros(USUAL), 6 * torch.randn(CHANNELS - USUAL, generator=g)])
        x[large, :USUAL] = 6 * torch.randn(USUAL, generator=g)
        attention = _attention(2, TOKENS, g, {heard: 3.0, alone: 2.5, large: -4.0})
        even, by_attention = x.T @ x, _heard(attention, x)
        most_heard = int(attention.square().sum((0, 1)).argmax())
        if most_heard == alone:
            continue
        swapped = bool(torch.rand(1, generator=g) < 0.5)
        hessians = torch.stack([by_attention, even] if swapped else [even, by_attention])
        given: dict[str, Any] = {
            "weight": torch.randn(ROWS, CHANNELS, generator=g),
            "x": x,
            "attention": attention,
            "hessians": hessians,
        }
        raw, arrived = _errors(**given)
        worse, better = (1, 0) if swapped else (0, 1)
        pays, next_to_it = arrived[worse].topk(2).values
        if (
            int(arrived[worse].argmax()) == alone
            and pays > 1.3 * next_to_it
            and arrived[worse].sum() > 1.2 * arrived[better].sum()
            and raw[worse].sum() < raw[better].sum()
            and int(raw[worse].argmax()) not in (alone, most_heard)
        ):
            return given


def _solve(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """GPTQ, 3 bits, one grid a row. What no Hessian could be is no error here: then it rounds."""
    try:
        return gptq.quantize(weight, hessian, BITS, None).dequantize()
    except ValueError:
        return rtn.quantize(weight, BITS, None).dequantize()


def _errors(weight, x, attention, hessians, solve: Callable = _solve) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared error of each token's values with each Hessian, and what arrives of it. [hessians, tokens] each."""
    errors = torch.stack([((solve(weight, hessian) - weight) @ x.T).square().sum(0) for hessian in hessians])
    return errors, errors * attention.square().sum((0, 1))


def who_pays(weight, x, attention, hessians, solve: Callable) -> tuple[int, int]:
    """The Hessian with which less error arrives, and the token of which most arrives with the other."""
    return _pays(weight, x, attention, hessians, solve)


def _pays(
    weight, x, attention, hessians, solve, better=lambda raw, arrived: arrived, token=lambda raw, arrived, attention: arrived
):
    """better, token: by which errors each is told; ways to get it wrong."""
    raw, arrived = _errors(weight, x, attention, hessians, solve)
    chosen = int(better(raw, arrived).sum(1).argmin())
    by = token(raw, arrived, attention)
    return int((by[1 - chosen] if by.ndim == 2 else by).argmax()), chosen


def drive_pays(answer: Callable, given: dict) -> dict:
    token, better = answer(*given.values(), _solve)
    return {"token": token, "better": better}


def _pays_differs(given: dict, got: dict, want: dict) -> str:
    _, arrived = _errors(**given)
    for name, count in (("token", TOKENS), ("better", 2)):
        if got[name] not in range(count):
            return f"{name} is {got[name]:g}: they are counted from 0 to {count - 1}"
    (token, better), (_, best) = got.values(), want.values()
    if better != best:
        sums = got_and_wanted(arrived[int(better)].sum().item(), arrived[int(best)].sum().item())
        return f"with Hessian {int(better)} more error arrives than with the other: {sums}"
    shares = got_and_wanted(arrived[1 - int(best), int(token)].item(), arrived[1 - int(best), int(want["token"])].item())
    return f"better is right. With the other Hessian less arrives of token {int(token)} than of the one that pays: {shares}"


WHO_PAYS = Exercise(
    id="7.8", name="who_pays", title="Which token pays?", minutes=15, difficulty=4, points=4,
    returns=("token", "better"), inputs=pays_inputs, reference=who_pays, drive=drive_pays, otherwise=_pays_differs,
    mistakes=mistakes_by_option(_pays, {
        "this is the token that is heard most. It is not alone in its direction, so the Hessian guards it whoever counts": {
            "token": lambda raw, arrived, attention: attention.square().sum((0, 1))},
        "this is the token whose own values have the largest error, and hardly anybody reads them. What arrives of them?": {
            "token": lambda raw, arrived, attention: raw},
        "better is the Hessian that leaves the values of all tokens together the smaller error. Which one leaves less in what "
        "the attention gives?": {"better": lambda raw, arrived: raw},
        "token and better are exchanged": lambda *given: _pays(*given)[::-1],
    }),
    others=(
        Mutant(lambda *given: (_pays(*given)[0] + TOKENS, _pays(*given)[1]), "they are counted from 0"),
        Mutant(lambda *given: (TOKENS - 1, _pays(*given)[1]), "With the other Hessian less arrives"),
        Mutant(lambda *given: (0, 1 - _pays(*given)[1]), "more error arrives"),
    ),
)  # fmt: skip

EXERCISES = (HEARD_HESSIAN, WHO_PAYS)
