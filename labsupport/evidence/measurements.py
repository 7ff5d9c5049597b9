"""The form of a file of measurements: what they are of, then a line of JSON for each row, so that a change of one can be read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from labsupport.model import files


def write(path: Path, about: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """The file appears whole or not at all; its folder is made. Raises files.WriteError, which is an OSError."""
    with files.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    files.write_text(path, f'{{"about": {json.dumps(about, indent=1)},\n"rows": [\n{lines}\n]}}\n')


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `write` wrote: about, and the rows. Raises ValueError for any other file."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return dict(content["about"]), list(content["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of measurements") from error
