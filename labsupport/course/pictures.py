"""The pictures of README.md, in data/: of the course itself, and of stored measurements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from labsupport.evidence import positions, sweep
from labsupport.figures import course, listening
from labsupport.figures.base import CourseFigure
from labsupport.model import files, models


def who_pays() -> CourseFigure:
    """From the rows of `labs sweep positions` and `labs sweep gptq` of SmolLM2; errors are geometric means over its blocks."""
    by_block, whole = sweep.load("positions", "smollm2"), sweep.load("gptq", "smollm2")
    blocks, edges = by_block.rows, positions.edges(by_block.about["length"])
    of_grid = {key: blocks[0][key] for key in ("bits", "group_size")}
    places = range(len(edges) - 1)
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "GPTQ": (positions.GPTQ, {}),
        "GPTQ, by who listens": (positions.LISTENING, {"token_weights": "attention"}),
    }
    errors = {
        label: [geometric_mean(block[way][place] / block[positions.ROUNDING][place] for block in blocks) for place in places]
        for label, (way, _) in ways.items()
    }
    heard = [sum(block["heard"][place] for block in blocks) / len(blocks) for place in places]
    rows = {"rounding": whole.only(method="rtn", **of_grid)}
    rows |= {label: whole.only(method="gptq", samples=16, **of_grid | change) for label, (_, change) in ways.items()}
    rises = {label: (row["change"], row["low"], row["high"]) for label, row in rows.items()}
    subject = f"SmolLM2-135M on Wikipedia, {of_grid['bits']} bits, groups of {of_grid['group_size']}"
    return listening.who_pays(edges, errors, heard, rises, subject)


PICTURES: dict[str, Callable[[], CourseFigure]] = {"course-map.svg": course.map, "who-pays.svg": who_pays}


def write() -> list[Path]:
    """Draw all of them. Returns where they are. Raises files.WriteError."""
    written = []
    for name, draw in PICTURES.items():
        path = models.data_dir() / name
        files.write_text(path, draw().svg())
        written.append(path)
    return written
