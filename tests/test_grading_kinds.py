"""Every exercise is of one kind, and there are enough of each to weigh them."""

from __future__ import annotations

from collections import Counter

from labsupport.exercises.registry import all_exercises
from labsupport.grading import kinds


def test_every_exercise_has_a_kind_and_one_only():
    listed = [id for ids in kinds._IDS.values() for id in ids.split()]
    assert sorted(listed) == sorted(exercise.id for exercise in all_exercises())


def test_there_are_ten_of_each_kind():
    counted = Counter(kinds.KIND.values())
    assert counted.keys() == {"build", "find", "explain"}
    assert min(counted.values()) >= 10, counted


def test_what_takes_no_input_and_is_measured_is_found():
    """An answer without arguments is an object that its exercise measures: a case that somebody found."""
    for exercise in all_exercises():
        if not exercise.inputs(0):
            assert kinds.KIND[exercise.id] == "find", exercise.id
