"""labs doctor, test and lock: about the environment and the repository as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from labsupport import PACKAGE
from labsupport.cli.messages import echo, fail

app = typer.Typer()


def repository(command: str) -> Path:
    """The clone that this package lives in. Exits with one line where it is installed as a wheel."""
    root = PACKAGE.parent
    if not (root / "pyproject.toml").is_file():
        fail(command, "this labsupport is not in a clone of the course's repository: git clone it, then make")
    return root


@app.command()
def doctor() -> None:
    """Say what this machine has and whether the course can run on it. Exit 1 on a problem."""
    from labsupport.course.doctor import findings

    problems = 0
    for finding in findings():
        echo(f"{finding.what:13} {finding.found}")
        if finding.todo:
            problems += 1
            echo(f"{'':13} to do: {finding.todo}")
    echo(f"{problems} problem{'s' * (problems != 1)}" if problems else "all is well")
    if problems:
        raise typer.Exit(1)


@app.command()
def test(
    numbers: Annotated[list[str] | None, typer.Argument(metavar="NN", help="Only these notebooks, in both forms.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out slow tests, and notebooks that have not changed.")] = False,
) -> None:
    """Prove everything: lint, types, unit and property tests, every notebook in both forms."""
    import nbval  # noqa: F401
    import pytest  # noqa: F401  what a learner's environment lacks is said before anything runs

    from labsupport.course import suite
    from labsupport.course.build import BuildError

    try:
        code = suite.run_all(repository("test"), lambda text: print(text, end="", flush=True), numbers, quick)
    except BuildError as error:
        fail("test", error)
    except KeyboardInterrupt:
        echo("labs test: stopped", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(code)


@app.command()
def lock() -> None:
    """Freeze this environment into requirements.lock: exactly what pyproject.toml's lists lead to."""
    from labsupport.course import lock as locks

    root = repository("lock")
    try:
        count = locks.write(root / "pyproject.toml", root / "requirements.lock")
    except (locks.LockError, OSError) as error:
        fail("lock", error)
    echo(f"requirements.lock: {count} packages")
