"""Chapter 7: what turns the column loop into a tool: blocks, order, groups, damping, and the text that it looks at."""

from __future__ import annotations

from collections.abc import Callable

import torch

from labsupport.exercises.base import Exercise, Mutant, Verdict, generator, right, shape_fault, wrong
from labsupport.quant import gptq, grid, rtn

CONDITION = 100.0  # Hessians of these exercises are no worse, so that float32 is enough for whatever way an answer takes
UNDECIDED = 5e-4  # of a step: no weight comes this near to the middle of two levels on its way through the loop


def _hessian(columns: int, g: torch.Generator, own: float = 1.6) -> torch.Tensor:
    """2/n X^T X of channels that share directions and are not equally loud, float32, with a condition below CONDITION.

    own: how much each channel says on its own, beside what it shares.
    """
    while True:
        shared = torch.randn(99, 3, generator=g) @ torch.randn(3, columns, generator=g)
        x = (shared + own * torch.randn(99, columns, generator=g)) * (0.8 + 0.7 * torch.rand(columns, generator=g))
        hessian = x.T @ x * (2 / len(x))
        if torch.linalg.cond(hessian) < CONDITION:
            return hessian


# 7.1 ------------------------------------------------------------------------------------------------------------------


def block_inputs(seed: int) -> dict:
    """Five rows, 22 columns in blocks of 8, so that the last one is short; no weight on its way near the middle of two levels.

    Every wrong way gives codes of its own.
    """
    g = generator(seed)
    while True:
        weight, hessian = torch.randn(5, 22, generator=g), _hessian(22, g, own=1.2)
        factor = gptq.autogptq_factor(hessian)
        scale, zero_point = grid.scale_and_zero_point(weight, 3)
        given = {"weight": weight, "factor": factor, "scale": scale, "zero_point": zero_point, "bits": 3, "block_size": 8}
        ways = [_blocks(*given.values(), **rule) for rule in ({}, *BLOCK_RULES.values())]
        if _nearest_tie(given) > UNDECIDED and len({codes.numpy().tobytes() for codes in ways}) == len(ways):
            return given


def solve_blocks(
    weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int, block_size: int
) -> tuple[torch.Tensor, int]:
    """labsupport's codes, from the Hessian that `factor` belongs to; and how many weights the updates of two levels write."""
    root = torch.linalg.inv(factor.double())
    hessian = (root @ root.T).float()
    q = gptq.quantize(weight, hessian, bits, None, damping=0, block_size=block_size, scale_dtype=torch.float32)
    return q.codes.float(), _writes(*weight.shape, block_size)


def _writes(rows: int, columns: int, block_size: int) -> int:
    """Inside each block a column writes to those after it; after a block all that is left is written once."""
    total = 0
    for first in range(0, columns, block_size):
        size = min(block_size, columns - first)
        total += size * (size - 1) // 2 + columns - first - size
    return rows * total


def _blocks(
    weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int, block_size: int,
    reach: str = "block", lazy: str = "all", divide: bool = True, sign: int = -1, original: bool = False, tail: bool = True,
    ties: list | None = None,
) -> torch.Tensor:  # fmt: skip
    """The blocked loop, plainly, and ways to get it wrong."""
    work, columns = weight.clone(), weight.shape[1]
    codes, error = torch.zeros_like(weight), torch.zeros_like(weight)
    for first in range(0, columns if tail else columns // block_size * block_size, block_size):
        last = min(first + block_size, columns)
        for i in range(first, last):
            q = grid.quantize(work[:, i : i + 1], scale, zero_point, bits)
            if ties is not None:
                steps = work[:, i : i + 1] / scale
                ties.append((steps - steps.floor() - 0.5).abs().min().item())
            before = weight if original else work
            error[:, i : i + 1] = before[:, i : i + 1] - grid.dequantize(q, scale, zero_point)
            if divide:
                error[:, i] /= factor[i, i]
            codes[:, i] = q[:, 0]
            end = last if reach == "block" else columns
            work[:, i + 1 : end] += sign * error[:, i : i + 1] * factor[i, i + 1 : end]
        if lazy == "all":
            work[:, last:] += sign * error[:, first:last] @ factor[first:last, last:]
        elif lazy == "last column":
            work[:, last:] += sign * error[:, last - 1 : last] * factor[last - 1, last:]
        elif lazy == "next block":
            end = min(last + block_size, columns)
            work[:, last:end] += sign * error[:, first:last] @ factor[first:last, last:end]
    return codes


def _nearest_tie(given: dict) -> float:
    ties: list[float] = []
    _blocks(*given.values(), ties=ties)
    return min(ties)


BLOCK_RULES: dict[str, dict] = {
    "columns after a block never hear of it: each block is solved as if it came first. After its last column, subtract the block's "
    "errors times its rows of the factor from everything behind it": {"lazy": "none"},
    "columns behind the block are updated twice, by each column at once and by the block again: inside a block, stop at its end": {
        "reach": "row"
    },
    "only the last column of a block is subtracted from what is behind it: wanted all of its errors, as one matrix product": {
        "lazy": "last column"
    },
    "a block is subtracted from the next block alone: everything behind it answers to it": {"lazy": "next block"},
    "the error is not divided by the factor's diagonal": {"divide": False},
    "the error is added where it must be subtracted: later columns make the error larger": {"sign": 1},
    "the error is taken against the weight as it came, not as the columns before it have left it": {"original": True},
    "the last block, which is shorter, was left out": {"tail": False},
}


def judge_blocks(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    codes = got["codes"].float()
    if not torch.equal(codes, codes.round()):
        return wrong("codes are whole numbers, these are not: return the codes, not the values that they stand for")
    if not torch.equal(codes, want["codes"]):
        for said, rule in BLOCK_RULES.items():
            if torch.equal(codes, _blocks(*given.values(), **rule)):
                return wrong(said)
        if torch.equal(codes, grid.quantize(given["weight"], given["scale"], given["zero_point"], given["bits"])):
            return wrong("this is rounding to nearest: no update reaches a later column. Row i of the factor says how they answer")
        column = int((codes != want["codes"]).any(0).nonzero()[0])
        return wrong(
            f"column {column} is the first with a wrong code; blocks start at every {given['block_size']}th. Right up to there"
        )
    rows, columns = given["weight"].shape
    wanted, writes = want["writes"], got["writes"]
    # An update may include the column that was just rounded, as AutoGPTQ's does: one more write for every weight.
    slack = rows * columns
    if wanted <= writes <= wanted + slack:
        return right()
    eager = rows * columns * (columns - 1) // 2
    if eager <= writes <= eager + slack:
        return wrong(f"codes are right, and {writes} writes are those of updating all later columns after every column. Be lazy")
    if wanted <= writes * rows <= wanted + slack:
        return wrong(f"writes is {writes}, which counts columns: an update writes a weight in each of the {rows} rows")
    return wrong(f"codes are right; writes is {writes}, wanted {wanted}: rows times columns of every slice that is updated")


def _eager(weight, factor, scale, zero_point, bits, block_size):
    columns = weight.shape[1]
    return _blocks(weight, factor, scale, zero_point, bits, columns), len(weight) * columns * (columns - 1) // 2


def _with_writes(count: Callable[[int], int] = lambda n: n, **rule):
    def answer(weight, factor, scale, zero_point, bits, block_size):
        codes = _blocks(weight, factor, scale, zero_point, bits, block_size, **rule)
        return codes, count(_writes(*weight.shape, block_size))

    return answer


def _values(weight, factor, scale, zero_point, bits, block_size):
    codes = _blocks(weight, factor, scale, zero_point, bits, block_size)
    return grid.dequantize(codes, scale, zero_point), _writes(*weight.shape, block_size)


def _transposed(weight, factor, scale, zero_point, bits, block_size):
    return _blocks(weight, factor.T, scale, zero_point, bits, block_size), _writes(*weight.shape, block_size)


SOLVE_BLOCKS = Exercise(
    id="7.1", name="solve_blocks", title="Lazy updates", minutes=20, difficulty=4, points=5,
    returns=("codes", "writes"), inputs=block_inputs, reference=solve_blocks, judge=judge_blocks,
    mutants=(
        *(Mutant(_with_writes(**rule), said[:45]) for said, rule in BLOCK_RULES.items()),
        Mutant(_eager, "Be lazy"),
        Mutant(_with_writes(lambda n: n // 5), "counts columns"),
        Mutant(_with_writes(lambda n: 3 * n), "rows times columns"),
        Mutant(_values, "not the values"),
        Mutant(_transposed, "rounding to nearest"),
    ),
)  # fmt: skip


# 7.2 ------------------------------------------------------------------------------------------------------------------

ORDER_BITS = 3


def order_inputs(seed: int) -> dict:
    """Six rows, ten columns; the order by H's diagonal is not its own inverse, nor that of the weights' sizes."""
    g = generator(seed)
    while True:
        weight, hessian = torch.randn(6, 10, generator=g), _hessian(10, g, own=0.9)
        order = hessian.diagonal().argsort(descending=True)
        steady = len({_ordered(weight, hessian, damping).numpy().tobytes() for damping in (0.0099, 0.01, 0.0101)}) == 1
        orders = [order, order.argsort(), order.flip(0), _by_weight(weight), torch.arange(10)]
        different = len({tuple(o.tolist()) for o in orders}) == len(orders)
        wrong_ways = [_undo(weight, hessian, back) for back in BACK.values()]
        wrong_ways += [_solve(weight[:, o], hessian[o][:, o])[:, o.argsort()] for o in orders[1:]]
        wrong_ways += [_solve(weight[:, order], hessian)[:, orders[1]], _solve(weight, hessian[order][:, order])[:, orders[1]]]
        if steady and different and not any(torch.equal(_undo(weight, hessian), way) for way in wrong_ways):
            return {"weight": weight, "hessian": hessian}


def _by_weight(weight: torch.Tensor) -> torch.Tensor:
    return weight.pow(2).sum(0).argsort(descending=True)


def _solve(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """GPTQ from the left to the right, one grid a row. What no Hessian could be is no error here: then it rounds."""
    try:
        return gptq.quantize(weight, hessian, ORDER_BITS, None).dequantize()
    except ValueError:
        return rtn.quantize(weight, ORDER_BITS, None).dequantize()


def _ordered(weight: torch.Tensor, hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return gptq.quantize(weight, hessian, ORDER_BITS, None, act_order=True, damping=damping).dequantize()


def solve_in_order(weight: torch.Tensor, hessian: torch.Tensor, solve: Callable) -> torch.Tensor:
    """labsupport's act_order. It has a loop of its own and does not call `solve`."""
    return _ordered(weight, hessian)


def drive_order(answer: Callable, given: dict) -> dict:
    """The answer's values, and what it passed to `solve` at its last call."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def solve(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        calls.append((weight.clone(), hessian.clone()))
        return _solve(weight, hessian)

    values = answer(given["weight"], given["hessian"], solve)
    weight, hessian = calls[-1] if calls else (torch.zeros(0), torch.zeros(0))
    return {"values": values, "solved_weight": weight, "solved_hessian": hessian}


# Ways to bring the solution into another order that is not the weight's.
BACK: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "the result is still in the order in which it was solved: column 0 holds the loudest column. Permute it back": lambda v, o: v,
    "the result was permuted by `order` once more. Back leads its inverse, argsort(order)": lambda v, o: v[:, o],
}


def _undo(weight: torch.Tensor, hessian: torch.Tensor, back: Callable | None = None) -> torch.Tensor:
    order = hessian.diagonal().argsort(descending=True)
    solved = _solve(weight[:, order], hessian[order][:, order])
    return solved[:, order.argsort()] if back is None else back(solved, order)


def judge_order(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault({"values": got["values"]}, {"values": want["values"]}):
        return wrong(fault)
    if torch.equal(got["values"], want["values"]):
        return right()
    weight, hessian = given.values()
    order = hessian.diagonal().argsort(descending=True)
    solved_weight, solved_hessian = got["solved_weight"], got["solved_hessian"]
    if not solved_weight.numel():
        return wrong("solve was never called, and the values are not those of act-order")
    seen_as = {
        "hessian went into solve with its rows permuted and its columns not: index both axes, hessian[order][:, order]": (
            hessian[order]
        ),
        "hessian went into solve with its columns permuted and its rows not: index both axes, hessian[order][:, order]": (
            hessian[:, order]
        ),
    }
    for said, matrix in seen_as.items():
        if torch.equal(solved_hessian, matrix):
            return wrong(said)
    weight_moved, hessian_moved = not torch.equal(solved_weight, weight), not torch.equal(solved_hessian, hessian)
    if not weight_moved and not hessian_moved:
        return wrong("solve was given weight and hessian as they came: this is column order")
    if not hessian_moved:
        return wrong("the columns of weight are permuted and hessian is not: each column meets the statistics of another")
    if not weight_moved:
        return wrong("hessian is permuted and weight is not: each column meets the statistics of another")
    orders = {
        "the quietest column goes first: argsort ascends unless told descending=True": order.flip(0),
        "weight and hessian are permuted by the inverse of the order: argsort says which column goes first": order.argsort(),
        "columns are ordered by the size of their weights: the order is that of hessian's diagonal": _by_weight(weight),
    }
    for said, other in orders.items():
        if torch.equal(solved_weight, weight[:, other]):
            return wrong(said)
    for said, back in BACK.items():
        if torch.equal(got["values"], _undo(weight, hessian, back)):
            return wrong(said)
    if torch.equal(solved_weight, weight[:, order]) and torch.equal(solved_hessian, hessian[order][:, order]):
        return wrong("solve was given the right columns and Hessian, but what came back is not in the weight's order")
    return wrong("weight and hessian went into solve in an order that is not that of hessian's diagonal, largest first")


def _order_answer(order=lambda w, h: h.diagonal().argsort(descending=True), weight=None, hessian=None, back=None):
    def answer(w, h, solve):
        o = order(w, h)
        solved = solve(w[:, o] if weight is None else weight(w, o), h[o][:, o] if hessian is None else hessian(h, o))
        return solved[:, o.argsort()] if back is None else back(solved, o)

    return answer


SOLVE_IN_ORDER = Exercise(
    id="7.2", name="solve_in_order", title="The loudest column first", minutes=12, difficulty=3, points=4,
    returns=("values",), inputs=order_inputs, reference=solve_in_order, judge=judge_order, drive=drive_order,
    mutants=(
        *(Mutant(_order_answer(back=back), said[:35]) for said, back in BACK.items()),
        Mutant(_order_answer(hessian=lambda h, o: h[o]), "rows permuted and its columns not"),
        Mutant(_order_answer(hessian=lambda h, o: h[:, o]), "columns permuted and its rows not"),
        Mutant(_order_answer(hessian=lambda h, o: h), "hessian is not: each column"),
        Mutant(_order_answer(weight=lambda w, o: w), "weight is not: each column"),
        Mutant(_order_answer(order=lambda w, h: h.diagonal().argsort()), "descending=True"),
        Mutant(_order_answer(order=lambda w, h: h.diagonal().argsort(descending=True).argsort()), "inverse of the order"),
        Mutant(_order_answer(order=lambda w, h: _by_weight(w)), "size of their weights"),
        Mutant(lambda w, h, solve: solve(w, h), "this is column order"),
        Mutant(lambda w, h, solve: w, "never called"),
    ),
)  # fmt: skip


# 7.3 ------------------------------------------------------------------------------------------------------------------


def scatter_inputs(seed: int) -> dict:
    """Loudness of 24 columns in groups of 6, or of 20 in groups of 4; every wrong answer differs from the right one."""
    g = generator(seed)
    while True:
        columns, size = (24, 6) if seed % 2 else (20, 4)
        given = {"diagonal": torch.rand(columns, generator=g) + 0.1, "group_size": size}
        answer = _scatter(**given)
        loads = _loads(answer)
        others = [rule(**given) for rule in SCATTER_MISTAKES.values()]
        counts = {loads, loads - 1, columns, columns // size, len(_scatter(**given).unique())}
        if not any(torch.equal(answer, other) for other in others) and len(counts) == 4:
            return given


def groups_in_order(diagonal: torch.Tensor, group_size: int) -> tuple[torch.Tensor, int]:
    """labsupport's g_idx of a layer with this diagonal, quantized with act_order."""
    weight = torch.linspace(-1, 1, len(diagonal))[None]
    found = gptq.quantize(weight, diagonal.diag(), group_size=group_size, act_order=True).g_idx.long()
    return found, _loads(found)


def _scatter(diagonal: torch.Tensor, group_size: int) -> torch.Tensor:
    return diagonal.argsort(descending=True).argsort() // group_size


def _loads(groups: torch.Tensor) -> int:
    return 1 + int((groups[1:] != groups[:-1]).sum())


SCATTER_MISTAKES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "order // group_size is not it: order[i] is the column whose turn is i. Wanted the turn of each column, the inverse": (
        lambda diagonal, group_size: diagonal.argsort(descending=True) // group_size
    ),
    "these are groups of neighbors, as without act-order. A group is filled by the columns that follow each other in the loop": (
        lambda diagonal, group_size: torch.arange(len(diagonal)) // group_size
    ),
    "the quietest columns are in group 0: argsort ascends unless told descending=True": (
        lambda diagonal, group_size: diagonal.argsort().argsort() // group_size
    ),
    "this is each column's turn, not yet its group: divide by group_size": (
        lambda diagonal, group_size: diagonal.argsort(descending=True).argsort()
    ),
    "columns are dealt to the groups like cards: a turn modulo the number of groups. Whoever follows each other shares a grid": (
        lambda diagonal, group_size: diagonal.argsort(descending=True).argsort() % (len(diagonal) // group_size)
    ),
}


def judge_scatter(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    groups = got["g_idx"]
    if groups.is_floating_point():
        return wrong("g_idx holds decimal numbers: a group is a whole number, // and not /")
    if not torch.equal(groups.long(), want["g_idx"]):
        for said, mistake in SCATTER_MISTAKES.items():
            if torch.equal(groups.long(), mistake(**given)):
                return wrong(said)
        place = int((groups != want["g_idx"]).nonzero()[0])
        turn = int(given["diagonal"].argsort(descending=True).argsort()[place])
        return wrong(f"column {place} is in group {int(groups[place])}, wanted {int(want['g_idx'][place])}: its turn is {turn}")
    loads, wanted = got["loads"], want["loads"]
    if loads == wanted:
        return right()
    if loads == wanted - 1:
        return wrong(f"loads is {loads}, wanted {wanted}: the grid of the first column has to be loaded as well")
    if loads == len(want["g_idx"].unique()):
        return wrong(f"loads is {loads}, the number of groups: whoever reads columns from left to right comes back to a group")
    return wrong(f"loads is {loads}, wanted {wanted}: one, and one for each column whose left neighbor is in another group")


def _scatter_answer(rule=_scatter, loads=_loads):
    def answer(diagonal, group_size):
        groups = rule(diagonal, group_size)
        return groups, loads(groups)

    return answer


GROUPS_IN_ORDER = Exercise(
    id="7.3", name="groups_in_order", title="Where did my group go?", minutes=10, difficulty=3, points=3,
    returns=("g_idx", "loads"), inputs=scatter_inputs, reference=groups_in_order, judge=judge_scatter,
    mutants=(
        *(Mutant(_scatter_answer(rule), said[:35]) for said, rule in SCATTER_MISTAKES.items()),
        Mutant(_scatter_answer(lambda d, g: d.argsort(descending=True).argsort() / g), "decimal"),
        Mutant(_scatter_answer(loads=lambda groups: _loads(groups) - 1), "first column"),
        Mutant(_scatter_answer(loads=lambda groups: len(groups.unique())), "the number of groups"),
        Mutant(_scatter_answer(loads=len), "left neighbor"),
        Mutant(_scatter_answer(lambda d, g: _scatter(d, g).flip(0)), "its turn is"),
    ),
)  # fmt: skip


# 7.4 ------------------------------------------------------------------------------------------------------------------


def prepare_inputs(seed: int) -> dict:
    """Seven rows, nine columns of which two were never fed and have the largest weights. The mean of H's diagonal is far from 1."""
    g = generator(seed)
    x = torch.randn(30, 3, generator=g) @ torch.randn(3, 9, generator=g) + 0.5 * torch.randn(30, 9, generator=g) + 0.8
    dead = torch.randperm(9, generator=g)[:2]
    weight = torch.randn(7, 9, generator=g)
    weight[:, dead] = 4.0
    x[:, dead] = 0
    hessian = 2 / len(x) * x.T @ x
    return {"weight": weight, "hessian": hessian * (30 / hessian.diagonal().mean()), "damping": (0.01, 0.1)[seed % 2]}


def prepare(weight: torch.Tensor, hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """labsupport's rules, and the matrix that it factorizes."""
    dead = hessian.diagonal() == 0
    diagonal = gptq.damped(hessian.diagonal().masked_fill(dead, 1), damping)
    return weight.masked_fill(dead, 0), hessian.diagonal_scatter(diagonal)


def _prepared(
    weight: torch.Tensor, hessian: torch.Tensor, damping: float, add=None, dead_first: bool = True, ones: bool = True,
    zeros: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The same, plainly, and ways to get it wrong. add(hessian, damping): what is added, [in, in]."""
    dead, raw = hessian.diagonal() == 0, hessian
    filled = hessian + dead.diag().float() if ones else hessian
    seen = filled if dead_first else raw
    added = add(seen, damping) if add else damping * seen.diagonal().mean() * torch.eye(len(seen))
    return weight.masked_fill(dead, 0) if zeros else weight.clone(), filled + added


PREPARE_RULES: dict[str, dict] = {
    "damping itself was added to the diagonal: the same 0.01 is a lot for quiet inputs and nothing for loud ones. It is a share "
    "of the mean of the diagonal": {"add": lambda h, d: d * torch.eye(len(h))},
    "the mean is that of all entries of the Hessian, negative ones included: wanted that of its diagonal": {
        "add": lambda h, d: d * h.mean() * torch.eye(len(h))
    },
    "the sum of the diagonal was taken, not its mean": {"add": lambda h, d: d * h.trace() * torch.eye(len(h))},
    "the largest of the diagonal was taken, not the mean": {"add": lambda h, d: d * h.diagonal().max() * torch.eye(len(h))},
    "each entry of the diagonal grew by its own share: the quiet columns, which need damping most, get least of it. Add the same "
    "to all": {"add": lambda h, d: d * h.diagonal().diag()},
    "the number was added to every entry, not to the diagonal alone: H + number does that": {
        "add": lambda h, d: d * h.diagonal().mean() * torch.ones_like(h)
    },
    "the mean was taken before the columns that were never fed got their 1: those first, then damping, as AutoGPTQ does": {
        "dead_first": False
    },
    "a column that was never fed keeps its 0 on the diagonal (under the damping): put 1 there first": {"ones": False},
}


def judge_prepare(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    weight, hessian, damping = given.values()
    dead = hessian.diagonal() == 0
    unit = damping * want["hessian"].diagonal().mean().item()
    # A mean of 9 float32 numbers, times a float, added: some ten roundings of the largest entry.
    allowed = 10 * 2.0**-24 * want["hessian"].abs().max().item()
    off = (got["hessian"].double() - want["hessian"].double()).abs().max().item()
    if off > allowed:
        for said, rule in PREPARE_RULES.items():
            if torch.allclose(got["hessian"].float(), _prepared(weight, hessian, damping, **rule)[1], rtol=0, atol=4 * allowed):
                return wrong(said)
        if torch.allclose(got["hessian"].float(), _prepared(weight, hessian, 0.0)[1], rtol=0, atol=4 * allowed):
            return wrong("nothing was added to the diagonal")
        i, j = divmod(int((got["hessian"] - want["hessian"]).abs().argmax()), len(hessian))
        return wrong(f"entry ({i}, {j}) is {got['hessian'][i, j].item():.5g}, wanted {want['hessian'][i, j].item():.5g} "
                     f"(damping comes to {unit:.3g})")  # fmt: skip
    if torch.equal(got["weight"], want["weight"]):
        return right(off, allowed)
    if torch.equal(got["weight"], weight):
        return wrong("weights that meet no input keep their size, and the grid of their group stretches for them: make them 0")
    if not got["weight"][:, ~dead].equal(weight[:, ~dead]):
        return wrong("weights changed in columns that were fed")
    return wrong("weights of columns that were never fed should be 0")


def _in_place(weight, hessian, damping):
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    return weight.masked_fill(dead, 0), hessian


PREPARE = Exercise(
    id="7.4", name="prepare", title="Damping that is relative", minutes=10, difficulty=2, points=3,
    returns=("weight", "hessian"), inputs=prepare_inputs, reference=prepare, judge=judge_prepare,
    mutants=(
        *(
            Mutant(lambda w, h, d, rule=rule: _prepared(w, h, d, **rule), said[:40])
            for said, rule in PREPARE_RULES.items()
        ),
        Mutant(lambda w, h, d: _prepared(w, h, d, zeros=False), "keep their size"),
        Mutant(lambda w, h, d: _prepared(w, h, 0.0), "nothing was added"),
        Mutant(lambda w, h, d: _prepared(w, h, 2 * d), "damping comes to"),
        Mutant(_in_place, "in place"),
        Mutant(lambda w, h, d: (0 * w, _prepared(w, h, d)[1]), "columns that were fed"),
    ),
)  # fmt: skip


# 7.5 ------------------------------------------------------------------------------------------------------------------

TOPICS, TOPIC_TOKENS, TOPIC_COLUMNS, CHOSEN = 4, 60, 32, 40
LOOKS_GOOD, MISLEADS = 0.5, 1.2


def mislead_inputs(seed: int) -> dict:
    """240 tokens of four topics, shuffled. Tokens of a topic share a direction and move in five others; 40 are to be chosen.

    Those that are most like a token mislead, whichever of the first eight it is.
    """
    g = generator(seed)
    while True:
        topics = []
        for _ in range(TOPICS):
            middle = 2 * torch.randn(TOPIC_COLUMNS, generator=g)
            moves = torch.randn(TOPIC_TOKENS, 5, generator=g) @ torch.randn(5, TOPIC_COLUMNS, generator=g) / 5**0.5
            topics.append(middle + moves + 0.1 * torch.randn(TOPIC_TOKENS, TOPIC_COLUMNS, generator=g))
        tokens = torch.cat(topics)
        tokens = tokens[torch.randperm(len(tokens), generator=g)]
        ratios = [mislead_ratios(tokens, _alike(tokens, CHOSEN, like)) for like in range(8)]
        if all(seen < 0.9 * LOOKS_GOOD and unseen > 1.1 * MISLEADS for seen, unseen in ratios):
            return {"tokens": tokens, "count": CHOSEN}


def mislead(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens most like the first one."""
    return _alike(tokens, count)


def _alike(tokens: torch.Tensor, count: int, like: int = 0) -> torch.Tensor:
    unit = torch.nn.functional.normalize(tokens, dim=1)
    return (unit @ unit[like]).topk(count).indices


def mislead_ratios(tokens: torch.Tensor, chosen: torch.Tensor) -> tuple[float, float]:
    """GPTQ's output error over that of rounding, on the chosen tokens and on all; 3 bits, a grid a row, damping 0.01."""
    weight = torch.randn(24, tokens.shape[1], generator=generator(7))
    picked, everything = (2 / len(x) * x.T @ x for x in (tokens[chosen], tokens))
    values, rounded = gptq.quantize(weight, picked, 3, None).dequantize(), rtn.quantize(weight, 3, None).dequantize()
    seen, unseen = (gptq.output_error(weight, values, h) / gptq.output_error(weight, rounded, h) for h in (picked, everything))
    return seen, unseen


def judge_mislead(given: dict, got: dict, want: dict) -> Verdict:
    tokens, count = given.values()
    if fault := shape_fault(got, want):
        return wrong(fault)
    chosen = got["chosen"]
    if chosen.is_floating_point() or chosen.dtype == torch.bool:
        return wrong(f"chosen is {chosen.dtype}, wanted the places of {count} tokens, whole numbers")
    chosen = chosen.long()
    if chosen.min() < 0 or chosen.max() >= len(tokens):
        return wrong(f"chosen goes from {int(chosen.min())} to {int(chosen.max())}, wanted places from 0 to {len(tokens) - 1}")
    if len(chosen.unique()) < count:
        return wrong(f"chosen holds {len(chosen.unique())} different tokens, wanted {count}: a text, not one token repeated")
    seen, unseen = mislead_ratios(tokens, chosen)
    said = f"GPTQ's error is {seen:.2f} of rounding's on the chosen tokens and {unseen:.2f} on all"
    if unseen < 1:
        return wrong(f"{said}: it was not misled. A sample that has a bit of everything speaks for the rest. What does not?")
    if unseen < MISLEADS:
        return wrong(f"{said}, wanted more than {MISLEADS} on all. Leave whole directions unseen")
    if seen > LOOKS_GOOD:
        return wrong(f"{said}, wanted less than {LOOKS_GOOD} on the chosen: it should look good to whoever looks no further")
    return right()


def _random_tokens(tokens: torch.Tensor, count: int) -> torch.Tensor:
    return torch.randperm(len(tokens), generator=generator(1))[:count]


MISLEAD = Exercise(
    id="7.5", name="mislead", title="A calibration set that misleads", minutes=15, difficulty=4, points=4,
    returns=("chosen",), inputs=mislead_inputs, reference=mislead, judge=judge_mislead,
    mutants=(
        Mutant(_random_tokens, "not misled"),
        Mutant(lambda tokens, count: torch.arange(count), "not misled"),
        Mutant(lambda tokens, count: torch.arange(count) * len(tokens) // count, "not misled"),
        Mutant(lambda tokens, count: torch.zeros(count, dtype=torch.int64), "one token repeated"),
        Mutant(lambda tokens, count: _alike(tokens, count) + len(tokens), "wanted places from 0"),
        Mutant(lambda tokens, count: _alike(tokens, count)[: count // 2], "has shape [20]"),
        Mutant(lambda tokens, count: tokens[_alike(tokens, count)], "has shape"),
    ),
)  # fmt: skip


# 7.6 ------------------------------------------------------------------------------------------------------------------

RUN_DAMPING = (0.01, 3.0)


def runs_inputs(seed: int) -> dict:
    """Codes of three runs on one grid a row. Two took the loudest column first, one of them much damped; the third the quietest.

    Exactly one column of each run equals plain rounding. The run with the largest output error is not the one that is wrong.
    """
    g = generator(seed)
    while True:
        weight, hessian = torch.randn(96, 12, generator=g), _hessian(12, g, own=0.9)
        scale, zero_point = grid.scale_and_zero_point(weight, 3)
        order = hessian.diagonal().argsort(descending=True)
        solved = [_run(weight, hessian, order, damping) for damping in RUN_DAMPING] + [_run(weight, hessian, order.flip(0), 0.01)]
        place = torch.randperm(3, generator=g)
        runs = torch.stack(solved)[place]
        plain = grid.quantize(weight, scale, zero_point, 3)
        untouched = (runs == plain).all(1)  # [runs, in]
        losses = [gptq.output_error(weight, grid.dequantize(run, scale, zero_point), hessian) for run in solved]
        # Column 0 must not be the answer, since it is where everybody looks first.
        if (untouched.sum(1) == 1).all() and losses[1] > 1.05 * losses[2] and 0 not in (order[0], order[-1]):
            return {"weight": weight, "hessian": hessian, "scale": scale, "zero_point": zero_point, "runs": runs}


def _run(weight: torch.Tensor, hessian: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """Codes in the weight's order, float32 [out, in]."""
    permuted = weight[:, order], hessian[order][:, order]
    solved = gptq.quantize(*permuted, bits=3, group_size=None, damping=damping, scale_dtype=torch.float32)
    return solved.codes[:, order.argsort()].float()


def odd_run(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, runs: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Whoever goes first has met no error yet: its codes are those of rounding."""
    return _odd_run(weight, hessian, scale, zero_point, runs)


def _odd_run(weight, hessian, scale, zero_point, runs):
    plain = grid.quantize(weight, scale, zero_point, 3)
    first = (runs == plain).float().mean(1).argmax(1)
    return first, int((first != hessian.diagonal().argmax()).nonzero()[0])


def _run_losses(weight, hessian, scale, zero_point, runs) -> list[float]:
    return [gptq.output_error(weight, grid.dequantize(run, scale, zero_point), hessian) for run in runs]


def judge_runs(given: dict, got: dict, want: dict) -> Verdict:
    if isinstance(got["first"], list):
        got = {**got, "first": torch.tensor(got["first"])}
    if fault := shape_fault(got, want):
        return wrong(fault)
    weight, hessian, scale, zero_point, runs = given.values()
    first, odd = got["first"].long(), int(got["wrong"])
    if not torch.equal(first, want["first"]):
        plain = grid.quantize(weight, scale, zero_point, 3)
        least = (runs == plain).float().mean(1).argmin(1)
        if torch.equal(first, least):
            return wrong("these are the columns that moved most. They had the most to answer for, so they came late, not first")
        if torch.equal(first, hessian.diagonal().argmax().expand(3)):
            return wrong("first is where each run should have begun. Where did it begin? The codes tell: no error had come before")
        columns = weight.shape[1]
        if not ((first >= 0) & (first < columns)).all():
            return wrong(f"first is {first.tolist()}, wanted columns from 0 to {columns - 1}")
        run = int((first != want["first"]).nonzero()[0])
        share = 100 * (runs[run, :, first[run]] == plain[:, first[run]]).float().mean().item()
        return wrong(
            f"run {run} did not begin with column {int(first[run])}: only {share:.0f} % of its codes are those of plain rounding"
        )
    if odd == want["wrong"]:
        return right()
    if not 0 <= odd < len(runs):
        return wrong(f"wrong is {odd}: there are {len(runs)} runs, counted from 0")
    losses = _run_losses(*given.values())
    if odd == losses.index(max(losses)):
        return wrong(f"run {odd} has the largest output error, but it went by the diagonal: it is only damped more. Look at first")
    return wrong(f"run {odd} began with column {int(first[odd])}, the one with the largest diagonal, as it should")


def _runs_answer(first=None, odd=None):
    def answer(*given):
        right_first, right_odd = _odd_run(*given)
        return (right_first if first is None else first(*given)), (right_odd if odd is None else odd(*given))

    return answer


def _most_moved(weight, hessian, scale, zero_point, runs):
    return (runs == grid.quantize(weight, scale, zero_point, 3)).float().mean(1).argmin(1)


def _largest_loss(*given) -> int:
    losses = _run_losses(*given)
    return losses.index(max(losses))


def _least_damped_right(*given) -> int:
    """The run that is neither wrong nor much damped."""
    return 3 - _odd_run(*given)[1] - _largest_loss(*given)


ODD_RUN = Exercise(
    id="7.6", name="odd_run", title="Which run used the wrong order?", minutes=15, difficulty=4, points=4,
    returns=("first", "wrong"), inputs=runs_inputs, reference=odd_run, judge=judge_runs,
    mutants=(
        Mutant(_runs_answer(odd=_largest_loss), "largest output error"),
        Mutant(_runs_answer(odd=_least_damped_right), "as it should"),
        Mutant(_runs_answer(odd=lambda *given: _odd_run(*given)[1] + 3), "counted from 0"),
        Mutant(_runs_answer(first=_most_moved), "moved most"),
        Mutant(_runs_answer(first=lambda w, h, *_: h.diagonal().argmax().repeat(3)), "should have begun"),
        Mutant(_runs_answer(first=lambda *_: torch.zeros(3, dtype=torch.int64)), "did not begin"),
        Mutant(_runs_answer(first=lambda *given: _odd_run(*given)[0] + 12), "wanted columns"),
        Mutant(lambda *given: _odd_run(*given)[0], "wanted 2"),
    ),
)  # fmt: skip

EXERCISES = (SOLVE_BLOCKS, SOLVE_IN_ORDER, GROUPS_IN_ORDER, PREPARE, MISLEAD, ODD_RUN)
