"""labs train, labs sweep, labs bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from labsupport.cli import progress
from labsupport.cli.messages import echo, fail, stopped
from labsupport.evidence.settings import SWEEPS

app = typer.Typer()


@app.command()
def train(
    size: Annotated[str, typer.Option(help="full: the course model; small: one of a quarter of its parameters.")] = "full",
    out: Annotated[
        Path | None,
        typer.Option(help="Where the finished model directory goes; default runs/course-model, or -small."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Where the run keeps its state, to continue after a stop; default runs/course, or -small."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=8192, help="Tokens to train on; more than before continues a finished run.")
    ] = 24_000_000,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cpu",
    compile: Annotated[bool, typer.Option(help="Compile the training step; needs a C++ compiler, about a third faster.")] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the weights and of every batch.")] = 0,
) -> None:
    """Train the course model, or continue a run that was stopped, and write it as a model directory with its card."""
    from dataclasses import replace

    from tqdm import tqdm

    from labsupport.course import export
    from labsupport.course import train as training
    from labsupport.model import files

    if size not in training.SIZES:
        fail("train", f"--size is {size!r}, wanted {' or '.join(training.SIZES)}")
    recipe = replace(training.SIZES[size], tokens=tokens, seed=seed)
    suffix = "" if size == "full" else f"-{size}"
    out, run = out or Path(f"runs/course-model{suffix}"), run or Path(f"runs/course{suffix}")
    try:
        export.check_replaceable(out)
        files.check_writable(out)
        with tqdm(total=recipe.steps, unit="step") as bar:

            def on_step(step: int, loss: float) -> None:
                bar.update(step + 1 - bar.n)
                bar.set_postfix(loss=f"{loss:.3f}")

            model, _, progress = training.train(run, recipe, device, compile, on_step=on_step)
        echo(f"evaluating and writing {out}")
        export.export(model.cpu(), run / training.TOKENIZER, progress, out)
    except (ValueError, OSError) as error:
        fail("train", error)
    except KeyboardInterrupt:
        stopped("train", "The same command continues from the last saved step")


@app.command()
def sweep(
    name: Annotated[str, typer.Argument(help=f"Which sweep: {', '.join(SWEEPS)}.")] = "rtn",
    windows: Annotated[
        int | None,
        typer.Option(min=1, help="Windows of 512 tokens to evaluate on, spread over the text; default 256, fewer where it trains."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A name of labs fetch, a directory or a hub id, with fewer settings; default LABS_MODEL or the course model."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="A name of labs fetch, code, prose, numpy or a directory; default LABS_TEXT or code; numpy where adapters learn.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file; default data/measurements/NAME.json, or MODEL/NAME.json there for a model of labs fetch."),
    ] = None,
    configs: Annotated[
        Path | None,
        typer.Option(help="JSON or YAML file with a list of settings for the shootout, in place of its own; needs --out."),
    ] = None,
    dask: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The scheduler of a Dask cluster whose workers measure, a row each.")
    ] = None,
) -> None:
    """Measure a method at many settings and store the rows. A sweep that was stopped continues where it was."""
    from labsupport.evidence import farm, shootout, sink
    from labsupport.evidence import sweep as sweeps
    from labsupport.evidence.job import Job
    from labsupport.model import fetched, models

    try:
        job = Job.of(name, model, source, windows)
        known = (models.SMALL_COURSE_MODEL, *fetched.MODELS)
        if out is None and job.model not in (None, *known):
            raise ValueError(f"--out is needed for a model that is neither the course model nor one of {', '.join(known)}")
        if configs is not None and (out is None or name != "shootout"):
            raise ValueError("--configs is for the shootout, with --out: rows of your own go into a file of your own")
        settings = None if configs is None else shootout.read_settings(configs)
        path = out or sweeps.path_of(name, job.model)
        opened = job.open() if dask is None else None
        with progress.rows("setting") as (on_row, on_step):
            if opened is None:
                measured = farm.run(job, path, dask, settings, on_row)
            else:
                measured = opened.run(path, settings=settings, on_row=on_row, on_step=on_step)
    except (ValueError, OSError) as error:
        fail("sweep", error)
    except KeyboardInterrupt:
        stopped("sweep", "The same command continues after the last finished row")
    if name == "sink":
        echo(sink.summary(measured.rows))
    echo(f"wrote {path}")


@app.command()
def bench(
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of the weight, out_features; default 4096.")] = None,
    columns: Annotated[int | None, typer.Option(min=128, help="Columns, in_features; groups of 128; default 4096.")] = None,
    budget: Annotated[float, typer.Option(min=0.01, max=3600, help="Seconds for each piece of work.")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU; default PyTorch's own choice.")] = None,
    only: Annotated[str | None, typer.Option(help="quantizers or products; default both.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file; default data/measurements/DEVICE.json, for the usual shapes.")
    ] = None,
) -> None:
    """Time quantizers and 4-bit products on this machine, next to copying memory, 16-bit products and bitsandbytes.

    Products are measured at the shapes of real models, unless rows or columns are given, and kept in a file.
    """
    import torch

    if only not in (None, "quantizers", "products"):
        fail("bench", f"--only is {only!r}, wanted quantizers or products")
    if threads:
        torch.set_num_threads(threads)
    own = (rows or 4096, columns or 4096) if rows or columns else None
    try:
        if only != "products":
            _bench_quantizers(*(own or (4096, 4096)), budget)
        if only != "quantizers":
            _bench_products(own, budget, threads, out)
    except (ValueError, OSError) as error:
        fail("bench", error)
    except KeyboardInterrupt:
        stopped("bench", "Nothing was written")


def _table(*names: str):
    from rich.table import Table

    table = Table(*names, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _bench_quantizers(rows: int, columns: int, budget: float) -> None:
    from rich.console import Console

    from labsupport.evidence import bench as benches
    from labsupport.evidence.machine import describe

    console, table = Console(), _table("work", "ms", "copies", "bitsandbytes", "as fast")
    with console.status("timing"):
        for timing in benches.quantizers(rows, columns, budget):
            peer = ("", "") if timing.theirs is None else (f"{1e3 * timing.theirs:.1f} ms", f"{timing.ratio:.2f} times")
            table.add_row(timing.name, f"{1e3 * timing.seconds:.1f}", f"{timing.passes:.1f}", *peer)
    console.print(str(describe("cpu")))
    console.print(f"A float32 weight, {rows} x {columns}; one copy of it takes {1e3 * timing.copy:.1f} ms.\n")
    console.print(table)


def _bench_products(own: tuple[int, int] | None, budget: float, threads: int | None, out: Path | None) -> None:
    from rich.console import Console

    from labsupport.evidence import bench as benches
    from labsupport.evidence.machine import describe

    console, machine = Console(), describe()
    command = f"labs bench --only products --budget {budget:g}" + (f" --threads {threads}" if threads else "")
    command += f" --rows {own[0]} --columns {own[1]}" if own else ""
    path = out or (None if own else benches.measurements_path(machine))
    if path:
        benches.check_writable(path)
    table = _table("out x in", "batch", "kernel", "ms", "GB/s", "of limit", "as bf16")
    with console.status("timing"):
        about = benches.about(command, machine, budget)
        dense: dict[tuple[int, int, int], float] = {}
        rows = benches.products((own,) if own else benches.SHAPES, budget=budget)
        stop: BaseException | None = None
        try:
            for row in benches.kept(path, about, rows) if path else rows:
                dense.setdefault((row.out_features, row.in_features, row.batch), row.seconds)
                faster = dense[row.out_features, row.in_features, row.batch] / row.seconds
                shape, share = f"{row.out_features} x {row.in_features}", 100 * row.rate / about["bandwidth"]
                numbers = f"{1e3 * row.seconds:.3g}", f"{row.rate / 1e9:.1f}", f"{share:.0f} %", f"{faster:.2f} x"
                table.add_row(shape, str(row.batch), row.kernel, *numbers)
        except (KeyboardInterrupt, RuntimeError) as error:  # RuntimeError: of a kernel that does not run here
            stop = error
    on = machine.name if machine.device == "cuda" else f"{about['threads']} CPU threads"
    console.print(f"\nProducts of bfloat16 on {on}; copying or summing at {about['bandwidth'] / 1e9:.1f} GB/s.\n")
    console.print(table)
    finished = (
        f"{table.row_count} finished rows are in {benches.partial_path(path)}"
        if path and table.row_count
        else "Nothing was written"
    )
    if isinstance(stop, KeyboardInterrupt):
        stopped("bench", finished)
    if stop:
        fail("bench", f"{str(stop).splitlines()[0]}. {finished}")
    if path:
        echo(f"wrote {path}")
