"""data/claims.md, which is made of data/claims.yaml, and the parts of that file that are computed: figures, versions of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from labsupport.evidence import audit, claims, measurements
from labsupport.evidence.claims import OPEN, Claim, ClaimError, Evidence, Verdict
from labsupport.model import files, models

INTRO = """# Claims of the field, and what came of each

Made by `labs claims --write` from [claims.yaml](claims.yaml). `labs claims --check` computes every verdict and figure once more,
from the evidence that is named. A change in perplexity has its 95 % interval beside it, paired over documents.
"""


def path() -> Path:
    return claims.default_path().with_suffix(".md")


def markdown(found: Mapping[int, Claim]) -> str:
    """The page: a table of all claims, then each with its figures and its evidence."""
    table = ["| | claim | verdict | settled by | notebook |", "|---|---|---|---|---|"]
    for claim in found.values():
        settled = ", ".join(claim.kinds)
        table.append(
            f"| [{claim.number}](#claim-{claim.number}) | {claim.claim} | {claim.verdict} | {settled} | {_notebooks(claim)} |"
        )
    return INTRO + "\n" + "\n".join(table) + "\n" + "".join(map(_section, found.values()))


def _notebooks(claim: Claim) -> str:
    names = {place.name[:2]: place.name for place in (models.data_dir().parent / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    return ", ".join(f"[{number}](../notebooks/{names[number]})" if number in names else number for number in claim.notebooks)


def _section(claim: Claim) -> str:
    parts = [f"\n## Claim {claim.number}\n\n{claim.claim}\n"]
    for model, _, verdict in audit.verdicts(claim):
        on = f" on {model}" if model else ""
        parts.append(f"\n**{verdict.verdict}**{on}" + (f": {verdict.how}.\n" if verdict.how else ".\n"))
        if verdict.figures:
            parts.append(
                "\n| figure | |\n|---|---|\n" + "".join(f"| {label} | {value} |\n" for label, value in verdict.figures.items())
            )
        if verdict.evidence:
            parts.append("\n" + "".join(f"- {evidence_line(piece)}\n" for piece in verdict.evidence))
            parts.append(f"- tested on: {verdict.tested_on}\n")
    return "".join(parts)


def evidence_line(piece: Evidence) -> str:
    if piece.kind == "measurement":
        return f"measurement: data/measurements/{piece.what}, `{piece.command}`, {piece.version}"
    return f"{piece.kind}: " + ", ".join(filter(None, (piece.what, piece.where, piece.version)))


def write(yaml_path: Path | None = None, on_claim: Callable[[int], None] = lambda done: None) -> list[str]:
    """Recompute all, and write figures and versions into the file of claims and the page beside it; or neither.

    Returns what changed, a line each. on_claim(number) is called after each claim. Raises ClaimError where evidence is missing and
    where a verdict is another than the one written: that is for people to change.
    """
    import yaml

    place = yaml_path or claims.default_path()
    kept, text = claims.read(place), place.read_text("utf-8")
    rows, changed = yaml.safe_load(text), list[str]()
    for row in rows:
        for model, where, verdict in audit.verdicts(kept[row["number"]]):
            if verdict.verdict != OPEN:
                changed += _update(row if model is None else row["elsewhere"][model], row["number"], model, where, verdict)
        on_claim(row["number"])
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    body = yaml.safe_dump(rows, sort_keys=False, allow_unicode=True, width=132)
    new = claims.parse(rows, place.name)
    files.replace_all({
        place: lambda temporary: temporary.write_text(head + body, "utf-8"),
        place.with_suffix(".md"): lambda temporary: temporary.write_text(markdown(new), "utf-8"),
    })  # fmt: skip
    return changed


def _update(row: dict[str, Any], number: int, model: str | None, where: str, verdict: Verdict) -> Iterator[str]:
    """Changes a row of the file in place, and says how."""
    for piece in row["evidence"]:
        if "measurement" in piece:
            about, _ = measurements.read(models.data_dir() / "measurements" / piece["measurement"])
            version = audit.version_of(about)
            if piece["version"] != version:
                yield f"{where}: {piece['measurement']} is of {version}"
            piece["version"] = version
    found = audit.recompute(number, model, where, claims.verdict_of(where, row))
    figures = dict(found.figures)
    if found.verdict != verdict.verdict:
        raise ClaimError(
            f"{where} {found.verdict} by its evidence, and the file says it {verdict.verdict}: change the verdict first"
        )
    for label, figure in found.figures.items():
        before = verdict.figures.get(label)
        if before is not None and audit.same(before, figure, verdict.exact):
            figures[label] = before  # another processor's last place is no news
        elif before != figure:
            yield f"{where}, {label}: {figure}" + (f", was {before}" if before else "")
    row["figures"] = figures
