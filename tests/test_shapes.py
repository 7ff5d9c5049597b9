"""Sizes of models from their configs, beside the models that transformers builds of the same configs, and their caches."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labsupport.evidence import planner, tables
from labsupport.evidence.configs import FAMILIES, shape_of
from labsupport.evidence.planner import SHAPES

ONE_OF_EACH = {row.config["model_type"]: row for row in reversed(tables.architectures().values())}


def config_of(values):
    """The config of transformers for a language model with these values; token ids that tiny vocabularies lack are left out."""
    from transformers import CONFIG_MAPPING

    values = dict(values.get("text_config", values))
    values.pop("quantization_config", None)
    return CONFIG_MAPPING[values.pop("model_type")](**values, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def built(values):
    """The model without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(values))


def counted(model):
    """All parameters of a model, and those of the linears inside its blocks: matrices that are no router, no bias and no table."""
    names = dict(model.named_parameters())
    inside = {
        name: p.numel() for name, p in names.items()
        if p.ndim >= 2 and any(part in name for part in (".layers.", ".h."))
        and not name.endswith(("bias", "mlp.gate.weight", "router.weight"))
    }  # fmt: skip
    return sum(p.numel() for p in names.values()), sum(inside.values())


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_model_of_the_table_is_the_one_that_transformers_builds(kind):
    row = ONE_OF_EACH[kind]
    assert (row.shape.parameters, row.shape.linear_parameters) == counted(built(row.config))


def test_every_family_but_granite_has_a_model_in_the_table():
    """Granite is a Llama, and is among the random shapes."""
    assert ONE_OF_EACH.keys() == FAMILIES.keys() - {"granite"} | {"gemma3"}
    assert len(tables.architectures()) >= 20
    assert all(shape == replace(tables.architectures()[shape.name].shape, head_width=None, small=None) for shape in SHAPES)


@st.composite
def configs(draw, kinds=tuple(FAMILIES)):
    """A small config of any family, with whatever makes its sizes differ."""
    kind, small = draw(st.sampled_from(kinds)), st.integers(1, 4)
    kv_heads, shared, width = draw(small), draw(small), 2 * draw(st.integers(2, 9))
    values = {
        "model_type": kind, "num_hidden_layers": draw(st.integers(1, 7)), "num_attention_heads": kv_heads * shared,
        "num_key_value_heads": kv_heads, "hidden_size": kv_heads * shared * width, "intermediate_size": draw(st.integers(3, 40)),
        "vocab_size": draw(st.integers(9, 99)),
    }  # fmt: skip
    if kind not in ("opt", "falcon"):
        values |= {"tie_word_embeddings": draw(st.booleans())}
    if kind in ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss"):
        values |= {"head_dim": 2 * draw(st.integers(2, 9))}
    if kind in ("llama", "smollm3", "granite", "qwen3", "qwen3_moe"):
        values |= {"attention_bias": draw(st.booleans())}
    if kind in ("llama", "smollm3", "granite"):
        values |= {"mlp_bias": draw(st.booleans())}
    if kind in ("mistral", "phi3", "mixtral", "gemma2", "gemma3_text", "gpt_oss"):
        values |= {"sliding_window": draw(st.integers(2, 12))}
    if kind in ("qwen2", "qwen3"):
        layers = draw(st.integers(0, 7))
        values |= {
            "sliding_window": draw(st.integers(2, 12)),
            "use_sliding_window": draw(st.booleans()),
            "max_window_layers": layers,
        }
    if kind in ("mixtral", "gpt_oss", "qwen3_moe", "deepseek_v2", "deepseek_v3"):  # grouped products want rows of 16 bytes
        heads = values["num_attention_heads"]
        values |= {
            name: 8 * heads * draw(st.integers(1, 3)) for name in ("hidden_size", "intermediate_size", "moe_intermediate_size")
        }
    if kind in ("mixtral", "gpt_oss"):
        values |= {"num_local_experts": draw(st.integers(2, 5)), "num_experts_per_tok": 2}
    if kind == "qwen3_moe":
        values |= {
            "num_experts": draw(st.integers(2, 5)), "num_experts_per_tok": 2,
            "decoder_sparse_step": draw(st.integers(1, 3)), "mlp_only_layers": draw(st.lists(st.integers(0, 6), max_size=2)),
        }  # fmt: skip
    if kind in ("deepseek_v2", "deepseek_v3"):
        values |= {
            "num_key_value_heads": values["num_attention_heads"], "kv_lora_rank": 4 * draw(small),
            "q_lora_rank": draw(st.none() | st.integers(3, 20)), "qk_rope_head_dim": 2 * draw(small),
            "qk_nope_head_dim": 4 * draw(small), "v_head_dim": 4 * draw(small),
            "n_routed_experts": 4 * draw(st.integers(1, 2)), "n_shared_experts": draw(st.integers(1, 3)), "num_experts_per_tok": 2,
            "first_k_dense_replace": draw(st.integers(0, 3)), "n_group": 1,
            "topk_group": 1,
        }  # fmt: skip
    if kind == "falcon":
        new = draw(st.booleans())
        values |= {"new_decoder_architecture": new, "multi_query": draw(st.booleans()), "parallel_attn": True, "bias": False}
        values["num_kv_heads"] = values.pop("num_key_value_heads")
        values["ffn_hidden_size"] = 4 * values["hidden_size"]
        del values["intermediate_size"]
    if kind == "opt":
        values |= {"ffn_dim": values.pop("intermediate_size"), "word_embed_proj_dim": values["hidden_size"]}
        values |= {"max_position_embeddings": draw(st.integers(60, 90)), "num_key_value_heads": values["num_attention_heads"]}
    return values


@given(values=configs())
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_any_shape_has_the_weights_that_transformers_builds(values):
    shape = shape_of(values, "any")
    assert (shape.parameters, shape.linear_parameters) == counted(built(values)), values
    assert (
        shape_of(config_of(values), "any").parameters == shape_of(SimpleNamespace(**values), "any").parameters == shape.parameters
    )


@given(values=configs(), tokens=st.integers(1, 20), batch=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_any_cache_has_the_bytes_of_transformers_cache(values, tokens, batch):
    """Of a layer with a window transformers drops, as soon as it may, the token that the next step no longer sees."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_config(config_of(values)).eval()
    held = DynamicCache(config=model.config)
    model(torch.arange(batch * tokens).view(batch, tokens) % 9, past_key_values=held, use_cache=True)
    layers = [layer for layer in held.layers if layer.is_initialized]
    shape = shape_of(values, "any")
    shape = replace(shape, windows=tuple(window and window - 1 for window in shape.windows))
    # A window of 0 sees everything: windows of 1, of which nothing is kept, are not drawn.
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) == planner.cache_bytes(shape, tokens, batch, 32), values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba', whose sizes are not known here; known are llama"),
        ({"hidden_size": None}, "hidden_size is None in the config"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"intermediate_size": True}, "intermediate_size is True"),
        ({"sliding_window": 4, "layer_types": ["full_attention"]}, "layer_types has 1 entries, wanted one for each of 32 layers"),
    ],
)
def test_a_config_that_is_none_is_refused(changes, message, tmp_path):
    config = dict(tables.architectures()["Mistral-7B-v0.1"].config) | changes
    with pytest.raises(ValueError, match=message):
        shape_of(config, "x")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        tables.model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\xff"])
def test_a_file_that_is_no_config_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=r"cannot be read|holds no config"):
        tables.model(str(tmp_path / "config.json"))


def test_a_directory_and_a_name_give_the_same_shape(tmp_path):
    row = tables.architectures()["Qwen3-30B-A3B"]
    (tmp_path / "config.json").write_text(json.dumps(dict(row.config)))
    assert replace(tables.model(tmp_path), name=row.name) == row.shape
    for name in ("qwen3 30b a3b", "Qwen/Qwen3-30B-A3B", "QWEN3-30B-A3B-Instruct", "30b-a3b"):
        assert tables.model(name) == row.shape
