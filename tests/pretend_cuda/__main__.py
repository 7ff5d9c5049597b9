"""Run solved notebooks on a CUDA device, on little text, every cell even after an error; say which cells fail.

    python tests/pretend_cuda [NN ...]

The device is the pretend one of this folder, or a GPU where PyTorch knows one. All notebooks take about a quarter of an hour on one
core. Exit code 1 if a cell fails.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from nbclient import NotebookClient  # noqa: E402
from nbformat import NotebookNode  # noqa: E402

from labsupport.course.build import read, sources  # noqa: E402
from labsupport.course.execute import CELL_SECONDS  # noqa: E402
from labsupport.course.kernels import ThisInterpreter  # noqa: E402
from labsupport.model import files, quick  # noqa: E402

# Runs before the first cell: without a device a notebook would pass here and show nothing.
DEVICE = "import torch; assert torch.cuda.is_available(), 'no CUDA device'; print(torch.cuda.get_device_name())"


def environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("LABS_") or name == files.CACHE}
    paths = [str(HERE), str(ROOT), env.get("PYTHONPATH", "")]
    env |= {quick.VARIABLE: "1", "LABS_STRICT": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PRETEND_CUDA": "0" if _real() else "1"}


def _real() -> bool:
    import torch

    return torch.cuda.is_available()


def failures(notebook: NotebookNode) -> Iterator[str]:
    """A line for each cell that raised or wrote to standard error, by its place in the file, from 0, and its id."""
    for place, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield f"cell {place}, {cell.id}: {output.ename}: {output.evalue}"
            elif output.get("name") == "stderr":
                yield f"cell {place}, {cell.id}: writes to standard error: {output.text.strip()}"


def run(path: Path, env: dict[str, str]) -> list[str]:
    notebook = read(path)
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.source = f"{DEVICE}\n{code.source}"
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_manager_class=ThisInterpreter,
            resources={"metadata": {"path": folder}},
            allow_errors=True,
            store_widget_state=True,
            extra_arguments=["--log-level=ERROR"],
            coalesce_streams=True,
        ).execute(env=env)
    return list(failures(notebook))


def main(numbers: list[str]) -> int:
    env, failed = environment(), 0
    for path in sources(ROOT, numbers or None):
        start = time.monotonic()
        found = run(path, env)
        failed += len(found)
        print(f"{path.name}: {len(found)} cells fail, {time.monotonic() - start:.0f} s", *found, sep="\n  ", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
