"""labs inspect on what others wrote, AutoGPTQ and AutoAWQ by golden files and bitsandbytes live, and on what is no checkpoint."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import suppress

import pytest
import torch
from interop import golden, pack, tiny
from safetensors.torch import load_file, save_file
from test_checkpoint import make, run
from typer.testing import CliRunner

from labsupport import checkpoint
from labsupport.checkpoint import CheckpointError, statistics
from labsupport.cli import app
from labsupport.model import models
from labsupport.quant import packing, rtn

pytestmark = pytest.mark.slow

PLAIN = tuple(range(8))


def write(directory, config, tensors, file="model.safetensors"):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / file)
    return directory


def by_autoawq(directory, name, change=lambda key, tensor: tensor):
    """A whole model that AutoAWQ 0.2.9 made, laid out as it lays it out."""
    model = golden.read_awq()[name]
    chosen = next(chosen for chosen in model.results if chosen.quantize)
    found = model.results[chosen].tensors
    packed = {key.replace("/", "."): tensor for key, tensor in found.items() if key.endswith(("/qweight", "/qzeros", "/scales"))}
    linears = {key.rpartition(".")[0] for key in packed}
    rest = {key: value.half() for key, value in tiny.floats(model.weights).items() if key.removesuffix(".weight") not in linears}
    settings = {"bits": 4, "group_size": chosen.group_size, "modules_to_not_convert": None, "quant_method": "awq"}
    config = tiny.SHAPES[name].config | {"quantization_config": settings | {"version": "gemm", "zero_point": True}}
    return write(directory, config, {key: change(key, tensor) for key, tensor in (packed | rest).items()})


@pytest.mark.parametrize("name", list(tiny.SHAPES))
def test_a_model_by_autoawq_is_right(tmp_path, name):
    found = checkpoint.inspect(by_autoawq(tmp_path / "model", name))
    assert found.findings == []
    assert found.linears == len(models.linears(checkpoint.load(tmp_path / "model")[0]))
    known = " ".join(found.known)
    assert "one too high or low would show as a whole step" in known
    assert "order of outputs in a word" in known


def test_a_model_by_autoawq_with_its_words_in_plain_order(tmp_path):
    def change(key, tensor):
        if not key.endswith(("qweight", "qzeros")):
            return tensor
        return packing.pack_rows(packing.unpack_awq(tensor).t().reshape(-1, 8)[:, PLAIN], 4).view(tensor.shape)

    findings = checkpoint.inspect(by_autoawq(tmp_path / "model", "gqa", change)).findings
    assert [finding.where for finding in findings] == ["qweight", "qzeros"]
    assert "nibbles stand in order 0 1 2 3 4 5 6 7, not 0 2 4 6 1 3 5 7" in findings[0].message


@pytest.mark.parametrize(("by", "way"), [(1, "high"), (-1, "low")])
def test_a_model_by_autoawq_with_its_zero_points_off(tmp_path, by, way):
    def change(key, tensor):
        return packing.pack_awq(packing.unpack_awq(tensor).int() + by & 15) if key.endswith("qzeros") else tensor

    (finding,) = checkpoint.inspect(by_autoawq(tmp_path / "model", "gqa", change)).findings
    assert finding.message.startswith(f"are read 1 too {way}")


def by_autogptq(directory, case, **changes):
    """A block whose keys and values AutoGPTQ 0.7.1 packed, the rest as it was, under the file name that it gives."""
    packed, generator = pack.read()[case], torch.Generator().manual_seed(0)
    block = "model.layers.0."
    tensors = {f"{block}self_attn.{name}.{part}": value for name in ("k_proj", "v_proj") for part, value in packed.items()}
    shapes = {
        "self_attn.q_proj": (96, 96), "self_attn.o_proj": (96, 96), "mlp.gate_proj": (64, 96), "mlp.up_proj": (64, 96),
        "mlp.down_proj": (96, 64),
    }  # fmt: skip
    tensors |= {f"{block}{name}.weight": torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}
    norms = (f"{block}input_layernorm", f"{block}post_attention_layernorm", "model.norm")
    tensors |= {f"{name}.weight": torch.ones(96).half() for name in norms}
    tensors["model.embed_tokens.weight"] = torch.randn(48, 96, generator=generator).half()
    settings = {
        "bits": case.bits, "group_size": pack.GROUP, "damp_percent": 0.01, "desc_act": case.order, "static_groups": False,
        "sym": case.symmetric, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None,
        "quant_method": "gptq", "checkpoint_format": "gptq",
    }  # fmt: skip
    config = {
        "model_type": "llama", "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 48, "tie_word_embeddings": True,
        "quantization_config": settings | changes,
    }  # fmt: skip
    return write(directory, config, tensors, f"gptq_model-{case.bits}bit-{pack.GROUP}g.safetensors")


BY_AUTOGPTQ = [case for case in pack.KEPT if case.peer == "autogptq" and not case.zero]


@pytest.mark.parametrize("case", BY_AUTOGPTQ, ids=lambda case: case.name)
def test_layers_by_autogptq_are_right(tmp_path, case):
    found = checkpoint.inspect(by_autogptq(tmp_path / "model", case))
    assert found.findings == []
    assert found.linears == 2
    if case.symmetric:
        assert any("all read as" in line for line in found.known)
    else:  # its codes are chance: they say nothing of their zero-points, and few groups are no evidence
        assert any("whether zero-points are one off" in line for line in found.unknown)
    model, _ = checkpoint.load(tmp_path / "model")
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight, pack.tensor(case).dequantize())


def test_symmetric_layers_by_autogptq_under_the_wrong_version(tmp_path):
    case = pack.Case("autogptq", 4, symmetric=True)
    (finding,) = checkpoint.inspect(by_autogptq(tmp_path / "model", case, checkpoint_format="gptq_v2")).findings
    assert finding.certain
    assert "all are stored as 7, symmetric gptq_v2 files store 8: each weight is read 1 step off" in finding.message
    assert "That is what version 1 (gptq) stores: the file has the wrong label" in finding.message


def test_what_autogptq_makes_of_a_zero_point_of_0_is_found(tmp_path):
    found = checkpoint.inspect(by_autogptq(tmp_path / "model", pack.Case("autogptq", 4, zero=True)))
    (finding,) = found.findings
    assert "are 0, stored as 15, which AutoGPTQ's and other kernels read as 16" in finding.message


def test_an_order_of_columns_that_the_config_denies(tmp_path):
    case = pack.Case("autogptq", 4, order=True)
    (finding,) = checkpoint.inspect(by_autogptq(tmp_path / "model", case, desc_act=False)).findings
    assert "desc_act is False, and 2 linears have groups out of order" in finding.message


def test_several_files_and_no_index(tmp_path):
    directory = by_autogptq(tmp_path / "model", BY_AUTOGPTQ[0])
    shutil.copy(next(directory.glob("*.safetensors")), directory / "another.safetensors")
    (finding,) = checkpoint.inspect(directory).findings
    assert "holds no weights: wanted model.safetensors or model.safetensors.index.json" in finding.message


def test_an_index_of_another_name(tmp_path):
    directory = by_autogptq(tmp_path / "model", BY_AUTOGPTQ[0])
    whole = next(directory.glob("*.safetensors"))
    tensors, placed = load_file(whole), {}
    for number, names in enumerate((sorted(tensors)[:5], sorted(tensors)[5:])):
        save_file({name: tensors[name] for name in names}, directory / f"gptq_model-{number}.safetensors")
        placed |= dict.fromkeys(names, f"gptq_model-{number}.safetensors")
    whole.unlink()
    (directory / "gptq_model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert checkpoint.inspect(directory).findings == []


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("fp4", False)])
def test_a_model_by_bitsandbytes(source, tmp_path, kind, double):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from labsupport.model import peers

    peers.bitsandbytes()
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=asked, device_map="cpu", dtype=torch.float16)
    theirs.save_pretrained(tmp_path / "model")
    found = checkpoint.inspect(tmp_path / "model")
    assert found.findings == []
    assert found.linears == 7
    assert found.settings["group size"] == kind
    assert any("measure perplexity" in line for line in found.unknown)


def test_a_head_that_is_packed_too(tmp_path):
    """As gptqmodel does when asked."""
    out = run(make(tmp_path / "source", tie_word_embeddings=False, num_hidden_layers=1), tmp_path / "out", "rtn")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    path = out / index["weight_map"]["lm_head.weight"]
    tensors = load_file(path)
    packed = packing.write_gptq(rtn.quantize(tensors.pop("lm_head.weight").float(), 4, 32))
    tensors |= {f"lm_head.{part}": value for part, value in packed.items()}
    save_file(tensors, path)
    placed = {name: file for name, file in index["weight_map"].items() if name != "lm_head.weight"}
    placed |= {name: path.name for name in tensors}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    found = checkpoint.inspect(out)
    assert found.findings == []
    assert found.linears == 8


# What is no checkpoint ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": "4"}, "has bits '4', the gptq layout has 2, 3, 4, 8"),
        ({"bits": 0}, "has bits 0, the gptq layout has 2, 3, 4, 8"),
        ({"bits": []}, r"has bits \[\], the gptq layout has 2, 3, 4, 8"),
        ({"bits": 5}, "has bits 5, the gptq layout has 2, 3, 4, 8"),
        ({"bits": 8, "quant_method": "awq", "version": "gemm"}, "has bits 8, the awq layout has 4"),
        ({"group_size": "128"}, "has group_size '128', wanted a positive whole number, or -1"),
        ({"group_size": 0}, "has group_size 0, wanted a positive whole number, or -1"),
        ({"checkpoint_format": ["gptq"]}, r"has checkpoint_format \['gptq'\], wanted gptq or gptq_v2"),
        ({"quant_method": None}, "has quant_method None, wanted gptq, awq, bitsandbytes or compressed-tensors"),
    ],
)
def test_settings_that_no_checkpoint_has(tmp_path, settings, message):
    directory = by_autogptq(tmp_path / "model", BY_AUTOGPTQ[0], **settings)
    for look in (checkpoint.inspect, checkpoint.load):
        with pytest.raises(CheckpointError, match=message):
            look(directory)


def plain_model(directory):
    make(directory, num_hidden_layers=1)


def older(directory):
    plain_model(directory)
    (directory / "quantize_config.json").write_text("{}")


def no_config(directory):
    directory.mkdir()
    (directory / "photo.jpg").write_bytes(b"")


def only_pickles(directory):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    (directory / "pytorch_model.bin").write_bytes(b"not even a pickle")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (plain_model, "is not a quantized checkpoint: config.json has no quantization_config\n"),
        (older, "config.json has no quantization_config (quantize_config.json is there, which only older loaders read)"),
        (no_config, "thing holds no config.json"),
        (lambda directory: directory.write_text("x"), "thing is not a directory"),
        (lambda directory: None, "thing is not a directory"),
        (only_pickles, "FAULT pytorch_model.bin: is a pickle, which can run code when it is loaded; it was not read"),
        (only_pickles, "holds its weights as pickles (pytorch_model.bin), which can run code: wanted safetensors"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_words(tmp_path, made, message):
    made(tmp_path / "thing")
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "thing")], catch_exceptions=False)
    assert done.exit_code == 1
    assert message in done.output


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    return [run(source, folder / name, method, layout=name) for name, method in
            (("gptq", "rtn"), ("awq", "rtn"), ("bitsandbytes", "nf4"))]  # fmt: skip


DTYPES = [torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8, torch.int8, torch.bool, torch.bfloat16]
CHANGES = [
    lambda tensor, dice: tensor.to(dice.choice(DTYPES)),
    lambda tensor, dice: tensor[:-1] if tensor.ndim and len(tensor) > 1 else tensor,
    lambda tensor, dice: tensor.flatten(),
    lambda tensor, dice: tensor[None],
    lambda tensor, dice: tensor[:0],
    lambda tensor, dice: torch.zeros_like(tensor),
    lambda tensor, dice: (torch.rand(tensor.shape) * 1000 - 500).to(tensor.dtype),
    lambda tensor, dice: tensor.t() if tensor.ndim == 2 else tensor.flip(0),
    lambda tensor, dice: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else ~tensor,
]


@pytest.mark.parametrize("seed", range(60))
def test_no_damage_to_a_tensor_makes_it_fail_otherwise(written, tmp_path, seed):
    """Whatever one tensor is changed to: findings, or one clear error, and the same for reading the model."""
    dice = random.Random(seed)
    directory = shutil.copytree(dice.choice(written), tmp_path / "copy")
    path = dice.choice(sorted(directory.glob("*.safetensors")))
    tensors = load_file(path)
    name = dice.choice(sorted(tensors))
    tensors[name] = dice.choice(CHANGES)(tensors[name], dice).contiguous().clone()
    save_file(tensors, path)
    assert list(checkpoint.inspect(directory).lines())
    with suppress(CheckpointError):
        checkpoint.load(directory)


def test_few_groups_are_no_evidence():
    generator = torch.Generator().manual_seed(0)
    few, many = statistics.Offset(), statistics.Offset()
    for offset, groups in ((few, 4), (many, 400)):
        weight = torch.randn(16, groups * 32, generator=generator)
        tensor = rtn.quantize(weight, 4, 32)
        means, _ = statistics.group_means(tensor)
        away = 6 * torch.randn(means.shape, generator=generator)  # zero-points that have nothing to do with the codes
        away -= away.mean() - 1
        offset.add(tensor, means + away)
    assert abs(few.middle - 1) < 0.2
    assert few.error > 0.125
    assert few.whole_steps is None
    assert many.whole_steps == 1
