"""Tables that a notebook shows: HTML with a caption and header cells, and the same in words where there is no HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from labsupport.evidence.claims import Claim
from labsupport.evidence.libraries import Library


@dataclass(frozen=True)
class Table:
    """What stands in a table; the first cell of a row says what the row is of."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col" style="text-align:left">{html.escape(name)}</th>' for name in self.columns)
        return (
            f'<table><caption style="text-align:left">{html.escape(self.caption)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(map(_row, self.rows))}</tbody></table>"
        )

    def __repr__(self) -> str:
        return "\n".join((f"Table: {self.caption}", *(" | ".join(row) for row in (self.columns, *self.rows))))


def _row(cells: Sequence[str]) -> str:
    first, *others = (html.escape(cell) for cell in cells)
    cells_ = "".join(f'<td style="text-align:left">{cell}</td>' for cell in others)
    return f'<tr><th scope="row">{first}</th>{cells_}</tr>'


def claims(found: Mapping[int, Claim], numbers: Iterable[int] | None = None) -> Table:
    """A row a claim: what is claimed, the verdict, how it was settled, in which notebook. numbers: only these."""
    chosen = list(found.values()) if numbers is None else [found[number] for number in numbers]
    counts: dict[str, int] = {}
    for claim in chosen:
        counts[claim.verdict] = counts.get(claim.verdict, 0) + 1
    caption = f"{len(chosen)} claims: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    rows = ((str(claim.number), claim.claim, claim.verdict, ", ".join(claim.kinds), ", ".join(claim.notebooks)) for claim in chosen)
    return Table(caption, ("", "claim", "verdict", "settled by", "notebook"), tuple(rows))


def libraries(found: Iterable[Library]) -> Table:
    """A row a library: what it does, since when it is known to be retired, what took its place, and who says so."""
    rows = tuple((each.name, each.does, each.retired or "", ", ".join(each.successors), each.notice, each.source) for each in found)
    columns = ("library", "what it does", "retired by", "what took its place", "what was said", "source")
    return Table(f"{len(rows)} libraries that are retired, and what took their place", columns, rows)
