"""The claims of the field that the course tests, and what came of each: data/claims.yaml.

A verdict is computed in a notebook and compared with the file here, so that the file cannot say what no notebook found.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from labsupport.model import models

VERDICTS = {True: "holds", False: "fails", None: "depends"}


@dataclass(frozen=True)
class Claim:
    """number and text of a claim; notebooks that test it; verdict "holds", "fails", "depends" or "open"; how it was settled."""

    number: int
    claim: str
    notebooks: tuple[str, ...]
    verdict: str
    how: str


@cache
def claims() -> Mapping[int, Claim]:
    """All claims by number; read once, and not to be changed."""
    import yaml

    rows = yaml.safe_load((models.data_dir() / "claims.yaml").read_text("utf-8"))
    by_number = {r["number"]: Claim(r["number"], r["claim"], tuple(r["notebooks"]), r["verdict"], r["how"]) for r in rows}
    return MappingProxyType(by_number)


@dataclass(frozen=True)
class Timed:
    """What the clock of this machine said a moment ago about a claim: the verdict that it alone would give, and the figures."""

    holds: bool | None
    found: str


def settle(number: int, holds: bool | None, found: str, here: Timed | None = None) -> None:
    """Print a claim with the verdict that the notebook has just computed; None where it depends on what is meant.

    Says so where the course's own verdict is another, as it can be with a model of your own; with LABS_STRICT=1, as when the
    solutions are tested, that raises AssertionError. `here` is for a claim about time: `holds` and `found` are then of figures
    that are kept or published, from machines with a name, and what was timed here is printed below them, agrees with them or
    not, and never fails. Raises KeyError for an unknown number.
    """
    if number not in claims():
        raise KeyError(f"there is no claim {number}, they go from {min(claims())} to {max(claims())}")
    claim, verdict = claims()[number], VERDICTS[holds]
    print(f"{number}. {claim.claim}\n   {verdict}: {found}")
    if here is not None:
        of_here = VERDICTS[here.holds]
        relation = "too" if of_here == verdict else "which is another verdict: these are the times of one machine and one run"
        print(f"   timed here, just now: {here.found}\n   by these times alone it {of_here}, {relation}")
    if claim.verdict != verdict:
        message = f"claim {number} {verdict} here, but data/claims.yaml says it {claim.verdict}"
        if os.environ.get("LABS_STRICT") == "1":
            raise AssertionError(message)
        print(f"   (On the course model it {claim.verdict}.)")


def opened(number: int) -> None:
    """Print a claim that a later notebook will settle."""
    claim = claims()[number]
    print(f"{number}. {claim.claim}\n   opened here, settled in {', '.join(claim.notebooks)}")
