"""The tables of the book. A key may be there once: a mark that came twice would be an error, not a second row."""

from __future__ import annotations

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from labsupport.grading.policy import Entry
from labsupport.grading.records import Collected


class Table(DeclarativeBase):
    pass


class Learner(Table):
    __tablename__ = "learners"
    id: Mapped[str] = mapped_column(primary_key=True)
    place: Mapped[int]
    name: Mapped[str]
    email: Mapped[str]


class Lab(Table):
    __tablename__ = "labs"
    lab: Mapped[int] = mapped_column(primary_key=True)
    due: Mapped[str]
    points: Mapped[float]


class Submission(Table):
    """Every file that was handed in, whether it counts or not."""

    __tablename__ = "submissions"
    lab: Mapped[int] = mapped_column(ForeignKey("labs.lab"), primary_key=True)
    learner: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(primary_key=True)
    handed_in: Mapped[str]

    @classmethod
    def of(cls, one: Collected) -> Submission:
        return cls(lab=one.lab, learner=one.learner, sha256=one.sha256, handed_in=one.handed_in.isoformat())


class Total(Table):
    """A learner's mark in a lab. sha256: of the submission that counts, "" for none."""

    __tablename__ = "totals"
    lab: Mapped[int] = mapped_column(ForeignKey("labs.lab"), primary_key=True)
    learner: Mapped[str] = mapped_column(primary_key=True)
    points: Mapped[float]
    of: Mapped[float]
    before_late: Mapped[float]
    days_late: Mapped[int]
    state: Mapped[str]
    sha256: Mapped[str]


class Mark(Table):
    """A learner's points in an exercise. by: who set them, "" where the judge did."""

    __tablename__ = "marks"
    lab: Mapped[int] = mapped_column(ForeignKey("labs.lab"), primary_key=True)
    learner: Mapped[str] = mapped_column(primary_key=True)
    exercise: Mapped[str] = mapped_column(primary_key=True)
    outcome: Mapped[str]
    points: Mapped[float]
    of: Mapped[float]
    message: Mapped[str]
    seconds: Mapped[float]
    by: Mapped[str]


class Change(Table):
    """All that was set by hand, in order; the last one of an exercise counts."""

    __tablename__ = "overrides"
    number: Mapped[int] = mapped_column(primary_key=True)
    lab: Mapped[int] = mapped_column(ForeignKey("labs.lab"))
    learner: Mapped[str]
    exercise: Mapped[str]
    points: Mapped[float]
    reason: Mapped[str]
    by: Mapped[str]
    when: Mapped[str]


def rows_of(lab: int, entry: Entry) -> list[Table]:
    """What the book says of one learner in one lab."""
    learner = entry.learner
    total = Total(
        lab=lab,
        learner=learner,
        points=entry.points,
        of=entry.of,
        before_late=entry.before_late,
        days_late=entry.days_late,
        state=entry.state,
        sha256=entry.counts.sha256 if entry.counts else "",
    )
    marks = [
        Mark(
            lab=lab,
            learner=learner,
            exercise=line.exercise,
            outcome=line.outcome,
            points=line.points,
            of=line.of,
            message=line.mark.message if line.mark else "",
            seconds=line.mark.seconds if line.mark else 0.0,
            by=(line.by_hand.by or "by hand") if line.by_hand else "",
        )
        for line in entry.lines
    ]
    changes = [
        Change(
            lab=lab,
            learner=learner,
            exercise=one.exercise,
            points=one.points,
            reason=one.reason,
            by=one.by,
            when=one.when.isoformat(),
        )
        for one in entry.by_hand
    ]
    return [total, *marks, *changes]
