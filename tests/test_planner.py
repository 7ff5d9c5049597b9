"""Bytes on paper, compared with other people's counts: transformers' models, the packed tensors, published figures."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labsupport.evidence import planner
from labsupport.evidence.planner import LLAMA_7B, LLAMA_34B, LLAMA_70B, SHAPES, Shape
from labsupport.quant import rtn


def llama(shape: Shape):
    """The same shape as transformers builds it, without memory for its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


# As the model pages of the hub give them, rounded there.
@pytest.mark.parametrize(
    ("shape", "published", "rounding"), [(LLAMA_7B, 6.74e9, 5e6), (LLAMA_34B, 33.7e9, 5e7), (LLAMA_70B, 69e9, 5e8)]
)
def test_parameter_counts_are_the_published_ones(shape, published, rounding):
    assert abs(shape.parameters - published) <= rounding


@pytest.mark.parametrize("shape", [*SHAPES, Shape("tied", 3, 256, 640, 4, 2, 1024, tied=True)], ids=lambda s: s.name)
def test_parameter_counts_are_those_of_transformers(shape):
    model = llama(shape)
    linear = sum(m.weight.numel() for b in model.model.layers for m in b.modules() if isinstance(m, torch.nn.Linear))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.linear_parameters == linear
    assert shape.embedding_parameters == model.model.embed_tokens.weight.numel()
    assert planner.shape_of(model.config, shape.name).parameters == shape.parameters


@given(
    rows=st.integers(1, 5).map(lambda n: 8 * n),  # whole bytes for codes and zero-points of any width
    groups=st.integers(1, 4),
    group_size=st.sampled_from([16, 32, 128]),
    bits=st.integers(2, 8),
    others=st.integers(0, 1000),
)
@pytest.mark.slow
def test_stored_bytes_are_the_bytes_of_the_packed_tensors(rows, groups, group_size, bits, others):
    weight = torch.randn(rows, groups * group_size, generator=torch.Generator().manual_seed(0))
    counted = rtn.quantize(weight, bits=bits, group_size=group_size).nbytes
    total, gib = planner.stored_bytes(weight.numel(), others, bits, group_size)
    assert total == counted + 2 * others
    assert gib == total / 1024**3


def test_a_step_reads_everything_but_the_input_table():
    assert planner.model_bytes(LLAMA_7B, 16) == 2 * LLAMA_7B.parameters
    assert planner.step_bytes(LLAMA_7B, 16) == 2 * LLAMA_7B.parameters - 2 * 32000 * 4096
    tied = Shape("tied", 3, 256, 640, 4, 2, 1024, tied=True)  # the head is the table, so it is read after all
    assert planner.step_bytes(tied, 4) == planner.model_bytes(tied, 4)


def test_step_bytes_agree_with_what_gpt_fast_publishes():
    """Its README divides into 13.3 GB a token for Llama-2-7B in bf16; it may or may not count the input table (2 %)."""
    assert planner.step_bytes(LLAMA_7B, 16) == pytest.approx(1397.31e9 / 104.9, rel=0.02)
