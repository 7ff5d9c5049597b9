"""labs class, release, collect, grade, mark, report and feedback: a class through a term."""

from __future__ import annotations

import getpass
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from labsupport.cli.messages import echo, fail, printable, stopped
from labsupport.install import get_extra

if TYPE_CHECKING:
    from labsupport.grading.classroom import Classroom
    from labsupport.grading.farm import Graded

app = typer.Typer()
of_class = typer.Typer(help="Make the folder of a class.", no_args_is_help=True)
app.add_typer(of_class, name="class")

Lab = Annotated[str, typer.Argument(metavar="NN", help="The lab: a chapter's number, such as 05.")]
Folder = Annotated[Path, typer.Option("--class", help="The class's folder. Without it, the current directory.")]
HERE = Path()


@of_class.command()
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder. Keep it to yourself: marks and the class's secret are in it.")
    ],
    name: Annotated[str, typer.Option(help="Name of the class, as learners read it; the folder's without one.")] = "",
) -> None:
    """Make a class: settings, an empty roster to fill in, and a secret that makes its inputs. The first of the commands."""
    with _errors("class init"):
        from labsupport.grading.classroom import ROSTER, Classroom

        classroom = Classroom.create(folder, name)
        echo(f"made {classroom.folder}")
        echo(
            f"Next: put your learners into {classroom.folder / ROSTER}, a row each. Then hand out a lab: "
            f"labs release 05 --class {folder}"
        )


@of_class.command()
def sample(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")]) -> None:
    """Make a class of three made-up learners, and what they hand in for lab 02, to try the other commands on."""
    with _errors("class sample"):
        from labsupport.grading import sample as made_up

        classroom = made_up.create(folder)
        echo(f"made {classroom.folder} with {len(made_up.PEOPLE)} learners")
        inbox = folder / made_up.INBOX
        echo(f"Next: labs release {made_up.LAB:02d} --class {folder}, labs collect {made_up.LAB:02d} {inbox} --class {folder}")


@app.command()
def release(
    lab: Lab,
    folder: Folder = HERE,
    due: Annotated[
        str | None, typer.Option(help="When it must be in: 2027-03-01, or with a time and zone 2027-03-01T18:00+01:00.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="An exercise that counts, such as 5.2. Repeat it. Without it all count.")
    ] = None,
    points: Annotated[list[str] | None, typer.Option(help="Points of an exercise, such as 5.2=4. Repeat it.")] = None,
    own_numbers: Annotated[
        bool, typer.Option("--own-numbers", help="Give each learner a notebook with numbers of their own.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Replace notebooks that were handed out before.")] = False,
) -> None:
    """Hand out a lab: write the notebook that learners get into the class's folder. Run it again to change the date."""
    with _errors("release", "Nothing was written"):
        from rich.console import Console

        from labsupport.grading.release import release as hand_out

        classroom, number = _open(folder), _number(lab)
        with Console(stderr=True).status("writing notebooks"):
            done = hand_out(classroom, number, due, only or (), _points(points or []), own_numbers, again)
        for line in done.lines:
            echo(line)
        total = sum(done.release.points.values())
        echo(f"lab {number:02d}: {len(done.release.points)} exercises, {total:g} points, due {done.release.due or 'at no date'}")
        first = done.notebooks[0].parent.parent if own_numbers else done.notebooks[0]
        echo(f"hand out {first}")


@app.command()
def collect(
    lab: Lab,
    source: Annotated[
        Path, typer.Argument(help="What came in: a folder, a zip from Moodle, Canvas or Gradescope, or one notebook.")
    ],
    folder: Folder = HERE,
    kind: Annotated[
        str, typer.Option("--from", help="How files are named: auto, moodle, canvas, gradescope, nbgrader or folder.")
    ] = "auto",
) -> None:
    """Take what was handed in into the class's folder. Nothing of it is run. The same files again change nothing."""
    with _errors("collect", "What was taken so far is whole; the same command goes on"):
        from labsupport.grading.collect import collect as take

        classroom, number = _open(folder), _number(lab)
        if not source.exists():
            fail("collect", f"{source} does not exist, wanted a folder, a zip or a notebook")
        with _bar("file") as on_file:
            found = take(classroom, number, source, kind, on_file=on_file)
        for line in found.lines:
            echo(line)
        learners = len({one.learner for one in classroom.collected(number)})
        echo(
            f"lab {number:02d}: {len(found.taken)} new, {found.known} known; "
            f"{learners} of {len(classroom.roster)} learners have handed in"
        )


@app.command()
def grade(
    lab: Lab,
    folder: Folder = HERE,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that mark at the same time; one a processor without it.")
    ] = None,
    dask: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="A Dask scheduler whose workers see the class's folder, or gateway:NAME of Dask Gateway."
        ),
    ] = "",
    unsafe: Annotated[
        bool,
        typer.Option(
            "--unsafe", help="Where no sandbox works, run what was handed in with all your rights. For trusted code only."
        ),
    ] = False,
    again: Annotated[list[str] | None, typer.Option(metavar="LEARNER", help="Mark this learner once more. Repeat it.")] = None,
) -> None:
    """Mark what was collected, in a sandbox.

    What has a mark keeps it; stop and start it as you like. Exit code 1 if something is left.
    """
    with _errors("grade", "The same command goes on with what is left"):
        from labsupport.grading import farm, gradebook

        classroom, number = _open(folder), _number(lab)
        with _bar("submission") as on_row:

            def ready(dashboard: str, count: int, waiting: int) -> None:
                echo(f"{count} workers; dashboard: {dashboard}", err=True)
                on_row(0, waiting)

            graded = farm.grade(
                classroom,
                number,
                classroom.settings.sandbox,
                workers,
                dask,
                unsafe,
                again or (),
                on_result=lambda done, total, result: on_row(done, total),
                on_ready=ready,
            )
        book = gradebook.rebuild(classroom)
        _outcomes(graded)
        for line in graded.lines:
            echo(line, err=True)
        if graded.stopped:
            stopped("grade", f"{len(graded.left)} submissions remain; the same command goes on with them")
        unfinished = [result for result in graded.results if not result.final]
        if unfinished:
            fail(
                "grade",
                f"not fully marked: {', '.join(result.learner for result in unfinished[:5])}, {len(unfinished)} in all; "
                "the same command tries again",
            )
        there = "" if folder == HERE else f" --class {folder}"
        echo(f"wrote {book}. Next: labs report {number:02d}{there}, labs feedback {number:02d}{there}")


@app.command()
def mark(
    lab: Lab,
    learner: Annotated[str, typer.Argument(help="The learner's id, as in roster.csv.")],
    exercise: Annotated[str, typer.Argument(help="Such as 5.2; or `late`: then POINTS is how many days count as late.")],
    points: Annotated[float, typer.Argument(min=0, help="Points of the exercise, from 0 to what it is worth.")],
    reason: Annotated[str, typer.Option(help="Why. The learner reads it.")],
    by: Annotated[str, typer.Option(help="Who says so; your user name without it.")] = "",
    folder: Folder = HERE,
) -> None:
    """Set a mark by hand. The last one counts, all are kept, and marking again changes none. Lateness is still taken off."""
    with _errors("mark", "Nothing was written"):
        from labsupport.grading import gradebook
        from labsupport.grading.records import Override

        classroom, number = _open(folder), _number(lab)
        if not reason.strip():
            fail("mark", "--reason is empty, wanted a sentence that the learner may read")
        now = datetime.now().astimezone()
        override = Override(
            lab=number, learner=learner, exercise=exercise, points=points, reason=reason.strip(), by=by or _user(), when=now
        )
        path = gradebook.set_by_hand(classroom, override)
        gradebook.rebuild(classroom)
        entry = next(one for one in gradebook.entries(classroom, number) if one.learner == learner)
        echo(f"wrote {path}; {learner} has {entry.points:g} of {entry.of:g} points in lab {number:02d}")


@app.command()
def report(lab: Lab, folder: Folder = HERE) -> None:
    """Write spreadsheets (also for Canvas, Moodle and Gradescope) and a page with pictures of how the class did."""
    with _errors("report", "Nothing was written"):
        from labsupport.grading import gradebook
        from labsupport.grading.report import report as write

        classroom, number = _open(folder), _number(lab)
        gradebook.rebuild(classroom)
        written = write(classroom, number)
        for path in written:
            if path.suffix in (".csv", ".html"):
                echo(f"wrote {path}")


@app.command()
def feedback(lab: Lab, folder: Folder = HERE) -> None:
    """Write a page for each learner: the mark, how it came about, and what was seen in each answer."""
    with _errors("feedback", "The pages that are there are whole"):
        from labsupport.grading.feedback import feedback as write

        classroom, number = _open(folder), _number(lab)
        with _bar("page") as on_page:
            written = write(classroom, number, on_page)
        echo(f"wrote {len(written)} pages into {classroom.folder_of('feedback', number)}")


@contextmanager
def _errors(command: str, what_now: str = "") -> Iterator[None]:
    """What is wrong is one line; so is what an extra of the package lacks."""
    try:
        from labsupport.grading.records import GradingError
    except ImportError as error:
        fail(command, f"{error.name} is missing: {get_extra('teach')}")
    try:
        yield
    except (GradingError, OSError) as error:
        fail(command, error)
    except ImportError as error:
        fail(command, f"{error.name} is missing: {get_extra('teach')}")
    except KeyboardInterrupt:
        stopped(command, what_now)


def _open(folder: Path) -> Classroom:
    from labsupport.grading.classroom import Classroom

    return Classroom.open(folder)


def _number(lab: str) -> int:
    from labsupport.course import workbook
    from labsupport.grading.records import GradingError

    try:
        return int(workbook.chapter(lab).name[:2])
    except workbook.WorkbookError as error:
        raise GradingError(str(error)) from None


def _points(texts: list[str]) -> dict[str, float]:
    from labsupport.grading.records import GradingError

    points = {}
    for text in texts:
        id, _, number = text.partition("=")
        try:
            points[id.strip()] = float(number)
        except ValueError:
            raise GradingError(f"--points is {text[:40]!r}, wanted an exercise and its points, such as 5.2=4") from None
    return points


@contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar, which is called with (done, total). It appears with the first call."""
    from tqdm import tqdm

    with ExitStack() as stack:
        bars: list[tqdm] = []

        def on_row(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(tqdm(unit=unit, total=total)))
            bars[0].update(done - bars[0].n)

        yield on_row


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


def _outcomes(graded: Graded) -> None:
    """A table of what this run did."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    outcomes = Counter(mark.outcome for result in graded.results for mark in result.marks.values())
    problems = sum(bool(result.problems) for result in graded.results)
    rows = {
        "submissions marked now": sum(result.final for result in graded.results),
        "marked before": graded.before,
        "with problems": problems,
        "left": len(graded.left) + sum(not result.final for result in graded.results),
        **{f"answers: {name}": count for name, count in sorted(outcomes.items())},
        "seconds": f"{graded.seconds:.1f}, on {graded.workers} workers",
        "sandbox": ", ".join(sorted({result.sandbox for result in graded.results if result.sandbox})) or "-",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    for result in graded.results:
        for problem in result.problems[:1]:
            table.add_row(f"problem: {result.learner}", Text(printable(problem[:200])))  # rich reads markup in a str
    Console().print(table)
