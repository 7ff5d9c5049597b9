"""GPTQ in practice, drawn: what blocks save, where groups end up, and the effect of damping, samples and the choice of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure

Points = Sequence[tuple[float, float]]


def mean_ratio(ratios: Mapping[str, float]) -> float:
    """The geometric mean: a half and a double cancel."""
    return math.exp(sum(map(math.log, ratios.values())) / len(ratios))


def writes(columns: int, block_sizes: Sequence[int]) -> CourseFigure:
    """How often a weight is written on average, against the block size, for a row of `columns`: inside blocks and behind them."""
    inside = [(size - 1) / 2 for size in block_sizes]
    behind = [(columns / size - 1) / 2 for size in block_sizes]
    total = [a + b for a, b in zip(inside, behind, strict=True)]
    best = total.index(min(total))
    alt = (
        f"Writes for each weight of a row of {columns} against the block size: {total[0]:.0f} at {block_sizes[0]}, least, "
        f"{total[best]:.0f}, at {block_sizes[best]}, and {total[-1]:.0f} at {block_sizes[-1]}. Writes behind the block fall, "
        "writes inside it rise."
    )
    figure, axis = base.new(alt, size=(6.2, 3.4))
    for (name, values), (color, marker, style) in base.styled(
        {"in all": total, "inside blocks": inside, "behind blocks": behind}.items()
    ):
        shown = [(size, value) for size, value in zip(block_sizes, values, strict=True) if value > 0]
        axis.plot(*zip(*shown, strict=True), color=color, marker=marker, linestyle=style, markersize=4, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    scales.ticks_at(axis.xaxis, block_sizes[:: 1 if len(block_sizes) < 9 else 2])
    scales.plain_numbers(axis.yaxis)
    base.label(axis, f"How often a weight is written, {columns} in_features", "block size (columns)", "writes of a weight (times)")
    base.legend(axis, loc="upper center")
    return figure


def by_turn(shifts: Mapping[str, torch.Tensor]) -> CourseFigure:
    """How far each column ends from where it began, in steps of its grid, against its turn: [in_features] for each order.

    Drawn as means of 16 successive turns.
    """
    summaries, smooth = [], {}
    for name, shift in shifts.items():
        parts = base.drawable(shift).flatten().split(16)
        smooth[name] = [part.mean().item() for part in parts]
        summaries.append(f"{name} from {smooth[name][0]:.2f} to {smooth[name][-1]:.2f} steps")
    alt = (
        "How far columns end from where they began against their turn, and the line of plain rounding: "
        + "; ".join(summaries)
        + "."
    )
    figure, axis = base.new(alt, size=(6.4, 3.2))
    for (name, values), (color, _, style) in base.styled(smooth.items()):
        axis.plot([16 * i + 8 for i in range(len(values))], values, color=color, linestyle=style, label=name)
    axis.axhline(12**-0.5, color=base.GREY, linewidth=1, label="plain rounding")
    axis.set_ylim(0.6 * 12**-0.5)  # nothing is nearer than plain rounding
    base.label(axis, "Columns that come late make up for more", "turn in the loop (columns)", "distance (steps, root mean square)")
    base.legend(axis)
    return figure


def by_setting(settings: Mapping[str, Mapping[str, float]], title: str, axis_name: str) -> CourseFigure:
    """A dot for every linear and a bar at their geometric mean, one row for each setting, with the line of no difference at 1."""
    summary = "; ".join(
        f"{name} {mean_ratio(ratios):.2f} ({min(ratios.values()):.2f} to {max(ratios.values()):.2f})"
        for name, ratios in settings.items()
    )
    figure, axis = base.new(f"{title}. Mean and range over linear layers: {summary}.", size=(7.0, 0.9 + 0.5 * len(settings)))
    for place, (ratios, (color, marker, _)) in enumerate(base.styled(settings.values())):
        axis.plot(list(ratios.values()), [place] * len(ratios), marker, color=color, markersize=4, alpha=0.55)
        mean = mean_ratio(ratios)
        axis.plot([mean, mean], [place - 0.22, place + 0.22], color=base.BLACK, linewidth=2)
        axis.annotate(f"{mean:.2f}", (mean, place - 0.24), ha="center", va="bottom", fontsize=base.SMALL)
    axis.axvline(1, color=base.GREY, linewidth=0.9)
    axis.set_yticks(range(len(settings)), list(settings))
    axis.set_ylim(len(settings) - 0.5, -0.8)
    base.label(axis, title, axis_name, "")
    return figure


def group_strips(maps: Mapping[str, torch.Tensor]) -> CourseFigure:
    """The group of every column, in color, as stored: a strip for each entry of `maps`, int [in_features], and its loads."""
    maps = base.all_drawable(maps)
    loads = {name: 1 + int((groups[1:] != groups[:-1]).sum()) for name, groups in maps.items()}
    columns, count = len(next(iter(maps.values()))), len(next(iter(maps.values())).unique())
    summary = "; ".join(f"{name}: {number} loads" for name, number in loads.items())
    alt = f"The {count} groups of {columns} columns as strips of color, from the first column to the last. {summary}."
    figure, axes = base.new(alt, len(maps), 1, size=(base.WIDTH, 0.75 + 0.72 * len(maps)), sharex=True, squeeze=False)
    for axis, (name, groups) in zip(axes[:, 0], maps.items(), strict=True):
        axis.imshow(groups[None], cmap=base.AMOUNTS, aspect="auto", interpolation="nearest", vmin=0, vmax=count - 1)
        axis.set_yticks([])
        axis.spines[["left"]].set_visible(False)
        base.label(axis, f"{name}: a reader from left to right loads {loads[name]} grids", "", "")
    last = list(maps)[-1]
    base.label(axes[-1, 0], f"{last}: a reader from left to right loads {loads[last]} grids", "column (in_features)", "")
    return figure


def against(
    panels: Mapping[str, Mapping[str, Points]], title: str, x_name: str, y_name: str, marked: float | None = None
) -> CourseFigure:
    """Error over that of rounding, against a quantity on a logarithmic axis; below the line at 1 GPTQ is better.

    panels: one for each entry, of named curves of (x, y). marked: an x to draw a line at.
    """
    summaries = []
    for panel, curves in panels.items():
        for name, points in curves.items():
            summaries.append(
                f"{panel}, {name}: from {points[0][1]:.2f} at {points[0][0]:g} to {points[-1][1]:.2f} at {points[-1][0]:g}"
            )
    alt = f"{title}, with the line of rounding at 1. " + "; ".join(summaries) + "."
    size = (min(base.WIDTH, 4.3 * len(panels) + 0.6), 3.6)
    figure, axes = base.new(alt, 1, len(panels), size=size, sharey=True, squeeze=False)
    for axis, (panel, curves) in zip(axes[0], panels.items(), strict=True):
        for (name, points), (color, marker, style) in base.styled(curves.items()):
            axis.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=style, markersize=4, label=name)
        axis.axhline(1, color=base.GREY, linewidth=1)
        if marked is not None:
            axis.axvline(marked, color=base.GREY, linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        scales.ticks_at(axis.xaxis, [x for points in curves.values() for x, _ in points])
        if max(len(f"{x:,g}") for points in curves.values() for x, _ in points) > 4:
            axis.tick_params(axis="x", labelrotation=30)
        base.label(axis, panel, x_name, y_name if axis is axes[0, 0] else "")
    axes[0, 0].set_yscale("log")
    scales.one_two_five(axes[0, 0].yaxis)
    base.legend(axes[0, -1], loc="best")
    return figure


def domains(table: Mapping[str, Mapping[str, float]], title: str) -> CourseFigure:
    """Error over that of rounding, in color: a row for each text calibrated on, a column for each text measured on."""
    columns = list(next(iter(table.values())))
    values = torch.tensor([list(row.values()) for row in table.values()], dtype=torch.float64)
    summary = "; ".join(
        f"calibrated on {row}, measured on {column}: {value:.2f}" for row, cells in table.items() for column, value in cells.items()
    )
    figure, axis = base.new(f"A table in color. {summary}.", size=(5.4, 1.2 + 0.6 * len(table)))
    image = axis.imshow(values, cmap=f"{base.AMOUNTS}_r", aspect="auto")
    for y, row in enumerate(values.tolist()):
        for x, value in enumerate(row):
            dark = image.norm(value) > 0.55
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=base.FONT + 1, color="white" if dark else "black")
    axis.set_xticks(range(len(columns)), [f"on {column}" for column in columns])
    axis.set_yticks(range(len(table)), list(table))
    base.label(axis, title, "measured", "calibrated on")
    scales.color_bar(figure, image, axis, "error / rounding's (times)")
    return figure
