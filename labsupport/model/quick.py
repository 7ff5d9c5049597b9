"""LABS_QUICK=1: a notebook comes to its end on little text, with short timings and coarse searches. Its figures are rough then.

The commands that measure for others (`labs quantize`, `labs sweep`, `labs bench`, `labs train`) take no notice of it.
"""

from __future__ import annotations

import os

VARIABLE = "LABS_QUICK"
WINDOWS = 2
SHARE_OF_STEPS = 0.25
SHARE_OF_TIME = 0.1


def is_on() -> bool:
    return os.environ.get(VARIABLE) == "1"


def windows(count: int | None) -> int | None:
    """How many windows of text to look at where `count` are asked for, None for all there are."""
    if not is_on():
        return count
    return WINDOWS if count is None else min(count, WINDOWS)


def steps(count: int) -> int:
    """How many values of a grid to try where `count` are asked for."""
    return max(2, round(count * SHARE_OF_STEPS)) if is_on() else count


def budget(seconds: float) -> float:
    """How long to repeat what is timed."""
    return seconds * SHARE_OF_TIME if is_on() else seconds
