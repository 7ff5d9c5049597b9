"""Checkpoints and models that lie: what is wrong is said in words, by its name, and shown so that no terminal obeys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from labsupport import checkpoint
from labsupport.checkpoint import CheckpointError
from labsupport.cli import app
from labsupport.cli.messages import printable

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
        ("gptq", f"{LINEAR}.scales", float("nan"), "holds 1 scales that are not finite"),
        ("gptq", f"{LINEAR}.scales", float("inf"), "holds 1 scales that are not finite"),
        ("gptq", f"{LINEAR}.scales", 0.0, "holds 1 scales that are not above 0"),
        ("gptq", f"{LINEAR}.scales", -1.0, "holds 1 scales that are not above 0"),
        ("gptq", "model.norm.weight", float("nan"), "holds NaN or infinity"),
        ("nf4", f"{LINEAR}.weight.absmax", float("nan"), "holds 1 magnitudes that are not finite"),
        ("nf4", f"{LINEAR}.weight.absmax", -1.0, "holds 1 magnitudes below 0"),
        ("nf4", f"{LINEAR}.weight.quant_map", float("nan"), "is not the codebook nf4"),
    ],
)
def test_numbers_that_no_quantizer_stores(packed, tmp_path, kind, name, value, message):
    directory = shutil.copytree(packed / kind, tmp_path / "copy")
    checkpoint.load(directory)
    assert checkpoint.inspect(directory).findings == []

    def put(tensor):
        tensor.view(-1)[1] = value
        return {name: tensor}

    changed(directory, name, put)
    with pytest.raises(CheckpointError, match=f"{name} in .* {message}"):
        checkpoint.load(directory)
    assert f"{name}: {message}" in map(str, checkpoint.inspect(directory).findings)


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
