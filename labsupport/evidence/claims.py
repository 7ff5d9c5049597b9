"""The claims of the field that the course tests, what came of each, and on what evidence: data/claims.yaml.

A verdict is computed in a notebook and compared with the file here, so that the file cannot say what no notebook found.
`labsupport.evidence.audit` computes verdicts and figures once more, from the evidence that is named in the file and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import fields as names_of
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from labsupport.model import models

CannotBeTold = Literal["cannot be told"]
Holds = bool | None | CannotBeTold
CANNOT: CannotBeTold = "cannot be told"
VERDICTS: Mapping[Holds, str] = {True: "holds", False: "fails", None: "depends", CANNOT: "cannot be told here"}
OPEN = "open"
# How a claim can be settled, and what must be said of each piece of evidence beside what it is.
KINDS = {
    "arithmetic": (),  # of published shapes and formats, in code
    "computation": (),  # on weights, in seconds
    "measurement": ("command", "version"),  # stored rows: a file under data/measurements
    "citation": ("where", "version"),
}


class ClaimError(ValueError):
    """data/claims.yaml is not what it should be, or its evidence does not say what it says."""


@dataclass(frozen=True)
class Evidence:
    """kind: of KINDS. what: the file under data/measurements, the source that is cited, or what is computed.

    command: the one that measured the file. where: table, page or address. version: of the file, or of what is cited, with a date.
    says: figures of a source, by what they are of.
    """

    kind: str
    what: str
    command: str = ""
    where: str = ""
    version: str = ""
    says: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """verdict: one of VERDICTS, or OPEN, and then the rest is empty. how: what was compared, in words.

    figures: by what they are of; a change has its interval with it. tested_on: back end and device.
    """

    verdict: str
    how: str = ""
    tested_on: str = ""
    figures: Mapping[str, str] = field(default_factory=dict)
    evidence: tuple[Evidence, ...] = ()

    @property
    def kinds(self) -> list[str]:
        """How it was settled, each way once."""
        return list(dict.fromkeys(e.kind for e in self.evidence))

    @property
    def exact(self) -> bool:
        """Whether its figures are the same on every machine: nothing is computed in floating point."""
        return set(self.kinds) <= {"arithmetic", "citation"}


@dataclass(frozen=True)
class Claim(Verdict):
    """number and text of a claim; notebooks that test it; its verdict. elsewhere: what it is on other models, by their name."""

    number: int = 0
    claim: str = ""
    notebooks: tuple[str, ...] = ()
    elsewhere: Mapping[str, Verdict] = field(default_factory=dict)


def default_path() -> Path:
    return models.data_dir() / "claims.yaml"


@cache
def claims() -> Mapping[int, Claim]:
    """All claims by number; read once, and not to be changed."""
    return read(default_path())


def read(path: Path) -> Mapping[int, Claim]:
    """Raises ClaimError for a file that does not hold claims, and for a verdict without evidence."""
    import yaml

    try:
        rows = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ClaimError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error
    return parse(rows, path.name)


def parse(rows: Any, name: str) -> Mapping[int, Claim]:
    """The claims of rows as YAML holds them. name: of the file, for errors. Raises ClaimError, see `read`."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ClaimError(f"{name} does not hold a list of claims")
    found = {claim.number: claim for claim in map(_claim, rows)}
    if len(found) != len(rows):
        raise ClaimError(f"{name} has {len(rows)} claims with {len(found)} numbers: each wants its own")
    return MappingProxyType(found)


def verdict_of(where: str, row: Mapping[str, Any]) -> Verdict:
    """The verdict in a row of a claim, or in one of its `elsewhere`. where: begins every error. Raises ClaimError."""
    own = {each.name for each in names_of(Verdict)}
    return _verdict(where, Verdict, {key: value for key, value in row.items() if key in own})


def _claim(row: dict[str, Any]) -> Claim:
    where = f"claim {row.get('number', '(no number)')}"
    fields = dict(row)
    elsewhere = fields.pop("elsewhere", {})
    if missing := [key for key in ("number", "claim", "notebooks") if not fields.get(key)]:
        raise ClaimError(f"{where} has no {', '.join(missing)}")
    fields["notebooks"] = tuple(fields["notebooks"])
    others = {model: _verdict(f"{where} on {model}", Verdict, dict(found)) for model, found in elsewhere.items()}
    return _verdict(where, Claim, fields | {"elsewhere": MappingProxyType(others)})


def _verdict(where: str, kind: type[Any], fields: dict[str, Any]) -> Any:
    """A Verdict or a Claim. Raises ClaimError, which begins with `where`."""
    if unknown := fields.keys() - {each.name for each in names_of(kind)}:
        raise ClaimError(f"{where} has {', '.join(sorted(unknown))}, which no claim has")
    fields["evidence"] = tuple(_evidence(where, dict(piece)) for piece in fields.get("evidence", ()))
    fields["figures"] = MappingProxyType(dict(fields.get("figures") or {}))
    found = kind(**fields)
    if found.verdict not in (OPEN, *VERDICTS.values()):
        raise ClaimError(f"{where} has the verdict {found.verdict!r}, wanted one of {OPEN}, {', '.join(VERDICTS.values())}")
    parts = {"evidence": found.evidence, "how": found.how, "tested_on": found.tested_on}
    if found.verdict == OPEN and (written := [name for name, part in parts.items() if part]):
        raise ClaimError(f"{where} is open, and has {', '.join(written)}")
    if found.verdict != OPEN and (missing := [name for name, part in parts.items() if not part]):
        raise ClaimError(f"{where} has the verdict {found.verdict!r} without {', '.join(missing)}")
    return found


def _evidence(where: str, fields: dict[str, Any]) -> Evidence:
    kind = next(iter(fields), "")
    if kind not in KINDS:
        raise ClaimError(f"{where} has evidence of the kind {kind!r}, wanted one of {', '.join(KINDS)}")
    piece = Evidence(
        kind, fields.pop(kind), **{key: fields.pop(key) for key in ("command", "where", "version", "says") if key in fields}
    )
    if fields:
        raise ClaimError(f"{where}: evidence {piece.what!r} has {', '.join(fields)}, which no evidence has")
    if missing := [key for key in KINDS[kind] if not getattr(piece, key)]:
        raise ClaimError(f"{where}: {kind} {piece.what!r} has no {', '.join(missing)}")
    return piece


@dataclass(frozen=True)
class Timed:
    """What the clock of this machine said a moment ago about a claim: the verdict that it alone would give, and the figures."""

    holds: bool | None
    found: str


def settle(number: int, holds: Holds, found: str, here: Timed | None = None, model: str | None = None) -> None:
    """Print a claim with the verdict that the notebook has just computed: None where it depends on what is meant, CANNOT
    where nothing at hand can tell.

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
