"""The pictures of README.md, in data/: of the course itself, and of stored measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from labsupport.evidence import measurements, positions
from labsupport.figures import course, listening
from labsupport.figures.base import CourseFigure
from labsupport.figures.scales import Change
from labsupport.model import files, models


def who_pays() -> CourseFigure:
    """From the rows of `labs sweep positions` and `labs sweep gptq` of SmolLM2; errors are geometric means over its blocks."""
    folder = models.data_dir() / "measurements" / "smollm2"
    about, blocks = measurements.read(folder / "positions.json")
    _, rows = measurements.read(folder / "gptq.json")
    bits, group_size, edges = blocks[0]["bits"], blocks[0]["group_size"], positions.edges(about["length"])
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
    of_grid = {"bits": bits, "group_size": group_size}
    rises = {"rounding": _rise(rows, of_grid | {"method": "rtn"})}
    rises |= {label: _rise(rows, of_grid | {"method": "gptq", "samples": 16} | change) for label, (_, change) in ways.items()}
    return listening.who_pays(edges, errors, heard, rises, f"SmolLM2-135M on Wikipedia, {bits} bits, groups of {group_size}")


def _rise(rows: Iterable[dict[str, Any]], setting: dict[str, Any]) -> Change:
    """Of the row with this setting and no other."""
    measured = ("bits_per_weight", "nbytes", "perplexity", "change", "low", "high", "loss")
    row = next(row for row in rows if {key: row[key] for key in row if key not in measured} == setting)
    return row["change"], row["low"], row["high"]


PICTURES: dict[str, Callable[[], CourseFigure]] = {"course-map.svg": course.map, "who-pays.svg": who_pays}


def write() -> list[Path]:
    """Draw all of them. Returns where they are. Raises files.WriteError."""
    written = []
    for name, draw in PICTURES.items():
        path = models.data_dir() / name
        files.write_text(path, draw().svg())
        written.append(path)
    return written
