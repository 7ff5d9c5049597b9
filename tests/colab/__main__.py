"""`make colab`: every notebook as a learner has it, in an environment like Colab's, its repository reached without a network.

For each notebook: seconds, the most memory its kernel held, cells that fail. Before them the set-up cell: what it adds and
replaces, whether it may run twice and after a restart. The exit code is 1 where a cell fails, a notebook takes more than 1.5 GB,
or something is replaced that must stay.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

from colab.environment import HERE, Environment, make, origin, versions
from colab.place import ADDRESS, ROOT, Place, publish
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_notebook
from rich.console import Console

from labsupport.course.build import read, sources, student_path
from labsupport.course.missing import KEPT
from labsupport.course.setup_cell import setup
from labsupport.evidence import machine, measurements
from labsupport.install import InstallError

MOST = 1.5e9  # bytes, the course's bound for a notebook
NAMED = ("torch", "triton", "numpy", "ipywidgets", "ipython", "transformers", "bitsandbytes")
WHERE = "import google.colab, os, labsupport; assert labsupport.__file__.startswith(os.getcwd()), labsupport.__file__"
DEVICE = "import torch; assert torch.cuda.is_available()"
OUT = Console(highlight=False, soft_wrap=True)


def set_up(place: Place, before: dict[str, str]) -> Iterator[str]:
    """What is wrong with the set-up cell: run in a new environment, run a second time, and in a new kernel."""
    cells = [setup(ADDRESS), setup(ADDRESS), WHERE, *([DEVICE] if place.gpu else [])]
    for again in (False, True):
        run = place.run(new_notebook(cells=[new_code_cell(source) for source in cells]))
        said = "".join(output.get("text", "") for output in run.notebook.cells[0].outputs)
        OUT.print(f"set-up cell{', after a restart' * again}: {run.seconds:.0f} s", *said.splitlines(), sep="\n  ", markup=False)
        yield from (f"set-up cell: {fault}" for fault in run.faults)
    after = versions(place.python)
    yield from (f"{name} {before[name]} was replaced by {after[name]}" for name in KEPT if before.get(name) != after.get(name))


def simulate(made: Environment, numbers: list[str], gpu: bool, keep: Callable[[dict], None]) -> list[str]:
    """What is wrong, a line each. keep: called with the row of each notebook."""
    wrong: list[str] = []
    about: dict[str, object] = {"replaced": made.replaced} | {"date": str(date.today()), "device": "pretend GPU" if gpu else "cpu"}
    with made.copy() as used, tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "content").mkdir()
        (home / "published").mkdir()
        place = Place(used.python, home / "content", publish(home / "published"), gpu)
        before = versions(used.python)
        wrong += set_up(place, before)
        if wrong:
            return wrong  # no notebook could do anything
        now = versions(used.python)
        here = machine.describe("cpu")
        about |= {"versions": {"Python": made.version} | {name: now.get(name, "none") for name in NAMED}}
        about |= {"machine": here.name, "cores": here.cores}
        for source in sources(place.repository, numbers):
            run = place.run(read(student_path(source)))
            faults = list(run.faults)
            if run.peak > MOST:
                faults.append(f"takes {run.peak / 1e9:.2f} GB, at most {MOST / 1e9} GB are allowed")
            OUT.print(
                f"{source.name}: {run.seconds:.0f} s ({run.cpu_seconds:.0f} of a core), {run.peak / 1e9:.2f} GB",
                *faults,
                sep="\n  ",
                markup=False,
            )
            wrong += [f"{source.name}: {fault}" for fault in faults]
            row = {"notebook": source.stem, "seconds": run.seconds, "cpu_seconds": run.cpu_seconds, "peak": run.peak}
            keep(row | {"faults": faults, **about, "load": os.getloadavg()[0]})
    return wrong


def write(row: dict) -> None:
    """The row, in place of one of the same notebook, Python and device, into data/measurements/colab.json."""
    path = ROOT / "data" / "measurements" / "colab.json"

    def key(row: dict) -> tuple:
        return row["versions"]["Python"], row["device"], row["notebook"]

    note = (
        "Each notebook in the learner's form, in an environment with the versions that Colab publishes (packages says where and "
        "when), but for `replaced`: Colab's version, and the one taken because that, or what asks for it, cannot be had here. "
        "seconds: wall clock, the kernel's start in it. cpu_seconds: of the kernel, which sharing changes less. peak: bytes, the "
        "most memory that the kernel held. load: of the machine in the last minute; above the cores it was shared."
    )
    about = {"note": note, "command": "make colab ARGS=--write", "packages": origin()}
    with FileLock(HERE / ".venv" / "rows.lock"):  # the run of another Python may write, too
        rows = measurements.read(path)[1] if path.is_file() else []
        kept = {key(known): known for known in rows} | {key(row): row}
        measurements.write(path, about, [kept[k] for k in sorted(kept)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="make colab", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("numbers", nargs="*", metavar="NN", help="notebooks; all by default")
    parser.add_argument("--python", action="append", help="an interpreter to make the environment of; again for another one")
    parser.add_argument("--torch", metavar="VERSION", help="in place of Colab's; 2.13.0 has a CPU build for Python 3.11 to 3.13")
    parser.add_argument("--gpu", action="store_true", help="on the pretended GPU of tests/pretend_cuda; needs PyTorch's CPU build")
    parser.add_argument("--write", action="store_true", help="put the rows into data/measurements/colab.json")
    options = parser.parse_args()
    wrong = []
    try:
        for python in options.python or [sys.executable]:
            made = make(python, options.torch)
            OUT.print(f"Python {made.version}, Colab's versions of {origin()['date']}", markup=False)
            for name, (theirs, taken) in made.replaced.items():
                OUT.print(f"  {name} {taken} in place of Colab's {theirs}", markup=False)
            wrong += simulate(made, options.numbers, options.gpu, write if options.write else lambda row: None)
    except (InstallError, ValueError) as error:
        print(f"make colab: {error}", file=sys.stderr)
        return 1
    OUT.print(f"{len(wrong)} things are wrong", *wrong, sep="\n  ", markup=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
