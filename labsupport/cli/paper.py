"""labs paper: published tables, measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from labsupport.cli.messages import echo, fail, stopped

app = typer.Typer()


@app.command()
def paper(
    table: Annotated[str | None, typer.Option(help="Which table; without, those that there are are listed.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A directory or hub id in place of the table's model, which is downloaded.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A directory or file of text in place of WikiText-2, which is downloaded.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="The same in place of the text to calibrate on; default --text, else the paper's.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of text to evaluate on; default all of them, as the paper.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Windows to calibrate on; default as many as the paper.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="8 windows, and 16 to calibrate on: a look, no comparison.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file of the rows; default labs-paper-TABLE.json in this folder.")] = None,
) -> None:
    """Measure a published table again, and print ours beside the paper's, with what differs. A run that was stopped continues.

    Without --model and --text it needs the Hugging Face hub. A model is read block by block: one that does not fit into the memory
    as a whole does.
    """
    from labsupport.course import papers

    try:
        if table is None:
            for each in papers.tables().values():
                echo(f"{each.name:15} {each.source}: {each.model}, {len(each.rows)} rows")
            echo("labs paper --table NAME measures one; --quick is a look at it in a tenth of the time")
            return
        if quick:
            windows, samples = windows or papers.QUICK_WINDOWS, samples or papers.QUICK_SAMPLES
        job = papers.Job(papers.table_named(table), model, text, calibration, windows, samples)
        opened = job.open()
        path = out or Path(f"labs-paper-{table}.json")
        _measure(opened, path)
    except (ValueError, OSError) as error:
        fail("paper", error)
    except KeyboardInterrupt:
        stopped("paper", "The same command continues after the last finished block")


def _measure(opened, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    from labsupport.course import papers

    job, rows = opened.job, len(opened.settings)
    echo(f"{job.table.source}; read in {job.table.read_in}")
    echo(
        f"{rows} rows on {opened.windows} windows, about {_minutes(opened.seconds(rows))} in all on this machine; rows go to {path}"
    )
    with tqdm(unit="row", total=rows) as of_rows, tqdm(unit="block", leave=False) as of_blocks:

        def on_row(done: int, total: int) -> None:
            of_rows.total = total
            of_rows.update(done - of_rows.n)

        def on_block(done: int, total: int) -> None:
            of_blocks.total = total
            of_blocks.update(done - of_blocks.n)

        measured = opened.run(path, on_row, on_block)
    shown = Table("", "the paper", "here", "difference", box=None, pad_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
    for line in papers.lines(job, measured):
        shown.add_row(*line)
    Console().print(shown)
    echo("What differs:")
    for sentence in job.differs:
        echo(f"- {sentence}")


def _minutes(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(1, round(seconds / 60))} min"
