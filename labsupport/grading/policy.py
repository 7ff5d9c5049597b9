"""From what was found to a mark: which submission counts, how late it is, partial credit, weights, changes by hand.

Results hold none of this, so that a class may change its mind: the book is made again from the same results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal

from labsupport.grading.kinds import KIND
from labsupport.grading.records import Collected, Marked, Outcome, Override, Policy, Release, Result

DAY = 86400  # seconds
LATE = "late"  # in place of an exercise in an override: its points are the days that count as late
State = Literal["marked", "partly marked", "not marked yet", "too late", "none handed in"]


@dataclass(frozen=True)
class Line:
    """One exercise of one learner in the book.

    points, of: as the exercise counts in this class, with its weight. by_hand: the override that set the points. mark: what was
    found in the submission, None without one.
    """

    exercise: str
    points: float
    of: float
    outcome: Outcome
    by_hand: Override | None = None
    mark: Marked | None = None


@dataclass(frozen=True)
class Entry:
    """One learner's row for one lab.

    points: the mark, after lateness, rounded; before_late: without it. counts: the submission that does. result: what was found in
    it. submissions: how many there are. days_late: that cost something. by_hand: all overrides, old ones too.
    """

    learner: str
    state: State
    points: float
    of: float
    before_late: float
    days_late: int
    lines: tuple[Line, ...]
    counts: Collected | None
    result: Result | None
    submissions: int
    by_hand: tuple[Override, ...]


def rounded(value: float, digits: int = 2) -> float:
    """Half a unit goes up, as people round: 0.125 is 0.13. What is within 1e-9 of a half counts as one."""
    return float(Decimal(repr(round(value, 9))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def days_late(handed_in: datetime, due: datetime | None) -> int:
    """Days begun after `due`:

    0 at the second of `due` itself, 1 from the next one on. Each time in its own zone; without one, UTC.
    """
    if due is None:
        return 0
    return math.ceil(max(0, math.floor((_aware(handed_in) - _aware(due)).total_seconds())) / DAY)


def counting(collected: Sequence[Collected], release: Release, policy: Policy) -> list[Collected]:
    """The submissions of one learner that have to be marked: one, or all in time where the best counts.

    What comes after `last_day` is not taken while there is something else. In the order of handing in: a clock that runs
    backwards does not put an old file last by itself, for equal times the file's hash decides, the same on every run.
    """
    ordered = sorted(collected, key=lambda one: (_aware(one.handed_in), one.sha256))
    taken = [one for one in ordered if days_late(one.handed_in, release.due) <= policy.last_day]
    if not taken:
        return ordered[-1:]
    return {"last": taken[-1:], "first": taken[:1], "best": taken}[policy.repeated]


def weights(points: Mapping[str, float], policy: Policy) -> dict[str, float]:
    """By exercise what its points are multiplied by.

    All points together stay what they are, so that the lab counts the same in the class.
    """
    raw = {id: policy.understanding if KIND.get(id, "build") != "build" else 1.0 for id in points}
    heavy = sum(points[id] * raw[id] for id in points)
    scale = sum(points.values()) / heavy if heavy else 1.0
    return {id: weight * scale for id, weight in raw.items()}


def entry(
    learner: str,
    release: Release,
    policy: Policy,
    collected: Sequence[Collected],
    results: Mapping[str, Result],
    overrides: Sequence[Override],
) -> Entry:
    """The row of one learner. collected, overrides: of this learner and lab; overrides: the latest last. results: by hash."""
    candidates = counting(collected, release, policy)
    entries = [_entry(learner, release, policy, one, results.get(one.sha256), len(collected), overrides) for one in candidates]
    if not entries:
        return _entry(learner, release, policy, None, None, 0, overrides)
    # The first of several that are equally good. While one is not marked, the best of the others stands, and `labs grade` goes on.
    return max(entries, key=lambda one: (one.points, one.state == "marked"))


def _entry(
    learner: str,
    release: Release,
    policy: Policy,
    counts: Collected | None,
    result: Result | None,
    submissions: int,
    overrides: Sequence[Override],
) -> Entry:
    latest = {one.exercise: one for one in overrides}
    late = days_late(counts.handed_in, release.due) if counts else 0
    if LATE in latest:
        late = round(latest[LATE].points)
    too_late = late > policy.last_day
    weight = weights(release.points, policy)
    lines = tuple(
        _line(id, of, weight[id], result.marks.get(id) if result else None, latest.get(id), counts is not None, policy)
        for id, of in release.points.items()
    )
    # What is set by hand stands also where a submission is too late to be taken.
    before = sum(line.points for line in lines if line.by_hand or not too_late)
    share = 1.0 if too_late else max(0.0, 1 - policy.late * late)
    return Entry(
        learner=learner,
        state=_state(counts, lines, too_late),
        points=rounded(before * share),
        of=rounded(sum(release.points.values())),
        before_late=rounded(before),
        days_late=late,
        lines=lines,
        counts=counts,
        result=result,
        submissions=submissions,
        by_hand=tuple(overrides),
    )


def _line(
    id: str, of: float, weight: float, mark: Marked | None, by_hand: Override | None, handed_in: bool, policy: Policy
) -> Line:
    outcome: Outcome = mark.outcome if mark else "unmarked" if handed_in else "missing"
    if by_hand:
        points = by_hand.points
    elif mark and mark.outcome == "pass":
        points = of
    elif mark and mark.outcome == "wrong":
        points = of * mark.share * policy.partial
    else:
        points = 0.0
    return Line(id, points * weight, of * weight, outcome, by_hand, mark)


def _state(counts: Collected | None, lines: Sequence[Line], too_late: bool) -> State:
    if counts is None:
        return "none handed in"
    if too_late:
        return "too late"
    waiting = [line.outcome == "unmarked" and not line.by_hand for line in lines]
    return "not marked yet" if waiting and all(waiting) else "partly marked" if any(waiting) else "marked"


def _aware(when: datetime) -> datetime:
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when
