"""What marking a lab needs and all submissions share: secret inputs, the reference's outputs on them, and the benches, as files."""

from __future__ import annotations

import ast
import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from labsupport import __version__
from labsupport.course import workbook
from labsupport.exercises.form import Exercise, Outputs
from labsupport.exercises.judging import outputs
from labsupport.exercises.registry import exercises_of
from labsupport.grading import bench, returned, transport
from labsupport.grading.classroom import Classroom
from labsupport.grading.records import GradingError

SEEDS = 3
FIRST_SECRET = 10_000  # smaller ones are those of `check`, `score` and the tests


@dataclass(frozen=True)
class Asked:
    """An exercise, with its secret inputs and the reference's outputs on each."""

    exercise: Exercise
    given: tuple[dict[str, Any], ...]
    want: tuple[Outputs, ...]

    @property
    def output_bytes(self) -> int:
        return max(map(returned.most_bytes, self.want))


@dataclass(frozen=True)
class Group:
    """Exercises that run in one process of the sandbox, by id, and their bench."""

    asked: dict[str, Asked]
    bench: Path


@dataclass(frozen=True)
class Lab:
    """A lab made ready. setup: the imports of its notebook. folder: is removed with it."""

    groups: tuple[Group, ...]
    inputs: Path
    setup: str
    versions: dict[str, str]
    folder: Any = field(repr=False)


def seeds_of(classroom: Classroom, exercise: Exercise) -> tuple[int, ...]:
    """The secret seeds of an exercise, the same at each marking."""
    found = list[int]()
    lab = exercise.id.split(".")[0]
    for index in range(1 if exercise.needs_model else SEEDS):
        drawn = classroom.secret("seed", lab, exercise.id, str(index))
        found.append(FIRST_SECRET + int.from_bytes(drawn[:4], "big") % (2**31 - FIRST_SECRET))
    return tuple(found)


def lab(classroom: Classroom, number: int, ids: Sequence[str]) -> Lab:
    """What these exercises of a lab need; made once in a process. Raises GradingError for an exercise that the course lacks."""
    known = {exercise.id: exercise for exercise in exercises_of(number)}
    if unknown := [id for id in ids if id not in known]:
        raise GradingError(f"release of lab {number:02d}: the course has no exercise {unknown[0]}, it has {', '.join(known)}")
    return _lab(number, tuple((id, seeds_of(classroom, known[id])) for id in known if id in ids))


@lru_cache(maxsize=8)
def _lab(number: int, wanted: tuple[tuple[str, tuple[int, ...]], ...]) -> Lab:
    known = {exercise.id: exercise for exercise in exercises_of(number)}
    folder = tempfile.TemporaryDirectory(prefix="labs-grading-")
    inputs = Path(folder.name, "inputs")
    inputs.mkdir()
    groups = []
    for place, exercises in enumerate(bench.groups([known[id] for id, _ in wanted])):
        asked = {exercise.id: _asked(exercise, dict(wanted)[exercise.id]) for exercise in exercises}
        for id, one in asked.items():
            for index, given in enumerate(one.given):
                transport.write(given, inputs / f"{id}-{index}")
        bench.build(Path(folder.name, f"bench-{place}"), exercises)
        groups.append(Group(asked, Path(folder.name, f"bench-{place}")))
    for path in Path(folder.name).rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # in the sandbox it is another user who reads
    versions = {"python": platform.python_version(), "torch": torch.__version__, "labsupport": __version__}
    return Lab(tuple(groups), inputs, imports_of(number), versions, folder)


def _asked(exercise: Exercise, seeds: Sequence[int]) -> Asked:
    given = tuple(exercise.inputs(seed) for seed in seeds)
    with torch.no_grad():
        return Asked(exercise, given, tuple(outputs(exercise, exercise.reference, one) for one in given))


def imports_of(number: int) -> str:
    """Every import of a lab's notebook, as an answer may use what they name."""
    found = []
    for cell in workbook.read(workbook.chapter(str(number))).cells:
        if cell.cell_type == "code":
            found += [ast.unparse(node) for node in _statements(cell.source) if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(dict.fromkeys(found))


def _statements(source: str) -> list[ast.stmt]:
    lines = ["pass" if line.startswith(("%", "!")) else line for line in source.splitlines()]
    return ast.parse("\n".join(lines)).body


def task(prepared: Lab, group: Group, ids: Sequence[str], answers: dict[str, str], others: Sequence[str], limits: Any) -> str:
    """What runner.py is told: JSON."""
    about = {
        id: {"name": asked.exercise.name, "returns": asked.exercise.returns, "output_bytes": asked.output_bytes,
             "inputs": len(asked.given)}
        for id, asked in group.asked.items() if id in ids
    }  # fmt: skip
    return json.dumps({
        "exercises": about, "answers": answers, "others": list(others), "setup": prepared.setup,
        "answer_seconds": limits.answer_seconds, "memory_bytes": limits.memory_bytes * 3 // 4,
    })  # fmt: skip
