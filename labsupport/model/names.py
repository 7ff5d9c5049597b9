"""The names that a model's tensors have in its files, where they are not those in the model: transformers' own rules for them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn


def conversions(model: nn.Module) -> list[Any]:
    """transformers' rules from the tensors of a file to those of the model, in order.

    They are of two kinds: a WeightRenaming, and a WeightConverter, which makes one tensor of several.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model, add_legacy=False)


def _renamings(model: nn.Module) -> list[Any]:
    return [rule for rule in conversions(model) if type(rule).__name__ == "WeightRenaming"]


def made_of(model: nn.Module) -> Callable[[str], str | None]:
    """From a tensor's name in a file to the tensor of the model that transformers makes of it and others; None of no other."""
    rules = [rule for rule in conversions(model) if type(rule).__name__ == "WeightConverter"]

    def target(name: str) -> str | None:
        for rule in rules:
            renamed, source = rule.rename_source_key(name)
            if source is not None:
                return renamed
        return None

    return target


def ignored(model: nn.Module) -> Callable[[str], bool]:
    """Whether transformers passes over a tensor that a file has and the model has not, as older versions saved them."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    # Two that its loader adds, for buffers that the model once had in each block (modeling_utils.py).
    buffers = tuple(name for name, _ in model.named_buffers())
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def may_lack(model: nn.Module) -> Callable[[str], bool]:
    """Whether transformers lets a file lack a tensor of the model without a word, and its constructor fills it: a buffer."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    filled = {name for name, buffer in model.named_buffers() if not buffer.is_meta}
    return lambda name: name in filled and any(re.search(pattern, name) for pattern in patterns)


def from_file(model: nn.Module) -> Callable[[str], str]:
    """A function from a tensor's name in a file to its name in the model, which need not be there.

    A file of the model without its head, as GPT-2's on the hub, lacks the prefix of the names; it is put in front.
    """
    rules, known, prefix = _renamings(model), model.state_dict().keys(), getattr(model, "base_model_prefix", "")

    def rename(name: str) -> str:
        for rule in rules:
            name, _ = rule.rename_source_key(name)
        return f"{prefix}.{name}" if name not in known and f"{prefix}.{name}" in known else name

    return rename


def to_file(model: nn.Module) -> Callable[[str], str]:
    """A function from a tensor's or module's name in the model to the one that transformers would save it by."""
    rules = [rule.reverse_transform() for rule in reversed(_renamings(model))]

    def rename(name: str) -> str:
        for rule in rules:
            name, _ = rule.rename_source_key(name)
        return name

    return rename
