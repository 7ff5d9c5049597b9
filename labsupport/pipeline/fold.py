"""Where the scales of input channels go in a model: into the linears, and their inverse into what comes before them.

The linears that read one input share its scale. The norm or linear before them is divided by it, so no float output changes. In a
Llama: input_layernorm before q, k and v; v before o, where each channel of o's input comes from one row of v, so not with
grouped-query attention; post_attention_layernorm before gate and up; up before down, since gate's activation is multiplied by what
up gives. SHAPES has the same of other blocks.
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
from labsupport.quant import checks

# Both llm-awq and AutoAWQ search no clips for these: what counts is the product of their outputs.
NOT_CLIPPED = ("q_proj", "k_proj", "qkv_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
QUERY_KEY_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # they see what q and k give, and that does not change


@dataclass(frozen=True)
class Group:
    """Linears that share an input, by full name. before: the norm or linear that the inverse of a scale is folded into.

    output: the module whose output llm-awq and AutoAWQ look at, the attention, the MLP, or the linear itself. parts: how many
    linears of one size are fused in `before`; the last of them gives the input.
    """

    linears: tuple[str, ...]
    before: str
    output: str
    parts: int = 1


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
VALUES = Group(("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj")
GATED = Group(("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj")
FUSED_GATED = Group(("mlp.down_proj",), "mlp.gate_up_proj", "mlp.down_proj", 2)
# The groups of a block by names inside it, and the other modules that hold weights and may be there: norms of what does not change.
SHAPES: dict[str, tuple[tuple[Group, ...], tuple[str, ...]]] = {
    "Llama": (
        (Group(QKV, NORMS[0], "self_attn"), VALUES, Group(GATE_UP, NORMS[1], "mlp"), GATED),
        QUERY_KEY_NORMS,
    ),
    "Gemma 2": (
        (Group(QKV, NORMS[0], "self_attn"), VALUES, Group(GATE_UP, "pre_feedforward_layernorm", "mlp"), GATED),
        (*QUERY_KEY_NORMS, NORMS[1], "post_feedforward_layernorm"),
    ),
    "Phi-3": (
        (
            Group(("self_attn.qkv_proj",), NORMS[0], "self_attn"),
            Group(("self_attn.o_proj",), "self_attn.qkv_proj", "self_attn.o_proj", 3),
            Group(("mlp.gate_up_proj",), NORMS[1], "mlp"),
            FUSED_GATED,
        ),
        (),
    ),
    "GLM-4": (
        (Group(QKV, NORMS[0], "self_attn"), VALUES, Group(("mlp.gate_up_proj",), NORMS[1], "mlp"), FUSED_GATED),
        ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    "Cohere": ((Group((*QKV, *GATE_UP), NORMS[0], ""), VALUES, GATED), QUERY_KEY_NORMS),
    "OPT": (
        (
            Group(QKV, "self_attn_layer_norm", "self_attn"),
            Group(("self_attn.out_proj",), "self_attn.v_proj", "self_attn.out_proj"),
            Group(("fc1",), "final_layer_norm", "fc1"),
            Group(("fc2",), "fc1", "fc2"),
        ),
        (),
    ),
}


def groups(model: nn.Module) -> list[Group]:
    """All groups of the model, block by block, in the order in which a block computes, by full names.

    With grouped-query attention o is in none: it is quantized as it is. Raises ModelError for blocks of no shape in SHAPES, and
    where what is to be scaled is shared with another part of the model.
    """
    names = {id(module): name for name, module in model.named_modules()}
    groups_of_model = []
    for block in models.blocks(model):
        name = names[id(block)]
        for group in _groups_of(block):
            linears = tuple(f"{name}.{linear}" for linear in group.linears)
            groups_of_model.append(Group(linears, f"{name}.{group.before}", f"{name}.{group.output}".rstrip("."), group.parts))
    _check_not_shared(model, groups_of_model)
    return groups_of_model


def _groups_of(block: nn.Module) -> list[Group]:
    """The groups of a block, by names inside it. Raises ModelError for a block of no shape that is known."""
    modules, kind = dict(block.named_modules()), type(block).__name__
    owners = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
    known = {
        name: ({g.before for g in given}.union(*(g.linears for g in given)), others) for name, (given, others) in SHAPES.items()
    }
    wanted, others = known["Llama"]
    shape = next((name for name, (own, more) in known.items() if own <= modules.keys() and owners <= own.union(more)), None)
    if shape is None:
        if missing := sorted(wanted - modules.keys(), key=list(_in_order("Llama")).index):
            raise ModelError(
                f"a scale can be folded into blocks like those of {', '.join(SHAPES)}; "
                f"{kind} is like none of them, and unlike Llama's it has no {', '.join(missing)}"
            )
        # Any other module with weights (a norm, a router, a projection) may read what is scaled, or stand in between.
        extra = ", ".join(name or "itself" for name in sorted(owners.difference(wanted, others)))
        raise ModelError(f"{kind} has weights in {extra}, which a Llama's block does not have")
    found, _ = SHAPES[shape]
    linears = {name for group in found for name in group.linears}
    if other := [name for name in _in_order(shape) if name in linears and not isinstance(modules[name], nn.Linear)]:
        raise ModelError(
            f"a scale can be folded into linear layers, and {other[0]} of {kind} is a {type(modules[other[0]]).__name__}"
        )
    if other := [
        group.before for group in found if group.before not in linears and models.offset_of(modules[group.before]) is None
    ]:
        raise ModelError(f"{other[0]} of {kind} does not multiply by its weight, so it cannot be divided by a scale")
    if shape == "OPT" and not block.do_layer_norm_before:
        raise ModelError(f"{kind} normalizes what its attention and its MLP give, not what they read: no norm takes a scale")
    return [group for group in found if _passes(block, modules, group)]


def _in_order(shape: str) -> dict[str, None]:
    """The modules that a shape asks for, norms first."""
    found, _ = SHAPES[shape]
    linears = dict.fromkeys(name for group in found for name in group.linears)
    return dict.fromkeys([*(group.before for group in found if group.before not in linears), *linears])


def _passes(block: nn.Module, modules: Mapping[str, nn.Module], group: Group) -> bool:
    """Whether each channel of the group's input is one of what comes before it, times something that a scale does not change."""
    before, reads = modules[group.before], modules[group.linears[0]].in_features
    if not isinstance(before, nn.Linear):
        return True
    if group.before == "fc1":  # f(x / s) = f(x) / s for s > 0
        return isinstance(block.activation_fn, nn.ReLU)
    return before.out_features == group.parts * reads


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
    checks.scales(scale, "scale")
    if len(before.weight) != group.parts * channels:
        raise ValueError(f"{group.before} gives {len(before.weight)} channels, {group.linears[0]} reads {channels}")
    _check_not_shared(model, [group])
    scale = scale.to(before.weight.device)
    changed = {linear.weight: linear.weight.float() * scale for linear in linears}  # W s
    offset = 0.0 if isinstance(before, nn.Linear) else models.offset_of(before) or 0.0
    divided = [(before.weight, offset)] + ([(before.bias, 0.0)] if getattr(before, "bias", None) is not None else [])
    for parameter, plus in divided:
        value = parameter.float().clone()
        last = value[-channels:]  # of what is fused
        last.copy_((last + plus) / (scale if value.ndim == 1 else scale[:, None]) - plus)
        changed[parameter] = value
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


def _check_not_shared(model: nn.Module, checked: Sequence[Group]) -> None:
    """Raise ModelError where a weight or bias that would be scaled is used in a second place."""
    places = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(models.address(parameter) for _, parameter in places)
    scaled = {name for group in checked for name in (*group.linears, group.before)}
    for name, parameter in places:
        if name.rpartition(".")[0] in scaled and uses[key := models.address(parameter)] > 1:
            others = [other for other, p in places if models.address(p) == key and other != name]
            raise ModelError(f"{name} is shared with {', '.join(others)}: a scale folded into one would change the other")
