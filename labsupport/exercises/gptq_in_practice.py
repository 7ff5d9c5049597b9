"""Chapter 7: what turns the column loop into a tool: blocks, order, groups, damping, and the text that it looks at."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch

from labsupport.exercises.compare import got_and_wanted
from labsupport.exercises.form import Exercise, Mistake, Mutant, generator, mistakes_by_option, right
from labsupport.exercises.gptq import CONDITION
from labsupport.exercises.who_listens import EXERCISES as LISTENING
from labsupport.quant import gptq, grid, rtn

UNDECIDED = 5e-4  # of a step: no weight comes this near to the middle of two levels on its way through the loop


def _hessian(columns: int, g: torch.Generator, own: float = 0.9) -> torch.Tensor:
    """2/n X^T X of unequal channels that share directions, float32, condition below CONDITION. own: what each adds alone."""
    while True:
        shared = torch.randn(99, 3, generator=g) @ torch.randn(3, columns, generator=g)
        x = (shared + own * torch.randn(99, columns, generator=g)) * (0.8 + 0.7 * torch.rand(columns, generator=g))
        hessian = x.T @ x * (2 / len(x))
        if torch.linalg.cond(hessian) < CONDITION:
            return hessian


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same, whatever their dtypes."""
    return a.shape == b.shape and bool((a == b).all())


def _by_first(first: str, second: str, reference: Callable, differ: Callable = lambda given: (0,)) -> Callable:
    """Exercise.alike: the number counts only where the tensor, from which it follows, is right. differ(given): by how much."""

    def alike(given: dict, got: dict, theirs: dict) -> bool:
        if not _same(got[first], theirs[first]):
            return False
        return got[second] - theirs[second] in differ(given) or not _same(got[first], reference(*given.values())[0])

    return alike


# 7.1 ------------------------------------------------------------------------------------------------------------------
@cache
def block_inputs(seed: int) -> dict:
    """Seven rows, 17 columns in blocks of 5, so that the last is shorter. Every wrong way gives an output of its own."""
    g = generator(seed)
    while True:
        weight, hessian = torch.randn(7, 17, generator=g), _hessian(17, g, own=1.2)
        weight[:2] = weight[:2].clamp(-1.4, 1.9)
        weight[:2, 12], weight[:2, 15] = 2.0, -1.5  # a step of a half
        weight[:2, 0] = torch.tensor([0.25, -0.25])  # in the middle of two levels; no other weight comes near one, on its way
        scale, zero_point = grid.scale_and_zero_point(weight, 3)
        factor = gptq.autogptq_factor(hessian)
        given = {"weight": weight, "factor": factor, "scale": scale, "zero_point": zero_point, "bits": 3, "block_size": 5}
        steps: list[torch.Tensor] = []
        ways = [_blocks(**given, steps=steps), *(mistake.answer(*given.values()) for mistake in SOLVE_BLOCKS.mistakes)]
        middle = (torch.cat(steps, 1).frac().abs() - 0.5).abs()
        middle[:2, 0] = 1
        if middle.min() > UNDECIDED and len({(codes.numpy().tobytes(), writes) for codes, writes in ways}) == len(ways):
            return given


def solve_blocks(weight, factor, scale, zero_point, bits: int, block_size: int) -> tuple[torch.Tensor, int]:
    """labsupport's codes, from the Hessian that `factor` belongs to; and how many weights the updates of two levels write."""
    root = torch.linalg.inv(factor.double())
    hessian = (root @ root.T).float()
    q = gptq.quantize(weight, hessian, bits, None, damping=0, block_size=block_size, scale_dtype=torch.float32)
    return q.codes.float(), _writes(len(weight), weight.shape[1], block_size)


def _writes(rows: int, columns: int, block_size: int, whole: bool = False) -> int:
    """Each column writes to those after it in its block, each block to all that is left. whole: the last counts like the others."""
    total = 0
    for first in range(0, columns, block_size):
        size = block_size if whole else min(block_size, columns - first)
        total += size * (size - 1) // 2 + max(columns - first - size, 0)
    return rows * total


def _blocks(
    weight, factor, scale, zero_point, bits, block_size, reach="block", lazy="all", divide=True, sign=-1, original=False, tail=True,
    turned=False, rounded=torch.round, steps=None, count=_writes,
):  # fmt: skip
    """The blocked loop, plainly, and ways to get it wrong. steps: gets each column as it is before it is rounded, in steps."""
    work, (rows, columns) = weight.clone(), weight.shape
    codes, error, factor = torch.zeros_like(weight), torch.zeros_like(weight), factor.T if turned else factor
    for first in range(0, columns if tail else columns // block_size * block_size, block_size):
        last = min(first + block_size, columns)
        for i in range(first, last):
            column = work[:, i : i + 1]
            if steps is not None:
                steps.append(column / scale)
            codes[:, i : i + 1] = q = (rounded(column / scale) + zero_point).clamp(0, 2**bits - 1)
            error[:, i : i + 1] = (weight[:, i : i + 1] if original else column) - grid.dequantize(q, scale, zero_point)
            if divide:
                error[:, i] /= factor[i, i]
            end = last if reach == "block" else columns
            work[:, i + 1 : end] += sign * error[:, i : i + 1] * factor[i, i + 1 : end]
        end = {"none": last, "next block": min(last + block_size, columns)}.get(lazy, columns)
        begin = last - 1 if lazy == "last column" else first
        work[:, last:end] += sign * error[:, begin:last] @ factor[begin:last, last:end]
    return codes, count(rows, columns, block_size)


def _blocks_differ(given: dict, got: dict, want: dict) -> str:
    if (fractions := got["codes"][got["codes"].frac() != 0]).numel():
        return f"codes are whole numbers, {fractions[0]:.4g} is not: return the codes, not the values that they stand for"
    if not _same(got["codes"], want["codes"]):
        column = int((got["codes"] != want["codes"]).any(0).nonzero()[0])
        return f"column {column} is the first with a wrong code; blocks start at every {given['block_size']}th. Right up to there"
    counts = got_and_wanted(got["writes"], want["writes"])
    return f"codes are right; writes: {counts}. Count rows times columns of every slice that is updated"


# An update may begin with the column that was just rounded, as AutoGPTQ's does: then each weight is written once more.
_same_blocks = _by_first("codes", "writes", _blocks, lambda given: (0, given["weight"].numel()))

SOLVE_BLOCKS = Exercise(
    id="7.1", name="solve_blocks", title="Lazy updates", minutes=20, difficulty=4, points=5,
    returns=("codes", "writes"), inputs=block_inputs, reference=solve_blocks, otherwise=_blocks_differ,
    accepts=lambda given, got, want: right() if _same_blocks(given, got, want) else None, alike=_same_blocks,
    mistakes=mistakes_by_option(_blocks, {
        "this is rounding to nearest: no update reaches a later column. Row i of the factor says how they answer": {
            "turned": True},
        "columns after a block never hear of it: each block is solved as if it came first. After its last column, subtract the "
        "block's errors times its rows of the factor from everything behind it": {"lazy": "none"},
        "columns behind the block are updated twice, by each column at once and by the block again: inside a block, stop at its "
        "end": {"reach": "row"},
        "only the last column of a block is subtracted from what is behind it: wanted all of its errors, as one matrix product": {
            "lazy": "last column"},
        "a block is subtracted from the next block alone: everything behind it answers to it": {"lazy": "next block"},
        "the error is not divided by the factor's diagonal": {"divide": False},
        "the error is added where it must be subtracted: later columns make the error larger": {"sign": 1},
        "the error is taken against the weight as it came, not as the columns before it have left it": {"original": True},
        "the last block, which is shorter, was left out": {"tail": False},
        "half-way values go up: floor(x + 0.5). torch.round takes them to the even level, as everybody here does": {
            "rounded": lambda x: (x + 0.5).floor()},
        "codes are right, and the writes are those of updating all later columns after every column. Be lazy": {
            "count": lambda rows, columns, block_size: rows * columns * (columns - 1) // 2},
        "codes are right, and writes counts columns: an update writes a weight in each of the rows": {
            "count": lambda rows, *sizes: _writes(1, *sizes)},
        "codes are right, and writes counts the last block like the others: it is shorter": {
            "count": partial(_writes, whole=True)},
    }),
    others=(
        Mutant(partial(_blocks, count=lambda *sizes: 3 * _writes(*sizes)), "Count rows times columns"),
        Mutant(lambda *given: (_blocks(*given)[0].roll(1, 1), 0), "is the first with a wrong code"),
        Mutant(lambda *given: (grid.dequantize(_blocks(*given)[0], *given[2:4]), 0), "not the values that they stand for"),
    ),
)  # fmt: skip


# 7.2 ------------------------------------------------------------------------------------------------------------------
@cache
def order_inputs(seed: int) -> dict:
    """Six rows, ten columns; the order by H's diagonal is not its own inverse, nor that of the weights' sizes."""
    g = generator(seed)
    while True:
        weight, hessian = torch.randn(6, 10, generator=g), _hessian(10, g)
        orders = {tuple(order.tolist()) for order in _orders(weight, hessian)}
        values = [solve_in_order(weight, hessian, _solve, damping) for damping in (0.01, 0.0099, 0.0101)]
        if len(orders) == 5 and all(map(_same, values, values[1:])):
            wrong = (mutant.answer(weight, hessian, _solve) for mutant in SOLVE_IN_ORDER.mutants)
            if not any(_same(values[0], other) for other in wrong):
                return {"weight": weight, "hessian": hessian}


LOUDEST, CAME, QUIETEST, INVERSE, SIZES = range(5)


def _orders(weight: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Orders of the columns, by the names above. LOUDEST first is right, INVERSE leads back from it, SIZES are the weights'."""
    order = hessian.diagonal().argsort(descending=True)
    return order, torch.arange(len(order)), order.flip(0), order.argsort(), weight.pow(2).sum(0).argsort(descending=True)


def _solve(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """GPTQ from the left to the right, 3 bits, one grid a row. What no Hessian could be is no error here: then it rounds."""
    try:
        return gptq.quantize(weight, hessian, 3, None).dequantize()
    except ValueError:
        return rtn.quantize(weight, 3, None).dequantize()


def solve_in_order(weight: torch.Tensor, hessian: torch.Tensor, solve: Callable, damping: float = 0.01) -> torch.Tensor:
    """labsupport's act_order. It has a loop of its own and does not call `solve`."""
    return gptq.quantize(weight, hessian, 3, None, act_order=True, damping=damping).dequantize()


def drive_order(answer: Callable, given: dict) -> dict:
    """The answer's values, and what it passed to `solve` at its last call: two matrices, or two numbers if it never did."""
    passed = [torch.zeros(1), torch.zeros(1)]

    def solve(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        passed[:] = weight.clone(), hessian.clone()
        return _solve(weight, hessian)

    return {"values": answer(given["weight"], given["hessian"], solve), "solved_weight": passed[0], "solved_hessian": passed[1]}


def _in_order(weight, hessian, solve, of=LOUDEST, rows=None, columns=None, back=lambda values, order: values[:, order.argsort()]):
    """Solved with weight's columns and hessian's rows and columns, if they are not the same, in these of the _orders."""
    orders = _orders(weight, hessian)
    rows, columns = (of if axis is None else axis for axis in (rows, columns))
    return back(solve(weight[:, orders[of]], hessian[orders[rows]][:, orders[columns]]), orders[of])


def _solved_alike(got: dict, theirs: dict) -> bool:
    return all(_same(got[name], theirs[name]) for name in ("solved_weight", "solved_hessian"))


def _solved_rightly(given: dict, got: dict) -> bool:
    return _solved_alike(got, drive_order(_in_order, given))


def _order_differs(given: dict, got: dict, want: dict) -> str:
    if got["solved_weight"].ndim == 1:
        return "solve was never called, and the values are not those of act-order"
    if not _solved_rightly(given, got):
        return "what went into solve is not weight and hessian in the order of hessian's diagonal, largest first"
    column = int((got["values"] != want["values"]).any(0).nonzero()[0])
    return f"solve was given the right columns and Hessian, but column {column} of the values is not what came back for it"


SOLVE_IN_ORDER = Exercise(
    id="7.2", name="solve_in_order", title="The loudest column first", minutes=12, difficulty=3, points=4,
    returns=("values",), inputs=order_inputs, reference=solve_in_order, drive=drive_order, otherwise=_order_differs,
    accepts=lambda given, got, want: right() if _same(got["values"], want["values"]) else None,
    free=("solved_weight", "solved_hessian"),
    # What went into solve tells a mistake; where that is right, what was done with what came back.
    alike=lambda given, got, theirs: _solved_alike(got, theirs) and (
        _same(got["values"], theirs["values"]) or not _solved_rightly(given, got)),
    mistakes=mistakes_by_option(_in_order, {
        "the result is still in the order in which it was solved: column 0 holds the loudest column. Permute it back": {
            "back": lambda values, order: values},
        "the result was permuted by `order` once more. Back leads its inverse, argsort(order)": {
            "back": lambda values, order: values[:, order]},
        "hessian went into solve with its rows permuted and its columns not: index both axes, hessian[order][:, order]": {
            "columns": CAME},
        "hessian went into solve with its columns permuted and its rows not: index both axes, hessian[order][:, order]": {
            "rows": CAME},
        "solve was given weight and hessian as they came: this is column order": {"of": CAME},
        "the columns of weight are permuted and hessian is not: each column meets the statistics of another": {
            "rows": CAME, "columns": CAME},
        "hessian is permuted and weight is not: each column meets the statistics of another": {
            "of": CAME, "rows": LOUDEST, "columns": LOUDEST},
        "the quietest column goes first: argsort ascends unless told descending=True": {"of": QUIETEST},
        "weight and hessian are permuted by the inverse of the order: argsort says which column goes first": {"of": INVERSE},
        "columns are ordered by the size of their weights: the order is that of hessian's diagonal": {"of": SIZES},
    }),
    others=(
        Mutant(lambda weight, hessian, solve: weight, "solve was never called"),
        Mutant(partial(_in_order, back=lambda values, order: values.roll(1, 1)), "not what came back for it"),
        Mutant(partial(_in_order, rows=INVERSE, columns=INVERSE), "what went into solve is not"),
    ),
)  # fmt: skip


# 7.3 ------------------------------------------------------------------------------------------------------------------
def scatter_inputs(seed: int) -> dict:
    """Loudness of 24 columns in groups of 6, or of 20 in groups of 4; every wrong answer differs from the right one."""
    g = generator(seed)
    columns, size = (24, 6) if seed % 2 else (20, 4)
    while True:
        diagonal = torch.rand(columns, generator=g) + 0.1
        wrong = [mistake.answer(diagonal, size) for mistake in GROUPS_IN_ORDER.mistakes]
        g_idx, loads = _scattered(diagonal, size)
        if loads < columns and not any(_same(g_idx, other) and loads == count for other, count in wrong):
            return {"diagonal": diagonal, "group_size": size}


def groups_in_order(diagonal: torch.Tensor, group_size: int) -> tuple[torch.Tensor, int]:
    """labsupport's g_idx of a layer with this diagonal, quantized with act_order."""
    stored = gptq.quantize(torch.ones_like(diagonal)[None], diagonal.diag(), group_size=group_size, act_order=True)
    assert stored.g_idx is not None  # act_order stores it
    return stored.g_idx.long(), _loads(stored.g_idx)


def _loads(groups: torch.Tensor) -> int:
    return 1 + int((groups[1:] != groups[:-1]).sum())


def _scattered(diagonal, group_size, group_of=lambda turn, size, order: turn // size, loads=_loads, descending=True):
    """g_idx and loads. group_of: the group of each column, from its turn [in], the size and the order [in]."""
    order = diagonal.argsort(descending=descending)
    groups = group_of(order.argsort(), group_size, order)
    return groups, loads(groups)


def _about_group(given: dict, want: dict, path: str, place: tuple[int, ...]) -> str:
    if path == "loads":
        return "loads (one for the first column, and one for each column whose left neighbor is in another group)"
    turn = int(given["diagonal"].argsort(descending=True).argsort()[place])
    return f"the group of column {place[0]}, whose turn is {turn}"


GROUPS_IN_ORDER = Exercise(
    id="7.3", name="groups_in_order", title="Where did my group go?", minutes=10, difficulty=3, points=3,
    returns=("g_idx", "loads"), inputs=scatter_inputs, reference=groups_in_order, about=_about_group,
    alike=_by_first("g_idx", "loads", _scattered),
    mistakes=mistakes_by_option(_scattered, {
        "g_idx holds decimal numbers: a group is a whole number, // and not /": {"group_of": lambda turn, size, order: turn / size},
        "order // group_size is not it: order[i] is the column whose turn is i. Wanted the turn of each column, the inverse": {
            "group_of": lambda turn, size, order: order // size},
        "these are groups of neighbors, as without act-order. A group is filled by the columns that follow each other in the "
        "loop": {"group_of": lambda turn, size, order: torch.arange(len(turn)) // size},
        "the quietest columns are in group 0: argsort ascends unless told descending=True": {"descending": False},
        "this is each column's turn, not yet its group: divide by group_size": {"group_of": lambda turn, size, order: turn},
        "columns are dealt to the groups like cards: a turn modulo the number of groups. Columns that follow each other share a "
        "grid": {"group_of": lambda turn, size, order: turn % (len(turn) // size)},
        "g_idx is right, and loads is one too few: the grid of the first column has to be loaded as well": {
            "loads": lambda groups: _loads(groups) - 1},
        "g_idx is right, and loads is the number of groups: whoever reads columns from left to right comes back to a group": {
            "loads": lambda groups: len(groups.unique())},
    }),
    others=(Mutant(partial(_scattered, loads=len), "left neighbor"),
            Mutant(partial(_scattered, group_of=lambda turn, size, order: turn.flip(0) // size), "whose turn is")),
)  # fmt: skip


# 7.4 ------------------------------------------------------------------------------------------------------------------
def prepare_inputs(seed: int) -> dict:
    """Seven rows, nine columns: two were never fed and have the largest weights, one hardly. H's diagonal is far from 1."""
    g = generator(seed)
    x = torch.randn(30, 3, generator=g) @ torch.randn(3, 9, generator=g) + 0.5 * torch.randn(30, 9, generator=g) + 0.8
    *dead, quiet = torch.randperm(9, generator=g)[:3].tolist()
    weight = torch.randn(7, 9, generator=g)
    weight[:, dead] *= 4
    x[:, dead] = 0
    x[:, quiet] *= 1e-3
    hessian = 2 / len(x) * x.T @ x
    return {"weight": weight, "hessian": hessian * (40 / hessian.diagonal().mean()), "damping": (0.01, 0.1)[seed % 2]}


def prepare(weight: torch.Tensor, hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """labsupport's rules, and the matrix that it factorizes."""
    dead = hessian.diagonal() == 0
    diagonal = gptq.damped(hessian.diagonal().masked_fill(dead, 1), damping)
    return weight.masked_fill(dead, 0), hessian.diagonal_scatter(diagonal)


def _prepared(
    weight, hessian, damping, add=lambda h, d: d * h.diagonal().mean() * torch.eye(len(h)), dead_first=True, ones=True, dead_to=0.0
):
    """The same, plainly, and ways to get it wrong. add(hessian, damping): what is added, [in, in]. dead_to: None leaves them."""
    dead = hessian.diagonal() == 0
    filled = hessian + dead.diag().float() if ones else hessian
    added = add(filled if dead_first else hessian, damping)
    return weight if dead_to is None else weight.masked_fill(dead, dead_to), filled + added


def _preparation_differs(given: dict, got: dict, want: dict) -> str:
    wrong = (got["weight"] != want["weight"]).any(0)
    if (wrong & (given["hessian"].diagonal() != 0)).any():
        return "weights changed in columns that were fed"
    if wrong.any():
        return "weights of columns that were never fed should be 0"
    i, j = divmod(int((got["hessian"] - want["hessian"]).abs().argmax()), len(want["hessian"]))
    unit = given["damping"] * _prepared(**given, add=lambda h, d: 0)[1].diagonal().mean().item()
    entries = got_and_wanted(got["hessian"][i, j].item(), want["hessian"][i, j].item())
    return f"entry ({i}, {j}): {entries} (damping comes to {unit:.3g})"


PREPARE = Exercise(
    id="7.4", name="prepare", title="Damping that is relative", minutes=10, difficulty=2, points=3,
    returns=("weight", "hessian"), inputs=prepare_inputs, reference=prepare, otherwise=_preparation_differs,
    # A mean of 9 float32 numbers, times a float, added: some ten roundings of the largest entry.
    allowed=lambda given, want: {"weight": 0.0, "hessian": 10 * 2.0**-24 * want["hessian"].abs().max().item()},
    close=lambda given, want: {"weight": 0.0, "hessian": 40 * 2.0**-24 * want["hessian"].abs().max().item()},
    mistakes=mistakes_by_option(_prepared, {
        "damping itself was added to the diagonal: the same 0.01 is a lot for quiet inputs and nothing for loud ones. It is a "
        "share of the mean of the diagonal": {"add": lambda h, d: d * torch.eye(len(h))},
        "the mean is that of all entries of the Hessian, negative ones included: wanted that of its diagonal": {
            "add": lambda h, d: d * h.mean() * torch.eye(len(h))},
        "the sum of the diagonal was taken, not its mean": {"add": lambda h, d: d * h.trace() * torch.eye(len(h))},
        "the largest of the diagonal was taken, not the mean": {"add": lambda h, d: d * h.diagonal().max() * torch.eye(len(h))},
        "each entry of the diagonal grew by its own share: the quiet columns, which need damping most, get least of it. Add the "
        "same to all": {"add": lambda h, d: d * h.diagonal().diag()},
        "the number was added to every entry, not to the diagonal alone: H + number does that": {
            "add": lambda h, d: d * h.diagonal().mean() * torch.ones_like(h)},
        "the mean was taken before the columns that were never fed got their 1: those first, then damping, as AutoGPTQ does": {
            "dead_first": False},
        "a column that was never fed keeps its 0 on the diagonal (under the damping): put 1 there first": {"ones": False},
        "nothing was added to the diagonal": {"add": lambda h, d: 0},
        "weights that meet no input keep their size, and the grid of their group stretches for them: make them 0": {
            "dead_to": None},
    }),
    others=(
        Mutant(lambda w, h, d: _prepared(w, h, 2 * d), "damping comes to"),
        Mutant(lambda w, h, d: (0 * w, _prepared(w, h, d)[1]), "columns that were fed"),
        Mutant(partial(_prepared, dead_to=1.0), "should be 0"),
    ),
)  # fmt: skip


# 7.5 ------------------------------------------------------------------------------------------------------------------
TOPICS, TOPIC_TOKENS, TOPIC_COLUMNS, CHOSEN = 4, 60, 32, 40
MISLED = torch.randn(24, TOPIC_COLUMNS, generator=generator(7))  # the weight that GPTQ quantizes
ROUNDED = rtn.quantize(MISLED, 3, None).dequantize()
LOOKS_GOOD, MISLEADS = 0.5, 1.2


@cache
def mislead_inputs(seed: int) -> dict:
    """240 tokens of four topics, shuffled. Tokens of a topic share a direction and move in sixteen others; 40 are to be chosen.

    Forty of a topic mislead, whichever topic it is, and also those that are most like one of the first.
    """
    g = generator(seed)
    while True:
        middles = 4 * torch.randn(TOPICS, 1, TOPIC_COLUMNS, generator=g)
        moves = torch.randn(TOPICS, TOPIC_TOKENS, 16, generator=g) @ torch.randn(TOPICS, 16, TOPIC_COLUMNS, generator=g) / 2
        tokens = (middles + moves + 0.1 * torch.randn(moves.shape, generator=g)).flatten(0, 1)
        places = torch.randperm(len(tokens), generator=g)
        own = [(places // TOPIC_TOKENS == topic).nonzero()[:, 0] for topic in range(TOPICS)]
        tokens = tokens[places]
        picks = [pick for each in own for pick in (each[:CHOSEN], each[-CHOSEN:])]
        picks += [_alike(tokens, CHOSEN, like).indices for like in range(4)]
        ratios = (mislead_ratios(tokens, pick) for pick in picks)
        if all(seen < 0.9 * LOOKS_GOOD and unseen > 1.1 * MISLEADS for seen, unseen in ratios):
            return {"tokens": tokens, "count": CHOSEN}


def mislead(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens most like the first one."""
    return _alike(tokens, count).indices


def _alike(tokens: torch.Tensor, count: int, like: int = 0) -> torch.return_types.topk:
    """The largest cosines of the angle between each token and one of them, and whose they are."""
    unit = torch.nn.functional.normalize(tokens, dim=1)
    return (unit @ unit[like]).topk(count)


def mislead_ratios(tokens: torch.Tensor, chosen: torch.Tensor) -> tuple[float, float]:
    """GPTQ's output error over that of rounding, on the chosen tokens and on all; 3 bits, a grid a row, damping 0.01."""
    picked, everything = (2 / len(x) * x.T @ x for x in (tokens[chosen], tokens))
    values = gptq.quantize(MISLED, picked, 3, None).dequantize()
    seen, unseen = (gptq.output_error(MISLED, values, h) / gptq.output_error(MISLED, ROUNDED, h) for h in (picked, everything))
    return seen, unseen


def _does_not_mislead(given: dict, got: dict, want: dict) -> str | None:
    (tokens, count), chosen = given.values(), got["chosen"]
    least, most, different = int(chosen.min()), int(chosen.max()), len(chosen.unique())
    if least < 0 or most >= len(tokens):
        return f"chosen goes from {least} to {most}, wanted places from 0 to {len(tokens) - 1}"
    if different < count:
        return f"chosen holds {different} different tokens, wanted {count}: a text, not one token repeated"
    seen, unseen = mislead_ratios(tokens, chosen)
    ratios = f"GPTQ's error is {seen:.3f} of rounding's on the chosen tokens and {unseen:.3f} on all"
    if unseen < 1:
        return f"{ratios}: it was not misled. A sample that has a bit of everything speaks for the rest. What does not?"
    if seen > LOOKS_GOOD or unseen < MISLEADS:
        return f"{ratios}, wanted at most {LOOKS_GOOD} on the chosen and at least {MISLEADS} on all. Leave whole directions unseen"
    return None


def _hardly_misled(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Most of a topic and a few tokens from elsewhere: the first mixture on which GPTQ is misled, but not enough."""
    order = _alike(tokens, len(tokens)).indices  # the sixty of the topic come first
    for start in range(64, len(tokens), 20):
        for others in range(3, 16):
            mixed = torch.cat([order[: count - others], order[start : start + others]])
            if 1 < mislead_ratios(tokens, mixed)[1] < 0.99 * MISLEADS:
                return mixed
    raise ValueError("no mixture misleads a little")


MISLEAD = Exercise(
    id="7.5", name="mislead", title="A calibration set that misleads", minutes=15, difficulty=4, points=4,
    returns=("chosen",), inputs=mislead_inputs, reference=mislead, otherwise=_does_not_mislead,
    accepts=lambda given, got, want: None if _does_not_mislead(given, got, want) else right(),
    hint="Wanted are places, whole numbers: one for each token that is chosen",
    mistakes=(
        Mistake("these are cosines, and not the places of tokens: topk gives values and indices",
                lambda tokens, count: _alike(tokens, count).values),
    ),
    others=(
        Mutant(lambda tokens, count: torch.randperm(len(tokens), generator=generator(1))[:count], "not misled"),
        Mutant(_hardly_misled, "Leave whole directions unseen"),
        Mutant(lambda tokens, count: torch.zeros(count, dtype=torch.int64), "one token repeated"),
        Mutant(lambda tokens, count: _alike(tokens, count).indices + len(tokens), "wanted places from 0"),
        Mutant(lambda tokens, count: tokens[_alike(tokens, count).indices], "Wanted are places"),
    ),
)  # fmt: skip


# 7.6 ------------------------------------------------------------------------------------------------------------------
@cache
def runs_inputs(seed: int) -> dict:
    """Codes of three runs, one grid a row: the loudest column first, the same much damped, and the quietest first; shuffled."""
    g = generator(seed)
    while True:
        weight, hessian = torch.randn(96, 12, generator=g), _hessian(12, g)
        scale, zero_point = grid.scale_and_zero_point(weight, 3)
        order = hessian.diagonal().argsort(descending=True)
        solved = [_run(weight, hessian, *way) for way in ((order, 0.01), (order, 3.0), (order.flip(0), 0.01))]
        given = {"weight": weight, "hessian": hessian, "scale": scale, "zero_point": zero_point}
        losses = _run_losses(**given, runs=torch.stack(solved))
        runs = torch.stack(solved)[torch.randperm(3, generator=g)]
        untouched = _untouched(**given, runs=runs) == 1
        # One column a run was rounded plainly, none of them column 0, where everybody looks first; the damped run has the largest
        # error and is not the wrong one.
        if (untouched.sum(1) == 1).all() and losses[1] > 1.05 * max(losses[0], losses[2]) and 0 not in (order[0], order[-1]):
            return {**given, "runs": runs}


def _run(weight: torch.Tensor, hessian: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """Codes in the weight's order, float32 [out, in]."""
    permuted = weight[:, order], hessian[order][:, order]
    return gptq.quantize(*permuted, 3, None, damping=damping, scale_dtype=torch.float32).codes[:, order.argsort()].float()


def _untouched(weight, hessian, scale, zero_point, runs) -> torch.Tensor:
    """Share of codes of each column that are those of plain rounding. [runs, in]."""
    return (runs == grid.quantize(weight, scale, zero_point, 3)).float().mean(1)


def _run_losses(weight, hessian, scale, zero_point, runs) -> list[float]:
    return [gptq.output_error(weight, grid.dequantize(run, scale, zero_point), hessian) for run in runs]


def odd_run(weight, hessian, scale, zero_point, runs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Whoever goes first has met no error yet: its codes are those of rounding."""
    return _odd_run(weight, hessian, scale, zero_point, runs)


def _odd_run(weight, hessian, scale, zero_point, runs, first=lambda untouched: untouched.argmax(1), odd=lambda odd, losses: odd):
    """first(untouched [runs, in]), and odd(the right answer, the runs' output errors): ways to get it wrong."""
    untouched = _untouched(weight, hessian, scale, zero_point, runs)
    right_odd = int((untouched.argmax(1) != hessian.diagonal().argmax()).nonzero()[0])
    return first(untouched), odd(right_odd, _run_losses(weight, hessian, scale, zero_point, runs))


def _runs_differ(given: dict, got: dict, want: dict) -> str:
    columns, runs, first, odd = given["weight"].shape[1], len(given["runs"]), got["first"], got["wrong"]
    if ((first < 0) | (first >= columns)).any():
        return f"first is {first.tolist()}, wanted columns from 0 to {columns - 1}"
    if not _same(first, want["first"]):
        run = int((first != want["first"]).nonzero()[0])
        share = 100 * _untouched(**given)[run, int(first[run])].item()
        return f"run {run} did not begin with column {int(first[run])}: only {share:.0f} % of its codes are those of plain rounding"
    if odd not in range(runs):
        return f"wrong is {odd:g}: there are {runs} runs, counted from 0"
    return f"run {int(odd)} began with column {int(first[int(odd)])}, the one with the largest diagonal, as it should"


ODD_RUN = Exercise(
    id="7.6", name="odd_run", title="Which run used the wrong order?", minutes=15, difficulty=4, points=4,
    returns=("first", "wrong"), inputs=runs_inputs, reference=odd_run, otherwise=_runs_differ,
    alike=_by_first("first", "wrong", _odd_run),
    mistakes=mistakes_by_option(_odd_run, {
        "these are the columns that moved most. They had the most to answer for, so they came late, not first": {
            "first": lambda untouched: untouched.argmin(1)},
        "first is where each run should have begun. Where did it begin? The codes tell: no error had come before":
            lambda weight, hessian, *rest: (hessian.diagonal().argmax().repeat(3), _odd_run(weight, hessian, *rest)[1]),
        "this is the run with the largest output error, but it went by the diagonal: it is only damped more. Look at first": {
            "odd": lambda odd, losses: losses.index(max(losses))},
    }),
    others=(
        Mutant(partial(_odd_run, odd=lambda odd, losses: 3 - odd - losses.index(max(losses))), "as it should"),
        Mutant(partial(_odd_run, odd=lambda odd, losses: odd + 3), "counted from 0"),
        Mutant(partial(_odd_run, first=lambda untouched: torch.zeros(3, dtype=torch.int64)), "did not begin"),
        Mutant(partial(_odd_run, first=lambda untouched: untouched.argmax(1) + 12), "wanted columns"),
    ),
)  # fmt: skip

EXERCISES = (SOLVE_BLOCKS, SOLVE_IN_ORDER, GROUPS_IN_ORDER, PREPARE, MISLEAD, ODD_RUN, *LISTENING)
