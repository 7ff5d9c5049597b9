"""What the planner's page calculates with: every table and constant of `labs plan`, so that JavaScript has arithmetic alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from labsupport.evidence import choosing, configs, planner, tables


def planner_tables() -> dict[str, Any]:
    """Tables and constants in the units of labsupport.evidence: bytes, bytes a second, operations a second."""
    return {
        "models": [{"name": each.name, "hub": each.hub, "config": dict(each.config)} for each in tables.architectures().values()],
        "cards": [_row(each) | {"rates": dict(each.rates)} for each in tables.cards().values()],
        "formats": [_row(each, "measured") for each in tables.formats().values()],
        "rules": [_row(each) | {"evidence": choosing.evidence(each)} for each in tables.rules()],
        "families": list(configs.FAMILIES),
        "qualities": list(tables.QUALITIES),
        "caches": dict(planner.CACHES),
        "fallback": {str(bits): larger for bits, larger in planner.FALLBACK.items()},
        "chunk": planner.CHUNK,
        "assumptions": list(planner.ASSUMPTIONS),
    }


def _row(entry: Any, *but: str) -> dict[str, Any]:
    """The fields of a dataclass; JSON turns tuples into lists."""
    return {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry) if field.name not in but}
