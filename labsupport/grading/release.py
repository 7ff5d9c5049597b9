"""A lab is handed out: the course's own notebook with the class's choice of exercises, points and, if wanted, own numbers.

Exercises that the class does not count stay in the notebook as ungraded practice, because what follows them uses their functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime, time
from functools import partial
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from labsupport.course import workbook
from labsupport.course.carry import is_prediction, short_hash
from labsupport.grading import own
from labsupport.grading.classroom import Classroom
from labsupport.grading.items import PREDICTION, QUESTIONS
from labsupport.grading.records import GradingError, Release
from labsupport.grading.submission import CHECK
from labsupport.model import files

HEADING = re.compile(r"^(### Exercise (\d+\.\d+):.*)\)$", re.MULTILINE)


@dataclass(frozen=True)
class Released:
    """What was done. notebooks: the files to hand out. lines: what the instructor should know, a sentence each."""

    release: Release
    notebooks: list[Path]
    lines: list[str]


def release(
    classroom: Classroom,
    lab: int,
    due: str | datetime | None = None,
    only: Sequence[str] = (),
    points: Mapping[str, float] | None = None,
    own_numbers: bool = False,
    again: bool = False,
    on_item: Callable[[], None] = lambda: None,
) -> Released:
    """Write the notebook of a lab, or one for each learner, into the class's folder.

    due: ISO 8601; a date without a time means the end of that day, one without a zone is in this machine's. only: ids of the
    exercises that count, all without it. points: of exercises, where they are not the course's. again: replace notebooks that have
    been handed out; without it they stay, learners who are new on the roster get theirs, and `due` moves the date.
    on_item: called after each number of a learner's own. Raises GradingError and WriteError; nothing is half written then.
    """
    try:
        source = workbook.chapter(str(lab))
        original = workbook.read(source)
    except workbook.WorkbookError as error:
        raise GradingError(str(error)) from None
    folder, lines = classroom.folder_of("release", lab), list[str]()
    counted = _points(lab, original, only, points or {})
    when = _due(due, lines)
    before = classroom.release(lab) if (folder / "release.json").exists() else None
    first = before.released if before else datetime.now(UTC)
    wanted = Release(lab=lab, points=counted, due=when, own_numbers=own_numbers, notebook=source.name, released=first)
    kept = before is not None and not again
    if before is not None and kept:
        differ = "with other exercises or points" if (only or points) and before.points != counted else ""
        differ = differ or ("without numbers of learners' own" if own_numbers and not before.own_numbers else "")
        if differ:
            raise GradingError(f"lab {lab:02d} has been released {differ}: --again replaces its notebooks")
        wanted = before.model_copy(update={"due": when} if due is not None else {})
        lines.append(f"lab {lab:02d} has been released before: its notebooks stay as they are; --again replaces them")
    copy = _with_points(workbook.learner_copy(original), wanted.points)
    written: dict[Path, NotebookNode] = {}
    texts: dict[Path, str] = {folder / "release.json": wanted.model_dump_json(indent=1) + "\n"}
    if wanted.own_numbers:
        if not classroom.roster:
            raise GradingError(f"{classroom.folder} has no learners: numbers of their own need a roster")
        drawn, said = own.draw(classroom, lab, wanted.points, own.load(classroom, lab), on_item)
        lines += said
        texts[own.path_of(classroom, lab)] = drawn.model_dump_json(indent=1) + "\n"
        for learner in classroom.roster:
            written[folder / learner / source.name] = _with_own_numbers(copy, lab, drawn.items[learner])
    else:
        written[folder / source.name] = copy
    notebooks = list(written)
    if kept:
        written = {path: notebook for path, notebook in written.items() if not path.exists()}
        lines += [f"{path.parent.name} is new and has a copy now" for path in written] if wanted.own_numbers else []
    for notebook in written.values():
        nbformat.validate(notebook)
    for path in (*written, *texts):
        with files.explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    files.replace_all(
        {path: partial(nbformat.write, notebook) for path, notebook in written.items()}
        | {path: partial(_write, text) for path, text in texts.items()}
    )
    return Released(wanted, notebooks, lines)


def _write(text: str, path: Path) -> None:
    path.write_text(text, "utf-8")


def _points(lab: int, notebook: NotebookNode, only: Sequence[str], points: Mapping[str, float]) -> dict[str, float]:
    """Of the exercises that count, in their order. Raises GradingError for an exercise that the lab does not have."""
    known = {}
    for cell in notebook.cells:
        if found := CHECK.fullmatch(cell.metadata.get("nbgrader", {}).get("grade_id", "")):
            known[f"{int(found[1])}.{int(found[2])}"] = float(cell.metadata.nbgrader.points)
    for option, ids in (("--only", only), ("--points", points)):
        for id in ids:
            if id not in known:
                raise GradingError(f"{option}: lab {lab:02d} has no exercise {id!r}, it has {', '.join(known)}")
    for id, value in points.items():
        if not 0 <= value <= 1000:
            raise GradingError(f"--points: {id} is to have {value:g} points, wanted a number from 0 to 1000")
        if only and id not in only:
            raise GradingError(f"--points: {id} is not among the exercises of --only")
    return {id: float(points.get(id, value)) for id, value in known.items() if not only or id in only}


def _due(due: str | datetime | None, lines: list[str]) -> datetime | None:
    """With a time zone. What was filled in is said."""
    if due is None:
        return None
    if isinstance(due, str):
        try:
            when = datetime.fromisoformat(due.strip())
        except ValueError:
            raise GradingError(f"--due is {due[:60]!r}, wanted a date such as 2027-03-01T23:59+01:00") from None
        if len(due.strip()) <= len("2027-03-01"):
            when = datetime.combine(when.date(), time(23, 59, 59))
    else:
        when = due
    if when.tzinfo is None:
        try:
            when = when.astimezone()
        except (OverflowError, OSError, ValueError):
            raise GradingError(f"--due is {due}, wanted a year of this century") from None
        lines.append(f"due {when.isoformat()}: the time zone is this machine's")
    if when < datetime.now(when.tzinfo):
        lines.append(f"due {when.isoformat()} is in the past")
    return when


def _with_points(notebook: NotebookNode, points: Mapping[str, float]) -> NotebookNode:
    """Headings and nbgrader's points agree with the class's; what does not count says so, and has 0 points."""

    def heading(found: re.Match) -> str:
        mine = points.get(found[2])
        return f"{found[1]}, {'ungraded practice' if mine is None else f'{mine:g} point' + 's' * (mine != 1)})"

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = HEADING.sub(heading, cell.source)
        about = cell.metadata.get("nbgrader", {})
        if about.get("grade") and (found := CHECK.fullmatch(about.get("grade_id", ""))):
            value = points.get(f"{int(found[1])}.{int(found[2])}", 0.0)
            about["points"] = int(value) if value.is_integer() else value
    return _recorded(notebook)


def _with_own_numbers(notebook: NotebookNode, lab: int, items: Mapping[str, own.Item]) -> NotebookNode:
    """A copy with a cell after each check that has a number, and the prediction after the lab's first one."""
    copy = deepcopy(notebook)
    cells = []
    asked = PREDICTION not in items
    for cell in copy.cells:
        cells.append(cell)
        found = CHECK.fullmatch(cell.get("id", ""))
        id = f"{int(found[1])}.{int(found[2])}" if found else ""
        if id in items:
            cells.append(_number_cell(id, items[id].constants))
        if is_prediction(cell) and not asked:
            asked = True
            cells += _prediction_cells(lab, items[PREDICTION].constants[0])
    copy.cells = cells
    return _recorded(copy)


def _number_cell(id: str, constants: Sequence[int]) -> NotebookNode:
    name = f"own_{id.replace('.', '_')}"
    source = (
        f"# {id}, a number of your own. When the check above says pass, this cell prints it:\n"
        f"# write it in place of None, all of its digits, and no code.\n"
        f"from labsupport.exercises.own import own_number\n\n"
        f'own_number("{id}", {", ".join(map(str, constants))})\n'
        f"{name} = None"
    )
    return new_code_cell(source, id=name.replace("_", "-"), metadata={"tags": ["own"]})


def _prediction_cells(lab: int, constant: int) -> list[NotebookNode]:
    text = (
        "**A question with numbers of your own.** "
        f"{QUESTIONS[lab].text(constant)} Answer it in your head before you go on; within 5 % is right."
    )
    code = f"own_predicted_{lab} = None  # a number"
    return [
        new_markdown_cell(text, id=f"own-question-{lab}", metadata={"tags": ["own"]}),
        new_code_cell(code, id=f"own-predicted-{lab}", metadata={"tags": ["own"]}),
    ]


def _recorded(notebook: NotebookNode) -> NotebookNode:
    """`labs reset --keep-answers` tells by these hashes which cells a learner wrote."""
    record = notebook.metadata["labs"]
    if "from_edited" not in record:
        record["cells"] = sorted({*record["cells"], *(short_hash(cell.source) for cell in notebook.cells)})
    return notebook
