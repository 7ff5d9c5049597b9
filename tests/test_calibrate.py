"""Calibration text streamed block by block, held to plain forward passes of the whole model."""

import gc

import architectures
import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from labsupport.checkpoint.measure import evaluate_streamed
from labsupport.model import evaluate, models, text
from labsupport.pipeline import calibrate
from labsupport.pipeline.block import CalibrationError, Resident
from labsupport.quant import gptq, rtn

ORDER = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"),
         ("mlp.down_proj",)]  # fmt: skip


def llama(blocks=2, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=None, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gemma():
    """Blocks that are not all called alike: every other one sees a window of eight tokens, with rotary tables of its own."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 300, (5, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def fed(model, ids, name):
    """What a linear sees in one forward pass of the whole model: float32 [tokens, in]."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    return torch.cat(seen)


def rounded(name, layer, statistics):
    with torch.no_grad():
        layer.weight.copy_(rtn.quantize(layer.weight, 2, 16).dequantize())


def assert_sums(statistics, x):
    # Float32 sums of some hundred terms, in another order.
    assert torch.allclose(statistics.gram, x.T @ x, rtol=1e-4, atol=1e-5 * (x.T @ x).diagonal().max())
    assert torch.allclose(statistics.hessian, 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-5 * (x.T @ x).diagonal().max())
    assert torch.allclose(statistics.mean_abs, x.abs().mean(0), rtol=1e-4)
    assert torch.allclose(statistics.max_abs, x.abs().amax(0), rtol=1e-4)
    assert statistics.tokens == len(x)


def test_uneven_batches_weigh_by_their_tokens():
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    statistics = calibrate.InputStatistics.empty(8)
    for part in (x[:17], x[17:18].view(1, 1, 8), x[18:].view(3, 4, 8)):
        statistics.add(part)
    assert_sums(statistics, x)
    half = calibrate.InputStatistics.empty(8)
    half.add(x.half())
    assert half.gram.dtype == torch.float32


@pytest.mark.parametrize("make", [llama, gemma, lambda: llama(attn_implementation="eager"), lambda: llama(attention_bias=True)])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_every_linear_is_fed_by_what_those_before_it_have_become(make, batch, ids):
    """At the moment a linear is quantized, its statistics are those of a plain pass through the model as it stands."""
    model = make()
    seen = []

    def compare_and_round(name, layer, statistics):
        if not any(name.endswith(later) for group in ORDER for later in group[1:]):  # the rest of a group shares its input
            assert_sums(statistics, fed(model, ids, name))
        seen.append(name)
        rounded(name, layer, statistics)

    calibrate.blockwise(model, ids, compare_and_round, batch=batch)
    assert sorted(seen) == sorted(models.linears(model))


def test_without_true_sequential_a_block_is_fed_as_it_was(ids):
    model = llama()
    at_start = {}

    def compare_and_round(name, layer, statistics):
        block = name.split(".")[2]
        if block not in at_start:
            at_start[block] = models.duplicate(model)
        assert_sums(statistics, fed(at_start[block], ids, name))
        rounded(name, layer, statistics)

    calibrate.blockwise(model, ids, compare_and_round, true_sequential=False)
    assert list(at_start) == ["0", "1"]


def test_groups_progress_and_results(ids):
    model = llama()
    groups = [block.groups() for block in calibrate.blocks(model, ids)]
    assert groups == [[tuple(f"model.layers.{i}.{name}" for name in group) for group in ORDER] for i in range(2)]
    told = []
    results = calibrate.blockwise(
        model, ids, lambda name, layer, s: s.tokens, on_linear=lambda name, done, total: told.append((name, done, total))
    )
    in_order = [name for block in groups for group in block for name in group]
    assert results == dict.fromkeys(in_order, 5 * 24)
    assert told == [(name, i + 1, 14) for i, name in enumerate(in_order)]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pass_ends_where_all_that_were_asked_for_have_been_fed(ids):
    model = llama()
    called = []
    for name, layer in models.linears(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: called.append(name))
    block = next(calibrate.blocks(model, ids, batch=2))
    called.clear()
    block.statistics(["model.layers.0.self_attn.o_proj"])
    assert called == [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"] * 3


def by_gptq(name, layer, statistics):
    with torch.no_grad():
        layer.weight.copy_(gptq.quantize(layer.weight, statistics.hessian, 3, 16).dequantize())


def test_outputs_of_a_block_and_nothing_but_linears_changes(ids):
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    for block in calibrate.blocks(model, ids, batch=2):
        assert [len(x) for x in block.inputs] == [2, 2, 1]
        assert torch.allclose(torch.cat(block.inputs), hidden[block.index], atol=1e-5)
        if block.index == 0:
            assert torch.allclose(torch.cat(list(block.outputs())), hidden[1], atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    calibrate.blockwise(model, ids, by_gptq)
    changed = {name.removesuffix(".weight") for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(models.linears(model))


def test_stopped_and_started_again_it_gives_the_same(ids):
    whole = llama()
    calibrate.blockwise(whole, ids, by_gptq)

    class Interrupted(Exception):
        pass

    def interrupted(name, layer, statistics):
        if name.startswith("model.layers.1"):
            raise Interrupted
        by_gptq(name, layer, statistics)

    model = llama()
    with pytest.raises(Interrupted):
        calibrate.blockwise(model, ids, interrupted)
    assert not any(module._forward_pre_hooks for module in model.modules())

    def the_rest(name, layer, statistics):
        if name.startswith("model.layers.1"):
            by_gptq(name, layer, statistics)

    calibrate.blockwise(model, ids, the_rest)
    for name, layer in models.linears(whole).items():
        assert torch.equal(models.linears(model)[name].weight, layer.weight), name


def peak_above_the_model(blocks, ids):
    """Bytes behind all tensors that are alive and not the model's, whenever a linear is called or quantized: the most of them."""
    model = llama(blocks)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), ids)}
    peak = 0

    def look(*_):
        nonlocal peak
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        peak = max(peak, sum(nbytes for pointer, nbytes in storages.items() if pointer not in own))

    for layer in models.linears(model).values():
        layer.register_forward_pre_hook(look)
    gc.collect()
    gc.freeze()  # what is there already is not looked at
    try:
        calibrate.blockwise(model, ids, look, batch=2, true_sequential=False)
    finally:
        gc.unfreeze()
    return peak


@pytest.mark.slow
def test_memory_is_that_of_one_block_however_many_there_are():
    ids = torch.randint(0, 300, (16, 64), generator=torch.Generator().manual_seed(2))
    peak = peak_above_the_model(2, ids)
    assert peak_above_the_model(8, ids) == peak
    hidden = 4 * ids.numel() * 32
    grams = 4 * (3 * (32 * 32 + 2 * 32) + 64 * 64 + 2 * 64)
    within = 4 * 2 * 64 * (64 + 6 * 32)  # one batch inside the block: the widest input, and some the size of hidden states
    assert hidden < peak < hidden + grams + within


def test_windows_are_spread_and_counted():
    stream = text.TokenStream(torch.arange(1000), torch.zeros(1000, dtype=torch.int64), ("a",), 1000, "", "made up")
    chosen = calibrate.windows(stream, 4, 100)
    assert chosen[:, 0].tolist() == [0, 200, 500, 700]
    assert torch.equal(chosen[1], torch.arange(200, 300))
    with pytest.raises(text.TextError, match="the text 'made up' has 10 windows of 100 tokens, fewer than the 11 asked for"):
        calibrate.windows(stream, 11, 100)
    with pytest.raises(text.TextError, match="has 1000 tokens, fewer than one window of 2000"):
        calibrate.windows(stream, 1, 2000)


@pytest.mark.parametrize("shape", [(0, 24), (5, 0), (24,)])
def test_no_text(shape):
    with pytest.raises(text.TextError, match=r"calibration text has shape .*, wanted \[windows, length\], neither of them 0"):
        calibrate.blockwise(llama(), torch.zeros(shape, dtype=torch.int64), rounded)


def test_training_mode(ids):
    with pytest.raises(calibrate.CalibrationError, match=r"the model is in training mode.*call model.eval\(\)"):
        calibrate.blockwise(llama().train(), ids, rounded)


def test_linear_that_never_saw_an_input(ids):
    model = llama()
    model.model.layers[1].mlp.spare = torch.nn.Linear(32, 32)
    with pytest.raises(calibrate.CalibrationError, match=r"model\.layers\.1\.mlp\.spare never saw an input"):
        calibrate.blockwise(model, ids, rounded)


def test_linear_that_is_called_twice(ids):
    model = llama()
    mlp = model.model.layers[0].mlp
    once = mlp.forward
    mlp.forward = lambda x: once(once(x))
    with pytest.raises(calibrate.CalibrationError, match=r"model\.layers\.0\.mlp\.gate_proj is called 2 times in one pass"):
        calibrate.blockwise(model, ids, rounded)


def share_module(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def share_weight(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def share_memory(model):
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(model.model.layers[0].mlp.up_proj.weight.data)


@pytest.mark.parametrize("share", [share_module, share_weight, share_memory])
def test_linears_that_are_one_weight(share, ids):
    model = llama()
    share(model)
    with pytest.raises(calibrate.CalibrationError, match=r"model.layers.0.mlp.\w+_proj.weight and model.layers.1.* are one weight"):
        calibrate.blockwise(model, ids, rounded)


def test_input_that_overflowed_is_said(ids):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"hessian holds (NaN|infinity)"):
        calibrate.blockwise(model, ids, by_gptq)


@pytest.mark.parametrize("name", ["falcon", "bloom", "gpt-j", "gpt-neo", "gpt2", "llama"])
@torch.no_grad()
def test_blocks_whose_callers_take_tuples_apart(name, ids):
    """What streams through block by block is what the model computes, and so is the perplexity measured at its end."""
    model, seen, streamed = architectures.make(name), [], []
    for block in calibrate.blocks(model, ids, batch=2):
        streamed.append(torch.cat(list(block.outputs())))
        assert block.returned == (2 if name in ("falcon", "bloom", "gpt-j", "gpt-neo") else 0)
    handles = [
        module.register_forward_hook(lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output))
        for module in models.blocks(model)
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(got, want) for got, want in zip(streamed, seen, strict=True))
    row = ids.flatten()
    stream = text.TokenStream(row, torch.zeros_like(row), ("all",), len(row), "", "random")
    measured = evaluate_streamed(model, Resident(), stream, 24, None)
    assert measured.mean_loss == evaluate.evaluate(model, stream, 24).mean_loss


def test_callers_that_hand_on_something_else_are_refused(ids):
    """Neither the hidden states nor the first item of a tuple reaches the second block."""
    model = llama()
    second = model.model.layers[1]

    def narrow(self, hidden, **others):
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return nn.Module.__call__(self, hidden[..., :8], **others)

    second.__class__ = type("Narrowed", (type(second),), {"__call__": narrow})
    with pytest.raises(CalibrationError, match="second block"):
        next(calibrate.blocks(model, ids))
