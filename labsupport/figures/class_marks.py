"""How a class did in a lab: its marks, the exercises that were hardest, the time that answers took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from labsupport.figures import base
from labsupport.figures.base import CourseFigure

BINS = 10
# Of exercises by outcome: what it is called, and which outcomes it holds.
PARTS = {
    "right": ("pass",),
    "not right": ("wrong", "raised", "stopped"),
    "blank or missing": ("blank", "missing"),
    "not marked yet": ("unmarked",),
}


def distribution(marks: Sequence[float], of: float) -> CourseFigure:
    """Marks as a histogram in tenths of all points. marks: of learners, in points of `of`."""
    counts = [0] * BINS
    for mark in marks:
        counts[min(BINS - 1, int(BINS * mark / of)) if of else 0] += 1
    middle = median(marks) if marks else 0.0
    listed = ", ".join(f"{count} from {10 * place} to {10 * place + 10} %" for place, count in enumerate(counts) if count) or "none"
    figure, axis = base.new(
        f"Histogram of {len(marks)} marks: {listed} of the points. The median is {middle:.3g} of {of:g} points."
    )
    axis.bar([10 * place + 5 for place in range(BINS)], counts, width=9, color=base.SKY)
    if of:
        axis.axvline(100 * middle / of, color=base.DARK_GREY, linestyle="--", label=f"median, {middle:.3g} points")
        base.legend(axis, loc="lower right", bbox_to_anchor=(1, 1))
    axis.set_xlim(0, 100)
    axis.yaxis.get_major_locator().set_params(integer=True)
    base.label(axis, "Marks", f"mark, % of {of:g} points", "learners")
    return figure


def hardest(outcomes: Mapping[str, Mapping[Any, int]]) -> CourseFigure:
    """A bar for each exercise, the one that fewest have right on top.

    outcomes: by exercise, how many learners have each outcome.
    """
    order = sorted(outcomes, key=lambda id: (outcomes[id].get("pass", 0) / max(1, sum(outcomes[id].values())), id))
    shares = ", ".join(f"{id} {outcomes[id].get('pass', 0)} of {sum(outcomes[id].values())}" for id in order)
    figure, axis = base.new(
        f"Outcomes by exercise, the hardest first. Right: {shares}.", size=(5.6, 1.4 + 0.28 * max(1, len(order)))
    )
    left = [0] * len(order)
    for (name, members), (color, hatch) in base.filled(PARTS.items()):
        widths = [sum(outcomes[id].get(member, 0) for member in members) for id in order]
        axis.barh(order, widths, left=left, color=color, hatch=hatch, label=name, edgecolor="white")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.xaxis.get_major_locator().set_params(integer=True)
    base.beside(axis)
    base.label(axis, "Hardest exercises", "learners who handed in", "exercise")
    return figure


def mistakes(common: Sequence[tuple[str, str, int]]) -> CourseFigure:
    """The commonest messages. common: exercise, message, learners; the commonest first."""
    listed = "; ".join(f"{id}, {count}: {message[:80]}" for id, message, count in common) or "none"
    figure, axis = base.new(f"Commonest messages by learners: {listed}.", size=(base.WIDTH, 1.2 + 0.34 * max(1, len(common))))
    axis.barh(range(len(common)), [count for _, _, count in common], color=base.ORANGE)
    names = [f"{id}  {_plain(message)}" for id, message, _ in common]
    axis.set_yticks(range(len(common)), names)
    axis.invert_yaxis()
    axis.xaxis.get_major_locator().set_params(integer=True)
    base.label(axis, "Commonest mistakes, by what the judge said", "learners", "")
    return figure


def seconds(times: Mapping[str, Sequence[float]]) -> CourseFigure:
    """Time of answers in the sandbox: a point for each, and the median. times: seconds by exercise."""
    medians = ", ".join(f"{id} {median(values):.2g} s" for id, values in times.items() if values)
    figure, axis = base.new(f"Seconds that answers took, by exercise. Medians: {medians or 'none'}.")
    for place, values in enumerate(times.values()):
        if values:
            axis.plot([place] * len(values), values, "o", color=base.SKY, markersize=4, alpha=0.6)
            axis.plot([place], [median(values)], "_", color=base.BLACK, markersize=16)
    axis.set_xticks(range(len(times)), list(times))
    if any(value > 0 for values in times.values() for value in values):
        axis.set_yscale("log")
    base.label(axis, "Time of answers in the sandbox", "exercise; line: median", "seconds")
    return figure


def _plain(message: str) -> str:
    """Without what matplotlib takes for mathematics, and short enough for a label."""
    text = " ".join("".join(char if char.isprintable() else "?" for char in message).replace("$", r"\$").split())
    return text if len(text) <= 60 else text[:59] + "\N{HORIZONTAL ELLIPSIS}"
