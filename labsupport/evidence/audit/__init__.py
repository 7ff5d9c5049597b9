"""Every verdict of data/claims.yaml once more, with its figures, from the evidence that the file names: `labs claims --check`.

A function for each claim, by what it is settled from: `counted` (arithmetic, and what others have published), `stored` (rows of
`labs sweep` and `labs bench`), `shootout` (those of one sweep), `computed` (on the course model, in seconds).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labsupport.evidence import claims, measurements, sweep
from labsupport.evidence.claims import OPEN, VERDICTS, Claim, ClaimError, Evidence, Holds, Verdict
from labsupport.evidence.timing import Product
from labsupport.model import models
from labsupport.model.evaluate import Interval

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Finding:
    """holds: as `claims.settle` takes it. figures: what was found, by what it is of, an interval beside every change."""

    holds: Holds
    figures: Mapping[str, str]

    @property
    def verdict(self) -> str:
        return VERDICTS[self.holds]


class Given:
    """The evidence of one verdict: its audit is given this, and can read nothing that the file does not name."""

    def __init__(self, where: str, verdict: Verdict, directory: Path | None = None) -> None:
        """where: begins every error. directory: in place of data/measurements."""
        self.where = where
        self.directory = directory or models.data_dir() / "measurements"
        self.tested_on = verdict.tested_on
        self._of = {piece.what: piece for piece in verdict.evidence}
        self._read: set[str] = set()

    def rows(self, file: str) -> sweep.Measurements:
        """Rows of a sweep: "awq.json", or of another model "smollm2/awq.json"."""
        return sweep.Measurements(*self._file(file))

    def products(self, file: str) -> tuple[Mapping[str, Any], dict[tuple[str, int], float]]:
        """Of rows of `labs bench`: about the machine, and the seconds of a 4096 x 4096 product by kernel and batch."""
        about, rows = self._file(file)
        products = [Product(**row) for row in rows]
        square = [p for p in products if (p.out_features, p.in_features) == (4096, 4096)]
        read = {p.kernel: p.read for p in square}
        return about | {"read": read}, {(p.kernel, p.batch): p.seconds for p in square}

    def says(self, source: str) -> Mapping[str, Any]:
        """What a source says that the claim cites."""
        return self._piece(source, "citation").says

    def unread(self) -> list[str]:
        """Files, and sources with figures, that the claim names and its audit did not read."""
        return [e.what for e in self._of.values() if (e.kind == "measurement" or e.says) and e.what not in self._read]

    def _piece(self, what: str, kind: str) -> Evidence:
        piece = self._of.get(what)
        if piece is None or piece.kind != kind:
            raise ClaimError(f"{self.where} is settled from {what!r}, and does not name it as a {kind}")
        self._read.add(what)
        return piece

    def _file(self, file: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        piece = self._piece(file, "measurement")
        path = self.directory / file
        if not path.is_file():
            raise ClaimError(f"{self.where} names {file}, which is not in data/measurements")
        try:
            about, rows = measurements.read(path)
        except ValueError as error:
            raise ClaimError(f"{self.where}: {error}") from error
        for name, said, found in (("command", piece.command, about.get("command")), ("version", piece.version, version_of(about))):
            if said != found:
                raise ClaimError(f"{self.where} was settled from {file} of {name} {said!r}, and the file is of {found!r}")
        if (device := device_of(about)) not in self.tested_on:
            raise ClaimError(f"{self.where} names {file}, of a {device}, and was tested on: {self.tested_on}")
        return about, rows


Audit = Callable[[Given], Finding]
AUDITS: dict[tuple[int, str | None], Audit] = {}


def audits(number: int, model: str | None = None) -> Callable[[Audit], Audit]:
    """Marks the function that computes the verdict on a claim: of the course, or by the rows of another model."""

    def register(function: Audit) -> Audit:
        if (number, model) in AUDITS:
            raise ValueError(f"claim {number} has two audits")
        AUDITS[number, model] = function
        return function

    return register


def version_of(about: Mapping[str, Any]) -> str:
    """When rows were measured, with which PyTorch, and of what model: the start of the SHA-256 of its weights."""
    torch = about.get("torch") or about.get("versions", {}).get("torch")
    model = f", {about['model']} {about['model_sha256'][:8]}" if "model_sha256" in about else ""
    return f"{about.get('date')}, torch {torch}{model}"


def device_of(about: Mapping[str, Any]) -> str:
    """ "CPU", or what a GPU is called for short: "H100"."""
    if about.get("device") == "cpu":
        return "CPU"
    name = str(about.get("name") or about.get("processor"))
    short = re.search(r"[A-Z]+\d+\w*", name)
    return short[0] if short else name


def all_or_some(flags: Iterable[bool]) -> bool | None:
    """True for all, False for none, None where it depends."""
    found = list(flags)
    return True if all(found) else None if any(found) else False


def within_or_beyond(changes: Iterable[Interval], bar: float) -> bool | None:
    """True where every interval ends at the bar at most, False where every one begins beyond it, else None."""
    found = list(changes)
    if all(change.high <= bar for change in found):
        return True
    return False if all(change.low > bar for change in found) else None


def of_row(row: Mapping[str, Any]) -> Interval:
    """The change from the model in floating point that a row holds."""
    return Interval(row["change"], row["low"], row["high"])


def texts(figures: Mapping[str, object]) -> dict[str, str]:
    return {label: str(figure) for label, figure in figures.items()}


def verdicts(claim: Claim) -> Iterator[tuple[str | None, str, Verdict]]:
    """Of the course (None) and of other models: the model, what to call the verdict, the verdict."""
    yield None, f"claim {claim.number}", claim
    for model, found in claim.elsewhere.items():
        yield model, f"claim {claim.number} on {model}", found


def recompute(number: int, model: str | None, where: str, kept: Verdict, directory: Path | None = None) -> Finding:
    """The verdict and its figures from its evidence. Raises ClaimError where a file is missing, or not the one that was read."""
    from labsupport.evidence.audit import computed, counted, shootout, stored  # noqa: F401  each marks its audits

    if (number, model) not in AUDITS:
        raise ClaimError(f"{where} has a verdict, and no audit computes it")
    given = Given(where, kept, directory)
    try:
        found = AUDITS[number, model](given)
    except LookupError as error:
        raise ClaimError(f"{where}: {error.args[0]}") from error
    if unread := given.unread():
        raise ClaimError(f"{where} names {', '.join(unread)}, which its audit does not read")
    return found


def check(number: int, model: str | None, where: str, kept: Verdict, directory: Path | None = None) -> None:
    """Raises ClaimError with the first thing that is not as data/claims.yaml has it. A claim that is open passes."""
    if kept.verdict == OPEN:
        return
    found = recompute(number, model, where, kept, directory)
    if found.verdict != kept.verdict:
        raise ClaimError(f"{where} {found.verdict} by its evidence, and data/claims.yaml says it {kept.verdict}")
    if list(found.figures) != list(kept.figures):
        raise ClaimError(f"{where} has other figures in data/claims.yaml than its audit: run `labs claims --write`")
    for label, figure in found.figures.items():
        if not same(kept.figures[label], figure, kept.exact):
            raise ClaimError(f"{where}, {label}: {figure} by its evidence, and data/claims.yaml says {kept.figures[label]}")


def same(kept: str, found: str, exact: bool) -> bool:
    """Whether two figures agree. Unless exact, their numbers may be one apart in the last place that is written: sums on another
    processor are rounded in another order, and a figure beside the middle of two places falls to either."""
    if exact or kept == found:
        return kept == found
    if NUMBER.sub("#", kept) != NUMBER.sub("#", found):
        return False
    pairs = zip(NUMBER.findall(kept), NUMBER.findall(found), strict=True)
    return all(abs(_value(a) - _value(b)) <= 1.001 * max(_place(a), _place(b)) for a, b in pairs)


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _place(number: str) -> float:
    """What one more in the last place of a number adds: 0.01 of 3.25, 1 of 12, 0.1e-3 of 1.7e-3."""
    digits, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


def everything() -> Iterator[tuple[int, str | None, str, Verdict]]:
    """All verdicts of data/claims.yaml, as `check` and `recompute` take them."""
    for claim in claims.claims().values():
        for model, where, kept in verdicts(claim):
            yield claim.number, model, where, kept
