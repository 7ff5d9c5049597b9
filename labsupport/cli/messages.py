"""What the commands print: lines that a terminal shows and does not obey; one line on standard error where something is wrong."""

from __future__ import annotations

from typing import NoReturn

import typer


def printable(text: str) -> str:
    """The text with escapes, as Python writes them, for what is not printed: control characters, line breaks, changes of direction.

    Names from a file end up in messages, and a terminal obeys what it is sent: it may clear the screen or change its title.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def echo(line: object, err: bool = False) -> None:
    """Print one line, to standard output or to standard error."""
    typer.echo(printable(str(line)), err=err)


def echo_lines(text: str) -> None:
    """Print a text of several lines."""
    for line in text.split("\n"):
        echo(line)


def stopped(command: str, what_now: str) -> NoReturn:
    """After Ctrl-C: print `labs COMMAND: stopped. WHAT_NOW` and exit with 130, as shells do."""
    echo(f"labs {command}: stopped. {what_now}", err=True)
    raise typer.Exit(130)


def fail(command: str, error: object) -> NoReturn:
    """Print `labs COMMAND: error` and exit with 1."""
    echo(f"labs {command}: {error}", err=True)
    raise typer.Exit(1)
