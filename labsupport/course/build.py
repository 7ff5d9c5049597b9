"""The two forms of a notebook: `notebooks/solutions/NN_name.ipynb` is written by hand, `notebooks/NN_name.ipynb` is made from it.

Both are executed, and both store their outputs and a hash of what was executed. So a check that runs nothing can tell whether the
two belong together and whether the outputs are those of the source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from labsupport import PACKAGE
from labsupport.course import setup_cell
from labsupport.course.execute import VOLATILE, BuildError, essence, execute, output_faults, source_sha256
from labsupport.model import files

STUB = "raise NotImplementedError  # your answer here"


def find_root(start: Path | None = None) -> Path:
    """The folder with pyproject.toml and notebooks/solutions: `start` (the current one), one above it, or the package's."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents, PACKAGE.parent):
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks" / "solutions").is_dir():
            return folder
    raise BuildError(f"no notebooks/solutions in {start} or above; run this inside a clone of the repository")


def sources(root: Path, numbers: list[str] | None = None) -> list[Path]:
    """The hand-written notebooks under `root`, all of them or those with these numbers ("2" and "02" are the same)."""
    found = sorted((root / "notebooks" / "solutions").glob("[0-9][0-9]_*.ipynb"))
    if not numbers:
        return found
    by_number = {path.name[:2]: path for path in found}
    for number in numbers:
        if number.zfill(2) not in by_number:
            raise BuildError(f"there is no notebook {number!r}, there are {', '.join(by_number) or 'none'}")
    return [by_number[n] for n in sorted({n.zfill(2) for n in numbers})]


def student_path(source: Path) -> Path:
    return source.parent.parent / source.name


def read(path: Path) -> NotebookNode:
    """Read a notebook. Raises BuildError if it is not one, or if its cells lack ids of their own."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["nbformat"] != 4:
            raise ValueError(f"nbformat {raw['nbformat']}, wanted 4")
        ids = [cell.get("id") for cell in raw["cells"]]
        notebook = nbformat.reads(json.dumps(raw), as_version=4)
        nbformat.validate(notebook)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, nbformat.ValidationError) as error:
        raise BuildError(f"{path.name}: not a notebook ({type(error).__name__}: {str(error).splitlines()[0]})") from error
    if None in ids or len(set(ids)) < len(ids):
        raise BuildError(f"{path.name}: every cell needs an id of its own (nbformat 4.5)")
    return notebook


def write(notebooks: dict[Path, NotebookNode]) -> None:
    """Write notebooks, all or none."""
    for notebook in notebooks.values():
        nbformat.validate(notebook)
    files.replace_all({path: partial(nbformat.write, notebook) for path, notebook in notebooks.items()})


def student_form(source: NotebookNode, name: str = "notebook") -> NotebookNode:
    """The learner's form: solutions replaced by a stub, hidden tests gone, graded cells locked, no outputs.

    nbgrader's own preprocessors do it, in the order of its `generate_assignment`. Its checksums are left out: they change with
    every edit, and its autograder takes them from its own database.
    """
    # nbgrader is a tool of those who teach; a learner's installation lacks it.
    from nbgrader.preprocessors import CheckCellMetadata, ClearHiddenTests, ClearOutput, ClearSolutions, LockCells

    for cell in source.cells:
        if cell.metadata.get("nbgrader", {}).get("solution") and "### BEGIN SOLUTION" not in cell.source:
            raise BuildError(f"{name}, cell {cell.id}: a solution cell without ### BEGIN SOLUTION would be cleared whole")
    notebook = deepcopy(source)
    notebook.metadata.pop("labs", None)
    steps = (CheckCellMetadata(), LockCells(), ClearSolutions(code_stub={"python": STUB}), ClearOutput())
    try:
        for step in (*steps, ClearHiddenTests(), CheckCellMetadata()):
            step.log.disabled = True  # the exception says the same in one line
            notebook, _ = step.preprocess(notebook, {})
    except Exception as error:
        raise BuildError(f"{name}: nbgrader refuses it: {error}") from error
    for cell in notebook.cells:
        for key in VOLATILE:
            cell.metadata.pop(key, None)
    return notebook


def freshness_faults(notebook: NotebookNode) -> Iterator[str]:
    """What is wrong between a notebook and its outputs."""
    executed = notebook.metadata.get("labs", {}).get("executed_source_sha256")
    if executed != source_sha256(notebook):
        yield "its outputs are older than its source" if executed else "it was never executed by labs build"
    yield from output_faults(notebook)


def sync_faults(student: NotebookNode, wanted_form: NotebookNode) -> Iterator[str]:
    """Where a student form is not the one that its source makes. Outputs, counts and timings are not compared."""
    found, wanted = ([essence(cell) for cell in notebook.cells] for notebook in (student, wanted_form))
    if [cell["id"] for cell in found] != [cell["id"] for cell in wanted]:
        yield "its cells are not those of its source, or not in their order"
        return
    for cell, wanted_cell in zip(found, wanted, strict=True):
        for key in ("type", "source", "metadata"):
            if cell[key] != wanted_cell[key]:
                yield f"cell {cell['id']}: its {key} is not what its source makes"


def check(source: Path) -> list[str]:
    """All that is wrong with a source and its student form, without running anything. Empty when all is well."""
    student = student_path(source)
    try:
        written = read(source)
        want = student_form(written, source.name)
        faults = [f"solutions/{source.name}: {fault}" for fault in freshness_faults(written)]
        if not student.is_file():
            return [*faults, f"{student.name}: has not been built"]
        have = read(student)
    except BuildError as error:
        return [str(error)]
    return [*faults, *(f"{student.name}: {fault}" for fault in (*sync_faults(have, want), *freshness_faults(have)))]


def orphans(root: Path) -> list[str]:
    """Student forms that no source makes."""
    made = {path.name for path in sources(root)}
    return [f"{p.name}: has no source" for p in sorted((root / "notebooks").glob("*.ipynb")) if p.name not in made]


def build(source: Path, on_cell: Callable[[int], None] | None = None) -> None:
    """Execute a source and its student form and write both. Raises BuildError, and then nothing has been written."""
    written = read(source)
    blank = student_form(written, source.name)  # before anything slow
    solved = execute(written, f"solutions/{source.name}", strict=True, on_cell=on_cell)
    ran = execute(blank, source.name, strict=False, on_cell=on_cell)
    write({source: solved, student_path(source): ran})


def renewed(source: NotebookNode, path: Path) -> NotebookNode:
    """The student form of `source`, not executed. Outputs of cells that have not changed are kept from the one at `path`."""
    made = student_form(source, path.name)
    if path.is_file():
        before = read(path)
        old = {cell.id: cell for cell in before.cells if cell.cell_type == "code"}
        for cell in made.cells:
            if cell.cell_type == "code" and cell.id in old and setup_cell.executed(old[cell.id]) == setup_cell.executed(cell):
                cell.outputs, cell.execution_count = old[cell.id].outputs, old[cell.id].execution_count
        if "labs" in before.metadata:
            made.metadata["labs"] = before.metadata.labs
    return made


def generate(source: Path) -> None:
    """Write the student form without executing it; `check` calls outputs old that may be."""
    path = student_path(source)
    write({path: renewed(read(source), path)})
