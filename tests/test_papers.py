"""labs paper: rows are those of the methods in memory, a stopped run goes on, and what the hub does not give is one line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import architectures
import pytest
import torch
from typer.testing import CliRunner

from labsupport import quantize_model
from labsupport.cli import app
from labsupport.course import papers
from labsupport.evidence import sweep
from labsupport.model import evaluate, hub, models
from labsupport.pipeline.gptq_block import GPTQBlocks

SENTENCE = "def f(x):\n    return x + 1\n\nA longer line of prose, number {}, so that there is something to read.\n"
LENGTH = 48


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny OPT, and a text in two splits."""
    folder = tmp_path_factory.mktemp("papers")
    architectures.write("opt", folder / "opt", torch.float16)
    for split, count in (("train", 12), ("heldout", 6)):
        (folder / "text" / split).mkdir(parents=True)
        for number in range(3):
            words = "".join(SENTENCE.format(100 * number + i) for i in range(count))
            (folder / "text" / split / f"{number}.txt").write_text(words)
    return folder


def small(table: papers.Table) -> papers.Table:
    """The table for a model with few positions and narrow linears."""
    rows = tuple(({k: 32 if k == "group_size" else v for k, v in row.items()}, value) for row, value in table.rows)
    calibration = replace(table.calibration, samples=4, length=LENGTH)
    return replace(table, length=LENGTH, calibration=calibration, rows=rows)


@pytest.fixture
def tables(monkeypatch):
    found = {name: small(table) for name, table in papers.tables().items()}
    monkeypatch.setattr(papers, "tables", lambda: found)
    return found


def asked(place, table: str, *more: str) -> list[str]:
    own = ["--model", place / "opt", "--text", place / "text", "--out", place / f"{table}.json"]
    return [str(each) for each in ("paper", "--table", table, *own, *more)]


def test_the_figures_are_the_papers():
    """Typed a second time, from the tables, so that a slip in the file is seen."""
    gptq, awq = (papers.tables()[name] for name in ("gptq-opt-125m", "awq-opt-1.3b"))
    assert [value for _, value in gptq.rows] == [27.65, 37.28, 31.12, 1300, 53.85]
    assert [value for _, value in awq.rows] == [14.62, 119.47, 16.32]
    for table in (gptq, awq):
        assert {**table.rows[0][0]} == {}
        assert table.page
        assert table.read_in
        assert all(row["method"] in ("rtn", "gptq", "awq") for row, _ in table.rows[1:])


@pytest.mark.parametrize("name", ["gptq-opt-125m", "awq-opt-1.3b"])
def test_rows_are_those_of_the_model_in_memory(place, tables, name):
    done = CliRunner().invoke(app, asked(place, name))
    assert done.exit_code == 0, done.output
    measured = sweep.Measurements(**json.loads((place / f"{name}.json").read_text()))
    job = papers.Job(tables[name], str(place / "opt"), str(place / "text"))
    opened = job.open()
    model, _ = models.load_model(str(place / "opt"), "cpu")
    for setting in opened.settings:
        wanted = model
        if setting:
            own = {"group_size": None} | {k: v for k, v in setting.items() if k != "method"}
            given = {} if setting["method"] == "rtn" else {"calibration": opened.ids}
            wanted, _ = quantize_model(model, setting["method"], **given, **own)
        found = measured.only(**setting)["perplexity"]
        whole = evaluate.evaluate(wanted, opened.stream, LENGTH).perplexity
        # The same sums in float32; GPTQ and AWQ may round a tie the other way, some codes of a hundred thousand.
        assert found == pytest.approx(whole, rel=1e-5 if setting.get("method") in (None, "rtn") else 1e-3), setting
    assert len({row["perplexity"] for row in measured.rows}) == len(opened.settings)
    said = " ".join(done.output.split())
    for line in papers.lines(job, measured):
        assert " ".join(line) in said
    assert "no perplexity here can be compared with the paper's" in said
    assert "the paper's figures are of facebook/opt" in said
    assert "about 1 min in all on this machine" in said


def test_a_text_begins_with_the_token_that_the_tokenizer_puts_before_it(place, tables):
    """OPT's does, and published figures are of a text that begins so; this tiny one's tokenizer is given the same rule."""
    from tokenizers import processors

    opened = papers.Job(tables["gptq-opt-125m"], str(place / "opt"), str(place / "text")).open()
    tokenizer = opened.tokenizer
    plain = papers._joined(tokenizer, papers._documents(str(place / "text"), "heldout"), "text").ids
    rule = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = rule
    whole = "\n\n".join(document.text for document in papers._documents(str(place / "text"), "heldout"))
    found = papers._joined(tokenizer, papers._documents(str(place / "text"), "heldout"), "text").ids
    assert found.tolist() == tokenizer(whole)["input_ids"] == [tokenizer.bos_token_id, *plain.tolist()]


def test_a_run_that_was_stopped_goes_on(place, tables, monkeypatch):
    name, opened = "gptq-opt-125m", papers.Job(tables["gptq-opt-125m"], str(place / "opt"), str(place / "text")).open()
    path, seen = place / "stopped.json", []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 2 + 4 + 1:  # the float row, rounding, and the first block of GPTQ
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened.run(path, on_block=stop)
    assert [sweep.setting_of(row) for row in json.loads(path.read_text())["rows"]] == opened.settings[:2]
    (kept,) = place.glob(".stopped-*")
    assert (kept / "block-000.json").exists()
    calls, quantize = [], GPTQBlocks.__call__
    monkeypatch.setattr(GPTQBlocks, "__call__", lambda *given: calls.append("a block") or quantize(*given))
    again = opened.run(path)
    assert [sweep.setting_of(row) for row in again.rows] == opened.settings
    assert not list(place.glob(".stopped-*"))
    assert len(calls) == 3  # one block of 4 bits was there; 3 bits has two
    straight = opened.row(opened.settings[2], place / "straight", lambda done, total: None)
    assert again.only(**opened.settings[2])["perplexity"] == straight["perplexity"]
    with pytest.raises(ValueError, match="holds rows measured with another items"):
        papers.Job(tables[name], str(place / "opt"), str(place / "text"), samples=3).open().run(path)


def test_what_comes_from_the_hub(place, tables, monkeypatch):
    """The same through a hub that is made up: its model a directory, its datasets lists."""
    rows = {
        "Salesforce/wikitext": {"text": [f"line {i} of an article" for i in range(60)]},
        "allenai/c4": [{"text": SENTENCE.format(i) * (1 + i % 3)} for i in range(20)],
        "mit-han-lab/pile-val-backup": [{"text": SENTENCE.format(i)} for i in range(20)],
    }
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda path, split, **which: rows[path]))
    monkeypatch.setattr(hub, "snapshot", lambda name, others, look: place / "opt")
    monkeypatch.setattr(hub, "check_reached", lambda dataset: None)
    for name, table in tables.items():
        opened = papers.Job(table).open()
        assert opened.ids.shape == (4, LENGTH)
        assert len(opened.ids.unique(dim=0)) == 4
        assert opened.windows > 2
        assert not [said for said in papers.Job(table).differs if "compared" in said]
        assert opened.about["command"] == f"labs paper --table {name}"
    short = replace(tables["gptq-opt-125m"], calibration=replace(table.calibration, cut="segments", text="c4", samples=21))
    with pytest.raises(ValueError, match=r"'c4' has 20 documents of more than 48 tokens, fewer than the 21"):
        _ = papers.Job(short).open().ids


def test_a_hub_that_cannot_be_reached_is_one_line(tables, monkeypatch, place):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port of "discard": nothing answers
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    refused = CliRunner().invoke(app, ["paper", "--table", "gptq-opt-125m"])
    assert refused.exit_code == 1
    assert refused.output.startswith("labs paper: no model 'facebook/opt-125m': neither a directory, nor downloaded before")
    assert len(refused.output.splitlines()) == 1
    refused = CliRunner().invoke(app, ["paper", "--table", "gptq-opt-125m", "--model", str(place / "opt")])
    assert refused.exit_code == 1
    assert refused.output.startswith("labs paper: the text 'wikitext' cannot be had, since the hub does not answer for ")
    assert "ConnectError" in refused.output
    assert len(refused.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--table", "nothing"], "table is 'nothing', wanted one of gptq-opt-125m, awq-opt-1.3b"),
        (["--table", "gptq-opt-125m", "--text", "no/such/text"], "the text 'no/such/text' is neither a directory, nor a file"),
        (["--table", "gptq-opt-125m", "--samples", "1000"], "windows of 48 tokens, fewer than the 1000 asked for"),
    ],
)
def test_bad_input_is_one_line(place, tables, tmp_path, more, message):
    own = ["--model", place / "opt", "--text", place / "text", "--out", tmp_path / "rows.json"]
    refused = CliRunner().invoke(app, [str(each) for each in ("paper", *own, *more)])
    assert refused.exit_code == 1
    assert message in refused.output
    assert "Traceback" not in refused.output


def test_a_model_with_too_few_positions(place):
    job = papers.Job(papers.tables()["gptq-opt-125m"], str(place / "opt"), str(place / "text"))
    with pytest.raises(papers.PaperError, match=r"windows have 2048 tokens, and the model in .* has 256 positions"):
        job.open()


def test_tables_are_listed():
    listed = CliRunner().invoke(app, ["paper"])
    assert listed.exit_code == 0
    assert "table 3, page 7: facebook/opt-125m, 5 rows" in listed.output
