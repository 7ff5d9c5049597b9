"""labs build, labs pictures and labs badges: for those who work on the course."""

from __future__ import annotations

from typing import Annotated

import typer

from labsupport.cli.messages import echo, fail

app = typer.Typer()


@app.command()
def build(
    numbers: Annotated[list[str] | None, typer.Argument(metavar="NN", help="Notebooks; all by default.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Run and write nothing; exit 1 if a notebook is out of date.")] = False,
    no_run: Annotated[bool, typer.Option("--no-run", help="Make the student forms without executing anything.")] = False,
) -> None:
    """Execute notebooks/solutions and make the student forms in notebooks from them."""
    from rich.console import Console
    from rich.progress import Progress

    from labsupport.course import build as forms

    out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        if check and no_run:
            raise forms.BuildError("--check and --no-run exclude each other")
        root = forms.find_root()
        chosen = forms.sources(root, numbers)
        orphans = forms.orphans(root) if not numbers else []
    except forms.BuildError as error:
        fail("build", error)

    faults = []
    if check:
        faults = [*orphans, *(fault for source in chosen for fault in forms.check(source))]
    else:
        with Progress(console=out, transient=True) as progress:
            for source in chosen:
                task = progress.add_task(source.stem, total=None if no_run else 2 * len(forms.read(source).cells))
                try:
                    if no_run:
                        forms.generate(source)
                    else:
                        forms.build(source, on_cell=lambda _, task=task: progress.advance(task))
                except forms.BuildError as error:
                    faults.append(f"{error}; nothing written")
    for fault in faults:
        err.print(fault, markup=False)
    if faults:
        raise typer.Exit(1)
    done = "up to date" if check else "made, not run" if no_run else "built"
    out.print(f"{len(chosen)} notebook{'s' * (len(chosen) != 1)} {done}")


@app.command()
def pictures() -> None:
    """Draw the pictures of README.md again, in data/, from the course and its stored measurements."""
    from labsupport.course import pictures as drawn

    try:
        for path in drawn.write():
            echo(f"wrote {path}")
    except (ValueError, OSError) as error:
        fail("pictures", error)


@app.command()
def badges() -> None:
    """Write the Colab and Binder badges and the set-up cells from the address in pyproject.toml."""
    from rich.console import Console

    from labsupport.course.badges import write_badges
    from labsupport.course.build import BuildError, find_root

    try:
        lines = write_badges(find_root())
    except BuildError as error:
        fail("badges", error)
    for line in lines:
        Console(highlight=False, soft_wrap=True).print(line, markup=False)
