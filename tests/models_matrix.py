"""`make models`: notebooks 02 to 11, solved, on models that are not the course's: a line a run, rows in data/measurements/.

Each small model of other_models.py goes through each notebook in quick mode, on the topics of the language reference. A run is
good where every cell comes to its end and nothing is written to standard error. Weights are random, so no figure means anything.
The exit code is 1 where a cell fails. ARGS="--model opt-576 --notebook 08" runs some; --keep FOLDER keeps notebooks as they ran.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import nbformat
import other_models
from nbclient import NotebookClient
from nbformat import NotebookNode
from tqdm import tqdm

from labsupport.course import build, execute
from labsupport.course.kernels import ThisInterpreter
from labsupport.evidence import measurements
from labsupport.model import quick

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "data" / "measurements" / "other_models.json"
NUMBERS = tuple(f"{number:02}" for number in range(2, 12))
LIBRARIES = ("torch", "transformers", "tokenizers", "bitsandbytes")


@dataclass(frozen=True)
class Run:
    """One notebook on one model. peak: bytes, of the kernel. failed: the cells that did not come to their end, and why."""

    model: str
    notebook: str
    cells: int
    seconds: float
    peak: int
    failed: dict[str, str]

    def __str__(self) -> str:
        said = f"{self.model:10} {self.notebook}: {self.cells} cells, {self.seconds:5.1f} s, {self.peak / 2**20:5.0f} MiB"
        return "; ".join([said, *(f"{cell} failed: {why}" for cell, why in self.failed.items())])


def faults(cell: NotebookNode) -> str:
    """What is wrong with an executed cell, in a line; "" where nothing is."""
    for output in cell.get("outputs", []):
        if output.output_type == "error":
            return f"{output.ename}: {output.evalue}".splitlines()[0]
        if output.output_type == "stream" and output.name == "stderr":
            return f"standard error: {output.text.strip().splitlines()[-1]}"
    return ""


def run(name: str, number: str, folder: Path, articles: Path, keep: Path | None = None) -> Run:
    """Run a solved notebook on the model in `folder` to its last cell, whatever fails on the way. For a process of its own."""
    (source,) = build.sources(ROOT, [number])
    notebook = build.read(source)
    env = {key: value for key, value in os.environ.items() if not key.startswith("LABS_") or key == "LABS_CACHE"}
    env |= {"LABS_MODEL": str(folder), "LABS_TEXT": str(articles), quick.VARIABLE: "1", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as empty:
        client = NotebookClient(
            notebook, timeout=execute.CELL_SECONDS, kernel_manager_class=ThisInterpreter, allow_errors=True,
            store_widget_state=True, coalesce_streams=True, resources={"metadata": {"path": empty}},
            extra_arguments=["--log-level=ERROR"],
        )  # fmt: skip
        client.execute(env=env)
    seconds = time.monotonic() - start
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, keep / f"{name}-{source.name}")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    failed = {cell.id: why for cell in code if (why := faults(cell))}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # the kernel is this process's only child
    return Run(name, number, len(code), round(seconds, 1), peak, failed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=other_models.CONFIGS, action="append", help="only this model; may be given again")
    parser.add_argument("--notebook", choices=NUMBERS, action="append", help="only this notebook; may be given again")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the notebooks there as they ran")
    parser.add_argument("--out", type=Path, default=ROWS, help="where the rows go; default data/measurements/other_models.json")
    asked = parser.parse_args(arguments)
    names, numbers = asked.model or list(other_models.CONFIGS), asked.notebook or NUMBERS
    about = {
        "command": "make models", "date": datetime.date.today().isoformat(),
        "python": ".".join(map(str, sys.version_info[:3])), "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        **{library: version(library) for library in LIBRARIES},
        "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1),  # where it is far above the cores, seconds are long
    }  # fmt: skip
    kept = {}
    if asked.out.exists():
        kept = {(row["model"], row["notebook"]): row for row in measurements.read(asked.out)[1]}
    bad = 0
    with tempfile.TemporaryDirectory(prefix="labs-models-") as made:
        folder = Path(made)
        articles = other_models.write_articles(folder / "articles")
        for name in names:
            other_models.write(name, folder / name)
        # A process for each run: its peak is then the peak of one kernel.
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
        with pool, tqdm(total=len(names) * len(numbers), unit="notebook", disable=None) as bar:
            for name in names:
                for number in numbers:
                    found = pool.submit(run, name, number, folder / name, articles, asked.keep).result()
                    bad += bool(found.failed)
                    tqdm.write(str(found), file=sys.stdout)
                    sys.stdout.flush()
                    bar.update()
                    kept[name, number] = asdict(found)
                    order = [key for key in _order() if key in kept]
                    measurements.write(asked.out, about, (kept[key] for key in order))
    print(f"{bad} of {len(names) * len(numbers)} runs with a cell that fails")
    return 1 if bad else 0


def _order() -> list[tuple[str, str]]:
    return [(name, number) for name in other_models.CONFIGS for number in NUMBERS]


if __name__ == "__main__":
    sys.exit(main())
