"""What is taken from a notebook that was handed in: texts and numbers. Nothing of it is run, imported or compiled.

Editors lose cell ids and metadata, and learners split, copy, merge and move cells. So an answer is found by nbgrader's name of its
cell, else by the cell's id, else by the function that it defines. Only answer texts count: raised points, edited checks and outputs
change nothing, and are remarked on. Texts are looked at with linear patterns; Python's parser, which hostile texts can bring to its
limits, sees single short lines.
"""

from __future__ import annotations

import ast
import math
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

from labsupport.course import workbook
from labsupport.course.carry import ASSIGNS, DEFINES, is_prediction, short_hash
from labsupport.grading.cells import ANSWER, LARGEST_FILE, Cell, cells_of
from labsupport.grading.items import PREDICTION
from labsupport.grading.records import GradingError, Release, Submission

LONGEST_LINE = 300  # characters of a line that sets a prediction
LONGEST_TEXT = 100  # characters of a prediction that is a text
MOST_LINES = 20  # that set one prediction and are looked at
MOST_REMARKS = 50

CHECK = re.compile(r"check-(\d{1,2})-(\d{1,2})")
CHECKED = re.compile(r"^(?:\w+ *= *)?check\( *[\"'](\d{1,2})\.(\d{1,2})[\"']", re.MULTILINE)
OURS = re.compile(r"^((?:\w+ *= *)?(?:check|score|tally|revisit)\(.*)$", re.MULTILINE)
COMMAND = re.compile(r"^(%%?[A-Za-z]|!(?!=)|\?)", re.MULTILINE)
OWN = re.compile(r"own_(?:predicted_\d{1,2}|\d{1,2}_\d{1,2})")
OWN_CALL = re.compile(r"^own_number\(.*$|^from labsupport.exercises.own import own_number *$|^#.*$", re.MULTILINE)


@dataclass(frozen=True)
class Lab:
    """What the course's own notebook of a chapter holds. exercises: the function's name by id. stubs: text of the empty answers."""

    exercises: dict[str, str]
    stubs: dict[str, str]
    points: dict[str, float]
    predictions: tuple[str, ...]
    prediction_ids: frozenset[str]
    by_id: dict[str, str]  # text of each cell by its id
    texts: frozenset[str]  # hashes of all cells


class OtherLab(GradingError):
    """A notebook, but of another chapter."""


@dataclass
class _Found:
    answers: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def read(path: Path, lab: int, release: Release | None = None) -> Submission:
    """What a notebook of chapter `lab` holds. `release`: as it was handed out; points that differ from its are then remarked on.

    Raises GradingError, in one line, for a file that is no notebook or beyond the limits above, and OtherLab for another lab's.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise GradingError(f"{path.name} is not a file")
        if status.st_size > LARGEST_FILE:
            raise GradingError(f"{path.name} has {status.st_size / 1e6:.0f} MB, more than {LARGEST_FILE / 1e6:.0f} MB")
        raw = path.read_bytes()
    except OSError as error:
        raise GradingError(f"{path.name} cannot be read: {error.strerror}") from None
    return read_bytes(raw, path.name, lab, release)


def read_bytes(raw: bytes, name: str, lab: int, release: Release | None = None) -> Submission:
    """`read` of a file that is in memory; `name`: what messages call it."""
    course = _lab(lab)
    cells, remarks = cells_of(raw, name)
    _refuse_other_lab(name, lab, course, cells)
    found = _Found(remarks=remarks)
    _find_answers(course, cells, found)
    _remark_on_checks(course, cells, release, found)
    asked = {f"own_{id.replace('.', '_')}" for id in course.exercises} | {f"own_predicted_{lab}"}
    own_names = sorted({name for cell in cells for name in ASSIGNS.findall(cell.text) if name in asked})
    guesses = _values(cells, course.predictions, course.prediction_ids, found.remarks)
    numbers = _values(cells, own_names, frozenset(), found.remarks)
    own = {_own_key(name): _number(name, numbers[name], found.remarks) for name in own_names}
    others = tuple(_without_ours(cell.text)[0] for cell in cells if _is_learners(course, cell))
    said = list(dict.fromkeys(found.remarks))
    if len(said) > MOST_REMARKS:
        said = [*said[:MOST_REMARKS], f"and {len(said) - MOST_REMARKS} more remarks"]
    return Submission(answers=found.answers, others=others, predictions=guesses, own=own, remarks=tuple(said))


@lru_cache
def _lab(lab: int) -> Lab:
    try:
        copy = workbook.read(workbook.chapter(str(lab)))
    except workbook.WorkbookError as error:
        raise GradingError(str(error)) from None
    exercises, stubs, points, predictions, prediction_ids = {}, {}, {}, list[str](), set[str]()
    for cell in copy.cells:
        if found := ANSWER.fullmatch(cell.id):
            stubs[f"{int(found[1])}.{int(found[2])}"] = cell.source
        if CHECK.fullmatch(cell.id) and (called := CHECKED.search(cell.source)):
            id = f"{called[1]}.{called[2]}"
            exercises[id], points[id] = cell.source.split("=")[0].strip(), float(cell.metadata.nbgrader.points)
        if is_prediction(cell):
            predictions += ASSIGNS.findall(cell.source)
            prediction_ids.add(cell.id)
    texts = frozenset(short_hash(cell.source) for cell in copy.cells)
    by_id = {cell.id: cell.source for cell in copy.cells}
    return Lab(exercises, stubs, points, tuple(predictions), frozenset(prediction_ids), by_id, texts)


def _refuse_other_lab(name: str, lab: int, course: Lab, cells: list[Cell]) -> None:
    named: dict[int, int] = {}
    for cell in cells:
        ids = {cell.exercise(ANSWER), cell.exercise(CHECK), *(f"{a}.{b}" for a, b in CHECKED.findall(cell.text))}
        for id in ids - {None}:
            chapter = int(str(id).split(".")[0])
            named[chapter] = named.get(chapter, 0) + 1
    if lab in named:
        return
    if named:
        other = max(named, key=lambda chapter: named[chapter])
        raise OtherLab(f"{name} is lab {other:02d}, wanted lab {lab:02d}")
    if not {function for cell in cells for function in _defined(cell.text)} & set(course.exercises.values()):
        raise OtherLab(f"{name} has none of the exercises of lab {lab:02d}")


# Answers --------------------------------------------------------------------------------------------------------------
def _find_answers(course: Lab, cells: list[Cell], found: _Found) -> None:
    """By the cell's name or id; then, for what is missing, was left empty or does not define it, by the function."""
    names = {name: id for id, name in course.exercises.items()}
    defining: dict[str, list[Cell]] = {}  # by exercise: cells in which the learner defines its function
    empty: dict[str, list[Cell]] = {}  # by exercise: its stub, untouched
    stubs = {_squeezed(text): id for id, text in course.stubs.items()}
    for cell in cells:
        if id := stubs.get(_squeezed(cell.text)):
            empty.setdefault(id, []).append(cell)
        elif not _is_courses(course, cell):
            for name in _defined(_own_part(course, cell)) & names.keys():
                defining.setdefault(names[name], []).append(cell)
    for id, name in course.exercises.items():
        blank = empty.get(id, [])
        mine = [cell for cell in cells if cell.exercise(ANSWER) == id]
        written = [cell for cell in mine if cell.text.strip() and cell not in blank]
        elsewhere = [cell for cell in defining.get(id, []) if cell not in written]
        for cell in (*blank, *mine):
            cell.taken = True
        if elsewhere and not any(name in _defined(cell.text) | set(ASSIGNS.findall(cell.text)) for cell in written):
            last = elsewhere[-1]
            last.taken = True
            for cell in written:
                cell.taken = False
            found.remarks.append(f"{id}: taken from cell {last.place}, which defines {name}{_among(elsewhere)}")
            _take(id, _own_part(course, last), found)
        elif written:
            _take(id, _joined(id, name, written, found), found)
        elif mine or blank:
            found.answers[id] = course.stubs[id]


def _joined(id: str, name: str, written: list[Cell], found: _Found) -> str:
    """The text of an answer of which there are one or more cells that are not the stub.

    Of copies that define the function the last counts, as it would when the notebook runs. A cell that was split goes on, indented,
    in the next; other parts, such as a helper above the function, become cells of the learner's own.
    """
    defining = [index for index, cell in enumerate(written) if name in _defined(cell.text)]
    if not defining:
        return "\n".join(cell.text for cell in written)
    chosen = written[defining[-1]]
    if len({_squeezed(written[index].text) for index in defining}) > 1:
        places = ", ".join(str(written[index].place) for index in defining)
        found.remarks.append(f"{id} is in cells {places} with different texts: cell {chosen.place} was taken, the last filled in")
    text, rest = chosen.text, list[Cell]()
    for index, cell in enumerate(written):
        if index > defining[-1] and cell.text.lstrip("\n")[:1] in (" ", "\t"):
            text += "\n" + cell.text
        elif index not in defining:
            rest.append(cell)
    for cell in rest:
        cell.taken = False  # a helper, needed where the answer uses it
    return text


def _take(id: str, text: str, found: _Found) -> None:
    found.answers[id], commands = _without_ours(text)
    if commands:
        found.remarks.append(f"{id}: lines that are commands of the notebook (%, ! or ?) were left out")


def _without_ours(text: str) -> tuple[str, bool]:
    """Without calls of `check` and the like (of merged cells) and a notebook's commands. Lines keep their numbers."""
    return COMMAND.sub(r"# \1", OURS.sub(r"# \1", text)), bool(COMMAND.search(text))


def _own_part(course: Lab, cell: Cell) -> str:
    """A cell's text without what the course had in it; the learner may have written into one of the course's cells."""
    given = course.by_id.get(cell.id, "")
    return cell.text.replace(given, "") if given else cell.text


def _is_courses(course: Lab, cell: Cell) -> bool:
    return short_hash(cell.text) in course.texts


def _is_learners(course: Lab, cell: Cell) -> bool:
    """Whether a cell belongs to no answer, and the learner added or changed it."""
    ours = cell.taken or _is_courses(course, cell) or cell.exercise(CHECK) is not None or "own" in cell.tags
    return not ours and bool(OURS.sub("", _without_own(cell.text)).strip())


def _without_own(text: str) -> str:
    """Of a cell of own numbers that lost its tag nothing is left."""
    if not any(OWN.fullmatch(name) for name in ASSIGNS.findall(text)):
        return text
    return "\n".join(line for line in OWN_CALL.sub("", text).splitlines() if not re.match(r"own_\w+ *=(?!=)", line))


def _own_key(name: str) -> str:
    """By which Submission.own has it: the exercise's id, or PREDICTION."""
    return PREDICTION if "predicted" in name else name.removeprefix("own_").replace("_", ".")


def _among(cells: list[Cell]) -> str:
    return f", the last of {len(cells)}" if len(cells) > 1 else ""


def _defined(text: str) -> set[str]:
    return {function or variable for function, variable in DEFINES.findall(text)}


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _remark_on_checks(course: Lab, cells: list[Cell], release: Release | None, found: _Found) -> None:
    checks: dict[str, list[Cell]] = {}
    for cell in cells:
        if (id := cell.exercise(CHECK)) in course.exercises:
            checks.setdefault(str(id), []).append(cell)
    for id, copies in checks.items():
        if len(copies) > 1:
            found.remarks.append(f"the check of {id} is there {len(copies)} times; checks do not count")
        if any(not _is_courses(course, cell) for cell in copies):
            found.remarks.append(f"the check of {id} was changed; checks do not count")
        wanted = release.points.get(id, 0) if release else None
        if wanted is not None and any(cell.points not in (None, wanted, course.points[id]) for cell in copies):
            found.remarks.append(f"the points of {id} were changed; the class's count")
    if missing := [id for id in course.exercises if id not in checks]:
        found.remarks.append(f"without the marked checks of {', '.join(missing)}; checks do not count") if checks else None
    if absent := [id for id in course.exercises if id not in found.answers]:
        found.remarks.append(f"there is no cell of {', '.join(absent)}")


# Predictions and numbers ----------------------------------------------------------------------------------------------
def _values(
    cells: list[Cell], names: tuple[str, ...] | list[str], ids: frozenset[str], remarks: list[str]
) -> dict[str, float | str | None]:
    """What each name is set to: in its own cell, else in the last cell that sets it. None for nothing and for what is no value."""
    values: dict[str, float | str | None] = {}
    lines = {name: list(islice(_lines_setting(cells, name, ids), MOST_LINES)) for name in names}
    for name, written in lines.items():
        values[name] = None
        for place, line in written:
            try:
                value = _literal(line)
            except ValueError as error:
                remarks.append(f"{name} in cell {place} {error}")
                continue
            if value is not None:
                values[name] = value
                break
    return values


def _lines_setting(cells: list[Cell], name: str, ids: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Place of the cell, and what stands on the right, the most trusted first."""
    own: Callable[[Cell], bool] = lambda cell: cell.id in ids or "prediction" in cell.tags or "own" in cell.tags  # noqa: E731
    pattern = re.compile(rf"^{name} *=(?!=)(.*)$", re.MULTILINE)
    for cell in sorted(cells, key=lambda cell: (not own(cell), -cell.place)):
        for line in reversed(pattern.findall(cell.text)):
            yield cell.place, line


def _literal(line: str) -> float | str | None:
    """A number or a short text that stands there as such. Raises ValueError with the end of a sentence."""
    wanted = "wanted a number, or a text in quotes"
    if len(line) > LONGEST_LINE:
        raise ValueError(f"is a line of {len(line)} characters, {wanted}")
    shown = "".join(character if character.isprintable() else "?" for character in line.strip()[:40])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as an unknown escape in a text
            value = ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise ValueError(f"is `{shown}`, {wanted}") from None
    if value is None:
        return None
    if isinstance(value, str):
        if len(value) > LONGEST_TEXT:
            raise ValueError(f"is a text of {len(value)} characters, wanted at most {LONGEST_TEXT}")
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"is `{shown}`, {wanted}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"is `{shown}`, which is not a finite number")
    return number


def _number(name: str, value: float | str | None, remarks: list[str]) -> float | None:
    if isinstance(value, str):
        try:
            value = _literal(value)
        except ValueError:
            value = None
        if not isinstance(value, float):
            remarks.append(f"{name} is a text, wanted a number")
            return None
    return value
