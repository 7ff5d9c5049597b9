"""Which libraries of the field are retired, and what took their place: data/libraries.yaml, each line with its source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from labsupport.model import models


@dataclass(frozen=True)
class Library:
    """retired: the day by which its maintainers said so, as ISO 8601, or None. source: where that stands. notice: what it says."""

    name: str
    does: str
    retired: str | None
    notice: str
    source: str
    successors: tuple[str, ...] = ()


@cache
def libraries() -> tuple[Library, ...]:
    """In the order of the file."""
    import yaml

    rows = yaml.safe_load((models.data_dir() / "libraries.yaml").read_text("utf-8"))
    return tuple(Library(**row | {"successors": tuple(row.get("successors", ()))}) for row in rows)


def named(name: str) -> Library:
    """Raises KeyError for one that the file does not have."""
    for library in libraries():
        if library.name == name:
            return library
    raise KeyError(f"data/libraries.yaml has no {name!r}, it has {', '.join(each.name for each in libraries())}")
