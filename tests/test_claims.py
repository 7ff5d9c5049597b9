"""The claims: what data/claims.yaml says is what its evidence gives, and what is wrong with it is said in a line.

A verdict about time is made from kept and published figures: whatever the clock says, the notebook's cells come to the same.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import nbformat
import pytest
import yaml
from typer.testing import CliRunner

from labsupport.cli import app
from labsupport.evidence import audit, bench, claims, libraries, measurements
from labsupport.evidence.audit import computed, counted, page
from labsupport.evidence.claims import ClaimError
from labsupport.figures import tables
from labsupport.model import models

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks" / "solutions"
BATCHES = [1, 2, 4, 8, 16, 32, 64]
KERNELS = ("bf16", "int4", "int4, unfused", "bitsandbytes nf4")


def run(name: str, ids: tuple[str, ...], names: dict[str, Any]) -> dict[str, Any]:
    """Run cells of a notebook, in order, with `names` in place of what the cells before them made."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    cells = {cell.id: cell.source for cell in notebook.cells}
    for id in ids:
        exec(compile(cells[id], f"{name}, {id}", "exec"), names)
    return names


def products(slowest: str, factor: float) -> dict[tuple[str, int], float]:
    """Seconds as a machine might give them on which one kernel takes `factor` times as long as all others."""
    return {(kernel, batch): 1e-3 * (factor if kernel == slowest else 1.0) for kernel in KERNELS for batch in BATCHES}


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("slowest", KERNELS)
def test_no_clock_changes_the_verdicts_of_notebook_11(monkeypatch, capsys, slowest, factor):
    monkeypatch.setenv("LABS_STRICT", "1")
    names = {
        "bench": bench,
        "claims": claims,
        "N": 4096,
        "K": 4096,
        "batches": BATCHES,
        "operations": 2 * 4096**2,
        "bandwidth": 1e10,
        "ready": SimpleNamespace(nbytes=8912896),
        "live": products(slowest, factor),
    }
    run("11_kernels.ipynb", ("kept", "on-each", "claim-3", "claim-4", "claim-8", "claim-8-verdict"), names)
    assert capsys.readouterr().out.count("timed here, just now") == 3


@pytest.mark.parametrize("seconds", [1e-3, 3.0, 1e5])
def test_no_clock_changes_the_verdict_of_notebook_06(monkeypatch, capsys, seconds):
    monkeypatch.setenv("LABS_STRICT", "1")
    weights = [SimpleNamespace(numel=lambda: 5_770_000)]
    names = {
        "claims": claims,
        "models": models,
        "seconds": seconds,
        "model": SimpleNamespace(parameters=lambda: weights),
        "figures": SimpleNamespace(compensate=SimpleNamespace(run_times=lambda *_: None)),
    }
    run("06_gptq.ipynb", ("claim-9-figure", "claim-9"), names)
    printed = capsys.readouterr().out
    assert "depends: published, on an A100" in printed
    assert f"the course model in {seconds:.0f} s" in printed


# What stands in data/claims.yaml is what its evidence gives.

SECONDS = {12, 17, 31, 33}  # which notebooks compute as well
VERDICTS = [
    pytest.param(*found, id=found[2], marks=pytest.mark.slow if found[0] in SECONDS else ())
    for found in audit.everything()
    if found[3].verdict != claims.OPEN
]


@pytest.mark.parametrize(("number", "model", "where", "kept"), VERDICTS)
def test_verdict_and_figures_are_what_the_evidence_gives(number, model, where, kept):
    audit.check(number, model, where, kept)


@pytest.mark.parametrize(("number", "model", "where", "kept"), VERDICTS)
def test_each_measurement_is_there_and_says_so(number, model, where, kept):
    """Read here, and not by the audit."""
    for piece in kept.evidence:
        if piece.kind == "measurement":
            content = json.loads((models.data_dir() / "measurements" / piece.what).read_text("utf-8"))
            assert content["about"]["command"] == piece.command
            assert piece.version.startswith(content["about"]["date"])
            assert content["rows"]
            of = content["about"].get("model")
            assert of is None or of.startswith("course-model" if model is None else model)


def test_the_file_has_every_claim():
    found = claims.claims()
    assert list(found) == list(range(1, 38))
    assert {number for number, model, *_ in audit.everything() if model} == {10, 11, 13, 15}
    for claim in found.values():
        assert claim.figures or claim.verdict == claims.OPEN, claim.number
    assert {claim.verdict for claim in found.values()} <= {claims.OPEN, *claims.VERDICTS.values()}


def test_every_audit_is_of_a_verdict():
    audit.recompute(1, None, "claim 1", claims.claims()[1])  # so that all audits are known
    assert set(audit.AUDITS) == {(number, model) for number, model, _, kept in audit.everything() if kept.verdict != claims.OPEN}


def test_the_page_is_what_the_file_makes():
    assert page.path().read_text("utf-8") == page.markdown(claims.claims())


def changed(number: int, **fields: Any) -> claims.Claim:
    return replace(claims.claims()[number], **fields)


def refused(claim: claims.Claim, message: str) -> None:
    with pytest.raises(ClaimError, match=message):
        audit.check(claim.number, None, f"claim {claim.number}", claim)


def test_a_figure_that_is_not_what_the_evidence_gives_is_named():
    figures = dict(claims.claims()[21].figures)
    label = "2 bits, from the best opponent as it is"
    assert figures[label] == "-23.38 % [-24.82, -21.53]"
    refused(changed(21, figures=figures | {label: "-23.38 % [-24.82, -20.53]"}), rf"claim 21, {label}: -23\.38 % .* says .*20\.53")
    refused(changed(21, figures=figures | {label: "-23.38 %"}), f"claim 21, {label}")
    refused(changed(21, figures={key: value for key, value in figures.items() if key != label}), "other figures")
    exact = {"weights of Llama-2-7B in 16 bits": "13.49 GB"}  # arithmetic agrees to the last place
    refused(changed(1, figures=exact), r"claim 1, weights of Llama-2-7B in 16 bits: 13\.48 GB by its evidence")


@pytest.mark.parametrize("verdict", sorted({"holds", "fails", "cannot be told here"}))
def test_a_verdict_that_the_evidence_does_not_give_is_refused(verdict):
    refused(changed(13, verdict=verdict), f"claim 13 depends by its evidence, and data/claims.yaml says it {verdict}")


def found_by(number: int, directory: Path | None = None) -> str:
    return audit.recompute(number, None, f"claim {number}", claims.claims()[number], directory).verdict


def test_audits_find_another_verdict_where_what_they_look_at_is_another(monkeypatch, tmp_path):
    """Each has the verdict that would follow, so that none says what the file says by itself."""
    monkeypatch.setattr(counted, "SEVEN", counted.BIG)
    assert found_by(1) == "fails"
    monkeypatch.setattr(counted.packing, "write_awq", counted.packing.write_gptq)
    assert found_by(37) == "holds"
    monkeypatch.setattr(libraries, "named", lambda name: libraries.Library(name, "", None, "", ""))
    assert found_by(35) == "depends"
    monkeypatch.setattr(computed, "_passes", lambda kept, x: isinstance(kept, computed.nf4.BlockTensor))
    assert found_by(17) == "holds"
    about, rows = measurements.read(models.data_dir() / "measurements" / "qat.json")
    about["training"]["steps"] *= 100
    measurements.write(tmp_path / "qat.json", about, rows)
    assert found_by(36, tmp_path) == "holds"
    told = [
        replace(piece, says={**piece.says, "share of deployments": 0.6}) if piece.says else piece
        for piece in claims.claims()[34].evidence
    ]
    assert audit.recompute(34, None, "claim 34", changed(34, evidence=tuple(told))).verdict == "holds"


def evidence_of(number: int, what: str, /, **fields: Any) -> tuple[claims.Evidence, ...]:
    return tuple(replace(piece, **fields) if piece.what == what else piece for piece in claims.claims()[number].evidence)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"version": "2020-01-01, torch 1.0"},
            r"claim 29 was settled from kv\.json of version '2020-01-01, torch 1\.0', and the file",
        ),
        (
            {"command": "labs sweep kv"},
            r"claim 29 was settled from kv\.json of command 'labs sweep kv', and the file is of 'labs sweep kv -",
        ),
        ({"what": "kv-2.json"}, r"claim 29 is settled from 'kv\.json', and does not name it as a measurement"),
        ({"kind": "citation"}, r"claim 29 is settled from 'kv\.json', and does not name it as a measurement"),
    ],
)
def test_a_file_of_another_version_and_one_that_is_not_named_are_refused(fields, message):
    refused(changed(29, evidence=evidence_of(29, "kv.json", **fields)), message)


def test_evidence_that_no_audit_reads_is_refused():
    more = (*claims.claims()[29].evidence, *claims.claims()[36].evidence)
    refused(changed(29, evidence=more), r"claim 29 names qat\.json, which its audit does not read")


def test_rows_of_another_device_than_the_file_says_are_refused():
    refused(
        changed(29, tested_on="labsupport, NVIDIA H100"), r"claim 29 names kv\.json, of a CPU, and was tested on: labsupport, NV"
    )


def test_a_file_that_is_missing_damaged_or_without_the_row_is_refused(tmp_path):
    claim = claims.claims()[29]

    def refused_in(directory: Path, message: str) -> None:
        with pytest.raises(ClaimError, match=message):
            audit.check(29, None, "claim 29", claim, directory)

    refused_in(tmp_path, r"claim 29 names kv\.json, which is not in data/measurements")
    (tmp_path / "kv.json").write_text('{"about": {}}')
    refused_in(tmp_path, r"claim 29: .*kv\.json is not a file of measurements")
    about, rows = measurements.read(models.data_dir() / "measurements" / "kv.json")
    measurements.write(tmp_path / "kv.json", about, [row for row in rows if row["keys"] != "fp8"])
    refused_in(tmp_path, "claim 29: 0 rows have")
    damaged = [
        row | {"loss": [2 * nats for nats in row["loss"]]} if row["keys"] == "fp8" and row["weights"] else row
        for row in rows
        if "loss" in row
    ]
    measurements.write(tmp_path / "kv.json", about, damaged)
    refused_in(tmp_path, "claim 29 fails by its evidence|claim 29, fp8 adds")


@pytest.mark.parametrize(
    ("kept", "found", "agree"),
    [
        ("+0.32 % [-0.00, +0.63]", "+0.33 % [-0.01, +0.63]", True),
        ("+0.32 % [-0.00, +0.63]", "+0.34 % [-0.00, +0.63]", False),
        ("1.7e-03", "1.6e-03", True),
        ("1.7e-03", "1.7e-02", False),
        ("307,200 of 24,000,000, 1.3 %", "307,200 of 24,000,000, 1.4 %", True),
        ("13 %", "13 GB", False),
        ("yes", "no", False),
    ],
)
def test_figures_agree_up_to_one_in_the_last_place(kept, found, agree):
    assert audit.same(kept, found, exact=False) is agree
    assert not audit.same(kept, found, exact=True)


# A file of claims that is not one.

ROW = {
    "number": 1, "claim": "Four bits are enough", "notebooks": ["14"], "verdict": "holds", "how": "counted", "tested_on": "CPU",
    "evidence": [{"arithmetic": "on a napkin"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW | {"evidence": []}], "claim 1 has the verdict 'holds' without evidence"),
        ([{key: value for key, value in ROW.items() if key != "evidence"}], "claim 1 has the verdict 'holds' without evidence"),
        ([ROW | {"how": "", "tested_on": ""}], "claim 1 has the verdict 'holds' without how, tested_on"),
        ([ROW | {"verdict": "open"}], "claim 1 is open, and has evidence, how, tested_on"),
        (
            [ROW | {"verdict": "maybe"}],
            "claim 1 has the verdict 'maybe', wanted one of open, holds, fails, depends, cannot be told here",
        ),
        ([ROW | {"why": "so"}], "claim 1 has why, which no claim has"),
        ([{key: value for key, value in ROW.items() if key != "claim"}], "claim 1 has no claim"),
        ([ROW, ROW], "c.yaml has 2 claims with 1 numbers"),
        ([ROW | {"evidence": [{"rumor": "x"}]}], "claim 1 has evidence of the kind 'rumor', wanted one of arithmetic, computation"),
        ([ROW | {"evidence": [{"measurement": "rtn.json"}]}], r"claim 1: measurement 'rtn\.json' has no command, version"),
        ([ROW | {"evidence": [{"citation": "A paper"}]}], "claim 1: citation 'A paper' has no where, version"),
        ([ROW | {"evidence": [{"arithmetic": "x", "page": 3}]}], "claim 1: evidence 'x' has page, which no evidence has"),
        (
            [ROW | {"elsewhere": {"smollm2": {"verdict": "fails", "how": "rows"}}}],
            "claim 1 on smollm2 has the verdict 'fails' without ev",
        ),
        ("nothing", "c.yaml does not hold a list of claims"),
        ([3], "c.yaml does not hold a list of claims"),
    ],
)
def test_a_file_of_claims_that_is_not_one_is_refused(tmp_path, rows, message):
    place = tmp_path / "c.yaml"
    place.write_text(yaml.safe_dump(rows))
    with pytest.raises(ClaimError, match=message):
        claims.read(place)


def test_a_file_that_is_not_yaml_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("- [")
    with pytest.raises(ClaimError, match=r"c\.yaml is not YAML: "):
        claims.read(tmp_path / "c.yaml")


# Writing figures.


@pytest.fixture
def two_claims(tmp_path) -> Path:
    """Claims 1 and 29 in a file of their own, one figure wrong and one version old."""
    kept = {row["number"]: row for row in yaml.safe_load(claims.default_path().read_text("utf-8"))}
    kept[1]["figures"] = {"weights of Llama-2-7B in 16 bits": "14.00 GB"}
    kept[29]["evidence"][0]["version"] = "2020-01-01, torch 1.0"
    place = tmp_path / "claims.yaml"
    place.write_text("# A comment.\n" + yaml.safe_dump([kept[1], kept[29]], sort_keys=False))
    return place


def test_write_puts_figures_and_versions_in_and_says_what_changed(two_claims):
    lines = page.write(two_claims)
    assert lines[0] == "claim 1, weights of Llama-2-7B in 16 bits: 13.48 GB, was 14.00 GB"
    assert len(lines) == 2
    assert lines[1].startswith("claim 29: kv.json is of 2026-")
    assert two_claims.read_text().startswith("# A comment.\n- number: 1\n")
    written = claims.read(two_claims)
    assert {number: written[number] for number in (1, 29)} == {number: claims.claims()[number] for number in (1, 29)}
    assert "| weights of Llama-2-7B in 16 bits | 13.48 GB |" in two_claims.with_suffix(".md").read_text()
    assert page.write(two_claims) == []


def test_write_leaves_all_as_it_is_where_a_verdict_is_another(two_claims):
    before = two_claims.read_text().replace("verdict: depends", "verdict: holds")
    two_claims.write_text(before)
    with pytest.raises(ClaimError, match="claim 29 depends by its evidence, and the file says it holds: change the verdict first"):
        page.write(two_claims)
    assert [path.name for path in two_claims.parent.iterdir()] == ["claims.yaml"]
    assert two_claims.read_text() == before


# What a user sees.


def labs(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_labs_claims_prints_all_or_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    listing = labs("claims")
    assert listing.exit_code == 0
    for claim in claims.claims().values():
        assert claim.claim[:20] in listing.output
    whole = labs("claims", "13")
    for part in (
        "13. AWQ beats GPTQ",
        "depends: ",
        "on smollm2, depends: ",
        "`labs sweep awq --windows 128`",
        "tested on: labsupport, CPU",
    ):
        assert part in whole.output
    for label, figure in claims.claims()[13].figures.items():
        assert f"  {label}: {figure}\n" in whole.output


def test_labs_claims_checks_one_and_fails_with_what_differs(monkeypatch):
    assert labs("claims", "36", "--check").output.endswith("1 verdict with all figures as the evidence gives them; 0 open.\n")
    wrong = {36: changed(36, verdict="holds")}
    monkeypatch.setattr(claims, "claims", lambda: wrong)
    done = labs("claims", "--check")
    assert done.exit_code == 1
    assert "labs claims: claim 36 fails by its evidence, and data/claims.yaml says it holds" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["99"], "Invalid value for NUMBER: there is no claim 99, they go from 1 to 37"),
        (["thirteen"], "Invalid value for 'NUMBER'"),
        (["--write", "--check"], "Invalid value for --write: it goes alone"),
        (["13", "--write"], "Invalid value for --write: it goes alone"),
    ],
)
def test_labs_claims_refuses_what_it_cannot_do(arguments, message):
    done = labs("claims", *arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_tables_are_html_with_headers_and_words():
    table = tables.claims(claims.claims(), (13, 34))
    assert repr(table).startswith("Table: 2 claims: 1 cannot be told here, 1 depends\n | claim | verdict")
    root = ElementTree.fromstring(table._repr_html_())
    assert root.find("caption").text == "2 claims: 1 cannot be told here, 1 depends"
    assert [cell.get("scope") for cell in root.iter("th")] == ["col"] * 5 + ["row"] * 2
    assert [cell.text for cell in root.find("tbody/tr")][:3] == ["13", "AWQ beats GPTQ at equal bits", "depends"]
    assert "&lt;b&gt;" in tables.Table("<b>", ("a",), (("<b>",),))._repr_html_()


def test_every_library_that_is_retired_has_a_day_a_source_and_a_successor():
    found = {each.name: each for each in libraries.libraries()}
    assert set(found) == {"AutoGPTQ", "AutoAWQ", "ExLlamaV2"}
    for each in found.values():
        assert date(2023, 1, 1) < date.fromisoformat(each.retired) < date(2027, 1, 1)
        assert "github.com/" in each.source
        assert each.successors
    assert "EXL3" in found["ExLlamaV2"].notice
    assert repr(tables.libraries(found.values())).count("\n") == 4
    with pytest.raises(KeyError, match="no 'AutoQuant', it has AutoGPTQ, AutoAWQ, ExLlamaV2"):
        libraries.named("AutoQuant")
