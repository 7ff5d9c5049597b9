"""What every notebook of the course keeps to, in both forms; and that each of these rules notices when it is broken."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from labsupport.course import build as forms
from labsupport.course import setup_cell
from labsupport.course.badges import repository
from labsupport.course.execute import WIDGET
from labsupport.exercises import registry

ROOT = Path(__file__).resolve().parents[1]
SOURCES = forms.sources(ROOT)
CELLS, WORDS, MEDIAN_LINES, MOST_LINES, SETUP_LINES = (40, 110), 4000, 8, 40, 6
MACHINE_PATH = re.compile(r"(?<![\w./:-])/(root|home|work|tmp|Users|mnt|var/folders)/|\b[A-Z]:\\+Users|site-packages")
ADDRESS = re.compile(r"\b0x[0-9a-f]{8,}\b")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)  # a comment in it is no heading
UNFINISHED = re.compile(r"\b(TODO|FIXME|TBD|XXX|lorem ipsum)\b", re.IGNORECASE)
MARKERS = ("BEGIN SOLUTION", "END SOLUTION", "BEGIN HIDDEN TESTS", "END HIDDEN TESTS")


@dataclass
class Lab:
    """A notebook in one of its forms and what it is held against."""

    notebook: NotebookNode
    student: bool
    exercises: tuple[Any, ...]
    setup: str
    siblings: set[str]

    @property
    def code(self) -> list[NotebookNode]:
        return [cell for cell in self.notebook.cells if cell.cell_type == "code"]

    @property
    def prose(self) -> list[NotebookNode]:
        return [cell for cell in self.notebook.cells if cell.cell_type == "markdown"]

    def place(self, cell: NotebookNode) -> int:
        return next(i for i, other in enumerate(self.notebook.cells) if other is cell)


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def tree(cell: NotebookNode) -> ast.Module:
    return ast.parse(TransformerManager().transform_cell(cell.source))


def calls(cell: NotebookNode, name: str) -> list[ast.Call]:
    found = [node for node in ast.walk(tree(cell)) if isinstance(node, ast.Call)]
    return [call for call in found if isinstance(call.func, ast.Name) and call.func.id == name]


def first_argument(call: ast.Call) -> Any:
    argument = call.args[0] if call.args else None
    return argument.value if isinstance(argument, ast.Constant) else argument.id if isinstance(argument, ast.Name) else None


def texts(cell: NotebookNode) -> Iterator[str]:
    """The source of a cell and all text among its outputs."""
    yield cell.source
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


# Rules: each yields a sentence for every fault. ------------------------------------------------------------------------


def checked_cells_have_outputs(lab: Lab) -> Iterator[str]:
    """nbval passes a cell silently when there is nothing to compare with."""
    for cell in lab.code:
        if "nbval-check-output" in tags(cell) and (not cell.outputs or cell.execution_count is None):
            yield f"cell {cell.id} is to be compared by nbval and has nothing stored"


def pictures_have_alternative_text(lab: Lab) -> Iterator[str]:
    for cell in lab.code:
        for output in cell.outputs:
            kinds = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
            for kind in kinds:
                if not output.metadata.get(kind, {}).get("alt", "").strip():
                    yield f"cell {cell.id}: a figure without alt text in its metadata"
    for cell in lab.prose:
        if re.search(r"!\[\s*\]", cell.source):
            yield f"cell {cell.id}: an image without alt text"
        for image in re.findall(r"<img\b[^>]*>", cell.source):
            if not re.search(r"""\balt=["'][^"']""", image):
                yield f"cell {cell.id}: an <img> without alt text"


def headings_are_in_order(lab: Lab) -> Iterator[str]:
    """One title, at the top; below a heading at most one level down. Whoever hears a page finds the way by them."""
    found = [(len(marks), cell.id) for cell in lab.prose for marks in re.findall(r"^(#+) ", FENCED.sub("", cell.source), re.M)]
    if [level for level, _ in found].count(1) != 1 or found[0][0] != 1:
        yield f"headings of level 1 in the cells {[id for level, id in found if level == 1]}, wanted one, before all others"
    for (above, _), (level, id) in pairwise(found):
        if level > above + 1:
            yield f"cell {id}: a heading of level {level} comes after one of level {above}"


def is_of_a_readable_size(lab: Lab) -> Iterator[str]:
    count = len(lab.notebook.cells)
    if not CELLS[0] <= count <= CELLS[1]:
        yield f"{count} cells, wanted {CELLS[0]} to {CELLS[1]}"
    words = sum(len(cell.source.split()) for cell in lab.prose)
    if words > WORDS:
        yield f"{words} words of prose, wanted at most {WORDS}"
    sizes = {cell.id: len([x for x in cell.source.splitlines() if not any(m in x for m in MARKERS)]) for cell in lab.code}
    if statistics.median(sizes.values()) > MEDIAN_LINES:
        yield f"half of the code cells have more than {MEDIAN_LINES} lines: median {statistics.median(sizes.values())}"
    for id, size in sizes.items():
        if size > MOST_LINES:
            yield f"cell {id} has {size} lines, wanted at most {MOST_LINES}"


def opens_with_the_set_up_cell(lab: Lab) -> Iterator[str]:
    tagged = [cell.id for cell in lab.code if "setup" in tags(cell)]
    if tagged != [lab.code[0].id]:
        yield f"the cells tagged setup are {tagged}, wanted the first code cell alone"
    if lab.code[0].source != lab.setup:
        yield f"cell {lab.code[0].id}: not the set-up cell of labsupport.course.setup_cell.setup()"
    if len(lab.code[0].source.splitlines()) > SETUP_LINES:
        yield f"the set-up cell has more than {SETUP_LINES} lines"


def opens_on_a_gpu_in_colab(lab: Lab) -> Iterator[str]:
    for key, wanted in setup_cell.METADATA.items():
        if lab.notebook.metadata.get(key) != wanted:
            yield f"its metadata has {key} {lab.notebook.metadata.get(key)}, wanted {wanted}"


def asks_each_exercise_once(lab: Lab) -> Iterator[str]:
    asked = [first_argument(call) for cell in lab.code for call in calls(cell, "check")]
    known = {e.id for e in lab.exercises}
    for id in sorted({str(id) for id in asked} - known):
        yield f"exercise {id} is checked and is not in the registry"
    for exercise in lab.exercises:
        if asked.count(exercise.id) != 1:
            yield f"exercise {exercise.id} is checked {asked.count(exercise.id)} times, wanted once"
            continue
        yield from _exercise_faults(lab, exercise)


def _exercise_faults(lab: Lab, exercise: Any) -> Iterator[str]:
    id, dashed = exercise.id, exercise.id.replace(".", "-")
    by_grade_id = {cell.metadata.get("nbgrader", {}).get("grade_id"): cell for cell in lab.code}
    answer, check = by_grade_id.get(f"answer-{dashed}"), by_grade_id.get(f"check-{dashed}")
    if answer is None or check is None:
        yield f"exercise {id}: no code cells with the grade ids answer-{dashed} and check-{dashed}"
        return
    plain = {"schema_version": 3, "task": False}
    wanted = plain | {"grade_id": f"answer-{dashed}", "solution": True, "grade": False, "locked": False}
    if dict(answer.metadata.nbgrader) != wanted:
        yield f"exercise {id}: nbgrader metadata of its answer is {dict(answer.metadata.nbgrader)}, wanted {wanted}"
    wanted = plain | {"grade_id": f"check-{dashed}", "solution": False, "grade": True, "locked": True}
    wanted["points"] = exercise.points
    if dict(check.metadata.nbgrader) != wanted:
        yield f"exercise {id}: nbgrader metadata of its check is {dict(check.metadata.nbgrader)}, wanted {wanted}"
    if not any(isinstance(x, ast.FunctionDef | ast.ClassDef) and x.name == exercise.name for x in tree(answer).body):
        yield f"exercise {id}: its answer cell does not define {exercise.name}"
    lines = [f'{exercise.name} = check("{id}", {exercise.name})']
    if not lab.student:
        lines += ["### BEGIN HIDDEN TESTS", f'score("{id}")', "### END HIDDEN TESTS"]
    if check.source.splitlines() != lines:
        yield f"exercise {id}: its check cell is not the lines {lines}"
    heading = re.compile(rf"^#{{2,4}} .*?(?<![\d.]){re.escape(id)}(?![\d.]*\d).*\((\d+) minutes?, difficulty (\d) of 5\)$", re.M)
    found = [(lab.place(c), tuple(map(int, m.groups()))) for c in lab.prose for m in heading.finditer(c.source)]
    if [facts for _, facts in found] != [(exercise.minutes, exercise.difficulty)]:
        ending = f"({exercise.minutes} minutes, difficulty {exercise.difficulty} of 5)"
        yield f"exercise {id}: wanted one heading with {id} that ends in {ending}, found {[facts for _, facts in found]}"
    elif not found[0][0] < lab.place(answer) < lab.place(check):
        yield f"exercise {id}: heading, answer and check are not in this order"


def comes_back_to_predictions(lab: Lab) -> Iterator[str]:
    made: dict[str, int] = {}
    for cell in lab.code:
        for call in calls(cell, "revisit"):
            if first_argument(call) not in made:
                yield f"cell {cell.id} revisits {first_argument(call)!r}, which no earlier prediction cell sets"
        if "prediction" in tags(cell):
            for node in tree(cell).body:
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value is None:
                    made |= {target.id: lab.place(cell) for target in node.targets if isinstance(target, ast.Name)}
            if lab.place(cell) not in made.values():
                yield f"cell {cell.id} is tagged prediction and sets no name to None"
    revisited = {first_argument(call) for cell in lab.code for call in calls(cell, "revisit")}
    for name in sorted(made.keys() - revisited):
        yield f"the prediction {name!r} is never revisited"
    if not made:
        yield "it asks for no prediction"


def gives_nothing_away(lab: Lab) -> Iterator[str]:
    if not lab.student:
        return
    for cell in lab.notebook.cells:
        for marker in MARKERS:
            if marker in cell.source:
                yield f"cell {cell.id} holds {marker}"
        if cell.cell_type == "code" and calls(cell, "score"):
            yield f"cell {cell.id} holds a hidden test"
        if cell.metadata.get("nbgrader", {}).get("solution") and cell.source.count(forms.STUB) != 1:
            yield f"cell {cell.id} is an answer without one stub"


def names_no_machine(lab: Lab) -> Iterator[str]:
    for cell in lab.notebook.cells:
        for text in texts(cell):
            for pattern, what in ((MACHINE_PATH, "a path of one machine"), (ADDRESS, "an address in memory")):
                if found := pattern.search(text):
                    yield f"cell {cell.id}: {what}: {text[max(0, found.start() - 20) : found.end() + 20]!r}"


def widgets_have_a_static_twin(lab: Lab) -> Iterator[str]:
    def outputs(cell: NotebookNode) -> list[NotebookNode]:
        return cell.get("outputs", [])

    for i, cell in enumerate(lab.notebook.cells):
        if any("widget" in o.get("metadata", {}).get("labs", {}) for o in outputs(cell)):
            near = lab.notebook.cells[i + 1 : i + 3]
            if not any("image/png" in o.get("data", {}) for other in near for o in outputs(other)):
                yield f"cell {cell.id}: no figure within two cells of its widget"
        if any("widget-view" in kind for o in outputs(cell) for kind in o.get("data", {})):
            yield f"cell {cell.id}: stores a live widget; labs build replaces it"


def links_lead_somewhere(lab: Lab) -> Iterator[str]:
    for cell in lab.prose:
        pairs = re.findall(r"\]\(\s*<?([^)\s>]*)[^)]*\)", cell.source) + re.findall(r"^\[[^\]]+\]:\s*(\S*)", cell.source, re.M)
        for target in pairs:
            name = target.split("#")[0]
            if target.startswith(("http://", "https://")):
                host = re.match(r"https?://([^/]*)", target).group(1)
                if not re.fullmatch(r"([\w-]+\.)+\w+", host) or re.search(r"(^|\.)example\.(com|org)$", host):
                    yield f"cell {cell.id}: the link {target!r} is a placeholder"
            elif len(target) < 2 or (name and name not in lab.siblings):
                # A learner's copy lies in workbook/, where only the other notebooks are beside it.
                yield f"cell {cell.id}: the link {target!r} leads to no notebook of the course"


def claims_come_after_the_last_section(lab: Lab) -> Iterator[str]:
    """Else cells that settle claims stand under a heading that has nothing to do with them."""
    after = False
    for cell in lab.prose:
        for heading in re.findall(r"^## (.+)$", cell.source, re.M):
            if after and re.match(r"\d+\.\d+ ", heading):
                yield f"cell {cell.id}: section {heading!r} comes after the claims"
            after = after or heading == "Claims"


def is_finished(lab: Lab) -> Iterator[str]:
    for cell in lab.notebook.cells:
        if found := UNFINISHED.search(cell.source):
            yield f"cell {cell.id} says {found.group()}"


RULES = [
    checked_cells_have_outputs,
    pictures_have_alternative_text,
    headings_are_in_order,
    is_of_a_readable_size,
    opens_with_the_set_up_cell,
    opens_on_a_gpu_in_colab,
    asks_each_exercise_once,
    comes_back_to_predictions,
    gives_nothing_away,
    names_no_machine,
    widgets_have_a_static_twin,
    links_lead_somewhere,
    claims_come_after_the_last_section,
    is_finished,
]


# The notebooks of the repository. --------------------------------------------------------------------------------------


def test_every_chapter_has_its_notebook():
    assert [path.name for path in SOURCES] == [f"{n:02}_{name}.ipynb" for n, name in registry.CHAPTERS.items()]
    assert forms.orphans(ROOT) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_forms_belong_together_and_outputs_are_fresh(source):
    assert forms.check(source) == []


read_once = cache(forms.read)  # no rule changes a notebook


@pytest.mark.parametrize("student", [False, True], ids=["solutions", "student"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule, source, student):
    notebook = read_once(forms.student_path(source) if student else source)
    exercises = registry.exercises_of(int(source.name[:2]))
    lab = Lab(notebook, student, exercises, setup_cell.setup(repository(ROOT)), {path.name for path in SOURCES})
    assert list(rule(lab)) == []


# The rules themselves. -------------------------------------------------------------------------------------------------


def figure_output(alt: str = "a line") -> NotebookNode:
    return new_output("display_data", {"image/png": "aGk=", "text/plain": "Figure"}, metadata={"image/png": {"alt": alt}})


def good_lab() -> Lab:
    """A notebook, source form, that keeps to every rule."""
    exercise = SimpleNamespace(id="2.1", name="double", points=3, minutes=8, difficulty=2)
    facts = {"schema_version": 3, "task": False}
    answer = facts | {"grade_id": "answer-2-1", "solution": True, "grade": False, "locked": False}
    check = facts | {"grade_id": "check-2-1", "solution": False, "grade": True, "locked": True, "points": 3}
    slider = new_output("display_data", {"text/plain": "slider"}, metadata={"labs": {"widget": True}})
    solution = "def double(x):\n    ### BEGIN SOLUTION\n    return x + x\n    ### END SOLUTION"
    hidden = '### BEGIN HIDDEN TESTS\nscore("2.1")\n### END HIDDEN TESTS'
    cells = [
        new_markdown_cell(
            "# Good\nSee [the next](03_next.ipynb#top), [a paper](https://arxiv.org/abs/2210.17323).\n\n## First", id="title"
        ),
        new_code_cell(setup_cell.SETUP, id="setup", metadata={"tags": ["setup"]}),
        new_code_cell("guess = None  # your guess", id="guess", metadata={"tags": ["prediction"]}),
        new_markdown_cell("### 2.1 Double (8 minutes, difficulty 2 of 5)\n![a picture](attachment:a)", id="heading"),
        new_code_cell(solution, id="answer", metadata={"nbgrader": answer}),
        new_code_cell(f'double = check("2.1", double)\n{hidden}', id="check", metadata={"nbgrader": check}),
        new_code_cell("%time double(1)", id="use", metadata={"tags": ["nbval-check-output"]}),
        new_code_cell("slide()", id="slider", outputs=[slider]),
        new_markdown_cell("Where it starts:", id="between"),
        new_code_cell("plot()", id="figure", outputs=[figure_output()]),
        new_code_cell('revisit(guess, 3.0, "perplexity")', id="revisit"),
    ]
    cells += [new_markdown_cell("Prose.", id=f"prose-{i}") for i in range(30)]
    cells[3].source = cells[3].source.replace("attachment:a", "https://jupyter.org/a.png")
    code = [cell for cell in cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, 1):
        cell.execution_count = count
        cell.outputs = cell.outputs or [new_output("stream", text="printed\n")]
    notebook = new_notebook(cells=cells, metadata=deepcopy(setup_cell.METADATA))
    return Lab(notebook, False, (exercise,), setup_cell.SETUP, {"02_good.ipynb", "03_next.ipynb"})


def student_lab() -> Lab:
    lab = good_lab()
    notebook = forms.student_form(lab.notebook)
    for made, before in zip(notebook.cells, lab.notebook.cells, strict=True):
        if made.cell_type == "code":
            made.outputs, made.execution_count = deepcopy(before.outputs), before.execution_count
    return Lab(notebook, True, lab.exercises, lab.setup, lab.siblings)


@pytest.mark.parametrize("make", [good_lab, student_lab])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_breaks_no_rule(rule, make):
    assert list(rule(make())) == []


def edit(id: str, **fields: Any) -> Callable[[Lab], None]:
    return lambda lab: next(c for c in lab.notebook.cells if c.id == id).update(fields)


def mark(id: str, **metadata: Any) -> Callable[[Lab], None]:
    return lambda lab: next(c for c in lab.notebook.cells if c.id == id).metadata.update(metadata)


def grader(id: str, **facts: Any) -> Callable[[Lab], None]:
    return lambda lab: next(c for c in lab.notebook.cells if c.id == id).metadata.nbgrader.update(facts)


def says(id: str, text: str) -> Callable[[Lab], None]:
    return edit(id, outputs=[new_output("stream", text=text)])


def move(id: str, to: int) -> Callable[[Lab], None]:
    def change(lab: Lab) -> None:
        cells = lab.notebook.cells
        cells.insert(to, cells.pop(next(i for i, c in enumerate(cells) if c.id == id)))

    return change


def twice(id: str) -> Callable[[Lab], None]:
    def change(lab: Lab) -> None:
        lab.notebook.cells.append(deepcopy(next(c for c in lab.notebook.cells if c.id == id)))

    return change


LONG = "\n".join(["x = 1"] * 41)
BROKEN = [
    (checked_cells_have_outputs, edit("use", outputs=[])),
    (checked_cells_have_outputs, edit("use", execution_count=None)),
    (pictures_have_alternative_text, edit("figure", outputs=[figure_output("")])),
    (pictures_have_alternative_text, edit("figure", outputs=[new_output("display_data", {"image/png": "aGk="})])),
    (pictures_have_alternative_text, edit("title", source="![](https://jupyter.org/a.png)")),
    (pictures_have_alternative_text, edit("title", source='<img src="https://jupyter.org/a.png">')),
    (headings_are_in_order, edit("title", source="No title")),
    (headings_are_in_order, edit("title", source="# Title\n\n#### Deep")),
    (headings_are_in_order, edit("title", source="# Title\n\n# Another")),
    (is_of_a_readable_size, lambda lab: lab.notebook.cells.__delitem__(slice(-5, None))),
    (is_of_a_readable_size, lambda lab: lab.notebook.cells.extend([new_markdown_cell("x")] * 80)),
    (is_of_a_readable_size, edit("title", source="word " * 4001)),
    (is_of_a_readable_size, edit("use", source=LONG)),
    (is_of_a_readable_size, lambda lab: [cell.update(source="x = 1\n" * 9) for cell in lab.code]),
    (opens_with_the_set_up_cell, edit("setup", source="import torch")),
    (opens_with_the_set_up_cell, mark("setup", tags=[])),
    (opens_with_the_set_up_cell, mark("use", tags=["setup"])),
    (opens_with_the_set_up_cell, move("use", 1)),
    (opens_on_a_gpu_in_colab, lambda lab: lab.notebook.metadata.pop("accelerator")),
    (opens_on_a_gpu_in_colab, lambda lab: lab.notebook.metadata.colab.update(gpuType="")),
    (asks_each_exercise_once, edit("check", source="pass")),
    (asks_each_exercise_once, edit("use", source='double = check("2.1", double)')),
    (asks_each_exercise_once, edit("use", source='double = check("2.9", double)')),
    (asks_each_exercise_once, grader("check", points=1)),
    (asks_each_exercise_once, grader("check", locked=False)),
    (asks_each_exercise_once, grader("check", grade_id="check-2-2")),
    (asks_each_exercise_once, grader("answer", solution=False)),
    (asks_each_exercise_once, edit("answer", source="def single(x): return x")),
    (asks_each_exercise_once, edit("check", source='double = check("2.1", double)\nscore("2.1")')),
    (asks_each_exercise_once, edit("heading", source="### 2.1 Double (9 minutes, difficulty 2 of 5)")),
    (asks_each_exercise_once, edit("heading", source="### 2.1 Double (8 minutes, difficulty 3 of 5)")),
    (asks_each_exercise_once, edit("heading", source="### 2.11 Double (8 minutes, difficulty 2 of 5)")),
    (asks_each_exercise_once, edit("heading", source="### 2.1 Double")),
    (asks_each_exercise_once, twice("heading")),
    (asks_each_exercise_once, move("heading", 8)),
    (asks_each_exercise_once, move("answer", 8)),
    (comes_back_to_predictions, move("guess", 11)),
    (comes_back_to_predictions, edit("revisit", source="pass")),
    (comes_back_to_predictions, edit("revisit", source='revisit(other, 3.0, "perplexity")')),
    (comes_back_to_predictions, edit("guess", source="guess = 3")),
    (comes_back_to_predictions, mark("guess", tags=[])),
    (names_no_machine, says("use", "saved in /root/x\n")),
    (names_no_machine, says("use", "'/tmp/tmp3f/x'\n")),
    (names_no_machine, edit("title", source="Look in /home/me/course.")),
    (names_no_machine, says("use", "C:\\Users\\me\n")),
    (names_no_machine, says("use", "<function f at 0x7f3c2a1b4d30>\n")),
    (widgets_have_a_static_twin, edit("figure", outputs=[])),
    (widgets_have_a_static_twin, move("figure", 11)),
    (widgets_have_a_static_twin, edit("use", outputs=[new_output("display_data", {WIDGET: {"model_id": "x"}})])),
    (links_lead_somewhere, edit("title", source="[x](#)")),
    (links_lead_somewhere, edit("title", source="[x]()")),
    (links_lead_somewhere, edit("title", source="[x](url)")),
    (links_lead_somewhere, edit("title", source="[x](https://example.com/a)")),
    (links_lead_somewhere, edit("title", source="[x](https://...)")),
    (links_lead_somewhere, edit("title", source="[x](04_gone.ipynb)")),
    (links_lead_somewhere, edit("title", source="[x](../data/claims.yaml)")),
    (links_lead_somewhere, edit("title", source="See [1].\n\n[1]: 04_gone.ipynb")),
    (claims_come_after_the_last_section, edit("title", source="## Claims\n\n## 2.3 Another section")),
    (is_finished, edit("title", source="TODO: write")),
    (is_finished, edit("use", source="pass  # fixme")),
]
BROKEN_STUDENT = [
    (gives_nothing_away, lambda lab: edit("answer", source=good_lab().notebook.cells[4].source)(lab)),
    (gives_nothing_away, edit("answer", source="def double(x):\n    return x + x")),
    (gives_nothing_away, edit("use", source='score("2.1")')),
    (asks_each_exercise_once, edit("check", source='double = check("2.1", double)\nscore("2.1")')),
]


@pytest.mark.parametrize("number", range(len(BROKEN)), ids=lambda i: f"{i}-{BROKEN[i][0].__name__}")
def test_rule_notices(number):
    rule, change = BROKEN[number]
    lab = good_lab()
    change(lab)
    assert list(rule(lab)) != []


@pytest.mark.parametrize("number", range(len(BROKEN_STUDENT)), ids=lambda i: f"{i}-{BROKEN_STUDENT[i][0].__name__}")
def test_rule_notices_in_the_student_form(number):
    rule, change = BROKEN_STUDENT[number]
    lab = student_lab()
    change(lab)
    assert list(rule(lab)) != []


def test_every_rule_is_tried():
    assert {rule for rule, _ in BROKEN + BROKEN_STUDENT} == set(RULES)
