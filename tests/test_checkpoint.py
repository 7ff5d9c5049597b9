"""Checkpoints: the streamed codes are quantize_model's, what is written reads back, and what cannot be done is one clear line."""

from __future__ import annotations

import errno
import json
import shutil

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from labsupport import checkpoint, quantize_model
from labsupport.checkpoint import CheckpointError, card, layouts, parts, weights
from labsupport.checkpoint.measure import evaluate_streamed
from labsupport.checkpoint.skeleton import Skeleton
from labsupport.cli import app
from labsupport.model import evaluate, files, models, text
from labsupport.pipeline import calibrate
from labsupport.pipeline.methods import stored_methods
from labsupport.quant import gptq, packing, rtn

pytestmark = pytest.mark.slow

TEXTS = {"samples": 3, "length": 48, "windows": 0}
GROUP = 32
WORDS = "def f(x):\n    return x + 1\n\nA longer line of prose, so that there is something to read.\n" * 60


def make(directory, **changes):
    """A tiny Llama with grouped queries and biases, in float16, in several files, with the course model's tokenizer."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True, "attention_bias": True,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    } | changes  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 8)
    model.half().save_pretrained(directory, max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(models.course_model_dir() / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(source, tmp_path):
    return shutil.copytree(source, tmp_path / "copy")


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return path


def run(source, out, method, words=None, **settings):
    return checkpoint.quantize(source, out, method, calibration=str(words), **{"group_size": GROUP, **TEXTS, **settings})


def in_memory(source, method, words, **settings):
    """quantize_model on the same model, text and settings; and what it stored."""
    model, tokenizer = models.load_model(str(source), device="cpu")
    given, stored = {}, {}
    if method in ("gptq", "awq"):
        stream = text.tokenize(tokenizer, [text.Document("words.txt", words.read_text())], "words")
        given = {"calibration": calibrate.windows(stream, TEXTS["samples"], TEXTS["length"])}
    quantized, _ = quantize_model(model, method, stored=stored, **given, **settings)
    return quantized, stored


CASES = [
    ("rtn", {"bits": 4}, "gptq"),
    ("rtn", {"bits": 8, "symmetric": True}, "gptq"),
    ("rtn", {"bits": 4}, "awq"),
    ("gptq", {"bits": 4, "symmetric": True}, "gptq"),
    ("gptq", {"bits": 3, "static_groups": False, "token_weights": "even"}, "gptq"),
    ("gptq", {"bits": 2, "act_order": True, "static_groups": True}, "gptq_v2"),
    ("awq", {"bits": 4}, "awq"),
    ("awq", {"bits": 3}, "gptq"),
    ("nf4", {"double_quant": True}, "bitsandbytes"),
    ("nf4", {"double_quant": False}, "bitsandbytes"),
]


@pytest.mark.parametrize(("method", "settings", "layout"), CASES, ids=lambda value: str(value))
def test_streamed_codes_are_those_of_quantize_model(source, words, tmp_path, method, settings, layout):
    size = {"block_size": GROUP} if method == "nf4" else {"group_size": GROUP}
    settings = {**stored_methods()[method].settings, **settings}
    model, stored = in_memory(source, method, words, **settings, **size)
    out = run(source, tmp_path / "out", method, words, layout=layout, **settings)
    found = checkpoint.read(out)
    assert found.layout == layout
    assert set(found.names) == stored.keys() == models.linears(model).keys()
    for name, tensor in found.tensors():
        assert torch.equal(tensor.dequantize(), stored[name].dequantize()), name
        assert torch.equal(packing.groups_of(tensor), packing.groups_of(stored[name])) if layout != "bitsandbytes" else True
    # And the files that save makes of the model in memory hold the same.
    other = checkpoint.save(model, stored, tmp_path / "other", layout, source)
    one, two = (checkpoint.read(path).weights for path in (out, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    loaded, tokenizer = checkpoint.load(out)
    assert tokenizer is not None
    ids = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, mine = (m(input_ids=ids).logits for m in (model, loaded))
    # All that differs is that AWQ's folded norms and biases are stored in float16.
    assert torch.allclose(mine, theirs, atol=2e-3 if method == "awq" else 1e-6)
    assert not out.with_name("out.partial").exists()


def test_config_says_what_each_loader_asks_for(source, words, tmp_path):
    def write_and_read_config(name, method, **settings):
        out = run(source, tmp_path / name, method, words, **settings)
        config = json.loads((out / "config.json").read_text())
        assert config.get("torch_dtype", config.get("dtype")) == "float16"
        assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        assert (out / "generation_config.json").exists()
        return out, config["quantization_config"]

    out, config = write_and_read_config("a", "gptq", symmetric=True)
    wanted = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
    assert wanted.items() <= config.items()
    assert wanted.items() <= json.loads((out / "quantize_config.json").read_text()).items()
    assert write_and_read_config("b", "gptq", act_order=True, static_groups=False, layout="gptq_v2")[1].items() >= {
        "desc_act": True, "sym": False, "checkpoint_format": "gptq_v2",
    }.items()  # fmt: skip
    assert not write_and_read_config("c", "gptq", act_order=True, static_groups=True)[1]["desc_act"]
    assert write_and_read_config("d", "rtn", group_size=-1)[1]["group_size"] == -1
    out, config = write_and_read_config("e", "awq")
    assert {"quant_method": "awq", "version": "gemm", "zero_point": True, "bits": 4, "group_size": 32}.items() <= config.items()
    assert json.loads((out / "quant_config.json").read_text())["q_group_size"] == 32
    config = write_and_read_config("f", "nf4", group_size=64)[1]
    assert {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}.items() <= config.items()


def test_nf4_is_what_transformers_loads(source, tmp_path):
    from transformers import AutoModelForCausalLM

    from labsupport.model import peers

    functional = peers.bitsandbytes().functional
    out = run(source, tmp_path / "out", "nf4", group_size=32)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16, device_map="cpu").train()  # eval may repack them
    mine, _ = checkpoint.load(out)
    for name, layer in models.linears(mine).items():
        packed = theirs.get_submodule(name).weight
        read = functional.dequantize_4bit(packed.data, packed.quant_state)
        assert torch.equal(read, layer.weight.half()), name
    others = {name: value for name, value in theirs.state_dict().items() if "_proj.weight" not in name}
    assert all(torch.equal(value.float(), mine.state_dict()[name]) for name, value in others.items())


def test_the_card_counts_what_is_stored_and_says_the_measured_perplexity(source, tmp_path, monkeypatch):
    documents = [text.Document("a", WORDS), text.Document("b", WORDS[::-1])]
    monkeypatch.setattr(text, "documents", lambda domain="code", split="heldout": documents)
    out = checkpoint.quantize(source, tmp_path / "out", "rtn", group_size=GROUP, length=48, windows=4)
    report, card = json.loads((out / "quantization_report.json").read_text()), (out / "README.md").read_text()
    model, tokenizer = checkpoint.load(out)
    original, _ = models.load_model(str(source), device="cpu")
    held_out = text.load_text(tokenizer)
    for name, m in (("before", original), ("after", model)):
        assert report["perplexity"][name] == pytest.approx(evaluate.perplexity(m, held_out, 48, 4), rel=1e-6)
    before, after = report["perplexity"]["before"], report["perplexity"]["after"]
    assert before != after
    assert f"Perplexity {after:.4f}, unquantized {before:.4f} ({100 * (after / before - 1):+.2f} %), on 4 windows of 48" in card
    assert all(f"| {kind} | {size:,} |" in card for kind, size in report["bytes"].items())
    assert "| bits | 4 |\n" in card
    assert f"| group size | {GROUP} |\n" in card
    tensors = {name: value for path in out.glob("*.safetensors") for name, value in load_file(path).items()}
    assert sum(report["bytes"].values()) == sum(tensor.nbytes for tensor in tensors.values())
    index = json.loads((out / weights.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(report["bytes"].values())
    assert set(index["weight_map"]) == set(tensors)
    quantized = sum(layer.weight.numel() for layer in models.linears(original).values())
    parts_of = [value.nbytes for name, value in tensors.items() if name.rpartition(".")[2] in layouts.PARTS]
    assert report["bits_per_weight"] == pytest.approx(8 * sum(parts_of) / quantized)
    assert f"{report['bits_per_weight']:.3f} bits for each of {quantized:,} quantized weights" in card
    assert report["layers"].keys() == models.linears(original).keys()


def test_evaluation_block_by_block_is_the_same(source):
    model, tokenizer = models.load_model(str(source), device="cpu")
    stream = text.tokenize(tokenizer, [text.Document("a", WORDS)], "words")
    skeleton = Skeleton(source)
    streamed = evaluate_streamed(skeleton.model, skeleton, stream, 48, 6)
    assert torch.equal(streamed.loss, evaluate.evaluate(model, stream, 48, 6).loss)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_zero_points_of_0_are_lifted_or_refused_in_version_1():
    """Readers of version 1 take a stored zero-point of 0 for 16."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[5, :32] = 0
    tensor = rtn.quantize(weight, 4, 32)
    assert (tensor.zero_point == 0).sum() == 3
    state = layouts.write("gptq", "layer", tensor)
    short = {key.removeprefix("layer."): value for key, value in state.items()}
    read = layouts.read("gptq", "layer", short, 4)
    assert (read.zero_point > 0).all()
    assert torch.equal(read.dequantize(), tensor.dequantize())
    weight[7, 32:] = weight[7, 32:].abs() + 0.1
    tensor = rtn.quantize(weight, 4, 32)
    with pytest.raises(CheckpointError, match="layer cannot be stored in the gptq layout: 1 of its groups hold no negative weight"):
        layouts.write("gptq", "layer", tensor)
    short = {key.removeprefix("layer."): value for key, value in layouts.write("gptq_v2", "layer", tensor).items()}
    assert torch.equal(layouts.read("gptq_v2", "layer", short, 4).dequantize(), tensor.dequantize())


class Stop(BaseException):
    """As abrupt as an exception can be."""


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_a_run_that_was_stopped_goes_on_and_ends_as_if_it_had_not(source, words, tmp_path, method, monkeypatch):
    whole = run(source, tmp_path / "whole", method, words)
    written, real = [], files.replace

    def stopping(path, *more, **named):
        if path.name == "block-001.json":
            raise Stop  # its tensors are written, its report is not
        real(path, *more, **named)

    monkeypatch.setattr(files, "replace", stopping)
    with pytest.raises(Stop):
        run(source, tmp_path / "out", method, words)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(files, "replace", lambda path, *more, **named: (written.append(path.name), real(path, *more, **named)))
    out = run(source, tmp_path / "out", method, words)
    assert not any("block-000" in name for name in written)
    assert "block-001.json" in written
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes() or path.name in ("README.md", "quantization_report.json"), path
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in out.iterdir())


def test_an_unfinished_run_with_other_settings_is_not_mixed_in(source, words, tmp_path, monkeypatch):
    real = parts.Parts.finish
    monkeypatch.setattr(parts.Parts, "finish", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        run(source, tmp_path / "out", "rtn")
    monkeypatch.setattr(parts.Parts, "finish", real)
    with pytest.raises(
        CheckpointError, match="holds an unfinished run with bits 4, asked for is 8: ask for that again, or start over"
    ):
        run(source, tmp_path / "out", "rtn", bits=8)
    run(source, tmp_path / "out", "rtn", bits=8, restart=True)
    assert checkpoint.read(tmp_path / "out").bits == 8


def test_two_runs_do_not_write_to_one_directory(source, tmp_path):
    one = parts.Parts(tmp_path / "out", {}, "gptq", ["model.layers.0"], 4, torch.float16)
    with pytest.raises(CheckpointError, match="another run is writing to"):
        parts.Parts(tmp_path / "out", {}, "gptq", ["model.layers.0"], 4, torch.float16)
    one.release()
    parts.Parts(tmp_path / "out", {}, "gptq", ["model.layers.0"], 4, torch.float16).release()


@pytest.mark.parametrize("at", ["model-00002-of-00004.safetensors", "block-000.json", "model.safetensors.index.json", "README.md"])
def test_a_full_disk_is_said_and_nothing_half_written(source, words, tmp_path, monkeypatch, at):
    real = files.replace
    kept = at != "block-000.json"  # before it nothing is finished

    def full(path, write, *more, **named):
        def writing(temporary):
            write(temporary)
            if path.name == at:
                temporary.write_bytes(temporary.read_bytes()[:7])
                raise OSError(errno.ENOSPC, "No space left on device")

        real(path, writing, *more, **named)

    monkeypatch.setattr(files, "replace", full)
    hint = "; finished blocks are kept" if kept else "$"
    with pytest.raises(CheckpointError, match=f"the disk is full: {at} could not be written. Make room and run again{hint}"):
        run(source, tmp_path / "out", "rtn", words)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert (tmp_path / "out.partial").exists() == kept
    monkeypatch.setattr(files, "replace", real)
    checkpoint.load(run(source, tmp_path / "out", "rtn", words))


def shards(directory):
    return sorted(directory.glob("*.safetensors"))


def change_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))


def truncated(directory):
    path = shards(directory)[1]
    path.write_bytes(path.read_bytes()[:-100])


def no_safetensors(directory):
    shards(directory)[1].write_bytes(b"hello" * 50)


def missing_shard(directory):
    shards(directory)[1].unlink()


def foreign_shard(directory):
    tensors = load_file(shards(directory)[1])
    save_file(tensors | {"model.layers.0.extra.weight": torch.zeros(2)}, shards(directory)[1])


def foreign_tensor(directory):
    foreign_shard(directory)
    index = json.loads((directory / weights.INDEX).read_text())
    index["weight_map"]["model.layers.0.extra.weight"] = shards(directory)[1].name
    (directory / weights.INDEX).write_text(json.dumps(index))


def moved_shard(directory):
    one, two = shards(directory)[:2]
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)


def missing_tensor(directory):
    index = json.loads((directory / weights.INDEX).read_text())
    file = directory / index["weight_map"].pop("model.norm.weight")
    (directory / weights.INDEX).write_text(json.dumps(index))
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)


def integers(directory):
    name = "model.norm.weight"
    file = directory / json.loads((directory / weights.INDEX).read_text())["weight_map"][name]
    save_file(load_file(file) | {name: torch.zeros(64, dtype=torch.int64)}, file)


def pickled(directory):
    for path in (*shards(directory), directory / weights.INDEX):
        path.unlink()
    torch.save({"a": torch.zeros(1)}, directory / "pytorch_model.bin")


def index_to_pickle(directory):
    index = json.loads((directory / weights.INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "pytorch_model.bin")
    (directory / weights.INDEX).write_text(json.dumps(index))


def index_outside(directory):
    index = json.loads((directory / weights.INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    (directory / weights.INDEX).write_text(json.dumps(index))


BAD = [
    (truncated, "model-00002-of-.*.safetensors is damaged or not safetensors"),
    (no_safetensors, "model-00002-of-.*.safetensors is damaged or not safetensors"),
    (missing_shard, "model-00002-of-.*.safetensors is missing in .*, and its index names it"),
    (foreign_shard, "holds model.layers.0.extra.weight, which the index does not name"),
    (foreign_tensor, "holds model.layers.0.extra.weight, which its config does not know"),
    (moved_shard, "is missing in .*, where the index places it"),
    (missing_tensor, "lacks model.norm.weight, which its config asks for"),
    (integers, "model.norm.weight is I64 in .*, wanted one of F64, F32, F16, BF16"),
    (pickled, r"holds its weights as pickles \(pytorch_model.bin\), which can run code: wanted safetensors"),
    (index_to_pickle, "names pytorch_model.bin, wanted .safetensors files only"),
    (index_outside, "has no weight_map from tensors to files beside it"),
    (lambda d: change_config(d, hidden_size=128), r"has shape \[.*\] in .*, its config asks for"),
    (lambda d: change_config(d, num_hidden_layers=4), "lacks model.layers.3.input_layernorm.weight and .* more"),
    (lambda d: change_config(d, num_hidden_layers=2), "holds model.layers.2.input_layernorm.weight and .* more"),
    (lambda d: change_config(d, model_type="gpt9"), "has model_type 'gpt9', of which no model can be made"),
    (lambda d: change_config(d, model_type="t5"), "has model_type 't5', of which no model can be made"),
    (lambda d: change_config(d, model_type=None), "names no model_type"),
    (lambda d: change_config(d, quantization_config={"quant_method": "gptq"}), "is quantized already"),
    (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
    (lambda d: (d / "config.json").write_text("[]"), "config.json holds a list, wanted an object"),
    (lambda d: (d / "config.json").unlink(), "holds no config.json"),
    (lambda d: (d / "tokenizer.json").unlink(), "holds no tokenizer"),
    (lambda d: (d / "tokenizer.json").write_text("{}"), "the tokenizer in .* cannot be read"),
    (lambda d: change_config(d, max_position_embeddings=40), "length is 48, wanted 2 to 40"),
    (lambda d: [path.unlink() for path in (*shards(d), d / weights.INDEX)], "holds no weights: wanted model.safetensors or"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_bad_source_is_refused_before_anything_is_written(copy, words, tmp_path, spoil, message):
    spoil(copy)
    with pytest.raises(CheckpointError, match=message):
        run(copy, tmp_path / "out", "gptq", words)
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "words.txt"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "method is 'magic', wanted one of rtn, nf4, gptq, awq"),
        ({"bits": 5}, "bits is 5, the gptq layout has 2, 3, 4, 8"),
        ({"method": "awq", "bits": 3}, "bits is 3, the awq layout has 4"),
        ({"method": "nf4", "bits": 3}, "bits is 3, nf4 has 4"),
        ({"method": "nf4", "group_size": 96}, "group_size is 96, nf4 has blocks of 32, 64"),
        ({"method": "nf4", "symmetric": True}, "symmetric is given, but nf4 has no such choice"),
        ({"method": "awq", "act_order": True}, "act_order is given, but awq has no such choice"),
        ({"method": "nf4", "layout": "awq"}, "format is 'awq', nf4 is stored as bitsandbytes"),
        ({"group_size": 64}, "group_size 64 does not divide in_features 96 of model.layers.0.mlp.down_proj"),
        ({"group_size": 0}, "group_size is 0, wanted a positive whole number, or -1"),
        ({"damping": -1.0}, "damping is -1.0, wanted 0 or more"),
        ({"dtype": "float8"}, "dtype is 'float8', wanted one of float16, bfloat16"),
        ({"samples": 10_000}, "fewer than the 10000 asked for"),
        ({"words": "no/such.txt"}, "the calibration text 'no/such.txt' does not exist"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(source, words, tmp_path, settings, message):
    given = {"method": "gptq", "words": words, **settings}
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", **given)
    assert {path.name for path in tmp_path.iterdir()} == {"words.txt"}


def test_shapes_that_the_layout_cannot_hold_are_refused_at_once(tmp_path):
    narrow = make(tmp_path / "narrow", intermediate_size=72, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="gate_proj has out_features 72, the gptq layout asks for a multiple of 32"):
        run(narrow, tmp_path / "out", "rtn", group_size=8)
    assert not list(tmp_path.glob("out*"))
    checkpoint.load(run(narrow, tmp_path / "out", "rtn", group_size=8, layout="awq"))


def test_weights_that_the_stored_dtype_cannot_hold(tmp_path):
    wide = make(tmp_path / "wide", num_hidden_layers=1)
    for path in shards(wide):
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][3] = 1e6
        save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match=r"model.norm.weight holds values up to 1e\+06, which torch.float16 does not: use bfloat16"
    ):
        run(wide, tmp_path / "out", "rtn")
    assert not (tmp_path / "out").exists()
    found = checkpoint.read(run(wide, tmp_path / "out", "rtn", dtype="bfloat16", restart=True))
    assert found.weights["model.norm.weight"].dtype == torch.bfloat16
    assert found.weights["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16


def test_without_text_no_tokenizer_is_needed(copy, tmp_path):
    (copy / "tokenizer.json").unlink()
    _, tokenizer = checkpoint.load(run(copy, tmp_path / "out", "rtn"))
    assert tokenizer is None


def test_pickles_beside_safetensors_are_neither_read_nor_copied(copy, tmp_path):
    (copy / "training_args.bin").write_bytes(b"not even a pickle")
    out = run(copy, tmp_path / "out", "rtn")
    assert not weights.pickles(out)


def test_an_output_directory_that_exists_is_left_alone(source, words, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    done = CliRunner().invoke(app, ["quantize", str(source), "--out", str(out), "--method", "rtn"])
    assert done.exit_code == 1
    assert f"labs quantize: {out} exists: choose another directory or remove it" in done.output.replace("\n", "")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_the_command_quantizes(source, words, tmp_path):
    out = tmp_path / "out"
    arguments = ["quantize", source, "--out", out, "--group-size", 32, "--samples", 2, "--length", 48, "--windows", 0]
    done = CliRunner().invoke(app, [str(a) for a in (*arguments, "--calibration", words, "--symmetric", "--no-static-groups")])
    assert done.exit_code == 0, done.output
    found = checkpoint.read(out)
    assert found.quantization["sym"]
    assert found.quantization["desc_act"]
    refused = CliRunner().invoke(app, [str(a) for a in ("quantize", tmp_path / "nothing", "--out", tmp_path / "x")])
    assert refused.exit_code == 1
    assert "neither a directory, nor an id as the hub has them" in refused.output


def eight_bits():
    return {"model.layers.0.mlp.up_proj": rtn.quantize(torch.randn(96, 64), 8, 32)}


def wide_scales(stored):
    return {name: rtn.quantize(torch.randn(tensor.shape), 4, 32, scale_dtype=torch.float32) for name, tensor in stored.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda stored: stored.pop("model.layers.1.mlp.up_proj"), "stored lacks model.layers.1.mlp.up_proj"),
        (lambda stored: stored.update(other=None), "stored holds other, which is no linear"),
        (lambda stored: stored.update(eight_bits()), "of several kinds"),
        (lambda stored: stored.update(wide_scales(stored)), "its scales are torch.float32, wanted torch.float16"),
    ],
)
def test_what_cannot_be_saved(source, tmp_path, spoil, message):
    model, stored = in_memory(source, "rtn", None, bits=4, group_size=32)
    spoil(stored)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(model, stored, tmp_path / "out", "gptq", source)
    assert not list(tmp_path.glob("out*"))


def test_a_model_in_memory_is_written_without_the_folder_that_it_came_from(source, tmp_path):
    model, stored = in_memory(source, "rtn", None, bits=4, group_size=32)
    assert model.config._name_or_path == str(source)
    out = checkpoint.save(model, stored, tmp_path / "out", "gptq")
    assert str(source) not in "".join(path.read_text() for path in out.glob("*.json"))


def test_stored_is_refused_where_there_is_nothing_to_give(source, tmp_path):
    model, _ = models.load_model(str(source), device="cpu")
    with pytest.raises(ValueError, match="stored is given beside method int8"):
        quantize_model(model, "int8", stored={})
    with pytest.raises(ValueError, match="stored is given beside keep"):
        quantize_model(model, "gptq", calibration=torch.zeros(1, 8, dtype=torch.int64), keep=tmp_path / "k", stored={})


def test_only_one_block_has_weights_at_a_time(source, words, monkeypatch, tmp_path):
    seen = []
    real = gptq.quantize

    def watched(weight, *arguments, **settings):
        alive = {name.rpartition(".layers.")[2][:1] for name, p in skeletons[0].model.named_parameters() if not p.is_meta}
        seen.append(alive)
        return real(weight, *arguments, **settings)

    skeletons = []
    init = Skeleton.__init__
    monkeypatch.setattr(Skeleton, "__init__", lambda self, *a: (skeletons.append(self), init(self, *a))[1])
    monkeypatch.setattr(gptq, "quantize", watched)
    run(source, tmp_path / "out", "gptq", words)
    assert seen == [{str(block)} for block in range(3) for _ in range(7)]


@pytest.mark.parametrize("name", ["falcon", "bloom", "gpt-j", "gpt-neo"])
def test_blocks_that_return_tuples_are_quantized_and_measured(name, words, tmp_path, monkeypatch):
    source = architectures.write(name, tmp_path / "model")
    monkeypatch.setattr(text, "documents", lambda domain="code", split="heldout": [text.Document("a", WORDS)])
    out = run(source, tmp_path / "out", "gptq", words, windows=2)
    report = json.loads((out / card.REPORT).read_text())
    original, tokenizer = models.load_model(str(source), device="cpu")
    held_out = text.load_text(tokenizer)
    assert report["perplexity"]["before"] == evaluate.perplexity(original, held_out, TEXTS["length"], 2)
    # What is not quantized is stored in float16, half a unit in the last place off: 2**-12 of each value.
    after = evaluate.perplexity(checkpoint.load(out)[0], held_out, TEXTS["length"], 2)
    assert report["perplexity"]["after"] == pytest.approx(after, rel=1e-3)


def test_a_measurement_that_fails_does_not_cost_the_checkpoint(source, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "documents", lambda domain="code", split="heldout": [text.Document("a", WORDS)])

    def fail(*_):
        raise IndexError("too many indices\nfor this tensor")

    monkeypatch.setattr("labsupport.checkpoint.run.evaluate_streamed", fail)
    arguments = [str(source), "--out", str(tmp_path / "out"), "--method", "rtn", "--group-size", "32", "--length", "48"]
    result = CliRunner().invoke(app, ["quantize", *arguments, "--windows", "2"])
    assert result.exit_code == 0
    assert "perplexity could not be measured: IndexError: too many indices\nwrote" in result.output
    assert "Perplexity could not be measured: IndexError: too many indices." in (tmp_path / "out" / "README.md").read_text()
    want, _ = in_memory(source, "rtn", None, group_size=GROUP)
    assert torch.equal(
        checkpoint.load(tmp_path / "out")[0].model.layers[0].mlp.up_proj.weight, want.model.layers[0].mlp.up_proj.weight
    )
