"""labs claims: what people say about quantization, what came of it, and on what evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from labsupport.cli.messages import echo, fail

if TYPE_CHECKING:
    from labsupport.evidence.claims import Claim

app = typer.Typer()


@app.command(name="claims")
def print_claims(
    number: Annotated[int | None, typer.Argument(min=1, metavar="NUMBER", help="One claim, with its figures and evidence.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compute verdicts and figures again; exit 1 at the first that differs.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Compute all again; write figures into claims.yaml, and claims.md.")
    ] = False,
) -> None:
    """Print the claims of the field that the course tests, with the verdict on each."""
    if write and (check or number is not None):
        raise typer.BadParameter("it goes alone: all claims are written together", param_hint="--write")

    from labsupport.evidence import claims
    from labsupport.model import files, models

    try:
        found = claims.claims()
        if number is not None and number not in found:
            raise typer.BadParameter(f"there is no claim {number}, they go from {min(found)} to {max(found)}", param_hint="NUMBER")
        if write:
            _write()
        elif check:
            _check(list(found.values()) if number is None else [found[number]])
        elif number is None:
            _table(list(found.values()))
        else:
            _whole(found[number])
    except (claims.ClaimError, models.ModelError, files.WriteError) as error:
        fail("claims", error)


def _table(found: list[Claim]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "claim", "verdict", "settled by", "in", show_lines=False)
    for claim in found:
        table.add_row(str(claim.number), claim.claim, claim.verdict, ", ".join(claim.kinds), ", ".join(claim.notebooks))
    Console().print(table)
    echo("`labs claims 13` shows one with its figures and its evidence, `labs claims --check` computes all of them again.")


def _whole(claim: Claim) -> None:
    from labsupport.evidence import audit
    from labsupport.evidence.audit import page

    echo(f"{claim.number}. {claim.claim}")
    for model, _, verdict in audit.verdicts(claim):
        echo("")
        echo(f"{f'on {model}, ' if model else ''}{verdict.verdict}" + (f": {verdict.how}" if verdict.how else ""))
        for label, figure in verdict.figures.items():
            echo(f"  {label}: {figure}")
        for piece in verdict.evidence:
            echo(f"  {page.evidence_line(piece)}")
        if verdict.tested_on:
            echo(f"  tested on: {verdict.tested_on}")
    echo(f"in {', '.join(claim.notebooks)}")


def _check(chosen: list[Claim]) -> None:
    from rich.console import Console
    from rich.progress import track

    from labsupport.evidence import audit, claims
    from labsupport.evidence.audit import page

    count = 0
    for claim in track(chosen, "computing", console=Console(stderr=True), transient=True):
        for model, where, kept in audit.verdicts(claim):
            audit.check(claim.number, model, where, kept)
            count += kept.verdict != claims.OPEN
    if len(chosen) > 1 and (not page.path().is_file() or page.path().read_text("utf-8") != page.markdown(claims.claims())):
        raise claims.ClaimError("data/claims.md is not what data/claims.yaml makes: run `labs claims --write`")
    still_open = sum(claim.verdict == claims.OPEN for claim in chosen)
    echo(f"{count} verdict{'s' * (count != 1)} with all figures as the evidence gives them; {still_open} open.")


def _write() -> None:
    from rich.console import Console
    from rich.progress import Progress

    from labsupport.evidence import claims
    from labsupport.evidence.audit import page

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("computing", total=len(claims.claims()))
        changed = page.write(on_claim=lambda _: progress.advance(task))
    for line in changed:
        echo(line)
    echo(f"data/claims.yaml and data/claims.md are written, {len(changed)} changes.")
