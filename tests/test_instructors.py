"""INSTRUCTORS.md keeps what it says: its commands run, its exercise works, its numbers are those of the course."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shlex
import textwrap
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
import test_exercises
import test_luck
import typer
from interop import graders, graders_class
from typer.testing import CliRunner

from labsupport.cli import app
from labsupport.course import build, workbook
from labsupport.exercises import rounding
from labsupport.exercises.form import Exercise
from labsupport.grading import cells, kinds, marking, prepared, release, sample, sandbox, submission
from labsupport.grading.classroom import Classroom
from labsupport.grading.records import Collected, GradingError, Policy
from labsupport.grading.unsafe import Unsafe

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "INSTRUCTORS.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", GUIDE, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """All lines that are to be typed, in their order."""
    return [line for block in blocks("console") for line in block.splitlines() if line]


def test_the_readme_leads_here():
    assert "](INSTRUCTORS.md)" in README


def test_named_files_and_anchors_exist():
    named = {*re.findall(r"\]\((?!http|#)([^)]+)\)", GUIDE)}
    named |= {p for p in re.findall(r"`([\w./]+)`", GUIDE) if p.startswith(("labsupport/", "notebooks/", "tests/", "data/"))}
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_commands_and_options_exist():
    known = typer.main.get_command(app).commands
    used = re.findall(r"\blabs (\w+)((?: [^`\n|#]*)?)", "\n".join([*commands(), *re.findall(r"`(labs [^`]+)`", GUIDE)]))
    assert len(used) > 8
    for name, rest in used:
        assert name in known, name
        command = known[name]
        if hasattr(command, "commands"):
            command = command.commands[rest.split()[0]]
        for option in re.findall(r"(--[\w-]+)", rest):
            assert any(option in p.opts or option in p.secondary_opts for p in command.params), f"labs {name} {option}"


def weeks(title: str) -> dict[str, int]:
    """Chapters of each row of a schedule, as they stand, and the minutes beside them."""
    table = GUIDE[GUIDE.index(title) :].split("\n\n")[0]
    return {chapters: int(minutes) for chapters, minutes in re.findall(r"^\| \d+ \| ([\d, ]+) \| (\d+) \|", table, re.MULTILINE)}


@pytest.mark.parametrize(("title", "count"), [("| week of 6 |", 6), ("| week of 12 |", 12)])
def test_schedules_have_each_chapter_once_and_its_own_minutes(title: str, count: int):
    minutes = {number: int(m) for number, m in re.findall(r"^\| (\d\d) \| .* \| (\d+) minutes \|$", README, re.MULTILINE)}
    found = weeks(title)
    assert len(found) == count
    assert [number for chapters in found for number in chapters.split(", ")] == sorted(minutes)
    assert len(minutes) == len(build.sources(ROOT))
    for chapters, total in found.items():
        assert total == sum(minutes[number] for number in chapters.split(", ")), chapters


def test_kinds_are_counted():
    for kind, count in Counter(kinds.KIND.values()).items():
        assert re.search(rf"\b{count} {kind}\b", GUIDE), f"{count} {kind}"


def test_defaults_of_limits_and_policy_are_those_of_the_code():
    limits = sandbox.Limits()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+)", GUIDE, re.MULTILINE))
    in_the_guide = {"answer_seconds": limits.answer_seconds, "notebook_seconds": limits.notebook_seconds}
    in_the_guide |= {"memory_bytes": limits.memory_bytes / 2**30, "processes": limits.processes}
    for field in ("late", "last_day", "partial", "understanding"):
        in_the_guide[field] = getattr(Policy(), field)
    assert {name: float(rows[name]) for name in in_the_guide} == in_the_guide
    assert f"{limits.file_bytes >> 20} MiB, {limits.output_bytes >> 20} MiB, {limits.output_files}" in GUIDE


def test_the_comparison_is_the_one_that_was_measured():
    rows = json.loads(graders.FILE.read_text("utf-8"))["rows"]
    assert [row["grader"] for row in rows] == ["nbgrader", "otter-grader", "labs"]
    assert graders.table(rows) in GUIDE


@pytest.mark.slow
def test_the_commands_run_as_they_stand_and_give_the_marks_that_are_said(tmp_path: Path, monkeypatch):
    """Where there is no sandbox, `labs grade` is told to go without: the submissions are the course's own."""
    monkeypatch.chdir(tmp_path)
    try:
        sandbox.find()
        without = []
    except GradingError:
        without = ["--unsafe"]
    typed = [shlex.split(line) for line in commands()]
    assert {line[0] for line in typed} == {"labs"}
    for _, command, *rest in typed:
        done = CliRunner().invoke(app, [command, *rest, *(without if command == "grade" else [])])
        assert done.exit_code == 0, f"labs {command}: {done.output}"
    trial = Classroom.open(tmp_path / "trial")
    found = {result.learner: result.points for result in trial.results(sample.LAB)}
    assert found == {person.learner: person.points for person in sample.PEOPLE}
    first, *others = sample.PEOPLE
    says = [f"{person.name.split()[0]} {person.points}" for person in others]
    assert f"{first.name.split()[0]} has {first.points} of 18 points, {', '.join(says)}." in GUIDE
    for name in re.findall(r"`trial/([\w./]+)`", GUIDE):
        assert (trial.folder / name).is_file(), name
    assert f"after {sample.ANSWER_SECONDS:g} seconds; others give it {sandbox.Limits().answer_seconds:g}" in GUIDE


# The exercise of one's own --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Exercise:
    """The guide's exercise, from its text."""
    path = tmp_path_factory.mktemp("example") / "example.py"
    path.write_text(re.search(r"<!-- example -->\n```python\n(.*?)```", GUIDE, re.DOTALL)[1], "utf-8")
    found = importlib.util.spec_from_file_location("example", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.UNUSED_LEVELS


def test_the_example_keeps_to_what_every_exercise_does(example: Exercise, monkeypatch):
    test_exercises.test_the_reference_passes_and_each_wrong_answer_gets_its_sentence(example, monkeypatch)
    test_exercises.test_has_enough_mutants_and_sane_facts(example)
    test_exercises.test_inputs_depend_on_the_seed_alone_and_survive_the_reference(example)
    test_luck.test_no_changed_reference_passes(example)


def cells_of_the_example() -> dict[str, str]:
    """What the guide puts into the notebook, by the cell's name."""
    answer, check = (textwrap.dedent(block) for block in blocks("python") if "class " not in block and "Exercise(" not in block)
    return {"answer-2-9": answer, "check-2-9": check}


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh")
def test_the_example_is_released_and_marked(example: Exercise, tmp_path: Path, monkeypatch):
    """As if it stood in the chapter's file and notebook: right, with a known mistake, and blank."""
    source = build.read(build.sources(ROOT, ["2"])[0])
    neighbor = {name: next(c for c in source.cells if c.id == f"{name}-2-8") for name in ("answer", "check")}
    for name, text in cells_of_the_example().items():
        added = copy.deepcopy(neighbor[name.split("-")[0]])
        added.id, added.source, added.metadata.nbgrader.grade_id = name, text.rstrip(), name
        if "points" in added.metadata.nbgrader:
            added.metadata.nbgrader.points = example.points
        source.cells.append(added)
    student = build.student_form(source)
    folder = tmp_path / "notebooks"
    workbook.write(student, folder / "02_rounding.ipynb")
    monkeypatch.setattr(workbook, "notebooks_dir", lambda: folder)
    monkeypatch.setattr(rounding, "EXERCISES", (*rounding.EXERCISES, example))

    classroom = Classroom.create(tmp_path / "class")
    released = release.release(classroom, 2, only=["2.9"]).release
    assert released.points == {"2.9": example.points}
    answer = cells_of_the_example()["answer-2-9"]
    texts = {
        "pass": answer,
        "wrong": answer.replace("len(row.unique())", "(int(row.max()) - int(row.min()) + 1)"),
    }
    for outcome, text in texts.items():
        assert text != answer or outcome == "pass"
        next(c for c in student.cells if c.id == "answer-2-9").source = text
        path = classroom.folder / "collected" / "02" / "somebody" / f"{outcome}.ipynb"
        workbook.write(student, path)
        collected = Collected(
            lab=2, learner="somebody", sha256=outcome, file=str(path.relative_to(classroom.folder)), handed_in=datetime.now(UTC)
        )
        mark = marking.mark(classroom, collected, Unsafe()).marks["2.9"]
        assert mark.outcome == outcome, mark.message
        assert mark.points == (example.points if outcome == "pass" else 0)
        if outcome == "wrong":
            assert mark.message.startswith("only levels outside the smallest")


@pytest.fixture
def _fresh():
    """Nothing is remembered of notebooks and exercises, before and after."""
    forget()
    yield
    forget()


def forget() -> None:
    for module in (submission, cells, prepared):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def test_the_class_that_is_compared_is_what_it_says():
    handed_in = graders_class.class_of_20()
    assert len(handed_in) == 20
    assert {one.kind for one in handed_in} == {"right", "blank", "partly", "hostile"}
    assert all(not any(one.expected.values()) for one in handed_in if one.attacks)
    texts = {one.learner: "\n".join(cell.source for cell in one.notebook.cells) for one in handed_in}
    assert len(set(texts.values())) >= 18  # a deleted cell and a copied one leave the text of another's
