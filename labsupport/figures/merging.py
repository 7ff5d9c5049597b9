"""A quantized model that must learn, drawn: where weights stand between levels, what of an update survives, arms, and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure

Arm = tuple[float, float, float, Sequence[float]]  # change, low, high, the change of each seed; 0.01 is 1 %


def places(bases: Mapping[str, tuple[torch.Tensor, torch.Tensor]], title: str) -> CourseFigure:
    """Where the weights of a linear stand between the two middles around their level, before and after an update.

    bases: by name, places before and after, float of any shape: 0 is the level, -1/2 and 1/2 are the middles of the gaps beside it.
    """
    parts, shares = [], {}
    for name, (before, after) in bases.items():
        shares[name] = (base.drawable(after).abs() > 0.5).float().mean().item()
        on_level = (base.drawable(before).abs() < 0.01).float().mean().item()
        parts.append(f"{name}: {100 * on_level:.0f} % stand on a level before; {100 * shares[name]:.2g} % pass a middle")
    alt = f"{title}. Histograms of places between the middles beside a level, before and after the update. {'; '.join(parts)}."
    figure, axes = base.new(alt, 1, len(bases), size=(base.WIDTH, 3.2), squeeze=False)
    edges = torch.linspace(-0.8, 0.8, 81)
    for axis, (name, pair) in zip(axes[0], bases.items(), strict=True):
        for values, color, filled, label in zip(pair, (base.GREY, base.BLUE), (True, False), ("before", "after"), strict=True):
            counts = torch.histogram(base.drawable(values).float().flatten(), edges).hist / values.numel()
            axis.stairs(100 * counts, edges, color=color, fill=filled, linewidth=1.5, label=label)
        for middle in (-0.5, 0.5):
            axis.axvline(middle, color=base.RED, linestyle="--", linewidth=1)
        axis.set_yscale("symlog", linthresh=1)
        scales.plain_numbers(axis.yaxis)
        base.label(axis, f"{name}: {100 * shares[name]:.2g} % pass a middle", "place (gaps to the next level)", "weights (%)")
    base.legend(axes[0, 0], loc="upper right")
    figure.suptitle(title, fontsize=base.FONT + 1, x=0.01, ha="left")
    return figure


def survival(sizes: Sequence[float], lines: Mapping[str, Sequence[float]], unit: str) -> CourseFigure:
    """How much of an update is left after rounding, against its size. sizes: times the update; lines: shares, by way."""
    summary = "; ".join(
        f"{name} from {line[0]:.2f} at {sizes[0]:g} to {line[-1]:.2f} at {sizes[-1]:g}" for name, line in lines.items()
    )
    figure, axis = base.new(
        f"Share of an update that is left after rounding, against its size, {unit}: {summary}.", size=(6.6, 3.4)
    )
    for (name, line), (color, marker, style) in base.styled(lines.items()):
        axis.plot(sizes, line, color=color, marker=marker, linestyle=style, markersize=4, label=name)
    axis.axhline(1, color=base.GREY, linewidth=0.9)
    axis.set_xscale("log")
    scales.ticks_at(axis.xaxis, sizes)
    base.label(axis, "What is left of an update after rounding", f"size of the update ({unit})", "share left (1: all)")
    base.legend(axis, loc="best")
    return figure


def arms(panels: Mapping[str, Mapping[str, Arm]], title: str) -> CourseFigure:
    """Changes in perplexity, intervals over documents, and each seed as a mark: a row for each arm, a panel for each text."""
    summaries = []
    for panel, rows in panels.items():
        found = "; ".join(f"{name} {100 * low:+.1f} to {100 * high:+.1f} %" for name, (_, low, high, _) in rows.items())
        summaries.append(f"{panel}: {found}")
    names = list(next(iter(panels.values())))
    size = (base.WIDTH, 1.1 + 0.36 * len(names))
    figure, axes = base.new(f"{title}. {'. '.join(summaries)}.", 1, len(panels), size=size, sharey=True, squeeze=False)
    for axis, (panel, rows) in zip(axes[0], panels.items(), strict=True):
        for place, (change, low, high, seeds) in enumerate(rows.values()):
            axis.plot([100 * low, 100 * high], [place, place], color=base.BLUE, linewidth=2)
            axis.plot(100 * change, place, "o", color=base.BLUE, markersize=6)
            axis.plot([100 * seed for seed in seeds], [place + 0.22] * len(seeds), "|", color=base.BLACK, markersize=6)
        axis.axvline(0, color=base.GREY, linewidth=1)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        base.label(axis, panel, "change in perplexity (%)", "arm" if axis is axes[0, 0] else "")
    figure.suptitle(title, fontsize=base.FONT + 1, x=0.01, ha="left")
    return figure


def memory(bars: Mapping[str, Mapping[str, float]], title: str, unit: str = "GB") -> CourseFigure:
    """Bytes of a training step by kind, one bar for each way to train. unit: "GB" or "MB"."""
    divisor = {"GB": 1e9, "MB": 1e6}[unit]
    totals = {bar: sum(kinds.values()) / divisor for bar, kinds in bars.items()}
    summary = "; ".join(
        f"{bar} {totals[bar]:.1f} {unit}, of which " + ", ".join(f"{kind} {value / divisor:.2g}" for kind, value in kinds.items())
        for bar, kinds in bars.items()
    )
    figure, axis = base.new(f"{title}: {summary}.", size=(base.WIDTH, 1.0 + 0.5 * len(bars)))
    for place, kinds in enumerate(bars.values()):
        start = 0.0
        for (kind, value), (color, hatch) in base.filled(kinds.items()):
            label = kind if place == 0 else None
            axis.barh(place, value / divisor, left=start, color=color, hatch=hatch, edgecolor="white", linewidth=0.4, label=label)
            start += value / divisor
        axis.text(start, place, f" {start:.1f} {unit}", va="center", fontsize=base.SMALL)
    axis.set(xlim=(0, 1.15 * max(totals.values())), yticks=range(len(bars)), ylim=(len(bars) - 0.5, -0.5))
    axis.set_yticklabels(list(bars))
    base.label(axis, title, f"memory ({unit})", "")
    figure.legend(loc="outside lower center", ncols=5, fontsize=base.SMALL, frameon=False)
    return figure
