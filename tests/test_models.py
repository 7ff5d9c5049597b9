"""The course model and models of one's own: loading, errors, planted outliers."""

import json
import math
import shutil

import architectures
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from labsupport.model import evaluate, models


def test_is_a_plain_llama_directory_that_old_and_new_libraries_read():
    directory = models.course_model_dir()
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    # transformers before 5 reads rope_theta, later ones rope_parameters; a reader that finds neither falls back silently.
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    for key in ("hidden_size", "intermediate_size", "vocab_size"):
        assert config[key] % 128 == 0, key
    assert config["num_key_value_heads"] * config["head_dim"] % 128 == 0
    assert json.loads((directory / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in set(file.keys())
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.float16}  # noqa: SIM118, not a dict
    assert sum(p.stat().st_size for p in directory.iterdir()) <= 40e6
    assert not [p for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


def test_card_holds_the_figures_that_a_reader_needs():
    card = (models.course_model_dir() / "README.md").read_text()
    for word in ("## Data", "## Recipe", "## Held-out figures", "loss.png", "bits a byte"):
        assert word in card
    training = json.loads((models.course_model_dir() / "training.json").read_text())
    assert training["recipe"]["seed"] == 0
    assert len(training["losses"]) > 10


@pytest.mark.slow
def test_course_model_meets_its_bars(course, held_out):
    """At most 1.2 bits a byte on held-out code, on the text of whatever Python runs this."""
    result = evaluate.evaluate(course[0], held_out, windows=32)
    # 32 of some 500 windows: one standard error of the mean is about 2 %, and three of them are allowed.
    assert result.bits_per_byte <= 1.2 * 1.06


def test_weights_are_read_as_they_are_stored(course):
    plain = AutoModelForCausalLM.from_pretrained(models.course_model_dir(), dtype=torch.float32)
    ids = torch.arange(40)[None] + 300
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, course[0](ids).logits)
    assert next(course[0].parameters()).dtype == torch.float32


def test_a_small_model_is_float32_on_every_device(monkeypatch):
    """The meta device stands for a GPU: it is not the CPU, and every machine has it."""

    def loaded(**arguments):
        return next(models.load_model(str(models.course_model_dir()), device="meta", **arguments)[0].parameters())

    assert (loaded().device.type, loaded().dtype) == ("meta", torch.float32)
    assert loaded(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert loaded(dtype="auto").dtype == torch.float16
    monkeypatch.setattr(models, "SMALL", 10**6)
    assert loaded().dtype == torch.float16  # as it is stored


def test_text_survives_the_tokenizer(course):
    sample = "def f(x):\n    return x**2  # \u00e9\u4e2d\n"
    tokenizer = AutoTokenizer.from_pretrained(models.course_model_dir())
    assert tokenizer.decode(course[1](sample)["input_ids"]) == sample


def test_blocks_and_linears(course):
    model = course[0]
    assert len(models.blocks(model)) == model.config.num_hidden_layers
    names = list(models.linears(model))
    assert len(names) == 7 * model.config.num_hidden_layers
    assert not any("lm_head" in n or "embed" in n for n in names)
    assert sum(models.role(n) == "attention" for n in names) == 4 * model.config.num_hidden_layers


@pytest.mark.slow
def test_planted_outliers_leave_the_float_function_unchanged(course, held_out):
    model = course[0]
    planted = models.plant_outliers(model)
    index = held_out.positions(128, 4)
    with torch.no_grad():
        before, after = model(held_out.ids[index]).logits, planted(held_out.ids[index]).logits
    # Each norm's output and each column is scaled and unscaled once in float32: relative 2**-23 a product, grown over 6 blocks.
    assert (after - before).abs().max() <= 1e-4 * before.std()
    assert not torch.equal(before, after)
    norm = models.blocks(planted)[0].input_layernorm.weight
    ratio = (norm / models.blocks(model)[0].input_layernorm.weight).abs()
    assert ratio.max() > 8
    assert math.isclose(ratio.log().median().item(), 0, abs_tol=0.2)
    # The original is untouched, and the same seed plants the same.
    again = models.plant_outliers(model)
    assert torch.equal(models.blocks(again)[3].mlp.up_proj.weight, models.blocks(planted)[3].mlp.up_proj.weight)
    assert not torch.equal(models.blocks(model)[3].mlp.up_proj.weight, models.blocks(planted)[3].mlp.up_proj.weight)


def test_planted_outliers_want_llama_blocks():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64))
    with pytest.raises(models.ModelError, match="Llama-shaped blocks and in OPT's, not in GPT2Block"):
        models.plant_outliers(model)


def test_labs_model_names_another_model(tmp_path, monkeypatch, course):
    """What a hub id would bring is a directory like this one."""
    config = course[0].config.__class__(**course[0].config.to_dict() | {"num_hidden_layers": 1})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    course[1].save_pretrained(tmp_path)
    monkeypatch.setenv("LABS_MODEL", str(tmp_path))
    model, tokenizer = models.load_model()
    assert len(models.blocks(model)) == 1
    assert tokenizer.eos_token_id == 0


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(models.course_model_dir(), tmp_path / "model")


def test_directory_without_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(models.ModelError, match=r"holds no weights: wanted model.safetensors"):
        models.load_model(str(copy))


def test_directory_without_model(tmp_path):
    with pytest.raises(models.ModelError, match=r"holds no model: config.json is missing"):
        models.load_model(str(tmp_path))


@pytest.mark.parametrize("keep", [4, 1000, 0.9])
def test_damaged_weights(copy, keep):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(models.ModelError, match=r"weights of .* are damaged"):
        models.load_model(str(copy))


def test_unknown_name(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(models.ModelError, match="no model 'nobody/no-such-model'"):
        models.load_model("nobody/no-such-model")


@pytest.mark.parametrize("name", ["qwen3", "opt"])
def test_outliers_are_planted_in_other_shapes_too(name):
    """Qwen3 normalizes its keys after the projection; OPT's norms have biases, and its positions are learned."""
    model = architectures.make(name)
    ids = torch.arange(2 * 24).view(2, 24) * 37 % architectures.VOCABULARY
    for plant in (models.plant_outliers, models.plant_key_outliers):
        planted = plant(model)
        with torch.no_grad():
            before, after = model(ids).logits, planted(ids).logits
        # As in the test above: rounding of float32 alone, over two blocks.
        assert (after - before).abs().max() <= 1e-4 * before.std()
        changed = [n for (n, p), q in zip(model.named_parameters(), planted.parameters(), strict=True) if not torch.equal(p, q)]
        assert len({n.split(".layers.")[1][0] for n in changed}) == 2, f"{plant.__name__} changed {changed}"


@pytest.mark.parametrize("name", ["gemma2", "opt-350m"])
def test_outliers_are_not_planted_where_no_norm_stands_before_the_linears(name):
    with pytest.raises(models.ModelError, match="Llama-shaped blocks and in OPT's"):
        models.plant_outliers(architectures.make(name))


def test_keys_whose_other_pairs_are_turned_are_refused():
    with pytest.raises(models.ModelError, match=r"does not turn the channels i and i \+ head_dim / 2"):
        models.plant_key_outliers(architectures.make("phi"))


def test_a_short_name_begins_with_the_block():
    assert models.short("model.layers.3.mlp.up_proj") == "3.mlp.up_proj"
    assert models.short("model.decoder.layers.11.fc1") == "11.fc1"
    assert models.short("lm_head") == "lm_head"


def test_first_blocks_is_the_model_without_the_later_ones(course):
    model, ids = course[0], torch.arange(12)[None]
    short = models.first_blocks(model, 2)
    wanted = models.duplicate(model)
    del models.blocks(wanted)[2:]
    wanted.config.num_hidden_layers = 2
    assert torch.equal(short(ids).logits, wanted(ids).logits)
    assert not torch.equal(short(ids).logits, model(ids).logits)
    assert len(models.blocks(short)) == 2
    next(short.parameters()).data.zero_()  # nothing is shared
    assert next(model.parameters()).count_nonzero() > 0
    with pytest.raises(ValueError, match="count is 0, wanted a whole number from 1 to 6"):
        models.first_blocks(model, 0)
