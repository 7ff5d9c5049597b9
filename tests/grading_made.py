"""A made class for tests of what comes after marking:

submissions that say themselves what a marker is to find, and one that does.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

from labsupport.grading.classroom import ROSTER, Classroom
from labsupport.grading.records import Collected, Marked, Release, Result

LAB = 5
POINTS = {"5.1": 2.0, "5.2": 4.0, "5.6": 2.0}  # 5.6 asks to find something
DUE = datetime(2027, 3, 1, 12, tzinfo=UTC)
LOG = "marked.log"


def classroom(folder: Path, learners: dict[str, str], **policy) -> Classroom:
    """A class with a released lab. learners: name by id."""
    made = Classroom.create(folder, "Quantization <2027>")
    rows = [f'{id},"{name}",{id}@example.org' for id, name in learners.items()]
    (folder / ROSTER).write_text("\n".join(["learner,name,email", *rows, ""]), "utf-8")
    made.settings.model_copy(update={"policy": made.settings.policy.model_copy(update=policy)}).write(folder / "class.json")
    made.folder_of("release", LAB).mkdir(parents=True)
    Release(lab=LAB, points=POINTS, due=DUE, notebook="05_nf4.ipynb").write(made.folder_of("release", LAB) / "release.json")
    return Classroom.open(folder)


def hand_in(made: Classroom, learner: str, what: dict, when: datetime = DUE) -> Collected:
    """what: see `mark`."""
    content = json.dumps(what | {"learner": learner, "when": when.isoformat()}).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    folder = made.folder_of("collected", LAB) / learner
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{sha256}.ipynb").write_bytes(content)
    one = Collected(
        lab=LAB, learner=learner, sha256=sha256, file=str((folder / f"{sha256}.ipynb").relative_to(made.folder)), handed_in=when
    )
    one.write(folder / f"{sha256}.json")
    return one


def result(one: Collected, **marks: Marked) -> Result:
    """marks: by exercise, "e5_1" for 5.1; the others pass."""
    found = {
        id: marks.get(f"e{id.replace('.', '_')}", Marked(outcome="pass", points=of, of=of, share=1)) for id, of in POINTS.items()
    }
    return Result(lab=one.lab, learner=one.learner, sha256=one.sha256, handed_in=one.handed_in, marks=found, sandbox="none")


def write(made: Classroom, found: Result, one: Collected) -> None:
    made.result_path(one).parent.mkdir(parents=True, exist_ok=True)
    found.write(made.result_path(one))


def mark(made: Classroom, one: Collected, sandbox: object) -> Result:
    """A marker. The submission says what happens: seconds; die: kill the process, the first so many times; error: raise it."""
    what = json.loads(made.notebook_path(one).read_bytes())
    with (made.folder / LOG).open("a") as log:
        log.write(one.sha256 + "\n")
    tried = (made.folder / LOG).read_text().split().count(one.sha256)
    time.sleep(what.get("seconds", 0))
    if tried <= what.get("die", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if "error" in what:
        raise ValueError(what["error"])
    return result(one)


def marked_times(made: Classroom) -> dict[str, int]:
    names = (made.folder / LOG).read_text().split() if (made.folder / LOG).exists() else []
    return {name: names.count(name) for name in names}
