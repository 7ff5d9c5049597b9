"""Where the scales of input channels go in a Llama-shaped model: into the linears, and their inverse into what comes before them.

The linears that read one input share its scale. The norm or linear before them is divided by it, so no float output changes:
input_layernorm before q, k and v; v before o, where each channel of o's input comes from one row of v, so not with grouped-query
attention; post_attention_layernorm before gate and up; up before down, since gate's activation is multiplied by what up gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from labsupport.model import models
from labsupport.model.models import ModelError

# Both llm-awq and AutoAWQ search no clips for these: what counts is the product of their outputs.
NOT_CLIPPED = ("q_proj", "k_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
QUERY_KEY_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # Qwen3's: they see what q and k give, and that does not change


@dataclass(frozen=True)
class Group:
    """Linears that share an input, by full name. before: the norm or linear that the inverse of a scale is folded into.

    output: the module whose output llm-awq and AutoAWQ look at, the attention, the MLP, or the linear itself.
    """

    linears: tuple[str, ...]
    before: str
    output: str


def groups(model: nn.Module) -> list[Group]:
    """All groups of the model, block by block, in the order in which a block computes.

    With grouped-query attention o is in none: it is quantized as it is. Raises ModelError for blocks that are not Llama-shaped,
    and where what is to be scaled is shared with another part of the model.
    """
    names = {id(module): name for name, module in model.named_modules()}
    groups_of_model = []
    for block in models.blocks(model):
        name = names[id(block)]
        _check_shape(block)
        groups_of_model.append(_group(name, "self_attn", ("q_proj", "k_proj", "v_proj"), "input_layernorm", "self_attn"))
        if block.self_attn.v_proj.out_features == block.self_attn.o_proj.in_features:
            groups_of_model.append(_group(name, "self_attn", ("o_proj",), "self_attn.v_proj", "self_attn.o_proj"))
        groups_of_model.append(_group(name, "mlp", ("gate_proj", "up_proj"), "post_attention_layernorm", "mlp"))
        groups_of_model.append(_group(name, "mlp", ("down_proj",), "mlp.up_proj", "mlp.down_proj"))
    _check_not_shared(model, groups_of_model)
    return groups_of_model


def _group(block: str, half: str, linears: tuple[str, ...], before: str, output: str) -> Group:
    return Group(tuple(f"{block}.{half}.{linear}" for linear in linears), f"{block}.{before}", f"{block}.{output}")


@torch.no_grad()
def fold(model: nn.Module, group: Group, scale: torch.Tensor) -> None:
    """Multiply the columns of a group's linears by scale and divide what comes before by it, in place.

    scale: float [in_features], finite and above 0. The logits stay what they were, apart from the rounding of the changed weights.
    A bias of what comes before is divided as well, a bias of the linears is not. Raises ValueError for a scale that does not fit
    and for one with which the weights' dtype would overflow, ModelError for shared weights; the model is then unchanged.
    """
    before, linears = model.get_submodule(group.before), [model.get_submodule(name) for name in group.linears]
    channels = linears[0].in_features
    if scale.shape != (channels,):
        raise ValueError(
            f"scale has shape {list(scale.shape)}, wanted one value for each of the {channels} inputs of {group.linears[0]}"
        )
    if not scale.isfinite().all() or not (scale > 0).all():
        raise ValueError(f"scale holds {int((~(scale > 0) | scale.isinf()).sum())} values that are not finite numbers above 0")
    if len(before.weight) != channels:
        raise ValueError(f"{group.before} gives {len(before.weight)} channels, {group.linears[0]} reads {channels}")
    _check_not_shared(model, [group])
    scale = scale.to(before.weight.device)
    changed = {linear.weight: linear.weight.float() * scale for linear in linears}  # W s
    changed[before.weight] = before.weight.float() / (scale if before.weight.ndim == 1 else scale[:, None])
    if getattr(before, "bias", None) is not None:
        changed[before.bias] = before.bias.float() / scale
    for parameter, value in changed.items():
        if not value.to(parameter.dtype).isfinite().all():
            raise ValueError(
                f"a scale from {scale.min():.2g} to {scale.max():.2g} gives weights that {parameter.dtype} cannot hold"
            )
    for parameter, value in changed.items():
        parameter.copy_(value)


def module_loss(
    module: nn.Module, layers: Sequence[nn.Linear], calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
) -> Callable[[Sequence[torch.Tensor]], float]:
    """The loss of llm-awq and AutoAWQ: the mean squared change of a module's output when its `layers` hold other weights.

    module and layers: a group's output and linears. calls: the module's arguments and keyword arguments, batch by batch, as a
    forward pre-hook sees them; without a cache of keys and values, since each is repeated. Nothing in the module is changed; the
    outputs of all batches are kept. Raises ValueError for a layer that is not in the module.
    """
    names = {id(inside): name for name, inside in module.named_modules()}
    if missing := [layer for layer in layers if id(layer) not in names]:
        raise ValueError(f"a layer {list(missing[0].weight.shape)} is not in the {type(module).__name__} that is measured")
    weights = [f"{names[id(layer)]}.weight".lstrip(".") for layer in layers]

    @torch.no_grad()
    def output(held: dict[str, torch.Tensor], call: tuple[tuple[Any, ...], Mapping[str, Any]]) -> torch.Tensor:
        result = torch.func.functional_call(module, held, *call)
        return result[0] if isinstance(result, tuple) else result

    wanted = [output({}, call) for call in calls]
    count = sum(result.numel() for result in wanted)

    def loss(values: Sequence[torch.Tensor]) -> float:
        held = {name: value.to(layer.weight) for name, value, layer in zip(weights, values, layers, strict=True)}
        return sum((a - output(held, call)).float().pow(2).sum().item() for a, call in zip(wanted, calls, strict=True)) / count

    return loss


def _check_shape(block: nn.Module) -> None:
    """Raise ModelError unless the block is built as Llama's."""
    kind = type(block).__name__
    modules = dict(block.named_modules())
    if missing := [name for name in (*NORMS, *LINEARS) if name not in modules]:
        raise ModelError(f"a scale can be folded into Llama-shaped blocks, and {kind} has no {', '.join(missing)}")
    if other := [name for name in LINEARS if not isinstance(modules[name], nn.Linear)]:
        raise ModelError(
            f"a scale can be folded into linear layers, and {other[0]} of {kind} is a {type(modules[other[0]]).__name__}"
        )
    # Any other module with weights (a norm, a router, a projection) may read what is scaled, or stand in between.
    owners = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
    if extra := sorted(owners.difference(NORMS, LINEARS, QUERY_KEY_NORMS)):
        raise ModelError(
            f"{kind} has weights in {', '.join(name or 'itself' for name in extra)}, which a Llama's block does not have"
        )
    if other := [name for name in NORMS if not _multiplies(modules[name])]:
        raise ModelError(f"{other[0]} of {kind} does not multiply by its weight, so it cannot be divided by a scale")


@torch.no_grad()
def _multiplies(norm: nn.Module) -> bool:
    """Whether a norm's output is linear in its weight: Gemma's, which multiplies by 1 + weight, is not."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None or weight.ndim != 1:
        return False
    x = torch.linspace(-1, 1, len(weight))[None]
    held = {"weight": torch.zeros(len(weight))} | ({} if bias is None else {"bias": torch.zeros(len(weight))})
    return not torch.func.functional_call(norm, held, (x,)).any()


def _check_not_shared(model: nn.Module, checked: Sequence[Group]) -> None:
    """Raise ModelError where a weight or bias that would be scaled is used in a second place."""
    places = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(models.address(parameter) for _, parameter in places)
    scaled = {name for group in checked for name in (*group.linears, group.before)}
    for name, parameter in places:
        if name.rpartition(".")[0] in scaled and uses[key := models.address(parameter)] > 1:
            others = [other for other, p in places if models.address(p) == key and other != name]
            raise ModelError(f"{name} is shared with {', '.join(others)}: a scale folded into one would change the other")
