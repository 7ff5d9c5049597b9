"""Move the weights of a Llama off the lattice that a quantized file left them on, without changing what the model computes.

A model that was dequantized from 4 bits is a special case for whoever quantizes again: each group of its weights holds 16 evenly
spaced values. In three places of a block a factor for each channel can be multiplied in at one end and divided out at the other:
between a norm and the linears that read it; between up_proj and down_proj, with the product with the gate in between; between
v_proj and o_proj, with attention in between, which mixes positions and never channels. The factors are exp(sigma N(0, 1)), and the
values of a group are no longer evenly spaced.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from labsupport.model import models

SIGMA, SEED = 0.2, 0


def move_off_lattice(model: nn.Module, sigma: float = SIGMA, seed: int = SEED, progress: bool = False) -> None:
    """Rescale the channels of every block in place. In exact arithmetic the function stays the same. For Llamas."""
    generator = torch.Generator().manual_seed(seed)
    for block in tqdm(models.blocks(model), desc="moving off the lattice", unit="block", disable=not progress):
        rescale(block, lambda count: torch.exp(sigma * torch.randn(count, generator=generator).double()))


@torch.no_grad()
def rescale(block: nn.Module, factors: Callable[[int], torch.Tensor]) -> None:
    """Multiply channels of one block and divide what reads them, in place.

    factors: gives as many as it is asked for, float64 [count]. Products are made in float64 and rounded once.
    """
    attention, mlp = block.self_attn, block.mlp
    for norm, readers in (
        (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
    ):
        scale = factors(len(norm.weight))
        _multiply(norm, scale)
        for linear in readers:
            _divide_columns(linear, scale)
    scale = factors(mlp.up_proj.out_features)
    _multiply(mlp.up_proj, scale)
    _divide_columns(mlp.down_proj, scale)
    scale = factors(attention.v_proj.out_features)
    _multiply(attention.v_proj, scale)
    # The query heads of a group, side by side, read one head of values.
    heads = scale.view(-1, 1, attention.head_dim).expand(-1, attention.num_key_value_groups, -1)
    _divide_columns(attention.o_proj, heads.reshape(-1))


def _multiply(module: nn.Module, scale: torch.Tensor) -> None:
    """The channels that a module puts out: rows of its weight, and its bias."""
    for parameter in module.parameters():
        parameter.copy_(parameter.double() * scale.view(-1, *[1] * (parameter.ndim - 1)))


def _divide_columns(linear: nn.Linear, scale: torch.Tensor) -> None:
    linear.weight.copy_(linear.weight.double() / scale)
