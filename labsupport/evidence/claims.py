"""The claims of the field that the course tests, and what came of each: data/claims.yaml.

A verdict is computed in a notebook and compared with the file here, so that the file cannot say what no notebook found.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from labsupport.model import models

VERDICTS = {True: "holds", False: "fails", None: "depends"}


@dataclass(frozen=True)
class Verdict:
    """verdict: "holds", "fails", "depends" or "open"; how it was settled."""

    verdict: str
    how: str


@dataclass(frozen=True)
class Claim(Verdict):
    """number and text of a claim; notebooks that test it; its verdict. elsewhere: what it is on other models, by their name."""

    number: int
    claim: str
    notebooks: tuple[str, ...]
    elsewhere: Mapping[str, Verdict]


@cache
def claims() -> Mapping[int, Claim]:
    """All claims by number; read once, and not to be changed."""
    import yaml

    rows = yaml.safe_load((models.data_dir() / "claims.yaml").read_text("utf-8"))
    return MappingProxyType({row["number"]: _claim(**row) for row in rows})


def _claim(notebooks: list[str], elsewhere: Mapping[str, Mapping[str, str]] | None = None, **row: Any) -> Claim:
    others = {model: Verdict(**found) for model, found in (elsewhere or {}).items()}
    return Claim(**row, notebooks=tuple(notebooks), elsewhere=MappingProxyType(others))


@dataclass(frozen=True)
class Timed:
    """What the clock of this machine said a moment ago about a claim: the verdict that it alone would give, and the figures."""

    holds: bool | None
    found: str


def settle(number: int, holds: bool | None, found: str, here: Timed | None = None, model: str | None = None) -> None:
    """Print a claim with the verdict that the notebook has just computed; None where it depends on what is meant.

    Says so where the course's own verdict is another, as it can be with a model of your own; with LABS_STRICT=1, as when the
    solutions are tested, that raises AssertionError. `here` is for a claim about time: `holds` and `found` are then of figures
    that are kept or published, from machines with a name, and what was timed here is printed below them, agrees with them or
    not, and never fails. model: whose stored rows `found` is of, where they are not the course model's. Raises KeyError for an
    unknown number, or a model on which the file has no verdict.
    """
    if number not in claims():
        raise KeyError(f"there is no claim {number}, they go from {min(claims())} to {max(claims())}")
    claim, verdict = claims()[number], VERDICTS[holds]
    if model is not None and model not in claim.elsewhere:
        raise KeyError(f"data/claims.yaml has no verdict on claim {number} for the model {model!r}")
    kept = claim if model is None else claim.elsewhere[model]
    print(f"{number}. {claim.claim}\n   {f'on {model}, ' if model else ''}{verdict}: {found}")
    if here is not None:
        of_here = VERDICTS[here.holds]
        relation = "too" if of_here == verdict else "which is another verdict: these are the times of one machine and one run"
        print(f"   timed here, just now: {here.found}\n   by these times alone it {of_here}, {relation}")
    if kept.verdict != verdict:
        message = f"claim {number} {verdict} here, but data/claims.yaml says it {kept.verdict}"
        if os.environ.get("LABS_STRICT") == "1":
            raise AssertionError(message)
        print(f"   (On {model or 'the course model'} it {kept.verdict}.)")


def opened(number: int) -> None:
    """Print a claim that a later notebook will settle."""
    claim = claims()[number]
    print(f"{number}. {claim.claim}\n   opened here, settled in {', '.join(claim.notebooks)}")
