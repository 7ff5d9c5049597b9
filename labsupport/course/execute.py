"""Run a notebook from top to bottom in a clean kernel and keep what it shows."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from labsupport import PACKAGE
from labsupport.course import setup_cell
from labsupport.course.kernels import ThisInterpreter
from labsupport.model import files

WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGET_TEXT = "The control appears here when the cell is run. The figure below shows where it starts."
CELL_SECONDS = 600
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
# What front ends write into a cell's metadata as it is run or looked at.
VOLATILE = ("execution", "ExecuteTime", "collapsed", "scrolled", "trusted", "jp-MarkdownHeadingCollapsed", "outputId")


class BuildError(Exception):
    """A notebook cannot be built; the message names the notebook, where there is one the cell, and the reason."""


def essence(cell: NotebookNode) -> dict[str, Any]:
    """What a cell is, without what running it leaves behind."""
    metadata = {k: v for k, v in cell.metadata.items() if k not in VOLATILE}
    return {"id": cell.id, "type": cell.cell_type, "source": cell.source, "metadata": metadata}


def source_sha256(notebook: NotebookNode) -> str:
    """sha256 over ids, types, sources and metadata of all cells, in order; not over outputs, counts and timings.

    Of the set-up cell without what only runs where the course is not installed.
    """
    cells = [essence(cell) | {"source": setup_cell.executed(cell)} for cell in notebook.cells]
    text = json.dumps(cells, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def execute(
    notebook: NotebookNode,
    name: str,
    strict: bool,
    on_cell: Callable[[int], None] | None = None,
    settings: Mapping[str, str] | None = None,
) -> NotebookNode:
    """An executed copy: outputs stored, the hash of what was executed in `metadata.labs.executed_source_sha256`.

    strict: a wrong or blank answer raises (LABS_STRICT=1). The kernel is clean, of this interpreter, in an empty folder, and
    sees no other LABS_ variable but LABS_CACHE, so that what is stored is about the course model and its text. on_cell(index) is
    called before each cell. settings: LABS_ variables for a run of which nothing is stored, as on another model.
    Raises BuildError when a cell raises, times out, kills the kernel, or writes to standard error.
    """
    done, at = deepcopy(notebook), {"cell": None}

    def start(cell: NotebookNode, cell_index: int) -> None:
        at["cell"] = cell.id
        if on_cell is not None:
            on_cell(cell_index)

    with tempfile.TemporaryDirectory(prefix="labs-build-") as folder:
        client = NotebookClient(
            done,
            timeout=CELL_SECONDS,
            kernel_manager_class=ThisInterpreter,
            resources={"metadata": {"path": folder}},
            record_timing=False,
            store_widget_state=True,  # without it nbclient fails on what interact() shows; _tidy drops the state
            extra_arguments=["--log-level=ERROR"],  # it warns that its connection to us is not encrypted
            coalesce_streams=True,
            on_cell_start=start,
        )
        try:
            client.execute(env=_environment(strict) | dict(settings or {}))
        except CellExecutionError as error:
            raise BuildError(f"{name}, cell {at['cell']}: {error.ename}: {error.evalue}") from error
        except CellTimeoutError as error:
            raise BuildError(f"{name}, cell {at['cell']}: still running after {CELL_SECONDS} s") from error
        except DeadKernelError as error:
            raise BuildError(f"{name}, cell {at['cell']}: the kernel died, perhaps for lack of memory") from error
    faults = list(_widget_faults(done))
    _tidy(done)
    for fault in (*output_faults(done), *faults):
        raise BuildError(f"{name}, {fault}")
    done.metadata["labs"] = {"executed_source_sha256": source_sha256(done)}
    return done


def _environment(strict: bool) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("LABS_") or k == files.CACHE}
    paths = [str(PACKAGE.parent), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return env | ({"LABS_STRICT": "1"} if strict else {})


def _widget_faults(notebook: NotebookNode) -> Iterator[str]:
    """What a slider's function raised or wrote to standard error. It ends up in the widget's state, where no one sees it."""
    for state in notebook.metadata.get("widgets", {}).values():
        for model in state["state"].values():
            for output in model["state"].get("outputs", []):
                if output["output_type"] == "error":
                    yield f"a widget's function: {output['ename']}: {output['evalue']}"
                elif output.get("name") == "stderr":
                    yield f"a widget's function: writes to standard error: {output['text'].strip().splitlines()[-1:]}"


def _tidy(notebook: NotebookNode) -> None:
    """Take out what differs between runs, and stand a sentence in for live widgets, which nothing can draw without their kernel."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = dict(KERNELSPEC)
    notebook.metadata.update(deepcopy(setup_cell.METADATA))
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        for key in VOLATILE:
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            if WIDGET in output.get("data", {}):
                output.data = NotebookNode({"text/plain": WIDGET_TEXT})
                output.metadata["labs"] = {"widget": True}
            elif "image/png" in output.get("data", {}):
                output.data.pop("text/html", None)  # the same picture again, for JupyterLab alone


def output_faults(notebook: NotebookNode) -> Iterator[str]:
    """What is wrong with stored outputs: cells that never ran or ran out of order, errors, anything on standard error."""
    last = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if cell.execution_count != last + 1:
            yield f"cell {cell.id}: " + ("never ran" if cell.execution_count is None else "ran out of order")
        last = cell.execution_count or last
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {cell.id}: holds an error: {output.ename}: {output.evalue}"
            elif output.output_type == "stream" and output.name == "stderr":
                yield f"cell {cell.id}: writes to standard error: {output.text.strip().splitlines()[-1:]}"
