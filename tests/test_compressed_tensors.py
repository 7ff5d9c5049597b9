"""compressed-tensors: linears as the library itself packs them (interop/golden), directories that read back, faults found."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from interop import compressed
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from labsupport import checkpoint, quantize_model
from labsupport.checkpoint import CheckpointError, compressed_tensors
from labsupport.checkpoint.compressed_tensors import INT8, PACKED
from labsupport.model import models
from labsupport.quant import gptq, int8, rtn

GOLDEN = load_file(compressed.PATH)
CASES = compressed.CASES


def golden(name):
    """The tensors that the library stored for the linear."""
    found = {key.removeprefix(f"{name}/"): tensor for key, tensor in GOLDEN.items() if key.startswith(f"{name}/")}
    return {part: tensor for part, tensor in found.items() if part not in ("decompressed", "rounded")}


# One linear, beside the library --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_what_the_library_packs_is_read_and_written_again(name):
    layout, settings = compressed_tensors.settings_of(CASES[name].config)
    assert layout == (INT8 if CASES[name].activations else PACKED)
    assert settings == {"bits": CASES[name].bits, "group_size": CASES[name].group_size, "symmetric": CASES[name].symmetric}
    tensor = compressed_tensors.read(layout, golden(name), settings["bits"], settings["symmetric"])
    # The library multiplies in float16: code - zero_point is exact there, the product is rounded once.
    assert torch.equal(tensor.dequantize().half(), GOLDEN[f"{name}/decompressed"])
    again = compressed_tensors.write(layout, tensor)
    assert again.keys() == golden(name).keys()
    for part, stored in golden(name).items():
        assert torch.equal(again[part], stored), part
        assert again[part].dtype == stored.dtype, part


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.symmetric])
def test_symmetric_grids_are_the_librarys_own(name):
    """absmax over 7.5 or 127.5 steps. A code can be one off where a weight lies between two levels, to float32's rounding."""
    case = CASES[name]
    mine = rtn.quantize(GOLDEN["weight"], case.bits, case.group_size, symmetric=True)
    theirs = compressed_tensors.read(INT8 if case.activations else PACKED, golden(name), case.bits, True)
    step = theirs.scale.float().repeat_interleave(theirs.group_size, 1)
    assert (
        (mine.scale.float() - theirs.scale.float()).abs() <= theirs.scale.float() * 2**-10
    ).all()  # theirs is divided in float16
    assert ((mine.dequantize() - theirs.dequantize()).abs() <= step * (1 + 2 ** (case.bits - 11))).all()


def test_tokens_are_rounded_as_the_library_rounds_them():
    rounded = int8.round_tokens(GOLDEN["tokens"])
    assert torch.equal(rounded, GOLDEN["w8a8/rounded"])
    assert (rounded[0, 2] == 0).all()
    assert len((rounded[1, 0] / rounded[1, 0].abs().max()).unique()) > 32
    layer = nn.Linear(64, 3)
    layer.register_forward_pre_hook(int8.round_inputs)
    assert torch.equal(layer(GOLDEN["tokens"]), nn.functional.linear(rounded, layer.weight, layer.bias))


def test_what_the_layouts_do_not_have_is_refused():
    weight = torch.randn(16, 64)
    scattered = gptq.quantize(weight, torch.diag(torch.rand(64) + 1), 4, 32, symmetric=True, act_order=True)
    for layout, tensor, message in (
        (PACKED, scattered, "use static groups"),
        (INT8, rtn.quantize(weight, 8, 32, True), "one symmetric grid of 8 bits for each output"),
        (INT8, rtn.quantize(weight, 8, None), "one symmetric grid of 8 bits for each output"),
        (INT8, rtn.quantize(weight, 4, None, True), "one symmetric grid of 8 bits for each output"),
    ):
        with pytest.raises(ValueError, match=message):
            compressed_tensors.write(layout, tensor)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("w4", {"weight_scale": None}, "the layer lacks weight_scale"),
        ("w4-asym", {"weight_zero_point": None}, "the layer lacks weight_zero_point"),
        ("w4", {"weight_zero_point": torch.zeros(2, 2, dtype=torch.int32)}, "config.json says symmetric"),
        ("w4", {"weight_shape": torch.tensor([64, 16])}, r"weight_shape is \[64, 16\], weight_packed holds \[16, 64\]"),
        ("w4", {"weight_packed": torch.zeros(16, 8)}, "weight_packed"),
        ("w4", {"weight_scale": torch.full((16, 2), torch.inf)}, "not finite numbers above 0"),
        ("w4", {"weight_scale": torch.ones(16, 3)}, "wanted 16 outputs, and groups that divide 64 inputs"),
        ("w4-asym", {"weight_zero_point": torch.zeros(3, 2, dtype=torch.int32)}, r"weight_zero_point has shape \[3, 2\]"),
        ("w8a8", {"weight": torch.zeros(16, 64)}, "weight"),
    ],
)
def test_a_linear_that_cannot_be_read_says_why(name, change, message):
    case = CASES[name]
    state = {part: tensor for part, tensor in (golden(name) | change).items() if tensor is not None}
    with pytest.raises((ValueError, TypeError), match=message):
        compressed_tensors.read(INT8 if case.activations else PACKED, state, case.bits, case.symmetric)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "marlin-24"}, "format is 'marlin-24'"),
        ({"config_groups": {}}, "config_groups holds 0 groups, wanted one"),
        ({"config_groups": {"a": {"targets": ["Linear"]}}}, "has no weights"),
        ({"weights": {"num_bits": 3}}, "num_bits 3, wanted int and 4 or 8"),
        ({"weights": {"type": "float"}}, "type 'float'"),
        ({"weights": {"strategy": "block"}}, "strategy is 'block'"),
        ({"weights": {"group_size": "32"}}, "group_size '32'"),
        ({"weights": {"symmetric": "yes"}}, "symmetric is 'yes'"),
        ({"input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True}}, "input_activations is .*, wanted none"),
    ],
)
def test_a_config_that_is_not_read_is_named(tmp_path, change, message):
    config = CASES["w4"].config
    group = config["config_groups"]["group_0"]
    group["weights"] |= change.pop("weights", {})
    if "input_activations" in change:
        group["input_activations"] = change.pop("input_activations")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config | change}))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(tmp_path)


# Directories ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings = {"vocab_size": 4096, "num_hidden_layers": 2, "max_position_embeddings": 64, "attention_bias": True}
    LlamaForCausalLM(LlamaConfig(**sizes, **settings, bos_token_id=0, eos_token_id=0)).half().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models.course_model_dir() / name, directory / name)
    return directory


SETTINGS = {
    "w4": (PACKED, {"bits": 4, "group_size": 32, "symmetric": True}),
    "w4-asym": (PACKED, {"bits": 4, "group_size": 32, "symmetric": False}),
    "w8": (PACKED, {"bits": 8, "group_size": -1, "symmetric": True}),
    "w8a8": (INT8, {}),
}


def make(source, out, name):
    layout, settings = SETTINGS[name]
    return checkpoint.quantize(source, out, "rtn", layout=layout, windows=0, **settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_directory_reads_back_exactly_and_has_no_fault(source, tmp_path, name):
    out = make(source, tmp_path / "out", name)
    model, _ = models.load_model(str(source), device="cpu")
    given = {"bits": 8, "group_size": None, "symmetric": True} if name == "w8a8" else {**SETTINGS[name][1]}
    if given["group_size"] == -1:
        given["group_size"] = None
    stored = {}
    quantized, _ = quantize_model(model, "rtn", stored=stored, **given)
    found = checkpoint.read(out)
    assert found.layout == SETTINGS[name][0]
    for linear, tensor in found.tensors():
        assert torch.equal(tensor.dequantize(), stored[linear].dequantize()), linear
    assert set(found.names) == stored.keys()
    inspection = checkpoint.inspect(out)
    assert inspection.findings == []
    assert inspection.nbytes == json.loads((out / "quantization_report.json").read_text())["bytes"]
    words = 8 * 14 * 2 if name != "w8a8" else 0  # weight_shape of every linear
    assert sum(inspection.nbytes.values()) - inspection.nbytes["not quantized"] - words == sum(t.nbytes for t in stored.values())
    loaded, _ = checkpoint.load(out)
    ids = torch.arange(40)[None]
    if name == "w8a8":  # it rounds activations as well, and the model in memory does not
        for layer in models.linears(quantized).values():
            layer.register_forward_pre_hook(int8.round_inputs)
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, quantized(input_ids=ids).logits, atol=1e-5)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert config["quantization_status"] == "compressed"
    saved = checkpoint.save(model, stored, tmp_path / "saved", SETTINGS[name][0], source)
    again = checkpoint.read(saved).weights
    assert all(torch.equal(again[key], found.weights[key]) for key in found.weights)
    readers = json.loads((out / "quantization_report.json").read_text())["read_by"]
    assert ("run_compressed=False" in readers) == (name == "w4-asym")


def test_w8a8_is_measured_as_it_is_run(source, tmp_path, monkeypatch):
    """Perplexity after quantization is that of the loaded model, whose linears round what goes into them."""
    calls = []
    monkeypatch.setattr(int8, "round_inputs", lambda layer, inputs: calls.append(layer) or (int8.round_tokens(inputs[0]),))
    out = checkpoint.quantize(source, tmp_path / "out", "rtn", layout=INT8, windows=1, length=32)
    assert len(calls) == 14  # once in each linear: after, and not before
    assert "rounds what goes into a linear to 8 bits" in (out / "README.md").read_text()


FAULTS = {
    "a scale that is no number": ("w4", "weight_scale", lambda t: t.fill_(torch.nan), "weight_scale holds 192 values that are not"),
    "the zero-points of symmetric grids": ("w4", "weight_zero_point", None, "config.json says symmetric"),
    "another shape": ("w4", "weight_shape", lambda t: t.flip(0), r"weight_shape is \[96, 64\], weight_packed holds \[64, 96\]"),
    "no scale": ("w8a8", "weight_scale", lambda t: None, "is stored as I8, neither packed as this layout packs nor a plain weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_inspect_finds_what_is_wrong(source, tmp_path, fault):
    name, part, change, message = FAULTS[fault]
    out = make(source, tmp_path / "out", name)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    key = f"model.layers.1.mlp.down_proj.{part}"
    path = out / index["weight_map"].get(key, index["weight_map"]["model.layers.1.mlp.down_proj.weight_scale"])
    tensors = load_file(path)
    changed = torch.zeros(8, 3, dtype=torch.int32) if change is None else change(tensors.pop(key))
    if changed is not None:
        tensors[key] = changed
        index["weight_map"][key] = path.name
    else:
        del index["weight_map"][key]
    save_file(tensors, path)
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    findings = checkpoint.inspect(out).findings
    assert any(finding.where == "model.layers.1.mlp.down_proj" and re.search(message, finding.message) for finding in findings)
