"""Bytes and rates on paper, held against other people's counts: transformers' models, the packed tensors, published figures."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labsupport.evidence import planner
from labsupport.evidence.planner import A100, GPUS, LLAMA_7B, LLAMA_34B, LLAMA_70B, SHAPES, Shape
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


def test_intensity_of_extremes():
    assert planner.intensity(1, 4096, 4096, 16) == pytest.approx(1, rel=1e-3)  # two operations for each two-byte weight
    assert planner.intensity(1, 4096, 4096, 4) == pytest.approx(4, rel=1e-2)
    assert planner.intensity(4096, 4096, 4096, 16) == pytest.approx(4096 / 3)


@pytest.mark.parametrize("device", GPUS, ids=lambda d: d.name)
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_crossover_is_the_first_batch_limited_by_operations(device, bits):
    batch = planner.crossover_batch(device.bandwidth, device.rate, bits)
    weights = 10**9

    def memory_bound(n: int) -> bool:
        return weights * bits / 8 / device.bandwidth > 2 * weights * n / device.rate

    assert memory_bound(batch - 1)
    assert not memory_bound(batch)


def test_decode_rate_below_and_above_the_crossover():
    read, weights = planner.step_bytes(LLAMA_7B, 16), 6.6e9
    rate = [planner.decode_rate(read, weights, n, A100.bandwidth, A100.rate) for n in (1, 2, 10**4, 10**5)]
    assert rate[0] == A100.bandwidth / read
    assert rate[1] == pytest.approx(2 * rate[0])
    assert rate[2] == pytest.approx(A100.rate / (2 * weights))
    assert rate[3] == pytest.approx(rate[2])


def test_matmul_seconds_is_the_longer_of_the_two():
    assert planner.matmul_seconds(4096, 4096, 4096, 16, A100) == 2 * 4096**3 / A100.rate
    moved = 4096 * 4096 * 2 + 2 * (4096 + 4096)
    assert planner.matmul_seconds(1, 4096, 4096, 16, A100) == pytest.approx(moved / A100.bandwidth)


def test_what_limits():
    assert planner.what_limits(1, 80, 10, 100, 100) == "memory"
    assert planner.what_limits(1, 10, 80, 100, 100) == "compute"
    assert planner.what_limits(1, 30, 33, 100, 100) == "overhead"
    assert planner.what_limits(1, 30, 34, 100, 100) == "compute"


def test_every_gpu_names_its_source_and_is_plausible():
    for device in GPUS:
        assert "NVIDIA" in device.source
        assert 100 < device.ridge < 400  # a misplaced power of ten, or a figure with sparsity, falls outside
        assert 100e9 < device.bandwidth < 10e12
