"""From results to marks: lateness, repeated submissions, partial credit, weights, changes by hand; and the book as a file."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import grading_made
import pytest
from grading_made import DUE, LAB, classroom, hand_in, result, write

pytest.importorskip("sqlalchemy")

from labsupport.grading import gradebook
from labsupport.grading.policy import days_late, rounded
from labsupport.grading.records import GradingError, Marked, Override

SECOND, DAY = timedelta(seconds=1), timedelta(days=1)
WHEN = datetime(2027, 3, 9, tzinfo=UTC)


def entry(made, learner="ada"):
    return next(one for one in gradebook.entries(type(made).open(made.folder), LAB) if one.learner == learner)


def by_hand(exercise, points, reason="seen together", when=WHEN, learner="ada"):
    return Override(lab=LAB, learner=learner, exercise=exercise, points=points, reason=reason, by="Grace", when=when)


@pytest.mark.parametrize(
    ("handed_in", "days"),
    [
        (DUE - DAY, 0),
        (DUE, 0),
        (DUE + timedelta(milliseconds=999), 0),
        (DUE + SECOND, 1),
        (DUE + DAY, 1),
        (DUE + DAY + SECOND, 2),
        (datetime(2027, 3, 1, 20, tzinfo=timezone(timedelta(hours=8))), 0),  # the same moment as DUE
        (datetime(2027, 3, 1, 11, tzinfo=timezone(timedelta(hours=-2))), 1),  # an hour after it, and less on the dial
        (datetime(2027, 3, 1, 12), 0),
        (datetime(1970, 1, 1, tzinfo=UTC), 0),  # a clock that was set back
    ],
)
def test_a_day_is_late_from_its_first_second(handed_in, days):
    assert days_late(handed_in, DUE) == days
    assert days_late(handed_in, None) == 0


def test_half_a_cent_goes_up():
    assert [rounded(value) for value in (0.125, 2.675, 1.005, 0.124999, 4.0)] == [0.13, 2.68, 1.01, 0.12, 4.0]


def test_a_mark_is_partial_late_and_weighted(tmp_path: Path):
    made = classroom(tmp_path / "class", {"ada": ""}, late=0.1, partial=0.5)
    one = hand_in(made, "ada", {}, DUE + DAY + SECOND)
    write(made, result(one, e5_2=Marked(outcome="wrong", points=0, of=4, share=0.5)), one)
    found = entry(made)
    assert (found.before_late, found.days_late, found.points, found.of) == (5.0, 2, 4.0, 8.0)  # 2 + 4 * 0.5 * 0.5 + 2
    assert found.state == "marked"

    # 5.6 asks to find something: three times its weight. 2 + 4 + 3 * 2 = 12 parts are 8 points.
    policy = made.settings.policy.model_copy(update={"understanding": 3.0})
    made.settings.model_copy(update={"policy": policy}).write(made.folder / "class.json")
    found = entry(made)
    assert [line.of for line in found.lines] == pytest.approx([4 / 3, 8 / 3, 4])
    assert (found.before_late, found.of) == (6.0, 8.0)


def test_points_that_a_result_claims_do_not_count(tmp_path: Path):
    """What an exercise is worth stands in the release."""
    made = classroom(tmp_path / "class", {"ada": ""})
    one = hand_in(made, "ada", {})
    write(
        made,
        result(one, e5_1=Marked(outcome="pass", points=1000, of=1000, share=1), e5_2=Marked(outcome="blank", points=4, of=4)),
        one,
    )
    assert entry(made).points == 4.0


@pytest.mark.parametrize(("repeated", "points"), [("last", 4.0), ("first", 2.0), ("best", 7.2)])
def test_which_submission_counts(tmp_path: Path, repeated, points):
    """first: 2 points. Then 8, a day late. The last: 5, two days late. One more comes after the last day and is not taken."""
    made = classroom(tmp_path / "class", {"ada": ""}, repeated=repeated)
    blank = Marked(outcome="blank", points=0, of=0)
    half = Marked(outcome="wrong", points=0, of=4, share=0.5)
    given = [
        (DUE, {"e5_2": blank, "e5_6": blank}),
        (DUE + DAY, {}),
        (DUE + 2 * DAY, {"e5_2": half}),
        (DUE + 8 * DAY, {}),
    ]
    for when, marks in given:
        one = hand_in(made, "ada", {}, when)
        write(made, result(one, **marks), one)
    found = entry(made)
    assert found.points == points
    assert found.submissions == 4


def test_states(tmp_path: Path):
    made = classroom(tmp_path / "class", {id: "" for id in ("ada", "ben", "cleo", "dan")})
    hand_in(made, "ada", {})
    one = hand_in(made, "ben", {})
    write(made, result(one, e5_1=Marked(outcome="unmarked", points=0, of=2)), one)
    late = hand_in(made, "cleo", {}, DUE + 8 * DAY)
    write(made, result(late), late)
    stranger = hand_in(made, "zoe", {})
    write(made, result(stranger), stranger)
    rows = {one.learner: (one.state, one.points) for one in gradebook.entries(made, LAB)}
    assert rows == {
        "ada": ("not marked yet", 0.0),
        "ben": ("partly marked", 6.0),
        "cleo": ("too late", 0.0),
        "dan": ("none handed in", 0.0),
        "zoe": ("marked", 8.0),
    }


def test_marks_by_hand(tmp_path: Path):
    """The latest counts, whenever it was written; all stay."""
    made = classroom(tmp_path / "class", {"ada": "", "ben": ""}, late=0.5)
    one = hand_in(made, "ada", {}, DUE + SECOND)
    write(made, result(one, e5_2=Marked(outcome="wrong", points=0, of=4)), one)
    for each in (by_hand("5.2", 3, when=WHEN + SECOND), by_hand("5.2", 1), by_hand("5.6", 0.5, learner="ben")):
        gradebook.set_by_hand(made, each)
    found = entry(made)
    assert (found.before_late, found.points) == (7.0, 3.5)
    assert [change.points for change in found.by_hand] == [1, 3]
    gradebook.set_by_hand(made, by_hand("late", 0, "was ill"))
    assert entry(made).points == 7.0
    assert (entry(made, "ben").points, entry(made, "ben").state) == (0.5, "none handed in")

    for wrong, message in (
        (by_hand("5.2", 4.5), "from 0 to 4"),
        (by_hand("5.2", -1), "from 0 to 4"),
        (by_hand("5.2", float("nan")), "from 0 to 4"),
        (by_hand("5.9", 1), "5.1, 5.2, 5.6, and late"),
        (by_hand("5.2", 1, learner="zoe"), "'zoe' is not on the roster"),
    ):
        with pytest.raises(GradingError, match=message):
            gradebook.set_by_hand(made, wrong)


def test_the_book_is_made_again_from_files(tmp_path: Path):
    made = classroom(tmp_path / "class", {"ada": "Ada, L.", "ben": ""})
    one = hand_in(made, "ada", {})
    hand_in(made, "ada", {"old": True}, DUE - DAY)
    write(made, result(one, e5_1=Marked(outcome="wrong", points=0, of=2, message="x" * 50)), one)
    gradebook.set_by_hand(made, by_hand("5.6", 1))

    def rows():
        book = sqlite3.connect(gradebook.rebuild(made))
        tables = [name for (name,) in book.execute("select name from sqlite_master where type = 'table' order by name")]
        found = {name: book.execute(f"select * from {name} order by 1, 2, 3").fetchall() for name in tables}
        book.close()
        return found

    first = rows()
    assert first["totals"] == [
        (LAB, "ada", 5.0, 8.0, 5.0, 0, "marked", one.sha256),
        (LAB, "ben", 0.0, 8.0, 0.0, 0, "none handed in", ""),
    ]
    assert len(first["submissions"]) == 2
    assert len(first["marks"]) == 2 * len(grading_made.POINTS)
    assert first["overrides"][0][5:7] == ("seen together", "Grace")
    (made.folder / "gradebook.sqlite").write_bytes(b"not a book")
    assert rows() == first

    # What it was stays where a new one cannot be made.
    made.result_path(one).write_text("{")
    with pytest.raises(GradingError, match=one.sha256):
        gradebook.rebuild(made)
    assert sqlite3.connect(made.folder / "gradebook.sqlite").execute("select count(*) from totals").fetchone() == (2,)
    assert not list(made.folder.glob(".*.tmp"))
