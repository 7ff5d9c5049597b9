"""What is not in the blocks: a head that the config calls tied, linears, the files of a tokenizer, code that is never run."""

from __future__ import annotations

import json
import shutil

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import GROUP, WORDS, change_config, make, run, shards
from transformers import AutoModelForCausalLM

from labsupport import checkpoint, quantize_model
from labsupport.checkpoint import CheckpointError
from labsupport.model import evaluate, models, text
from labsupport.quant import packing, rtn

pytestmark = pytest.mark.slow

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.arange(10, 40)[None]


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / "tied", num_hidden_layers=1)


def with_head(source, directory, head):
    """A copy of a tied model in one file, with a head beside the embedding."""
    shutil.copytree(source, directory)
    tensors = {name: tensor for path in shards(directory) for name, tensor in load_file(path).items()}
    for path in (*shards(directory), directory / "model.safetensors.index.json"):
        path.unlink()
    tensors[HEAD] = head(tensors[EMBEDDING])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def other_head(embedding):
    return (torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1)) * 0.05).half()


@pytest.fixture(scope="module")
def untied(tied, tmp_path_factory):
    return with_head(tied, tmp_path_factory.mktemp("models") / "untied", other_head)


def with_rounded_linears(model, directory):
    """The logits of a model with its linears as a checkpoint stores them: what is right."""
    for name, tensor in checkpoint.read(directory).tensors():
        model.get_submodule(name).weight.data.copy_(tensor.dequantize())
    with torch.no_grad():
        return model(input_ids=IDS).logits


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("writer", ["labs quantize", "save", "save without source"])
def test_a_head_that_the_config_calls_tied_is_kept(untied, tmp_path, writer):
    """transformers keeps both where they differ."""
    out = tmp_path / "out"
    model, _ = models.load_model(str(untied), device="cpu")
    assert model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    if writer == "labs quantize":
        run(untied, out, "rtn")
    else:
        stored = {}
        quantized, _ = quantize_model(model, "rtn", stored=stored, group_size=GROUP)
        checkpoint.save(quantized, stored, out, "gptq", untied if writer == "save" else None)
    assert torch.equal(checkpoint.read(out).weights[HEAD], load_file(untied / "model.safetensors")[HEAD])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    loaded, _ = checkpoint.load(out)
    # The same values in the same operations: equal but for the order of sums, which the shape alone decides.
    assert torch.allclose(logits(loaded), with_rounded_linears(model, out), atol=1e-6)
    assert not checkpoint.inspect(out).findings


def test_perplexity_before_is_that_of_the_model_as_transformers_loads_it(untied, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "documents", lambda domain="code", split="heldout": [text.Document("words", WORDS)])
    out = run(untied, tmp_path / "out", "rtn", windows=2)
    model, tokenizer = models.load_model(str(untied), device="cpu")
    before = json.loads((out / "quantization_report.json").read_text())["perplexity"]["before"]
    assert before == pytest.approx(evaluate.perplexity(model, text.load_text(tokenizer), 48, 2), rel=1e-6)


def test_equal_values_stay_tied(tied, tmp_path):
    for name, head in (("half", torch.clone), ("wide", lambda embedding: embedding.float())):
        out = run(with_head(tied, tmp_path / name, head), tmp_path / f"{name}-out", "rtn")
        assert HEAD not in checkpoint.read(out).weights
        model, _ = checkpoint.load(out)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_checkpoint_whose_config_ties_what_differs(untied, tmp_path):
    """As another tool may have written it, or an older labs quantize: read with its head, and named by inspect."""
    out = run(untied, tmp_path / "out", "rtn")
    right, _ = checkpoint.load(out)
    change_config(out, tie_word_embeddings=True)
    loaded, _ = checkpoint.load(out)
    assert torch.equal(logits(loaded), logits(right))
    found = [str(finding) for finding in checkpoint.inspect(out).findings]
    assert found == [
        f"config.json: ties {HEAD} to {EMBEDDING}, and the files hold different values: a loader that goes by the config drops one"
    ]


def test_a_packed_head_is_not_the_embedding(untied, tmp_path):
    """As gptqmodel packs one. A config that still ties them says what cannot be."""
    out = run(untied, tmp_path / "out", "rtn")
    change_config(out, tie_word_embeddings=True)
    tensors = {name: tensor for path in shards(out) for name, tensor in load_file(path).items()}
    for path in (*shards(out), out / "model.safetensors.index.json"):
        path.unlink()
    packed = rtn.quantize(tensors.pop(HEAD).float(), 4, GROUP)
    tensors |= {f"lm_head.{part}": value for part, value in packing.write_gptq(packed).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    model, _ = checkpoint.load(out)
    assert torch.equal(model.lm_head.weight, packed.dequantize())
    assert torch.equal(model.model.embed_tokens.weight, tensors[EMBEDDING].float())


@pytest.mark.parametrize(("method", "layout", "key"), [
    ("nf4", "bitsandbytes", "llm_int8_skip_modules"), ("rtn", "awq", "modules_to_not_convert"),
])  # fmt: skip
def test_linears_beside_the_blocks_are_named_in_the_config(tmp_path, method, layout, key):
    """OPT-350m's projections: transformers would make 4-bit layers of their float weights."""
    model = architectures.make("opt-350m")
    model.save_pretrained(tmp_path / "opt")
    out = run(tmp_path / "opt", tmp_path / "out", method, layout=layout)
    skipped = checkpoint.read(out).quantization[key]
    assert set(skipped) == {"model.decoder.project_in", "model.decoder.project_out", "lm_head"}
    if method == "nf4":
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16, device_map="cpu")
        mine, _ = checkpoint.load(out)
        for name in ("project_in", "project_out"):
            assert type(theirs.model.decoder.get_submodule(name)) is torch.nn.Linear
            assert torch.equal(
                theirs.model.decoder.get_submodule(name).weight.float(), mine.model.decoder.get_submodule(name).weight
            )


def test_all_files_of_a_tokenizer_travel(tied, tmp_path):
    source = shutil.copytree(tied, tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tool_use.jinja", "chat_template.jinja", "preprocessor_config.json", "vocab.bpe"):
        (source / name).write_text(f"{{}} {name}")
    (source / "additional_chat_templates" / "code.py").write_text("raise SystemExit")
    out = run(source, tmp_path / "out", "rtn")
    for name in ("additional_chat_templates/tool_use.jinja", "chat_template.jinja", "preprocessor_config.json", "vocab.bpe"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not list(out.rglob("*.py"))


def test_no_code_from_a_model_directory_runs(tied, tmp_path, monkeypatch):
    """Even where somebody would answer y to transformers' question."""
    source, mark = shutil.copytree(tied, tmp_path / "source"), tmp_path / "ran"
    (source / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    change_config(source, auto_map={"AutoConfig": "code.A", "AutoModelForCausalLM": "code.B"}, model_type="unknown-to-all")
    path = source / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["code.C", "code.C"]}, "tokenizer_class": "C"}
    path.write_text(json.dumps(settings))
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with pytest.raises(CheckpointError, match="unknown-to-all"):
        run(source, tmp_path / "out", "rtn")
    with pytest.raises(ValueError, match="unknown-to-all', which brings code of its own, and that is never run"):
        models.load_model(str(source), device="cpu")
    change_config(source, model_type="llama")
    words = tmp_path / "words.txt"
    words.write_text(WORDS)
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* contains custom code"):
        run(source, tmp_path / "out", "gptq", words)
    assert not mark.exists()
    assert not asked
