"""A verdict about time is made from kept and published figures: whatever the clock says, the notebook's cells come to the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from labsupport.evidence import bench, claims
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
