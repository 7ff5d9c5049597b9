"""How the commands say that something is wrong: one line on standard error."""

from __future__ import annotations

from typing import NoReturn

import typer


def fail(command: str, error: object) -> NoReturn:
    """Print `labs COMMAND: error` and exit with 1."""
    typer.echo(f"labs {command}: {error}", err=True)
    raise typer.Exit(1)
