"""Every exercise: the reference is accepted and every known wrong answer refused, with the sentence meant for it, on 50 seeds."""

import os

import pytest
import torch
from remembering import look_at_no_calls, remember_outputs

from labsupport.exercises import registry
from labsupport.exercises.attempts import Attempt, attempt
from labsupport.exercises.judging import INTERNAL, assess

EXERCISES = registry.all_exercises()
SEEDS = range(int(os.environ.get("SEEDS", "50")))  # `labs test --quick` asks for fewer


def seeds_of(exercise):
    return SEEDS[:1] if exercise.needs_model or not exercise.inputs(0) else SEEDS


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_the_reference_passes_and_each_wrong_answer_gets_its_sentence(exercise, monkeypatch):
    remember_outputs(monkeypatch)
    for seed in seeds_of(exercise):
        if seed:  # whom an answer calls does not depend on the seed
            look_at_no_calls(monkeypatch)
        given = exercise.inputs(seed)
        verdict = assess(exercise, given, attempt(exercise, exercise.reference, given))
        assert verdict.passed, f"seed {seed}: {verdict.message}"
        for number, mutant in enumerate(exercise.mutants):
            name = f"seed {seed}, mutant {number}, {mutant.says!r}"
            verdict = assess(exercise, given, attempt(exercise, mutant.answer, given))
            assert not verdict.passed, f"{name} passes"
            assert mutant.says in verdict.message, f"{name}: {verdict.message}"
            assert INTERNAL not in verdict.message, f"{name}: {verdict.message}"


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_has_enough_mutants_and_sane_facts(exercise):
    assert len(exercise.mutants) >= 3
    assert all(fault.answers for fault in exercise.faults)  # no sentence that nothing is known to lead to
    assert 1 <= exercise.difficulty <= 5
    assert exercise.points >= 1
    assert 1 <= exercise.minutes <= 30


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_inputs_depend_on_the_seed_alone_and_survive_the_reference(exercise):
    first, second = exercise.inputs(3), exercise.inputs(3)
    assert attempt(exercise, exercise.reference, first).changed == ()
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key])


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
@pytest.mark.slow
def test_attempt_survives_a_file(exercise, tmp_path, monkeypatch):
    """Judging what was written to safetensors and JSON gives the same verdict as judging what is in memory."""
    remember_outputs(monkeypatch)
    given = exercise.inputs(1)
    for answer in (exercise.reference, *(m.answer for m in exercise.mutants)):
        tried = attempt(exercise, answer, given)
        tried.save(tmp_path / "attempt.1")
        loaded = Attempt.load(tmp_path / "attempt.1")
        assert loaded.status == tried.status
        assert list(loaded.outputs) == list(tried.outputs)
        for key, value in tried.outputs.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(loaded.outputs[key].nan_to_num(), value.nan_to_num())
                assert loaded.outputs[key].dtype == value.dtype
            else:
                assert repr(loaded.outputs[key]) == repr(value)  # NaN is not equal to itself
        assert assess(exercise, given, loaded).message == assess(exercise, given, tried).message


def test_course_has_enough_exercises():
    assert len(EXERCISES) >= 15
    assert len({e.id for e in EXERCISES}) == len(EXERCISES)
