"""Who listens to a token: the attention that each token of a block's text gets.

A head gives A V: A are its attention weights, [queries, tokens], V = X W^T its values, [tokens, width]. An error E of W changes
that by A X E^T. The error of token t, E x_t, arrives at query q multiplied by A[q, t]. Where the errors of different tokens
have nothing to do with each other, their squares add up: tr(E H E^T) with H = sum_t w_t x_t x_t^T and w_t = sum_q A[q, t]^2, summed
over the heads that read the values. X^T X is the same with w_t = 1: as if every token were heard equally. Many models send a
third of their attention to the first token of a text, and then it is most of H.

RSQ (Sung et al. 2025, arXiv:2503.01820) weighs tokens by the attention that they get, for every linear of a block. Here they are
weighed for the linear that makes the values, where the weight follows from what the attention computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from labsupport.pipeline import attention
from labsupport.pipeline.block import Block, InputStatistics, Stop

# What transformers calls to attend: attend(module, query, key, value, mask, **settings) gives the heads' outputs, and more.
Attend = Callable[..., tuple[Tensor, Any]]


def makes_values(block: Block) -> str | None:
    """The full name of the linear that makes the values of the block's attention. None where tokens cannot be weighed for it.

    That is so where no linear's output is, as it stands, the values (a fused q, k and v); where the attention does not ask
    transformers for the function that computes it (GPT-J, Bloom, Falcon and other older models); and where it does more than
    softmax(Q K^T) V under a mask and a cap.
    """
    made: dict[str, Tensor] = {}
    found: list[str] = []

    def see(attend: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> None:
        if is_known(attend, module, query, key, value, settings):
            found.extend(name for name, output in made.items() if _are_values(output, value))
        raise Stop

    hooks = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: made.update({name: output}))
        for name, layer in block.linears.items()
    ]
    try:
        with watched(block.module, see):
            block.run(0)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if len(found) == 1 else None


def heard(block: Block, name: str) -> InputStatistics:
    """What the linear that makes a block's values (`makes_values`) is fed by the block as it now is, by who listens.

    gram is sum_t w_t x_t x_t^T, w_t the attention that token t gets.
    """
    layer = block.linears[name]
    statistics = InputStatistics.empty(layer.in_features, layer.weight.device)
    for x, weights in _batches(block, name):
        statistics.add(x, weights)
    return statistics


def received(block: Block, name: str) -> tuple[Tensor, Tensor]:
    """All of that token by token: x_t, float32 [windows, tokens, in], and w_t, float32 [windows, tokens], on the CPU."""
    inputs, weights = zip(*((x.float().cpu(), w.cpu()) for x, w in _batches(block, name)), strict=True)
    return torch.cat(inputs), torch.cat(weights)


def _batches(block: Block, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """x_t and w_t of each batch."""
    fed: list[Tensor] = []

    def see(attend: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> None:
        fed.append(attention_received(query, key, settings))
        raise Stop

    hook = block.linears[name].register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))
    try:
        for batch in range(len(block.inputs)):
            with watched(block.module, see):
                block.run(batch)
            x, weights = fed
            fed.clear()
            yield x, weights
    finally:
        hook.remove()


def attention_received(query: Tensor, key: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """sum over heads and queries of A[q, t]^2: float32 [windows, tokens]. One window and one head of keys at a time.

    query: [windows, heads, tokens, width]. key: [windows, heads of keys, tokens, width]. settings: see `attention_weights`.
    """
    received = torch.zeros(key.shape[0], key.shape[2], device=key.device)
    for window in range(len(key)):
        for head in range(key.shape[1]):
            received[window] += attention_weights(query, key, settings, window, head).square().sum((0, 1))
    return received


def attention_weights(query: Tensor, key: Tensor, settings: Mapping[str, Any], window: int, head: int) -> Tensor:
    """A of the heads that read one head of keys, in one window: [heads, queries, tokens], in float32 at least.

    settings: what else transformers hands to the function that attends: attention_mask, scaling, sliding_window, softcap.
    """
    readers, tokens = query.shape[1] // key.shape[1], key.shape[2]
    heads = slice(head * readers, (head + 1) * readers)
    scaling, softcap, mask = (settings.get(name) for name in ("scaling", "softcap", "attention_mask"))
    if isinstance(mask, Tensor) and mask.ndim == 4:
        seen = attention.seen_through(mask[window if len(mask) > 1 else 0, heads if mask.shape[1] > 1 else slice(1), :, :tokens])
    else:  # causal, and what the function knows by itself
        behind = torch.arange(tokens, device=key.device)[:, None] - torch.arange(tokens, device=key.device)
        seen = (behind >= 0) & (behind < (settings.get("sliding_window") or tokens))
    scores = query[window, heads] @ key[window, head].t()
    return attention.weights_of(scores, seen, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)


def is_known(attend: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, settings: Mapping[str, Any]) -> bool:
    """Whether A V, with our A, is what the attention gives for the first window."""
    first = {k: v[:1] if k == "attention_mask" and isinstance(v, Tensor) and len(v) > 1 else v for k, v in settings.items()}
    mask = first.pop("attention_mask", None)
    output = attend(module, query[:1], key[:1], value[:1], mask, **first)[0][0].transpose(0, 1)  # [heads, tokens, width]
    ours = []
    for head in range(key.shape[1]):
        weights = attention_weights(query, key, settings, 0, head)
        ours.append(weights @ value[0, head].to(weights.dtype))
    difference = (torch.cat(ours) - output).norm() / output.to(ours[0].dtype).norm()
    return bool(difference <= attention.same(query.dtype))


def _are_values(output: Tensor, value: Tensor) -> bool:
    """Whether `value`, [windows, heads, tokens, width], is `output`, [windows, tokens, heads * width], seen in another shape."""
    same = value.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
    return same and output.shape[-1] == value.shape[1] * value.shape[3]


@contextmanager
def watched(module: nn.Module, see: Callable[..., Any]) -> Iterator[None]:
    """Inside, see(attend, module, query, key, value, **settings) is called in the place of attend, which computes the attention.

    It returns what attend does, or raises Stop.
    """

    def seen(caller: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any) -> Any:
        return see(original(caller), caller, query, key, value, attention_mask=mask, **settings)

    with attention.attending(module, "labsupport_listening", seen) as original:
        yield
