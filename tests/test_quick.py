"""LABS_QUICK: what it makes shorter, and what takes no notice of it."""

import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from labsupport.cli import app
from labsupport.course import suite
from labsupport.evidence import machine, timing
from labsupport.model import evaluate, quick
from labsupport.pipeline import calibrate

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(params=[False, True], ids=["in full", "quick"])
def on(request, monkeypatch):
    if request.param:
        monkeypatch.setenv("LABS_QUICK", "1")
    return request.param


def test_few_windows_of_text(on, course, held_out):
    model, _ = course
    assert evaluate.evaluate(model, held_out, length=16, windows=6).windows == (quick.WINDOWS if on else 6)
    assert evaluate.evaluate(model, held_out, length=16, windows=1).windows == 1
    assert len(calibrate.windows(held_out, 6, 16)) == (quick.WINDOWS if on else 6)


def test_few_steps_of_a_search(on):
    assert quick.steps(20) == (5 if on else 20)


def test_short_timings(on, monkeypatch):
    """By a clock that each call of what is timed puts on by a hundredth of a second."""
    clock, calls = [0.0], []

    def work():
        calls.append(1)
        clock[0] += 0.01

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    machine.median_seconds(work, device="cpu", budget=0.3)
    timing.seconds([work], torch.device("cpu"), budget=0.3)
    assert len(calls) <= 20 if on else len(calls) >= 60


def test_commands_that_measure_for_others_take_no_notice(monkeypatch):
    monkeypatch.setenv("LABS_QUICK", "1")
    CliRunner().invoke(app, ["check", "no such chapter"])
    assert quick.is_on()
    CliRunner().invoke(app, ["inspect", "no such directory"])
    assert not quick.is_on()


def test_the_student_forms_are_tested_quickly_and_the_solved_ones_in_full():
    for path in suite.notebooks(ROOT):
        settings = suite.notebook(ROOT, path).env
        assert settings == ({"LABS_STRICT": "1"} if path.parent.name == "solutions" else {"LABS_QUICK": "1"})
