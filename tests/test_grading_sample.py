"""The sample class: what it makes can be released and collected, and each answer is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from labsupport.course import workbook
from labsupport.exercises.registry import exercises_of
from labsupport.grading import collect, release, sample, submission
from labsupport.grading.classroom import Classroom
from labsupport.grading.records import GradingError


@pytest.fixture(scope="module")
def classroom(tmp_path_factory: pytest.TempPathFactory) -> Classroom:
    classroom = sample.create(tmp_path_factory.mktemp("sample") / "class")
    release.release(classroom, sample.LAB)
    found = collect.collect(classroom, sample.LAB, classroom.folder / sample.INBOX)
    assert not found.lines
    return classroom


def test_everything_that_was_handed_in_finds_its_learner(classroom: Classroom):
    assert [one.learner for one in classroom.collected(sample.LAB)] == [person.learner for person in sample.PEOPLE]


def test_answers_are_right_wrong_blank_or_endless(classroom: Classroom):
    stubs = submission.read(workbook.chapter(str(sample.LAB)), sample.LAB).answers
    for person, collected in zip(sample.PEOPLE, classroom.collected(sample.LAB), strict=True):
        taken = submission.read(classroom.notebook_path(collected), sample.LAB)
        assert {id for id, text in taken.answers.items() if text == stubs[id]} == set(person.blank)
        assert {id for id, text in taken.answers.items() if "while True" in text} == set(person.endless)
        assert all(sample.WRONG[id][1] in taken.answers[id] for id in person.wrong)
        assert taken.predictions[sample.PREDICTED] == (None if person.prediction == "None" else float(person.prediction))


def test_their_points_are_all_some_and_none():
    of = sum(exercise.points for exercise in exercises_of(sample.LAB))
    first, second, third = (person.points for person in sample.PEOPLE)
    assert first == of > second > third == 0


def test_it_is_made_in_a_new_folder_only(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(GradingError, match="not empty"):
        sample.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_solutions_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in an installed package."""
    source = tmp_path / "notebooks"
    workbook.write(workbook.read(workbook.chapter("2")), source / "02_rounding.ipynb")
    monkeypatch.setattr(workbook, "notebooks_dir", lambda: source)
    with pytest.raises(GradingError, match="in a clone of the repository"):
        sample.create(tmp_path / "class")
    assert not (tmp_path / "class").exists()
