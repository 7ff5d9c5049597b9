"""A lab handed out: the class's points in a notebook that works as before, and numbers of each learner's own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat import NotebookNode

from labsupport.course import workbook
from labsupport.exercises import session
from labsupport.exercises.own import can_be_asked, expected, own_number, reduce
from labsupport.exercises.registry import exercises_of, get
from labsupport.grading import own, submission
from labsupport.grading.classroom import Classroom
from labsupport.grading.items import PREDICTION, QUESTIONS
from labsupport.grading.records import GradingError, Release, Submission
from labsupport.grading.release import release
from labsupport.model import files, quick

ROSTER = "learner,name,email\n" + "".join(f"u{number},,\n" for number in range(8))
PLAIN = {"5.1": 3.0, "5.2": 3.0, "5.3": 4.0, "5.4": 3.0, "5.5": 4.0, "5.6": 3.0, "5.7": 3.0}


@pytest.fixture
def classroom(tmp_path: Path) -> Classroom:
    Classroom.create(tmp_path / "class")
    return with_roster(tmp_path / "class", ROSTER)


def with_roster(folder: Path, roster: str) -> Classroom:
    (folder / "roster.csv").write_text(roster)
    return Classroom.open(folder)


def points_of(notebook: NotebookNode) -> dict[str, float]:
    marked = [cell.metadata.nbgrader for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade")]
    return {about.grade_id.removeprefix("check-").replace("-", "."): about.points for about in marked}


def headings(notebook: NotebookNode) -> dict[str, str]:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return dict(re.findall(r"^### Exercise ([\d.]+):.*, (.*)\)$", text, re.MULTILINE))


def test_a_plain_release(classroom: Classroom) -> None:
    done = release(classroom, 5)
    assert done.lines == []
    assert done.notebooks == [classroom.folder / "release/05/05_nf4.ipynb"]
    assert done.release == classroom.release(5)
    assert done.release.points == PLAIN
    assert done.release.due is None
    notebook = nbformat.read(done.notebooks[0], 4)
    nbformat.validate(notebook)
    assert points_of(notebook) == PLAIN
    assert headings(notebook) == {id: f"{value:g} points" for id, value in PLAIN.items()}
    given = workbook.learner_copy(workbook.read(workbook.chapter("05")))
    assert [cell.id for cell in notebook.cells] == [cell.id for cell in given.cells]
    assert [cell.source for cell in notebook.cells if cell.cell_type == "code"] == [
        cell.source for cell in given.cells if cell.cell_type == "code"
    ]
    after = [cell for cell in notebook.cells if cell.cell_type == "code"][2:]
    assert all(cell.outputs == [] for cell in after)


def test_the_class_s_own_choice_and_points(classroom: Classroom) -> None:
    done = release(classroom, 5, only=["5.3", "5.1"], points={"5.1": 1, "5.3": 2.5})
    assert done.release.points == {"5.1": 1.0, "5.3": 2.5}
    notebook = nbformat.read(done.notebooks[0], 4)
    assert points_of(notebook) == {id: {"5.1": 1, "5.3": 2.5}.get(id, 0) for id in PLAIN}
    assert headings(notebook) == {id: {"5.1": "1 point", "5.3": "2.5 points"}.get(id, "ungraded practice") for id in PLAIN}
    found = submission.read(done.notebooks[0], 5, done.release)
    assert list(found.answers) == list(PLAIN)
    assert found.remarks == ()
    assert found.others == ()


def test_nbgrader_takes_the_metadata(classroom: Classroom) -> None:
    from nbgrader.preprocessors import CheckCellMetadata

    done = release(classroom, 5, only=["5.1"], points={"5.1": 0.5}, own_numbers=True)
    for path in done.notebooks[:2]:
        CheckCellMetadata().preprocess(nbformat.read(path, 4), {})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"only": ["5.9"]}, "--only: lab 05 has no exercise '5.9', it has 5.1, 5.2,"),
        ({"points": {"2.1": 3}}, "--points: lab 05 has no exercise '2.1'"),
        ({"points": {"5.1": -1}}, "--points: 5.1 is to have -1 points, wanted a number from 0 to 1000"),
        ({"points": {"5.1": float("nan")}}, "--points: 5.1 is to have nan points"),
        ({"only": ["5.2"], "points": {"5.1": 1}}, "--points: 5.1 is not among the exercises of --only"),
        ({"due": "soon"}, "--due is 'soon', wanted a date such as 2027-03-01T23:59"),
        ({"due": "0001-01-01"}, "--due is 0001-01-01, wanted a year of this century"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_written(classroom: Classroom, options: dict, says: str) -> None:
    with pytest.raises(GradingError) as refused:
        release(classroom, 5, **options)
    assert says in str(refused.value)
    assert list((classroom.folder / "release").iterdir()) == []


def test_a_lab_that_is_not_there(classroom: Classroom) -> None:
    with pytest.raises(GradingError, match="there is no chapter '42'"):
        release(classroom, 42)


def test_due_dates_have_a_zone(classroom: Classroom) -> None:
    done = release(classroom, 5, due="2999-03-01T12:00+02:00")
    assert done.release.due == datetime(2999, 3, 1, 10, tzinfo=UTC)
    assert done.lines == []
    moved = release(classroom, 5, due="2999-04-01")
    assert moved.release.due is not None
    assert moved.release.due.isoformat().startswith("2999-04-01T23:59:59")
    assert moved.release.due.tzinfo is not None
    assert any("the time zone is this machine's" in line for line in moved.lines)
    assert any("is in the past" in line for line in release(classroom, 5, due="2001-01-01T00:00+00:00").lines)
    assert release(classroom, 5).release.due == datetime(2001, 1, 1, tzinfo=UTC)


def test_a_second_release_keeps_what_was_handed_out(classroom: Classroom) -> None:
    first = release(classroom, 5)
    path = first.notebooks[0]
    path.write_text("mine")
    second = release(classroom, 5)
    assert path.read_text() == "mine"
    assert "its notebooks stay as they are" in second.lines[0]
    assert second.release == first.release
    for options in ({"only": ["5.1"]}, {"points": {"5.1": 9}}, {"own_numbers": True}):
        with pytest.raises(GradingError, match=r"has been released with.*: --again"):
            release(classroom, 5, **options)  # type: ignore[arg-type]
    third = release(classroom, 5, points={"5.1": 9}, again=True)
    assert third.release.points["5.1"] == 9
    assert third.release.released == first.release.released
    assert points_of(nbformat.read(path, 4))["5.1"] == 9


def test_a_full_disk_leaves_nothing_half(classroom: Classroom, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(notebook: NotebookNode, path: Path) -> None:
        path.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nbformat, "write", full)
    with pytest.raises(files.WriteError, match="the disk is full"):
        release(classroom, 5)
    assert [path for path in classroom.folder.rglob("*") if "05_nf4" in path.name or path.name == "release.json"] == []


# Numbers of one's own -------------------------------------------------------------------------------------------------
def own_lines(notebook: NotebookNode) -> dict[str, str]:
    """Last line of each cell of own numbers, by cell id."""
    return {cell.id: cell.source.splitlines()[-1] for cell in notebook.cells if "own" in cell.metadata.get("tags", [])}


def filled(path: Path, numbers: dict[str, float], lab: int = 5) -> Submission:
    text = path.read_text("utf-8")
    for id, number in numbers.items():
        name = f"own_predicted_{lab}" if id == PREDICTION else f"own_{id.replace('.', '_')}"
        assert text.count(f"{name} = None") == 1
        text = text.replace(f"{name} = None", f"{name} = {number:.10g}")
    return submission.read_bytes(text.encode(), path.name, lab)


def test_each_learner_has_a_copy_and_numbers_of_their_own(classroom: Classroom) -> None:
    done = release(classroom, 5, own_numbers=True)
    assert done.lines == ["5.6: no numbers of one's own, many answers are right"]
    assert done.notebooks == [classroom.folder / f"release/05/u{number}/05_nf4.ipynb" for number in range(8)]
    drawn = own.load(classroom, 5).items
    asked = ["5.1", "5.2", "5.3", "5.4", "5.5", "5.7", PREDICTION]
    texts = set()
    for path in done.notebooks:
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
        wanted = [*(f"own-{id.replace('.', '-')}" for id in asked[:-1]), "own-predicted-5", "own-question-5"]
        assert sorted(own_lines(notebook)) == sorted(wanted)
        ids = [cell.id for cell in notebook.cells]
        assert ids.index("own-5-3") == ids.index("check-5-3") + 1
        assert ids.index("own-predicted-5") == ids.index("predict") + 2
        for id in asked[:-1]:
            source = notebook.cells[ids.index(f"own-{id.replace('.', '-')}")].source
            assert f'own_number("{id}", {", ".join(map(str, drawn[path.parent.name][id].constants))})' in source
            texts.add(source)
        found = submission.read(path, 5, done.release)
        assert found.own == dict.fromkeys(asked)
        assert found.others == found.remarks == ()
    assert len(texts) == 8 * 6
    for id in asked:
        numbers = sorted((mine[id].number, mine[id].apart) for mine in drawn.values())
        assert all(b - a > near_a + near_b for (a, near_a), (b, near_b) in itertools.pairwise(numbers))


def test_own_numbers_are_judged(classroom: Classroom) -> None:
    done = release(classroom, 5, own_numbers=True)
    drawn = own.load(classroom, 5).items
    right = {id: item.number for id, item in drawn["u3"].items()}
    path = done.notebooks[3]
    judged = own.judge(classroom, done.release, "u3", filled(path, right))
    assert judged == dict.fromkeys(right, "right")
    other = right | {"5.2": drawn["u5"]["5.2"].number, "5.4": drawn["u0"]["5.4"].number, "5.3": right["5.3"] + 1}
    del other["5.1"]
    judged = own.judge(classroom, done.release, "u3", filled(path, other))
    assert judged == dict.fromkeys(right, "right") | {"5.2": "as u5", "5.4": "as u0", "5.3": "wrong", "5.1": "blank"}
    assert own.judge(classroom, done.release, "new", filled(path, right)) == {}


def test_written_with_six_digits_a_number_is_right_and_with_three_it_is_not(classroom: Classroom) -> None:
    done = release(classroom, 5, own_numbers=True)
    number = own.load(classroom, 5).items["u1"]["5.7"].number
    item = own.load(classroom, 5).items["u1"]["5.7"]
    judge = lambda value: own.judge(classroom, done.release, "u1", filled(done.notebooks[1], {"5.7": value}))["5.7"]  # noqa: E731
    assert judge(float(f"{number:.6g}")) == "right"
    assert judge(number + 0.9 * item.within) == "right"
    assert judge(number + 2 * item.within) != "right"


def test_a_prediction_of_one_s_own_is_right_within_five_percent_and_a_round_guess_is_nobody_s(classroom: Classroom) -> None:
    done = release(classroom, 5, own_numbers=True)
    drawn = own.load(classroom, 5).items
    number = drawn["u1"][PREDICTION].number
    judge = lambda value: own.judge(classroom, done.release, "u1", filled(done.notebooks[1], {PREDICTION: value}))[PREDICTION]  # noqa: E731
    assert judge(1.04 * number) == "right"
    assert judge(float(f"{2 * number:.2g}")) == "wrong"
    far = [name for name, mine in drawn.items() if abs(mine[PREDICTION].number / number - 1) > 0.06]
    assert far
    for name in far:
        theirs = drawn[name][PREDICTION].number
        assert judge(theirs) == ("wrong" if theirs == float(f"{theirs:.3g}") else f"as {name}")


def test_a_round_guess_that_somebody_else_has_as_a_number_is_only_wrong(classroom: Classroom) -> None:
    """Lab 15 asks for a whole number of users."""
    drawn, _ = own.draw(classroom, 15, [], own.Drawn())
    own.path_of(classroom, 15).parent.mkdir(parents=True)
    drawn.write(own.path_of(classroom, 15))
    shared = Release(lab=15, points={}, notebook="15_choose_and_ship.ipynb", own_numbers=True)
    said = [
        own.judge(classroom, shared, name, Submission(answers={}, own={PREDICTION: theirs[PREDICTION].number}))[PREDICTION]
        for name, mine in drawn.items.items()
        for theirs in drawn.items.values()
        if abs(theirs[PREDICTION].number / mine[PREDICTION].number - 1) > 0.06 and theirs[PREDICTION].number < 1000
    ]
    assert len(said) > 10
    assert set(said) == {"wrong"}


def test_a_learner_s_constants_are_nobody_else_s_even_where_the_roster_changes(classroom: Classroom) -> None:
    alone = []
    for name in ("u0", "u1"):
        only = with_roster(classroom.folder, f"learner\n{name}\n")
        drawn, _ = own.draw(only, 5, ["5.3"], own.Drawn())
        alone += [drawn.items[name]["5.3"].constants, drawn.items[name][PREDICTION].constants]
    assert len(set(alone)) == 4


@pytest.mark.parametrize("id", ["4.2", "5.7", "6.1", "9.5"])
def test_an_answer_at_the_end_of_what_is_allowed_is_right(id: str) -> None:
    from labsupport.exercises.judging import outputs

    exercise, constants = get(id), (12345678,)
    given = exercise.inputs(constants[0])
    want = outputs(exercise, exercise.reference, given)
    limits = exercise.allowed(given, want)
    edge = {name: value + 0.9 * (limits[name] if isinstance(limits, dict) else limits) for name, value in want.items()}
    number, within = expected(exercise, constants)
    flat = torch.zeros(0)  # no entry of these may be anything
    assert 0 < abs(reduce(exercise, edge, flat) - number) <= within < 1e-3 * max(1, abs(number))


def test_constants_come_from_the_secret(classroom: Classroom, tmp_path: Path) -> None:
    release(classroom, 5, own_numbers=True)
    first = own.load(classroom, 5)
    release(classroom, 5, own_numbers=True, again=True)
    assert own.load(classroom, 5) == first
    Classroom.create(tmp_path / "other")
    other = with_roster(tmp_path / "other", ROSTER)
    release(other, 5, own_numbers=True)
    second = own.load(other, 5)
    assert all(second.items[name]["5.3"].constants != mine["5.3"].constants for name, mine in first.items.items())


def test_a_learner_who_comes_later_gets_a_copy_and_nothing_else_changes(classroom: Classroom) -> None:
    done = release(classroom, 5, own_numbers=True)
    before, texts = own.load(classroom, 5).items, [path.read_bytes() for path in done.notebooks]
    later = with_roster(classroom.folder, ROSTER + "late,,\n")
    again = release(later, 5)
    assert "late is new and has a copy now" in again.lines
    after = own.load(later, 5).items
    assert {name: mine for name, mine in after.items() if name != "late"} == before
    assert [path.read_bytes() for path in done.notebooks] == texts
    assert submission.read(classroom.folder / "release/05/late/05_nf4.ipynb", 5).own == dict.fromkeys(after["late"])


def test_an_exercise_with_few_numbers_gets_more_inputs(tmp_path: Path) -> None:
    Classroom.create(tmp_path / "class")
    many = with_roster(tmp_path / "class", "learner\n" + "".join(f"u{number}\n" for number in range(90)))
    drawn, lines = own.draw(many, 5, ["5.1", "5.6"], own.Drawn())
    assert lines == ["5.6: no numbers of one's own, many answers are right"]
    assert {len(mine["5.1"].constants) for mine in drawn.items.values()} > {1}
    assert len({round(mine["5.1"].number, 4) for mine in drawn.items.values()}) == 90


def test_exercises_without_a_number_are_said(classroom: Classroom) -> None:
    drawn, lines = own.draw(classroom, 1, ["1.5"], own.Drawn())
    assert lines == ["1.5: no numbers of one's own, its outputs differ too little between learners"]
    assert all(set(mine) == {PREDICTION} for mine in drawn.items.values())


def test_own_numbers_need_a_roster_and_what_was_drawn(classroom: Classroom) -> None:
    empty = with_roster(classroom.folder, "learner\n")
    with pytest.raises(GradingError, match="has no learners: numbers of their own need a roster"):
        release(empty, 5, own_numbers=True)
    done = release(classroom, 5, own_numbers=True)
    own.path_of(classroom, 5).unlink()
    with pytest.raises(GradingError, match=r"numbers\.json is missing"):
        own.judge(classroom, done.release, "u1", Submission(answers={}))


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Callable], None]]:
    """Record that an answer passed its check."""
    records: dict[str, session.Record] = {}
    monkeypatch.setattr(session, "_records", records)
    return lambda id, answer: records.__setitem__(id, session.Record(answer, "pass", ""))


@pytest.mark.parametrize("id", ["1.1", "2.1", "2.3", "2.6", "3.2", "4.1", "5.1", "5.3", "5.5", "6.3", "12.2", "14.5"])
def test_what_the_learner_sees_is_what_is_expected(
    id: str, passed: Callable[[str, Callable], None], capsys: pytest.CaptureFixture[str]
) -> None:
    exercise = get(id)
    passed(id, lambda *arguments: exercise.reference(*arguments))
    own_number(id, 12345678, 87654321)
    printed = capsys.readouterr().out
    number = float(printed.split(f"your number for {id}: ")[1])
    want, within = expected(exercise, (12345678, 87654321))
    assert abs(number - want) <= within + 1e-9 * abs(want)
    assert printed.count(f"{id} on inputs of your own: {next(iter(exercise.inputs(1)))}") == 2


def test_a_number_waits_for_a_pass(passed: Callable[[str, Callable], None], capsys: pytest.CaptureFixture[str]) -> None:
    own_number("5.2", 12345678)
    assert capsys.readouterr().out == "5.2: your number comes from your own encode. Run this cell again when its check says pass\n"
    passed("5.2", lambda values, levels: 1 / 0)
    own_number("5.2", 12345678)
    assert "5.2: your encode gave no outputs for them: ZeroDivisionError" in capsys.readouterr().out


def test_a_wrong_answer_has_another_number() -> None:
    """Of every known mistake whose outputs have the right form."""
    from labsupport.exercises.judging import outputs

    different = same = 0
    for exercise in exercises_of(5):
        if not can_be_asked(exercise):
            continue
        number, within = expected(exercise, (12345678,))
        for mistake in exercise.mistakes:
            theirs = reduce(exercise, outputs(exercise, mistake.answer, exercise.inputs(12345678)), torch.zeros(0))
            different, same = different + (abs(theirs - number) > within), same + (abs(theirs - number) <= within)
    assert different >= 20
    assert same <= different / 10


def test_every_lab_has_a_question() -> None:
    assert set(QUESTIONS) == set(workbook.chapters())
    for question in QUESTIONS.values():
        numbers = {question.number(constant) for constant in range(10_000_000, 10_000_200)}
        assert len(numbers) > 150
        assert all(0 < number < 1e7 for number in numbers)
        assert "{" not in question.text(10_000_000)


def test_questions_agree_with_the_course() -> None:
    rows, columns = 224, 640
    plain, _ = get("5.4").reference(rows, columns, 64)
    assert QUESTIONS[5].answer(rows=rows, columns=columns) == pytest.approx(plain * rows * columns / 8000)
    assert QUESTIONS[10].answer(rows=16, columns=40) * 1000 == 16 * 5


@pytest.mark.slow
def test_a_released_notebook_runs_to_its_end(classroom: Classroom) -> None:
    from labsupport.course.execute import execute

    done = release(classroom, 5, own_numbers=True)
    ran = execute(nbformat.read(done.notebooks[0], 4), "released", strict=False, settings={quick.VARIABLE: "1"})
    printed = {
        cell.id: "".join(output.get("text", "") for output in cell.outputs) for cell in ran.cells if cell.cell_type == "code"
    }
    assert printed["check-5-1"].startswith("5.1 nf4_codebook: not attempted")
    assert printed["own-5-1"].startswith("5.1: your number comes from your own nf4_codebook")
    assert "0 of 7 pass" in printed["tally"]
