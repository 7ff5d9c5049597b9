"""Weights are moved off a lattice, and the function stays what it is."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from labsupport.model import models, off_lattice


def tiny_llama(biases: bool = False, seed: int = 0):
    """Three query heads for each of two key heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=290, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=640, rope_theta=20000.0, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, attention_bias=biases, mlp_bias=biases,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    return model


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


class Norm(LlamaRMSNorm):
    """In the dtype of its input. transformers' own rounds to float32, which hides what is lost before."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)


def in_float64(model):
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = Norm
    return model.double()


@pytest.mark.parametrize("biases", [False, True])
def test_factors_that_are_powers_of_two_change_no_bit(biases):
    """Multiplying by a power of two rounds nothing, so the same factors out and in leave every value of the residual stream."""
    model, ids = tiny_llama(biases), torch.randint(290, (2, 24))
    before, old, generator = logits(model, ids), models.duplicate(model), torch.Generator().manual_seed(1)
    for block in models.blocks(model):
        off_lattice.rescale(block, lambda count: 2.0 ** torch.randint(-3, 4, (count,), generator=generator).double())
    assert torch.equal(logits(model, ids), before)
    for name, linear in models.linears(old).items():
        assert not torch.equal(model.get_submodule(name).weight, linear.weight), name


def test_in_float64_the_logits_stay_within_rounding():
    """Multiplying a factor in rounds a weight, dividing it out another: with u = 2**-53 less than 4 u for all that a product goes
    through. A product is a sum of at most 160 terms, off by at most 160 u of each. So both models are as one whose weights are off
    by 4 + 160 units u. How far such a change carries is measured, with weights changed at random by up to 1e-6 of themselves.
    """
    model, ids = in_float64(tiny_llama()), torch.randint(290, (2, 24))
    before, changed = logits(model, ids), models.duplicate(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1 + 1e-6 * (2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1))
    carried = (logits(changed, ids) - before).abs().max().item() / 1e-6
    off_lattice.move_off_lattice(model)
    moved = (logits(model, ids) - before).abs().max().item()
    assert 0 < moved <= carried * 2 * (4 + 160) * 2**-53


def test_the_same_seed_gives_the_same_weights():
    one, same, other = tiny_llama(), tiny_llama(), tiny_llama()
    for model, seed in ((one, 0), (same, 0), (other, 1)):
        off_lattice.move_off_lattice(model, seed=seed)
    weights = [model.model.layers[1].self_attn.o_proj.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
