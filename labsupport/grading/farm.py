"""A class's submissions on Dask: workers that live as long as the batch, and one result file for each submission that counts.

Whatever dies, the files that are there are whole, and the same command goes on with those that are not. A worker that dies
takes one submission with it, which is tried again, and after the third time gets a result that says so: no submission can stop
the others.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from logging import CRITICAL
from pathlib import Path
from typing import Any

from labsupport.evidence import cluster
from labsupport.grading import policy, sandbox
from labsupport.grading.classroom import SETTINGS, Classroom
from labsupport.grading.records import Collected, GradingError, Marked, Result
from labsupport.grading.sandbox import Sandbox
from labsupport.install import get_extra
from labsupport.model import files

WAIT = 60  # seconds for an answer of the scheduler, and for a first worker
TRIES = 3  # of one submission, before it is left unmarked
GATEWAY = "gateway:"
LOCK = ".grading.lock"
BUSY = "another `labs grade` is at work in {}: wait until it ends"

Marker = Callable[[Classroom, Collected, Sandbox], Result]
OnResult = Callable[[int, int, Result], None]


@dataclass
class Graded:
    """What a batch did.

    results: of this time. before: submissions that had a final result. left: those that have none. seconds: wall clock. lines: what
    went wrong with single submissions, a sentence each. stopped: whether Ctrl-C ended it.
    """

    results: list[Result] = field(default_factory=list)
    before: int = 0
    left: list[Collected] = field(default_factory=list)
    seconds: float = 0.0
    workers: int = 0
    lines: list[str] = field(default_factory=list)
    stopped: bool = False


def to_mark(classroom: Classroom, lab: int, again: Collection[str] = ()) -> tuple[list[Collected], int]:
    """The submissions that count and have no final result, and how many have one.

    again: learners whose results are made anew.
    """
    release, by_learner = classroom.release(lab), defaultdict[str, list[Collected]](list)
    for one in classroom.collected(lab):
        by_learner[one.learner].append(one)
    if unknown := [learner for learner in again if learner not in by_learner]:
        raise GradingError(f"--again: {unknown[0]!r} has handed in nothing for lab {lab:02d}")
    counting = [one for each in by_learner.values() for one in policy.counting(each, release, classroom.settings.policy)]
    waiting = [one for one in counting if one.learner in again or final_result(classroom, one) is None]
    return waiting, len(counting) - len(waiting)


def final_result(classroom: Classroom, collected: Collected) -> Result | None:
    """None where there is no result, where a try is left, where the file is damaged, and where more exercises count by now."""
    path = classroom.result_path(collected)
    with suppress(GradingError):
        if path.is_file():
            result = Result.read(path)
            return result if result.final and set(classroom.release(collected.lab).points) <= set(result.marks) else None
    return None


def grade(
    classroom: Classroom,
    lab: int,
    sandbox_kind: str = "auto",
    workers: int | None = None,
    dask_address: str = "",
    unsafe: bool = False,
    again: Collection[str] = (),
    on_result: OnResult = lambda done, total, result: None,
    on_ready: Callable[[str, int, int], None] = lambda dashboard, workers, waiting: None,
    marker: Marker | None = None,
) -> Graded:
    """Mark what has to be marked. on_ready: called before the first, with the address of Dask's dashboard, the number of workers
    and of submissions.

    workers: processes on this machine, as many as there are processors without it. dask_address: of a scheduler whose workers
    see the class's folder under the same path, or "gateway:NAME" for a cluster of Dask Gateway. marker: in place of
    `marking.mark`. Ctrl-C ends it; `Graded.left` says what remains. Raises GradingError: no sandbox, no cluster, another grader
    at work.
    """
    began = time.monotonic()
    with only_one(classroom.folder):
        waiting, before = to_mark(classroom, lab, again)
        graded = Graded(before=before, left=list(waiting))
        if not waiting:
            return graded
        for path in classroom.folder_of("results", lab).glob(f"*/.*{files.SUFFIX}"):
            path.unlink(missing_ok=True)  # of a worker that died while it wrote
        if not dask_address:
            sandbox.find(sandbox_kind, unsafe)  # says in one line what is missing, before workers start
        try:
            with _client(dask_address, min(workers or _processors(), len(waiting))) as (client, count):
                graded.workers = count
                if not dask_address:
                    client.register_plugin(_leave_interrupts())
                _check_folder(client, classroom)
                on_ready(client.dashboard_link, count, len(waiting))
                task = _Task(str(classroom.folder), sandbox_kind, unsafe, frozenset(again), marker)
                for collected, outcome in _outcomes(client, task, waiting, count, own=not dask_address):
                    _take(classroom, graded, collected, outcome)
                    on_result(len(waiting) - len(graded.left), len(waiting), graded.results[-1])
        except KeyboardInterrupt:
            graded.stopped = True
        graded.seconds = time.monotonic() - began
        return graded


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Inside, this process is the only grader of the class.

    The lock is the operating system's: it ends with the process, however that ends.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise GradingError(BUSY.format(folder)) from None
    except OSError as error:
        raise GradingError(f"{folder / LOCK} cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


# On the cluster -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Task:
    """What a worker needs besides the submission."""

    folder: str
    sandbox_kind: str
    unsafe: bool
    again: frozenset[str]
    marker: Marker | None

    def __call__(self, collected: Collected) -> Result:
        """In a worker: mark a submission and write its result."""
        classroom = Classroom.open(Path(self.folder))
        there = final_result(classroom, collected)
        if there is not None and collected.learner not in self.again:
            return there  # of a worker that wrote it and then died
        mark = self.marker or _marking()
        result = mark(classroom, collected, _sandbox(self.sandbox_kind, self.unsafe))
        path = classroom.result_path(collected)
        with files.explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        result.write(path)
        return result


def _marking() -> Marker:
    from labsupport.grading.marking import mark  # not before it is needed: it brings torch

    return mark


_sandboxes: dict[tuple[str, bool], Sandbox] = {}  # in a worker


def _sandbox(kind: str, unsafe: bool) -> Sandbox:
    if (kind, unsafe) not in _sandboxes:
        _sandboxes[kind, unsafe] = sandbox.find(kind, unsafe)
    return _sandboxes[kind, unsafe]


def _outcomes(
    client: Any, task: _Task, waiting: Sequence[Collected], count: int, own: bool
) -> Iterator[tuple[Collected, Result | Exception]]:
    """Each submission with its result, or with what went wrong in its last try. Never more tasks at a time than workers.

    So a worker that dies has one submission on it, and no other is blamed. own: whether the cluster is ours, and leaves it to
    us to try again.
    """
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    ahead, tried = list(reversed(waiting)), defaultdict[str, int](int)
    running: dict[Any, Collected] = {}
    done = as_completed()

    def start() -> None:
        if ahead:
            collected = ahead.pop()
            tried[_key(collected)] += 1
            future = client.submit(task, collected, pure=False, retries=0)
            running[future] = collected
            done.add(future)

    for _ in range(count):
        start()
    for future in done:
        collected = running.pop(future)
        if future.status == "finished":
            outcome: Result | Exception = future.result()
        else:
            if future.status != "error":
                raise GradingError("the cluster has gone: the same command goes on with what has no result")
            outcome = future.exception()
        died = isinstance(outcome, KilledWorker)
        if died and own and tried[_key(collected)] < TRIES:
            ahead.append(collected)
        elif died:
            yield collected, OSError(f"the worker that marked it died {tried[_key(collected)]} times, perhaps for want of memory")
        else:
            yield collected, outcome
        start()


def _key(collected: Collected) -> str:
    return f"{collected.learner}/{collected.sha256}"


def _take(classroom: Classroom, graded: Graded, collected: Collected, outcome: Result | Exception) -> None:
    """Into `graded`. A submission that could not be marked gets a result that says why, and is tried again the next time."""
    if isinstance(outcome, Result):
        result = outcome
    else:
        reason = " ".join(str(outcome).split())[:500] or type(outcome).__name__
        result = _unmarked(classroom, collected, reason)
        graded.lines.append(f"{collected.learner}: {reason}")
        path = classroom.result_path(collected)
        try:
            if final_result(classroom, collected) is None:
                with files.explained(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                result.write(path)
        except OSError as error:
            graded.lines.append(f"{collected.learner}: {error}")
    graded.results.append(result)
    graded.left = [one for one in graded.left if one != collected]


def _unmarked(classroom: Classroom, collected: Collected, reason: str) -> Result:
    marks = {
        id: Marked(outcome="unmarked", points=0, of=of, message="it could not be marked yet")
        for id, of in classroom.release(collected.lab).points.items()
    }
    return Result(
        lab=collected.lab,
        learner=collected.learner,
        sha256=collected.sha256,
        handed_in=collected.handed_in,
        marks=marks,
        problems=(reason,),
    )


# Clusters -------------------------------------------------------------------------------------------------------------
@contextmanager
def _client(address: str, workers: int) -> Iterator[tuple[Any, int]]:
    """A client of the cluster at `address`, or of one on this machine that ends with the block; and how many workers it has."""
    try:
        import dask
        from distributed import Client
    except ImportError as error:
        raise GradingError(f"this needs Dask ({error.name} is missing): {get_extra('teach')}") from None
    with ExitStack() as stack:
        if not address:
            # A worker's death comes back to us, who count it for one submission alone.
            settings = {"distributed.scheduler.allowed-failures": 0, "distributed.scheduler.worker-saturation": 1.0}
            stack.enter_context(dask.config.set(settings))
            here = stack.enter_context(_own_cluster(workers))
            yield stack.enter_context(Client(here)), workers
            return
        try:
            if address.startswith(GATEWAY):
                client = stack.enter_context(_of_gateway(address.removeprefix(GATEWAY)))
                cluster.wait_for_worker(client, address, WAIT)
            else:
                client = stack.enter_context(cluster.connected(address, WAIT))
        except OSError as error:
            raise GradingError(str(error)) from None
        yield client, sum(client.nthreads().values())


def _own_cluster(workers: int) -> Any:
    """Worker processes on this machine, one thread each. Raises GradingError where they die as soon as they start."""
    from distributed import LocalCluster

    for _ in range(TRIES):
        try:
            return LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                memory_limit=0,
                silence_logs=CRITICAL,
            )
        except RuntimeError as error:
            died = error
    raise GradingError(f"no worker process could be started, in {TRIES} tries: {died}")


def _of_gateway(name: str) -> Any:
    """A client of a running cluster of Dask Gateway, which is found as its own settings say."""
    try:
        from dask_gateway import Gateway
    except ImportError:
        raise GradingError("a cluster of Dask Gateway needs its client: pip install dask-gateway") from None
    try:
        return Gateway().connect(name).get_client()
    except (OSError, ValueError) as error:
        raise GradingError(f"Dask Gateway has no cluster {name!r} for you: {error}") from None


def _leave_interrupts() -> Any:
    """Ctrl-C goes to all processes of a terminal; a worker leaves it to the grader, which ends its workers."""
    from distributed import WorkerPlugin

    class LeaveInterrupts(WorkerPlugin):
        def setup(self, worker: Any) -> None:
            import signal

            signal.signal(signal.SIGINT, signal.SIG_IGN)

    return LeaveInterrupts()


def _check_folder(client: Any, classroom: Classroom) -> None:
    """Raises GradingError where a worker does not see the class's folder."""
    wanted = _seen(str(classroom.folder))
    for worker, seen in client.run(_seen, str(classroom.folder)).items():
        if seen != wanted:
            raise GradingError(f"the worker {worker} does not see {classroom.folder}: the class must lie where all workers see it")


def _seen(folder: str) -> str:
    path = Path(folder) / SETTINGS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _processors() -> int:
    """That this process may use, which in a container may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
