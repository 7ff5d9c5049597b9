"""labs plan: what fits, how fast it could be, and which method to use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from labsupport.cli.messages import echo, fail

if TYPE_CHECKING:
    from labsupport.evidence.choosing import Choice
    from labsupport.evidence.planner import Plan

app = typer.Typer()


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Option(help="A name of the table (--list), a config.json, or a directory with one; nothing is downloaded."),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="A name of the table (--list), in any spelling; CPU for none.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each sequence, prompt and answer.")] = 8192,
    users: Annotated[int, typer.Option(min=1, help="Sequences at once; with --finetune the batch.")] = 1,
    quality: Annotated[str, typer.Option(help="near-lossless, little-loss or smallest.")] = "little-loss",
    cache: Annotated[str, typer.Option(help="Keys and values in bf16 or fp8.")] = "bf16",
    finetune: Annotated[bool, typer.Option("--finetune", help="Plan QLoRA instead of serving.")] = False,
    memory: Annotated[
        float | None, typer.Option(min=0.001, help="GB, where your machine has another size: of a CPU, of an Apple chip.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Print published sizes and speeds beside those computed here.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Print the models and GPUs of the table, with their sources.")] = False,
) -> None:
    """Say what a model takes on a GPU, how fast it could be, and which method to use, with the reason and the evidence.

    Bytes are those of weights, cache and activations; tokens a second are an upper bound, from a roofline. Exit code 1 where
    nothing fits: the line says what would.
    """
    from labsupport.evidence import choosing, tables

    if check or listing:
        (_check if check else _list)()
        return
    try:
        if model is None or gpu is None:
            raise ValueError(f"{'--model' if model is None else '--gpu'} is missing; `labs plan --list` prints the names")
        shape, card = tables.model(model), tables.card(gpu)
        if memory:
            card = replace(card, memory=1e9 * memory)
        task = "finetune" if finetune else "serve"
        choice = choosing.recommend(shape, card, context, users, quality, task, cache)
        others = [] if finetune else choosing.options(shape, card, context, users, cache)
    except (ValueError, OSError) as error:
        fail("plan", error)
    if as_json:
        _print_json(choice, others)
    else:
        _print(choice, others, f"batch {users}" if finetune else f"{users} user{'s' * (users > 1)}", quality)


def _table(*names: str, left: int = 1) -> Any:
    from rich.table import Table

    table = Table(*names, box=None, pad_edge=False)
    for column in table.columns[left:]:
        column.justify = "right"
    return table


def _print(choice: Choice, others: Sequence[Plan], who: str, quality: str) -> None:
    from rich.console import Console

    from labsupport.evidence import choosing, planner

    chosen, console = choice.plan, Console(highlight=False)
    shape, card = chosen.shape, chosen.card
    echo(f"{shape.name}, {shape.parameters / 1e9:,.2f} billion parameters, {shape.active_parameters / 1e9:,.2f} for each token")
    echo(f"{card.name}, {card.memory / 1e9:,.0f} GB at {card.bandwidth / 1e9:,.0f} GB/s ({card.source})")
    echo(f"{who}, {chosen.context:,} tokens each" + (f"; quality {quality}" if others else ""))
    echo("")
    if isinstance(chosen, choosing.Finetuning):
        table = _table("part", "GB")
        for part, size in (*chosen.parts.items(), ("total", chosen.total)):
            table.add_row(part, f"{size / 1e9:,.2f}")
    else:
        table = _table("format", "weights", "cache", "rest", "total GB", "tokens/s <=", "most users")
        for each in others:
            weights = each.parts["linears"] + each.parts["embedding and head"]
            rest = each.total - weights - each.parts["KV cache"]
            sizes = [f"{size / 1e9:,.1f}" for size in (weights, each.parts["KV cache"], rest, each.total)]
            style = "bold" if each.form is chosen.form else "" if each.fits else "dim"
            speed = f"{each.tokens_per_second:,.0f}" if each.fits else "too large"
            table.add_row(each.form.name, *sizes, speed, f"{each.most_users:,}", style=style)
    console.print(table)
    echo("")
    echo(f"Use {chosen.form.name}: {chosen.form.title}. {choice.rule.reason}.")
    echo(f"Made with: {chosen.form.made_with}.")
    for name, size in choice.passed_over:
        echo(f"{name} would come before it, but takes {size / 1e9:,.1f} GB.")
    if isinstance(chosen, choosing.Finetuning):
        assumed = choosing.ASSUMPTIONS
    else:
        assumed = planner.ASSUMPTIONS
        if (group := planner.group_size(shape, chosen.form)) != chosen.form.group:
            echo(f"Groups of {group} here: {chosen.form.group} does not divide the inputs of every linear.")
        if chosen.prefill_seconds is not None:
            echo(
                f"A prompt of {chosen.context:,} tokens takes at least {chosen.prefill_seconds:.2g} s; {chosen.limit} limits steps."
            )
        echo(f"With {who} a sequence can have {chosen.longest_context:,} tokens.")
    for title, lines in (("Evidence", choice.evidence), ("Assumptions", assumed)):
        echo("")
        echo(title)
        for line in lines:
            echo(f"- {line}")


def _print_json(choice: Choice, others: Sequence[Plan]) -> None:
    import json

    from labsupport.evidence import choosing, planner

    chosen = choice.plan
    echo(json.dumps({
        "model": chosen.shape.name, "parameters": chosen.shape.parameters, "active_parameters": chosen.shape.active_parameters,
        "gpu": chosen.card.name, "memory": chosen.card.memory, "context": chosen.context, "users": chosen.users,
        "recommended": {"format": chosen.form.name, "total": chosen.total, "parts": dict(chosen.parts),
                        "reason": choice.rule.reason, "evidence": choice.evidence, "made_with": chosen.form.made_with},
        "passed_over": [{"format": name, "total": size} for name, size in choice.passed_over],
        "options": [{"format": each.form.name, "fits": each.fits, "total": each.total, "parts": dict(each.parts),
                     "tokens_per_second_at_most": each.tokens_per_second, "limit": each.limit,
                     "prefill_seconds_at_least": each.prefill_seconds, "most_users": each.most_users,
                     "longest_context": each.longest_context} for each in others],
        "assumptions": list(planner.ASSUMPTIONS if others else choosing.ASSUMPTIONS),
    }))  # fmt: skip


def _check() -> None:
    from rich.console import Console

    from labsupport.evidence import published

    table = _table("figure", "published", "computed", "", "share")
    for each in published.figures():
        *numbers, unit = each.shown
        table.add_row(each.about, *numbers, unit, f"{100 * each.share:.1f} %")
    Console(highlight=False).print(table)
    echo("")
    for source in dict.fromkeys(each.source for each in published.figures()):
        echo(f"- {'; '.join(each.about for each in published.figures() if each.source == source)}: {source}")
    wrong = [each.about for each in published.figures() if not each.agrees]
    if wrong:
        fail("plan", f"the planner disagrees with what is published on {'; '.join(wrong)}")
    echo("")
    echo(f"Sizes agree within {100 * published.WITHIN:.0f} %. Speeds are below the limit, by what the share says.")


def _list() -> None:
    from rich.console import Console

    from labsupport.evidence import tables

    console = Console(highlight=False)
    models = _table("model", "parameters", "config.json of")
    models.columns[-1].justify = "left"
    for each in tables.architectures().values():
        models.add_row(each.name, f"{each.shape.parameters / 1e9:,.2f} billion", each.hub)
    cards = _table("gpu", "GB", "GB/s")
    for each in tables.cards().values():
        cards.add_row(each.name, f"{each.memory / 1e9:,.0f}", f"{each.bandwidth / 1e9:,.0f}")
    console.print(models)
    console.print()
    console.print(cards)
    echo("")
    for each in tables.cards().values():
        echo(f"- {each.name}: {each.source}")
