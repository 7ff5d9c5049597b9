"""What saves time where many answers are tried: what ours return is computed once, and nobody looks who is called."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from labsupport.exercises import attempts, judging


def remember_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test, `judging.outputs` keeps what each of our answers returned or raised, by the inputs (the same object)."""
    compute, outcomes = judging.outputs, {}

    def outputs(exercise, answer, given):
        key = answer, id(given)
        if key not in outcomes:
            try:
                outcomes[key] = given, compute(exercise, answer, given), None  # `given` is kept, so that its id stays its own
            except Exception as error:
                outcomes[key] = given, None, error
        _, returned, error = outcomes[key]
        if error is not None:
            raise error
        return returned

    monkeypatch.setattr(judging, "outputs", outputs)


def look_at_no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rest of one test it is not seen whether an answer calls labsupport's own version.

    To see it, Python reports every call, which takes a quarter of the time.
    """
    monkeypatch.setattr(attempts, "_watch", lambda function: nullcontext([]))
