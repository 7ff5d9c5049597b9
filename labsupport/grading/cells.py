"""The code cells of a notebook that was handed in, as far as they can be trusted: bounded texts, and what they say that they are.

Every file ends in cells or in one sentence why not, within seconds: sizes are looked at before anything is read or parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from labsupport.course.carry import table
from labsupport.grading.records import GradingError

LARGEST_FILE = 20 * 10**6  # bytes
LARGEST_CELL = 100 * 10**3  # characters
LARGEST_CODE = 2 * 10**6  # characters of all code cells; what fills 20 MB are outputs
MOST_CELLS = 2000
MOST_BRACKETS = 10**6  # a list or table takes Python some 64 bytes however little is in it

ANSWER = re.compile(r"answer-(\d{1,2})-(\d{1,2})")


@dataclass(eq=False)
class Cell:
    """A code cell as far as it can be trusted: a bounded text, and what it says that it is. place: counted from 1."""

    place: int
    text: str
    id: str
    grade_id: str
    tags: tuple[str, ...]
    points: float | None
    taken: bool = False

    def exercise(self, pattern: re.Pattern) -> str | None:
        """By nbgrader's name of the cell, else by its id."""
        for name in (self.grade_id, self.id):
            if found := pattern.fullmatch(name):
                return f"{int(found[1])}.{int(found[2])}"
        return None


def _load(raw: bytes, name: str) -> dict[str, Any]:
    """The notebook as JSON has it. Raises GradingError."""
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if not text.strip("\0 \r\n\t"):
            raise GradingError(f"{name} is empty")
        if text.count("[") + text.count("{") > MOST_BRACKETS:
            raise GradingError(f"{name} holds more than {MOST_BRACKETS} lists and tables: it cannot be read as a notebook")
        notebook = json.loads(text)
    except UnicodeDecodeError as error:
        raise GradingError(f"{name} is not a notebook: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise GradingError(f"{name} is not a notebook, or cut off: {error.msg} in line {error.lineno}") from None
    except (ValueError, RecursionError):
        raise GradingError(f"{name} is nested too deeply, or holds a number of thousands of digits") from None
    if not isinstance(notebook, dict):
        raise GradingError(f"{name} is not a notebook: it holds no table of cells")
    return notebook


def cells_of(raw_file: bytes, name: str) -> tuple[list[Cell], list[str]]:
    """The code cells of a notebook of any format since 3, and remarks. Raises GradingError."""
    notebook = _load(raw_file, name)
    listed = notebook.get("cells")
    sheets = notebook.get("worksheets")
    if listed is None and isinstance(sheets, list):
        listed = [cell for sheet in sheets if isinstance(sheet, dict) for cell in _list(sheet.get("cells"))]
    if not isinstance(listed, list):
        raise GradingError(f"{name} is not a notebook: it has no list of cells")
    if len(listed) > MOST_CELLS:
        raise GradingError(f"{name} has {len(listed)} cells, more than {MOST_CELLS}")
    cells, remarks = list[Cell](), list[str]()
    for place, raw in enumerate(listed, 1):
        if not isinstance(raw, dict):
            remarks.append(f"cell {place} is not a table and was left out")
            continue
        text = _text(raw)
        about = table(_table(raw.get("metadata")), "nbgrader")
        grade_id = about.get("grade_id")
        if raw.get("cell_type") != "code":
            if isinstance(grade_id, str) and (named := ANSWER.fullmatch(grade_id)):
                remarks.append(f"cell {place}, the answer to {named[1]}.{named[2]}, is not a code cell any more and was left out")
            continue
        if text is None:
            remarks.append(f"cell {place} has no text and was left out")
            continue
        if len(text) > LARGEST_CELL:
            remarks.append(f"cell {place} has {len(text)} characters, more than {LARGEST_CELL}, and was left out")
            continue
        clean = text.encode("utf-8", "replace").decode("utf-8")
        if clean != text:
            remarks.append(f"cell {place} holds half of a character (a lone surrogate); it was replaced by a question mark")
        clean = clean.replace("\r\n", "\n").replace("\r", "\n")
        tags = tuple(tag for tag in _list(_table(raw.get("metadata")).get("tags")) if isinstance(tag, str))
        points = about.get("points")
        given = float(points) if isinstance(points, int | float) and abs(points) < 1e9 else None
        id = raw.get("id")
        cells.append(
            Cell(place, clean, id if isinstance(id, str) else "", grade_id if isinstance(grade_id, str) else "", tags, given)
        )
    if (total := sum(len(cell.text) for cell in cells)) > LARGEST_CODE:
        raise GradingError(f"{name} has {total} characters of code, more than {LARGEST_CODE}")
    return cells, remarks


def _text(raw: Mapping[str, Any]) -> str | None:
    source = raw.get("source", raw.get("input"))  # format 3 calls it input
    if isinstance(source, list) and all(isinstance(line, str) for line in source):
        source = "".join(source)
    return source if isinstance(source, str) else None


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
