"""labs class, release, collect, grade, mark, report, feedback: what an instructor types, and what is said."""

from __future__ import annotations

import os
from pathlib import Path

import grading_made
import pytest
from grading_made import LAB, classroom, hand_in, result
from typer.testing import CliRunner

pytest.importorskip("sqlalchemy")

from labsupport.cli import app
from labsupport.grading import farm, sandbox
from labsupport.grading.records import GradingError, Marked

HERE = os.getcwd()


def labs(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The one line that is said."""
    done = labs(*arguments)
    assert done.exit_code == 1, done.output
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"labs {arguments[0]}")
    return lines[0]


def without_a_cluster(marks: dict[str, Marked], stopped: bool = False):
    """In place of farm.grade: writes results for what waits."""

    def grade(made, lab, *options, on_result, on_ready, **more):
        waiting, before = farm.to_mark(made, lab, options[4])
        on_ready("http://127.0.0.1:1/status", 2, len(waiting))
        graded = farm.Graded(before=before, workers=2, stopped=stopped, left=waiting[1:] if stopped else [])
        for one in waiting[:1] if stopped else waiting:
            graded.results.append(result(one, **marks))
            grading_made.write(made, graded.results[-1], one)
            on_result(len(graded.results), len(waiting), graded.results[-1])
        return graded

    return grade


@pytest.fixture
def made(tmp_path: Path):
    made = classroom(tmp_path / "class", {"ada": "Ada", "ben": "", "cleo": ""})
    hand_in(made, "ada", {})
    hand_in(made, "ben", {})
    return made


def test_a_term_in_commands(made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(farm, "grade", without_a_cluster({"e5_2": Marked(outcome="wrong", points=0, of=4, message="[bold]no")}))
    done = labs("grade", "05", "--class", made.folder)
    assert done.exit_code == 0, done.output
    for words in (
        "submissions marked now │ 2",
        "answers: pass          │ 4",
        "answers: wrong         │ 2",
        "sandbox                │ none",
    ):
        assert words in done.stdout
    assert "dashboard: http://127.0.0.1:1/status" in done.stderr
    done = labs("grade", "5", "--class", made.folder)
    assert "marked before          │ 2" in done.stdout

    done = labs("mark", "05", "ada", "5.2", "3.5", "--reason", "the idea is right", "--by", "Grace", "--class", made.folder)
    assert done.exit_code == 0, done.output
    assert "ada has 7.5 of 8 points" in done.stdout
    monkeypatch.chdir(made.folder)
    assert labs("report", "05").exit_code == 0
    assert labs("feedback", "05").exit_code == 0
    assert (made.folder / "reports/05/index.html").exists()
    assert "the idea is right" in (made.folder / "feedback/05/ada.html").read_text("utf-8")
    assert "none handed in" in (made.folder / "reports/05/marks.csv").read_text("utf-8")


def test_a_batch_that_was_stopped_says_what_remains(made, monkeypatch):
    monkeypatch.setattr(farm, "grade", without_a_cluster({}, stopped=True))
    done = labs("grade", "05", "--class", made.folder)
    assert done.exit_code == 130
    assert "labs grade: stopped. 1 submissions remain" in done.stderr
    assert (made.folder / "gradebook.sqlite").exists()


def test_what_could_not_be_marked_is_an_exit_code_of_1(made, monkeypatch):
    monkeypatch.setattr(farm, "grade", without_a_cluster({"e5_1": Marked(outcome="unmarked", points=0, of=2)}))
    done = labs("grade", "05", "--class", made.folder)
    assert done.exit_code == 1
    assert "not fully marked: ada, ben, 2 in all" in done.stderr


def test_ctrl_c_before_the_first_mark(made, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(farm, "_client", interrupted)
    monkeypatch.setattr(sandbox, "find", lambda kind, unsafe: None)
    done = labs("grade", "05", "--class", made.folder)
    assert done.exit_code == 130
    assert "2 submissions remain" in done.stderr


def test_init_release_and_collect(tmp_path: Path):
    folder = tmp_path / "class"
    assert labs("class", "init", folder, "--name", "Trial").exit_code == 0
    (folder / "roster.csv").write_text("learner,name,email\nada,Ada,\n", "utf-8")
    done = labs(
        "release", "02", "--class", folder, "--due", "2027-03-01T12:00+01:00", "--points", "2.1=5", "--only", "2.1", "--only", "2.3"
    )
    assert done.exit_code == 0, done.output
    assert "2 exercises" in done.stdout
    notebook = folder / "release/02/02_rounding.ipynb"
    incoming = tmp_path / "in"
    incoming.mkdir()
    (incoming / "ada.ipynb").write_bytes(notebook.read_bytes())
    done = labs("collect", "02", incoming, "--class", folder)
    assert "1 new, 0 known; 1 of 1 learners" in done.stdout
    assert "0 new, 1 known" in labs("collect", "02", incoming, "--class", folder).stdout


def test_mistakes_of_an_instructor_are_one_line(made, monkeypatch):
    there = ("--class", made.folder)
    elsewhere = ("--class", made.folder / "nowhere")
    for command in (["release", "05"], ["collect", "05", HERE], ["grade", "05"], ["report", "05"], ["feedback", "05"]):
        assert "is not a class's folder" in refused(*command, *elsewhere)
    assert "is a class already" in refused("class", "init", made.folder)
    assert "lab 02 has not been released" in refused("grade", "02", *there)
    assert "99" in refused("grade", "99", *there)
    assert "nothing.zip does not exist" in refused("collect", "05", made.folder / "nothing.zip", *there)
    assert "'zoe' has handed in nothing" in refused("grade", "05", "--again", "zoe", *there)
    assert "'zoe' is not on the roster" in refused("mark", "05", "zoe", "5.1", "1", "--reason", "x", *there)
    assert "--reason is empty" in refused("mark", "05", "ada", "5.1", "1", "--reason", " ", *there)
    assert "from 0 to 2" in refused("mark", "05", "ada", "5.1", "3", "--reason", "x", *there)
    assert "such as 5.2=4" in refused("release", "05", "--points", "5.2", *there)

    def none_works(kind, unsafe):
        raise GradingError("no sandbox works here")

    monkeypatch.setattr(sandbox, "find", none_works)
    assert "no sandbox works here" in refused("grade", "05", *there)
    with farm.only_one(made.folder):
        assert "another `labs grade` is at work" in refused("grade", "05", *there)
    assert farm.to_mark(made, LAB)[1] == 0
