"""The exercises of chapter 15 that stand already, until the chapter has its notebook and test_exercises.py finds them."""

import pytest
import test_exercises

from labsupport.exercises.choose_and_ship import EXERCISES


@pytest.fixture(autouse=True)
def ten_seeds(monkeypatch):
    monkeypatch.setattr(test_exercises, "SEEDS", range(10))


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_reference_is_accepted_and_mutants_are_refused(exercise, monkeypatch):
    test_exercises.test_reference_is_accepted(exercise)
    test_exercises.test_mutants_are_rejected_each_with_its_message(exercise, monkeypatch)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_facts_and_inputs(exercise):
    test_exercises.test_has_enough_mutants_and_sane_facts(exercise)
    test_exercises.test_inputs_depend_on_the_seed_alone_and_survive_the_reference(exercise)
