"""The learner's working copies of the notebooks: laid out, kept, brought up to date, reset.

A copy keeps in `metadata.labs` the hash of the notebook that it was made from. This shows whether the notebook has been updated
since and whether the learner has worked in the copy. Nothing that a learner wrote is overwritten without a backup.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from copy import deepcopy
from datetime import datetime
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from labsupport import PACKAGE
from labsupport.model import files

BACKUPS = "backups"


class WorkbookError(Exception):
    """One line for the learner: what is wrong and what to do."""


def notebooks_dir() -> Path:
    """The notebooks that copies are made from: the repository's in a checkout, the packed ones in an installed wheel."""
    # Packed ones first: whatever happens to be called "notebooks" beside an installed package is not ours.
    for candidate in (PACKAGE / "notebooks", PACKAGE.parent / "notebooks"):
        if candidate.is_dir():
            return candidate
    raise WorkbookError(f"the course's notebooks are neither beside {PACKAGE} nor in it: the installation is incomplete")


def default_dir() -> Path:
    """Where the copies go: `workbook` in the repository, or in the current directory where labsupport is installed as a wheel."""
    source = notebooks_dir()
    inside = source.parent == PACKAGE
    return (Path.cwd() if inside else source.parent) / "workbook"


def chapters(source: Path | None = None) -> dict[int, Path]:
    """Chapter number to notebook, in order. Raises WorkbookError if there is none."""
    source = source or notebooks_dir()
    found = {int(p.name[:2]): p for p in sorted(source.glob("[0-9][0-9]_*.ipynb"))}
    if not found:
        raise WorkbookError(f"there are no notebooks in {source}: the installation is incomplete")
    return found


def chapter(number: str, source: Path | None = None) -> Path:
    """The notebook of a chapter given as "2", "02" or "02_rounding". Raises WorkbookError listing the chapters."""
    known = chapters(source)
    parsed = re.fullmatch(r"(\d{1,2})(_\w+)?(\.ipynb)?", number)
    path = known.get(int(parsed.group(1))) if parsed else None
    if path is None or (parsed.group(2) and path.stem != number.removesuffix(".ipynb")):
        raise WorkbookError(f"there is no chapter {number!r}; the chapters are {', '.join(p.stem for p in known.values())}")
    return path


def read(path: Path) -> NotebookNode:
    """Raises WorkbookError for anything that is not a notebook; the file is left as it is."""
    try:
        notebook = nbformat.reads(path.read_text("utf-8"), as_version=4)
        nbformat.validate(notebook)
    except FileNotFoundError:
        raise WorkbookError(f"{path} is not there: `labs lab` lays it out") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, nbformat.ValidationError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise WorkbookError(f"{path} cannot be read as a notebook ({reason})") from None
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, lambda temporary: nbformat.write(notebook, temporary))


def source_hash(notebook: NotebookNode) -> str:
    """SHA-256 over ids, types and sources of the cells. Editing a notebook changes it, running the notebook does not."""
    cells = [[c.get("id"), c.cell_type, c.source] for c in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def is_prediction(cell: NotebookNode) -> bool:
    return "prediction" in cell.metadata.get("tags", [])


def answers(notebook: NotebookNode) -> Iterator[tuple[str, NotebookNode]]:
    """The cells that a learner fills in, each with a key that an update keeps: its grade_id, or the cell id of a prediction."""
    for cell in notebook.cells:
        about = cell.metadata.get("nbgrader", {})
        if about.get("solution") and about.get("grade_id"):
            yield about["grade_id"], cell
        elif is_prediction(cell):
            yield f"prediction {cell.get('id')}", cell


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def learner_copy(source: NotebookNode) -> NotebookNode:
    """A copy to work in. It has no outputs from the first prediction on: they would give the answer away."""
    copy = deepcopy(source)
    hidden = False
    for cell in copy.cells:
        hidden = hidden or is_prediction(cell)
        if hidden and cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    blanks = {key: _short_hash(cell.source) for key, cell in answers(copy)}
    copy.metadata["labs"] = {"source_sha256": source_hash(source), "blanks": blanks}
    return copy


def _stale(notebook: NotebookNode, source: NotebookNode) -> bool:
    return notebook.metadata.get("labs", {}).get("source_sha256", source_hash(notebook)) != source_hash(source)


def lay_out(workbook: Path, source: Path | None = None) -> list[str]:
    """Make the copies that are missing, update those nobody has worked in, and return a line for each that needs a decision."""
    lines = []
    for number, path in chapters(source).items():
        original, mine = read(path), workbook / path.name
        if not mine.exists():
            write(learner_copy(original), mine)
            continue
        try:
            notebook = read(mine)
        except WorkbookError as error:
            lines.append(f"{error}; left as it is. `labs reset {number:02d}` keeps it in {BACKUPS}/ and lays out a fresh copy")
            continue
        if not _stale(notebook, original):
            continue
        if notebook.metadata.get("labs", {}).get("source_sha256") == source_hash(notebook):
            write(learner_copy(original), mine)
        else:
            lines.append(
                f"{mine.name} has changed in the course and you have worked in your copy, so it is left as it is. "
                f"`labs reset {number:02d} --keep-answers` brings it up to date with your answers in it"
            )
    return lines


def back_up(path: Path) -> Path:
    """A copy of the file under backups/, byte for byte, named after the time."""
    folder = path.parent / BACKUPS
    folder.mkdir(exist_ok=True)
    stem, count = f"{path.stem}-{datetime.now():%Y%m%d-%H%M%S}", 1
    target = folder / f"{stem}.ipynb"
    while target.exists():
        count += 1
        target = folder / f"{stem}-{count}.ipynb"
    files.replace(target, lambda temporary: shutil.copy2(path, temporary))
    return target


def carry_over(old: NotebookNode, fresh: NotebookNode) -> tuple[int, list[str]]:
    """Put the answers and predictions of `old` into `fresh`. Returns how many, and a line for each text that has no place there.

    A cell that was never filled in is left out, since its stub may have changed. Where several cells hold one answer (a copied cell
    keeps the name of its original) the last one counts, as it does when the notebook is run.
    """
    blanks = old.metadata.get("labs", {}).get("blanks", {})
    places = dict(answers(fresh))
    filled: dict[str, list[str]] = {}
    for key, cell in answers(old):
        if _short_hash(cell.source) != blanks.get(key):
            filled.setdefault(key, []).append(cell.source)
    unplaced = []
    for key, texts in filled.items():
        if key not in places:
            unplaced.append(f"{key} is no longer in this notebook: your text for it is in the backup")
            continue
        places[key].source = texts[-1]
        if len(texts) > 1:
            unplaced.append(f"{key} had {len(texts)} cells: the last was carried over, the others are in the backup")
    return sum(key in places for key in filled), unplaced


def reset(workbook: Path, number: str, keep_answers: bool = False, source: Path | None = None) -> list[str]:
    """Lay out a fresh copy of one chapter after a backup of the old one; the lines to show. Raises WorkbookError."""
    path = chapter(number, source)
    fresh, mine = learner_copy(read(path)), workbook / path.name
    if not mine.exists():
        write(fresh, mine)
        return [f"{mine.name}: there was no copy, now there is"]
    carried, unplaced = 0, []
    if keep_answers:
        try:
            carried, unplaced = carry_over(read(mine), fresh)
        except WorkbookError as error:
            hint = f"`labs reset {path.name[:2]}` without --keep-answers keeps it in {BACKUPS}/"
            raise WorkbookError(f"{error}, so no answers can be taken from it; nothing was changed. {hint}") from None
    backup = back_up(mine)
    write(fresh, mine)
    lines = [f"{mine.name}: a fresh copy; the old one is {BACKUPS}/{backup.name}"]
    if keep_answers:
        lines.append(f"{carried} answers and predictions were carried over")
    return lines + unplaced
