"""The planner's page against `labs plan`: random inputs, all figures shown, every sentence."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page
from typer.testing import CliRunner

from labsupport.cli import app
from labsupport.evidence import configs, planner, tables

Case = dict[str, Any]
LABELS = ("Model", "GPU, or CPU", "Memory in GB, if not that", "Tokens of a sequence", "Users, sequences at once", "Quality")
OWN = "your model"  # what the page calls a model whose config.json was copied in


def random_cases(count: int, seed: int = 17) -> Iterator[Case]:
    """Inputs over the whole range of the form. A third has a config of its own, sizes changed; a quarter another memory."""
    chance = random.Random(seed)
    models, cards = list(tables.architectures().values()), list(tables.cards())
    for _ in range(count):
        model = chance.choice(models)
        case: Case = {
            "model": model.name,
            "card": chance.choice(cards),
            "context": int(2 ** chance.uniform(0, 17)),
            "users": int(2 ** chance.uniform(0, 7)),
            "quality": chance.choice(tables.QUALITIES),
            "cache": chance.choice(list(planner.CACHES)),
        }
        if chance.random() < 1 / 3:
            config = json.loads(json.dumps(dict(model.config)))
            sizes = config.get("text_config", config)
            sizes["num_hidden_layers"] = chance.randint(1, 100)
            sizes["vocab_size"] = chance.randint(1000, 300_000)
            case |= {"model": None, "config": json.dumps(config)}
        if chance.random() < 1 / 4:
            case["memory"] = round(2 ** chance.uniform(1, 9), 1)
        yield case


# Configs that are refused, or that say little, and inputs that cannot be.
ODD_CONFIGS = (
    "{}", "[]", "3", '{"model_type": "bert"}', '{"model_type": 7}', '{"model_type": null}', '{"model_type": "toString"}',
    '{"model_type": "llama"}', '{"model_type": "llama", "num_attention_heads": "8"}',
    '{"model_type": "llama", "num_attention_heads": 8, "hidden_size": 4096.0}',
    '{"model_type": "llama", "num_attention_heads": 8, "hidden_size": -1}',
    '{"model_type": "llama", "num_attention_heads": true, "hidden_size": 64}',
    '{"model_type": "qwen3_moe", "num_attention_heads": 8, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}',
    '{"model_type": "gemma2", "num_attention_heads": 8, "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 100, '
    '"sliding_window": 8, "layer_types": ["full"]}',
    '{"model_type": "falcon", "alibi": true, "num_attention_heads": 8, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 9}',
    '{"model_type": "opt", "num_attention_heads": 8, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 9, '
    '"word_embed_proj_dim": 32}',
    '{"model_type": "deepseek_v3", "num_attention_heads": 8, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 9}',
    '{"model_type": "llama", "num_attention_heads": 8, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 9}',
)  # fmt: skip


def odd_cases() -> Iterator[Case]:
    """One config each, on a card that has room for it; then plans that do not fit, on every kind of card."""
    usual = {"card": "RTX 4090", "context": 512, "users": 1, "quality": "little-loss", "cache": "bf16"}
    yield from (usual | {"model": None, "config": config} for config in ODD_CONFIGS)
    for card in ("T4", "H100 SXM", "CPU", "RTX 5090", "MI300X"):
        yield usual | {"model": "Llama-3.1-405B", "card": card}
    yield usual | {"model": "gpt-oss-120b", "card": "H100 SXM", "context": 131072, "users": 64, "quality": "near-lossless"}
    yield usual | {"model": "Llama-2-7B", "card": "T4", "context": 65536, "users": 8}


def by_command(case: Case, folder: Path) -> list[str]:
    """What `labs plan` prints, a line each, spaces between columns made one tab; of an error its sentence."""
    model = case["model"]
    if model is None:
        place = folder / OWN
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(case["config"], "utf-8")
        model = str(place)
    words = ["plan", "--model", model, "--gpu", case["card"], "--quality", case["quality"], "--cache", case["cache"]]
    words += ["--context", str(case["context"]), "--users", str(case["users"])]
    words += ["--memory", str(case["memory"])] if "memory" in case else []
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    if done.exit_code:
        return [done.stderr.strip().removeprefix("labs plan: ").replace(f"{folder / OWN}/", "")]
    return [re.sub(r" {2,}", "\t", line.strip()) for line in done.stdout.split("\n") if line.strip()]


def parts_by_command(case: Case, folder: Path) -> list[str]:
    """Bytes by part of what is recommended, which `labs plan --json` has."""
    shape = tables.model(case["model"] or folder / OWN)
    card = tables.card(case["card"])
    plan = planner.plan(shape, card, case["form"], case["context"], case["users"], case["cache"])
    return [f"{part}\t{size / 1e9:,.2f}" for part, size in (*plan.parts.items(), ("total", plan.total))]


def by_page(page: Page, case: Case) -> list[str]:
    """The same lines from the page."""
    page.select_option("#model", case["model"] or "own")
    page.select_option("#card", case["card"])
    page.fill("#memory", str(case.get("memory", "")))
    page.fill("#context", str(case["context"]))
    page.fill("#users", str(case["users"]))
    page.select_option("#quality", case["quality"])
    page.select_option("#cache", case["cache"])
    if case["model"] is None:
        page.fill("#config", case["config"])
    page.evaluate("clearTimeout(waiting); answer()")  # what is typed is answered after a moment
    if page.locator("#answer.problem").count():
        return [page.locator("#answer").inner_text()]
    about, evidence, assumptions = (page.locator("#plan ul").nth(i).locator("li").all_inner_texts() for i in range(3))
    rows = _rows(page, "#options tr", 7)
    recommended = page.locator("#recommended p").all_inner_texts()
    lists = ["Evidence", *(f"- {line}" for line in evidence), "Assumptions", *(f"- {line}" for line in assumptions)]
    return [*about, *rows, *recommended, *lists]


def parts_by_page(page: Page) -> list[str]:
    return _rows(page, "#parts tbody tr", 2)


def _rows(page: Page, rows: str, columns: int) -> list[str]:
    cells = page.locator(rows).evaluate_all("rows => rows.map((row) => [...row.children].map((cell) => cell.innerText.trim()))")
    return ["\t".join(row[:columns]) for row in cells]


def differences(page: Page, cases: list[Case], folder: Path) -> Iterator[str]:
    """The first line of each case in which page and command differ."""
    for case in cases:
        theirs, ours = by_command(case, folder), by_page(page, case)
        if len(ours) > 1 and (used := re.search(r"^Use (\S+):", "\n".join(theirs), re.MULTILINE)) and "memory" not in case:
            theirs += parts_by_command(case | {"form": used[1]}, folder)
            ours += parts_by_page(page)
        if theirs != ours:
            wanted, got = next(((a, b) for a, b in zip(theirs, ours, strict=False) if a != b), (theirs[-1], ours[-1]))
            yield f"{case}: labs plan says {wanted!r}, the page {got!r}"


def shape_differences(page: Page) -> Iterator[str]:
    """Every model of the table, by its config.json: weights, those that a token meets, what it leaves in the cache of a layer."""
    sizes = "(each) => [each.parameters, each.active, each.cachedNumbers]"
    sizes = f"TABLES.models.map(({{ name, config }}) => shapeOf(config, name)).map({sizes})"
    for model, found in zip(tables.architectures().values(), page.evaluate(sizes), strict=True):
        shape = model.shape
        if found != (wanted := [shape.parameters, shape.active_parameters, shape.cached_numbers]):
            yield f"{model.name}: {found}, wanted {wanted}"
    known = page.evaluate("Object.keys(FAMILIES)")
    if set(known) != set(configs.FAMILIES):
        yield f"the page knows {known}, labsupport {list(configs.FAMILIES)}"


def by_keyboard(page: Page) -> Iterator[str]:
    """What somebody without a mouse meets: every field has a name and is reached by Tab; an answer is announced after a moment."""
    for name in LABELS:
        if page.get_by_label(name, exact=True).count() != 1:
            yield f"no field is called {name}"
    page.reload()
    page.locator("#model").focus()
    for name in ("card", "memory", "context", "users"):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") != name:
            yield f"Tab leads to {page.evaluate('document.activeElement.id')}, wanted {name}"
    before = page.get_by_role("status").inner_text()
    page.keyboard.type("64")
    page.wait_for_function("before => document.getElementById('answer').innerText !== before", arg=before)
    page.locator("#users").fill("0")
    page.get_by_role("status").get_by_text("users is 0, wanted a whole number, at least 1").wait_for()
    page.select_option("#model", "own")
    page.fill("#users", "1")
    page.fill("#config", "{")
    page.get_by_role("status").get_by_text("config.json cannot be read:").wait_for()
