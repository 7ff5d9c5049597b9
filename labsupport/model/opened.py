"""A model whose linears are all an nn.Linear: what is one in all but its class is taken apart while methods are at work.

GPT-2's Conv1D holds its weight as [in, out]. transformers from 5 on holds the experts of a block in two tensors, gate and up of
all of them [experts, 2 intermediate, hidden] and down [experts, hidden, intermediate], and the files hold each by itself. An
opened model has an nn.Linear in the place of each, under the name that the files have for it; its weight is a view of the
model's own parameter, so that what is put into one is in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from labsupport.model import models, names


@dataclass(frozen=True)
class Piece:
    """Where the weight of an opened linear is in the model as transformers has it.

    parameter: full name there. shape: of that parameter. take: from the parameter to the part of it that is the linear's weight,
    a view, [out_features, in_features].
    """

    parameter: str
    shape: tuple[int, ...]
    take: Callable[[torch.Tensor], torch.Tensor]


class Expert(nn.Module):
    """The linears of one expert, under the names that files have for them."""

    def __init__(self, leaves: tuple[str, str, str], gate: nn.Linear, up: nn.Linear, down: nn.Linear):
        super().__init__()
        for name, linear in zip(leaves, (gate, up, down), strict=True):
            self.add_module(name, linear)


class Experts(nn.Module):
    """The experts of a block, each with linears of its own. leaves: the names of gate, up and down."""

    def __init__(self, module: nn.Module, leaves: tuple[str, str, str]):
        super().__init__()
        self.leaves, self.apply_gate = leaves, module._apply_gate
        for number in range(module.num_experts):
            linears = (_linear(take(module.get_parameter(name))) for name, take in _parts(module, number))
            self.add_module(str(number), Expert(leaves, *linears))

    def forward(self, hidden: torch.Tensor, expert_of: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """hidden: [tokens, hidden]. expert_of, share: [tokens, experts for each token], which experts and how much of each.

        Every expert is called, with no rows where no token is routed to it: first gate and up of all, then down of all.
        """
        gate, up, down = self.leaves
        routed = [torch.where(expert_of == number) for number in range(len(self._modules))]
        inside = []
        for expert, (token, _) in zip(self.children(), routed, strict=True):
            x = hidden[token]  # one tensor for both, which shows that they share their input
            inside.append(self.apply_gate(torch.cat([getattr(expert, gate)(x), getattr(expert, up)(x)], -1)))
        output = torch.zeros_like(hidden)
        for expert, (token, place), x in zip(self.children(), routed, inside, strict=True):
            part = getattr(expert, down)(x) * share[token, place, None]
            output.index_add_(0, token, part.to(output.dtype))
        return output


def routed(module: nn.Module, name: str = "") -> dict[str, str]:
    """The linears of experts inside a module whose full name is `name`: of each the step of the block in which it is called.

    Linears of one step are not fed by one another.
    """
    steps = {}
    for path, inside in module.named_modules(prefix=name):
        if isinstance(inside, Experts):
            steps |= {f"{path}.{n}.{leaf}": f"{path}.{leaf}" for n in inside._modules for leaf in inside.leaves}
    return steps


def _parts(module: nn.Module, number: int) -> list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """Gate, up and down of one expert: the parameter that each is in, and where."""
    width = module.gate_up_proj.shape[1] // 2
    return [
        ("gate_up_proj", lambda tensor: tensor[number, :width]),
        ("gate_up_proj", lambda tensor: tensor[number, width:]),
        ("down_proj", lambda tensor: tensor[number]),
    ]


class Turned(nn.Linear):
    """In a Conv1D's place."""


def _linear(weight: torch.Tensor, bias: nn.Parameter | None = None, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A linear that holds this very tensor."""
    linear = kind(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.detach(), requires_grad=False), bias
    return linear


def _leaves(model: nn.Module) -> tuple[str, str, str] | None:
    """What files call gate, up and down of an expert; None where transformers has no rule that makes one tensor of all experts."""
    found: dict[str, list[str]] = {}
    for rule in names.conversions(model):
        for target in rule.target_patterns:
            if "experts." in target:
                found[target.rpartition(".")[2]] = [source.split(".")[-2] for source in rule.source_patterns]
    gate_up, down = found.get("gate_up_proj", []), found.get("down_proj", [])
    return (*gate_up, *down) if len(gate_up) == 2 and len(down) == 1 else None


def _can_be_opened(module: nn.Module) -> bool:
    """Whether it holds experts as the module's text says: gate before up, no biases, nothing turned."""
    held = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    flags = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False}
    in_three_axes = all(isinstance(tensor, nn.Parameter) and tensor.ndim == 3 for tensor in held)
    return in_three_axes and all(getattr(module, name, None) is wanted for name, wanted in flags.items())


@dataclass
class Opened:
    """What was taken apart. pieces: by the full name of each weight. originals: the modules that were replaced, by their names."""

    model: nn.Module
    pieces: dict[str, Piece]
    originals: dict[str, nn.Module]

    def parts(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A tensor of the model as transformers has it, as the tensors of the opened model that it holds, by their full names."""
        pieces = {opened: self.pieces[opened] for opened in self._opened_of.get(name, [])}
        return {opened: piece.take(tensor) for opened, piece in pieces.items() if piece.shape == tensor.shape} or {name: tensor}

    @cached_property
    def _opened_of(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for opened, piece in self.pieces.items():
            found.setdefault(piece.parameter, []).append(opened)
        return found

    @torch.no_grad()
    def close(self) -> None:
        """Put the original modules back, with what their linears now hold.

        A module stays open of which a method has put another layer in a linear's place.
        """
        for path, original in self.originals.items():
            opened = self.model.get_submodule(path)
            parts = [module for module in opened.modules() if not isinstance(module, Expert | Experts)]
            if not all(type(part) in (nn.Linear, Turned) for part in parts):
                continue
            if isinstance(opened, nn.Linear):
                original.bias = opened.bias
            for name, piece in self.pieces.items():
                if name.startswith(path + "."):
                    weight = self.model.get_parameter(name)
                    _put(original, piece, weight)
            self.model.set_submodule(path, original)


def _put(original: nn.Module, piece: Piece, weight: torch.Tensor) -> None:
    """The weight of an opened linear into its place, unless it is there."""
    leaf = piece.parameter.rpartition(".")[2]
    held = original.get_parameter(leaf)
    if held.is_meta and not weight.is_meta:
        held = nn.Parameter(torch.empty(held.shape, dtype=weight.dtype, device=weight.device), requires_grad=False)
        setattr(original, leaf, held)
    place = piece.take(held.data)
    if place.data_ptr() != weight.data_ptr():
        place.copy_(weight)


def open_up(model: nn.Module) -> Opened:
    """Take a model apart, in place. Its outputs stay what they were, but for the rounding of sums in another order."""
    from transformers.pytorch_utils import Conv1D

    inside = {id(module) for block in models.blocks(model) for module in block.modules()}
    leaves, opened = _leaves(model), Opened(model, {}, {})
    for path, module in list(model.named_modules()):
        if id(module) not in inside:
            continue
        if isinstance(module, Conv1D):
            opened.originals[path] = module
            opened.pieces[f"{path}.weight"] = Piece(f"{path}.weight", tuple(module.weight.shape), torch.t)
            model.set_submodule(path, _linear(module.weight.t(), module.bias, Turned))
        elif leaves is not None and _can_be_opened(module):
            opened.originals[path] = module
            for number in range(module.num_experts):
                for leaf, (name, take) in zip(leaves, _parts(module, number), strict=True):
                    shape = tuple(module.get_parameter(name).shape)
                    opened.pieces[f"{path}.{number}.{leaf}.weight"] = Piece(f"{path}.{name}", shape, take)
            model.set_submodule(path, Experts(module, leaves))
    return opened


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the blocks by their names in the opened model, which they outlive. Their weights are the model's."""
    with opened(model):
        return models.linears(model)


@contextmanager
def opened(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model is taken apart; afterwards it is what it was, with the weights that its linears then hold."""
    what = open_up(model)
    try:
        yield model
    finally:
        what.close()
