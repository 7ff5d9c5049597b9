"""What others published, beside what the planner computes: sizes of checkpoints and caches, and tokens a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from labsupport.evidence import planner, tables

WITHIN = 0.02  # of a published size
UNIT = {"weights": "GB", "cache": "kB", "speed": "tokens/s"}
_DIVISOR = {"weights": 1e9, "cache": 1e3, "speed": 1.0}


@dataclass(frozen=True)
class Figure:
    """A published figure and the computed one, in bytes, or tokens a second of one user.

    kind: "weights", "cache" or "speed". about: model, format, card and context, as far as they matter. source: who says so.
    """

    kind: str
    about: str
    published: float
    computed: float
    rounding: float
    source: str

    @property
    def share(self) -> float:
        """Published over computed: of a size near 1, of a speed what share of the limit was reached."""
        return self.published / self.computed

    @property
    def agrees(self) -> bool:
        """A size: within 2 % and half of the last published digit. A speed: not above the limit."""
        if self.kind == "speed":
            return self.published <= self.computed
        return abs(self.published - self.computed) <= WITHIN * self.published + self.rounding

    @property
    def shown(self) -> tuple[str, str, str]:
        """Published, computed, and the unit of both."""
        by = _DIVISOR[self.kind]
        return f"{self.published / by:,.6g}", f"{self.computed / by:,.6g}", UNIT[self.kind]


@cache
def figures() -> tuple[Figure, ...]:
    """All of data/planner/published.yaml. Raises ValueError for a row that is not as it should be."""
    return tuple(tables.rows("published", _figure))


def _figure(kind: str, model: str, value: float, source: str, rounding: float = 0, **row: Any) -> Figure:
    shape = tables.model(model)
    about = ", ".join(str(part) for part in (shape.name, row.get("format"), row.get("card")) if part)
    if kind == "cache":
        about += f", {row['context']:,} token" + "s" * (row["context"] > 1)
    return Figure(kind, about, value, _computed(kind, shape, row), rounding, source)


def _computed(kind: str, shape: planner.Shape, row: Mapping[str, Any]) -> float:
    if kind == "weights":
        return sum(planner.weight_bytes(shape, tables.formats()[row["format"]]).values())
    if kind == "cache":
        return planner.cache_bytes(shape, row["context"])
    if kind == "speed":
        return planner.plan(shape, tables.card(row["card"]), row["format"], context=row["context"]).tokens_per_second
    raise ValueError(f"kind is {kind!r}, wanted one of {', '.join(UNIT)}")
