"""labs site: the course as pages to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from labsupport.cli.messages import echo, fail, stopped
from labsupport.install import get_extra

app = typer.Typer()


@app.command()
def site(
    numbers: Annotated[list[str] | None, typer.Argument(metavar="NN", help="Notebooks; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="A folder for the pages; one made by this command is replaced.")] = Path("site"),
) -> None:
    """Make the course's pages: the notebooks with their outputs, solutions behind a click, claims, the shootout, the planner.

    Needs a clone of the repository and no network. The folder can be opened as it is, or given to any web server.
    """
    from rich.console import Console
    from rich.progress import Progress

    from labsupport.course import build as forms
    from labsupport.course import site as pages

    console = Console(stderr=True)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("pages", total=None)
            made = pages.build(forms.find_root(), out, numbers, lambda done, of: progress.update(task, completed=done, total=of))
    except (pages.SiteError, forms.BuildError, OSError) as error:
        fail("site", error)
    except ModuleNotFoundError as error:
        fail("site", f"{error.name} is missing: {get_extra('site')}")
    except KeyboardInterrupt:
        stopped("site", f"{out} is as it was")
    echo(f"{len(made)} pages: open {out / 'index.html'}")
