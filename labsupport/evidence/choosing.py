"""Which method for this model on this card: the first rule of data/planner/rules.yaml that fits, its reason, and its evidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from labsupport.evidence import claims, measurements, planner, tables
from labsupport.evidence.planner import OnCard, Plan
from labsupport.evidence.shapes import Shape
from labsupport.evidence.tables import QUALITIES, TASKS, Card, Format, Rule
from labsupport.model import models

RANK = 16  # of the adapters that fine-tuning is planned with
ASSUMPTIONS = (
    "A GB is 10**9 bytes, for cards too; most have up to 7 % more.",
    f"Adapters of rank {RANK} beside every linear of the blocks, AdamW with paged states of 8 bits; of a block its input alone is "
    "kept, and its backward pass computes the rest again. The base is NF4 with double quantization, the rest bf16.",
    "Temporary is an estimate of what else is held at the busiest moment: labsupport/evidence/training_memory.py.",
)
SHOOTOUT = "shootout"  # the sweep in which every method stands; its rows come before those of a method's own sweep


class Impossible(ValueError):
    """Nothing that is asked for fits. One line, which says what would."""


class Finetuning(OnCard):
    """What a training step takes, by kind of bytes as training_memory counts them, and the reserve. users: the batch."""


@dataclass(frozen=True)
class Measured:
    """What a format costs on a small model, from stored rows: the rise in perplexity as a fraction, with its interval of 95 %.

    Where several settings were measured, `settings` of them, it is the best one. file: below data/measurements.
    """

    model: str
    method: str
    group_size: int | str | None
    change: float
    low: float
    high: float
    settings: int
    file: str

    def __str__(self) -> str:
        group = f", groups of {self.group_size}" if self.group_size else ""
        best = f", best of {self.settings} settings" if self.settings > 1 else ""
        low, change, high = (f"{100 * each:+.2f}" for each in (self.low, self.change, self.high))
        return f"{self.method}{group}, {self.model}: perplexity {change} % [{low}, {high}]{best} (data/measurements/{self.file})"


@dataclass(frozen=True)
class Choice:
    """What is recommended. passed_over: formats of rules that come before and do not fit, with the bytes that they would take."""

    plan: Plan | Finetuning
    rule: Rule
    passed_over: tuple[tuple[str, float], ...]

    @property
    def evidence(self) -> list[str]:
        """See `evidence`."""
        return evidence(self.rule)


def recommend(
    shape: Shape, card: Card, context: int = 8192, users: int = 1, quality: str = "little-loss", task: str = "serve",
    cache: str = "bf16",
) -> Choice:  # fmt: skip
    """The first rule that speaks of this model, card, quality and task, and whose bytes fit.

    For task "finetune" `users` is the batch and quality has no say. Raises Impossible where nothing fits or no rule speaks of the
    card, ValueError for an unknown quality, task or cache.
    """
    for name, value, wanted in (("quality", quality, QUALITIES), ("task", task, TASKS)):
        if value not in wanted:
            raise ValueError(f"{name} is {value!r}, wanted one of {', '.join(wanted)}")
    passed_over = []
    for rule in _speaking(shape, card, quality, task):
        plan = _planned(shape, card, tables.formats()[rule.format], context, users, task, cache)
        if plan.fits:
            return Choice(plan, rule, tuple(passed_over))
        passed_over.append((rule.format, plan.total))
    raise Impossible(_what_would_fit(shape, card, context, users, quality, task, cache, passed_over))


def _speaking(shape: Shape, card: Card, quality: str, task: str) -> list[Rule]:
    """A model that was published in few bits has no other form to start from: where a rule is for it, no other rule speaks."""
    rules = [rule for rule in tables.rules() if rule.speaks_of(shape, card, quality, task)]
    return [rule for rule in rules if rule.native] or rules


def options(shape: Shape, card: Card, context: int = 8192, users: int = 1, cache: str = "bf16") -> list[Plan]:
    """A plan for 16 bits and for each format that a rule for this card and serving names, largest weights first."""
    names = {rule.format for quality in QUALITIES for rule in _speaking(shape, card, quality, "serve")}
    forms = [form for name, form in tables.formats().items() if name == "bf16" or name in names]
    plans = [planner.plan(shape, card, form, context, users, cache) for form in forms]
    return sorted(plans, key=lambda plan: -plan.total)


def _planned(shape: Shape, card: Card, form: Format, context: int, users: int, task: str, cache: str) -> Plan | Finetuning:
    if task == "serve":
        return planner.plan(shape, card, form, context, users, cache)
    return finetuning(shape, card, form, context, users)


def finetuning(shape: Shape, card: Card, form: Format, context: int, batch: int = 1, rank: int = RANK) -> Finetuning:
    """Bytes of a step of QLoRA with checkpointing and a paged optimizer in 8 bits, on `batch` windows of `context` tokens.

    Raises ValueError for a model whose blocks are not those of a Llama, as training_memory counts no other.
    """
    from labsupport.evidence import training_memory

    if not shape.is_llama:
        raise ValueError(
            f"{shape.name} has other blocks than a Llama, and the bytes of a training step are counted for Llamas alone"
        )
    step = training_memory.Step("qlora", batch, context, rank, optimizer="adamw-8bit", paged=True, checkpointing=True)
    parts = {**training_memory.totals(training_memory.count(shape, step)), "reserve": card.reserve * card.memory}
    return Finetuning(shape=shape, card=card, form=form, context=context, users=batch, parts=MappingProxyType(parts))


def _what_would_fit(
    shape: Shape, card: Card, context: int, users: int, quality: str, task: str, cache: str, tried: list[tuple[str, float]]
) -> str:
    """One line: what does not fit, and the nearest things that do."""
    if not tried:
        known = sorted({family for rule in tables.rules() if rule.task == task for family in rule.families})
        return f"no rule is about {task} on {card.name} ({card.family}); there are rules for {', '.join(known)}"
    name, least = min(tried, key=lambda each: each[1])
    who = f"{users} user{'s' * (users > 1)}" if task == "serve" else f"a batch of {users}"
    takes = f"{name} with {who} of {context:,} tokens takes {least / 1e9:,.1f} of {card.memory / 1e9:,.0f} GB"
    said = f"{shape.name} does not fit {card.name}: {takes}"
    fits = list(_fitting(shape, card, context, users, quality, task, cache, name))
    return f"{said}. What would fit: {'; '.join(fits) if fits else 'nothing on one card of the table'}"


def _fitting(
    shape: Shape, card: Card, context: int, users: int, quality: str, task: str, cache: str, name: str
) -> Iterator[str]:  # fmt: skip
    form = tables.formats()[name]
    if task == "serve":
        plan = planner.plan(shape, card, form, context, users, cache)
        if plan.most_users:
            yield f"{plan.most_users} user{'s' * (plan.most_users > 1)} of {context:,} tokens"
        if plan.longest_context:
            yield f"{plan.longest_context:,} tokens each"
        if cache == "bf16" and planner.plan(shape, card, form, context, users, "fp8").fits:
            yield "an fp8 cache"
        for lower in QUALITIES[QUALITIES.index(quality) + 1 :]:
            smaller = next(
                (f for f in _formats(shape, card, lower) if planner.plan(shape, card, f, context, users, cache).fits), None
            )
            if smaller:
                yield f"{smaller.name}, where the quality may be {lower}"
                break
    for other in sorted(tables.cards().values(), key=lambda each: each.memory):
        forms = [tables.formats()[rule.format] for rule in _speaking(shape, other, quality, task)]
        if other.memory > card.memory and any(_planned(shape, other, f, context, users, task, cache).fits for f in forms):
            yield f"{other.name} ({other.memory / 1e9:,.0f} GB)"
            break


def _formats(shape: Shape, card: Card, quality: str) -> list[Format]:
    return [tables.formats()[rule.format] for rule in _speaking(shape, card, quality, "serve")]


def evidence(rule: Rule) -> list[str]:
    """What supports a rule and the quality of its format: citations, claims with their verdicts, and measured rows."""
    return [*(_said(each) for each in rule.evidence), *(str(each) for each in measured(tables.formats()[rule.format]))]


def _said(evidence: Mapping[str, Any]) -> str:
    if "cite" in evidence:
        return str(evidence["cite"])
    claim = claims.claims()[evidence["claim"]]
    return f"claim {claim.number} ({claim.verdict}): {claim.claim}"


@cache
def measured(form: Format) -> tuple[Measured, ...]:
    """What the course measured of a format's quality, for each model and method; empty where it has no such method.

    Rows of the shootout come before those of a method's own sweep. Raises ValueError where formats.yaml names rows that are not
    there.
    """
    return tuple(_measured(**each) for each in form.measured)


def _measured(sweep: str, where: Mapping[str, Any], model: str = "course-model") -> Measured:
    folder = "" if model == "course-model" else f"{model}/"
    for name in (SHOOTOUT, sweep) if "method" in where else (sweep,):
        path = models.data_dir() / "measurements" / f"{folder}{name}.json"
        if name == SHOOTOUT and not path.is_file():
            continue
        _, rows = measurements.read(path)
        rows = [row for row in rows if row.get("planted") is None and all(row.get(key) == value for key, value in where.items())]
        if rows:
            best = min(rows, key=lambda row: row["change"])
            group = where.get("group_size") or where.get("block_size")
            method = where.get("method", sweep)
            return Measured(model, method, group, best["change"], best["low"], best["high"], len(rows), f"{folder}{name}.json")
    raise ValueError(f"data/measurements/{folder}{sweep}.json has no row with {dict(where)}")
