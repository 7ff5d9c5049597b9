"""How the commands say that something is wrong: one line on standard error."""

from __future__ import annotations

from typing import NoReturn

import typer


def stopped(command: str, what_now: str) -> NoReturn:
    """After Ctrl-C: print `labs COMMAND: stopped. WHAT_NOW` and exit with 130, as shells do."""
    typer.echo(f"labs {command}: stopped. {what_now}", err=True)
    raise typer.Exit(130)


def fail(command: str, error: object) -> NoReturn:
    """Print `labs COMMAND: error` and exit with 1."""
    typer.echo(f"labs {command}: {error}", err=True)
    raise typer.Exit(1)
