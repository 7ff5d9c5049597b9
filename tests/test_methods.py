"""One record a method: what it says holds, and a method that is added by a record alone works everywhere."""

from __future__ import annotations

import pytest
import torch
import typer

from labsupport import quantize_model
from labsupport.checkpoint import CheckpointError, layouts
from labsupport.checkpoint.recipe import Recipe
from labsupport.cli import app
from labsupport.model import models
from labsupport.pipeline import methods
from labsupport.pipeline.block import Block
from labsupport.pipeline.linear import Quantized, replace_weight
from labsupport.pipeline.methods import METHODS, Method, Storage
from labsupport.quant import bnb_format, gguf_blocks, grid, nf4, rtn


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(1))


# What the records say ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_what_a_record_names_is_there_and_takes_the_settings_of_its_storage(name):
    method = METHODS[name]
    assert bool(method.settings) == (name not in gguf_blocks.WEIGHTS)  # imports it; a block of GGUF leaves nothing to choose
    if method.storage is not None:
        assert {*method.storage.settings, method.storage.group_setting} - {None} <= method.settings.keys()
        assert method.storage.bits is not None or "bits" in method.settings
        assert method.storage.layouts
        assert set(method.storage.layouts) <= set(layouts.LAYOUTS)
        sizes = method.storage.group_sizes
        assert sizes is None or method.storage.group_size in sizes


def test_nf4_is_stored_in_the_blocks_that_its_layout_has():
    assert METHODS["nf4"].storage.group_sizes == bnb_format.BLOCK_SIZES
    assert METHODS["nf4"].storage.group_size == nf4.BLOCK_SIZE


def test_a_setting_has_one_default_in_all_methods_that_are_stored():
    """Otherwise the command line could not tell what was asked for from what was not."""
    for storage in methods.stored_methods().values():
        for name, default in storage.settings.items():
            assert methods.stored_settings()[name] == default


@pytest.mark.parametrize("name", methods.stored_methods())
def test_the_defaults_of_the_command_are_those_of_quantize_model_but_for_these(name):
    """quantize_model does what the papers say, the command what was measured to be better."""
    others = {"nf4": {"double_quant"}, "gptq": {"act_order", "static_groups", "token_weights"}}
    method = METHODS[name]
    different = {key for key, default in method.storage.settings.items() if method.settings[key] != default}
    assert different == others.get(name, set())
    if method.storage.group_setting is not None:
        assert method.settings[method.storage.group_setting] == method.storage.group_size


def test_the_command_line_lists_the_methods_layouts_and_settings_of_the_records():
    options = {option.name: option for option in typer.main.get_command(app).commands["quantize"].params}
    assert options["method"].help == "rtn, nf4, gptq, awq, q8_0, q4_0, q4_1, q4_k."
    assert options["layout"].help.startswith("gptq, gptq_v2, awq, compressed-tensors, compressed-tensors-w8a8, gguf, bitsandbytes;")
    assert options["act_order"].help.startswith("gptq: ")
    assert options["calibration"].help.startswith("gptq, awq: ")
    for name, default in methods.stored_settings().items():
        assert options[name].default is None  # the record's, which the help names
        shown = {True: f"--{name}", False: "--"}[default] if isinstance(default, bool) else f"{default}"
        assert f"Default: {shown.replace('_', '-')}" in options[name].help
    assert "Default: --asymmetric." in options["symmetric"].help


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_that_a_method_does_not_take_is_refused_by_name(tiny, ids, method):
    given = {"calibration": ids} if METHODS[method].needs_text else {}
    with pytest.raises(ValueError, match=f"grop_size is given, but {method} takes "):
        quantize_model(tiny, method, grop_size=16, **given)
    with pytest.raises(ValueError, match=f"grop_size is given, but {method} takes "):
        quantize_model(tiny, method, overrides={"down_proj": {"grop_size": 16}}, **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "wanted one of them"),
        ({"quantize": rtn.quantize, "blocks": "a:b"}, "wanted one of them"),
        ({"quantize": rtn.quantize, "needs_text": True}, "a function of a weight alone is given no text"),
    ],
)
def test_a_record_that_contradicts_itself(arguments, message):
    with pytest.raises(ValueError, match=message):
        Method("odd", **arguments)


# A method more -------------------------------------------------------------------------------------------------------


def half_the_levels(weight: torch.Tensor, bits: int = 4, group_size: int | None = 128, shift: float = 0.0) -> grid.UniformTensor:
    """Made up: `shift` is added before rounding."""
    return rtn.quantize(weight + shift, bits, group_size)


TOY = Method(
    "toy",
    quantize=half_the_levels,
    storage=Storage(("awq", "gptq"), {"shift": 0.0}, bits=(3, 4), group_size=32, group_sizes=(32, 64)),
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", TOY)


def test_a_method_of_weights_is_one_record(toy, tiny):
    model, report = quantize_model(tiny, "toy", bits=3, group_size=16, shift=0.01, overrides={"o_proj": None})
    for name, layer in models.linears(tiny).items():
        wanted = layer.weight if name.endswith("o_proj") else rtn.quantize(layer.weight + 0.01, 3, 16).dequantize()
        assert torch.equal(model.get_submodule(name).weight, wanted), name
        assert (report.layers[name].bits_per_weight == 16) == name.endswith("o_proj")
    whole, _ = quantize_model(tiny, "toy", group_size="tensor")
    name, layer = next(iter(models.linears(tiny).items()))
    wanted = rtn.quantize(layer.weight.reshape(1, -1), 4, None).dequantize().view_as(layer.weight)
    assert torch.equal(whole.get_submodule(name).weight, wanted)
    with pytest.raises(ValueError, match="toy looks at no text"):
        quantize_model(tiny, "toy", calibration=torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="wanted one of rtn, nf4, int8-weights, int8, gptq, awq, q8_0, q4_0, q4_1, q4_k, toy"):
        quantize_model(tiny, "toi")


def test_a_recipe_follows_the_record(toy, tiny):
    recipe = Recipe.of("toy", shift=0.5)
    assert (recipe.layout, recipe.group_size, recipe.bits) == ("awq", 32, 4)
    assert recipe.settings() == {"bits": 4, "group_size": 32, "shift": 0.5}
    recipe.for_model(models.linears(tiny))
    for arguments, message in (
        ({"layout": "gptq_v2"}, "format is 'gptq_v2', toy is stored as awq, gptq"),
        ({"bits": 8}, "bits is 8, toy has 3, 4"),
        ({"group_size": 16}, "group_size is 16, toy has blocks of 32, 64"),
        ({"group_size": -1}, "group_size is -1, toy has blocks of 32, 64"),
        ({"act_order": True}, "act_order is given, but toy has no such choice"),
        ({"grop_size": 32}, "grop_size is given, but toy has no such choice"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Recipe.of("toy", **arguments)
    with pytest.raises(CheckpointError, match="shift is given, but rtn has no such choice"):
        Recipe.of("rtn", shift=0.5)
    with pytest.raises(CheckpointError, match="method is 'int8', wanted one of rtn, nf4, gptq, awq, q8_0, q4_0, q4_1, q4_k, toy"):
        Recipe.of("int8")
    with pytest.raises(CheckpointError, match="group_size 64 does not divide in_features 32"):
        Recipe.of("toy", group_size=64).for_model(models.linears(tiny))


def test_a_linear_that_two_blocks_share_is_quantized_once(tiny, monkeypatch):
    weights = []

    def counted(weight, bits=4):
        weights.append(weight)
        return rtn.quantize(weight, bits, None)

    monkeypatch.setitem(METHODS, "counted", Method("counted", quantize=counted))
    model = models.duplicate(tiny)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    _, report = quantize_model(model, "counted")
    assert report.layers.keys() == models.linears(model).keys()
    assert len(weights) == len(report.layers) == 3 * 7 - 3


class FirstToken:
    """Made up: rounds at what the first token of the text says, so that it needs text."""

    SETTINGS = {"bits": 4}

    def __init__(self, model):
        if not hasattr(model, "model"):
            raise ValueError("not this model")
        self.seen: list[list[str]] = []

    def __call__(self, block: Block, settings) -> dict[str, Quantized]:
        self.seen.append(list(block.linears))
        shift = block.inputs[0][0, 0, 0].item()

        def quantize(weight, chosen):
            return rtn.quantize(weight + shift, group_size=None, **chosen)

        return {name: replace_weight(name, layer.weight, settings[name], quantize) for name, layer in block.linears.items()}


def test_a_method_of_blocks_is_one_record_and_can_be_kept(tiny, ids, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "first", Method("first", blocks=FirstToken, needs_text=True))
    model, report = quantize_model(tiny, "first", calibration=ids, bits=3)
    again, _ = quantize_model(tiny, "first", calibration=ids, bits=3, keep=tmp_path / "run")
    assert report.layers.keys() == models.linears(tiny).keys()
    name = next(iter(models.linears(tiny)))
    shift = tiny.get_input_embeddings()(ids)[0, 0, 0].item()
    wanted = rtn.quantize(models.linears(tiny)[name].weight + shift, 3, None).dequantize()
    assert torch.equal(model.get_submodule(name).weight, wanted)
    monkeypatch.setattr(FirstToken, "__call__", lambda *_: pytest.fail("a finished block was quantized again"))
    resumed, _ = quantize_model(tiny, "first", calibration=ids, bits=3, keep=tmp_path / "run")
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
        assert torch.equal(resumed.state_dict()[key], value)
    with pytest.raises(CheckpointError, match="method is 'first', wanted one of"):
        Recipe.of("first")
