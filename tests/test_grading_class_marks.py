"""A made-up class of 20 over two labs, through all of it: every mark is the one expected. `grading_class.py` does it with 200."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("distributed")

import grading_class

from labsupport.exercises.registry import exercises_of
from labsupport.grading import farm, sandbox
from labsupport.grading.records import GradingError


def test_every_known_mistake_has_a_text():
    """Some exercise has none: the answer is an input, and every one that is not right is told by its faults."""
    for lab in grading_class.LABS:
        for exercise in exercises_of(lab):
            assert len(grading_class.texts_of(exercise)) == len(exercise.mistakes)


@pytest.mark.slow
def test_every_mark_of_a_class_of_20_is_the_one_expected(tmp_path: Path):
    try:
        sandbox.find()
    except GradingError as error:
        pytest.skip(str(error))
    class_of = grading_class.people(20)
    made = grading_class.made_class(tmp_path, class_of)
    for lab in grading_class.LABS:
        graded = farm.grade(made, lab, workers=2)
        assert not graded.left
        assert not graded.lines
    expected: dict = {}
    assert [sentence for person in class_of for sentence in grading_class.unexpected(made, person, expected)] == []
    assert len(expected) > 50
