"""Weights that are linears in all but their class, experts and GPT-2's Conv1D: quantized, written and read like any linear."""

import json
import shutil

import architectures
import pytest
import torch
from architectures import VOCABULARY
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from labsupport import checkpoint, quantize_model
from labsupport.checkpoint import card
from labsupport.cli import app
from labsupport.model import models, opened
from labsupport.pipeline import block, calibrate, gptq_block
from labsupport.pipeline.methods import stored_methods
from labsupport.quant import int8, rtn

EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe")
IDS = torch.arange(6 * 40).view(6, 40) * 37 % VOCABULARY
GROUPS = {"bits": 4, "group_size": 32}
WORDS = "def f(x):\n    return x + 1\n\nA longer line of prose, so that there is something to read.\n" * 60


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The models as directories, made when they are first asked for; and a text."""
    root = tmp_path_factory.mktemp("models")
    (root / "words.txt").write_text(WORDS)

    def source(name):
        return root / name if (root / name).exists() else architectures.write(name, root / name)

    source.words = root / "words.txt"
    return source


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def off(got, want):
    return ((got - want).norm() / want.norm()).item()


def quantize(sources, name, out, method="rtn", **settings):
    settings = {"samples": 8, "length": 48, "windows": 0, **GROUPS} | settings
    return checkpoint.quantize(sources(name), out, method, calibration=str(sources.words), **settings)


def held(directory):
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", [*EXPERTS, "gpt2"])
def test_an_opened_model_has_the_tensors_of_its_files_and_computes_the_same(name, sources):
    model = architectures.make(name)
    before, want = {key: value.clone() for key, value in model.state_dict().items()}, logits(model)
    files = held(sources(name))  # written by transformers
    with opened.opened(model):
        assert off(logits(model), want) < 1e-6  # sums in another order
        linears = models.linears(model)
        for linear, layer in linears.items():
            stored = files[f"{linear.replace('mlp.experts', 'block_sparse_moe.experts') if name == 'mixtral' else linear}.weight"]
            assert torch.equal(layer.weight, stored.t() if name == "gpt2" else stored), linear
        counted = sum(layer.weight.numel() for layer in linears.values()) + sum(models.left_in_float(model).values())
    assert counted == sum(p.numel() for b in models.blocks(model) for p in b.parameters() if p.ndim > 1)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), want)


def test_what_stays_in_float_is_named_and_counted():
    model = architectures.make("qwen2-moe")
    _, report = quantize_model(model, "rtn", **GROUPS)
    sizes = {"gate": 4 * 64, "shared_expert_gate": 64}
    left = {f"model.layers.{n}.mlp.{gate}.weight": size for n in (0, 1) for gate, size in sizes.items()}
    assert report.left_in_float == left
    stored = sum(layer.nbytes for layer in report.layers.values())
    assert report.bits_per_weight == (8 * stored + 16 * 640) / (report.weights + 640)
    # Experts that transformers has no rule for stay as they are, and are said.
    held_otherwise = model.model.layers[0].mlp.experts
    held_otherwise.is_transposed = True
    _, report = quantize_model(model, "rtn", **GROUPS)
    assert report.left_in_float == left | {
        f"model.layers.0.mlp.experts.{name}": held_otherwise.get_parameter(name).numel() for name in ("gate_up_proj", "down_proj")
    }


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
@torch.no_grad()
def test_each_part_is_rounded_by_itself_into_its_own_place(name):
    model = architectures.make(name)
    quantized, report = quantize_model(model, "rtn", stored=(stored := {}), **GROUPS)
    assert report.layers.keys() == stored.keys()
    if name == "gpt2":
        for path, module in model.named_modules():
            if isinstance(module, Conv1D):
                wanted = rtn.quantize(module.weight.t(), **GROUPS).dequantize().t()
                assert torch.equal(quantized.get_submodule(path).weight, wanted), path
        assert len(stored) == 8
        return
    for n, (before, after) in enumerate(zip(models.blocks(model), models.blocks(quantized), strict=True)):
        for e in range(4):
            gate, up = before.mlp.experts.gate_up_proj[e].chunk(2)
            parts = {"w1": gate, "w3": up, "w2": before.mlp.experts.down_proj[e]}
            rounded = {leaf: rtn.quantize(weight, **GROUPS).dequantize() for leaf, weight in parts.items()}
            assert torch.equal(after.mlp.experts.gate_up_proj[e], torch.cat([rounded["w1"], rounded["w3"]]))
            assert torch.equal(after.mlp.experts.down_proj[e], rounded["w2"])
            for leaf, wanted in rounded.items():
                assert torch.equal(stored[f"model.layers.{n}.mlp.experts.{e}.{leaf}"].dequantize(), wanted)


@torch.no_grad()
def routed_rows(model, index):
    """What reaches each expert of a block in a plain pass of the model as transformers runs it: float32 [tokens, hidden]."""
    calls = []
    experts = models.blocks(model)[index].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    logits(model)
    handle.remove()
    hidden, chosen = calls[0][0], calls[0][1]
    return [hidden[(chosen == e).any(1)] for e in range(experts.num_experts)]


@pytest.mark.parametrize("share", [block.SHARE, 0.0])
@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_is_fed_by_the_tokens_that_are_routed_to_it(name, share, monkeypatch):
    """Also where the statistics of few experts, or of one, fit beside the block."""
    monkeypatch.setattr(block, "SHARE", share)
    model = architectures.make(name)
    rows = [routed_rows(model, index) for index in range(2)]
    steps = set()
    with opened.opened(model):
        for part in calibrate.blocks(model, IDS, batch=4):
            for linear, statistics in part.fed():
                if linear in part.steps:
                    steps.add((part.index, part.steps[linear]))
                    e, leaf = linear.split(".")[-2:]
                    x = rows[part.index][int(e)]
                    assert statistics.tokens == len(x)
                    if leaf not in ("down_proj", "w2"):
                        assert torch.allclose(statistics.gram, x.T @ x, rtol=1e-4, atol=1e-5)
    assert len(steps) == 2 * 3  # of each block gate, up and down


def test_an_expert_that_few_tokens_reach_is_rounded_and_named():
    model = architectures.make("qwen3-moe")
    quantized, report = quantize_model(model, "gptq", calibration=IDS, **GROUPS)
    plain, _ = quantize_model(model, "rtn", **GROUPS)
    few = []
    for linear, layer in report.layers.items():
        if "experts" not in linear:
            assert layer.tokens == IDS.numel()
            assert not layer.rounded  # every token reaches it: how many there are was the caller's choice
            continue
        assert layer.rounded == (layer.tokens < gptq_block.TOKENS_A_COLUMN * (32 if "down" in linear else 64))
        few += [linear] * layer.rounded
        with opened.opened(quantized), opened.opened(plain):
            same = torch.equal(quantized.get_submodule(linear).weight, plain.get_submodule(linear).weight)
        assert same == layer.rounded
    assert report.rounded == few
    assert 0 < len(few) < 24
    routed = [layer.tokens for name, layer in report.layers.items() if "experts" in name and "up_proj" in name]
    assert sum(routed) == 2 * 2 * IDS.numel()  # two experts a token, two blocks


def test_an_expert_that_no_token_reaches_is_rounded():
    """One token reaches two of four experts."""
    model = architectures.make("mixtral")
    quantized, report = quantize_model(model, "gptq", calibration=IDS[:1, :1], **GROUPS)
    tokens = [layer.tokens for name, layer in report.layers.items() if name.endswith(".w1")]
    assert sorted(tokens) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len(report.rounded) == 24
    assert logits(quantized).isfinite().all()
    eight, _ = quantize_model(model, "int8")
    assert eight(IDS[:1, :1], use_cache=False).logits.isfinite().all()


def test_int8_multiplies_in_int8_inside_each_expert():
    model = architectures.make("qwen2-moe")
    quantized, report = quantize_model(model, "int8")
    expert = quantized.get_submodule("model.layers.1.mlp.experts.2")
    assert all(isinstance(layer, int8.Int8Linear) for layer in expert.children())
    assert len(report.layers) == 2 * (4 + 3 + 4 * 3)
    assert off(logits(quantized), logits(model)) < 0.05  # 8 bits
    assert isinstance(quantize_model(architectures.make("gpt2"), "int8")[0].transformer.h[0].mlp.c_fc, int8.Int8Linear)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("mixtral", "gptq"), ("mixtral", "rtn"), ("qwen2-moe", "nf4"), ("gpt2", "gptq")])
def test_written_and_read_back(name, method, sources, tmp_path):
    given = {"group_size": 32} if method == "nf4" else GROUPS
    out = quantize(sources, name, tmp_path / "out", method, **given)
    assert not checkpoint.inspect(out).findings
    # By the names of the model's own files, written by transformers.
    plain = {key.removesuffix(".weight") for key in held(sources(name))}
    assert set(checkpoint.read(out).names) <= plain
    model, tokenizer = models.load_model(str(sources(name)), device="cpu")
    text = {}
    if method == "gptq":
        ids = torch.tensor(tokenizer(WORDS)["input_ids"] + [tokenizer.eos_token_id])
        count = len(ids) // 48
        text = {"calibration": torch.stack([ids[start * 48 : start * 48 + 48] for start in (torch.arange(8) * count // 8)])}
    settings = {**stored_methods()[method].settings, **({"block_size": 32} if method == "nf4" else GROUPS)}
    quantized, report = quantize_model(model, method, stored=(stored := {}), **text, **settings)
    loaded, _ = checkpoint.load(out)
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in quantized.state_dict().items():
        in_block = ".experts." in key or value.ndim > 1
        assert torch.allclose(loaded.state_dict()[key], value, rtol=2**-11, atol=1e-7 if in_block else 1e-6), key
    read = json.loads((out / card.REPORT).read_text())
    assert read["rounded_for_want_of_tokens"] == report.rounded
    assert read["left_in_float"] == report.left_in_float
    other = held(checkpoint.save(quantized, stored, tmp_path / "other", checkpoint.read(out).layout, sources(name)))
    assert other.keys() == held(out).keys()
    assert all(torch.equal(value, other[key]) for key, value in held(out).items())


@pytest.mark.slow
def test_files_of_other_forms_give_the_same(sources, tmp_path):
    """Experts stored in one tensor, as a state dict has them; GPT-2 without the prefix of its names, as on the hub."""
    for name in ("mixtral", "gpt2"):
        source = shutil.copytree(sources(name), tmp_path / name)
        model = architectures.make(name)
        state = {key: value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight" or name == "mixtral"}
        save_file({key.removeprefix("transformer."): value for key, value in state.items()}, source / "model.safetensors")
        wanted = held(quantize(sources, name, tmp_path / f"{name}-wanted"))
        out = checkpoint.quantize(source, tmp_path / f"{name}-out", "rtn", windows=0, **GROUPS)
        assert wanted.keys() == held(out).keys()
        assert all(torch.equal(value, wanted[key]) for key, value in held(out).items())
        assert not checkpoint.inspect(out).findings


@pytest.mark.slow
def test_a_run_with_experts_that_was_stopped_goes_on(sources, tmp_path, monkeypatch):
    wanted = held(quantize(sources, "mixtral", tmp_path / "wanted", "gptq"))
    save_outside = checkpoint.parts.Parts.save_outside
    monkeypatch.setattr(checkpoint.parts.Parts, "save_outside", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize(sources, "mixtral", tmp_path / "out", "gptq")
    monkeypatch.setattr(checkpoint.parts.Parts, "save_outside", save_outside)
    out = quantize(sources, "mixtral", tmp_path / "out", "gptq")
    assert all(torch.equal(value, wanted[key]) for key, value in held(out).items())


@pytest.mark.slow
def test_the_command_says_what_stays_in_float_who_was_rounded_and_what_reads_it(sources, tmp_path):
    out = tmp_path / "out"
    arguments = ["--samples", "2", "--length", "48", "--windows", "0", "--group-size", "32", "--calibration", str(sources.words)]
    result = CliRunner().invoke(app, ["quantize", str(sources("qwen3-moe")), "--out", str(out), *arguments])
    assert result.exit_code == 0, result.output
    assert "left in float16: model.layers.*.mlp.gate.weight (2), 512 values" in result.output
    assert "were rounded to nearest: model.layers.*.mlp.experts.*.gate_proj (" in result.output
    assert "read by labsupport.checkpoint.load. transformers from 5 on does not" in result.output
    text = (out / "README.md").read_text()
    assert "Left in float16: model.layers.*.mlp.gate.weight (2), 512 values." in text
    assert "Rounded to nearest, since too few tokens of the calibration text reached them: model.layers." in text
    assert "left in float: model.layers.*.mlp.gate.weight (2), 512 weights; with them" in "\n".join(checkpoint.inspect(out).lines())
