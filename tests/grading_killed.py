"""kill -9 of a grader, or of one of its workers, at random moments: afterwards every mark is there, none twice, none lost.

    python tests/grading_killed.py --kills 20

Each round has a class of its own and a marker that takes a fixed time. The grader is started, a process of it is killed, and
the same command is run again, once. In three rounds of four this is while submissions are being marked, in the fourth while
processes start. Prints a line a round, and exits with 1 where a mark is missing, wrong or doubled.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import grading_made  # noqa: E402
import psutil  # noqa: E402

LEARNERS, SECONDS, WORKERS = 12, 0.5, 2


def grade(folder: Path) -> int:
    """What the grader's process does."""
    from labsupport.grading import farm, gradebook
    from labsupport.grading.classroom import Classroom

    classroom = Classroom.open(folder)
    graded = farm.grade(classroom, grading_made.LAB, workers=WORKERS, unsafe=True, marker=grading_made.mark)
    gradebook.rebuild(classroom)
    return int(bool(graded.left or graded.lines))


def start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    return subprocess.Popen([sys.executable, __file__, "--grade", str(folder)], env=environment, start_new_session=True)


def make(folder: Path) -> None:
    made = grading_made.classroom(folder, {f"l{number}": "" for number in range(LEARNERS)})
    for learner in made.roster:
        grading_made.hand_in(made, learner, {"seconds": SECONDS})


def lost_or_doubled(folder: Path) -> list[str]:
    """What is wrong with the marks of a class, a sentence each."""
    from labsupport.grading import farm
    from labsupport.grading.classroom import Classroom

    classroom = Classroom.open(folder)
    wrong = []
    for one in classroom.collected(grading_made.LAB):
        result = farm.final_result(classroom, one)
        if result != grading_made.result(one):
            wrong.append(f"{one.learner} has no right result")
        if len(list(classroom.result_path(one).parent.iterdir())) != 1:
            wrong.append(f"{one.learner} has more than one file")
    book = sqlite3.connect(folder / "gradebook.sqlite")
    rows = book.execute("select learner, count(*), sum(points) from marks group by learner").fetchall()
    book.close()
    wanted = {(f"l{number}", len(grading_made.POINTS), sum(grading_made.POINTS.values())) for number in range(LEARNERS)}
    if len(rows) != LEARNERS or set(rows) != wanted:
        wrong.append(f"the book has {len(rows)} learners, or other marks")
    return wrong


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Dask's workers: their command line has the function that multiprocessing starts them by."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def round_of(folder: Path, who: str, moment: float, starting: bool = False) -> str:
    """Kill the grader, or a worker, `moment` seconds after the first submission came to a marker, or after the start.

    Without a worker, as soon as there is one. What was hit, in words.
    """
    make(folder)
    process = start(folder)
    try:
        while not starting and process.poll() is None and not (folder / grading_made.LOG).exists():
            time.sleep(0.02)
        time.sleep(moment)
        if who == "worker":
            while process.poll() is None and not workers_of(process):
                time.sleep(0.02)
        targets = workers_of(process) if who == "worker" else [process]
        done = len(list(folder.glob("results/*/*/[!.]*.json")))
        hit = process.poll() is None and bool(targets)
        if hit:
            os.kill(random.choice(targets).pid, signal.SIGKILL)
        if process.poll() is None and who == "worker":
            process.wait(120)
    finally:
        process.kill()
        process.wait()
    if again := start(folder).wait(120):
        raise SystemExit(f"the second run ended with {again}")
    return f"{who} killed with {done} of {LEARNERS} marked" if hit else f"{who} had ended"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grade", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.grade:
        return grade(given.grade)
    random.seed(given.seed)
    with tempfile.TemporaryDirectory() as temporary:
        bad = 0
        for number in range(given.kills):
            folder, starting = Path(temporary, str(number)), number % 4 == 3 - number // 4 % 2
            moment = random.uniform(0, LEARNERS * SECONDS / WORKERS)
            said = round_of(folder, ("grader", "worker")[number % 2], moment, starting)
            wrong = lost_or_doubled(folder)
            bad += bool(wrong)
            print(
                f"{number + 1}: {moment:.2f} s after the {'start' if starting else 'first submission'}, {said}: "
                f"{'; '.join(wrong) or 'all marks there, once'}",
                flush=True,
            )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
