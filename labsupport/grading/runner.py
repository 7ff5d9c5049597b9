"""What runs in the sandbox: `python /bench/runner.py /task /inputs /out` runs each answer in a process of its own.

It is a file of a bench (bench.py) and imports nothing of the course but what lies there. /task/task.json holds the sources; /inputs
the inputs, by exercise and number; in /out it leaves for each exercise the attempts, `2.3-0.json` and .safetensors, and
`2.3.end.json`: how long it took and what ended it.

What an answer needs is found by names, as in a notebook but without its order: the statements of its own cell that set names which
the function uses, those of the learner's other cells, and the imports of the course's notebook. Prints, plots and tests are not
run, and what a needed statement raises costs nothing unless the name is missing afterwards.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import json
import linecache
import os
import random
import re
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

TIMED = re.compile(r"^([ \t]*)(?:# )?%time(?:it)?[ \t]+(?=[A-Za-z_(])", re.MULTILINE)
MAGIC = re.compile(r"^([ \t]*)(?:[%!?].*|[\w.]+\?{1,2}[ \t]*)$", re.MULTILINE)
ASSIGNED_MAGIC = re.compile(r"^([ \t]*\w+[ \t]*=[ \t]*)[%!].*$", re.MULTILINE)


# Cells ----------------------------------------------------------------------------------------------------------------
@dataclass
class Statement:
    """One statement at the top of a cell. binds: names that it sets. touches: names whose value it may change. uses: all names."""

    node: ast.stmt
    cell: Cell
    binds: set[str]
    touches: set[str]
    uses: set[str]

    @property
    def place(self) -> tuple[str, int, int]:
        return self.cell.file, self.node.lineno, self.node.col_offset

    @property
    def defines(self) -> bool:
        return isinstance(self.node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)

    @property
    def takes_all(self) -> bool:
        return isinstance(self.node, ast.ImportFrom) and any(alias.name == "*" for alias in self.node.names)

    @property
    def ours(self) -> bool:
        """Whether it imports the course, of which nothing is here."""
        if isinstance(self.node, ast.ImportFrom):
            return (self.node.module or "").split(".")[0] == "labsupport"
        return isinstance(self.node, ast.Import) and any(alias.name.split(".")[0] == "labsupport" for alias in self.node.names)


class Cell:
    """A cell's statements. Raises SyntaxError."""

    def __init__(self, text: str, file: str) -> None:
        text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
        self.file = file
        tree, self.text = _parsed(text)
        self.flags = 0
        self.statements = list[Statement]()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                self.flags |= __future__.annotations.compiler_flag
                continue
            uses = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            self.statements.append(Statement(node, self, _binds(node), _touches(node), uses))
        linecache.cache[file] = (len(self.text), None, [line + "\n" for line in self.text.splitlines()], file)

    def run(self, statement: Statement, names: dict[str, Any]) -> None:
        module = ast.Module([statement.node], [])
        exec(compile(module, self.file, "exec", self.flags, dont_inherit=True), names)


def _parsed(text: str) -> tuple[ast.Module, str]:
    """The tree, and the text that it was made of: without a notebook's commands (%time f() is f()) where there are any."""
    timed = TIMED.sub(r"\1", text)
    plain = MAGIC.sub(r"\1pass", ASSIGNED_MAGIC.sub(r"\1None", timed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for attempt in (timed, text, plain):
            try:
                return ast.parse(attempt), attempt
            except SyntaxError as error:
                first = error
        raise first


def _outside(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a statement does: not the bodies of functions."""
    yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
        return
    for part in ast.iter_child_nodes(node):
        yield from _outside(part)


def _binds(node: ast.stmt) -> set[str]:
    found = set()
    for part in _outside(node):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(part.name)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            found.add(part.id)
        elif isinstance(part, ast.alias):
            found.add((part.asname or part.name).split(".")[0])
    return found


def _touches(node: ast.stmt) -> set[str]:
    """x of `x.a = 1`, `x[0] = 1`, `x.append(1)` and `x += 1`."""
    found = set()
    for part in _outside(node):
        if isinstance(part, ast.Attribute | ast.Subscript) and isinstance(part.ctx, ast.Store):
            found.add(_root(part))
        elif isinstance(part, ast.Expr) and isinstance(part.value, ast.Call) and isinstance(part.value.func, ast.Attribute):
            found.add(_root(part.value.func))
    return found - {""}


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


class Sources:
    """All cells of a submission, and the imports of the course's notebook."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.answers, self.broken = dict[str, Cell](), dict[str, str]()
        for id, text in task["answers"].items():
            try:
                self.answers[id] = Cell(text, f"<answer {id}>")
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                line = f" (line {error.lineno} of the cell)" if isinstance(error, SyntaxError) and error.lineno else ""
                self.broken[id] = f"{type(error).__name__}: {getattr(error, 'msg', error)}{line}"
        self.others = list[Cell]()
        for number, text in enumerate(task["others"]):
            try:
                self.others.append(Cell(text, f"<cell {number}>"))
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
        self.setup = Cell(task["setup"], "<setup>")

    def needed(self, id: str, name: str) -> list[Statement]:
        """The statements that `name` needs, in the order in which they are to run."""
        own = self.answers[id]
        elsewhere = [*self.others, *(cell for key, cell in self.answers.items() if key != id)]
        order = {cell.file: place for place, cell in enumerate([self.setup, *elsewhere, own])}
        chosen = {s.place: s for s in own.statements if s.takes_all}
        last = max((s.place for s in own.statements if name in s.binds), default=("", 0, 0))
        known: set[str] = set()
        wanted = [name, *(use for s in chosen.values() for use in s.uses)]
        while wanted:
            name = wanted.pop()
            if name in known:
                continue
            known.add(name)
            for statement in self._setting(name, own, elsewhere, last):
                if statement.place not in chosen:
                    chosen[statement.place] = statement
                    wanted += statement.uses | statement.touches
        return sorted(chosen.values(), key=lambda s: (order[s.cell.file], s.place))

    def _setting(self, name: str, own: Cell, elsewhere: list[Cell], last: tuple[str, int, int]) -> list[Statement]:
        """Where a name comes from. A learner who calls a number `list` or `torch` somewhere means it there only.

        last: where the function is defined; after it, in its own cell, such a name is for what follows.
        """
        touching = [s for s in own.statements if name in s.touches]
        setup = [s for s in self.setup.statements if name in s.binds]
        known = hasattr(builtins, name) or any(not s.ours for s in setup)
        if mine := [s for s in own.statements if name in s.binds and (s.place <= last or s.defines or not known)]:
            return mine + touching
        theirs = [s for cell in elsewhere for s in cell.statements if name in s.binds]
        defined = [s for s in theirs if s.defines]
        if known:
            return (defined or [s for s in setup if not s.ours]) + touching
        if theirs := [s for s in theirs if not s.ours]:
            cells = {s.cell.file for s in theirs}
            return theirs + [s for cell in elsewhere if cell.file in cells for s in cell.statements if name in s.touches] + touching
        return setup + touching


def define(sources: Sources, id: str, name: str, names: dict[str, Any]) -> str:
    """Set the names with which an answer runs, in `names`. Returns what the last statement that failed raised, "" for none."""
    names["display"] = lambda *_, **__: None  # of Jupyter
    failed = ""
    statements = sources.needed(id, name)
    everything = [
        *sources.setup.statements,
        *(s for cell in sources.others for s in cell.statements),
        *sources.answers[id].statements,
    ]
    for chosen in (statements, everything):
        if name in names:
            break
        for statement in chosen:
            try:
                statement.cell.run(statement, names)
            except (Exception, SystemExit) as error:
                failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return failed


# One answer, in a process of its own ----------------------------------------------------------------------------------
def answer(sources: Sources, id: str, task: dict[str, Any], inputs: Path, out: Path, begin: Any) -> None:
    """Run an answer on each input and leave the attempts. begin(number) is called before each."""
    import torch
    import transport  # type: ignore[import-not-found]  # it lies beside this file

    from labsupport.exercises import attempts

    about = task["exercises"][id]
    if id in sources.broken:
        attempts.Attempt("raised", error=sources.broken[id]).save(out / f"{id}-0")
        return
    sys.modules["__main__"] = main = ModuleType("__main__")  # where dataclasses and pickle look for what a cell defines
    names = main.__dict__
    failed = define(sources, id, about["name"], names)
    if about["name"] not in names:
        error = f"{failed} (before {about['name']} was defined)" if failed else f"there is no {about['name']}"
        attempts.Attempt("raised", error=error).save(out / f"{id}-0")
        return
    drive = import_module(f"drives.e_{id.replace('.', '_')}").drive
    exercise: Any = SimpleNamespace(id=id, name=about["name"], returns=tuple(about["returns"]), drive=drive, reference=None)
    for number in range(about["inputs"]):
        begin(number)
        given = transport.read(inputs / f"{id}-{number}")
        torch.manual_seed(number)
        random.seed(number)
        tried = attempts.attempt(exercise, names[about["name"]], given)
        if tried.status == "blank" and "NotImplementedError" not in sources.answers[id].text:
            tried = attempts.Attempt("raised", error="NotImplementedError: it calls a function of yours that is still empty")
        if (size := _bytes(tried.outputs)) > about["output_bytes"]:
            error = f"its outputs take {size / 1e6:.1f} MB, more than the {about['output_bytes'] / 1e6:.1f} MB that are taken"
            tried = attempts.Attempt("returned", error=error)
        tried.save(out / f"{id}-{number}")
        if tried.status != "ran":
            return


def _bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(len(str(key)) + _bytes(part) for key, part in value.items())
    if isinstance(value, list):
        return sum(map(_bytes, value)) + 8 * len(value)
    return value.nbytes if hasattr(value, "nbytes") else len(value) if isinstance(value, str) else 8


def child(sources: Sources, id: str, task: dict[str, Any], inputs: Path, out: Path, told: int) -> None:
    """Never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _lower(resource.RLIMIT_DATA, task["memory_bytes"])
        _lower(resource.RLIMIT_CPU, int(task["answer_seconds"] * (task["exercises"][id]["inputs"] + 1)) + 1)
        answer(sources, id, task, inputs, out, lambda number: os.write(told, b"."))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, hard))


def run(sources: Sources, id: str, task: dict[str, Any], inputs: Path, out: Path) -> dict[str, Any]:
    """Run one answer to its end or its limit: seconds, and what ended it ("" for itself, "time", "signal N", "exit N")."""
    began = time.monotonic()
    hears, tells = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(hears)
        child(sources, id, task, inputs, out, tells)
    os.close(tells)
    ended, left, deadline = "", task["exercises"][id]["inputs"], began + task["answer_seconds"]
    while True:
        ready, _, _ = select.select([hears], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            ended = "time"
            break
        if not os.read(hears, 1):  # it is gone
            break
        if left:  # one more input; who pretends to have begun another gets no more time
            left, deadline = left - 1, time.monotonic() + task["answer_seconds"]
    os.close(hears)
    if ended:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(_waited(process, deadline))
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)  # what it left running
    if not ended and status:
        ended = f"signal {-status}" if status < 0 else f"exit {status}"
    return {"seconds": time.monotonic() - began, "ended": ended}


def _waited(process: int, deadline: float) -> int:
    """The status of a process that is ended when the deadline passes: it may have closed its end of the pipe and live on."""
    while True:
        gone, status = os.waitpid(process, os.WNOHANG)
        if gone:
            return status
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)


def main(task_folder: str, inputs: str, out: str) -> None:
    began = time.monotonic()
    task = json.loads(Path(task_folder, "task.json").read_text("utf-8"))
    import torch
    import transport  # noqa: F401  here, so that no answer waits for it

    from labsupport.exercises import attempts  # noqa: F401

    torch.set_num_threads(1)
    Path(out, "ready.json").write_text(json.dumps({"seconds": time.monotonic() - began}), "utf-8")
    sources = Sources(task)
    for id in task["exercises"]:
        ended = run(sources, id, task, Path(inputs), Path(out))
        Path(out, f"{id}.end.json").write_text(json.dumps(ended), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # torch takes its time to be taken down
