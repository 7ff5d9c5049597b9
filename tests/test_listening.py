"""Tokens weighed by the attention that they get, against whole attention maps that transformers gives, in float64."""

from __future__ import annotations

import pytest
import torch
from architectures import make

from labsupport.model import models
from labsupport.pipeline import calibrate, listening
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant import gptq

WINDOWS, TOKENS = 3, 40
IDS = torch.randint(1, 300, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))
# Biases, a head's width of its own, norms of queries and keys, a sliding window, a cap on scores, layer norms.
WEIGHED = ("llama-biases-tied", "llama-72-wide", "qwen3", "mistral", "qwen2-sliding", "gemma2", "gemma3", "opt", "cohere")


def plainly(model, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_t w_t x_t x_t^T and sum_t w_t |x_t| |x_t|^T, w_t = sum of A[q, t]^2, from the model's own maps of attention."""
    layer, fed = next(m for n, m in models.linears(model).items() if f".{index}." in n and n.endswith("v_proj")), []
    hook = layer.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))
    before, model.config._attn_implementation = model.config._attn_implementation, "eager"
    with torch.no_grad():
        maps = model(IDS, use_cache=False, output_attentions=True).attentions[index]
    model.config._attn_implementation = before
    hook.remove()
    x, w = fed[0], maps.square().sum((1, 2))
    return tuple(torch.einsum("bt,bti,btj->ij", w, t, t) for t in (x, x.abs()))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", WEIGHED)
def test_equals_whole_attention_maps(name, implementation):
    if name == "gemma2" and implementation == "sdpa":
        pytest.skip("transformers' sdpa leaves out the cap of Gemma 2's scores, or refuses it")
    model = make(name).double().eval()
    model.set_attn_implementation(implementation)
    for block in calibrate.blocks(model, IDS, batch=2):
        values = listening.makes_values(block)
        assert values == next(n for n in block.linears if n.endswith("v_proj"))
        statistics = listening.heard(block, values)
        want, size = plainly(model, block.index)
        # Scores are rounded to float32 once (they are below 8), softmax adds TOKENS of them, and both count twice in a square; x is
        # rounded, and the sums over all tokens are in float32.
        rounding = (2 * (8 + TOKENS + 8) + WINDOWS * TOKENS + 4) * 2.0**-24
        assert ((statistics.gram - want).abs() <= rounding * size).all()
        assert statistics.tokens == IDS.numel()
        x, weights = listening.received(block, values)
        assert (x.shape[:2], weights.shape) == (IDS.shape, IDS.shape)
        assert ((torch.einsum("bt,bti,btj->ij", weights, x, x) - want).abs() <= rounding * size).all()
        even = block.statistics([values])[values]
        assert ((even.gram - want).abs() > rounding * size).any()


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt-j", "gpt-neo", "falcon", "bloom"])
def test_none_where_tokens_cannot_be_weighed(name):
    for block in calibrate.blocks(make(name).eval(), IDS, batch=2):
        assert listening.makes_values(block) is None


def test_an_attention_that_does_more_is_not_weighed(monkeypatch):
    """Here: one that adds to its scores what no argument says."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def more(module, query, key, *args, **settings):
        return sdpa_attention_forward(module, 2 * query, key, *args, **settings)

    model = make("llama").eval()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", more)
    assert all(listening.makes_values(block) is None for block in calibrate.blocks(model, IDS))


def test_masks_of_every_kind():
    """None where the function knows by itself what a query sees; true and false; added. One for all windows, one for each."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 9, 8, generator=generator), torch.randn(2, 2, 9, 8, generator=generator)
    behind = torch.arange(9)[:, None] - torch.arange(9)
    for reach in (None, 3):
        seen = ((behind >= 0) & (behind < (reach or 9))).expand(1, 1, 9, 9)
        added = torch.zeros(1, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
        masks = (None, seen, added, added.expand(2, 1, 9, 9), seen.expand(2, 4, 9, 9))
        given = [{"scaling": 0.5, "sliding_window": reach, "attention_mask": mask} for mask in masks]
        received = [listening.attention_received(query, key, settings) for settings in given]
        assert all(torch.equal(received[0], other) for other in received[1:])
        scores = (0.5 * query @ key.repeat_interleave(2, 1).mT).masked_fill(~seen, -torch.inf)
        # Some fifty roundings of numbers of at most 9 x 4 heads.
        torch.testing.assert_close(received[0], scores.softmax(-1).square().sum((1, 2)), rtol=0, atol=50 * 36 * 2.0**-24)


def test_one_map_at_a_time():
    """A window and a head of keys at a time: the scores of more would be larger than all that a block holds."""
    model = make("llama").eval()
    sizes = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if "softmax" in str(function):
                sizes.append(result.numel())
            return result

    block = next(calibrate.blocks(model, IDS, batch=3))
    values = listening.makes_values(block)
    with Watching():
        listening.heard(block, values)
    assert sizes
    assert max(sizes) == 2 * TOKENS * TOKENS  # two heads of queries for each of keys


def test_only_the_values_are_solved_otherwise():
    model = make("llama").eval()
    even, attention, named = {}, {}, {}
    quantize_model(model, "gptq", calibration=IDS, group_size=32, stored=even)
    _, report = quantize_model(model, "gptq", calibration=IDS, group_size=32, token_weights="attention", stored=attention)
    first = [name for name in even if ".0." in name and not name.endswith(("o_proj", "gate_proj", "up_proj", "down_proj"))]
    assert len(first) == 3
    for name in first:
        assert torch.equal(even[name].codes, attention[name].codes) == (not name.endswith("v_proj"))
    assert [name for name, layer in report.layers.items() if layer.weighed] == [n for n in even if n.endswith("v_proj")]
    quantize_model(model, "gptq", calibration=IDS, group_size=32, token_weights="even", stored=named)
    assert all(torch.equal(even[name].codes, named[name].codes) for name in even)


def test_by_the_attention_of_queries_and_keys_as_they_have_become():
    model = make("llama").eval()
    stored = {}
    quantized, _ = quantize_model(
        model, "gptq", bits=2, calibration=IDS, group_size=32, token_weights="attention", stored=stored,
        overrides={name: None for name in ("o_proj", "gate_proj", "up_proj", "down_proj")},
    )  # fmt: skip
    block = next(calibrate.blocks(quantized, IDS))
    name = listening.makes_values(block)
    weight = models.linears(model)[name].weight
    # What v_proj has become changes nothing of A and X, so the finished model has the Hessian that was used.
    again = gptq.quantize(weight, listening.heard(block, name).hessian, 2, 32)
    assert torch.equal(again.codes, stored[name].codes)


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="token_weights is 'sink', wanted one of even, attention, not_first"):
        quantize_model(make("llama").eval(), "gptq", calibration=IDS, group_size=32, token_weights="sink")
    with pytest.raises(ValueError, match="token_weights is 'attention', wanted one of even, not_first"):
        quantize_model(make("llama").eval(), "awq", calibration=IDS, group_size=32, token_weights="attention")


def test_the_first_token_of_a_window_can_be_left_out():
    model = make("llama").eval()
    fed = {}
    hook = models.linears(model)["model.layers.0.self_attn.q_proj"].register_forward_pre_hook(lambda _, x: fed.update(x=x[0]))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    without = fed["x"][:, 1:].reshape(-1, fed["x"].shape[-1])
    statistics = next(calibrate.blocks(model, IDS)).statistics(["model.layers.0.self_attn.q_proj"], first=False)
    found = statistics["model.layers.0.self_attn.q_proj"]
    assert found.tokens == len(without) == IDS.shape[0] * (IDS.shape[1] - 1)
    # The same numbers added in another order: relative 1e-6 of sums of magnitudes.
    assert torch.allclose(found.gram, without.t() @ without, rtol=0, atol=1e-5 * (without.abs().t() @ without.abs()).max())
    assert torch.allclose(found.sum_abs, without.abs().sum(0), rtol=1e-5)
    for method in ("gptq", "awq"):
        stored, even = {}, {}
        given = {"calibration": IDS, "group_size": 32, "bits": 3}
        quantize_model(model, method, stored=stored, token_weights="not_first", **given)
        quantize_model(model, method, stored=even, **given)
        assert any(not torch.equal(stored[name].codes, even[name].codes) for name in even)
    name = "model.layers.0.self_attn.q_proj"
    stored = {}
    quantize_model(model, "gptq", stored=stored, token_weights="not_first", calibration=IDS, group_size=32)
    assert torch.equal(stored[name].codes, gptq.quantize(models.linears(model)[name].weight, found.hessian, 4, 32).codes)


def test_the_first_token_counts_for_all_linears_of_a_block_or_for_none():
    given = {"calibration": IDS, "group_size": 32, "token_weights": "not_first"}
    with pytest.raises(ValueError, match="token_weights 'not_first' is for all linears of a block, and one of them has 'even'"):
        quantize_model(make("llama").eval(), "gptq", overrides={"v_proj": {"token_weights": "even"}}, **given)
    quantize_model(make("llama").eval(), "gptq", overrides={"v_proj": None}, **given)
    with pytest.raises(calibrate.CalibrationError, match=r"experts.* is fed tokens out of their windows"):
        quantize_model(make("mixtral").eval(), "gptq", **given)
