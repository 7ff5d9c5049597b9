"""Chapter 15, the capstone: a byte budget, spent on a whole model."""

from __future__ import annotations

from functools import partial

import torch

from labsupport.exercises.compare import shown
from labsupport.exercises.form import Exercise, Fault, Mutant, drive_cases, generator, mistakes_by_option, right
from labsupport.pipeline import budget as budgets

OPTIONS = [(3, 64), (2, 64), (4, 32), (2, 32), (6, 64), (3, 32), (4, 64), (8, 64)]  # bits and group size, in no order
CLOSE = 1.03  # of the reference's loss: two orders of buying the same upgrades end a few bytes apart
TABLE = 0


# 15.4 -----------------------------------------------------------------------------------------------------------------
def allocation_inputs(seed: int) -> dict:
    """Two models. The first matrix of each is the embedding, as large as many others. Small matrices suffer most.

    Budgets are what a uniform model takes, (4, 64) or (3, 64) everywhere, and a little more, so that neither mistake fits by luck.
    """
    g = generator(seed)
    return {"four bits": _model(g, (4, 64)), "three bits": _model(g, (3, 64))}


def _model(g: torch.Generator, uniform: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    linears = torch.tensor([[256, 256], [128, 256], [128, 256], [256, 256], [768, 256], [768, 256], [256, 768], [64, 256]])
    shapes = torch.cat([torch.tensor([[4096, 256]]), linears[torch.randperm(8, generator=g)]])
    options = torch.tensor(OPTIONS)
    bits, size = options.unbind(1)
    # What a matrix loses falls to a quarter with each bit, and grows with the group.
    harm = (0.5 + torch.rand(9, generator=g)) * (2**16 / shapes.prod(1)) ** 0.5
    harm[TABLE] = 1.0 + torch.rand(1, generator=g).item()
    per_bit = 3.6 + 0.8 * torch.rand(9, 1, generator=g)
    loss = harm[:, None] * per_bit ** (2.0 - bits) * (1 + 0.4 * torch.rand(9, 1, generator=g) * (size / 32 - 1))
    stuck = 1 + int(torch.randint(8, (1,), generator=g))
    loss[stuck] = loss[stuck].mean() * 0.01  # this one loses next to nothing, whatever it gets
    place = OPTIONS.index(uniform)
    return loss, shapes, options, int(budgets.stored_bytes(shapes, options)[:, place].sum()) + 40


def _allocated(loss, shapes, options, budget, *, counted=budgets.stored_bytes, rate=lambda saved, extra: saved / extra, table=True):
    """A right answer, with what can go wrong as options: how bytes are counted, by what upgrades are compared, no table."""
    nbytes = counted(shapes, options)
    rows, choice = torch.arange(len(loss)), nbytes.argmin(1)
    left = budget - int(nbytes[rows, choice][0 if table else 1 :].sum())
    while True:
        saved, extra = loss[rows, choice][:, None] - loss, nbytes - nbytes[rows, choice][:, None]
        worth = torch.where((extra > 0) & (extra <= left) & (saved > 0), rate(saved, extra.clamp(min=1)), -torch.inf)
        if not table:
            worth[TABLE] = -torch.inf
        if worth.max() == -torch.inf:
            break
        matrix, option = divmod(int(worth.argmax()), len(options))
        left -= int(extra[matrix, option])
        choice[matrix] = option
    if not table:
        choice[TABLE] = nbytes[TABLE].argmax()
    return choice


def _uniform(loss, shapes, options, budget, *, finest=True):
    """One option for all: of those that fit the one with the least loss, or the cheapest."""
    nbytes = budgets.stored_bytes(shapes, options).sum(0)
    total = torch.where(nbytes <= budget, loss.sum(0), torch.inf)
    return (total if finest else nbytes.float()).argmin().repeat(len(loss))


def _codes_alone(shapes, options):
    return shapes.prod(1)[:, None] * options[:, 0] // 8


def _without_zero_points(shapes, options):
    return _codes_alone(shapes, options) + 2 * shapes.prod(1)[:, None] // options[:, 1]


def _totals(case: tuple, choice: torch.Tensor) -> tuple[float, int]:
    """Loss and bytes of an allocation."""
    loss, shapes, options, _ = case
    nbytes = budgets.stored_bytes(shapes, options)
    return loss.double().gather(1, choice[:, None]).sum().item(), int(nbytes.gather(1, choice[:, None]).sum())


def _over(given: dict, got: dict, want: dict) -> dict | None:
    for name, case in given.items():
        spent = _totals(case, got[name])[1]
        if spent > case[3]:
            return {"name": name, "spent": spent, "over": spent - case[3]}
    return None


def _missing_loss(given: dict, got: dict, want: dict) -> tuple[str, float, float] | None:
    """The first case whose loss is more than CLOSE times the reference's: its name, the loss and the reference's."""
    for name, case in given.items():
        have, best = _totals(case, got[name])[0], _totals(case, want[name])[0]
        if have > CLOSE * best:
            return name, have, best
    return None


def _accepts(given: dict, got: dict, want: dict):
    return None if _over(given, got, want) or _missing_loss(given, got, want) else right()


def _why_not(given: dict, got: dict, want: dict) -> str | None:
    if over := _over(given, got, want):
        return "{name}: it takes {spent} bytes, {over} more than the budget".format(**over)
    missing = _missing_loss(given, got, want)
    if missing is None:
        return None
    have, best = shown(*missing[1:])
    return f"{missing[0]}: the losses add up to {have}, buying what saves most for each byte ends at {best}"


ALLOCATE = Exercise(
    id="15.4", name="allocate", title="Spend a byte budget on a whole model", minutes=15, difficulty=4, points=4,
    returns=("choice",), inputs=allocation_inputs, reference=budgets.allocate, drive=drive_cases,
    accepts=_accepts, otherwise=_why_not,
    faults=(
        Fault("choice holds something else than places from 0 to 7, one for each matrix",
              lambda given, got, want: any(((choice < 0) | (choice > 7)).any() for choice in got.values()),
              (lambda loss, shapes, options, budget: options[_uniform(loss, shapes, options, budget), 0] * 8,)),
    ),
    mistakes=mistakes_by_option(_allocated, {
        "the bytes of scales and zero-points are missing: a group has 16 bits of scale and a zero-point of `bits` bits":
            {"counted": _codes_alone},
        "the zero-points are missing in the bytes: a code of `bits` bits for each group": {"counted": _without_zero_points},
        "the embedding has its finest choice and its bytes are not counted. It is the largest matrix of all, and stored as well":
            {"table": False},
        "upgrades are compared by the loss that they save, whatever they cost: divide by the bytes that they add":
            {"rate": lambda saved, extra: saved},
        "the cheapest upgrades are bought first, whatever they save": {"rate": lambda saved, extra: -extra.float()},
        "this is the best uniform choice: take bytes from where they help little and spend them where they help":
            lambda loss, shapes, options, budget: _uniform(loss, shapes, options, budget),
        "nothing was bought: every matrix still has its cheapest choice":
            lambda loss, shapes, options, budget: _uniform(loss, shapes, options, budget, finest=False),
        "each matrix has its finest choice, and the budget was not looked at":
            lambda loss, shapes, options, budget: budgets.stored_bytes(shapes, options).argmax(1),
    }),
    others=(
        Mutant(partial(_allocated, rate=lambda saved, extra: -saved), "the losses add up to"),
        Mutant(lambda loss, shapes, options, budget: loss.argmin(1), "more than the budget"),
    ),
)  # fmt: skip

EXERCISES = (ALLOCATE,)
