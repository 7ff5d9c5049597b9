"""A page for each learner: the mark and how it came about, what was seen in each answer, predictions beside what was measured.

All texts in it come from outside: they are escaped, cut, and without control characters. A page has no script, no link and no
address.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from labsupport.course import workbook
from labsupport.exercises.registry import get
from labsupport.grading import gradebook, own, report, texts
from labsupport.grading.classroom import Classroom, Learner
from labsupport.grading.items import PREDICTION
from labsupport.grading.policy import LATE, Entry, Line
from labsupport.grading.records import Outcome, Override
from labsupport.model import files

SAYS: dict[Outcome, str] = {
    "pass": "right",
    "wrong": "not right",
    "blank": "blank",
    "raised": "it raised an error or gave nothing that can be used",
    "stopped": "it was stopped",
    "missing": "not in the notebook",
    "unmarked": "not marked yet",
}
FIGURES = {"difference": "largest difference", "allowed": "difference allowed"}
REVISIT = re.compile(r"^revisit\((predicted_\w+),.*\)$", re.MULTILINE)
MEASURED = re.compile(
    r"^(?P<what>.+): (?:predicted .+, )?measured (?P<measured>.+?)(?:; no prediction was made|, as predicted|, a factor .+ apart)?$"
)


def feedback(classroom: Classroom, lab: int, on_page: Callable[[int, int], None] = lambda done, total: None) -> list[Path]:
    """Write feedback/NN/LEARNER.html for each learner of the roster. Raises GradingError and WriteError."""
    entries = [entry for entry in gradebook.entries(classroom, lab) if entry.learner in classroom.roster]
    folder = classroom.folder_of("feedback", lab)
    with files.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    for done, entry in enumerate(entries, 1):
        path = folder / f"{entry.learner}.html"
        files.write_text(path, page(classroom, lab, entry))
        written.append(path)
        on_page(done, len(entries))
    return written


def page(classroom: Classroom, lab: int, entry: Entry) -> str:
    who = classroom.roster.get(entry.learner, Learner(entry.learner))
    result = entry.result
    return texts.page(
        "feedback.html",
        lab=lab,
        title=report.title(lab),
        name=who.name or who.id,
        class_name=classroom.settings.name,
        entry=entry,
        how=how(classroom, lab, entry),
        exercises=[_exercise(line) for line in entry.lines],
        predictions=_predictions(classroom, lab, entry),
        remarks=(*result.problems, *result.remarks) if result else (),
        number=report.number,
    )


def how(classroom: Classroom, lab: int, entry: Entry) -> list[str]:
    """How the mark came about, a sentence each."""
    policy, due = classroom.settings.policy, classroom.release(lab).due
    said = []
    if entry.counts is None:
        said.append("Nothing was handed in.")
    else:
        said.append(f"Handed in at {entry.counts.handed_in.isoformat(' ', 'seconds')}.")
        if entry.submissions > 1:
            said.append(f"This is the {policy.repeated} of {entry.submissions} submissions, which counts.")
    if entry.state in ("not marked yet", "partly marked"):
        said.append("Not everything has been marked yet.")
    if entry.days_late:
        begun = "1 day" if entry.days_late == 1 else f"{entry.days_late} days"
        said.append(
            f"It was due at {due.isoformat(' ', 'seconds')}, and is late by {begun}, each one that began counted."
            if due
            else f"It is late by {begun}."
        )
        if entry.state == "too late":
            said.append(f"After {policy.last_day} days nothing is taken.")
        else:
            said.append(
                f"Each day costs {100 * policy.late:g} %: "
                f"{report.number(entry.before_late)} became {report.number(entry.points)} points."
            )
    if any(line.outcome == "wrong" and line.mark and line.mark.share and not line.by_hand for line in entry.lines):
        said.append(f"An answer with some outputs right and others not gets at most {100 * policy.partial:g} % of its points.")
    if policy.understanding != 1:
        said.append(f"Exercises that ask to find or to explain count {policy.understanding:g} times as much as others.")
    return said + [_by_hand(one) for one in entry.by_hand if one.exercise == LATE]


def _by_hand(one: Override) -> str:
    what = (
        f"The days that count as late were set to {one.points:g}"
        if one.exercise == LATE
        else f"The points were set to {one.points:g}"
    )
    return f"{what} by hand{f' by {one.by}' if one.by else ''}: {one.reason}"


def _exercise(line: Line) -> dict[str, object]:
    mark = line.mark
    return {
        "id": line.exercise,
        "title": get(line.exercise).title,
        "points": line.points,
        "of": line.of,
        "passed": line.outcome == "pass",
        "result": "set by hand"
        if line.by_hand
        else SAYS[line.outcome] + (", in part" if mark and line.outcome == "wrong" and mark.share else ""),
        "message": mark.message if mark else "",
        "printed": mark.printed if mark else "",
        "figures": {FIGURES.get(name, name): value for name, value in mark.figures.items()}
        if mark and any(mark.figures.values())
        else {},
        "by_hand": _by_hand(line.by_hand) if line.by_hand else "",
    }


def _predictions(classroom: Classroom, lab: int, entry: Entry) -> list[dict[str, str]]:
    if entry.result is None:
        return []
    measured = measurements(lab)
    rows = []
    for name, value in entry.result.predictions.items():
        what, number = measured.get(name, (name.removeprefix("predicted_").replace("_", " "), "-"))
        if name.startswith("own_"):
            item = own.load(classroom, lab).items.get(entry.learner, {}).get(PREDICTION)
            what, number = "your own question", f"{item.number:.3g}" if item else "-"
        rows.append({"what": what, "predicted": _text(value), "measured": number})
    return rows


@cache
def measurements(lab: int) -> dict[str, tuple[str, str]]:
    """By the name of a prediction:

    what it is about, and what the course's own run measured, as the solved notebook shows. Empty without it.
    """
    blank = workbook.chapter(str(lab))
    solved = blank.parent / "solutions" / blank.name
    found: dict[str, tuple[str, str]] = {}
    if not solved.is_file():
        return found
    for cell in workbook.read(solved).cells:
        if cell.cell_type != "code":
            continue
        names = REVISIT.findall(cell.source)
        printed = "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")
        lines = [match for match in map(MEASURED.match, printed.splitlines()) if match]
        if len(lines) == len(names):
            found |= {name: (line["what"], line["measured"]) for name, line in zip(names, lines, strict=True)}
    return found


def _text(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.3g}"
