"""The book of a class: each learner's mark in each lab, with how it came about. Made from files, at any time, in one go.

`rebuild` writes it as a SQLite file for whoever wants to ask questions of it. Nothing else writes there, and nothing reads it
back: roster, releases, collected files, results and overrides are the truth.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from labsupport.grading import policy
from labsupport.grading.classroom import GRADEBOOK, Classroom
from labsupport.grading.policy import Entry
from labsupport.grading.records import Collected, GradingError, Override, Result
from labsupport.model import files


def entries(classroom: Classroom, lab: int) -> list[Entry]:
    """A row for each learner, in the order of the roster; then whoever handed in and is not on it. Raises GradingError."""
    release = classroom.release(lab)
    collected: dict[str, list[Collected]] = defaultdict(list)
    for one in classroom.collected(lab):
        collected[one.learner].append(one)
    results: dict[str, dict[str, Result]] = defaultdict(dict)
    for result in classroom.results(lab):
        results[result.learner][result.sha256] = result
    overrides: dict[str, list[Override]] = defaultdict(list)
    for override in sorted(classroom.overrides(lab), key=lambda one: one.when):
        overrides[override.learner].append(override)
    return [
        policy.entry(learner, release, classroom.settings.policy, collected[learner], results[learner], overrides[learner])
        for learner in [*classroom.roster, *sorted(set(collected) - set(classroom.roster))]
    ]


def set_by_hand(classroom: Classroom, override: Override) -> Path:
    """Keep a mark that was set by hand. Those before it stay in the folder. Raises GradingError naming what is wrong."""
    points = classroom.release(override.lab).points
    if override.learner not in classroom.roster:
        raise GradingError(f"learner {override.learner!r} is not on the roster of this class")
    if override.exercise not in points and override.exercise != policy.LATE:
        known = ", ".join(points)
        raise GradingError(
            f"lab {override.lab:02d} has no exercise {override.exercise!r} that counts, it has {known}, and {policy.LATE}"
        )
    highest = points.get(override.exercise, 366.0)
    if not 0 <= override.points <= highest:
        raise GradingError(f"points is {override.points:g}, wanted a number from 0 to {highest:g}")
    first = classroom.override_path(override)
    path, number = first, 1
    while path.exists():
        number += 1
        path = first.with_name(f"{first.stem}-{number}{first.suffix}")
    with files.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    override.write(path)
    return path


def rebuild(classroom: Classroom) -> Path:
    """Write the book of all labs that were released. Whole or not at all: what it was before stays until the new one is complete.

    Raises GradingError and WriteError.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    from labsupport.grading import tables

    path = classroom.folder / GRADEBOOK
    rows: list[object] = [
        tables.Learner(id=one.id, place=place, name=one.name, email=one.email)
        for place, one in enumerate(classroom.roster.values())
    ]
    for lab in classroom.released_labs():
        release = classroom.release(lab)
        rows.append(tables.Lab(lab=lab, due=release.due.isoformat() if release.due else "", points=sum(release.points.values())))
        for each in entries(classroom, lab):
            rows += tables.rows_of(lab, each)
        rows += [tables.Submission.of(one) for one in classroom.collected(lab)]

    def write(temporary: Path) -> None:
        engine = create_engine(f"sqlite:///{temporary}")
        try:
            tables.Table.metadata.create_all(engine)
            with Session(engine) as session, session.begin():
                session.add_all(rows)
        finally:
            engine.dispose()

    files.replace(path, write)
    return path
