"""What goes into the sandbox: no answer is in it, inputs come back as they were, and an answer finds what it needs."""

import ast
import inspect
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch

pytest.importorskip("pydantic")

from labsupport.exercises.form import drive_cases
from labsupport.exercises.registry import CHAPTERS, all_exercises, exercises_of, get
from labsupport.grading import bench, runner, transport

# A seed of each kind: public ones, and one as large as secret ones are.
SEEDS = (0, 1, 12_345_678)
# Trees of answers so short that a drive or a lent function may hold them by chance.
SHORTEST = 25


def benches():
    return [group for lab in CHAPTERS for group in bench.groups(exercises_of(lab))]


def named(group):
    return " ".join(exercise.id for exercise in group)


def functions_of(answer):
    """Functions of ours that a known answer is made of."""
    if isinstance(answer, partial):
        return functions_of(answer.func) + [f for part in (*answer.args, *answer.keywords.values()) for f in functions_of(part)]
    if not inspect.isfunction(answer) or not answer.__module__.startswith("labsupport"):
        return []
    inner = [cell.cell_contents for cell in answer.__closure__ or ()]
    return [answer, *(f for part in inner if callable(part) for f in functions_of(part))]


def body_of(node):
    """A function's statements without its text for readers, names of arguments and all, as one text."""
    body = node.body if isinstance(node.body, list) else [node.body]
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return "\n".join(ast.dump(part) for part in body), sum(1 for part in body for _ in ast.walk(part))


def body_of_function(function):
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (SyntaxError, OSError):
        return None  # a lambda in the middle of an expression, or a text that was run
    return next((body_of(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)), None)


@pytest.mark.parametrize("group", benches(), ids=named)
def test_a_bench_holds_no_reference_and_no_mistake(group):
    texts = {name: text for name, text in bench.files(group).items() if name.endswith(".py")}
    trees = {name: compile(text, name, "exec", ast.PyCF_ONLY_AST) for name, text in texts.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    defined = {(node.name, *body_of(node)[:1]) for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    bodies = {body_of(node)[0] for node in nodes if isinstance(node, ast.FunctionDef | ast.Lambda)}
    for exercise in group:
        answers = [exercise.reference, *(mutant.answer for mutant in exercise.mutants)]
        for function in (f for answer in answers for f in functions_of(answer)):
            about = body_of_function(function)
            if about is None:
                continue
            assert (function.__name__, about[0]) not in defined, f"{exercise.id}: {function.__name__} is in the bench"
            assert about[1] < SHORTEST or about[0] not in bodies, f"{exercise.id}: the body of {function.__name__} is in the bench"


def test_the_comparison_finds_a_reference(monkeypatch):
    """The test above, shown a drive that leads to the reference."""
    monkeypatch.setitem(bench.LENT, "2.4", ("quant.checks", "quant.grid"))
    with pytest.raises(AssertionError, match=r"2\.4.*is in the bench"):
        test_a_bench_holds_no_reference_and_no_mistake((get("2.4"),))


@pytest.mark.parametrize("id", list(bench.LENT))
def test_what_is_lent_imports_nothing_else_of_the_course(id):
    for module in bench.LENT[id]:
        for node in ast.walk(ast.parse(bench._lent(id, module))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("labsupport."):
                names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                assert any(name.removeprefix("labsupport.") in bench.LENT[id] for name in names), ast.unparse(node)


def test_the_solver_that_is_lent_cannot_put_columns_in_order():
    text = bench.files((get("7.2"),))["labsupport/quant/gptq.py"]
    assert "order = torch.argsort" not in text
    assert "order: torch.Tensor | None = None" in text


def test_an_exercise_with_a_bench_of_its_own_shares_it_with_no_other():
    with pytest.raises(bench.BenchError, match=r"4\.6 must have a bench of its own, not one with 4\.1"):
        bench.files((get("4.1"), get("4.6")))


def test_a_drive_that_uses_what_is_in_no_bench_is_refused(monkeypatch):
    monkeypatch.setitem(bench.LENT, "7.8", ())
    with pytest.raises(bench.BenchError, match=r"who_listens\.py uses labsupport\.quant\.gptq, which is in no bench"):
        bench.drive_source(get("7.8"))


def test_a_bench_is_all_that_is_imported_of_the_course(tmp_path):
    """In a process without the repository: every drive, and every name that a notebook imports; a use raises one sentence."""
    bench.build(tmp_path, bench.groups(exercises_of(11))[0])
    program = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import drives.e_11_1, drives.e_11_2, drives.e_11_4
        from labsupport import claims, evaluate, figures, models, quantize_model, sweep, text
        from labsupport.exercises import check, revisit, score, tally
        from labsupport.quant import grid, rtn
        from labsupport.quant.kv import Part
        from labsupport.exercises.registry import get
        from labsupport.kernels import language
        import labsupport.quant.nf4 as nf4
        ours = [module for name, module in sys.modules.items() if name.startswith("labsupport") and module.__spec__.origin]
        assert ours and all(module.__file__.startswith(sys.argv[1]) for module in ours)
        assert language.tl is not None and check("2.1", 3) == 3 and score("2.1") == 0.0 and revisit(1, 2, "") is None
        uses = (lambda: grid.quantize(1), lambda: get("2.1"), lambda: nf4.quantize(1), lambda: Part("fp8"), lambda: 1 + Part)
        for use in uses:
            try:
                use()
            except Exception as error:
                assert "is not there where answers are marked: an answer may use its arguments" in str(error), error
            else:
                raise SystemExit("a stand-in was used")
    """
    ended = subprocess.run([sys.executable, "-I", "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


# Inputs as files ------------------------------------------------------------------------------------------------------
def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
        assert bits(a) == bits(b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key, other in zip(a, b, strict=True):
            same(key, other)
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    elif isinstance(a, torch.nn.Module):
        same(a.state_dict(), b.state_dict())
        same([p.requires_grad for p in a.parameters()], [p.requires_grad for p in b.parameters()])
    elif isinstance(a, float):
        assert a.hex() == b.hex()
    else:
        assert a == b


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist() if tensor.numel() else []


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_inputs_come_back_as_they_were(chapter, tmp_path):
    for exercise in exercises_of(chapter):
        for seed in SEEDS if not exercise.needs_model else SEEDS[:1]:
            given = exercise.inputs(seed)
            transport.write(given, tmp_path / "given")
            same(transport.read(tmp_path / "given"), given)


def test_values_of_every_kind_come_back(tmp_path):
    given = {
        "floats": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45]),
        "bytes": torch.arange(6, dtype=torch.uint8).reshape(2, 3).t(),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "whole": torch.tensor(3, dtype=torch.int16),
        "trained": torch.ones(2, requires_grad=True),
        "nested": ({1: [True, None, (2.5, "x")], "1": (), (3, 4): float("inf")}, []),
    }
    transport.write(given, tmp_path / "given")
    same(transport.read(tmp_path / "given"), given)


def test_what_has_no_form_as_data_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"given\['a'\]\[1\] is a object, which has no form as data"):
        transport.write({"given": {"a": [1, object()]}}, tmp_path / "given")
    with pytest.raises(TypeError, match=r"f is .*<lambda>.*, wanted a function or class at the top of a file"):
        transport.write({"f": lambda x: x}, tmp_path / "given")
    assert not list(tmp_path.iterdir())


# What an answer finds -------------------------------------------------------------------------------------------------
SETUP = "import torch\nfrom labsupport.quant import grid, rtn\nfrom labsupport.exercises import check"


def value_of(name, own, others=(), answers=None):
    """What a name is after its cell was looked through."""
    sources = runner.Sources({"answers": {"2.1": own, **(answers or {})}, "others": list(others), "setup": SETUP})
    names = {"__name__": "__main__"}
    runner.define(sources, "2.1", name, names)
    return names[name]


def needed(own, others=(), answers=None):
    sources = runner.Sources({"answers": {"2.1": own, **(answers or {})}, "others": list(others), "setup": SETUP})
    return [ast.unparse(statement.node).splitlines()[0] for statement in sources.needed("2.1", "f")]


@pytest.mark.parametrize(
    ("own", "others"),
    [
        ("def f(x):\n    return x + 1", []),
        ("score = 0.93\ndef f(x):\n    return x + 1\nprint(f(layer))\nassert f(1) == 3\nwhile True: pass", []),
        ("import missing_module\ndef f(x):\n    return x + 1", []),
        ("def f(x):\r\n    return x + 1\r\n", []),
        ("f = lambda x: x + 1", []),
        ("%time print(3)\n!pip install x\n?f\ndef f(x):\n    return x + 1\nf?", []),
        ("%%time\ndef f(x):\n    return x + 1", []),
        ("def f(x):\n    %time y = x + 1\n    return y", []),
        ("files = !ls\ndef f(x):\n    return x + 1", []),
        ("def f(x):\n    return x + ONE", ["ONE = 1"]),
        ("def f(x):\n    return g(x)", ["def g(x):\n    return h(x)", "broken (", "def h(x):\n    return x + 1"]),
        ("def f(x):\n    return list([x + 1])[0]", ["list = [1, 2]\ncheck = 5"]),
        ("def f(x):\n    return (torch.tensor(x) + 1).item()", ["torch = 3"]),
        ("def f(x):\n    return list([x + 1])[0]\nlist = [f(1)]\ntorch = 3", []),
        ("max = 1\ndef f(x):\n    return x + max", []),
        ("def f(x):\n    return x + ONE\nONE = 1", []),
        ("def f(x):\n    return rtn(x)", ["def rtn(x):\n    return x + 1"]),
        ("table = {}\ntable['one'] = 1\ndef f(x):\n    return x + table['one']", []),
        ("steps = []\nsteps.append(1)\ndef f(x):\n    return x + steps[0]", []),
        ("from math import *\ndef f(x):\n    return x + floor(1.5)", []),
        ("def f(x):\n    return x\ndef f(x):\n    return x + 1", []),
        ("def f(x):\n    return x + 1\nraise SystemExit", []),
        ("exec('def f(x): return x + 1')", []),
        ("if True:\n    def f(x):\n        return x + 1", []),
        ("from functools import cache\n@cache\ndef f(x):\n    return x + 1", []),
        ("def f(x: 'Tensor') -> 'Tensor':\n    return x + 1", []),
        ("from __future__ import annotations\ndef f(x: Unknown):\n    return x + 1", []),
        ("\ufeffdef f(x):\n    return x + 1", []),
    ],
)
def test_an_honest_oddity_is_found_as_the_plain_answer_is(own, others):
    assert value_of("f", own, others)(1) == 2


def test_only_what_is_needed_is_run():
    assert needed("A = 1\nB = A\nC = 5\nprint(B)\ndef f(x):\n    return B") == ["A = 1", "B = A", "def f(x):"]
    assert needed("def f(x):\n    return torch.ones(x)") == ["import torch", "def f(x):"]
    assert needed("def f(x):\n    return rtn.quantize(x)") == [
        "from labsupport.quant import grid, rtn",
        "def f(x):",
    ]


def test_other_answers_count_as_the_learners_own_helpers():
    assert value_of("f", "def f(x):\n    return scale(x)", answers={"2.2": "def scale(x):\n    return x + 1"})(1) == 2


def test_the_own_cell_comes_before_others():
    assert value_of("f", "def g(x):\n    return x + 1\ndef f(x):\n    return g(x)", ["def g(x):\n    return 0"])(1) == 2


def test_a_cell_that_is_no_python_is_named_with_its_line():
    sources = runner.Sources({"answers": {"2.1": "def f(x):\n    return (x"}, "others": [], "setup": ""})
    assert sources.broken["2.1"] == "SyntaxError: '(' was never closed (line 2 of the cell)"


def test_cases_are_driven_by_the_same_function():
    assert bench.drive_source(get("1.3")).startswith("from __future__ import annotations\n\ndef drive_cases")
    assert drive_cases
    assert all(compile(bench.drive_source(exercise), exercise.id, "exec") for exercise in all_exercises())
