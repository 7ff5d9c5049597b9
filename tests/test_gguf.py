"""GGUF: blocks equal to those of llama.cpp's own package, and files that read back as they were written."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from labsupport import checkpoint, quantize_model
from labsupport.checkpoint import CheckpointError, gguf_file, layouts
from labsupport.model import gguf_llama, models
from labsupport.quant import gguf_blocks, gptq, rtn
from labsupport.quant.gguf_blocks import QUANTIZE, WEIGHTS

KINDS = list(WEIGHTS)


def theirs(kind):
    return gguf.GGMLQuantizationType[kind.upper()]


def weights():
    """Of many sizes; and rows of zeros, of -0, of one value, of one sign, with ties, so small that float16 scales are 0."""
    torch.manual_seed(0)
    weight = torch.randn(24, 512) * torch.exp(2 * torch.randn(24, 1))
    weight[0], weight[1], weight[2] = 0, -0.0, 0.25
    weight[3], weight[4] = weight[3].abs(), -weight[4].abs()
    weight[5] = torch.randint(-8, 9, (512,)) / 2
    weight[6], weight[7] = weight[6] * 1e-9, weight[7] * 1e-40
    weight[8, 7], weight[8, 40] = weight[8].abs().max() + 1, -weight[8].abs().max() - 2
    return weight


# Blocks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_bytes_are_those_of_ggufs_own_quantizer(kind):
    weight = weights()
    weight[7] = 0  # 1 / scale is infinity there, and gguf makes numbers of NaN
    assert np.array_equal(QUANTIZE[kind](weight).blocks.numpy(), gguf.quants.quantize(weight.numpy(), theirs(kind)))
    half = weight.half()
    assert torch.equal(QUANTIZE[kind](half).blocks, QUANTIZE[kind](half.float()).blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_ggufs_own_dequantizer(kind):
    tensor = QUANTIZE[kind](weights())
    assert tensor.shape == (24, 512)
    assert np.array_equal(tensor.dequantize().numpy(), gguf.quants.dequantize(tensor.blocks.numpy(), theirs(kind)))
    # and of any bytes at all, but for scales that are no numbers
    random = torch.randint(0, 256, tensor.blocks.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole = random.view(-1, gguf_blocks.BYTES[kind])
    whole[:, 1] &= 0x3B  # the exponents of d and m stay below the highest
    whole[:, 3] &= 0x3B
    read = gguf_blocks.read(random, kind).dequantize().numpy()
    assert np.array_equal(read, gguf.quants.dequantize(random.numpy(), theirs(kind)))


@pytest.mark.parametrize(("kind", "bits"), [("q8_0", 8.5), ("q4_0", 4.5), ("q4_1", 5.0), ("q4_k", 4.5)])
def test_bits_a_weight_count_every_byte(kind, bits):
    assert QUANTIZE[kind](torch.randn(4, 256)).bits_per_weight == bits
    assert gguf_blocks.BYTES[kind] == gguf.GGML_QUANT_SIZES[theirs(kind)][1]
    assert gguf_blocks.WEIGHTS[kind] == gguf.GGML_QUANT_SIZES[theirs(kind)][0]


def plain_q4_k(weight):
    """The simple one: each group's grid from its smallest to its largest weight, and no search."""
    groups = weight.view(-1, 8, 32)
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    return gguf_blocks._values_q4_k(gguf_blocks._pack_q4_k(groups, (high - low) / 15, -low)).view_as(weight)


def test_q4_k_loses_less_than_the_plain_range_in_every_block_and_than_q4_1():
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 0.02

    def losses(values):
        return (values - weight).view(-1, 256).pow(2).sum(1)

    found, plain = losses(QUANTIZE["q4_k"](weight).dequantize()), losses(plain_q4_k(weight))
    assert (found <= plain).all()
    assert found.sum() < 0.92 * plain.sum()  # 0.89 was seen: the search is worth a tenth
    assert found.sum() < losses(QUANTIZE["q4_1"](weight).dequantize()).sum()  # which stores half a bit more


@given(st.integers(0, 2**32 - 1), st.floats(-3, 3), st.floats(-2, 2))
def test_q4_k_is_never_off_by_more_than_its_grid_allows(seed, spread, shift):
    """The plain range is off by half a step of 1/15 of a range, and by what 6 bits make of scale and minimum.

    A scale is off by half of d = largest / 63 at most, times a code of 15, a minimum by half of m, and float16's 2**-11 of either
    comes on top: with R the largest range of the block (0 included) the squared error is at most 256 (R/30 + 15 R/(15*126) +
    R/126 + 4 R/2048)^2. What the search finds is no worse.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(1, 256, generator=generator) + shift) * 10**spread * torch.exp(torch.randn(1, 256, generator=generator))
    error = QUANTIZE["q4_k"](weight).dequantize() - weight
    groups = weight.view(8, 32)
    reach = (groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)).max()
    assert error.pow(2).sum() <= 256 * (reach * (1 / 30 + 1 / 126 + 1 / 126 + 4 / 2048)) ** 2


def test_six_bits_pack_as_gguf_reads_them():
    scales, minima = torch.randint(0, 64, (2, 50, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = gguf_blocks._pack_six(scales, minima)
    assert all(torch.equal(a, b) for a, b in zip(gguf_blocks._unpack_six(packed), (scales, minima), strict=True))
    read = gguf.quants.Q4_K.get_scale_min(packed.numpy())
    assert np.array_equal(read[0], scales.numpy())
    assert np.array_equal(read[1], minima.numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.randn(4, 48), ValueError, "in_features 48 is not a multiple of "),
        (torch.full((1, 256), torch.nan), ValueError, "weight holds NaN"),
        (torch.full((1, 256), 1e9), ValueError, "more than float16 holds"),
        (torch.randn(256), ValueError, "weight has shape"),
        (torch.ones(1, 256, dtype=torch.int32), TypeError, "weight"),
    ],
)
def test_what_cannot_be_rounded_is_refused(kind, weight, error, message):
    with pytest.raises(error, match=message):
        QUANTIZE[kind](weight)


def test_blocks_that_cannot_be_read_are_refused():
    blocks = QUANTIZE["q4_1"](torch.randn(2, 64)).blocks
    for bad, kind, message in (
        (blocks, "q4_0", "blocks has shape"),
        (blocks[0], "q4_1", "blocks has shape"),
        (blocks, "q6_k", "kind is 'q6_k'"),
    ):
        with pytest.raises(ValueError, match=message):
            gguf_blocks.read(bad, kind)
    blocks[1, 22:24] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # m of the last block is infinity
    with pytest.raises(ValueError, match="1 of its 4 q4_1 blocks have a scale or minimum that is NaN or infinity"):
        gguf_blocks.read(blocks, "q4_1")


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_grids_in_groups_of_32_are_blocks_exactly(bits):
    tensor = rtn.quantize(torch.randn(6, 128), bits, 32, symmetric=True)
    blocks = gguf_blocks.of_uniform(tensor)
    assert blocks.kind == {4: "q4_0", 8: "q8_0"}[bits]
    assert torch.equal(blocks.dequantize(), tensor.dequantize())
    assert np.array_equal(gguf.quants.dequantize(blocks.blocks.numpy(), theirs(blocks.kind)), tensor.dequantize().numpy())


def test_other_grids_are_no_blocks():
    weight, hessian = torch.randn(32, 128), torch.diag(torch.rand(128) + 1)
    for tensor in (rtn.quantize(weight, 4, 32), rtn.quantize(weight, 4, 64, True), rtn.quantize(weight, 3, 32, True)):
        with pytest.raises(ValueError, match="GGUF has blocks of 32 weights on symmetric grids of 4 or 8 bits, and this is"):
            gguf_blocks.of_uniform(tensor)
    scattered = gptq.quantize(weight, hessian, 4, 32, symmetric=True, act_order=True)
    with pytest.raises(ValueError, match="static groups"):
        gguf_blocks.of_uniform(scattered)
    with pytest.raises(ValueError, match=r"scales are torch.float32, wanted torch.float16"):
        gguf_blocks.of_uniform(rtn.quantize(weight, 4, 32, True, scale_dtype=torch.float32))


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama with grouped queries, float16, and the course model's tokenizer; more rows of the embedding than tokens."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {"vocab_size": 4100, "num_hidden_layers": 2, "max_position_embeddings": 64, "rope_parameters": {"rope_theta": 5e4}}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **settings, **ids, tie_word_embeddings=False)).half().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models.course_model_dir() / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    return checkpoint.quantize(source, tmp_path_factory.mktemp("out") / "q4_k", "q4_k", windows=0)


def in_memory(source, method, **settings):
    model, _ = models.load_model(str(source), device="cpu")
    stored = {}
    quantized, _ = quantize_model(model, method, stored=stored, **settings)
    return quantized, stored


def test_a_file_holds_the_model_and_reads_back(source, written):
    assert sorted(path.name for path in written.iterdir()) == ["README.md", "model.gguf", "quantization_report.json"]
    quantized, stored = in_memory(source, "q4_k")
    found = checkpoint.read(written)
    assert found.layout == "gguf"
    assert set(found.names) == stored.keys()
    for name, tensor in found.tensors():
        assert torch.equal(tensor.blocks, stored[name].blocks), name
    loaded, tokenizer = checkpoint.load(written)
    for name, value in quantized.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name  # norms and embedding were float16, and are so here
    original = models.load_model(str(source), device="cpu")[1]
    words = "def f(x):\n    return 12 <|endoftext|> naïve 🙂"
    assert tokenizer(words)["input_ids"] == original(words)["input_ids"]
    assert tokenizer.decode(tokenizer(words)["input_ids"]) == words


def test_transformers_reads_the_same_model_from_the_file(source, written):
    """Its own reader turns the rows of queries and keys back: they were turned when they were written."""
    theirs_ = LlamaForCausalLM.from_pretrained(written, gguf_file="model.gguf", dtype=torch.float32)
    ours, _ = checkpoint.load(written)
    assert theirs_.state_dict().keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(theirs_.state_dict()[name], value), name
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(theirs_(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-4)


def test_rows_of_queries_and_keys_go_there_and_back():
    weight = torch.arange(2 * 8)[:, None].repeat(1, 3)
    turned = gguf_llama.pairs_together(weight, 2)
    assert turned[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]  # i and i + head_dim / 2 side by side
    assert torch.equal(gguf_llama.halves_together(turned, 2), weight)


def test_the_card_counts_every_byte_and_inspect_finds_no_fault(written):
    for path in (written, written / "model.gguf"):
        found = checkpoint.inspect(path)
        assert found.findings == []
        assert found.linears == 14
        assert found.settings == {"blocks": "q4_k (14)"}
        assert found.bits_per_weight == 4.5
        assert found.nbytes == json.loads((written / "quantization_report.json").read_text())["bytes"]
    rows, width, norms = 4100, 256, 5
    assert found.nbytes == {
        "blocks of scales and codes": found.weights * 9 // 16,
        "not quantized": 2 * 2 * rows * width + 4 * norms * width,  # embedding and head in float16, norms in float32
    }
    assert "# tiny, Q4_K at 4 bits" in (written / "README.md").read_text()


def test_rows_without_a_token_are_said_to_be_unused(written):
    reader = gguf.GGUFReader(written / "model.gguf")
    tokens, types = (reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "token_type"))
    assert len(tokens) == len(types) == 4100
    assert tokens[0] == "<|endoftext|>"
    assert [types[0], types[1], types[4099]] == [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED]
    assert reader.get_field("tokenizer.ggml.pre").contents() == "gpt-2"
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is False
    assert reader.get_field("llama.rope.freq_base").contents() == 5e4


def test_symmetric_grids_are_stored_and_bfloat16_is_kept(source, tmp_path):
    out = checkpoint.quantize(source, tmp_path / "out", "rtn", layout="gguf", bits=8, dtype="bfloat16", windows=0)
    quantized, _ = in_memory(source, "rtn", bits=8, group_size=32, symmetric=True)
    found = checkpoint.read(out)
    assert {name.rpartition(".")[2] for name in found.weights if "_proj." in name} == {"q8_0"}
    assert found.weights.kind("lm_head.weight") == "BF16"
    loaded, _ = checkpoint.load(out)
    for name, value in quantized.state_dict().items():
        wanted = value if "_proj" in name else value.bfloat16().float()
        assert torch.equal(loaded.state_dict()[name], wanted), name
    model, stored = in_memory(source, "rtn", bits=8, group_size=32, symmetric=True)
    saved = checkpoint.save(model, stored, tmp_path / "saved", "gguf", source, dtype="bfloat16")
    assert all(torch.equal(checkpoint.read(saved).weights[name], found.weights[name]) for name in found.weights)
    with pytest.raises(CheckpointError, match="a GGUF file holds the tokenizer"):
        checkpoint.save(model, stored, tmp_path / "none", "gguf")


def test_digit_by_digit_is_what_smollm_is_called(source):
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}
    assert gguf_file._rule(tokenizer, source) == "smollm"


REFUSED = {
    "q4_k": ({"hidden_size": 288}, {}, "has in_features 288, the gguf layout asks for a multiple of 256: q8_0, q4_0 and q4_1"),
    "another model": ({"model_type": "qwen2"}, {}, "has model_type 'qwen2'; GGUF is written for plain Llamas"),
    "biases": ({"attention_bias": True}, {}, "has attention_bias True"),
    "scaled positions": ({"rope_parameters": {"rope_type": "llama3"}}, {}, "has rope_type 'llama3'"),
    "another tokenizer": ({}, {"pre_tokenizer": {"type": "Whitespace"}}, "GGUF is written for byte-level BPE"),
    "a normalizer": ({}, {"normalizer": {"type": "NFC"}}, "GGUF is written for byte-level BPE"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_is_not_written_for_is_refused(source, tmp_path, case):
    config, tokenizer, message = REFUSED[case]
    if "hidden_size" in config:
        with pytest.raises(CheckpointError, match=message):
            layouts.check("gguf", "a.b", (8, config["hidden_size"]), 4, 256)
        return
    kept = json.loads((source / "config.json").read_text()) | config
    kept_tokenizer = json.loads((source / "tokenizer.json").read_text()) | tokenizer
    (tmp_path / "tokenizer.json").write_text(json.dumps(kept_tokenizer))
    with pytest.raises(CheckpointError, match=message):
        gguf_file.check(kept, tmp_path)


def test_settings_that_no_block_has_are_refused(source, tmp_path):
    for settings, message in (
        ({"method": "rtn", "layout": "gguf", "symmetric": False}, "symmetric grids alone"),
        ({"method": "rtn", "layout": "gguf", "group_size": 64}, "group_size is 64, the gguf layout has 32"),
        ({"method": "rtn", "layout": "gguf", "bits": 3}, "bits is 3, the gguf layout has 4, 8"),
        ({"method": "q4_0", "bits": 8}, "bits is 8, q4_0 has 4"),
        ({"method": "q4_k", "group_size": 32}, "group_size is 32, q4_k has blocks of 256"),
        ({"method": "q8_0", "layout": "gptq"}, "format is 'gptq', q8_0 is stored as gguf"),
        ({"method": "gptq", "layout": "gguf", "static_groups": False}, "scatters groups over the row"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.quantize(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def spoiled(written, tmp_path, name, change):
    """The file with the bytes of one tensor changed in place."""
    path = shutil.copytree(written, tmp_path / "spoiled") / "model.gguf"
    place = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    with path.open("r+b") as stream:
        stream.seek(int(place.data_offset))
        stream.write(change)
    return path


def test_inspect_finds_what_llama_cpp_reads_without_a_word(written, tmp_path):
    infinite = spoiled(written, tmp_path, "blk.1.attn_q.weight", b"\x00\x7c")
    (finding,) = checkpoint.inspect(infinite).findings
    assert str(finding) == (
        "model.layers.1.self_attn.q_proj: 1 of its 256 q4_k blocks have a scale or minimum that is NaN or infinity"
    )
    with pytest.raises(CheckpointError, match=r"model.layers.1.self_attn.q_proj: 1 of its 256"):
        checkpoint.load(infinite)
    shutil.rmtree(infinite.parent)
    nan = spoiled(written, tmp_path, "output_norm.weight", b"\x00\x00\xc0\x7f")
    assert [str(finding) for finding in checkpoint.inspect(nan).findings] == ["model.norm.weight: holds NaN or infinity"]


def test_a_damaged_file_is_one_clear_line(written, tmp_path):
    path = tmp_path / "model.gguf"
    whole = (written / "model.gguf").read_bytes()
    for content in (b"", b"GGUF", whole[:2000], whole[:-70000], b"PK\x03\x04" + whole[4:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model.gguf is damaged or not GGUF"):
            checkpoint.load(path)
        (finding,) = checkpoint.inspect(path).findings
        assert "is damaged or not GGUF" in finding.message
        assert "\n" not in finding.message


def test_without_the_package_it_says_what_to_install(source, written, monkeypatch, tmp_path):
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    for attempt in (lambda: checkpoint.load(written), lambda: checkpoint.quantize(source, tmp_path / "x", "q4_0")):
        with pytest.raises(CheckpointError, match=r"pip install 'labsupport\[fetch\]'"):
            attempt()
    (finding,) = checkpoint.inspect(written).findings
    assert "labsupport[fetch]" in finding.message
