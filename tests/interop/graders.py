"""One class of 20, marked by nbgrader, by otter-grader and by labs: whose marks are right, at what cost, and which attacks win.

    PYTHONPATH=tests python -m interop.graders --otter OTTER/bin/python --out data/measurements/graders.json

OTTER is an environment of its own: torch in the version of this one, then otter-grader, ipykernel and what pyproject.toml lists for
labsupport. All three judge by the course's own function: nbgrader and otter in the learner's process, as their tests do, on the
public inputs; labs outside it, on inputs of the class.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import nbgrader_course as nbg
import psutil
from interop.graders_class import EXERCISES, LAB, HandedIn, class_of_20

import labsupport
from labsupport.evidence import machine
from labsupport.grading.classroom import Classroom
from labsupport.model import files

GRADERS = ("nbgrader", "otter", "labs")
NAMES = ("nbgrader", "otter-grader", "labs")
NOTE = (
    "marks_right: submissions of which every exercise has the points that it must have; honest_right: of those without an attack. "
    "won_by: attacks that got points. All judge by the course's own function, on the set-up cell and the exercises of lab 02. "
    "nbgrader: one command for the class, started again without whoever ended it, with 120 seconds a cell in place of 30. "
    "otter: `otter run`, a command for each, which is `otter grade` without its container, ended after 300 seconds. labs: one "
    "worker. seconds_each: wall clock of marking, divided by the submissions; cpu_seconds_each: what all processes computed, which "
    "a machine that is shared changes less. load: of the machine in the last minute."
)
NAME = "02_rounding"
FILE = nbg.ROOT / "data" / "measurements" / "graders.json"
GUIDE, BEGIN, END = nbg.ROOT / "INSTRUCTORS.md", "<!-- graders -->", "<!-- /graders -->"
CELL = 120  # seconds that nbgrader gives a cell; its own 30 are not enough for `import torch` where others use the machine
OUTER = 300


@dataclass
class Found:
    """What one grader made of one submission. points: by exercise, None where there is no mark."""

    points: dict[str, float | None]
    said: str = ""
    stopped_batch: bool = False


@dataclass
class Grader:
    """seconds: of marking all, by the wall clock. cpu: that its processes computed meanwhile."""

    name: str
    versions: dict[str, str]
    found: dict[str, Found] = field(default_factory=dict)
    seconds: float = 0.0
    cpu: float = 0.0

    def add(self, seconds: float, cpu: float) -> None:
        self.seconds += seconds
        self.cpu += cpu


def _run(
    command: list[str], folder: Path, environment: Mapping[str, str], limit: float = OUTER
) -> tuple[int | None, str, float, float]:
    """Exit code (None: ended at the limit), what it said, wall seconds, processor seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            start_new_session=True,
        )  # fmt: skip
        seen = _Seen(process.pid)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seen.stop()
        said.seek(0)
        text = said.read()[-(10**6) :]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return code, text, time.monotonic() - began, max(cpu, seen.total())


class _Seen:
    """Processor time of a process and all below it, looked at every tenth of a second.

    What the system adds up for waited children lacks those of a sandbox, whose first process dies before it could wait.
    """

    def __init__(self, pid: int) -> None:
        self.top = psutil.Process(pid)
        self.times: dict[tuple[int, float], tuple[int, float, float]] = {}  # by process: its parent, own and its waited children's
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.ended.wait(0.1):
            with suppress(psutil.Error):
                for process in [self.top, *self.top.children(recursive=True)]:
                    with suppress(psutil.Error):
                        spent = process.cpu_times()
                        children = spent.children_user + spent.children_system
                        key = (process.pid, process.create_time())
                        self.times[key] = (process.ppid(), spent.user + spent.system, children)

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()

    def total(self) -> float:
        """Own time of all that were seen, and of children that were too short to be seen."""
        known: dict[int, float] = {}
        for parent, own, children in self.times.values():
            known[parent] = known.get(parent, 0.0) + own + children
        unseen = (max(0.0, children - known.get(pid, 0.0)) for (pid, _), (_, _, children) in self.times.items())
        return sum(own for _, own, _ in self.times.values()) + sum(unseen)


def _environment(python: Path) -> dict[str, str]:
    return {
        "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]]),
        "PYTHONPATH": str(nbg.ROOT),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "OMP_NUM_THREADS": "1",
    }


def _last(text: str) -> str:
    """The last line that names an error."""
    lines = [line.strip() for line in text.splitlines() if "Error" in line or "ERROR" in line]
    return lines[-1][:200] if lines else ""


# nbgrader -------------------------------------------------------------------------------------------------------------
def prepare_nbgrader(root: Path, handed_in: list[HandedIn]) -> None:
    nbg.lay_out(root, NAME, nbg.exercises_only(LAB), {one.learner: copy.deepcopy(one.notebook) for one in handed_in})
    nbg.succeeded(nbg.nbgrader(root, "generate_assignment", nbg.LAB))


def by_nbgrader(root: Path, handed_in: list[HandedIn], grader: Grader) -> None:
    """One command for all. One submission can end it: it is then left out, and the command is started again for the others."""
    left_out: dict[str, bool] = {}  # those without a mark, and whether they ended the command
    while True:
        command = [
            sys.executable,
            "-m",
            "nbgrader",
            "autograde",
            nbg.LAB,
            f"--Execute.timeout={CELL}",
            "--Execute.iopub_timeout=120",
        ]
        command += [f"--CourseDirectory.student_id_exclude={','.join(left_out)}"] if left_out else []
        code, text, seconds, cpu = _run(command, root, _environment(Path(sys.executable)), OUTER * len(handed_in))
        grader.add(seconds, cpu)
        left_out |= dict.fromkeys(re.findall(r"error processing assignment: \S+/submitted/([\w-]+)/", text), False)
        reached = re.findall(r"student with ID '([\w-]+)'", text)
        if code == 0 or f"error processing assignment '{nbg.LAB}' for" in text or not reached or reached[-1] in left_out:
            break  # it came to its end; those that failed are listed there
        left_out[reached[-1]] = True
        print(f"nbgrader: {reached[-1]} ended the command: {_last(text)}", flush=True)
    for one in handed_in:
        marked = (root / "autograded" / one.learner / nbg.LAB / f"{NAME}.ipynb").is_file() and one.learner not in left_out
        points = dict.fromkeys(EXERCISES) | (_nbgrader_points(root, one.learner) if marked else {})
        grader.found[one.learner] = Found(points, stopped_batch=left_out.get(one.learner, False))


def _nbgrader_points(root: Path, learner: str) -> dict[str, float | None]:
    """The score that would be exported: a manual one counts before an automatic one; a cell that is not there earns 0."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{root / 'gradebook.db'}") as book:
        (notebook,) = book.find_submission(nbg.LAB, learner).notebooks
        return {grade.name.removeprefix("check-").replace("-", "."): float(grade.score) for grade in notebook.grades}


# otter-grader ---------------------------------------------------------------------------------------------------------
TEST = """\
from otter.test_files import test_case

OK_FORMAT = False
name = "{question}"
points = {points}


@test_case(points={points}, hidden=True)
def test_answer({name}):
    from labsupport.exercises import registry, session

    verdict, *_ = session._judged(registry.get("{id}"), {name}, session.SCORE_SEEDS)
    assert verdict.passed, verdict.message
"""


def _question(id: str) -> str:
    return f"q{id.replace('.', '_')}"


def prepare_otter(root: Path, handed_in: list[HandedIn], python: Path) -> None:
    """Test files of otter, its zip, and the same notebooks with its `grader.check` in the place of ours."""
    (root / "tests").mkdir(parents=True, exist_ok=True)
    for id, exercise in EXERCISES.items():
        text = TEST.format(question=_question(id), points=exercise.points, name=exercise.name, id=id)
        (root / "tests" / f"{_question(id)}.py").write_text(text)
    otter = str(python.with_name("otter"))
    code, text, *_ = _run([otter, "generate", "-t", "tests", "-o", "autograder.zip"], root, _environment(python))
    if code != 0:
        raise SystemExit(f"otter generate: {text}")
    for one in handed_in:
        notebook = copy.deepcopy(one.notebook)
        for each in notebook.cells:
            about = each.metadata.pop("nbgrader", {}).get("grade_id", "")
            if about.startswith("check-"):
                each.source = f'grader.check("{_question(about.removeprefix("check-").replace("-", "."))}")'
        notebook.cells.insert(0, nbformat.v4.new_code_cell("import otter\ngrader = otter.Notebook()"))
        nbformat.write(notebook, root / f"{one.learner}.ipynb")


def by_otter(root: Path, handed_in: list[HandedIn], python: Path, grader: Grader) -> None:
    for one in handed_in:
        out = root / "results" / one.learner
        out.mkdir(parents=True, exist_ok=True)
        command = [
            str(python.with_name("otter")),
            "run",
            f"{one.learner}.ipynb",
            "-a",
            "autograder.zip",
            "-o",
            str(out),
            "--no-logo",
        ]
        code, text, seconds, cpu = _run(command, root, _environment(python))
        grader.add(seconds, cpu)
        points: dict[str, float | None] = dict.fromkeys(EXERCISES)
        if code == 0:
            scores = {test["name"]: test.get("score") for test in json.loads((out / "results.json").read_text())["tests"]}
            points = {id: scores.get(_question(id)) for id in EXERCISES}
        said = f"did not end in {OUTER} s: otter run has no limit of its own" if code is None else "" if code == 0 else _last(text)
        grader.found[one.learner] = Found(points, said)
        print(f"otter: {one.learner} {sum(points or 0 for points in points.values()):g} {said}", flush=True)


# labs -----------------------------------------------------------------------------------------------------------------
def by_labs(root: Path, handed_in: list[HandedIn], grader: Grader) -> None:
    """By its own commands: a class, its roster, the lab handed out, what comes back, one worker."""
    inbox = root / "inbox"
    inbox.mkdir(parents=True)
    for one in handed_in:
        nbformat.write(one.notebook, inbox / f"{one.learner}.ipynb")
    _labs(root, "class", "init", "class")
    (root / "class" / "roster.csv").write_text("learner\n" + "".join(f"{one.learner}\n" for one in handed_in))
    _labs(root, "release", f"{LAB:02d}", "--class", "class")
    _labs(root, "collect", f"{LAB:02d}", str(inbox), "--class", "class")
    grader.add(*_labs(root, "grade", f"{LAB:02d}", "--class", "class", "--workers", "1"))
    results = {result.learner: result for result in Classroom.open(root / "class").results(LAB)}
    for one in handed_in:
        points: dict[str, float | None] = dict.fromkeys(EXERCISES)
        if result := results.get(one.learner):
            points |= {id: mark.points for id, mark in result.marks.items() if mark.outcome != "unmarked"}
            grader.versions["sandbox"] = result.sandbox
        grader.found[one.learner] = Found(points)


def _labs(root: Path, *arguments: str) -> tuple[float, float]:
    command = [sys.executable, "-m", "labsupport.cli", *arguments]
    code, text, seconds, cpu = _run(command, root, _environment(Path(sys.executable)), OUTER * 20)
    if code != 0:
        raise SystemExit(f"labs {' '.join(arguments)}: {text}")
    return seconds, cpu


# All of it ------------------------------------------------------------------------------------------------------------
def won(one: HandedIn, found: Found) -> list[str]:
    """The attacks of a submission that got points."""
    earned = {id for id, points in found.points.items() if points}
    return [title for where, title in one.attacks.items() if (earned if where == "*" else where in earned)]


def right(one: HandedIn, found: Found) -> bool:
    return {id: points or 0.0 for id, points in found.points.items()} == one.expected


def row(grader: Grader, handed_in: list[HandedIn]) -> dict[str, Any]:
    found = grader.found
    attacks = [title for one in handed_in for title in won(one, found[one.learner])]
    tried = sum(len(one.attacks) for one in handed_in)
    honest = [one for one in handed_in if not one.attacks]
    return {
        "grader": grader.name,
        "versions": grader.versions,
        "submissions": len(handed_in),
        "marks_right": sum(right(one, found[one.learner]) for one in handed_in),
        "honest": len(honest),
        "honest_right": sum(right(one, found[one.learner]) for one in honest),
        "wrong_marks": [one.learner for one in handed_in if not right(one, found[one.learner])],
        "without_a_mark": [one.learner for one in handed_in if None in found[one.learner].points.values()],
        "stopped_the_batch": [one.learner for one in handed_in if found[one.learner].stopped_batch],
        "seconds_each": grader.seconds / len(handed_in),
        "cpu_seconds_each": grader.cpu / len(handed_in),
        "attacks": tried,
        "attacks_won": len(attacks),
        "won_by": attacks,
        "said": {learner: each.said for learner, each in found.items() if each.said},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows side by side, as INSTRUCTORS.md has them."""
    lines = {
        "submissions with the right mark": lambda row: f"{row['marks_right']} of {row['submissions']}",
        "of those without an attack": lambda row: f"{row['honest_right']} of {row['honest']}",
        "without any mark": lambda row: str(len(row["without_a_mark"])),
        "attacks that got points": lambda row: f"{row['attacks_won']} of {row['attacks']}",
        "seconds a submission": lambda row: f"{row['seconds_each']:.1f}",
        "of these, processor": lambda row: f"{row['cpu_seconds_each']:.1f}",
    }
    names = [f"{row['grader']} {row['versions'].get(row['grader'], '')}".strip() for row in rows]
    head = ["", *names]
    body = [[what, *(said(row) for row in rows)] for what, said in lines.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])


def write_table(rows: list[dict[str, Any]]) -> None:
    """Into the guide, between its marks."""
    text = GUIDE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    GUIDE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}", "utf-8")


def measured(name: str, handed_in: list[HandedIn], root: Path, otter: Path) -> dict[str, Any]:
    """One grader on the whole class, in an empty folder."""
    here = dict(machine.describe("cpu").versions)
    if name == "nbgrader":
        grader = Grader(name, here | {"nbgrader": metadata.version("nbgrader")})
        prepare_nbgrader(root, handed_in)
        by_nbgrader(root, handed_in, grader)
    elif name == "otter":
        grader = Grader("otter-grader", _versions(otter))
        prepare_otter(root, handed_in, otter)
        by_otter(root, handed_in, otter, grader)
    else:
        grader = Grader(name, here | {"labsupport": labsupport.__version__})
        by_labs(root, handed_in, grader)
    return row(grader, handed_in)


def _versions(python: Path) -> dict[str, str]:
    code = """if True:
        import json, platform
        from importlib import metadata
        found = {name: metadata.version(name) for name in ("otter-grader", "nbconvert", "torch")}
        print(json.dumps({"Python": platform.python_version()} | found))"""
    return json.loads(subprocess.check_output([str(python), "-c", code], text=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--otter", type=Path, required=True, help="Python of an environment with otter-grader")
    parser.add_argument("--out", type=Path, default=Path("data/measurements/graders.json"))
    parser.add_argument("--only", nargs="+", choices=GRADERS, default=GRADERS, help="Measure these again; other rows stay")
    given = parser.parse_args()
    handed_in = class_of_20()
    about = {"note": NOTE, "command": "PYTHONPATH=tests python -m interop.graders --otter OTTER/bin/python"}
    rows = {each["grader"]: each for each in json.loads(given.out.read_text())["rows"]} if given.out.is_file() else {}
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            fresh = measured(name, handed_in, Path(folder), given.otter.absolute())
        about_here = machine.describe("cpu")
        fresh |= {
            "date": f"{datetime.date.today()}", "device": "cpu", "machine": about_here.name, "cores": about_here.cores,
            "load": os.getloadavg()[0],
        }  # fmt: skip
        rows[fresh["grader"]] = fresh
        rows = {name: rows[name] for name in NAMES if name in rows}
        files.write_text(given.out, json.dumps({"about": about, "rows": list(rows.values())}, indent=1) + "\n")
        shown = ("marks_right", "submissions", "attacks_won", "attacks", "seconds_each", "cpu_seconds_each", "wrong_marks")
        write_table(list(rows.values())) if given.out.resolve() == FILE else None
        print(f"{name}: " + ", ".join(f"{key} {fresh[key]}" for key in shown), flush=True)


if __name__ == "__main__":
    main()
