"""Kernels drawn: what they move, how a weight is cut into programs, how long they take and at which batch they stop paying."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure


def traffic(ways: Mapping[str, Mapping[str, float]], title: str) -> CourseFigure:
    """Stacked bars of megabytes moved, one bar a way of multiplying. ways[way][part] = MB; parts in one order everywhere."""
    summary = "; ".join(f"{way}: {sum(parts.values()):.1f} MB" for way, parts in ways.items())
    figure, axis = base.new(f"{title}. Bars of bytes moved. {summary}.", size=(base.WIDTH, 0.9 + 0.42 * len(ways)))
    names = list(dict.fromkeys(part for parts in ways.values() for part in parts))
    left = [0.0] * len(ways)
    for name, (color, hatch) in base.filled(names):
        sizes = [parts.get(name, 0.0) for parts in ways.values()]
        axis.barh(range(len(ways)), sizes, left=left, color=color, hatch=hatch, edgecolor="white", linewidth=0.4, label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axis.text(total, place, f"  {total:.1f}", va="center", fontsize=base.SMALL)
    axis.set_yticks(range(len(ways)), list(ways))
    axis.set(ylim=(len(ways) - 0.5, -0.5), xlim=(0, 1.12 * max(left)))
    base.label(axis, title, "moved for one product (MB)", "")
    base.beside(axis)
    return figure


def programs(rows: int, groups: int, rows_each: int, title: str) -> CourseFigure:
    """A weight cut up: which program takes which rows, and in which step of its loop it comes to which group."""
    count = -(-rows // rows_each)
    owner = [[row // rows_each] * groups for row in range(rows)]
    beyond = count * rows_each - rows
    alt = f"{title}. A grid of {rows} rows and {groups} groups; {count} programs take {rows_each} rows each, left to right."
    alt += f" Of the last program's, {beyond} do not exist, and are hatched." if beyond else ""
    figure, axis = base.new(alt, size=(6.0, 3.2))
    shades = ListedColormap([base.PALE_SKY, base.PALE_YELLOW, base.PALE_GREEN, base.PALE_PINK])
    axis.imshow([[o % 4 for o in line] for line in owner], cmap=shades, vmin=0, vmax=3, aspect="auto")
    for program in range(count):
        first, last = program * rows_each, min(rows, (program + 1) * rows_each) - 1
        for group in range(groups):
            words = f"program {program}, step {group}" if group == 0 else f"step {group}"
            axis.text(group, (first + last) / 2, words, ha="center", va="center", fontsize=base.SMALL)
        axis.axhline(last + 0.5, color="white", linewidth=2)
    for group in range(1, groups):
        axis.axvline(group - 0.5, color="white", linewidth=1)
    if beyond:
        place = Rectangle((-0.5, rows - 0.5), groups, beyond, facecolor="white", edgecolor=base.GREY, hatch="//", linewidth=0)
        axis.add_patch(place)
        masked = {"ha": "center", "va": "center", "fontsize": base.SMALL, "backgroundcolor": "white"}
        axis.text((groups - 1) / 2, rows + beyond / 2 - 0.5, "no such rows: masked", **masked)
    axis.set_ylim(count * rows_each - 0.5, -0.5)
    axis.set_xticks(range(groups))
    axis.set_yticks(range(rows))
    base.label(axis, title, "group (along in_features)", "output (row of the weight)")
    return figure


def times(
    batches: Sequence[int], measured: Mapping[str, Sequence[float]], title: str, crossover: tuple[float, str] | None = None
) -> CourseFigure:
    """Milliseconds of one product against the batch, a line a kernel. crossover: a batch to mark, and what it is."""
    ends = "; ".join(f"{n}: {y[0]:.2g} ms at batch {batches[0]}, {y[-1]:.2g} at {batches[-1]}" for n, y in measured.items())
    marked = f" Marked: {crossover[1]} {crossover[0]:g}." if crossover else ""
    figure, axis = base.new(f"{title}. Milliseconds against batch, logarithmic axes. {ends}.{marked}", size=(7.4, 3.7))
    for (name, y), (color, marker, style) in base.styled(measured.items()):
        axis.plot(batches, y, color=color, marker=marker, linestyle=style, markersize=5, label=name)
    if crossover:
        axis.axvline(crossover[0], color=base.GREY, linestyle=":", linewidth=1.5, label=crossover[1])
    axis.set_yscale("log")
    scales.powers_of_two(axis, batches)
    scales.plain_numbers(axis.yaxis)
    axis.grid(alpha=0.25)
    base.label(axis, title, "batch (tokens in one product)", "time of one product (ms)")
    base.beside(axis)
    return figure


def rates(batches: Sequence[int], measured: Mapping[str, Sequence[float]], limit: float, title: str) -> CourseFigure:
    """GB of weight read in a second against the batch, a line a kernel, under what copying reaches."""
    ends = "; ".join(f"{n}: {y[0]:.1f} at batch {batches[0]}, {y[-1]:.1f} at {batches[-1]}" for n, y in measured.items())
    alt = f"{title}. GB of weight read in a second against batch; the machine's limit is {limit:.1f}. {ends}."
    figure, axis = base.new(alt, size=(7.4, 3.4))
    for (name, y), (color, marker, style) in base.styled(measured.items()):
        axis.plot(batches, y, color=color, marker=marker, linestyle=style, markersize=5, label=name)
    axis.axhline(limit, color=base.GREY, linewidth=1.2)
    axis.text(batches[-1], limit, "measured limit", fontsize=base.SMALL, ha="right", va="bottom", color=base.DARK_GREY)
    scales.powers_of_two(axis, batches)
    axis.set_ylim(0, 1.2 * max(limit, *(value for y in measured.values() for value in y)))
    base.label(axis, title, "batch (tokens in one product)", "weight read (GB a second)")
    base.beside(axis)
    return figure


def gains(batches: Sequence[int], lines: Mapping[str, Sequence[float]], title: str) -> CourseFigure:
    """How many times as fast as 16 bits, against the batch: what was forecast beside what was measured."""
    ends = "; ".join(f"{n}: {y[0]:.2f} at batch {batches[0]}, {y[-1]:.2f} at {batches[-1]}" for n, y in lines.items())
    figure, axis = base.new(f"{title}. Times as fast as 16 bits, against batch. {ends}.", size=(7.4, 3.5))
    for (name, y), (color, marker, style) in base.styled(lines.items()):
        axis.plot(batches, y, color=color, marker=marker, linestyle=style, markersize=5, label=name)
    axis.axhline(1, color=base.GREY, linewidth=1)
    axis.set_yscale("log", base=2)
    scales.powers_of_two(axis, batches)
    scales.plain_numbers(axis.yaxis)
    base.label(axis, title, "batch (tokens in one product)", "speed (times that of 16 bits)")
    base.beside(axis)
    return figure


def errors(found: Mapping[str, float], rounding: float, title: str) -> CourseFigure:
    """Relative errors of products, in percent on a logarithmic axis, with that of rounding the weight to codes as a line."""
    summary = ", ".join(f"{name} {100 * value:.2g} %" for name, value in found.items())
    alt = f"{title}. {summary}; rounding the weights alone moves the output by {100 * rounding:.2g} %."
    figure, axis = base.new(alt, size=(base.WIDTH, 0.9 + 0.4 * len(found)))
    values = [100 * value for value in found.values()]
    axis.barh(range(len(values)), values, color=base.SKY, edgecolor=base.BLUE, height=0.6)
    for place, value in enumerate(values):
        axis.text(value, place, f"  {value:.2g}", va="center", fontsize=base.SMALL)
    axis.axvline(100 * rounding, color=base.RED, linestyle="--", linewidth=1.4, label="what rounding the weights costs")
    axis.set_xscale("log")
    scales.plain_numbers(axis.xaxis)
    axis.set_xlim(min(values) / 3, 300 * rounding)
    axis.set_yticks(range(len(values)), list(found))
    axis.invert_yaxis()
    base.label(axis, title, "relative error of the product (%)", "")
    base.beside(axis)
    return figure
