"""Which group size is taken where none is named, and what the error says where one that is named does not fit."""

import re

import pytest
import torch
from typer.testing import CliRunner

from labsupport.checkpoint.recipe import Recipe
from labsupport.checkpoint.weights import CheckpointError
from labsupport.cli import app
from labsupport.model import models
from labsupport.pipeline.methods import METHODS, Method
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant import grid, kv, rtn


def llama(width: int, inner: int):
    """A Llama of one block and random weights: q, k, v, gate and up read `width` numbers, down_proj reads `inner`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


FITTING = [(256, 768, 128), (576, 1536, 64), (960, 2560, 64), (160, 320, 32), (96, 192, 32), (128, 96, 32)]


@pytest.mark.parametrize(("width", "inner", "wanted"), FITTING)
def test_the_largest_that_divides_every_linear_is_taken(width, inner, wanted):
    model = llama(width, inner)
    assert models.group_size(model) == grid.largest_group_size([width, inner]) == wanted
    stored = {}
    _, report = quantize_model(model, "rtn", stored=stored)
    assert report.group_size == wanted
    assert {tensor.group_size for tensor in stored.values()} == {wanted}
    recipe = Recipe.of("rtn").for_model(models.linears(model))
    assert recipe.group_size == wanted
    assert (
        recipe.why
        == f"the largest of 128, 64, 32 that divides the inputs of every linear, {min(width, inner)} and {max(width, inner)}"
    )


def test_a_smaller_size_can_be_wanted():
    assert grid.largest_group_size([256], 64) == 64
    assert grid.largest_group_size([256], 32) == 32
    assert grid.largest_group_size([48], 16) == 16


@pytest.mark.parametrize("named", [32, 64, None, "tensor"])
def test_a_size_that_is_named_is_taken_as_it_is(named):
    stored = {}
    _, report = quantize_model(llama(256, 768), "rtn", group_size=named, stored=stored)
    assert report.group_size is None
    wanted = {None: {256, 768}, "tensor": {256 * 768, 256 * 256}}.get(named, {named})
    assert {tensor.group_size for tensor in stored.values()} == wanted
    if named != "tensor":
        recipe = Recipe.of("rtn", group_size=named or -1)
        assert recipe.for_model(models.linears(llama(256, 768))) == recipe


def test_linears_with_a_size_of_their_own_or_left_as_they_are_have_no_say():
    model = llama(256, 96)
    _, report = quantize_model(model, "rtn", overrides={"down_proj": {"group_size": 32}})
    assert report.group_size == 128
    _, report = quantize_model(model, "rtn", overrides={"down_proj": None})
    assert report.group_size == 128


def test_where_none_divides_a_size_has_to_be_named():
    model = llama(72, 144)
    message = (
        "group_size is not given, and none of 128, 64, 32 divides in_features 72, 144: name another, the largest that does is 72"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}, or take whole rows$"):
        quantize_model(model)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Recipe.of("rtn", layout="awq").for_model(models.linears(model))
    quantize_model(model, group_size=72)
    assert Recipe.of("rtn", layout="awq", group_size=-1).for_model(models.linears(model)).group_size is None


DIVIDING = [
    (576, 128, "64, 32, 16 do, and None takes the whole row"),
    (960, 128, "64, 32, 16 do, and None takes the whole row"),
    (768, 512, "256, 128, 64, 32, 16 do, and None takes the whole row"),
    (48, 32, "16 does, and None takes the whole row"),
    (72, 64, "none of 256, 128, 64, 32, 16 does, and None takes the whole row"),
]


@pytest.mark.parametrize(("columns", "named", "wanted"), DIVIDING)
def test_an_error_names_the_sizes_that_do_divide(columns, named, wanted):
    message = f"^group_size {named} does not divide in_features {columns}: {re.escape(wanted)}$"
    with pytest.raises(ValueError, match=message):
        rtn.quantize(torch.ones(2, columns), 4, named)


def test_the_width_of_a_head_is_named_so_as_well():
    with pytest.raises(
        ValueError, match="group_size 64 does not divide the width 96 of keys: 32, 16 do, and 96 takes the whole row"
    ):
        kv.check_width(96, kv.Part(4, "token", 64), "keys")


def test_a_size_that_does_not_fit_is_refused_before_any_work(monkeypatch):
    """The first linears would fit: 256 divides their inputs. The last, with 576, would not."""
    called = []

    def counted(weight, bits=4, group_size=128):
        called.append(weight)
        return rtn.quantize(weight, bits, group_size)

    monkeypatch.setitem(METHODS, "counted", Method("counted", quantize=counted))
    model = llama(256, 576)
    whole = "in_features 576 of model.layers.0.mlp.down_proj: in all linears 64, 32, 16 do, and {} takes the whole row"
    with pytest.raises(ValueError, match=f"^group_size 256 does not divide {whole.format('None')}$"):
        quantize_model(model, "counted", group_size=256)
    with pytest.raises(ValueError, match=f"^group_size 128 does not divide {whole.format('None')}$"):
        quantize_model(model, "counted", group_size=64, overrides={"down_proj": {"group_size": 128}})
    assert not called
    with pytest.raises(CheckpointError, match=f"^group_size 128 does not divide {whole.format('-1')}$"):
        Recipe.of("gptq", group_size=128).for_model(models.linears(model))


def test_blocks_of_nf4_keep_their_size():
    assert Recipe.of("nf4").for_model(models.linears(llama(72, 144))).group_size == 64
    _, report = quantize_model(llama(72, 144), "nf4")
    assert report.group_size is None


def test_what_was_chosen_stands_in_the_output_and_in_the_card(tmp_path):
    llama(576, 1536).save_pretrained(tmp_path / "model")
    why = "the largest of 128, 64, 32 that divides the inputs of every linear, 576 and 1536"
    arguments = ["quantize", str(tmp_path / "model"), "--method", "rtn", "--windows", "0", "--out"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "chosen")])
    assert done.exit_code == 0, done.output
    assert f"labs quantize: groups of 64 weights: {why}" in done.output
    assert f"| group size | 64 ({why}) |" in (tmp_path / "chosen" / "README.md").read_text("utf-8")
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "named"), "--group-size", "32"])
    assert "groups of" not in done.output
    assert "| group size | 32 |" in (tmp_path / "named" / "README.md").read_text("utf-8")
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "wrong"), "--group-size", "128"])
    assert done.exit_code == 1
    assert "in all linears 64, 32, 16 do, and -1 takes the whole row" in done.output
    assert not (tmp_path / "wrong").exists()
