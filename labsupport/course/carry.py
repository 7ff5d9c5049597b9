"""What a learner wrote in one copy of a notebook, carried over into a fresh copy: `labs reset NN --keep-answers`.

Jupyter, Colab and other editors lose cell ids and metadata, and a learner splits, merges, copies and adds cells. Therefore a text
finds its place by the cell's metadata, else by the cell's id, else by the function that it defines. Whatever finds none is named.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_raw_cell

DEFINES = re.compile(r"^(?:async +)?(?:def|class) +(\w+)|^(\w+) *= *lambda\b", re.MULTILINE)
ASSIGNS = re.compile(r"^(\w+) *=(?!=)", re.MULTILINE)
NEW = {"code": new_code_cell, "markdown": new_markdown_cell, "raw": new_raw_cell}


def table(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An entry of a notebook's or cell's metadata that should be a table; empty where it is missing or of another kind."""
    found = metadata.get(name)
    return found if isinstance(found, dict) else {}


def is_prediction(cell: NotebookNode) -> bool:
    return "prediction" in cell.metadata.get("tags", [])


def answers(notebook: NotebookNode) -> Iterator[tuple[str, NotebookNode]]:
    """The cells that a learner fills in, each with a key that an update keeps: its grade_id, or the cell id of a prediction."""
    for cell in notebook.cells:
        key = answer_key(cell)
        if key is not None:
            yield key, cell


def answer_key(cell: NotebookNode) -> str | None:
    """The key of a cell that a learner fills in, see `answers`; None for any other cell."""
    about = table(cell.metadata, "nbgrader")
    if about.get("solution") and about.get("grade_id"):
        return str(about["grade_id"])
    return f"prediction {cell.get('id')}" if is_prediction(cell) else None


def short_hash(text: str) -> str:
    """Of a cell's text. White space at its end does not count."""
    return hashlib.sha256(text.rstrip().encode()).hexdigest()[:16]


@dataclass
class _Places:
    """Where in a fresh notebook texts belong. cells: by key. by_id: the key of a cell id. by_name: of a function or prediction."""

    cells: dict[str, NotebookNode]
    by_id: dict[str, str] = field(default_factory=dict)
    by_name: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, notebook: NotebookNode) -> _Places:
        places = cls(dict(answers(notebook)))
        for key, cell in places.cells.items():
            places.by_id[cell.id] = key
            names = ASSIGNS.findall(cell.source) if is_prediction(cell) else _defined(cell.source)
            places.by_name |= dict.fromkeys(names, key)
        return places

    def key_of(self, cell: NotebookNode) -> str | None:
        """By the cell's metadata or its id; a prediction whose id was lost, by the variable that it sets."""
        key = answer_key(cell)
        if is_prediction(cell) and key not in self.cells:
            return self.key_by_name(cell.source) or key
        return key if key in self.cells else self.by_id.get(cell.get("id", "")) or key

    def key_by_name(self, text: str) -> str | None:
        """By what a text defines, where that is one answer or prediction."""
        found = {self.by_name[name] for name in (*_defined(text), *ASSIGNS.findall(text)) if name in self.by_name}
        return found.pop() if len(found) == 1 else None


def _defined(text: str) -> list[str]:
    return [function or variable for function, variable in DEFINES.findall(text)]


def carry_over(old: NotebookNode, fresh: NotebookNode) -> tuple[int, list[str]]:
    """Put what the learner wrote in `old` into `fresh`. Returns how many answers and predictions, and a line for each other text.

    A cell that was never filled in is left out, since its stub may have changed. The texts of several cells that hold one answer (a
    cell that was split or copied keeps the name of its original) are put into one cell in their order, which runs the same. Cells
    that the learner added go after the cell that they stood after.
    """
    places, lines = _Places.of(fresh), []
    record = table(old.metadata, "labs")
    blanks = table(record, "blanks")
    own = set(record["cells"]) if isinstance(record.get("cells"), list) else set()
    fresh_texts = {short_hash(cell.source): cell for cell in fresh.cells}
    fresh_by_id = {cell.id: cell for cell in fresh.cells}

    filled: dict[str, list[str]] = {}
    others: list[tuple[int, NotebookNode]] = []
    for index, cell in enumerate(old.cells):
        key, digest = places.key_of(cell), short_hash(cell.source)
        if not cell.source.strip() or digest in own or digest in fresh_texts or (key and digest == blanks.get(key)):
            continue
        if key is None:
            others.append((index, cell))
        else:
            filled.setdefault(key, []).append(cell.source)

    # A cell that nothing but its text ties to an exercise is an answer where no cell of that exercise was filled in.
    found: dict[str, list[str]] = {}
    added = []
    for index, cell in others:
        course_cell = fresh_by_id.get(cell.get("id"))
        key = places.key_by_name(cell.source)
        text = cell.source.replace(course_cell.source, "").strip() if course_cell else cell.source
        if key is None or key in filled or not places.key_by_name(text):
            added.append((index, cell))
            continue
        found.setdefault(key, []).append(text)
        lines.append(f"{key}: taken from cell {index + 1} of your copy, which defines it")
    filled |= found

    for key, texts in filled.items():
        if key not in places.cells:
            lines.append(f"{key} is no longer in this notebook: your text for it is in the backup")
            continue
        different = list(dict.fromkeys(texts))
        places.cells[key].source = "\n\n".join(different)
        if len(different) > 1:
            lines.append(f"{key} had {len(different)} cells: they were put into one, in their order")
    lines += _carry_added(old, fresh, added, bool(own))
    return sum(key in places.cells for key in filled), lines


def _carry_added(old: NotebookNode, fresh: NotebookNode, added: list[tuple[int, NotebookNode]], known: bool) -> list[str]:
    """Insert cells of the learner's own; a line for each, and for each of the course's cells that they changed.

    known: `old` records what the course's cells held, so that a cell without a known id is one that the learner added.
    """
    lines, ids = [], {cell.id for cell in fresh.cells}
    by_text = {short_hash(cell.source): cell for cell in fresh.cells}
    after = {}  # the cell of `fresh` that each place in `old` follows
    last = None
    for index, cell in enumerate(old.cells):
        same = next((c for c in fresh.cells if c.id == cell.get("id")), by_text.get(short_hash(cell.source)))
        last = after[index] = same or last
    for index, cell in added:
        beginning = cell.source.strip().splitlines()[0][:40]
        if cell.get("id") in ids or not known:
            lines.append(f"cell {index + 1} of your copy (`{beginning}`) is not carried over: your text for it is in the backup")
            continue
        copy = NEW[cell.cell_type](cell.source)
        anchor = after[index]
        place = 0 if anchor is None else 1 + next(i for i, c in enumerate(fresh.cells) if c is anchor)
        fresh.cells.insert(place, copy)
        lines.append(f"cell {index + 1} of your copy (`{beginning}`), which you added, was carried over")
        for later in range(index, len(old.cells)):  # what follows it follows the copy
            if after[later] is anchor:
                after[later] = copy
    return lines
