"""What of the course goes into the sandbox, made from its own source: what it takes to run an answer, and no answer.

    /bench/runner.py, transport.py                 as they are here
    /bench/drives/e_2_3.py                         how 2.3's answer is driven: `drive`, with the functions that it needs
    /bench/labsupport/                             a stand-in: every name can be imported, and every use raises one sentence
    /bench/labsupport/exercises/{attempts,compare}.py  as they are
    /bench/labsupport/quant/..., only for exercises of LENT: what the course hands to an answer, or drives it with

A drive takes from its chapter's file the names that it uses, and those that they use, down to constants and imports. So a bench
holds a reference or a known mistake only if a drive uses it, which a test refuses for every exercise.

The exercises of a lab share a bench, and its process. Those of APART are driven with something that would answer a neighbor's
question, and have one of their own.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from labsupport import PACKAGE
from labsupport.exercises.form import Exercise
from labsupport.grading import transport

# Modules of ours that a drive calls, or that inputs name, with what they import. Each is right only for the exercise beside it.
_GRID = ("quant.checks", "quant.grid", "quant.rtn")
_GPTQ = (*_GRID, "quant.products", "quant.gptq", "quant.gptq_fast", "quant.gptq_grids")
LENT: dict[str, tuple[str, ...]] = {
    "4.6": (*_GRID, "quant.int8"),  # the answer looks at layers in int8 from outside
    "7.2": _GPTQ,  # the answer is handed a solver, which here cannot put columns in order
    "7.8": _GPTQ,  # the same
    "8.4": _GRID,  # the answer is handed a quantizer
    "8.6": _GRID,
    "8.7": _GRID,
    "11.4": ("kernels.language",),  # the answer is written in it
    "12.6": _GPTQ,  # the answer is handed a solver
}
APART = ("4.6", "7.2", "7.8", "12.6")

# Lines of a lent module that would answer the exercise, and what stands in their place.
CUT: dict[tuple[str, str], dict[str, str]] = {
    ("7.2", "quant.gptq"): {
        "order = torch.argsort(diagonal, descending=True) if act_order else None": "order: torch.Tensor | None = None"
    },
}

PLAIN = ("exercises.attempts", "exercises.compare")  # of which nothing is an answer
MODULES = (*PLAIN, "exercises.form")  # from which a drive may import
STAND_IN = Path(__file__).with_name("stand_in.py")


class BenchError(Exception):
    """A drive leads to what must not be in a sandbox; the sentence says by which names."""


def groups(exercises: Sequence[Exercise]) -> list[tuple[Exercise, ...]]:
    """Exercises of one lab by the bench that they share."""
    together = tuple(e for e in exercises if e.id not in APART)
    return [group for group in (together, *((e,) for e in exercises if e.id in APART)) if group]


def build(folder: Path, exercises: Iterable[Exercise]) -> None:
    """Write the bench of these exercises into an empty folder. Raises BenchError."""
    for name, text in files(tuple(exercises)).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def files(exercises: tuple[Exercise, ...]) -> dict[str, str]:
    """Text of each file of a bench by its path. Raises BenchError."""
    here = Path(__file__).parent
    made = {name: (here / name).read_text("utf-8") for name in ("runner.py", "transport.py")}
    made["labsupport/__init__.py"] = STAND_IN.read_text("utf-8")
    made |= {_file(module): _text(module) for module in PLAIN}
    made["labsupport/exercises/form.py"] = _form()
    about = {}
    for exercise in exercises:
        if lost := [other.id for other in exercises if exercise.id in APART and other is not exercise]:
            raise BenchError(f"{exercise.id} must have a bench of its own, not one with {', '.join(lost)}")
        for module in LENT.get(exercise.id, ()):
            made[_file(module)] = _lent(exercise.id, module)
        for module, text in _classes(exercise):
            made[_file(module)] = text
        made[f"drives/e_{exercise.id.replace('.', '_')}.py"] = drive_source(exercise)
        about[exercise.id] = {"name": exercise.name, "returns": exercise.returns}
    made["exercises.json"] = json.dumps(about)
    for name in [*made]:
        for above in Path(name).parents:
            if above.parts[:1] == ("labsupport",) and (init := f"{above}/__init__.py") not in made:
                made[init] = "from labsupport import stand_in_for\n\n__getattr__ = stand_in_for(__name__)\n"
    return made


def _file(module: str) -> str:
    return f"labsupport/{module.replace('.', '/')}.py"


def _text(module: str) -> str:
    return (PACKAGE / f"{module.replace('.', '/')}.py").read_text("utf-8")


def _lent(exercise: str, module: str) -> str:
    text = _text(module)
    for before, after in CUT.get((exercise, module), {}).items():
        if before not in text:
            raise BenchError(f"{module} has no line {before!r} to cut for {exercise}")
        text = text.replace(before, after)
    return text


def _form() -> str:
    """Of form.py what a drive may use."""
    return _joined(_File(PACKAGE / "exercises" / "form.py").needed({"drive_cases"}, ()))


def _classes(exercise: Exercise) -> Iterator[tuple[str, str]]:
    """Modules with those classes and functions of the course that an exercise's inputs name, where they are not lent."""
    found: dict[str, set[str]] = {}
    for value in exercise.inputs(10_000).values():
        place = transport.place_of(value)
        if place is not None and place[0].removeprefix("labsupport.") not in LENT.get(exercise.id, ()):
            found.setdefault(place[0], set()).add(place[1])
    for module, names in found.items():
        name = module.removeprefix("labsupport.")
        yield name, _joined(_File(PACKAGE / f"{name.replace('.', '/')}.py").needed(names, LENT.get(exercise.id, ())))


# Drives ---------------------------------------------------------------------------------------------------------------
def drive_source(exercise: Exercise) -> str:
    """A module with `drive` in it, None where the answer is simply called. Raises BenchError."""
    if exercise.drive is None:
        return "drive = None\n"
    file = _File(Path(inspect.getsourcefile(exercise.drive) or ""))
    lent = LENT.get(exercise.id, ())
    name = exercise.drive.__name__
    if name != "<lambda>":
        return _joined(file.needed({name}, lent)) + ("" if name == "drive" else f"\ndrive = {name}\n")
    found = file.drive_of(exercise.id)
    return _joined([*file.needed(_used(found), lent), f"drive = {ast.unparse(found)}"])


def _joined(parts: Sequence[str]) -> str:
    return "from __future__ import annotations\n\n" + "\n\n".join(parts) + "\n"


def _used(node: ast.AST) -> set[str]:
    """Names that a piece of code reads or sets, but those of annotations, which are never evaluated."""
    found: set[str] = set()
    for part in ast.iter_child_nodes(node):
        if isinstance(node, ast.FunctionDef) and part is node.returns:
            continue
        if isinstance(node, ast.arg | ast.AnnAssign) and part is node.annotation:
            continue
        found |= {part.id} if isinstance(part, ast.Name) else _used(part)
    return found | ({node.id} if isinstance(node, ast.Name) else set())


class _File:
    """A file of ours, as pieces of text by the names that they set at its top."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text("utf-8")
        self.tree = ast.parse(self.text)
        self.pieces: list[tuple[ast.stmt, set[str]]] = [(piece, _sets(piece)) for piece in self.tree.body]

    def needed(self, names: set[str], lent: Sequence[str]) -> list[str]:
        """The pieces that `names` need, in their order. Raises BenchError for an import that is in no bench."""
        known: set[str] = set()
        wanted, chosen, foreign = set(names), set[int](), list[str]()
        while new := wanted - known:
            known |= new
            for index, (piece, sets) in enumerate(self.pieces):
                if not sets & new or index in chosen:
                    continue
                chosen.add(index)
                if not isinstance(piece, ast.Import | ast.ImportFrom):
                    wanted |= _used(piece)
        texts = list[str]()
        for index in sorted(chosen):
            piece = self.pieces[index][0]
            if isinstance(piece, ast.Import | ast.ImportFrom):
                texts += self._imports(piece, known, lent, foreign)
            else:
                texts.append(_source(self.text, piece))
        return [*foreign, *texts]

    def _imports(self, piece: ast.Import | ast.ImportFrom, known: set[str], lent: Sequence[str], foreign: list[str]) -> list[str]:
        """An import of the names that are used. A function of another file of ours comes with all that it needs."""
        module = piece.module or "" if isinstance(piece, ast.ImportFrom) else ""
        used = [alias for alias in piece.names if (alias.asname or alias.name).split(".")[0] in known]
        kept = []
        for alias in used:
            ours = f"{module}.{alias.name}" if module else alias.name
            if not ours.startswith("labsupport"):
                kept.append(alias)
                continue
            short = module.removeprefix("labsupport.")
            if short in MODULES or short in lent or ours.removeprefix("labsupport.") in lent:
                kept.append(alias)
            elif (path := PACKAGE / f"{short.replace('.', '/')}.py").is_file():
                foreign += _File(path).needed({alias.name}, lent)
            else:
                raise BenchError(f"{self.path.name} uses {ours}, which is in no bench")
        if not kept:
            return []
        copy: ast.stmt = ast.ImportFrom(module, kept, 0) if module else ast.Import(kept)
        return [ast.unparse(copy)]

    def drive_of(self, id: str) -> ast.Lambda:
        """The lambda that stands as `drive` of this exercise."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                named, drive = given.get("id"), given.get("drive")
                if isinstance(named, ast.Constant) and named.value == id and isinstance(drive, ast.Lambda):
                    return drive
        raise BenchError(f"the drive of {id} is neither a function nor a lambda in {self.path.name}")


def _sets(piece: ast.stmt) -> set[str]:
    if isinstance(piece, ast.FunctionDef | ast.ClassDef):
        return {piece.name}
    if isinstance(piece, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in piece.names}
    if isinstance(piece, ast.Assign):
        return {node.id for target in piece.targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    if isinstance(piece, ast.AnnAssign) and isinstance(piece.target, ast.Name):
        return {piece.target.id}
    if isinstance(piece, ast.Try):
        return {name for part in piece.body for name in _sets(part)}
    return set()


def _source(text: str, piece: ast.stmt) -> str:
    first = min([piece.lineno, *(d.lineno for d in getattr(piece, "decorator_list", []))])
    return "\n".join(text.splitlines()[first - 1 : piece.end_lineno])
