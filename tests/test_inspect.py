"""labs inspect: a good checkpoint has no fault, and each known fault is found and told from the others."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from labsupport import checkpoint
from labsupport.checkpoint import CheckpointError, statistics
from labsupport.cli import app
from labsupport.model import models
from labsupport.quant import packing

pytestmark = pytest.mark.slow

ALL = {"windows": 0, "samples": 1, "length": 64}
MADE = {
    "gptq": {"method": "rtn"},
    "gptq-sym": {"method": "rtn", "symmetric": True},
    "gptq-order": {"method": "gptq", "static_groups": False},
    "gptq_v2": {"method": "rtn", "layout": "gptq_v2"},
    "gptq_v2-sym": {"method": "rtn", "layout": "gptq_v2", "symmetric": True},
    "gptq-3": {"method": "rtn", "bits": 3},
    "gptq-2": {"method": "rtn", "bits": 2},
    "gptq-8": {"method": "rtn", "bits": 8},
    "awq": {"method": "rtn", "layout": "awq"},
    "awq-sym": {"method": "rtn", "layout": "awq", "symmetric": True},
    "nf4": {"method": "nf4"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints of the course model, each made when it is first asked for."""
    folder, done = tmp_path_factory.mktemp("checkpoints"), {}

    (folder / "words.txt").write_text("def f(x):\n    return x + 1\n" * 40)

    def make(name):
        if name not in done:
            settings = {**ALL, **MADE[name], "calibration": str(folder / "words.txt")}
            done[name] = checkpoint.quantize(models.course_model_dir(), folder / name, **settings)
        return done[name]

    return make


@pytest.fixture
def spoiled(made, tmp_path):
    """A copy of a checkpoint after spoil(tensors, config); tensors of one linear can be told by their full name."""

    def make(name, spoil):
        directory = shutil.copytree(made(name), tmp_path / "spoiled")
        config = json.loads((directory / "config.json").read_text())
        placed = {}
        for path in directory.glob("*.safetensors"):
            tensors = load_file(path)
            spoil(tensors, config["quantization_config"])
            save_file(tensors, path)
            placed |= dict.fromkeys(tensors, path.name)
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
        return checkpoint.inspect(directory)

    return make


@pytest.mark.parametrize("name", list(MADE))
def test_a_good_checkpoint_has_no_fault(made, name):
    found = checkpoint.inspect(made(name))
    assert found.findings == []
    assert found.linears == 42
    report = json.loads((made(name) / "quantization_report.json").read_text())
    assert found.nbytes == report["bytes"]
    assert found.bits_per_weight == pytest.approx(report["bits_per_weight"])
    assert any("measure perplexity" in line for line in found.unknown)
    known = " ".join(found.known)
    assert ("zero-points: all read as" in known) == name.endswith("sym")
    if name == "gptq-8":  # a step is a sixteenth of one at 4 bits, and weights are not that well balanced
        assert "zero-points" in known or any("whether zero-points are one off" in line for line in found.unknown)
    elif name != "nf4":
        assert "zero-points" in known
    assert ("order of outputs in a word" in known) == name.startswith("awq")


def relabeled(version):
    return lambda tensors, config: config.update(checkpoint_format=version)


def zeros_moved(by):
    """As a packer would that subtracts 1 once too often, or not at all."""

    def spoil(tensors, config):
        bits = config["bits"]
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            if config["quant_method"] == "awq":
                tensors[name] = packing.pack_awq(packing.unpack_awq(tensors[name]).int() + by & 15)
            else:
                zeros = packing.unpack_gptq_zeros(tensors[name], bits, 2).int() + by & 2**bits - 1
                tensors[name] = packing.pack_gptq_zeros(zeros, bits, 2)

    return spoil


def reordered(parts, nibbles):
    """Written with another order of the eight outputs in a word."""

    def spoil(tensors, config):
        for name in [name for name in tensors if name.endswith(parts)]:
            codes = packing.unpack_awq(tensors[name]).t().reshape(-1, 8)[:, list(nibbles)]
            tensors[name] = packing.pack_rows(codes, 4).view(tensors[name].shape)

    return spoil


PLAIN = tuple(range(8))
FAULTS = [
    ("gptq_v2", relabeled("gptq"), "zero-points", "are read 1 too high: .* if the file were version 2"),
    (
        "gptq_v2-sym",
        relabeled("gptq"),
        "zero-points",
        "all are stored as 8, symmetric gptq files store 7: each weight is read 1 step off",
    ),
    ("gptq", relabeled("gptq_v2"), "zero-points", "are read 1 too low: .* if the file were version 1"),
    ("gptq-sym", relabeled("gptq_v2"), "zero-points", "all are stored as 7, symmetric gptq_v2 files store 8"),
    ("gptq-order", zeros_moved(1), "zero-points", "are read 1 too high"),
    ("gptq-3", zeros_moved(-1), "zero-points", "are read 1 too low: codes lie"),
    ("gptq-2", zeros_moved(1), "zero-points", "are read 1 too high"),
    ("awq", zeros_moved(-1), "zero-points", "are read 1 too low"),
    ("awq-sym", zeros_moved(-1), "zero-points", "all are stored as 7, symmetric awq files store 8"),
    ("awq", reordered((".qweight", ".qzeros"), PLAIN), "qweight", "nibbles stand in order 0 1 2 3 4 5 6 7, not 0 2 4 6 1 3 5 7"),
    ("awq", reordered((".qweight", ".qzeros"), PLAIN), "qzeros", "nibbles stand in order 0 1 2 3 4 5 6 7 as well"),
    ("awq-sym", reordered((".qweight",), packing.AWQ_PLACES), "qweight", "nibbles stand in order 0 4 1 5 2 6 3 7"),
    ("awq", reordered((".qzeros",), PLAIN), "qzeros", "nibbles stand in order 0 1 2 3 4 5 6 7, not 0 2 4 6 1 3 5 7"),
    ("awq", reordered((".qweight",), PLAIN), "qweight", "nibbles stand in order 0 1 2 3 4 5 6 7, not 0 2 4 6 1 3 5 7"),
]


@pytest.mark.parametrize(
    ("name", "spoil", "where", "message"), FAULTS, ids=[f"{name}-{where}-{i}" for i, (name, _, where, _) in enumerate(FAULTS)]
)
def test_what_shapes_do_not_show_is_found(spoiled, name, spoil, where, message):
    findings = [finding for finding in spoiled(name, spoil).findings if finding.where == where]
    assert len(findings) == 1
    assert re.search(message, findings[0].message), findings[0].message
    assert findings[0].certain == ("symmetric" in message)


def test_a_wrong_order_is_not_taken_for_a_wrong_zero_point_nor_the_other_way(spoiled):
    assert {finding.where for finding in spoiled("awq", reordered((".qweight",), PLAIN)).findings} == {"qweight"}


def test_zero_points_one_off_are_not_taken_for_an_order(spoiled):
    assert {finding.where for finding in spoiled("awq", zeros_moved(1)).findings} == {"zero-points"}


NAME = "model.layers.2.mlp.down_proj"


def drop(part):
    return lambda tensors, config: tensors.pop(f"{NAME}.{part}", None)


def put(part, change):
    def spoil(tensors, config):
        key = f"{NAME}.{part}"
        if key in tensors:
            tensors[key] = change(tensors[key]).contiguous()

    return spoil


def bad_scale(value):
    def change(scales):
        scales = scales.clone()
        scales[1, 3] = value
        return scales

    return change


@pytest.mark.parametrize(
    ("name", "spoil", "where", "message"),
    [
        ("gptq", drop("qzeros"), NAME, "lacks qzeros"),
        ("gptq", drop("g_idx"), NAME, "lacks g_idx"),
        ("gptq", drop("qweight"), NAME, "is missing: neither packed nor as a plain weight"),
        ("nf4", drop("weight.absmax"), NAME, "the state dict lacks weight.absmax"),
        ("gptq", put("qweight", lambda t: t[:-4]), NAME, "holds a weight [256, 736], the config asks for [256, 768]"),
        ("awq", put("qweight", lambda t: t[:, :-1]), NAME, "holds a weight [248, 768], the config asks for [256, 768]"),
        (
            "gptq",
            put("scales", lambda t: t[:, :-8]),
            NAME,
            "scales has shape [6, 248], wanted groups that divide 768 inputs, and 256 outputs",
        ),
        ("gptq", put("scales", bad_scale(float("nan"))), NAME, "scales holds 1 values that are not finite numbers above 0"),
        ("awq", put("scales", bad_scale(0.0)), NAME, "scales holds 1 values that are not finite numbers above 0"),
        ("gptq", put("qweight", lambda t: t.float()), NAME, "qweight is torch.float32, wanted torch.int32"),
        (
            "gptq",
            lambda t, config: config.update(group_size=64),
            "model.layers.0.mlp.down_proj",
            "has groups of 128, config.json says 64",
        ),
        (
            "gptq-order",
            lambda t, config: config.update(desc_act=False),
            "config.json",
            "desc_act is False, and 42 linears have groups out of order",
        ),
        ("gptq", lambda t, config: config.update(desc_act=True), "config.json", "desc_act is True, and 0 linears"),
        ("gptq", lambda t, config: config.update(sym=True), "zero-points", "config.json says sym, and they differ"),
        ("gptq", lambda t, config: t.pop("model.norm.weight", None), "model.norm.weight", "is missing"),
        ("gptq", lambda t, config: t.update(more=torch.zeros(2)), "more", "is not known to the architecture"),
    ],
)
def test_what_is_missing_or_does_not_fit(spoiled, name, spoil, where, message):
    if message.endswith("architecture"):
        first = []
        real = spoil

        def spoil(tensors, config):
            if not first:
                first.append(real(tensors, config))

    found = spoiled(name, spoil)
    assert any(finding.where == where and message in finding.message for finding in found.findings), list(found.lines())
    assert list(found.lines())[-1].endswith(("fault", "faults"))


def test_a_zero_point_of_0_in_version_1(spoiled):
    """What a packer stores that does not know its readers: 0 as 15, which they take for 16."""

    def spoil(tensors, config):
        key = f"{NAME}.qzeros"
        if key in tensors:
            zeros = packing.unpack_gptq_zeros(tensors[key], 4)
            zeros[:5, 0] = 0
            tensors[key] = packing.pack_gptq_zeros(zeros, 4)

    (finding,) = spoiled("gptq", spoil).findings
    assert "5 are 0, stored as 15, which AutoGPTQ's and other kernels read as 16" in finding.message


def test_damaged_files_and_pickles_are_findings(made, tmp_path):
    directory = shutil.copytree(made("gptq"), tmp_path / "copy")
    (directory / "pytorch_model.bin").write_bytes(b"")
    path = sorted(directory.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-8])
    findings = [str(finding) for finding in checkpoint.inspect(directory).findings]
    assert findings[0].startswith("pytorch_model.bin: is a pickle, which can run code when it is loaded; it was not read")
    assert f"{path.name} is damaged" in findings[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "is not a quantized checkpoint: config.json has no quantization_config"),
        ({"quant_method": "hqq"}, "has quant_method 'hqq', wanted gptq, awq, bitsandbytes or compressed-tensors"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "has checkpoint_format 'marlin', wanted gptq or gptq_v2"),
        ({"quant_method": "awq", "version": "gemv"}, "has AWQ version 'gemv', wanted gemm"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "holds int8 weights of bitsandbytes, wanted 4 bits"),
    ],
)
def test_what_is_no_checkpoint_of_a_known_kind(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.inspect(tmp_path)


def test_the_command(made, tmp_path):
    good = CliRunner().invoke(app, ["inspect", str(made("awq"))])
    assert good.exit_code == 0, good.output
    assert "4,718,592 weights at 4.156 bits" in good.output
    assert good.output.endswith("0 faults\n")
    directory = shutil.copytree(made("gptq_v2-sym"), tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq"
    (directory / "config.json").write_text(json.dumps(config))
    bad = CliRunner().invoke(app, ["inspect", str(directory)])
    assert bad.exit_code == 1
    assert "FAULT zero-points: all are stored as 8" in bad.output
    nothing = CliRunner().invoke(app, ["inspect", str(tmp_path / "nothing")])
    assert nothing.exit_code == 1
    assert "is not a directory" in nothing.output


def test_orders_are_what_reading_in_awqs_order_makes_of_them():
    for name, order in statistics.ORDERS.items():
        columns = [int(digit) for digit in name.split()]
        word = packing.pack_rows(torch.tensor([columns]), 4)
        assert packing.unpack_awq(word)[:, 0].tolist() == list(order)


def test_too_little_to_tell_is_not_a_fault():
    """Noise that has nothing to do with each other: neither order is believed."""
    match = statistics.Match()
    generator = torch.Generator().manual_seed(0)
    match.add(torch.randn(64, 8, generator=generator), torch.randn(64, 8, generator=generator))
    assert match.best(+1) is None
    assert match.best(-1) is None
    offset = statistics.Offset([0.4, -0.9, 1.7, 0.1])
    assert offset.whole_steps is None


def in_tensor(name, change):
    def spoil(tensors, config):
        if name in tensors:
            tensors[name] = change(tensors[name])

    return spoil


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "model.norm.weight",
            lambda t: t.index_fill(0, torch.tensor([3]), float("nan")),
            "model.norm.weight: holds NaN or infinity",
        ),
        ("model.norm.weight", lambda t: t.bool(), "model.norm.weight: is stored as BOOL, wanted one of F64, F32, F16, BF16"),
        (f"{UP}.scales", lambda t: t.double(), f"{UP}: scales is torch.float64, wanted torch.float16 or"),
        (f"{UP}.scales", lambda t: t.to(torch.float8_e4m3fn), f"{UP}: scales is torch.float8_e4m3fn, wanted torch.float16 or"),
        (f"{UP}.g_idx", lambda t: t.float(), f"{UP}: g_idx is torch.float32, wanted torch.int32"),
    ],
)
def test_faults_in_any_tensor(spoiled, name, change, message):
    findings = spoiled("gptq", in_tensor(name, change)).findings
    assert len(findings) == 1
    assert str(findings[0]).startswith(message)
