"""labs capstone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from labsupport.cli import progress
from labsupport.cli.messages import echo, echo_lines, fail, stopped

app = typer.Typer()


@app.command()
def capstone(
    directory: Annotated[
        Path | None, typer.Argument(help="A submission: config.json and safetensors of the quantized course model.")
    ] = None,
    show_rules: Annotated[bool, typer.Option("--rules", help="Print the rules, and do nothing else.")] = False,
    text: Annotated[
        Path | None, typer.Option(help="A directory of text to score on, in place of the course's; without baselines.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, with the losses of documents.")] = False,
    baselines: Annotated[bool, typer.Option("--baselines", help="Measure what submissions are placed among.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file of the baselines; default data/measurements/capstone.json.")] = None,
) -> None:
    """Score a checkpoint of the course model: its bytes, its perplexity on held-out text, its place. Exit code 1 if refused."""
    from labsupport.course.capstone import rules

    if show_rules:
        echo_lines(rules.text().rstrip())
    elif baselines:
        _measure(out)
    elif directory is None:
        fail("capstone", "DIRECTORY is missing: a submission to score, or --rules, or --baselines")
    else:
        _score(directory, text, as_json)


def _score(directory: Path, text: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from labsupport.course.capstone import scoring

    if text is not None and not text.is_dir():
        fail("capstone", f"--text is {text}, wanted a directory of text")
    try:
        with Console(stderr=True).status("evaluating, in a process of its own"):
            score = scoring.score(directory, text)
    except scoring.Refused as error:
        fail("capstone", f"refused: {error}")
    except (ValueError, OSError) as error:
        fail("capstone", error)
    except KeyboardInterrupt:
        stopped("capstone", "Nothing was changed")
    if as_json:
        echo_lines(json.dumps(score.as_json(), indent=1))
        return
    for line in score.lines():
        echo(line)


def _measure(out: Path | None) -> None:
    from labsupport.course.capstone import baselines, scoring

    path = out or scoring.rows_path()
    try:
        with progress.rows("row") as (on_row, on_step):
            baselines.measure(path, on_row=on_row, on_step=on_step)
    except (ValueError, OSError) as error:
        fail("capstone", error)
    except KeyboardInterrupt:
        stopped("capstone", "The same command continues after the last finished row")
    echo(f"wrote {path}")
