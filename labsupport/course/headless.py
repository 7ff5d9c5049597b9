"""Run a learner's notebook without a browser and find out which exercises pass: `labs check`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from labsupport import PACKAGE

LONGEST_CHECK = 4_000  # characters of what a cell with a check prints that are shown
MARK = "labs-outcomes "
# Runs after the learner's last cell, in the same kernel. A chapter without exercises has nothing to tally.
TALLY = """\
import json as _json
from labsupport.exercises import registry as _registry, session as _session
if {chapter} in _registry.CHAPTERS:
    _session.tally({chapter})
print({mark!r} + _json.dumps({{_id: _record.outcome for _id, _record in _session._records.items()}}))"""


@dataclass(frozen=True)
class Outcome:
    """How the exercises of one notebook stand.

    checks: what each check printed, in order. tally: the closing table. errors: a line for each cell that raised.
    outcomes: exercise id to "pass", "not yet" or "not attempted".
    """

    checks: tuple[str, ...]
    tally: str
    outcomes: dict[str, str]
    errors: tuple[str, ...]

    @property
    def wrong(self) -> bool:
        """Whether something is wrong; what was not attempted is not."""
        return bool(self.errors) or "not yet" in self.outcomes.values()


def _text(cell: NotebookNode) -> str:
    return "".join(o.text for o in cell.get("outputs", []) if o.output_type == "stream" and o.name == "stdout")


def _cut(text: str) -> str:
    """The beginning and the end, where the verdict stands, of a text that is too long to read."""
    half = LONGEST_CHECK // 2
    if len(text) <= LONGEST_CHECK:
        return text
    return f"{text[:half]}\n... {len(text) - 2 * half} characters are left out ...\n{text[-half:]}"


def check_notebook(
    notebook: NotebookNode,
    chapter: int,
    folder: Path,
    on_cell: Callable[[int], None] | None = None,
    timeout: int | None = None,
) -> Outcome:
    """Execute a copy of `notebook` in a clean kernel started in `folder`. The notebook's file is neither read nor written.

    timeout: seconds after which a cell is interrupted, as by Jupyter's stop button; the next one then starts.
    on_cell(index) is called as each cell starts; there is one more cell than the notebook has. A cell that raises is reported,
    and the cells after it still run.
    """
    from nbclient import NotebookClient

    from labsupport.course.kernels import ThisInterpreter

    copy = deepcopy(notebook)
    copy.cells.append(nbformat.v4.new_code_cell(TALLY.format(chapter=chapter, mark=MARK)))
    client = NotebookClient(
        copy,
        timeout=timeout,
        interrupt_on_timeout=True,
        allow_errors=True,
        kernel_manager_class=ThisInterpreter,
        resources={"metadata": {"path": str(folder)}},
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],
        coalesce_streams=False,  # nbclient's patterns take minutes on a long line; `_text` joins the pieces
        on_cell_start=(lambda cell, cell_index: on_cell(cell_index)) if on_cell else None,
    )
    env = {k: v for k, v in os.environ.items() if k != "LABS_STRICT"}  # a wrong answer is to be counted, not raised
    path = [str(PACKAGE.parent), env.get("PYTHONPATH", "")]
    client.execute(env=env | {"PYTHONPATH": os.pathsep.join(filter(None, path))})

    *cells, last = copy.cells
    errors = []
    for index, cell in enumerate([*cells, last], 1):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                reason = (output.evalue.strip().splitlines() or [""])[0]
                errors.append(f"cell {index} raised {output.ename}: {reason}")
    table, _, found = _text(last).rpartition(MARK)
    checks = [
        _cut(_text(c).strip()) for c in cells if c.metadata.get("nbgrader", {}).get("grade") or re.search(r"\bcheck\(", c.source)
    ]
    return Outcome(tuple(filter(None, checks)), table.rstrip(), json.loads(found or "{}"), tuple(errors))
