"""Rows of a sweep on a Dask cluster: a task is one setting, and a worker loads the model and the text once.

A worker measures one row at a time, whatever its threads, with as many threads of torch as its process has: Dask's own workers
have one (`dask worker ADDRESS --nworkers 2 --nthreads 1`), and one worker a GPU takes the GPU that it sees. What starts the sweep
loads no model: what the rows are of is what a worker says, and each row comes with it, so that rows of another model, text or
device are noticed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from labsupport.evidence import cluster, sweep
from labsupport.evidence.job import Job
from labsupport.install import get_extra
from labsupport.model import files

WAIT = 30  # seconds for an answer of the scheduler, and for a first worker
CANNOT = "the rows of the sweep {!r} are made one after the other: leave the cluster out"
_prepared: dict[Job, sweep.Prepared] = {}  # in a worker: of the last job
_one = threading.Lock()


def run(
    job: Job, path: Path, address: str, settings: Sequence[sweep.Row] | None = None, on_row: sweep.OnRow = lambda done, total: None
) -> sweep.Measurements:
    """As sweep.run, on the workers of the cluster whose scheduler answers at `address`.

    Raises ValueError for a sweep whose rows build on each other, where Dask is not installed or a worker measures something else
    than the first did, and what a row raises; OSError where no scheduler or worker answers or a worker dies.
    """
    if job.sweep in (*sweep.LEARNING, *sweep.BY_BLOCK):
        raise ValueError(CANNOT.format(job.sweep))
    try:
        from distributed import as_completed
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise ValueError(f"a cluster needs Dask: {get_extra('cluster')}") from error
    files.check_writable(path)
    with cluster.connected(address, WAIT) as client:
        try:
            about, own = client.submit(_describe, job, pure=False).result()

            def measure(missing: list[sweep.Row]) -> Iterator[sweep.Row]:
                tasks = [client.submit(_row, job, setting, pure=False) for setting in missing]
                for task in as_completed(tasks):
                    identity, row = task.result()
                    if other := [key for key in sweep.IDENTITY if identity.get(key) != about.get(key)]:
                        raise ValueError(f"two workers measure with another {', '.join(other)}: a sweep is of one")
                    yield row

            return sweep.collect(path, about, list(own if settings is None else settings), measure, on_row)
        except KilledWorker as error:
            raise OSError(f"a worker died, perhaps for want of memory: {error}") from error


def _describe(job: Job) -> tuple[dict[str, Any], list[sweep.Row]]:
    """In a worker: what the rows are of, and the sweep's settings."""
    with _one:
        prepared = _prepare(job)
        return prepared.about, prepared.settings


def _row(job: Job, setting: sweep.Row) -> tuple[dict[str, Any], sweep.Row]:
    """In a worker: what a row is of, and the row."""
    with _one:
        prepared = _prepare(job)
        return {key: prepared.about.get(key) for key in sweep.IDENTITY}, prepared.row(setting)


def _prepare(job: Job) -> sweep.Prepared:
    if job not in _prepared:
        _prepared.clear()
        _prepared[job] = job.open().prepare()
    return _prepared[job]
