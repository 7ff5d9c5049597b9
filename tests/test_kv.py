"""The quantized cache: its bytes, what reads back, in `generate`, and one pass against a decode step by step."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers import QuantizedCache as Theirs

from labsupport.evidence import sweep
from labsupport.model import evaluate, models
from labsupport.pipeline import cache
from labsupport.pipeline.cache import QuantizedCache, QuantizedLayer
from labsupport.quant import kv
from labsupport.quant.kv import Part, Scheme, Shape

SCHEMES = {
    "float": kv.FLOAT,
    "fp8": Scheme(Part("fp8"), Part("fp8", scale=0.5)),
    "int8": Scheme(Part(8, "channel", 8), Part(8, "token", 8)),
    "int4": Scheme(Part(4, "channel", 4, residual=3), Part(4, "token", 4, residual=5)),
    "2 bits, per token": Scheme(Part(2, "token", 8, block=4), Part(2, "channel", 8)),
    "3 bits, before RoPE": Scheme(Part(3, "channel", 4), Part(3, "token", 16), before_rope=True),
    "kivi": kv.kivi(2, 4, 8),
    "only keys": Scheme(Part(4, "channel", 4), Part()),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(dtype: torch.dtype = torch.float64, **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=128, **settings,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for layer in models.linears(model).values():
            layer.weight.mul_(8)  # as made, attention is nearly even, and no error in a key would show
    return model


# What is stored -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("axis", kv.AXES)
def test_values_read_back_within_half_a_step(bits, axis):
    x = states(2, 3, 24, 16) * torch.linspace(0.1, 9, 16) + torch.linspace(-30, 30, 16)
    part = Part(bits, axis, 8)
    stored = kv.quantize(x, part)
    groups = x.unflatten(2 if axis == "channel" else 3, (-1, 8))
    error = (stored.dequantize() - x).abs().unflatten(2 if axis == "channel" else 3, (-1, 8))
    inside = 3 if axis == "channel" else 4
    low, high = groups.amin(inside, keepdim=True), groups.amax(inside, keepdim=True)
    step = (high - low) / (2**bits - 1)
    # Half a step, and what float16 moves the two ends by (scale and minimum, 2**-11 each), and a scale that grew by as much.
    allowed = step / 2 * (1 + 2**-10) + 2**-11 * low.abs() + 2**-10 * (high - low) + 1e-5
    assert (error <= allowed).all()
    assert stored.codes.shape == (2, 3, 24, 2 * bits)
    assert stored.scale.shape == stored.minimum.shape == ((2, 3, 3, 16) if axis == "channel" else (2, 3, 24, 2))


def test_a_channel_off_zero_keeps_all_its_levels():
    """KIVI's grid reaches from the least to the largest value; one that must hold 0 would have four levels left here."""
    x = 20 + states(1, 1, 32, 8)
    stored = kv.quantize(x, Part(4, "channel", 32))
    codes = torch.round((stored.dequantize() - stored.minimum.float()) / stored.scale.float())
    assert (codes.amax(2) == 15).all()
    assert (codes.amin(2) == 0).all()


def test_a_loud_channel_spoils_its_token_and_not_its_neighbors_by_channel():
    x = states(1, 1, 32, 32)
    x[..., 5] *= 64
    rest = torch.arange(32) != 5
    errors = {axis: (kv.quantize(x, Part(4, axis, 32)).dequantize() - x)[..., rest].pow(2).mean().item() for axis in kv.AXES}
    assert errors["token"] > 100 * errors["channel"]


def test_codes_by_channel_do_not_see_a_power_of_two_on_the_channel():
    x, factor = states(1, 2, 16, 8), torch.ones(8).index_fill(0, torch.tensor([1, 6]), 8.0)
    plain, loud = kv.quantize(x, Part(4, "channel", 16)), kv.quantize(x * factor, Part(4, "channel", 16))
    assert torch.equal(plain.codes, loud.codes)
    assert torch.equal(plain.dequantize() * factor, loud.dequantize())
    assert not torch.equal(kv.quantize(x, Part(4, "token", 8)).codes, kv.quantize(x * factor, Part(4, "token", 8)).codes)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-9, 1e4])
@pytest.mark.parametrize("axis", kv.AXES)
def test_a_constant_group_reads_back_as_it_was(value, axis):
    x = torch.full((1, 1, 8, 8), value)
    assert torch.equal(kv.quantize(x, Part(4, axis, 8)).dequantize(), x.half().float())


def test_fp8_clamps_at_448_and_is_torchs_own_cast_below():
    x = torch.tensor([0.0, 1.0, 1.06, 17.0, -300.0, 448.0, 460.0, 1e6, -1e30]).view(1, 1, 9, 1)
    found = kv.quantize(x, Part("fp8")).dequantize().flatten()
    assert found.isfinite().all()
    assert torch.equal(found[:6], x.flatten()[:6].to(torch.float8_e4m3fn).float())
    assert found[6:].tolist() == [448.0, 448.0, -448.0]
    assert kv.quantize(x[:, :, :2], Part("fp8", scale=0.5)).dequantize().flatten().tolist() == [0.0, 1.0]
    assert kv.quantize(x, Part("fp8")).codes.dtype == torch.float8_e4m3fn


def test_what_is_quantized_and_what_waits():
    assert [Part(4, "channel", 4).stored(t) for t in (0, 3, 4, 7, 8)] == [0, 0, 4, 4, 8]
    assert [Part(4, "token", 4).stored(t) for t in (0, 1, 5)] == [0, 1, 5]
    assert [Part(4, "token", 4, residual=3).stored(t) for t in (2, 3, 4, 9)] == [0, 0, 1, 6]
    assert [Part(4, "channel", 4, residual=3).stored(t) for t in (6, 7, 10, 11)] == [0, 4, 4, 8]
    scheme = kv.kivi(2, 32, 128)  # its Algorithm 1: keys in blocks of 128, of the values the newest 128 wait
    assert [scheme.keys.stored(t) for t in (127, 128, 200, 256)] == [0, 128, 128, 256]
    assert [scheme.values.stored(t) for t in (127, 128, 200, 256)] == [0, 0, 72, 128]
    assert Part(16).stored(99) == 0
    assert Part("fp8", "channel").stored(5) == 5  # no group to wait for


@every_scheme
@pytest.mark.parametrize("shape", [Shape(3, 4, 16, 16), Shape(2, 2, 16, 16), Shape(2, 1, 16, 64)], ids=["MHA", "GQA", "MLA"])
def test_bytes_equal_the_formula_at_every_length(scheme, shape):
    layers = [QuantizedLayer(scheme, torch.ones(8)) for _ in range(shape.layers)]
    total = 0
    for new in (7, 1, 1, 1, 13, 1, 8, 2):
        for layer in layers:
            layer.update(states(5, shape.heads, new, shape.key_width), states(5, shape.heads, new, shape.value_width))
        total += new
        held = [t for layer in layers for s in layer.streams for t in (*(s.old.tensors if s.old else ()), s.recent)]
        wanted = kv.cache_bytes(shape, total, 5, scheme, float_bytes=4)
        assert sum(t.untyped_storage().nbytes() for t in held) == wanted  # what is allocated, not what is looked at
        assert sum(layer.nbytes for layer in layers) == wanted


def test_formula_for_known_shapes():
    def gib(layers, heads, width, value_width=None):
        return kv.cache_bytes(Shape(layers, heads, width, width if value_width is None else value_width), 4096, 32) / 2**30

    assert gib(32, 32, 128) == 64  # Llama-2-7B
    assert gib(32, 8, 128) == 16  # Mistral-7B, Llama-3-8B
    assert gib(27, 1, 64, 512) == 27 * 576 * 2 * 4096 * 32 / 2**30  # DeepSeek-V2-Lite
    tenth = Scheme(Part(2, "channel", 32), Part(2, "token", 32))
    assert kv.cache_bytes(Shape(32, 32, 128, 128), 4096, 32, tenth) * 16 == kv.cache_bytes(Shape(32, 32, 128, 128), 4096, 32) * 3


def test_shape_of_a_config():
    assert Shape.of(tiny().config) == Shape(3, 2, 16, 16)
    plain = type("Config", (), {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64})
    assert Shape.of(plain) == Shape(2, 4, 16, 16)
    latent = type("Config", (plain,), {"kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert Shape.of(latent) == Shape(2, 1, 64, 512)


def test_old_tokens_are_quantized_once():
    stream = kv.Stream(Part(2, "token", 4))
    stream = stream.grown(states(1, 1, 6, 4))
    before = stream.read()
    for seed in range(5):
        stream = stream.grown(100 * states(1, 1, 1, 4, seed=seed))
    assert torch.equal(stream.read()[:, :, :6], before)


@every_scheme
def test_how_tokens_arrive_does_not_matter_for_what_is_stored(scheme):
    x, y = states(2, 2, 23, 16), states(2, 2, 23, 16, seed=1)
    whole, parts = QuantizedLayer(scheme, torch.linspace(1, 0.01, 8)), QuantizedLayer(scheme, torch.linspace(1, 0.01, 8))
    at_once = whole.update(x, y)
    for piece in torch.arange(23).split([9, 1, 1, 5, 7]):
        in_parts = parts.update(x[:, :, piece], y[:, :, piece])
    assert all(torch.equal(a, b) for a, b in zip(at_once, in_parts, strict=True))
    assert whole.get_seq_length() == parts.get_seq_length() == 23
    assert at_once[0].shape == x.shape


def test_rotation_is_transformers_and_can_be_undone():
    model = tiny(torch.float32)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, positions = states(2, 2, 40, 16), torch.arange(40)
    cos, sin = model.model.rotary_emb(x, positions[None])
    theirs = apply_rotary_pos_emb(x, x, cos, sin)[1]
    frequencies = cache.frequencies_of(model)
    assert (kv.rotate(x, positions, frequencies) - theirs).abs().max() <= 1e-6
    assert (kv.rotate(theirs, positions, frequencies, back=True) - x).abs().max() <= 2e-6


def test_before_rope_stores_the_keys_of_the_projection():
    x, frequencies = states(1, 1, 8, 16), torch.linspace(1, 0.01, 8)
    part = Part(4, "channel", 8)
    layer = QuantizedLayer(Scheme(part, Part(), before_rope=True), frequencies)
    layer.update(kv.rotate(x[:, :, :3], torch.arange(3), frequencies), x[:, :, :3])
    read, _ = layer.update(kv.rotate(x[:, :, 3:], torch.arange(3, 8), frequencies), x[:, :, 3:])
    wanted = kv.rotate(kv.quantize(x, part).dequantize(), torch.arange(8), frequencies)
    assert (read - wanted).abs().max() <= 1e-5
    assert (read - kv.quantize(kv.rotate(x, torch.arange(8), frequencies), part).dequantize()).abs().max() > 0.01


# In a model -----------------------------------------------------------------------------------------------------------


@every_scheme
def test_one_pass_gives_the_logits_of_a_decode_step_by_step(scheme):
    """In float64, where no rounding of a product can carry a value over to another code."""
    model, ids = tiny(), torch.randint(96, (2, 37), generator=torch.Generator().manual_seed(1))
    stepwise = QuantizedCache(model, scheme)
    with torch.no_grad():
        steps = [model(ids[:, t : t + 1], past_key_values=stepwise).logits for t in range(37)]
        with cache.reading_back(model, scheme):
            at_once = model(ids, use_cache=False).logits
        plain = model(ids, use_cache=False).logits
    assert (torch.cat(steps, dim=1) - at_once).abs().max() <= 1e-6
    assert stepwise.nbytes == kv.cache_bytes(Shape.of(model.config), 37, 2, scheme, float_bytes=8)
    assert (at_once - plain).abs().max() > (1e-3 if scheme is not kv.FLOAT else -1)
    if scheme is kv.FLOAT:
        assert (at_once - plain).abs().max() <= 1e-6


@pytest.mark.slow
def test_one_pass_on_the_course_model_is_the_decode(course, held_out):
    model, stream = course[0], held_out
    scheme = Scheme(Part(2, "channel", 32, residual=16), Part(2, "token", 32, residual=16))
    ids = stream.ids[stream.positions(96, 2)]
    stepwise = QuantizedCache(model, scheme)
    with torch.no_grad():
        logits = torch.cat([model(ids[:, t : t + 1], past_key_values=stepwise).logits for t in range(95)], dim=1)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    found = cache.evaluate_cached(model, stream, scheme, length=96, windows=2)
    plain = evaluate.evaluate(model, stream, length=96, windows=2)
    # In float32 a product rounded otherwise can carry a value to its neighbor code; a few of some 10**5 do.
    assert abs(found.mean_loss - nll.item()) <= 1e-3
    assert abs(found.mean_loss - plain.mean_loss) > 5e-3


@pytest.mark.slow
def test_losses_by_place_are_those_of_the_evaluation(course, held_out):
    model, stream = course[0], held_out
    scheme = Scheme(Part(3, "channel", 32), Part(3, "token", 32))
    nats = cache.losses_by_place(model, stream, scheme, 4, length=128, windows=5)
    assert nats.shape == (5, 4)
    whole = cache.evaluate_cached(model, stream, scheme, length=128, windows=5)
    # Not to the last bit: where a float32 product is rounded otherwise, a code here and there moves by one.
    assert math.isclose(nats.sum().item(), whole.loss.sum().item(), rel_tol=1e-4)
    # A cache is causal: half a window has the losses of the first two bins.
    ids = stream.ids[stream.windows(128, 5)[0] + torch.arange(64)][None]
    with cache.reading_back(model, scheme), torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1]
    half = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    assert math.isclose(nats[0, :2].sum().item(), half.item(), rel_tol=1e-3)
    with pytest.raises(ValueError, match="bins is 3, wanted a divisor of length 128"):
        cache.losses_by_place(model, stream, scheme, 3, length=128)


def test_attention_is_put_back_even_after_an_error():
    model = tiny()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="does not divide"), cache.reading_back(model, Scheme(Part(4, "token", 5), Part())):
        model(torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
    assert model.config._attn_implementation == before


@every_scheme
def test_generate_accepts_it(scheme):
    model = tiny(torch.float32)
    ids = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(2))
    held = QuantizedCache(model, scheme)
    tokens = model.generate(ids, past_key_values=held, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert tokens.shape == (2, 21)
    assert held.get_seq_length() == 20  # the last token was never fed
    again = QuantizedCache(model, scheme)
    with torch.no_grad():
        follow = model(ids, past_key_values=again).logits[:, -1:].argmax(-1)
        generated = [follow]
        for _ in range(11):
            follow = model(follow, past_key_values=again).logits.argmax(-1)
            generated.append(follow)
    assert torch.equal(tokens[:, 9:], torch.cat(generated, dim=1))
    if scheme is kv.FLOAT:
        plain = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(plain, tokens)


@every_scheme
def test_beam_search_moves_every_tensor(scheme):
    model = tiny(torch.float32)
    ids = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(3))
    settings = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(ids, past_key_values=QuantizedCache(model, scheme), **settings)
    assert found.shape == (2, 17)
    layer = QuantizedLayer(scheme, torch.ones(8))
    read = layer.update(states(3, 2, 13, 16), states(3, 2, 13, 16, seed=1))
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    moved = layer.update(states(3, 2, 1, 16), states(3, 2, 1, 16))
    for before, after in zip(read, moved, strict=True):
        kept = min(part.stored(13) for part in (scheme.keys, scheme.values))
        assert torch.equal(after[:, :, :kept], before[[2, 0, 0]][:, :, :kept])
    layer.batch_repeat_interleave(2)
    assert layer.update(states(6, 2, 1, 16), states(6, 2, 1, 16))[0].shape == (6, 2, 15, 16)
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes == 0


def test_transformers_fp8_cache_stores_the_same_bytes_and_returns_the_prompt_unrounded():
    model, ids = tiny(torch.float32), torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(4))
    theirs = Theirs(backend="fp8", config=model.config)
    with torch.no_grad():
        first = model(ids, past_key_values=theirs).logits
        assert torch.equal(first, model(ids, past_key_values=DynamicCache(config=model.config)).logits)
        plain = DynamicCache(config=model.config)
        model(ids, past_key_values=plain)
    for layer, kept in zip(theirs.layers, plain.layers, strict=True):
        for (codes, scale), floats in ((layer._quantized_keys, kept.keys), (layer._quantized_values, kept.values)):
            part = Part("fp8", scale=scale.item())
            ours = kv.quantize(floats, part)
            assert torch.equal(ours.codes.view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(ours.dequantize(), layer._dequantize((codes, scale)))


# Outliers planted in keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [8.0, 7.3])
@pytest.mark.parametrize("bias", [False, True])
def test_planted_keys_leave_the_float_function_unchanged(factor, bias):
    model = tiny(attention_bias=bias)
    if bias:
        with torch.no_grad():
            for layer in models.linears(model).values():
                if layer.bias is not None:
                    layer.bias.copy_(torch.randn(layer.bias.shape, generator=torch.Generator().manual_seed(len(layer.bias))))
    planted = models.plant_key_outliers(model, factor)
    ids = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert (planted(ids).logits - model(ids).logits).abs().max() <= 1e-9
    for before, after in zip(models.blocks(model), models.blocks(planted), strict=True):
        ratio = (after.self_attn.k_proj.weight / before.self_attn.k_proj.weight).mean(1).view(2, 2, 8)  # head, half, pair
        assert (ratio[:, 0] - ratio[:, 1]).abs().max() <= 1e-9
        assert ((ratio - factor).abs() < 1e-6).sum(2).flatten().tolist() == [2] * 4
        assert torch.equal(before.self_attn.v_proj.weight, after.self_attn.v_proj.weight)


def test_planted_keys_are_found_in_the_keys_and_the_model_itself_is_left_alone(course, held_out):
    model, stream = course[0], held_out
    before = {name: layer.weight.clone() for name, layer in models.linears(model).items()}
    planted = models.plant_key_outliers(model)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in models.linears(model).items())
    ids = stream.ids[:128][None]
    with torch.no_grad():
        # Factor 8 is a power of two: not one bit of the logits moves.
        assert torch.equal(planted(ids).logits, model(ids).logits)
        held = DynamicCache(config=planted.config)
        planted(ids, past_key_values=held)
    loud = held.layers[2].keys.abs().mean((0, 2))
    assert (loud.topk(4, dim=1).values.min(1).values > 3 * loud.median(1).values).all()
    again = models.plant_key_outliers(model)
    assert torch.equal(models.blocks(again)[1].self_attn.k_proj.weight, models.blocks(planted)[1].self_attn.k_proj.weight)


def test_planted_keys_want_llama_attention():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(models.ModelError, match="keys of Llama-shaped attention, not in GPT2Block"):
        models.plant_key_outliers(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64)))
    model = tiny()
    models.blocks(model)[0].self_attn.k_norm = torch.nn.Identity()
    with pytest.raises(models.ModelError, match="Llama-shaped attention"):
        models.plant_key_outliers(model)


# Bars -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rises(course, held_out):
    """Rise in perplexity of keys alone at 4 bits, groups of 32, the same tokens waiting: as trained, and planted."""
    model, stream = course[0], held_out
    baseline = evaluate.evaluate(model, stream, windows=12)
    found = {}
    for name, each in (("as trained", model), ("planted", models.plant_key_outliers(model))):
        for axis in kv.AXES:
            scheme = Scheme(Part(4, axis, 32, block=32), Part())
            result = cache.evaluate_cached(each, stream, scheme, windows=12)
            found[name, axis] = evaluate.paired_bootstrap(baseline, result)
    return found


@pytest.mark.slow
def test_with_planted_keys_per_channel_costs_at_most_half_of_per_token(rises):
    assert 0 < rises["planted", "channel"].change <= rises["planted", "token"].change / 2
    assert rises["planted", "token"].low > rises["planted", "channel"].high


@pytest.mark.slow
def test_as_trained_neither_axis_costs_much_at_4_bits(rises):
    """Reported as they are: without outliers the axis hardly matters, and planting changes nothing for per channel."""
    assert abs(rises["as trained", "token"].change) < 0.02
    assert math.isclose(rises["as trained", "channel"].change, rises["planted", "channel"].change, abs_tol=2e-4)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits is 1, wanted a whole number from 2 to 8, 'fp8', or 16"),
        ({"bits": 4.0}, "bits is 4.0"),
        ({"bits": "int4"}, "bits is 'int4'"),
        ({"axis": "head"}, "axis is 'head', wanted one of channel, token"),
        ({"group_size": 0}, "group_size is 0, wanted a whole number from 1 up"),
        ({"residual": -1}, "residual is -1"),
        ({"block": 0}, "block is 0"),
        ({"bits": 4, "axis": "channel", "group_size": 32, "block": 48}, "block 48 is not a multiple of group_size 32"),
        ({"bits": "fp8", "scale": 0.0}, "scale is 0.0"),
        ({"bits": "fp8", "scale": float("inf")}, "scale is inf"),
        ({"bits": "fp8", "scale": "1"}, "scale is '1'"),
    ],
)
def test_parts_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Part(**settings)


@pytest.mark.parametrize(
    ("x", "part", "error", "message"),
    [
        (torch.zeros(2, 3, 4), Part(4), ValueError, r"states has shape \[2, 3, 4\], wanted \[batch, heads, tokens, width\]"),
        (torch.zeros(1, 1, 4, 8, dtype=torch.int64), Part(4), TypeError, "states is torch.int64"),
        ([1.0], Part(4), TypeError, "states is list"),
        (torch.full((1, 1, 4, 8), math.nan), Part("fp8"), ValueError, "states holds NaN: 32 of 32"),
        (torch.full((1, 1, 4, 8), math.inf), Part("fp8"), ValueError, "states holds infinity"),
        (torch.zeros(1, 1, 4, 8), Part(4, "token", 3), ValueError, "group_size 3 does not divide the width 8"),
        (torch.zeros(1, 1, 5, 8), Part(4, "channel", 4), ValueError, "group_size 4 does not divide the 5 tokens"),
        (torch.zeros(1, 1, 4, 6), Part(3, "channel", 4), ValueError, "6 times 3 bits, which is not a whole number of bytes"),
        (torch.full((1, 1, 4, 8), 1e6), Part(4, "token", 8), ValueError, "states reach 1e\\+06, more than float16"),
        (torch.zeros(1, 1, 4, 8), Part(16), ValueError, "nothing to quantize"),
    ],
)
def test_states_that_cannot_be_quantized(x, part, error, message):
    with pytest.raises(error, match=message):
        kv.quantize(x, part)


GOOD = (2, 2, 3, 16)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((3, 2, 1, 16), (3, 2, 1, 16), r"keys has shape \[3, 2, 1, 16\], wanted batch, heads and width \[2, 2, 16\]"),
        ((2, 4, 1, 16), (2, 4, 1, 16), "keys has shape"),
        ((2, 2, 1, 16), (2, 2, 2, 16), "wanted the same batch, heads and tokens"),
        ((2, 2, 1, 16), (2, 2, 1, 8), "values has shape"),
        ((2, 2, 0, 16), (2, 2, 0, 16), "none of them 0"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_stored(keys, values, message):
    layer = QuantizedLayer(Scheme(Part(4, "token", 8), Part(4, "token", 8)))
    layer.update(states(*GOOD), states(*GOOD))
    before = layer.nbytes
    with pytest.raises(ValueError, match=message):
        layer.update(torch.ones(keys), torch.ones(values))
    assert layer.nbytes == before
    assert layer.get_seq_length() == 3


def test_a_cache_fed_out_of_order():
    model = tiny(torch.float32)
    one = (states(1, 2, 4, 16), states(1, 2, 4, 16))
    held = QuantizedCache(model, SCHEMES["int8"])
    with pytest.raises(ValueError, match="layer 1 is fed 4 tokens out of turn: it holds 0 tokens and layer 0 holds 0"):
        held.update(*one, 1)
    held.update(*one, 0)
    with pytest.raises(ValueError, match="layer 0 is fed 4 tokens out of turn: it holds 4 tokens and layer 2 holds 0"):
        held.update(*one, 0)
    with pytest.raises(ValueError, match="layer 2 is fed 4 tokens out of turn"):
        held.update(*one, 2)
    with pytest.raises(ValueError, match="layer_idx is 3, wanted one of the cache's 3 layers"):
        held.update(*one, 3)
    held.update(*one, 1)
    held.update(*one, 2)
    held.update(*one, 0)
    assert [layer.get_seq_length() for layer in held.layers] == [8, 4, 4]


def test_other_clear_refusals():
    with pytest.raises(ValueError, match="frequencies is None"):
        QuantizedLayer(Scheme(before_rope=True))
    with pytest.raises(ValueError, match="cannot be cropped"):
        QuantizedLayer(kv.FLOAT).crop(-1)
    model = tiny()
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask[0, 0, :, 0] = False  # as for a sequence whose first token is padding
    call = (torch.zeros(1, 4, 32, dtype=torch.float64), (torch.ones(1, 4, 16), torch.zeros(1, 4, 16)), mask)
    with cache.reading_back(model, kv.FLOAT), pytest.raises(ValueError, match="attention_mask is given"):
        models.blocks(model)[0].self_attn(*call)
    del model.model.rotary_emb
    with pytest.raises(models.ModelError, match="found no rotary embedding"):
        cache.frequencies_of(model)


# The factorial --------------------------------------------------------------------------------------------------------


def test_interaction_is_what_both_cost_beyond_the_sum():
    tokens = torch.tensor([10, 30, 5])
    draws = torch.randint(0, 3, (500, 3), generator=torch.Generator().manual_seed(0))
    neither = torch.tensor([20.0, 70.0, 9.0], dtype=torch.float64)
    losses = {"neither": neither, "weights": neither + 0.1 * tokens, "cache": neither * 1.02}
    together = cache.interaction(losses | {"both": losses["weights"] + losses["cache"] - neither}, tokens, draws)
    assert all(abs(value) <= 1e-12 for value in dataclasses.astuple(together))
    more = cache.interaction(losses | {"both": losses["weights"] + losses["cache"] - neither + 0.5 * tokens}, tokens, draws)
    assert all(math.isclose(value, 0.5) for value in dataclasses.astuple(more))
    uneven = torch.tensor([3.0, -9.0, 0.0], dtype=torch.float64)
    mixed = cache.interaction(losses | {"both": losses["weights"] + losses["cache"] - neither + uneven}, tokens, draws)
    assert math.isclose(mixed.change, -6 / 45)
    assert mixed.low < mixed.change < mixed.high


def test_the_sweep_reads_its_settings_as_schemes():
    for setting in sweep.SWEEPS["kv"](None):
        scheme = sweep.scheme_of(setting)
        assert scheme.keys.bits == setting["keys"]
        assert scheme.values.bits == setting["values"]
    assert set(inspect.signature(sweep.scheme_of).parameters) == {"setting"}


def test_the_rows_that_are_kept_meet_the_bars():
    measured = sweep.load("kv")
    alone = {"weights": None, "values": 16, "keys": 4, "before_rope": None}
    four = {axis: measured.find(planted="keys", key_axis=axis, **alone)["change"] for axis in kv.AXES}
    assert 0 < four["channel"] <= four["token"] / 2
    for row in (row for row in measured.rows if "bins" not in row):
        scheme, shape = sweep.scheme_of(row), Shape(6, 2, 64, 64)
        assert row["nbytes"] == kv.cache_bytes(shape, 512, 1, scheme)
        assert row["low"] <= row["change"] <= row["high"]
