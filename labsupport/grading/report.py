"""A lab of a class as spreadsheets, as files that learning-management systems import, and as a page with pictures.

What the systems take, as their documentation has it:

- Canvas (Gradebook, Import): the columns Student, ID, SIS User ID, SIS Login ID, Section, then one an assignment; a row "Points
  Possible" under the header. Canvas finds a learner by one of ID, SIS User ID and SIS Login ID. The class's learner id goes
  into SIS User ID and the email into SIS Login ID; a school whose logins are something else replaces that column. An assignment
  that Canvas does not know is made.
- Moodle (Grades, Import, CSV file; docs.moodle.org/en/Grade_import): any columns, mapped by hand. Map "ID number" or "Email
  address", which Moodle compares with case. Grade and feedback are mapped together: feedback alone would empty the grades.
- Gradescope imports no marks from a spreadsheet. Its roster takes a CSV with a name, an email and an ID; and an autograder
  writes /autograder/results/results.json (gradescope-autograders.readthedocs.io/en/latest/specs). So there is a roster, and one
  such file for each learner, which a script called `run_autograder` can copy.

Each cell is made harmless: a name or a message that begins like a formula gets an apostrophe.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from labsupport.course import workbook
from labsupport.figures import class_marks
from labsupport.figures.base import CourseFigure
from labsupport.grading import gradebook, texts
from labsupport.grading.classroom import Classroom, Learner
from labsupport.grading.policy import Entry, rounded
from labsupport.model import files

COMMON = 10  # messages that are listed


def report(classroom: Classroom, lab: int) -> list[Path]:
    """Write everything about one lab into reports/NN/, all files or none. Raises GradingError and WriteError."""
    entries = gradebook.entries(classroom, lab)
    enrolled = [entry for entry in entries if entry.learner in classroom.roster]
    folder = classroom.folder_of("reports", lab)
    contents: dict[str, bytes] = {
        "marks.csv": _bytes(texts.table(marks(classroom, entries))),
        "canvas.csv": _bytes(texts.table(canvas(classroom, lab, enrolled))),
        "moodle.csv": _bytes(texts.table(moodle(classroom, lab, enrolled))),
        "gradescope-roster.csv": _bytes(texts.table(gradescope_roster(classroom))),
    }
    for entry in enrolled:
        contents[f"gradescope/{entry.learner}.json"] = (json.dumps(gradescope(entry), indent=1) + "\n").encode()
    figures = pictures(entries)
    pngs = {name: figure.png() for name, figure in figures.items()}
    for name, figure in figures.items():
        contents[f"{name}.png"] = pngs[name]
        contents[f"{name}.svg"] = figure.svg().encode()
    contents["index.html"] = page(classroom, lab, entries, figures, pngs).encode()
    for path in {(folder / name).parent for name in contents}:
        with files.explained(path):
            path.mkdir(parents=True, exist_ok=True)
    files.replace_all({folder / name: partial(_write, content) for name, content in contents.items()})
    return [folder / name for name in contents]


# Spreadsheets ---------------------------------------------------------------------------------------------------------
def marks(classroom: Classroom, entries: Sequence[Entry]) -> list[list[object]]:
    """A row for each learner and exercise, and one with the mark of the lab, whose exercise is "total"."""
    rows: list[list[object]] = [
        ["learner", "name", "email", "exercise", "outcome", "points", "of", "days_late", "seconds", "by_hand", "message"]
    ]
    for entry in entries:
        who = classroom.roster.get(entry.learner, Learner(entry.learner))
        front = [who.id, who.name, who.email]
        for line in entry.lines:
            seconds, message = (line.mark.seconds, line.mark.message) if line.mark else (0.0, "")
            by_hand = f"{line.by_hand.by}: {line.by_hand.reason}" if line.by_hand else ""
            numbers = [rounded(line.points), rounded(line.of), entry.days_late, round(seconds, 3)]
            rows.append([*front, line.exercise, line.outcome, *numbers, by_hand, message])
        rows.append([*front, "total", entry.state, entry.points, entry.of, entry.days_late, "", "", ""])
    return rows


def canvas(classroom: Classroom, lab: int, entries: Sequence[Entry]) -> list[list[object]]:
    """Canvas's own names of columns; ID, its own number of a learner, stays empty.

    A learner whose marks are not there yet gets an empty cell.
    """
    name = _assignment(lab)
    of = entries[0].of if entries else sum(classroom.release(lab).points.values())
    rows: list[list[object]] = [
        ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", name],
        ["Points Possible", "", "", "", "", of],
    ]
    for entry in entries:
        who = classroom.roster[entry.learner]
        rows.append([who.name, "", who.id, who.email, "", _grade(entry)])
    return rows


def moodle(classroom: Classroom, lab: int, entries: Sequence[Entry]) -> list[list[object]]:
    rows: list[list[object]] = [["ID number", "Email address", f"{_assignment(lab)} (Real)", f"{_assignment(lab)} (Feedback)"]]
    for entry in entries:
        who = classroom.roster[entry.learner]
        feedback = "; ".join(f"{line.exercise}: {rounded(line.points):g} of {rounded(line.of):g}" for line in entry.lines)
        rows.append([who.id, who.email, _grade(entry), feedback if entry.counts else entry.state])
    return rows


def gradescope_roster(classroom: Classroom) -> list[list[object]]:
    rows: list[list[object]] = [["Full Name", "Email", "SID"]]
    rows += ([one.name, one.email, one.id] for one in classroom.roster.values())
    return rows


def gradescope(entry: Entry) -> dict[str, object]:
    """What an autograder of Gradescope writes to results.json."""
    tests = [
        {
            "number": line.exercise,
            "name": line.exercise,
            "score": rounded(line.points),
            "max_score": rounded(line.of),
            "output": texts.visible(line.mark.message) if line.mark else entry.state,
            "output_format": "text",
        }
        for line in entry.lines
    ]
    return {"score": entry.points, "output": entry.state, "output_format": "text", "tests": tests}


def _grade(entry: Entry) -> object:
    return "" if entry.state in ("not marked yet", "partly marked") else entry.points


def _assignment(lab: int) -> str:
    return f"Lab {lab:02d}"


# Pictures and page ----------------------------------------------------------------------------------------------------
def pictures(entries: Sequence[Entry]) -> dict[str, CourseFigure]:
    """By the name of their file."""
    handed_in = [entry for entry in entries if entry.result]
    ids = [line.exercise for line in entries[0].lines] if entries else []
    outcomes = {id: Counter(line.outcome for entry in handed_in for line in entry.lines if line.exercise == id) for id in ids}
    times = {
        id: [
            line.mark.seconds
            for entry in handed_in
            for line in entry.lines
            if line.exercise == id and line.mark and line.mark.seconds
        ]
        for id in ids
    }
    return {
        "distribution": class_marks.distribution([entry.points for entry in handed_in], entries[0].of if entries else 0.0),
        "hardest": class_marks.hardest(outcomes),
        "mistakes": class_marks.mistakes(commonest(entries)),
        "time": class_marks.seconds(times),
    }


def commonest(entries: Sequence[Entry]) -> list[tuple[str, str, int]]:
    """Exercise, message and how many learners got it, the commonest first. Blank answers have no mistake."""
    counts = Counter(
        (line.exercise, line.mark.message)
        for entry in entries
        for line in entry.lines
        if line.mark and line.mark.message and line.outcome in ("wrong", "raised", "stopped")
    )
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(id, message, count) for (id, message), count in ordered[:COMMON]]


def page(classroom: Classroom, lab: int, entries: Sequence[Entry], figures: dict[str, CourseFigure], pngs: dict[str, bytes]) -> str:
    """What an instructor reads. pngs: the figures as PNG, by the same names."""
    titles = {
        "distribution": "Marks",
        "hardest": "Hardest exercises",
        "mistakes": "Commonest mistakes",
        "time": "Time",
    }
    states = Counter(entry.state for entry in entries)
    facts = [f"{count} {'learner' if count == 1 else 'learners'}: {state}" for state, count in sorted(states.items())]
    handed_in = [entry.points for entry in entries if entry.result]
    if handed_in:
        facts.append(f"mean of those who handed in: {sum(handed_in) / len(handed_in):.2f} of {entries[0].of:g} points")
    strangers = [
        f"{entry.learner} handed in and is not on the roster" for entry in entries if entry.learner not in classroom.roster
    ]
    problems = [f"{entry.learner}: {sentence}" for entry in entries if entry.result for sentence in entry.result.problems]
    problems += borrowed(entries)
    shown = [
        {"title": titles[name], "alt": figure.alt, "png": base64.b64encode(pngs[name]).decode()} for name, figure in figures.items()
    ]
    return texts.page(
        "report.html",
        lab=lab,
        title=title(lab),
        class_name=classroom.settings.name,
        facts=facts,
        pictures=shown,
        mistakes=commonest(entries),
        entries=entries,
        problems=strangers + problems,
        number=number,
    )


def borrowed(entries: Sequence[Entry]) -> list[str]:
    """Numbers of somebody else's, a sentence each. What they show and what they do not: own.py."""
    return [
        f"{entry.learner}: the number written down for {id} is not theirs but {found.removeprefix('as ')}'s. Ask; it is no proof"
        for entry in entries
        if entry.result
        for id, found in entry.result.own.items()
        if found.startswith("as ")
    ]


def title(lab: int) -> str:
    """Of a chapter, as its notebook's file is called."""
    return workbook.chapter(str(lab)).stem[3:].replace("_", " ")


def number(value: float) -> str:
    return f"{rounded(value):g}"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8")


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)
