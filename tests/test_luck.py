"""Inputs leave no way to be right by luck: a reference with one constant or two sizes changed is refused on a seed of the check.

Every reference is taken as text. Each number in it is moved (a whole number by one either way, another by a tenth), each comparison
loses its equal case, and each pair of sizes or arguments is exchanged; what then still runs is judged on the seeds that a learner's
check uses. What is let through is listed below, each with the reason why it is the same function.
"""

import ast
import inspect
import textwrap

import pytest
import torch

from labsupport.exercises import registry
from labsupport.exercises.judging import INTERNAL
from labsupport.exercises.judging import test as judged
from labsupport.exercises.session import CHECK_SEEDS

pytestmark = pytest.mark.slow

EXERCISES = registry.all_exercises()
# Changes after which a reference is still right, by exercise: a part of "line -> changed line", and why.
STILL_RIGHT: dict[str, dict[str, str]] = {
    "1.5": {"<= 1 / 3": "no run uses a third exactly", ">= of_compute": "no run uses the same share of both"},
    "1.6": {"return (": "any product of about these sizes does"},
    "2.7": {"torch.linspace(": "any small values do", "torch.tensor([-": "any large value does"},
    "6.1": {"InputStatistics.empty(batches[": "all batches have the same channels"},
    "6.3": {"-h[column, others][:, None]": "a Hessian is symmetric"},
    "3.3": {"order.reshape(-1, group_size)": "there are as many groups as weights in a group"},
    "3.6": {
        "if left <": "no budget is below what the cheapest choices cost",
        **dict.fromkeys(("(extra > 1)", "(extra > -1)", "(extra >= 0)"), "every upgrade adds bytes"),
        **dict.fromkeys(("clamp(min=2)", "clamp(min=0)"), "every upgrade adds bytes"),
        "(extra < left)": "the budget need not be used up",
        "(saved > -1)": "what gains nothing is bought last", "(saved >= 0)": "what gains nothing is bought last",
    },
    "4.3": {'checks.number(threshold, "threshold"': "this refuses thresholds below 0, which nobody asks for"},
    "4.5": {"_two_columns(": "any column far above all thresholds, and any between two of them"},
    "4.6": {
        "torch.randn(2": "any noise of size 1 does",
        "(together - apart)": "any tolerance between float32's rounding and int8's",
        "apart, together = ": "one of two that are compared",
        "together, apart = (layer(a) +": "the same",
    },
    "8.1": {"if inputs.ndim == 0": "this refuses inputs without a channel or without a value, which nobody passes"},
    "11.4": dict.fromkeys(("other=1", "other=-1"), "rows that do not exist are not stored"),
    "11.5": {"max(0, ": "the ceiling of a positive number is 1 at least"},
    "12.3": {"update.abs() >= threshold": "no update is exactly as large as its threshold"},
    "12.5": {"low >= 0": "no interval ends at 0", "high <= 0": "no interval ends at 0"},
    "13.2": {"target = ": "any target nearer to one of two levels", "return ": "any weight that an update takes past the middle"},
    "14.6": {"high <= 0": "no interval ends at 0", "low >= 0": "no interval ends at 0"},
    "10.7": {
        "(reach < 13)": "any length that tells a whole range from a mixed one", "off.std()": "any limit between the kinds",
        "off.mean().abs()": "any limit between the kinds",
    },
}  # fmt: skip


class Change(ast.NodeTransformer):
    """Applies change number `wanted` of all that there are; counts them in `count`."""

    def __init__(self, wanted: int):
        self.wanted, self.count, self.line = wanted, 0, 0

    def _turn(self, node) -> bool:
        self.count += 1
        if self.count - 1 == self.wanted:
            self.line = getattr(node, "lineno", 0)
            return True
        return False

    def visit_Constant(self, node):
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            return node
        whole = isinstance(node.value, int)
        moved = (node.value + 1, node.value - 1) if whole else (node.value * 1.1 or 0.1, node.value * 0.9 or -0.1)
        for value in moved:
            if self._turn(node):
                return ast.copy_location(ast.Constant(value), node)
        return node

    def visit_Compare(self, node):
        self.generic_visit(node)
        other = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}.get(type(node.ops[0]))
        if other and self._turn(node):
            return ast.copy_location(ast.Compare(node.left, [other(), *node.ops[1:]], node.comparators), node)
        return node

    def visit_Tuple(self, node):
        """Sizes that are unpacked, `rows, columns = weight.shape`, or a shape that is built of two names."""
        self.generic_visit(node)
        if len(node.elts) == 2 and self._turn(node):
            return ast.copy_location(ast.Tuple(node.elts[::-1], node.ctx), node)
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in ("view", "reshape", "unflatten", "expand") and len(node.args) >= 2 and self._turn(node):
            return ast.copy_location(ast.Call(node.func, [*node.args[:-2], node.args[-1], node.args[-2]], node.keywords), node)
        if name in ("sum", "mean", "amax", "amin", "abs") and len(node.args) == 1 and isinstance(node.args[0], ast.Constant):
            return node  # an axis: moved as a constant
        return node


def source_of(function):
    return textwrap.dedent(inspect.getsource(function))


def changed(function):
    """Each changed form of a function, with the line that was changed."""
    source, number = source_of(function), 0
    while True:
        tree, change = ast.parse(source), Change(number)
        definition = tree.body[0]
        definition.decorator_list, definition.returns = [], None
        body = definition.body[1:] if ast.get_docstring(definition) else definition.body
        definition.body = [change.visit(statement) for statement in body]
        if change.count <= number:
            return
        names = dict(function.__globals__)
        exec(compile(ast.fix_missing_locations(tree), f"<change {number}>", "exec"), names)
        line = source.splitlines()[change.line - 1].strip()
        yield number, f"{line}  ->  {ast.unparse(_statement_at(definition, change.line))}", names[definition.name]
        number += 1


def _statement_at(definition, line):
    return next(
        (s for s in ast.walk(definition) if isinstance(s, ast.stmt) and getattr(s, "lineno", 0) == line), definition.body[-1]
    )


def has_source(exercise):
    function = exercise.reference
    return inspect.isfunction(function) and not function.__closure__ and source_of(function).lstrip().startswith("def ")


@pytest.mark.parametrize("exercise", [e for e in EXERCISES if has_source(e)], ids=lambda e: e.id)
def test_no_changed_reference_passes(exercise):
    seeds = CHECK_SEEDS[:1] if exercise.needs_model or not exercise.inputs(0) else CHECK_SEEDS
    lucky = []
    for _, what, answer in changed(exercise.reference):
        with torch.random.fork_rng():
            verdict, _ = judged(exercise, answer, seeds)
        assert INTERNAL not in verdict.message, f"{what}: {verdict.message}"
        if verdict.passed and not any(part in what for part in STILL_RIGHT.get(exercise.id, {})):
            lucky.append(what)
    assert not lucky, "\n".join(lucky)


def test_what_is_let_through_is_still_needed():
    """An entry whose exercise no longer has such a line is dropped."""
    for id, reasons in STILL_RIGHT.items():
        everything = [what for _, what, _ in changed(registry.get(id).reference)]
        for part, why in reasons.items():
            assert why
            assert any(part in what for what in everything), f"{id}: no change holds {part!r}"
