"""A made-up class of 20 that hands in lab 02: right, blank, partly right, hostile. What each answer must be worth stands beside it.

An attack is counted as won if it gets points for an exercise that nobody solved.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Callable
from dataclasses import dataclass, field

import nbformat
from grading_hostile import ATTACKS
from nbformat import NotebookNode
from nbgrader_course import answered, cell, exercises_only

from labsupport.exercises.registry import exercises_of
from labsupport.grading import sample

LAB = 2
TEXTS = {attack.title: attack.text for attack in ATTACKS}
EXERCISES = {exercise.id: exercise for exercise in exercises_of(LAB)}

# By title, of the hostile set; one stands in each answer, and what it wins are the points of that exercise. What reloads a module
# comes last, for later ones would profit.
IN_AN_ANSWER = (
    "imports the reference", "imports it inside the function", "binds it with partial", "asks the registry",
    "asks check twice", "gives check nothing", "renames the code", "runs its source",
    "loads its file again", "asks it in a thread", "switches the profiler off", "asks another Python",
    "walks up the stack", "walks through all objects", "swaps the reference's code", "reloads it",
)  # fmt: skip
_IDLE = "def $name(*given):\n    return 0\n"
# In a cell before all answers, which are `return 0`; what it wins is everything.
BEFORE_ALL = {
    "score redefined, and the course's hooks taken off": "try:\n"
    "    get_ipython().events.callbacks['pre_run_cell'].clear()\n"
    "except NameError:\n"
    "    pass\n"
    "score = lambda id: 1.0\n"
    "check = lambda id, answer: answer",
    "the judge replaced": "from labsupport.exercises import attempts, form, session\n"
    "session.test = lambda *given: (form.right(), [attempts.Attempt('ran')])",
    "the judge's comparison replaced": "from labsupport.exercises import judging, form\n"
    "judging._judge = lambda *given: form.right()",
    "cells rewritten by an input transformer": "def easier(lines):\n"
    "    return [__import__('re').sub(r'^score\\(.*', '1.0', line) for line in lines]\n"
    "get_ipython().input_transformers_cleanup.append(easier)",
    "cells rewritten by an AST transformer": "import ast\n"
    "class Easier(ast.NodeTransformer):\n"
    "    def visit_Call(self, node):\n"
    "        self.generic_visit(node)\n"
    "        wanted = isinstance(node.func, ast.Name) and node.func.id == 'score'\n"
    "        return ast.copy_location(ast.Constant(1.0), node) if wanted else node\n"
    "get_ipython().ast_transformers.append(Easier())",
    "the grader's own records": "import pathlib, sqlite3, sys\n"
    "if 'otter' in sys.modules:\n"
    "    from otter.test_files import test_case\n"
    "    test_case.call_func = lambda self, environment: None\n"
    "for folder in pathlib.Path.cwd().parents:\n"
    "    if (folder / 'gradebook.db').exists():\n"
    "        book = sqlite3.connect(folder / 'gradebook.db')\n"
    "        mine = 'SELECT id FROM submitted_assignment WHERE student_id = ?'\n"
    "        mine = 'SELECT id FROM submitted_notebook WHERE assignment_id IN (' + mine + ')'\n"
    "        learner = pathlib.Path.cwd().parent.name\n"
    "        book.execute('UPDATE grade SET manual_score = 1.0 WHERE notebook_id IN (' + mine + ')', (learner,))\n"
    "        book.commit()",
}  # fmt: skip


@dataclass(frozen=True)
class HandedIn:
    """learner. kind: "right", "blank", "partly" or "hostile". notebook: as it is handed in. expected: points by exercise.

    attacks: by exercise, "*" for all of them; the title in IN_AN_ANSWER or BEFORE_ALL.
    """

    learner: str
    kind: str
    notebook: NotebookNode
    expected: dict[str, float]
    attacks: dict[str, str] = field(default_factory=dict)


Fill = Callable[[str, str, str], str]


def _notebook(fill: Fill) -> NotebookNode:
    return answered(exercises_only(LAB), fill)


def _right(id: str, stub: str, solution: str) -> str:
    return solution


def _points(*missed: str) -> dict[str, float]:
    return {id: 0.0 if id in missed else float(exercise.points) for id, exercise in EXERCISES.items()}


def _instead(**texts: str) -> Fill:
    """Right but for these, by names such as e2_3; {solution} is the right text."""

    def fill(id: str, stub: str, solution: str) -> str:
        text = texts.get(f"e{id.replace('.', '_')}", "{solution}")
        return text.replace("{solution}", solution).replace("{stub}", stub).replace("{name}", EXERCISES[id].name)

    return fill


def filled(text: str, id: str) -> str:
    """An attack's text for one exercise."""
    exercise = EXERCISES[id]
    theirs = exercise.reference
    return string.Template(text).safe_substitute(id=id, name=exercise.name, module=theirs.__module__, reference=theirs.__name__)


def _right_ones() -> list[HandedIn]:
    shadowed = _notebook(_instead(e2_1="{solution}\nscore = 0.93  # a note", e2_4="list = [1]\n{solution}\nid = 'me'"))
    noisy = "import warnings\n{solution}\n_mine = {name}\ndef {name}(*given):\n    warnings.warn('slow')\n    return _mine(*given)"
    warned = _notebook(_instead(e2_1=noisy, e2_2=noisy))
    copied = _notebook(_right)
    original = cell(copied, "check-2-1")
    second = copy.deepcopy(original)
    second.id = "another"
    copied.cells.insert(copied.cells.index(original), second)
    deleted = _notebook(_right)
    deleted.cells.remove(cell(deleted, "check-2-2"))
    named = {"plain": _notebook(_right), "shadowed": shadowed, "warned": warned, "copied-check": copied, "deleted-check": deleted}
    return [HandedIn(f"right-{name}", "right", notebook, _points()) for name, notebook in named.items()]


def _partly() -> list[HandedIn]:
    wrong = {f"e{id.replace('.', '_')}": id for id in sample.WRONG}

    def mistaken(id: str, stub: str, solution: str) -> str:
        return solution.replace(*sample.WRONG[id]) if id in wrong.values() else solution

    half = [id for id in EXERCISES if id > "2.4"]
    made = {
        "mistakes": (mistaken, tuple(sample.WRONG)),
        "half": (lambda id, stub, solution: stub if id in half else solution, tuple(half)),
        "endless": (_instead(e2_8="def best_clip(*given):\n    while True:\n        pass"), ("2.8",)),
        "exit": (_instead(e2_3="def quantize(*given):\n    return 0\nexit()"), ("2.3",)),
        "broken": (_instead(e2_1="def symmetric_scale(:", e2_2="def {name}(*given):\n    raise ValueError('no')"), ("2.1", "2.2")),
    }
    return [HandedIn(f"partly-{name}", "partly", _notebook(fill), _points(*missed)) for name, (fill, missed) in made.items()]


def _hostile() -> list[HandedIn]:
    everything = tuple(EXERCISES)
    found = []
    for number in range(0, len(IN_AN_ANSWER), len(EXERCISES)):
        attacks = dict(zip(EXERCISES, IN_AN_ANSWER[number : number + len(EXERCISES)], strict=True))

        def fill(id: str, stub: str, solution: str, attacks: dict[str, str] = attacks) -> str:
            return filled(TEXTS[attacks[id]], id)

        found.append(HandedIn(f"hostile-{len(found) + 1}", "hostile", _notebook(fill), _points(*everything), attacks))
    for name, text in BEFORE_ALL.items():
        notebook = _notebook(lambda id, stub, solution: filled(_IDLE, id))
        notebook.cells.insert(1, nbformat.v4.new_code_cell(text))
        found.append(HandedIn(f"hostile-{len(found) + 1}", "hostile", notebook, _points(*everything), {"*": name}))
    return found


def class_of_20() -> list[HandedIn]:
    blank = [
        HandedIn("blank-1", "blank", _notebook(lambda id, stub, solution: stub), _points(*EXERCISES)),
        HandedIn("blank-2", "blank", _notebook(lambda id, stub, solution: "pass"), _points(*EXERCISES)),
    ]
    return [*_right_ones(), *blank, *_partly(), *_hostile()]
