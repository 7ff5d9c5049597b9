"""labs train and labs sweep, as commands: what they write, and one clear line for what they cannot do."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from labsupport.cli import app
from labsupport.course import export, train
from labsupport.evidence import bench, shootout, sweep, timing
from labsupport.model import models, text
from labsupport.pipeline import calibrate
from labsupport.pipeline.methods import METHODS
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant.kv import Scheme

DOCUMENTS = [text.Document(f"{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 300) for i in range(3)]


def labs(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def small_recipe(monkeypatch):
    """The command's own recipe is the course model's; one that trains in a second stands in for it."""
    sizes = {"vocab": 512, "hidden": 64, "intermediate": 128, "layers": 1, "heads": 2, "kv_heads": 1, "context": 64, "batch": 32}
    full = train.Recipe(**sizes)
    monkeypatch.setattr(train, "training_documents", lambda: DOCUMENTS)
    monkeypatch.setattr(train, "SIZES", {"full": full, "small": replace(full, hidden=32)})
    monkeypatch.setattr(export, "_card", lambda directory, progress: "card")


@pytest.mark.slow
def test_train_writes_a_model_and_goes_on(small_recipe, tmp_path):
    out, run = tmp_path / "model", tmp_path / "run"
    arguments = ("train", "--out", out, "--run", run, "--no-compile")
    done = labs(*arguments, "--tokens", 8192)
    assert done.exit_code == 0, done.output
    models.load_model(str(out), device="cpu")
    assert json.loads((out / "training.json").read_text())["recipe"]["tokens"] == 8192
    assert labs(*arguments, "--tokens", 16384).exit_code == 0
    assert json.loads((out / "training.json").read_text())["recipe"]["tokens"] == 16384
    refused = labs(*arguments, "--tokens", 16384, "--size", "small")
    assert "holds a run with another hidden: choose another directory" in refused.output
    refused = labs(*arguments, "--tokens", 16384, "--seed", 1)
    assert refused.exit_code == 1
    assert "holds a run with another seed: choose another directory" in refused.output


def test_train_names_the_sizes():
    done = labs("train", "--size", "tiny")
    assert done.exit_code == 1
    assert "--size is 'tiny', wanted full or small" in done.output


def test_train_refuses_a_strangers_directory_before_it_trains(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years")
    done = labs("train", "--out", tmp_path / "thesis", "--run", tmp_path / "run")
    assert done.exit_code == 1
    assert "thesis is not a model that labs train wrote" in done.output
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years"
    assert not (tmp_path / "run").exists()


def test_bench_replaces_only_its_own_files(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"mine": 1}')
    (tmp_path / "x.json.tmp").write_text("mine too")
    done = labs("bench", "--only", "products", "--rows", 128, "--columns", 128, "--out", path)
    assert done.exit_code == 1
    assert "is not a file of measurements" in done.output
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"x.json": '{"mine": 1}', "x.json.tmp": "mine too"}


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "labs bench: stopped. 2 finished"),
        (RuntimeError("no kernel\nat all"), 1, "labs bench: no kernel. 2"),
    ],
)
def test_bench_keeps_the_rows_it_has_and_those_of_an_earlier_run(tmp_path, monkeypatch, error, code, words):
    rows = [timing.Product("bf16", 128, 128, batch, 32768, 1e-6) for batch in (1, 2, 4)]

    def stops(*_, **__):
        yield from rows[:2]
        raise error

    path, command = tmp_path / "x.json", ("bench", "--only", "products", "--budget", 0.01, "--out", tmp_path / "x.json")
    bench.write(path, {"command": "an earlier one"}, rows)
    monkeypatch.setattr(bench, "products", stops)
    done = labs(*command)
    assert done.exit_code == code
    assert words in done.output.replace("\n", " ")
    assert bench.read(tmp_path / "x.partial.json")[1] == rows[:2]
    assert bench.read(path) == ({"command": "an earlier one"}, rows)
    monkeypatch.setattr(bench, "products", lambda *_, **__: iter(rows[1:]))
    done = labs(*command)
    assert done.exit_code == 0
    assert bench.read(path)[1] == rows[1:]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_ctrl_c_is_one_line_and_exit_130(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupt)
    monkeypatch.setattr(models, "load_model", interrupt)
    monkeypatch.setattr(bench, "quantizers", interrupt)
    for command in (("train", "--out", tmp_path / "new", "--run", tmp_path / "run"), ("sweep", "rtn"), ("bench",)):
        done = labs(*command)
        assert done.exit_code == 130, command
        assert f"labs {command[0]}: stopped. " in done.output
        assert "Traceback" not in done.output


@pytest.mark.slow
def test_sweep_writes_rows(monkeypatch, tmp_path):
    settings = [{"bits": 4, "group_size": 128, "symmetric": False}]
    monkeypatch.setitem(sweep.SWEEPS, "rtn", lambda model: iter(settings))
    path = tmp_path / "rows.json"
    done = labs("sweep", "rtn", "--windows", 1, "--out", path)
    assert done.exit_code == 0, done.output
    content = json.loads(path.read_text())
    assert content["about"]["model"] == "course-model"
    assert content["about"]["command"] == "labs sweep rtn --windows 1"
    assert content["rows"][0]["perplexity"] > 1
    refused = labs("sweep", "rtn", "--windows", 2, "--out", path)
    assert refused.exit_code == 1
    assert "measured with another windows" in refused.output


@pytest.mark.slow
def test_another_model_is_measured_on_fewer_settings_and_its_own_text(monkeypatch, tmp_path):
    seen = []
    setting = {"bits": 4, "group_size": 128, "method": "gptq", "samples": 1}
    monkeypatch.setitem(sweep.SHORT_SWEEPS, "gptq", lambda model: iter([setting]))
    monkeypatch.setattr(sweep, "quantize_model", lambda **given: seen.append(given["calibration"]) or quantize_model(**given))
    other, path = tmp_path / "other", tmp_path / "rows.json"
    other.symlink_to(models.course_model_dir())
    done = labs("sweep", "gptq", "--windows", 1, "--model", other, "--text", "prose", "--out", path)
    assert done.exit_code == 0, done.output
    content = json.loads(path.read_text())
    assert content["about"]["command"] == f"labs sweep gptq --windows 1 --model {other} --text prose"
    assert content["about"]["text"] == "prose/heldout"
    tokenizer = models.load_model(str(other), device="cpu")[1]
    training = calibrate.windows(text.load_text(tokenizer, "prose", "train"), 1)
    assert torch.equal(seen[0], training)
    assert {key: content["rows"][0][key] for key in setting} == setting


def test_settings_of_other_models_are_what_methods_take(tiny):
    for name, settings in sweep.SHORT_SWEEPS.items():
        for setting in settings(tiny):
            if name in sweep.BY_BLOCK:
                assert 0 <= setting["block"] < len(models.blocks(tiny))
                continue
            if name == "kv":
                assert isinstance(sweep.scheme_of(setting), Scheme)
                continue
            if name == "shootout":  # its own keys are looked at in test_shootout.py
                shootout.check(setting)
                assert setting.get("group_size", 32) in ("row", 32)
                continue
            arguments = sweep._arguments(name, tiny, setting, lambda domain, samples: torch.zeros(1, 4))
            record = METHODS[arguments.pop("method")]
            assert ("calibration" in arguments) == record.needs_text
            record.check({key: value for key, value in arguments.items() if key not in ("model", "calibration")})
            assert setting.get("group_size", 32) in ("row", 32)  # the largest that divides 32 and 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sweep", "magic"), "sweep is 'magic', wanted one of rtn, layers"),
        (
            ("sweep", "rtn", "--model", "."),
            "--out is needed for a model that is neither the course model nor one of course-model-small, smollm2",
        ),
        (("sweep", "rtn", "--model", "nobody/no-such-model", "--out", "x.json"), "no model 'nobody/no-such-model'"),
        (("train", "--tokens", "1"), "8192"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message):
    done = labs(*arguments)
    assert done.exit_code != 0
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.slow
def test_bench_times_every_quantizer_against_a_copy_and_the_peer():
    result = labs("bench", "--rows", 8, "--columns", 128, "--budget", 0.01)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "quantize" in line]
    assert len(lines) == 12
    assert sum("times" in line for line in lines) == 8  # bitsandbytes does all but round-to-nearest on uniform grids
    refused = labs("bench", "--columns", 200)
    assert refused.exit_code == 1
    assert "the weight is 4096 x 200, wanted at least one row, and columns in groups of 128" in refused.output


def test_a_timing_is_in_copies_and_in_multiples_of_the_peer():
    timing = bench.Timing("work", seconds=0.2, copy=0.05, theirs=0.5)
    assert (timing.passes, timing.ratio) == (4, 2.5)
    assert bench.Timing("work", 0.2, 0.05).ratio is None
