"""Training through rounding: what passes backward, a weight that cannot rest, the derivative of a step, losses, and the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.ticker import MaxNLocator

from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure
from labsupport.figures.scales import Change


def passes(weights: torch.Tensor, ways: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> CourseFigure:
    """What a weight is rounded to, in steps, and the derivative that the backward pass uses, one line a way.

    weights: float [n], ascending, in steps of the grid. ways: (values, derivatives), float [n] each, by name.
    """
    weights = base.drawable(weights)
    summary = "; ".join(f"{way}: derivative from {slope.min():.2g} to {slope.max():.2g}" for way, (_, slope) in ways.items())
    alt = f"Left: value against weight, {', '.join(ways)}. Right: the derivative that each uses. {summary}."
    figure, (left, right) = base.new(alt, 1, 2, size=(base.WIDTH, 3.3))
    for (way, (values, slope)), (color, _, style) in base.styled(ways.items()):
        left.plot(weights, base.drawable(values), color=color, linestyle=style, linewidth=1.6, label=way)
        right.plot(weights, base.drawable(slope), color=color, linestyle=style, linewidth=1.6, label=way)
    base.label(left, "Forward", "weight (steps)", "value (steps)")
    base.label(right, "Backward", "weight (steps)", "derivative (steps a step)")
    right.set_ylim(-0.3, 1.35 * max(slope.max().item() for _, slope in ways.values()) + 0.3)
    base.legend(left, loc="upper left")
    return figure


def restless(weights: Sequence[float], target: float, title: str) -> CourseFigure:
    """A weight that is trained through rounding, update by update, and the level that it stands on. All in steps."""
    levels = [round(weight) for weight in weights]
    later = levels[len(levels) // 2 :]
    alt = (
        f"{title}. The weight goes from {weights[0]:.2g} to {weights[-1]:.2g}, its level from {levels[0]} to {levels[-1]}. In the "
        f"second half it stands on level {max(later)} in {100 * later.count(max(later)) / len(later):.0f} % of the updates; the "
        f"target is {target:g}."
    )
    figure, axis = base.new(alt, size=(base.WIDTH, 3.0))
    axis.axhline(target, color=base.GREY, linestyle="--", linewidth=1.2, label="target")
    axis.step(range(len(levels)), levels, color=base.ORANGE, linewidth=1.2, where="mid", label="its level")
    axis.plot(range(len(weights)), list(weights), color=base.BLUE, marker=".", markersize=3, linewidth=1.2, label="float weight")
    base.label(axis, title, "update (steps of training)", "value (distances of levels)")
    base.beside(axis)
    return figure


def step_slope(ratios: torch.Tensor, slope: torch.Tensor, straight: torch.Tensor, ends: tuple[int, int]) -> CourseFigure:
    """The derivative of a value by its step, against the weight in steps.

    ratios, slope: float [n]. straight: what it would be if the codes stayed, which is the code. ends: the first and last code.
    """
    ratios, slope, straight = (base.drawable(values) for values in (ratios, slope, straight))
    alt = (
        f"Derivative of a weight's value by the step of its grid. Between the codes {ends[0]} and {ends[1]} a sawtooth from "
        f"{-0.5:g} to {0.5:g}; outside flat at {ends[0]} and {ends[1]}. With codes held fixed it would be a staircase."
    )
    figure, axis = base.new(alt, size=(6.4, 3.2))
    axis.axvspan(*ends, color=base.PALE_BLUE, linewidth=0, label="inside the range")
    axis.plot(ratios, straight, color=base.GREY, linestyle="--", linewidth=1.2, label="codes held fixed")
    axis.plot(ratios, slope, color=base.BLUE, linewidth=1.6, label="through w / s as well")
    axis.axhline(0, color=base.BLACK, linewidth=0.6)
    base.label(axis, "What a longer step does to a value", "weight (steps)", "derivative (no unit)")
    base.legend(axis, loc="upper left")
    return figure


def losses(series: Mapping[str, Sequence[float]], title: str, above: str) -> CourseFigure:
    """Loss of each step of training, in nats a token, one line a way. above: what the losses are measured from."""
    summary = "; ".join(f"{way} from {values[0]:.2g} to {values[-1]:.2g}" for way, values in series.items())
    figure, axis = base.new(f"{title}. Loss above {above}, in nats a token, first and last step: {summary}.", size=(6.4, 3.2))
    for (way, values), (color, marker, style) in base.styled(series.items()):
        axis.plot(range(len(values)), list(values), color=color, marker=marker, linestyle=style, markersize=3.5, label=way)
    axis.set_ylim(bottom=min(0.0, *(min(values) for values in series.values())))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    base.label(axis, title, "update (steps of training)", f"loss above {above} (nats a token)")
    base.legend(axis)
    return figure


def worth(panels: Mapping[str, Mapping[str, Change]], title: str, groups: Mapping[str, str]) -> CourseFigure:
    """Change in perplexity of every arm, a panel for each width, each with an axis of its own; intervals as bars.

    panels[width][arm] = (change, low, high). groups: the arms from top to bottom, and of which group each is, for its color.
    """
    looks = dict(base.styled(dict.fromkeys(groups.values())))
    arms, summaries = list(groups), []
    figure, axes = base.new("", 1, len(panels), size=(base.WIDTH, 1.5 + 0.3 * len(arms)), squeeze=False)
    for axis, (width, found) in zip(axes[0], panels.items(), strict=True):
        axis.axvline(0, color=base.GREY, linewidth=0.8)
        for place, arm in enumerate(arms):
            if arm in found:
                color, marker, _ = looks[groups[arm]]
                bars, change = scales.bars([found[arm]]), 100 * found[arm][0]
                axis.errorbar(change, place, xerr=bars, color=color, marker=marker, markersize=4.5, capsize=3)
        first = axis is axes[0][0]
        axis.set_yticks(range(len(arms)) if first else [], arms if first else [])
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.25)
        base.label(axis, width, "change (%)", "")
        summaries.append(f"{width}: " + ", ".join(f"{arm} {100 * found[arm][0]:+.1f} %" for arm in arms if arm in found))
    figure.alt = f"{title}. " + "; ".join(summaries) + "."
    figure.suptitle(title, fontsize=base.FONT + 1, x=0.01, ha="left")
    return figure
