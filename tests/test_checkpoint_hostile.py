"""Checkpoints and models that lie: what is wrong is said in words, by its name, and shown so that no terminal obeys."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from labsupport import checkpoint
from labsupport.checkpoint import CheckpointError, measure, parts
from labsupport.cli import app
from labsupport.cli.messages import printable
from labsupport.model import names, opened, text

LINEAR = "model.layers.1.mlp.up_proj"
QUICK = {"windows": 0, "group_size": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return architectures.write("llama", tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """The model as "gptq" and as "nf4"."""
    folder = tmp_path_factory.mktemp("packed")
    checkpoint.quantize(source, folder / "gptq", "rtn", **QUICK)
    checkpoint.quantize(source, folder / "nf4", "nf4", windows=0, double_quant=False)
    checkpoint.quantize(source, folder / "nf4-double", "nf4", windows=0, double_quant=True)
    return folder


def changed(directory: Path, name: str, change) -> None:
    """Change a tensor in whichever file it is; "" stands for a tensor that is added to the last one."""
    *_, last = paths = sorted(directory.glob("*.safetensors"))
    for path in paths:
        tensors = load_file(path)
        if name in tensors or (not name and path == last):
            tensors |= change(tensors.get(name))
            save_file(tensors, path, {"format": "pt"})
            index = directory / "model.safetensors.index.json"
            if index.is_file():
                content = json.loads(index.read_text())
                content["weight_map"] |= dict.fromkeys(tensors, path.name)
                index.write_text(json.dumps(content))
            return
    raise AssertionError(f"no {name}")


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("gptq", "scales", float("nan"), "scales holds 1 values that are not finite numbers above 0"),
        ("gptq", "scales", float("inf"), "scales holds 1 values that are not finite numbers above 0"),
        ("gptq", "scales", 0.0, "scales holds 1 values that are not finite numbers above 0"),
        ("gptq", "scales", -1.0, "scales holds 1 values that are not finite numbers above 0"),
        ("nf4", "weight.absmax", float("nan"), "weight.absmax holds 1 values that are not finite numbers from 0 up"),
        ("nf4", "weight.absmax", -1.0, "weight.absmax holds 1 values that are not finite numbers from 0 up"),
        ("nf4", "weight.quant_map", float("nan"), "weight.quant_map is not the codebook nf4"),
        ("nf4-double", "weight.nested_absmax", -1.0, "weight.nested_absmax holds 1 values that are not finite numbers from 0 up"),
    ],
)
def test_numbers_that_no_quantizer_stores(packed, tmp_path, kind, name, value, message):
    directory = shutil.copytree(packed / kind, tmp_path / "copy")
    checkpoint.load(directory)
    assert checkpoint.inspect(directory).findings == []

    def put(tensor):
        tensor.view(-1)[-1] = value
        return {f"{LINEAR}.{name}": tensor}

    changed(directory, f"{LINEAR}.{name}", put)
    with pytest.raises(CheckpointError, match=f"^{LINEAR}: {message}"):
        checkpoint.load(directory)
    assert f"{LINEAR}: {message}" in map(str, checkpoint.inspect(directory).findings)


def test_a_norm_that_is_not_finite(packed, tmp_path):
    directory = shutil.copytree(packed / "gptq", tmp_path / "copy")
    changed(directory, "model.norm.weight", lambda tensor: {"model.norm.weight": tensor.fill_(float("nan"))})
    with pytest.raises(CheckpointError, match=r"model.norm.weight in .* holds NaN or infinity"):
        checkpoint.load(directory)
    assert "model.norm.weight: holds NaN or infinity" in map(str, checkpoint.inspect(directory).findings)


def test_a_norm_that_is_not_stored_as_floats(packed, tmp_path):
    directory = shutil.copytree(packed / "gptq", tmp_path / "copy")
    changed(directory, "model.norm.weight", lambda tensor: {"model.norm.weight": tensor > 0})
    with pytest.raises(CheckpointError, match=r"model.norm.weight in .* is stored as BOOL, wanted one of F64, F32, F16, BF16"):
        checkpoint.load(directory)


def test_an_index_with_a_name_that_no_file_can_have(packed, tmp_path):
    directory = shutil.copytree(packed / "gptq", tmp_path / "copy")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text()) if index.is_file() else {"weight_map": {"model.norm.weight": ""}}
    content["weight_map"]["model.norm.weight"] = f"{'x' * 300}.safetensors"
    index.write_text(json.dumps(content))
    for path in directory.glob("model.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"is missing in .*, and its index names it"):
        checkpoint.load(directory)


def test_magnitudes_that_were_quantized_in_their_turn_may_read_back_below_0(packed):
    checkpoint.load(packed / "nf4-double")
    assert checkpoint.inspect(packed / "nf4-double").findings == []


HOSTILE = "\x1b]0;title\x07\x1b[2J\u202e\x9bx\nright: everything\r0 faults"


def test_no_terminal_obeys_a_name_from_a_file(source, packed, tmp_path):
    """Names of tensors, of files in an index, and settings of a config, in each command that reads a model directory."""
    model, quantized = shutil.copytree(source, tmp_path / "model"), shutil.copytree(packed / "gptq", tmp_path / "quantized")
    for directory in (model, quantized):
        changed(directory, "", lambda _: {HOSTILE: torch.zeros(3)})
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"]["sym"] = HOSTILE
    (quantized / "config.json").write_text(json.dumps(config))
    commands = {"inspect": [str(quantized)], "quantize": [str(model), "--out", str(tmp_path / "out"), "--method", "rtn"]}
    for command, arguments in commands.items():
        result = CliRunner().invoke(app, [command, *arguments])
        assert result.exit_code == 1
        shown = result.stdout + result.stderr
        assert printable(HOSTILE) in shown
        assert all(line.isprintable() for line in shown.split("\n"))
        assert not any(line.startswith("right: everything") for line in shown.split("\n"))


def test_what_is_printable_stays_as_it_is():
    assert printable("größer 4 bits, 日本") == "größer 4 bits, 日本"
    assert printable("\x1b[31m\n\x7f\u2028") == r"\x1b[31m\n\x7f\u2028"


def test_commands_print_through_one_place():
    """A line printed another way is not escaped. Rich shows tables of our own numbers; the suite hands on pytest's output."""
    folder = Path(checkpoint.__file__).parents[1] / "cli"
    assert {path.name for path in folder.glob("*.py") if "typer.echo(" in path.read_text()} == {"__init__.py", "messages.py"}
    assert (folder / "__init__.py").read_text().count("typer.echo(") == 1  # the help


def fifo(name):
    def spoil(directory):
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return spoil


def device(name):
    def spoil(directory):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to("/dev/zero")

    return spoil


def many(**settings):
    def spoil(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | settings))

    return spoil


NO_FILE = "is a directory, a pipe or a device|is a pipe, a socket or a device"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no devices here")
@pytest.mark.parametrize("kind", ["source", "packed"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (fifo("config.json"), NO_FILE),
        (fifo("model.safetensors"), NO_FILE),
        (fifo("tokenizer.json"), NO_FILE),
        (device("config.json"), NO_FILE),
        (device("model.safetensors"), NO_FILE),
        (device("tokenizer_config.json"), NO_FILE),
        (many(num_hidden_layers=10**6), "asks for 1000000 blocks, the files hold"),
        (many(num_hidden_layers=10**12), "asks for 1000000000000 blocks, the files hold"),
    ],
)
def test_what_could_take_for_ever_is_refused_at_once(source, packed, tmp_path, kind, spoil, message):
    """With a signal after 20 s in place of waiting for ever: none of these takes a second."""
    directory = shutil.copytree(source if kind == "source" else packed / "gptq", tmp_path / "copy")
    spoil(directory)

    def too_late(*_):
        raise AssertionError("still at work after 20 s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(20)
    try:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(directory) if kind == "packed" else checkpoint.quantize(directory, tmp_path / "out", "rtn", **QUICK)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("how", ["shorter", "gone"])
def test_a_file_that_shrinks_during_a_run(source, tmp_path, monkeypatch, how):
    """To read past the end of a mapped file kills a process. What is finished is kept; the run goes on when the file is back."""
    directory = shutil.copytree(source, tmp_path / "copy")
    path = directory / "model.safetensors"
    content = path.read_bytes()
    real = parts.Parts.save

    def save(self, block, tensors):
        real(self, block, tensors)
        if block.index == 0:
            path.write_bytes(content[: len(content) // 2]) if how == "shorter" else path.unlink()

    with monkeypatch.context() as during:
        during.setattr(parts.Parts, "save", save)
        words = f"has {len(content) // 2} bytes, it had {len(content)}" if how == "shorter" else "is gone since it was opened"
        with pytest.raises(CheckpointError, match=f"model.safetensors of .*copy {words}"):
            checkpoint.quantize(directory, tmp_path / "out", "rtn", **QUICK)
    path.write_bytes(content)
    made = []
    monkeypatch.setattr(parts.Parts, "save", lambda self, block, tensors: (made.append(block.index), real(self, block, tensors)))
    checkpoint.load(checkpoint.quantize(directory, tmp_path / "out", "rtn", **QUICK))
    assert made == [1]


WORDS = "def f(x):\n    return x + 1\n" * 400


@pytest.fixture
def text_of_words(tmp_path, monkeypatch):
    """A file to calibrate on, and the same words to measure perplexity on."""
    monkeypatch.setattr(text, "documents", lambda domain="code", split="heldout": [text.Document("words", WORDS)])
    (tmp_path / "words.txt").write_text(WORDS)
    return str(tmp_path / "words.txt")


def warnings_of(source, out, words, method="gptq", **texts):
    lines = []
    settings = {"calibration": words, "length": 48, **QUICK, **texts}
    checkpoint.quantize(source, out, method, warn=lines.append, **settings)
    return lines


def test_what_is_most_often_a_mistake_is_a_line_of_warning(source, tmp_path, text_of_words):
    """96 is the most inputs that a linear of the model has."""
    directory = shutil.copytree(source, tmp_path / "copy")
    assert warnings_of(directory, tmp_path / "enough", text_of_words, samples=2) == []
    (line,) = warnings_of(directory, tmp_path / "few", text_of_words, samples=1)
    assert line.startswith("48 tokens of calibration text are fewer than the 96 inputs of a linear")
    (directory / "adapter_config.json").write_text("{}")
    (line,) = warnings_of(directory, tmp_path / "adapter", text_of_words, "rtn", samples=1)
    assert "copy holds an adapter (adapter_config.json), which is not applied" in line
    arguments = ["quantize", str(directory), "--out", str(tmp_path / "command"), "--method", "rtn", "--group-size", "32"]
    done = CliRunner().invoke(app, [*arguments, "--windows", "0"])
    assert done.exit_code == 0, done.output
    assert len([line for line in done.stderr.splitlines() if "adapter" in line]) == 1


@pytest.mark.slow
def test_the_model_is_compared_with_transformers_own_reading(source, tmp_path, text_of_words, monkeypatch):
    """Break what it guards: a tensor that is read under another's name, of the same shape and as good as any."""
    settings = {"calibration": text_of_words, "length": 48, "group_size": 32, "windows": 1}
    out = checkpoint.quantize(source, tmp_path / "out", "rtn", **settings)
    measured = json.loads((out / "quantization_report.json").read_text())["perplexity"]
    assert measured["compared"].startswith("On one window its loss is that of transformers' own reading of the model, ")
    assert measured["compared"] in (out / "README.md").read_text()
    real = names.from_file

    def swapped(model):
        other = {"model.layers.0.mlp.gate_proj.weight": "model.layers.0.mlp.up_proj.weight"}
        other |= {new: old for old, new in other.items()}
        return lambda name: other.get(real(model)(name), real(model)(name))

    monkeypatch.setattr(names, "from_file", swapped)
    with pytest.raises(CheckpointError, match=r"labs reads .* otherwise than transformers does: on one window the loss is"):
        checkpoint.quantize(source, tmp_path / "swapped", "rtn", **settings)
    assert not (tmp_path / "swapped.partial").exists()
    monkeypatch.setattr(measure, "COMPARED", 1000)  # not loaded as a whole, and so not noticed
    out = checkpoint.quantize(source, tmp_path / "large", "rtn", **settings)
    assert "Not compared with transformers' own reading of the model, whose " in (out / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "old", "foreign"),
    [
        ("gpt-neox", "gpt_neox.layers.0.attention.masked_bias", "gpt_neox.layers.0.attn.masked_bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attention.masked_bias"),
    ],
)
def test_what_transformers_passes_over_is_passed_over(tmp_path, name, old, foreign):
    """Its own lists, by architecture: what GPT-NeoX's older files hold is foreign to a Llama."""
    directory = architectures.write(name, tmp_path / name)
    changed(directory, "", lambda _: {old: torch.full((3,), float("inf"))})
    out = checkpoint.quantize(directory, tmp_path / "out", "rtn", **QUICK)
    changed(out, "", lambda _: {old: torch.full((3,), float("inf"))})
    checkpoint.load(out)
    assert checkpoint.inspect(out).findings == []
    changed(directory, "", lambda _: {foreign: torch.zeros(3)})
    with pytest.raises(CheckpointError, match=f"holds {foreign}, which its config does not know"):
        checkpoint.quantize(directory, tmp_path / "again", "rtn", **QUICK)


@pytest.mark.slow
def test_what_transformers_lets_a_file_lack_is_what_the_constructor_makes(tmp_path, monkeypatch):
    """A.X-K1's published files have no correction of the router's scores, and the model has: zeros. Nothing else may be missing."""
    shape = {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    heads = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    settings = architectures.LLAMA | shape | heads | {"num_key_value_heads": 4, "moe_intermediate_size": 32}
    monkeypatch.setitem(architectures.CONFIGS, "axk1", ("axk1", settings))
    directory = architectures.write("axk1", tmp_path / "axk1")
    held = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert held.pop(name).count_nonzero() == 0
    whole = checkpoint.quantize(directory, tmp_path / "whole", "rtn", **QUICK)
    save_file(held, directory / "model.safetensors", {"format": "pt"})
    out = checkpoint.quantize(directory, tmp_path / "out", "rtn", **QUICK)
    assert torch.equal(checkpoint.read(out).weights[name], checkpoint.read(whole).weights[name])
    written = {path: load_file(path) for path in out.glob("*.safetensors")}
    for path, tensors in written.items():
        tensors.pop(name, None)
        save_file(tensors, path, {"format": "pt"})
    for index in out.glob("*.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"].pop(name, None)
        index.write_text(json.dumps(content))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(checkpoint.load(out)[0](ids).logits, checkpoint.load(whole)[0](ids).logits)
    assert checkpoint.inspect(out).findings == []
    held.pop("model.layers.1.mlp.gate.weight")
    save_file(held, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model.layers.1.mlp.gate.weight, which its config asks for"):
        checkpoint.quantize(directory, tmp_path / "again", "rtn", **QUICK)


@pytest.mark.slow
def test_whole_directories_in_the_names_of_files_and_in_those_of_the_model(tmp_path, monkeypatch):
    """Mixtral's experts stand in its files one by one, and in transformers 5 in one tensor. Both are read."""
    from transformers import AutoModelForCausalLM

    directory = architectures.write("mixtral", tmp_path / "mixtral")
    held = load_file(directory / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in held
    model = AutoModelForCausalLM.from_pretrained(directory)
    inside = shutil.copytree(directory, tmp_path / "inside")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, inside / "model.safetensors")
    loaded = [checkpoint.load(checkpoint.quantize(d, d.with_name(f"{d.name}-out"), "rtn", **QUICK))[0] for d in (directory, inside)]
    ids = torch.arange(20)[None]
    assert torch.equal(*(each(ids).logits for each in loaded))
    # Of a model whose experts cannot be taken apart the cause is named, not tensors that are there after all.
    monkeypatch.setattr(opened, "_leaves", lambda model: None)
    words = r"holds model.layers.0.mlp.experts.0.w1.weight, of which transformers makes model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(CheckpointError, match=words):
        checkpoint.quantize(directory, tmp_path / "closed", "rtn", **QUICK)
