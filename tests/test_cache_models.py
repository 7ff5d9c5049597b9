"""The cache in models of other architectures: what is replaced gives the model's own logits, or is refused in words."""

import pytest
import torch
from architectures import EVERY, VOCABULARY, make

from labsupport.model.models import ModelError
from labsupport.pipeline import attention, cache
from labsupport.quant import kv
from labsupport.quant.kv import Part, Scheme

# Their attention has no name that could be replaced: it adds a bias, or masks by itself.
OWN_ATTENTION = {"gpt-j", "gpt-neo", "bloom", "falcon"}
# Keys that kv.rotate does not turn back: rotary embeddings of a part of a head, of other pairs, of two kinds, or none.
NOT_TURNED_BACK = OWN_ATTENTION | {
    "phi", "gpt-neox", "stablelm", "glm4", "cohere", "gemma3", "opt", "opt-350m", "gpt2", "bigcode"
}  # fmt: skip
IDS = torch.arange(2 * 40).view(2, 40) * 37 % VOCABULARY
FLOAT32 = 1e-5  # of the logits' size: sums in another order, some units in the last place for each layer
BEFORE_ROPE = Scheme(Part(8, "token", 2), Part(8, "token", 2), before_rope=True)


def off(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_nothing_quantized_is_the_model_itself(name):
    model = make(name)
    want = model(IDS, use_cache=False).logits
    held = cache.QuantizedCache(model, kv.FLOAT)
    parts = [model(part, past_key_values=held).logits for part in IDS.split([31, 1, 1, 7], 1)]
    assert off(torch.cat(parts, 1), want) < FLOAT32
    assert held.nbytes == kv.cache_bytes(kv.Shape.of(model.config), 40, 2, kv.FLOAT, float_bytes=4)
    before = model.config._attn_implementation
    if name in OWN_ATTENTION:
        with pytest.raises(ModelError, match="cannot be replaced: 0 of its 2 layers"), cache.reading_back(model, kv.FLOAT):
            pass
    else:
        with cache.reading_back(model, kv.FLOAT):
            assert off(model(IDS, use_cache=False).logits, want) < FLOAT32
    assert model.config._attn_implementation == before
    assert torch.equal(model(IDS, use_cache=False).logits, want)


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_keys_before_the_rotary_embedding_or_a_refusal(name):
    model = make(name)
    if name in NOT_TURNED_BACK:
        with pytest.raises(ModelError, match=r"rotary embedding|cannot be replaced|cannot be read"):
            cache.QuantizedCache(model, BEFORE_ROPE)
        with pytest.raises(ModelError), cache.reading_back(model, BEFORE_ROPE):
            pass
        return
    held = cache.QuantizedCache(model, BEFORE_ROPE)
    decoded = torch.cat([model(part, past_key_values=held).logits for part in IDS.split([31, 1, 1, 7], 1)], 1)
    with cache.reading_back(model, BEFORE_ROPE):
        assert off(model(IDS, use_cache=False).logits, decoded) < 1e-3  # a tie of 8 bits may fall either way
    assert off(decoded, model(IDS, use_cache=False).logits) < 0.1


@torch.no_grad()
def test_a_window_that_is_lost_is_noticed(monkeypatch):
    """Break what the check guards: with a mask that hides nothing, a sliding window is refused."""
    model = make("mistral")
    monkeypatch.setattr(attention, "seen_through", lambda mask: torch.ones_like(mask, dtype=torch.bool))
    with pytest.raises(ModelError, match="does more than the one that replaces it"), cache.reading_back(model, kv.FLOAT):
        pass


@torch.no_grad()
def test_padding_is_refused():
    model = make("llama")
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    with cache.reading_back(model, kv.FLOAT), pytest.raises(ValueError, match="not padded"):
        model(IDS, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize(("name", "heads"), [("falcon", 1), ("bigcode", 1), ("llama", 2), ("gpt2", 4)])
def test_heads_of_the_cache(name, heads):
    assert kv.Shape.of(make(name).config).heads == heads


def test_shape_of_a_config_that_holds_another():
    from transformers import AutoConfig

    text = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    assert kv.Shape.of(AutoConfig.for_model("gemma3", text_config=text)) == kv.Shape(3, 2, 16, 16)


def test_a_model_without_a_rotary_embedding_says_so_and_goes_on(capsys):
    """OPT learns its positions: notebook 09 shows its keys as they are."""
    llama = make("llama")
    assert torch.equal(cache.rotation_of(llama), cache.frequencies_of(llama))
    assert not capsys.readouterr().out
    assert cache.rotation_of(make("opt")) is None
    wanted = "There are no keys before RoPE to look at: found no rotary embedding in a OPTForCausalLM, wanted one.\n"
    assert capsys.readouterr().out == wanted
