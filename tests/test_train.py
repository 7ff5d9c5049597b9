"""Training: a stopped run goes on as if it had not been stopped, and what it writes loads."""

import json

import pytest
import torch

from labsupport.course import export, train
from labsupport.model import models, text

SMALL = {
    "vocab": 512,
    "hidden": 64,
    "intermediate": 128,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "context": 32,
    "batch": 2,
    "warmup": 2,
}
DOCUMENTS = [text.Document(f"{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 12) for i in range(8)]


@pytest.fixture(autouse=True)
def few_documents(monkeypatch):
    monkeypatch.setattr(train, "training_documents", lambda: DOCUMENTS)


def recipe(steps, **changes):
    return train.Recipe(**SMALL | {"tokens": steps * 64} | changes)


def test_learning_rate_is_a_trapezoid():
    r = recipe(100)
    assert r.steps == 100
    assert r.rate(0) == pytest.approx(r.learning_rate / 2)
    assert r.rate(50) == r.learning_rate
    assert r.rate(99) == pytest.approx(r.learning_rate / 25)
    # A longer run shares the beginning of a shorter one, so that a finished run can be gone on with.
    assert [recipe(400).rate(s) for s in range(70)] == [r.rate(s) for s in range(70)]


def test_the_small_model_is_about_a_quarter_and_differs_in_size_alone():
    full, small = (train.SIZES[size] for size in ("full", "small"))
    parameters = [sum(p.numel() for p in train.build_model(r).parameters()) for r in (full, small)]
    assert 0.22 < parameters[1] / parameters[0] < 0.28
    differs = {field for field, value in vars(full).items() if vars(small)[field] != value}
    assert differs == {"hidden", "intermediate", "layers", "heads", "kv_heads"}


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path):
    whole, _, done = train.train(tmp_path / "a", recipe(8), save_every=4)

    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        train.train(tmp_path / "b", recipe(8), save_every=4, on_step=stop)
    resumed_from = []
    again, _, _ = train.train(tmp_path / "b", recipe(8), save_every=4, on_step=lambda step, _: resumed_from.append(step))
    assert resumed_from == [4, 5, 6, 7]
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert done["losses"][0][1] > 5
    assert done["train_sha256"]


def test_another_recipe_in_the_same_directory(tmp_path):
    train.train(tmp_path, recipe(2))
    with pytest.raises(ValueError, match="holds a run with another seed"):
        train.train(tmp_path, recipe(2, seed=1))
    _, _, progress = train.train(tmp_path, recipe(3))
    assert progress["recipe"]["tokens"] == 3 * 64


@pytest.mark.parametrize("name", [train.STATE, train.TOKENIZER])
def test_a_damaged_run_is_one_line(tmp_path, name):
    train.train(tmp_path, recipe(2))
    (tmp_path / name).write_bytes(b"half")
    with pytest.raises(ValueError, match=name):
        train.train(tmp_path, recipe(3))
    assert (tmp_path / name).read_bytes() == b"half"


def test_a_run_on_another_text_and_a_folder_of_somebody_else_are_refused(tmp_path, monkeypatch):
    run, thesis = tmp_path / "run", tmp_path / "thesis"
    train.train(run, recipe(2))
    (run / train.PROGRESS).write_text("")  # for people to read: what counts is kept with the weights
    assert train.train(run, recipe(3))[2]["recipe"]["tokens"] == 3 * 64
    monkeypatch.setattr(train, "training_documents", lambda: DOCUMENTS[1:])
    with pytest.raises(ValueError, match="run on another text"):
        train.train(run, recipe(4))
    thesis.mkdir()
    for name in ("thesis.tex", train.STATE, train.PROGRESS):
        (thesis / name).write_text("years")
        with pytest.raises(ValueError, match="not of a training run"):
            train.train(thesis, recipe(2))
        assert [path.read_text() for path in thesis.iterdir()] == ["years"]
        (thesis / name).unlink()
    for name in (train.TOKENIZER, train.STATE, "config.json"):  # a model of somebody's
        (thesis / name).write_text("years")
    with pytest.raises(ValueError, match="not of a training run"):
        train.train(thesis, recipe(2))
    assert len(list(thesis.iterdir())) == 3


def test_a_directory_that_is_not_ours_is_never_replaced(tmp_path):
    thesis, link, file = tmp_path / "thesis", tmp_path / "link", tmp_path / "file"
    thesis.mkdir()
    export.check_replaceable(thesis)
    export.check_replaceable(tmp_path / "new")
    for name in ("training.json", "model.safetensors", "thesis.tex"):
        (thesis / name).write_text("years")
    link.symlink_to(thesis)
    file.write_text("mine")
    for path in (thesis, link, file):
        with pytest.raises(ValueError, match="choose another directory"):
            export.export(None, tmp_path, {}, path)
    assert {path.name for path in thesis.iterdir()} == {"training.json", "model.safetensors", "thesis.tex"}
    (thesis / "thesis.tex").unlink()
    export.check_replaceable(thesis)


@pytest.mark.slow
def test_export_writes_all_or_nothing(tmp_path, monkeypatch):
    model, tokenizer, progress = train.train(tmp_path / "run", recipe(2))
    monkeypatch.setattr(export, "_card", lambda directory, progress: "card")
    out = tmp_path / "model"
    export.export(model, tmp_path / "run" / train.TOKENIZER, progress, out)
    loaded, again = models.load_model(str(out), device="cpu")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        for p in model.parameters():  # parameters alone: .half() would take the rotary frequencies along
            p.copy_(p.half())
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert again("def f")["input_ids"] == tokenizer("def f")["input_ids"]
    assert json.loads((out / "training.json").read_text())["recipe"]["layers"] == 2

    def fail(directory, progress):
        raise RuntimeError("no card")

    monkeypatch.setattr(export, "_card", fail)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(RuntimeError):
        export.export(model, tmp_path / "run" / train.TOKENIZER, progress, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    model.model.embed_tokens.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="float16 cannot hold"):
        export.export(model, tmp_path / "run" / train.TOKENIZER, progress, out)
    models.load_model(str(out), device="cpu")
