"""The capstone: what counts, what is refused, when one submission is better than another. The tricks are a cheat's."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from labsupport import checkpoint
from labsupport.checkpoint import mixed
from labsupport.checkpoint.weights import CheckpointError
from labsupport.cli import app
from labsupport.course.capstone import baselines, reference, rules, scoring, texts, worker
from labsupport.course.capstone.baselines import Baseline
from labsupport.course.capstone.reference import TABLE, Choice, Given, matrices
from labsupport.course.capstone.rules import Refused
from labsupport.course.capstone.worker import OTHER, OWN, SCORED
from labsupport.evidence import measurements
from labsupport.model import models
from labsupport.model.evaluate import Evaluation, paired_bootstrap
from labsupport.model.text import Document, TextError, tokenize
from labsupport.quant import nf4, rtn

COURSE = models.course_model_dir()
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Given:
    model, _ = models.load_model(str(COURSE), device="cpu")
    return Given(model, torch.zeros(1, 8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64), tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="module")
def made(given, tmp_path_factory) -> Path:
    """A submission that keeps the rules: 4 bits, rounded to nearest."""
    model, stored = baselines.make(Baseline("large", "rtn", "03", 4, 32), given)
    return baselines.write(model, stored, tmp_path_factory.mktemp("made") / "honest")


@pytest.fixture
def honest(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "submission"))


def read(directory: Path, into: Path):
    """What the process that evaluates does before it evaluates: count and model. Raises what it is refused for."""
    into.mkdir()
    count = rules.take(directory, into)
    return count, *worker.read(into)


# What a cheat would try. Each changes an honest submission and is refused with words of its own. --------------------------
def change_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, change: Callable[[dict], object], **metadata: str) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata or None)


def link_to_floats(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(COURSE / "model.safetensors")


def index_of_other_files(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    placed = dict.fromkeys(load_file(COURSE / "model.safetensors"), str(COURSE / "model.safetensors"))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def index_upwards(directory: Path) -> None:
    shutil.copy(COURSE / "model.safetensors", directory.parent / "more.safetensors")
    (directory / "model.safetensors").unlink()
    placed = dict.fromkeys(load_file(COURSE / "model.safetensors"), "../more.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def name_a_float_model(directory: Path) -> None:
    """transformers would look there for what is missing."""
    change_config(directory, _name_or_path=str(COURSE))
    change_tensors(directory, lambda tensors: [tensors.pop(f"{LAYER}.{part}") for part in ("codes", "scales", "zeros")])


def other_tokenizer(directory: Path) -> None:
    """Longer tokens are fewer, and each is harder: perplexity a token would be of something else."""
    content = json.loads((COURSE / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 4096, "content": "def __init__(self"})
    (directory / "tokenizer.json").write_text(json.dumps(content))


def cut_codes(tensors: dict) -> None:
    tensors[f"{LAYER}.codes"] = tensors[f"{LAYER}.codes"][:-8].clone()


def wider_codes(tensors: dict) -> None:
    tensors[f"{LAYER}.codes"] = tensors[f"{LAYER}.codes"].view(torch.float64)


TRICKS = {
    "a link to float weights": (link_to_floats, "model.safetensors is a link"),
    "a link for people": (
        lambda d: (d / "README.md").symlink_to(COURSE / "model.safetensors"), "README.md is a link",
    ),
    "a directory within": (
        lambda d: shutil.copytree(COURSE, d / "course"), "course is a directory",
    ),
    "a pipe": (lambda d: os.mkfifo(d / "more.safetensors"), "more.safetensors is a pipe"),
    "a pickle": (lambda d: torch.save({}, d / "pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "an index of files elsewhere": (index_of_other_files, "no weight_map from tensors to files beside it"),
    "an index of a file above": (index_upwards, "no weight_map from tensors to files beside it"),
    "a float model by name": (name_a_float_model, f"{LAYER}.weight is missing"),
    "code to be run": (
        lambda d: change_config(d, auto_map={"AutoModelForCausalLM": "model.Model"}), "code of a submission is never run",
    ),
    "more blocks": (lambda d: change_config(d, num_hidden_layers=12), "num_hidden_layers 12, the course model has 6"),
    "another architecture": (lambda d: change_config(d, model_type="gpt2"), "model_type 'gpt2'"),
    "a head of its own, by config": (lambda d: change_config(d, tie_word_embeddings=False), "tie_word_embeddings False"),
    "a head of its own, by tensor": (
        lambda d: change_tensors(d, lambda t: t.update({"lm_head.weight": torch.zeros(4096, 256, dtype=torch.float16)})),
        "lm_head.weight belongs to no parameter",
    ),
    "a config that holds weights": (lambda d: change_config(d, notes="7" * 2**17), "config.json has 131"),
    "a quantization_config that is none": (lambda d: change_config(d, quantization_config="gptq"), "wanted an object"),
    "a quantization_config of another layout": (
        lambda d: change_config(d, quantization_config={"quant_method": "gptq", "bits": 2, "group_size": 128}), "lacks",
    ),
    "a tokenizer with longer tokens": (other_tokenizer, "tokenizer.json is not the course model's"),
    "merges that hold something": (lambda d: (d / "merges.txt").write_text("a b\n" * 9), "merges.txt is of another tokenizer"),
    "weights in a name": (
        lambda d: change_tensors(d, lambda t: t.update({"0af37b" * 99: torch.zeros(1)})), "belongs to no parameter",
    ),
    "weights beside the weights": (
        lambda d: change_tensors(d, lambda t: t.update({f"{LAYER}.more": torch.zeros(9, dtype=torch.float64)})),
        "more is no part of a matrix",
    ),
    "codes in float64": (lambda d: change_tensors(d, wider_codes), "codes is torch.float64, wanted torch.uint8"),
    "codes that are cut": (lambda d: change_tensors(d, cut_codes), "of which no number of bits from 1 to 8 makes 768 x 256"),
    "the same matrix twice": (
        lambda d: change_tensors(d, lambda t: t.update({f"{LAYER}.weight": torch.zeros(768, 256)})), "in float and as codes",
    ),
    "scales that are no numbers": (lambda d: change_tensors(d, lambda t: t[f"{LAYER}.scales"].fill_(torch.nan)), "scales"),
    "a norm that is infinite": (lambda d: change_tensors(d, lambda t: t["model.norm.weight"].fill_(torch.inf)), "NaN or infinity"),
    "a damaged file": (lambda d: (d / "model.safetensors").write_bytes(b"7" * 99), "is damaged or not safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
def test_a_trick_is_refused_with_its_own_words(trick: str, honest: Path, tmp_path: Path) -> None:
    cheat, words = TRICKS[trick]
    cheat(honest)
    with pytest.raises((Refused, CheckpointError)) as refused:
        read(honest, tmp_path / "copy")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


# What is allowed, and counts. ---------------------------------------------------------------------------------------------
def test_every_byte_counts_wherever_it_hides(honest: Path, tmp_path: Path) -> None:
    before = read(honest, tmp_path / "before")[0]
    assert before.total == sum(path.stat().st_size for path in honest.iterdir())
    (honest / "notes.txt").write_text("7" * 1000)
    change_tensors(honest, lambda tensors: None, format="pt", hidden="7" * 5000)  # in the header's metadata
    after = read(honest, tmp_path / "after")[0]
    more = after.total - before.total - 1000 - 5000 - len(',"hidden":""')
    assert 0 <= more < 8  # a header ends at a multiple of 8 bytes
    assert after.counted["notes.txt"] == 1000


def test_a_header_filled_with_spaces_counts(honest: Path, tmp_path: Path) -> None:
    path = honest / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    padded = (size + 4096).to_bytes(8, "little") + content[8 : 8 + size] + b" " * 4096 + content[8 + size :]
    before = read(honest, tmp_path / "before")[0].total
    path.write_bytes(padded)
    assert read(honest, tmp_path / "after")[0].total == before + 4096


def test_a_hard_link_and_a_file_with_a_hole_count_in_full(honest: Path, tmp_path: Path) -> None:
    before = rules.take(honest, new(tmp_path / "one")).total
    os.link(COURSE / "model.safetensors", honest / "more.bytes") if same_disk(honest) else shutil.copy(
        COURSE / "model.safetensors", honest / "more.bytes"
    )
    with (honest / "hole.bytes").open("wb") as stream:
        stream.truncate(5_000_000)
    count = rules.take(honest, new(tmp_path / "two"))
    assert count.total == before + (COURSE / "model.safetensors").stat().st_size + 5_000_000
    assert count.budget is None


def new(path: Path) -> Path:
    path.mkdir()
    return path


def same_disk(path: Path) -> bool:
    return path.stat().st_dev == COURSE.stat().st_dev


def test_too_many_bytes_are_not_read(honest: Path, tmp_path: Path) -> None:
    with (honest / "hole.bytes").open("wb") as stream:
        stream.truncate(2**30)
    with pytest.raises(Refused, match="more than 67,108,864 bytes"):
        rules.take(honest, new(tmp_path / "copy"))


def test_what_is_not_read_is_not_copied(honest: Path, tmp_path: Path) -> None:
    for name in ("torch.py", "sitecustomize.py", "README.md", "model.gguf"):
        (honest / name).write_text("raise SystemExit")
    shutil.copy(COURSE / "tokenizer.json", honest)
    count = rules.take(honest, new(tmp_path / "copy"))
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"config.json", "model.safetensors"}
    assert set(count.free) == {"README.md", "tokenizer.json"}
    assert count.counted["torch.py"] == len("raise SystemExit")
    ours = json.loads((COURSE / "config.json").read_text())
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == ours | {"quantization_config": mixed.CONFIG}


def test_the_smallest_budget_that_is_kept() -> None:
    for name, most in rules.BUDGETS.items():
        assert rules.Count({"model.safetensors": most}).budget == name
    assert rules.Count({"a": rules.BUDGETS["small"], "b": 1}).budget == "medium"
    assert rules.Count({"a": rules.BUDGETS["large"], "b": 1}).budget is None


def test_the_rules_name_budgets_and_formats() -> None:
    done = CliRunner().invoke(app, ["capstone", "--rules"])
    assert done.exit_code == 0
    for words in ("3,400,000 bytes", "Compression does not count", "bitsandbytes", "2,097,152", "95 % interval"):
        assert words in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 132


@pytest.mark.parametrize(("arguments", "words"), [
    (["capstone"], "DIRECTORY is missing"),
    (["capstone", "nowhere"], "refused: nowhere is not a directory"),
    (["capstone", ".", "--text", "nowhere"], "--text is nowhere, wanted a directory of text"),
])  # fmt: skip
def test_a_wrong_call_is_one_line(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


# The layout "labs". -------------------------------------------------------------------------------------------------------
def test_a_matrix_reads_back_as_it_was_written(given: Given) -> None:
    weight = given.model.get_submodule(LAYER).weight.detach()
    levels = nf4.levels_of("nf4")
    for tensor in (
        rtn.quantize(weight, 3, 64), rtn.quantize(weight, 5, None), rtn.quantize(weight, 1 + 1, 32, symmetric=True),
        mixed.on_levels(weight, levels, 64), mixed.on_levels(weight, torch.tensor([-1.0, -0.3, 0.0, 0.8]), None),
    ):  # fmt: skip
        written = mixed.write_tensor("m", tensor)
        state = {name.removeprefix("m."): part for name, part in written.items()}
        back = mixed.read_tensor("m", state, (weight.shape[0], weight.shape[1]))
        assert torch.equal(back.dequantize(), tensor.dequantize())
        assert back.nbytes == tensor.nbytes == sum(part.nbytes for part in written.values())


def test_on_levels_is_what_bitsandbytes_blocks_are_but_for_the_scale_in_float16(given: Given) -> None:
    weight = given.model.get_submodule(LAYER).weight.detach()
    ours, theirs = mixed.on_levels(weight, nf4.levels_of("nf4"), 64), nf4.quantize(weight, block_size=64, double_quant=False)
    # float16 moves a block's magnitude, and a level, by 2**-11 of it at most: a code changes where a weight is that near a middle.
    assert (ours.codes != theirs.codes).float().mean() < 0.02
    assert (ours.dequantize() - theirs.dequantize()).abs().max() <= 0.31 * theirs.block_absmax.max()


def test_a_submission_reads_back_as_the_model_that_was_written(given: Given, made: Path, tmp_path: Path) -> None:
    model, stored = baselines.make(Baseline("large", "rtn", "03", 4, 32), given)
    count, read_back, layout, nbytes = read(made, tmp_path / "copy")
    assert layout == "labs"
    assert count.budget == "large"
    for (name, wanted), (_, got) in zip(model.named_parameters(), read_back.named_parameters(), strict=True):
        assert torch.equal(got, wanted.half().float() if name.removesuffix(".weight") not in stored else wanted), name
    assert nbytes["codes"] == sum(tensor.packed_codes.nbytes for tensor in stored.values())
    assert sum(nbytes.values()) + 50_000 > count.total > sum(nbytes.values())
    assert read_back.lm_head.weight is read_back.model.embed_tokens.weight


def test_what_the_layout_cannot_hold_is_refused(given: Given, tmp_path: Path) -> None:
    weight = given.model.get_submodule(LAYER).weight.detach()
    with pytest.raises(CheckpointError, match="is a BlockTensor"):
        mixed.write_tensor("m", nf4.quantize(weight))
    with pytest.raises(CheckpointError, match=r"scales in torch\.float32"):
        mixed.write_tensor("m", rtn.quantize(weight, scale_dtype=torch.float32))
    with pytest.raises(CheckpointError, match="no matrix of the model"):
        mixed.save_tensors(given.model, {"model.norm": rtn.quantize(weight)}, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.slow
def test_other_formats_are_read_too(given: Given, tmp_path: Path) -> None:
    model, stored = baselines.make(Baseline("large", "rtn", "03", 4, 32), given)
    linears = {name: tensor for name, tensor in stored.items() if name != TABLE}
    out = checkpoint.save(model, linears, tmp_path / "gptq", "gptq_v2", source=COURSE)
    count, read_back, layout, _ = read(out, tmp_path / "copy")
    assert (layout, count.budget) == ("gptq", None)  # the embedding is float16: over every budget
    for name, tensor in linears.items():
        assert torch.equal(read_back.get_submodule(name).weight, tensor.dequantize())
    change_config(out, quantization_config=json.loads((out / "config.json").read_text())["quantization_config"] | {"bits": 2})
    with pytest.raises(CheckpointError):  # the config lies about bits
        read(out, tmp_path / "again")


# The texts. ---------------------------------------------------------------------------------------------------------------
SOURCE = '''class Reader:
    """A Reader of lines, with a buffer_size."""

    def __init__(self, buffer_size=10):
        self._lines = [len(name) for name in range(buffer_size)]

MAXIMUM = 3
'''
OTHERS = """class Writer: pass
class Parser: pass
def tokenize(column, offset_of): self._hidden = _secret = column
LIMIT = 2
"""


def test_names_that_a_module_defines_are_changed_and_no_others() -> None:
    documents = [Document("a.py", SOURCE), Document("b.py", OTHERS)]
    changed = texts.renamed(documents, "key")[0]
    assert changed.name == "a.py"
    for name in ("Reader", "buffer_size", "_lines", "MAXIMUM"):
        assert name not in changed.text, name
    for name in ("class ", "self", "__init__", "len(", "range(", "lines, with a"):
        assert name in changed.text, name
    assert changed.text.count("LIMIT") == 1
    assert compile(changed.text, "a.py", "exec")
    assert texts.renamed(documents, "key")[0].text == changed.text
    assert any(texts.renamed(documents, str(key))[0].text != changed.text for key in range(20))


def test_two_names_do_not_become_one() -> None:
    source = "\n".join(f"variable_{i} = {i}" for i in range(40))
    other = "\n".join(f"column_{i} = {i}" for i in range(5))
    changed = texts.renamed([Document("a.py", source), Document("b.py", other)], "key")[0].text
    assert len({line.split(" ")[0] for line in changed.splitlines()}) == 40


def test_what_is_no_python_stays() -> None:
    broken = Document("a.py", "print 'hello'\nspam = eggs(")
    assert texts.renamed([broken, Document("b.py", OTHERS)], "key")[0].text == broken.text


# Placing, and learned text. -----------------------------------------------------------------------------------------------
def evaluation(loss: torch.Tensor, sha256: str = "s") -> Evaluation:
    return Evaluation(loss.double(), torch.full((len(loss),), 500), 12, 512, 0.3, sha256)


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return 500 * (2.5 + torch.rand(40, generator=generator)), generator


def test_a_tie_is_a_tie(tmp_path: Path, monkeypatch) -> None:
    loss, generator = drawn()
    noise = 5 * torch.randn(40, generator=generator)
    noise -= noise.mean()
    rows = [
        {"budget": "large", "name": name, "nbytes": 1, "perplexity": 15.0 + place, "loss": (loss + extra).tolist()}
        for place, (name, extra) in enumerate({"better one": -20, "equal": noise, "worse one": 20 + noise}.items())
    ] + [{"budget": "small", "name": "of another budget", "nbytes": 1, "perplexity": 1.0, "loss": loss.tolist()}]
    about = {"text_sha256": "s", "tokens": [500] * 40, "windows": 12, "python": "3.11.7"}
    path = tmp_path / "capstone.json"
    measurements.write(path, about, rows)
    monkeypatch.setattr(scoring, "rows_path", lambda: path)
    places, remark = scoring._places(evaluation(loss), "large")
    assert [(place.name, place.verdict) for place in places] == [
        ("better one", "worse"),
        ("equal", "tied"),
        ("worse one", "better"),
    ]
    assert remark == ""
    places, remark = scoring._places(evaluation(loss, "another text"), "large")
    assert places == []
    assert "labs capstone --baselines" in remark
    assert scoring._places(evaluation(loss), None) == ([], "")
    path.unlink()
    assert "no baselines have been measured" in scoring._places(evaluation(loss), "large")[1]


def losses_on(known: float, other: float, noise: float = 5) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
    """A submission that loses `known` nats a token on held-out text, `other` on other code; and the course model."""
    loss, generator = drawn(3)
    course = {name: evaluation(loss + 500 * more) for name, more in {SCORED: 0.3, OWN: 0.0, OTHER: 0.5}.items()}
    lost = {SCORED: known, OWN: known, OTHER: other}
    submission = {
        name: evaluation(course[name].loss + 500 * lost[name] + noise * torch.randn(40, generator=generator)) for name in course
    }
    return submission, course


@pytest.mark.parametrize(("known", "other", "learned"), [
    (0.02, 0.02, False), (0.11, 0.12, False), (0.5, 0.55, False), (0.7, 0.85, False),  # lost by rounding
    (0.12, 0.10, False), (-0.01, -0.01, False),  # trained further on other text
    (-0.2, 0.02, True), (0.0, 0.11, True), (0.2, 0.5, True),  # learned by heart, and then rounded
])  # fmt: skip
def test_learned_text_is_told_from_lost_bits(known: float, other: float, learned: bool) -> None:
    submission, course = losses_on(known, other)
    for name in (SCORED, OWN):
        found = scoring.gap(submission, course, name)
        assert found.low < known - other < found.high
        assert found.is_learned == learned


def test_a_gap_that_may_be_chance_is_no_proof() -> None:
    submission, course = losses_on(0.0, 0.1, noise=300)
    assert scoring.gap(submission, course, OWN).high > 0
    assert not scoring.gap(submission, course, OWN).is_learned


def small_texts(tokenizer, key):
    """A text that is quickly read: the beginnings of four modules, by every key with names of its own."""
    from labsupport.model import text

    long = [document for document in text.documents("code", "heldout") if len(document.text) > 8000][:4]
    documents = [Document(document.name, document.text[:2500]) for document in long]
    return text.tokenize(tokenizer, documents if key is None else texts.renamed(documents, key), str(key))


def test_other_code_is_drawn_by_the_seed(monkeypatch) -> None:
    monkeypatch.setattr(texts, "PACKAGES", ("numpy",))
    monkeypatch.setattr(texts, "MODULES", 8)
    _, tokenizer = models.load_model(str(COURSE), device="cpu")
    one, again, other = (texts.other_code(tokenizer, seed) for seed in ("a", "a", "b"))
    assert one.sha256 == again.sha256 != other.sha256
    assert len(one.names) == 8
    assert len(one) > 2 * 512 * 8
    monkeypatch.setattr(texts, "PACKAGES", ("no_such_package",))
    with pytest.raises(TextError, match="no_such_package hold 0 modules of 4000 characters, wanted 8"):
        texts.other_code(tokenizer, "a")


@pytest.mark.slow
def test_a_model_that_has_learned_the_text_is_refused(given: Given, tmp_path: Path, monkeypatch) -> None:
    """Trained on the very text, then rounded to 4 bits; and one that is rounded alone."""
    from labsupport.pipeline import training

    monkeypatch.setattr(texts, "held_out", small_texts)
    _, tokenizer = models.load_model(str(COURSE), device="cpu")
    learner = models.duplicate(given.model).requires_grad_(True)
    schedule = training.Schedule(steps=12, batch=2, length=512, learning_rate=1e-3, warmup=2)
    training.fit(learner, small_texts(tokenizer, None).ids, schedule)
    monkeypatch.setattr(scoring, "_in_a_process", lambda spec, out: worker.work(worker.Spec(**json.loads(spec.read_text()))))
    for model, refused in ((learner, True), (given.model, False)):
        each = Given(model, given.calibration, given.ids, given.folder)
        out = baselines.write(*baselines.make(Baseline("large", "rtn", "03", 4, 32), each), tmp_path / str(refused))
        if refused:
            with pytest.raises(Refused, match="it has learned the held-out text"):
                scoring.score(out, windows=2, checked=4)
        else:
            assert scoring.score(out, windows=2, checked=4).change.change < 0.1


# The whole way, in a process of its own. ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_an_honest_submission_is_scored_in_a_process_of_its_own(honest: Path, tmp_path: Path, monkeypatch) -> None:
    library = new(tmp_path / "text")
    (library / "a.py").write_text(SOURCE * 15)
    (honest / "torch.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(honest)
    monkeypatch.setenv("PYTHONPATH", str(honest))
    monkeypatch.setenv("LABS_QUICK", "1")
    monkeypatch.setenv("LABS_MODEL", "nowhere")
    done = CliRunner().invoke(app, ["capstone", str(honest), "--text", str(library)])
    assert done.exit_code == 0, done.stderr
    assert not (tmp_path / "ran").exists()
    for words in ("labs, 3,3", "bytes  codes", "bytes  zeros", "budget large", "perplexity ", "against the course model in float"):
        assert words in done.stdout


@pytest.mark.slow
def test_a_process_that_dies_is_one_line(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text("no JSON")
    with pytest.raises(Refused, match=r"the process that reads it died: json\.decoder\.JSONDecodeError"):
        scoring._in_a_process(spec, tmp_path / "out.json")


def test_work_answers_what_a_score_needs(honest: Path, tmp_path: Path, monkeypatch) -> None:
    library = new(tmp_path / "text")
    (library / "a.py").write_text(SOURCE * 20)
    rules.take(honest, new(tmp_path / "copy"))
    spec = worker.Spec(str(tmp_path / "copy"), "", "key", str(library), windows=1)
    answer = json.loads(json.dumps(worker.work(spec)))
    found, course = (worker.from_json(answer[who][SCORED]) for who in ("submission", "float"))
    assert found.sha256 == course.sha256
    assert found.mean_loss != course.mean_loss
    assert asdict(found).keys() == answer["submission"][SCORED].keys()
    (tmp_path / "copy" / "model.safetensors").rename(tmp_path / "kept")
    assert (
        worker.work(spec)["refused"] == "the submission holds no weights: wanted model.safetensors or model.safetensors.index.json"
    )
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"7" * 99)
    assert worker.work(spec)["refused"].startswith("model.safetensors is damaged or not safetensors")
    (tmp_path / "kept").replace(tmp_path / "copy" / "model.safetensors")
    monkeypatch.setattr(worker, "evaluate", lambda *_, **__: evaluation(torch.tensor([torch.inf])))
    assert worker.work(spec)["refused"] == "its loss is not a number: weights this large overflow"


# The baselines and the reference answer. ----------------------------------------------------------------------------------
def test_rows_are_measured_once_and_of_one_model(given: Given, tmp_path: Path, monkeypatch) -> None:
    made_again: list[str] = []

    def build(have: Given):
        made_again.append("made")
        return baselines.make(Baseline("large", "rtn", "03", 4, 32), have)

    for name in ("held_out", "other_code"):
        monkeypatch.setattr(texts, name, lambda tokenizer, key: tokenize(tokenizer, [Document("a.py", SOURCE * 40)], str(key)))
    monkeypatch.setattr(reference, "given", lambda folder, on_step: given)
    monkeypatch.setattr(baselines, "answers", lambda: iter([("large", "03 rtn", build)]))
    path = tmp_path / "rows.json"
    for _ in range(2):
        baselines.measure(path, windows=2)
    assert len(made_again) == 1
    about, (row,) = measurements.read(path)
    assert about["windows"] == 2
    assert row["low"] <= row["change"] <= row["high"] < 1
    assert row["nbytes"] < rules.BUDGETS["large"]
    assert [gap["text"] for gap in row["gaps"]] == [SCORED, OWN]
    with pytest.raises(ValueError, match="rows of another tokens: choose another file"):
        baselines.measure(path, windows=1)
    monkeypatch.setattr(baselines, "answers", lambda: iter([("small", "03 rtn", build)]))
    with pytest.raises(ValueError, match="over the budget small"):
        baselines.measure(path, windows=2)


def test_each_uniform_configuration_is_the_finest_that_fits(given: Given, made: Path, tmp_path: Path) -> None:
    from labsupport.pipeline import budget

    shapes = torch.tensor([list(module.weight.shape) for module in matrices(given.model).values()])
    of_matrices = budget.stored_bytes(shapes, torch.tensor([[4, 32]])).sum()
    beside = int(rules.take(made, new(tmp_path / "copy")).total - of_matrices)
    assert 0 < reference.BESIDE - beside < 1000
    for name, (bits, size) in baselines.UNIFORM.items():
        options = torch.tensor([(b, s) for b in range(2, 9) for s in (32, 64, 128, 256)])
        nbytes = budget.stored_bytes(shapes, options).sum(0) + beside
        fits = options[nbytes <= rules.BUDGETS[name]]
        assert [bits, size] in fits.tolist()
        assert fits[:, 0].max() == bits
        assert fits[fits[:, 0] == bits][:, 1].min() == size


def test_fisher_information_is_the_mean_square_of_gradients(given: Given) -> None:
    ids = torch.randint(0, 4096, (2, 16), generator=torch.Generator().manual_seed(0))
    information = reference.fisher(given.model, ids)
    assert information.keys() == matrices(given.model).keys()
    assert all(parameter.grad is None for parameter in given.model.parameters())
    learner = models.duplicate(given.model).requires_grad_(True)
    weight = learner.get_submodule(LAYER).weight
    gradients = [torch.autograd.grad(learner(input_ids=w[None], labels=w[None]).loss, weight)[0] for w in ids]
    wanted = 16 * (gradients[0].pow(2) + gradients[1].pow(2)) / 2  # a window's mean loss, times its tokens
    # Sums of 15 terms in another order: float32 rounds each by 2**-24 of the largest, and a square doubles that.
    torch.testing.assert_close(information[LAYER], wanted, rtol=0, atol=2 * 15 * 2**-24 * wanted.max().item())


def test_the_reference_spends_no_more_than_the_budget(given: Given, monkeypatch) -> None:
    flat = {name: torch.ones_like(module.weight) for name, module in matrices(given.model).items()}
    monkeypatch.setattr(reference, "fisher", lambda model, ids: flat)
    monkeypatch.setattr(reference, "CHOICES", [(3, 64), (2, 64), (4, 32)])
    each = Given(given.model, given.calibration, given.ids, given.folder)
    chosen = reference.allocation(each, 2_000_000)
    stored = [
        rtn.quantize(module.weight, chosen[name].bits, chosen[name].group_size) for name, module in matrices(given.model).items()
    ]
    assert 1_950_000 < sum(tensor.nbytes for tensor in stored) <= 2_000_000
    assert len(set(chosen.values())) > 1
    assert isinstance(chosen[TABLE], Choice)


def test_the_rows_say_that_the_reference_beats_every_uniform_configuration() -> None:
    about, rows = measurements.read(scoring.rows_path())
    assert about["budgets"] == rules.BUDGETS
    for row in rows:
        if "gaps" in row:  # of models that never saw the text
            assert all(abs(gap["difference"]) < gap["allowed"] for gap in row["gaps"])
    for budget, most in rules.BUDGETS.items():
        of_budget = [row for row in rows if row["budget"] == budget]
        assert all(row["nbytes"] <= most for row in of_budget)
        tokens = torch.tensor(about["tokens"])

        def evaluated(row: dict, tokens=tokens) -> Evaluation:
            loss = torch.tensor(row["loss"], dtype=torch.float64)
            return Evaluation(loss, tokens, about["windows"], about["length"], 0.0, about["text_sha256"])

        best = min(of_budget, key=lambda row: row["perplexity"])
        assert best["name"].startswith("reference")
        for row in of_budget:
            if not row["name"].startswith("reference"):
                assert paired_bootstrap(evaluated(row), evaluated(best)).high < 0, row["name"]
