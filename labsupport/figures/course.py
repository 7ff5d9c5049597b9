"""The course itself and the model it starts from: the map, what a model weighs, what it finds hard, what it is held against."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from matplotlib.patches import FancyBboxPatch

from labsupport.figures import base
from labsupport.figures.base import CourseFigure

# Chapters by lane: number, name as in the notebook's file, what it is about. A lane is read from left to right.
LANES: dict[str, tuple[tuple[int, str, str], ...]] = {
    "Rulers": (
        (0, "start_here", "which machine, which model, am I right?"),
        (1, "why_four_bits", "why fewer bytes are faster"),
        (2, "rounding", "what a grid costs, bit by bit"),
        (3, "group_size", "what one more scale buys"),
    ),
    "Methods": (
        (4, "int8_outliers", "why one column ruins int8"),
        (5, "nf4", "where sixteen levels should stand"),
        (6, "gptq", "what the other weights can do"),
        (7, "gptq_in_practice", "groups, order, damping, samples"),
        (8, "awq", "which weights matter"),
        (9, "kv_cache", "when the cache outgrows the model"),
    ),
    "In use": (
        (10, "packing_and_checkpoints", "what is stored, who can read it"),
        (11, "kernels", "what the processor does with it"),
        (12, "finetune_merge_requantize", "when a quantized model must learn"),
        (13, "quantization_aware_training", "can training like the grid?"),
    ),
    "Deciding": (
        (14, "shootout", "which method wins, and is it real?"),
        (15, "choose_and_ship", "which one on Monday"),
    ),
}
PER_ROW = 4  # a longer lane goes on in a row below
WIDTH, HEIGHT = 1.0, 0.72  # of a box; boxes stand 1.12 apart, rows 0.86, and lanes 0.14 further


def _wrapped(words: Sequence[str], length: int) -> str:
    """Words in lines of at most `length` characters, as far as the words allow."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > length:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def map() -> CourseFigure:
    """The chapters of the course in lanes."""
    summary = "; ".join(f"{lane}: " + ", ".join(f"{n:02} {name}" for n, name, _ in row) for lane, row in LANES.items())
    rows = sum(-(-len(row) // PER_ROW) for row in LANES.values())
    bottom = 0.86 * rows + 0.14 * (len(LANES) - 1)
    figure, axis = base.new(f"Map of the course, four lanes of chapters. {summary}.", size=(base.WIDTH, 0.98 * bottom + 0.2))
    axis.axis("off")
    axis.set(xlim=(-0.65, 1.12 * PER_ROW), ylim=(bottom + 0.02, -0.06))
    y = 0.0
    for lane, row in LANES.items():
        axis.text(-0.63, y + HEIGHT / 2, lane, fontsize=base.FONT + 1, weight="bold", va="center")
        for place, (number, name, about) in enumerate(row):
            x = place % PER_ROW
            if place and not x:
                y += 0.86
            left = 1.12 * x
            axis.add_patch(
                FancyBboxPatch(
                    (left + 0.04, y + 0.04), WIDTH - 0.08, HEIGHT - 0.08, "round,pad=0.04,rounding_size=0.07",
                    facecolor=base.PALE_BLUE, edgecolor=base.BLUE, linewidth=1.2,
                )
            )  # fmt: skip
            title, about = _wrapped([f"{number:02}", *name.split("_")], 19), _wrapped(about.split(), 21)
            axis.text(left + 0.5, y + 0.06, title, ha="center", va="top", fontsize=base.FONT, weight="bold", linespacing=1.05)
            axis.text(left + 0.5, y + HEIGHT - 0.06, about, ha="center", va="bottom", fontsize=base.SMALL, linespacing=1.1)
            if x:
                arrow = {"arrowstyle": "->", "color": base.BLACK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
                axis.annotate("", (left, y + HEIGHT / 2), (left - 0.12, y + HEIGHT / 2), arrowprops=arrow)
        y += 1.0
    return figure


def parts(sizes: Mapping[str, Mapping[str, float]]) -> CourseFigure:
    """Bytes of a model by part, one bar for each form in which it is kept. sizes: by bar, then by part, in bytes."""
    totals = {bar: sum(by_part.values()) for bar, by_part in sizes.items()}
    summary = "; ".join(
        f"{bar} {totals[bar] / 1e6:.3g} MB, of which " + ", ".join(f"{part} {b / 1e6:.2g}" for part, b in by_part.items())
        for bar, by_part in sizes.items()
    )
    figure, axis = base.new(f"Bars of the bytes of a model by part: {summary}.", size=(7.2, 0.9 + 0.5 * len(sizes)))
    for place, by_part in enumerate(sizes.values()):
        start = 0.0
        for (part, count), (color, hatch) in base.filled(by_part.items()):
            label = part if place == 0 else None
            axis.barh(place, count / 1e6, left=start, color=color, hatch=hatch, edgecolor="white", linewidth=0.4, label=label)
            start += count / 1e6
        axis.text(start, place, f" {start:.1f} MB", va="center", fontsize=base.SMALL)
    axis.set(xlim=(0, 1.15 * max(totals.values()) / 1e6), yticks=range(len(sizes)), ylim=(len(sizes) - 0.5, -0.5))
    axis.set_yticklabels(list(sizes))
    base.label(axis, "Where the bytes are", "memory (MB)", "")
    figure.legend(loc="outside lower center", ncols=4, fontsize=base.SMALL, frameon=False)
    return figure


def token_losses(tokens: Sequence[str], losses: Sequence[float], vocabulary: int) -> CourseFigure:
    """The loss of each token of a passage, one bar a token, with the mean and what guessing evenly would cost. Losses in nats."""
    losses = [float(x) for x in losses]
    mean, guess = sum(losses) / len(losses), math.log(vocabulary)
    ordered, carried, few = sorted(losses, reverse=True), 0.0, 0
    while carried < sum(losses) / 2:
        carried, few = carried + ordered[few], few + 1
    worst = tokens[max(range(len(losses)), key=losses.__getitem__)]
    alt = (
        f"Bars of the loss of {len(tokens)} tokens in nats, from {min(losses):.2g} to {max(losses):.2g}, mean {mean:.2f}; the "
        f"hardest is {worst!r}, and {few} carry half of it. A dashed line marks {guess:.1f}, the loss of guessing evenly among "
        f"{vocabulary} tokens."
    )
    figure, axis = base.new(alt, size=(base.WIDTH, 3.4))
    axis.bar(range(len(losses)), losses, color=base.SKY, edgecolor=base.BLUE, linewidth=0.5)
    axis.axhline(guess, color=base.RED, linestyle="--", linewidth=1.2, label="guessing evenly")
    axis.axhline(mean, color=base.BLACK, linewidth=1.2, label=f"mean {mean:.2f}: perplexity {math.exp(mean):.2f}")
    shown = [re.sub(" {4,}", lambda run: f"\u00b7x{len(run[0])}", t) for t in tokens]
    shown = [t.replace("\n", "\u21b5").replace(" ", "\u00b7").replace("$", r"\$") for t in shown]
    axis.set_xticks(range(len(tokens)), shown, rotation=90, fontsize=base.SMALL, family="monospace")
    axis.set_xlim(-0.7, len(tokens) - 0.3)
    marks = "\u00b7 a space, \u21b5 a line's end"
    base.label(
        axis,
        f"{few} of {len(losses)} tokens carry half of the loss",
        f"token of the passage ({marks})",
        "loss (nats)",
    )
    axis.set_ylim(0, 1.2 * max(guess, *losses))
    base.legend(axis, loc="upper right", ncols=2)
    return figure


def yardsticks(bits: Mapping[str, float], ours: str) -> CourseFigure:
    """Bits for each byte that several ways of describing one text need. `ours`: the bar to draw in another color."""
    summary = ", ".join(f"{name} {value:.2f}" for name, value in bits.items())
    figure, axis = base.new(f"Bars of bits for each byte of one text: {summary}.", size=(7.2, 0.9 + 0.34 * len(bits)))
    colors = [base.BLUE if name == ours else base.SKY for name in bits]
    axis.barh(range(len(bits)), list(bits.values()), color=colors, hatch=["///" if c == base.BLUE else "" for c in colors])
    for place, value in enumerate(bits.values()):
        axis.text(value, place, f" {value:.2f}", va="center", fontsize=base.SMALL)
    axis.set(yticks=range(len(bits)), ylim=(len(bits) - 0.5, -0.5), xlim=(0, 1.1 * max(bits.values())))
    axis.set_yticklabels(list(bits))
    base.label(axis, "What the held-out text costs to describe", "bits for each byte", "")
    return figure
