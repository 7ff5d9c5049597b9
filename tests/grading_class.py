"""A made-up class over labs 02 and 05, handed out, collected and marked: is every mark the one expected?

    python tests/grading_class.py --learners 200 --workers 2

Right, blank, wrong by each mistake that the course knows (written as the text of an answer), and a few hostile answers. What is
expected of a mistake is what the exercise's judgement says of the same function, run in this process on the same inputs. Prints
how many marks are as expected, those that are not, and the wall time over the time in the sandbox divided by the workers. Exits
with 1 for a wrong mark.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import nbformat  # noqa: E402

from labsupport import quant  # noqa: E402
from labsupport.course import workbook  # noqa: E402
from labsupport.course.carry import answer_key  # noqa: E402
from labsupport.exercises.attempts import attempt  # noqa: E402
from labsupport.exercises.form import Exercise, Mistake  # noqa: E402
from labsupport.exercises.judging import judge  # noqa: E402
from labsupport.exercises.registry import CHAPTERS, exercises_of  # noqa: E402
from labsupport.grading import farm, gradebook, marking, prepared  # noqa: E402
from labsupport.grading.classroom import Classroom  # noqa: E402
from labsupport.grading.collect import collect  # noqa: E402
from labsupport.grading.release import release  # noqa: E402

LABS = (2, 5)
ANSWER_SECONDS = 5.0
HOSTILE = (
    "def {name}(*given):\n    while True:\n        pass\n",
    "import os\ndef {name}(*given):\n    os._exit(0)\n",
    "def {name}(*given):\n    from labsupport.exercises.registry import get\n    return get('{id}').reference(*given)\n",
    "def {name}(*given):\n    print('x' * 10**8)\n    raise SystemExit\n",
)


COPIED = """
def copied(name, text):
    module = sys.modules["copied_" + name] = types.ModuleType("copied_" + name)
    exec(text, module.__dict__)
    return module
"""


# Mistakes as texts ----------------------------------------------------------------------------------------------------
@cache
def texts_of(exercise: Exercise) -> tuple[tuple[str, Mistake], ...]:
    """The known mistakes of an exercise, each as the text of an answer: the expression that makes it, and what that needs.

    Where that is a module of `labsupport.quant`, its whole text is part of the answer, as a learner could have copied it.
    """
    module = sys.modules[f"labsupport.exercises.{CHAPTERS[int(exercise.id.split('.')[0])]}"]
    source = inspect.getsource(module)
    tree = ast.parse(source)
    made = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    name = next(name for name in made if getattr(module, name) is exercise)
    expressions = list(_expressions(made[name], made, source))
    assert len(expressions) == len(exercise.mistakes), exercise.id
    found = []
    for expression, mistake in zip(expressions, exercise.mistakes, strict=True):
        needed = _needed(expression, tree, source)
        arguments = ", ".join(exercise.inputs(0)) if exercise.drive is None else "*given, **named"
        found.append((f"{needed}\ndef {exercise.name}({arguments}):\n    return ({expression})({arguments})\n", mistake))
    return tuple(found)


def _expressions(node: ast.expr, made: dict[str, ast.expr], source: str) -> Iterator[str]:
    """Each mistake's function, in order. node: what makes an exercise, or its mistakes."""

    def text(part: ast.AST) -> str:
        return f"({ast.get_source_segment(source, part)})"

    if isinstance(node, ast.Attribute):
        assert isinstance(node.value, ast.Name)
        yield from _expressions(made[node.value.id], made, source)
    elif isinstance(node, ast.BinOp):
        yield from _expressions(node.left, made, source)
        yield from _expressions(node.right, made, source)
    elif isinstance(node, ast.Tuple):
        for part in node.elts:
            yield from _expressions(part, made, source)
    elif isinstance(node, ast.Call):
        kind = node.func.id if isinstance(node.func, ast.Name) else ""
        if kind in ("Exercise", "replace"):
            for keyword in node.keywords:
                if keyword.arg == "mistakes":
                    yield from _expressions(keyword.value, made, source)
        elif kind == "Mistake":
            yield text(node.args[1])
        elif kind == "mistakes_by_option":
            table = node.args[1]
            assert isinstance(table, ast.Dict)
            for value in table.values:
                for each in value.elts if isinstance(value, ast.List) else [value]:
                    yield f"functools.partial({text(node.args[0])}, **{text(each)})" if isinstance(each, ast.Dict) else text(each)
        else:
            raise ValueError(f"mistakes made by {kind} are not known here")
    else:
        raise ValueError(f"mistakes written as {ast.dump(node)[:80]} are not known here")


def _needed(expression: str, tree: ast.Module, source: str) -> str:
    """The chapter's imports and definitions that an expression needs, in their order."""
    defined: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            defined |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(alias.asname or alias.name).split(".")[0]: node for alias in node.names}
    wanted: set[ast.stmt] = set()
    ahead = [ast.parse(expression)]
    while ahead:
        for node in ast.walk(ahead.pop()):
            if isinstance(node, ast.Name) and node.id in defined and defined[node.id] not in wanted:
                wanted.add(defined[node.id])
                ahead.append(defined[node.id])
    lines = [_copied(node) or ast.get_source_segment(source, node) or "" for node in tree.body if node in wanted]
    return "\n".join(["from __future__ import annotations", "import functools", *lines])


def _copied(node: ast.stmt) -> str:
    """For an import from `labsupport.quant`: lines that make its modules of their text, and what they import in turn. Else ""."""
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("labsupport.quant"):
        return ""
    names = [alias.name for alias in node.names]
    _, _, within = str(node.module).removeprefix("labsupport.").partition(".")
    lines = ["import sys, types", COPIED]
    for name in [within] if within else names:
        text = body = Path(quant.__file__).with_name(f"{name}.py").read_text("utf-8")
        for inner in ast.parse(text).body:
            if copied := _copied(inner):
                body = body.replace(ast.get_source_segment(text, inner) or "", copied)
        lines.append(f"{name} = copied({name!r}, {body!r})")
    return "\n".join(lines + [f"{name} = {within}.{name}" for name in names if within])


# The class ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Person:
    """One submission.

    answers: text by exercise, where it is not the solution. mistakes: the function of each. hostile: an exercise.
    """

    learner: str
    lab: int
    answers: dict[str, str]
    mistakes: dict[str, Mistake]
    hostile: str = ""
    blank: bool = False


def people(count: int) -> list[Person]:
    """Labs take turns; of ten in a lab two are right, one is blank, one hostile, and six have mistakes, each the next."""
    made, turn = [], Counter[int]()
    for number in range(count):
        lab, place = LABS[number % 2], number // 2
        learner, exercises = f"learner{number:03d}", exercises_of(lab)
        kind = place % 10
        if kind == 9:
            exercise = exercises[place // 10 % len(exercises)]
            text = HOSTILE[(place // 10 + lab) % len(HOSTILE)].format(name=exercise.name, id=exercise.id)
            made.append(Person(learner, lab, {exercise.id: text}, {}, hostile=exercise.id))
        elif kind in (0, 5):
            made.append(Person(learner, lab, {}, {}))
        elif kind == 1:
            made.append(Person(learner, lab, {}, {}, blank=True))
        else:
            chosen = {e.id: texts_of(e)[turn[lab] % len(texts_of(e))] for e in exercises if texts_of(e)}
            turn[lab] += 1
            made.append(
                Person(learner, lab, {id: text for id, (text, _) in chosen.items()}, {id: m for id, (_, m) in chosen.items()})
            )
    return made


def notebook(person: Person) -> nbformat.NotebookNode:
    blank = workbook.chapter(str(person.lab))
    copy = workbook.learner_copy(workbook.read(blank))
    if person.blank:
        return copy
    solutions = {
        key: cell.source for cell in workbook.read(blank.parent / "solutions" / blank.name).cells if (key := answer_key(cell))
    }
    for cell in copy.cells:
        key = answer_key(cell) or ""
        if key.startswith("answer-"):
            cell.source = person.answers.get(key.removeprefix("answer-").replace("-", "."), solutions[key])
    return copy


def made_class(folder: Path, class_of: Sequence[Person]) -> Classroom:
    """Initialized, released and collected, as an instructor does it."""
    made = Classroom.create(folder / "class", "A made-up class")
    rows = [f"{person.learner},," for person in class_of]
    (made.folder / "roster.csv").write_text("\n".join(["learner,name,email", *rows, ""]), "utf-8")
    limits = made.settings.limits.model_copy(update={"answer_seconds": ANSWER_SECONDS})
    made.settings.model_copy(update={"limits": limits}).write(made.folder / "class.json")
    made = Classroom.open(made.folder)
    for lab in LABS:
        incoming = folder / f"incoming-{lab}"
        incoming.mkdir()
        for person in class_of:
            if person.lab == lab:
                nbformat.write(notebook(person), incoming / f"{person.learner}.ipynb")
        release(made, lab)
        found = collect(made, lab, incoming)
        assert len(found.taken) == sum(person.lab == lab for person in class_of), found.lines
    return made


# What is expected -----------------------------------------------------------------------------------------------------
def unexpected(made: Classroom, person: Person, expected: dict[tuple[str, str], tuple[str, float, str]]) -> list[str]:
    """A sentence for each mark of a person that is not the one expected. expected: of mistakes, kept between calls."""
    entry = next(entry for entry in gradebook.entries(made, person.lab) if entry.learner == person.learner)
    asked = {
        id: one
        for group in prepared.lab(made, person.lab, list(made.release(person.lab).points)).groups
        for id, one in group.asked.items()
    }
    wrong = []
    for line in entry.lines:
        outcome, points, message = "pass", line.of, ""
        if person.blank:
            outcome, points = "blank", 0.0
        elif line.exercise == person.hostile:
            outcome, points = "", 0.0
        elif line.exercise in person.mistakes:
            mistake = person.mistakes[line.exercise]
            key = (line.exercise, mistake.says + str(id(mistake)))
            if key not in expected:
                expected[key] = _expected(asked[line.exercise], mistake, line.of * made.settings.policy.partial)
            outcome, points, message = expected[key]
        got = (line.outcome, line.points, line.mark.message if line.mark else "")
        right = (not outcome or got[0] == outcome) and abs(got[1] - points) < 1e-9 and (not message or got[2] == message)
        if not right:
            wrong.append(f"{person.learner}, {line.exercise}: got {got}, wanted {(outcome, points, message)}")
    return wrong


def _expected(asked: prepared.Asked, mistake: Mistake, most: float) -> tuple[str, float, str]:
    tried = [attempt(asked.exercise, mistake.answer, given) for given in asked.given]
    verdict = judge(asked.exercise, list(zip(asked.given, tried, strict=True)), asked.want)
    assert not verdict.passed, f"{asked.exercise.id}: the mistake {mistake.says!r} passes"
    if failed := [one.status for one in tried if one.status != "ran"]:
        return marking.OUTCOMES[failed[0]], 0.0, verdict.message
    return "wrong", most * marking.share_right(asked, tried), verdict.message


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learners", type=int, default=200)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--unsafe", action="store_true")
    given = parser.parse_args()
    class_of = people(given.learners)
    for lab in LABS:
        known = {id(mistake) for exercise in exercises_of(lab) for mistake in exercise.mistakes}  # two exercises may share one
        used = {id(mistake) for person in class_of if person.lab == lab for mistake in person.mistakes.values()}
        print(f"lab {lab:02d}: {len(used)} of {len(known)} known mistakes are handed in")
    with tempfile.TemporaryDirectory() as temporary:
        made = made_class(Path(temporary), class_of)
        wall = inside = 0.0
        for lab in LABS:
            graded = farm.grade(made, lab, workers=given.workers, unsafe=given.unsafe)
            spent = sum(result.in_sandbox for result in graded.results)
            print(
                f"lab {lab:02d}: {len(graded.results)} submissions in {graded.seconds:.1f} s; {spent:.1f} s in the sandbox",
                flush=True,
            )
            wall, inside = wall + graded.seconds, inside + spent
        expected: dict = {}
        wrong = [sentence for person in class_of for sentence in unexpected(made, person, expected)]
        marks = sum(len(made.release(person.lab).points) for person in class_of)
        print(f"{marks - len(wrong)} of {marks} marks are as expected", *wrong, sep="\n")
        times = wall * given.workers / inside
        print(f"wall time {wall:.1f} s, {times:.2f} times the time in the sandbox over {given.workers} workers")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
