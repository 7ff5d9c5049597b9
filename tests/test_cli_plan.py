"""labs plan: a table for people, JSON for machines, one line for what cannot be."""

import json

import pytest
from typer.testing import CliRunner

from labsupport.cli import app
from labsupport.evidence import published, tables


def labs(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_a_plan_is_printed():
    done = labs("--model", "llama-3.1-8b", "--gpu", "rtx 4090", "--context", 8192, "--users", 4)
    assert done.exit_code == 0, done.output
    for part in ("Use w4a16-g128", "most users", "data/measurements/shootout.json", "Assumptions", "claim 13 (depends)"):
        assert part in done.stdout
    assert "\\n" not in done.stdout


def test_json_says_the_same():
    done = labs("--model", "gpt-oss-20b", "--gpu", "4060 ti", "--json", "--cache", "fp8")
    plan = json.loads(done.stdout)
    assert plan["model"] == "gpt-oss-20b"
    assert plan["recommended"]["format"] == "mxfp4-experts"
    assert plan["recommended"]["total"] == pytest.approx(sum(plan["recommended"]["parts"].values()))
    assert all(each["fits"] == (each["total"] <= plan["memory"]) for each in plan["options"])


def test_fine_tuning_and_a_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(tables.architectures()["Qwen2.5-0.5B"].config)))
    done = labs("--model", tmp_path, "--gpu", "t4", "--finetune", "--context", 512)
    assert done.exit_code == 0, done.output
    assert "Use nf4" in done.stdout
    assert "gradients" in done.stdout
    assert json.loads(labs("--model", tmp_path, "--gpu", "t4", "--finetune", "--context", 512, "--json").stdout)["options"] == []


def test_another_memory():
    arguments = ("--model", "llama-2-13b", "--gpu", "cpu", "--quality", "near-lossless")
    assert "Use q8_0" in labs(*arguments).stdout
    assert labs(*arguments, "--memory", 8).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model is missing"),
        (("--model", "phi-4"), "--gpu is missing"),
        (("--model", "phi-9", "--gpu", "t4"), "model is 'phi-9', which is not in the table; nearest: Phi-4"),
        (("--model", "phi-4", "--gpu", "v100"), "gpu is 'v100'"),
        (("--model", "phi-4", "--gpu", "t4", "--users", 999), "Phi-4 does not fit T4"),
        (("--model", "phi-4", "--gpu", "t4", "--quality", "good"), "quality is 'good'"),
        (("--model", "phi-4", "--gpu", "t4", "--cache", "int4"), "cache is 'int4'"),
        (("--model", "none.json", "--gpu", "t4"), "none.json cannot be read"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message):
    done = labs(*arguments)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"labs plan: {message}")
    assert done.stderr.count("\n") == 1


def test_the_check_and_the_list():
    done = labs("--check")
    assert done.exit_code == 0, done.output
    assert all(figure.source in done.stdout for figure in published.figures())
    listed = labs("--list").stdout
    assert all(name in listed for name in (*tables.architectures(), *tables.cards()))


def test_a_check_that_fails_is_an_error(monkeypatch):
    wrong = published.Figure("weights", "a model", 1e9, 2e9, 0, "a page")
    monkeypatch.setattr(published, "figures", lambda: (wrong,))
    done = labs("--check")
    assert done.exit_code == 1
    assert done.stderr == "labs plan: the planner disagrees with what is published on a model\n"
