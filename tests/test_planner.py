"""Bytes on paper, compared with other people's counts: transformers' models, the packed tensors, published figures."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labsupport.evidence import planner, published, roofline, tables
from labsupport.evidence.configs import shape_of
from labsupport.evidence.planner import LLAMA_7B, LLAMA_34B, LLAMA_70B, SHAPES, Shape
from labsupport.quant import kv, rtn


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


@pytest.mark.parametrize("figure", published.figures(), ids=lambda f: f"{f.kind} of {f.about}")
def test_what_others_published(figure):
    """Sizes within 2 %; measured speeds below the limit, which they would not be if too few bytes were read."""
    assert figure.agrees, figure.shown
    assert figure.source


def test_there_are_enough_published_figures_and_they_can_disagree():
    kinds = [figure.kind for figure in published.figures()]
    assert kinds.count("weights") + kinds.count("cache") >= 10
    assert kinds.count("speed") >= 5
    size, speed = published.figures()[0], published.figures()[-1]
    assert not published.Figure("weights", "", size.published, 1.03 * size.published, 0, "x").agrees
    assert not published.Figure("speed", "", speed.published, 0.99 * speed.published, 0, "x").agrees


def test_two_ways_to_count_the_same_bytes():
    for bits, name in ((16, "bf16"), (4, "w4a16-g128"), (3, "w3a16-g128")):
        form = tables.formats()[name]
        assert sum(planner.weight_bytes(LLAMA_34B, form).values()) == pytest.approx(planner.model_bytes(LLAMA_34B, bits), rel=1e-12)
        assert planner.read_bytes(LLAMA_34B, form) == pytest.approx(planner.step_bytes(LLAMA_34B, bits), rel=1e-12)
    for name in ("Llama-3.1-8B", "DeepSeek-V2-Lite", "Falcon-7B"):
        row = tables.architectures()[name]
        same = kv.Shape.of(type("Config", (), dict(row.config)))
        assert planner.cache_bytes(row.shape, 777, 3) == kv.cache_bytes(same, 777, 3)


def test_a_step_reads_the_experts_that_its_tokens_ask_for():
    shape, form = tables.model("mixtral-8x7b"), tables.formats()["bf16"]
    experts = sum(2 * each.values * each.times for each in shape.linears if each.name.startswith("experts."))
    always = planner.step_bytes(shape, 16) - experts
    assert planner.read_bytes(shape, form, 1) == pytest.approx(always + experts * 2 / 8)
    # Two tokens ask for the same two of eight with probability 1/28, for one in common with 12/28: 4 - (2 + 12) / 28 on average.
    assert planner.read_bytes(shape, form, 2) == pytest.approx(always + experts * (4 - 14 / 28) / 8)
    assert planner.read_bytes(shape, form, 500) == pytest.approx(always + experts)


def test_a_layer_with_a_window_keeps_no_more():
    shape = shape_of(dict(tables.architectures()["Gemma-2-2B"].config), "x")
    of_layer = 2 * 4 * 256 * 2
    assert planner.cache_bytes(shape, 1000) == 26 * 1000 * of_layer
    assert planner.cache_bytes(shape, 10_000) == (13 * 4096 + 13 * 10_000) * of_layer
    assert planner.cache_bytes(shape, 10_000, users=5, bits=8) == 5 * planner.cache_bytes(shape, 10_000) / 2


@pytest.mark.parametrize("name", ["Gemma-2-9B", "Llama-3.1-8B", "gpt-oss-20b"])
def test_the_most_that_fits_fits_and_one_more_does_not(name):
    shape, card = tables.model(name), tables.card("rtx 4090")
    form = "mxfp4-experts" if shape.native else "w4a16-g128"
    plan = planner.plan(shape, card, form, context=3000, users=2)
    for users, context in ((plan.most_users, 3000), (2, plan.longest_context)):
        assert planner.plan(shape, card, form, context, users).fits
    assert not planner.plan(shape, card, form, 3000, plan.most_users + 1).fits
    assert not planner.plan(shape, card, form, plan.longest_context + 1, 2).fits


def test_a_plan_is_the_sum_of_its_parts_and_the_longer_of_two_times():
    card = tables.card("a100 80")
    plan = planner.plan(LLAMA_7B, card, "w4a16-g128", context=1000, users=8)
    assert tuple(plan.parts) == planner.PARTS
    assert plan.total == sum(plan.parts.values())
    read = planner.step_bytes(LLAMA_7B, 4) + plan.parts["KV cache"]
    assert plan.tokens_per_second == pytest.approx(8 * card.bandwidth / read, rel=1e-12)
    assert plan.limit == "memory"
    many = planner.plan(LLAMA_7B, card, "w4a16-g128", context=1, users=5000)
    assert many.limit == "compute"
    assert many.tokens_per_second == pytest.approx(card.rates["half"] / (2 * LLAMA_7B.active_parameters))
    assert planner.plan(LLAMA_7B, tables.card("cpu")).prefill_seconds is None


def test_a_roofline_knows_the_same_cards():
    for device in roofline.GPUS:
        assert vars(tables.card(device.name).device()) | {"source": ""} == vars(device) | {"source": ""}
    with pytest.raises(ValueError, match="the maker of CPU gives no rate"):
        tables.card("cpu").device()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context is 0"), ({"users": -1}, "users is -1"), ({"cache": "int2"}, "cache is 'int2', wanted one of"),
        ({"form": "w5"}, "format is 'w5', wanted one of bf16"),
    ],
)  # fmt: skip
def test_a_plan_of_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        planner.plan(LLAMA_7B, tables.card("t4"), **arguments)


def test_claims_of_the_course_are_this_arithmetic():
    """25: a 34B in 4 bits is larger than 16 GB, in 3 bits smaller. 27: the cache of a 7B. 28: AWQ and an fp8 cache."""
    four, three = planner.model_bytes(LLAMA_34B, 4), planner.model_bytes(LLAMA_34B, 3)
    assert three < 16e9 < four
    assert planner.cache_bytes(LLAMA_7B, 4096, 32) == 64 * planner.GIB
    cache = planner.cache_bytes(LLAMA_7B, 4096, 32, planner.CACHES["bf16"])
    assert cache / planner.cache_bytes(LLAMA_7B, 4096, 32, planner.CACHES["fp8"]) == 2
