"""The learner's working copies of the notebooks: laid out, kept, brought up to date, reset.

A copy keeps in `metadata.labs` the hash of the notebook that it was made from. This shows whether the notebook has been updated
since and whether the learner has worked in the copy. Nothing that a learner wrote is overwritten without a backup.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from labsupport import PACKAGE
from labsupport.course.carry import answers, carry_over, is_prediction, short_hash, table
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
        text = path.read_text("utf-8-sig")  # Notepad writes a byte-order mark
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cells without ids, as Colab writes them
            notebook = nbformat.reads(text, as_version=4)
            nbformat.validate(notebook)
        if not isinstance(notebook.metadata, dict):
            raise ValueError("its metadata is not a table")
        json.dumps(notebook, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise WorkbookError(f"{path} is not there: `labs lab` lays it out") from None
    except UnicodeEncodeError:
        raise WorkbookError(f"{path} cannot be read as a notebook (it holds half of a character, a lone surrogate)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, nbformat.ValidationError) as error:
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


def is_edited(source: NotebookNode) -> bool:
    """Whether somebody wrote into one of the course's own notebooks since `labs build` ran it."""
    from labsupport.course.execute import source_sha256  # it brings the kernels along

    executed = table(source.metadata, "labs").get("executed_source_sha256")
    return executed is not None and (any("id" not in cell for cell in source.cells) or executed != source_sha256(source))


def learner_copy(source: NotebookNode) -> NotebookNode:
    """A copy to work in. It has no outputs from the first prediction on: they would give the answer away."""
    copy = deepcopy(source)
    hidden = False
    for cell in copy.cells:
        hidden = hidden or is_prediction(cell)
        if hidden and cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        for output in cell.get("outputs", []):
            _with_alternative_text(output)
    record: dict[str, Any] = {"source_sha256": source_hash(source), "blanks": {}, "cells": []}
    if is_edited(source):
        # What the cells held before somebody filled them in is not known, so whatever is in them counts as written by the learner.
        record["from_edited"] = True
    else:
        record["blanks"] = {key: short_hash(cell.source) for key, cell in answers(copy)}
        record["cells"] = sorted({short_hash(cell.source) for cell in copy.cells})
    copy.metadata["labs"] = record
    return copy


def _with_alternative_text(output: NotebookNode) -> None:
    """Give a stored picture the form in which JupyterLab shows its alternative text."""
    png, about = output.get("data", {}).get("image/png"), output.get("metadata", {}).get("image/png", {})
    if png and "alt" in about:
        from labsupport.figures import base  # it brings PyTorch along, and most calls lay out nothing new

        output.data["text/html"] = base.as_html(png, about)


def _stale(notebook: NotebookNode, source: NotebookNode) -> bool:
    return table(notebook.metadata, "labs").get("source_sha256", source_hash(notebook)) != source_hash(source)


def _untouched(notebook: NotebookNode) -> bool:
    record = table(notebook.metadata, "labs")
    return record.get("source_sha256") == source_hash(notebook) and not record.get("from_edited")


def lay_out(workbook: Path, source: Path | None = None) -> list[str]:
    """Make the copies that are missing, update those nobody has worked in, and return a line for each that needs a decision.

    A copy that is replaced is backed up first. A chapter that cannot be read leaves the others as they would be without it.
    """
    lines = []
    for number, path in chapters(source).items():
        mine = workbook / path.name
        try:
            original = read(path)
        except WorkbookError as error:
            lines.append(f"{error}, so there is no new copy of it; `git checkout -- notebooks` in the course's folder restores it")
            continue
        edited = is_edited(original)
        if edited:
            lines.append(edited_line(path, mine))
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
        if _untouched(notebook):
            back_up(mine)
            write(learner_copy(original), mine)
        elif not edited:
            lines.append(
                f"{mine.name} has changed in the course and you have worked in your copy, so it is left as it is. "
                f"`labs reset {number:02d} --keep-answers` brings it up to date with your answers in it"
            )
    return lines


def edited_line(path: Path, mine: Path) -> str:
    return f"{path} has been edited, and an update of the course may replace it: work in {mine}, which updates leave as it is"


def back_up(path: Path) -> Path:
    """A copy of the file under backups/, byte for byte, named after the time. No other process can have taken the name."""
    folder = path.parent / BACKUPS
    folder.mkdir(exist_ok=True)
    stem, count = f"{path.stem}-{datetime.now():%Y%m%d-%H%M%S}", 1
    target = folder / f"{stem}.ipynb"
    while True:
        try:
            target.touch(exist_ok=False)
            break
        except FileExistsError:
            count += 1
            target = folder / f"{stem}-{count}.ipynb"
    try:
        files.replace(target, lambda temporary: shutil.copy2(path, temporary))
    except BaseException:
        target.unlink()
        raise
    return target


def reset(workbook: Path, number: str, keep_answers: bool = False, source: Path | None = None) -> list[str]:
    """Lay out a fresh copy of one chapter after a backup of the old one; the lines to show. Raises WorkbookError."""
    path = chapter(number, source)
    original, mine = read(path), workbook / path.name
    fresh = learner_copy(original)
    warning = [edited_line(path, mine)] if is_edited(original) else []
    if not mine.exists():
        write(fresh, mine)
        return [f"{mine.name}: there was no copy, now there is", *warning]
    carried, unplaced = 0, list[str]()
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
    return lines + unplaced + warning
