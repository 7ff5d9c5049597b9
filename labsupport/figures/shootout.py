"""Methods against each other: the front on stored bytes, divergence in the middle and at the far end, tasks, equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure
from labsupport.figures.scales import Change

Point = tuple[float, float]  # bytes, and the rise in perplexity


def fronts(panels: Mapping[str, Mapping[str, Sequence[Point]]], on_front: Mapping[str, Sequence[Point]]) -> CourseFigure:
    """Every configuration as a mark of its method over its bytes; those that nobody beats joined by a line.

    panels: by title, points by method; the same methods have the same marks in all. on_front: by title. A point is bytes and the
    rise in perplexity, 0.01 for 1 %.
    """
    methods = list(dict.fromkeys(method for by_method in panels.values() for method in by_method))
    styles = dict(base.styled(methods))
    alt = "Rise in perplexity over stored bytes, one mark a configuration. " + " ".join(
        f"{title}: {sum(map(len, by_method.values()))} configurations of {', '.join(by_method)}; on the front "
        + ", ".join(f"{100 * value:.3g} % at {size / 1e6:.2f} MB" for size, value in sorted(on_front[title]))
        + "."
        for title, by_method in panels.items()
    )
    figure, axes = base.new(alt, 1, len(panels), size=(base.WIDTH, 4.2), squeeze=False)
    for axis, (title, by_method) in zip(axes[0], panels.items(), strict=True):
        line = sorted(on_front[title])
        axis.step(
            [size / 1e6 for size, _ in line], [100 * value for _, value in line], where="post", color=base.GREY, linewidth=1.2
        )
        for method, points in by_method.items():
            color, marker, _ = styles[method]
            x, y = [size / 1e6 for size, _ in points], [100 * value for _, value in points]
            axis.plot(x, y, marker, color=color, markersize=5, markerfacecolor="none", label=method)
        scales.percent(axis, linear=0.1)
        base.label(axis, title, "stored bytes (MB)", "rise in perplexity (%)")
    handles = dict(reversed(pair) for axis in axes[0] for pair in zip(*axis.get_legend_handles_labels(), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=base.SMALL, frameon=False)
    return figure


def spread(rows: Mapping[str, tuple[float, float, float]], title: str) -> CourseFigure:
    """A line for each configuration from the median of its divergences over the mean to the 99.9th percentile, in nats."""
    marks = (("median", base.BLUE, "o"), ("mean", base.BLACK, "|"), ("99.9th percentile", base.RED, "s"))
    alt = f"{title}, on a logarithmic axis in nats: " + "; ".join(
        f"{name} median {median:.2g}, mean {mean:.2g}, 99.9th percentile {extreme:.2g}"
        for name, (median, mean, extreme) in rows.items()
    )
    figure, axis = base.new(alt + ".", size=(base.WIDTH, 1.3 + 0.3 * len(rows)))
    for place, values in enumerate(rows.values()):
        axis.plot((values[0], values[2]), (place, place), color=base.GREY, linewidth=1, zorder=1)
        for value, (name, color, marker) in zip(values, marks, strict=True):
            axis.plot(value, place, marker, color=color, markersize=7, label=name if place == 0 else None)
    axis.set_xscale("log")
    scales.plain_numbers(axis.xaxis)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    base.label(axis, title, "KL to the float model (nats a token)", "")
    base.beside(axis)
    return figure


def tasks(rows: Mapping[str, Mapping[str, float]], rises: Mapping[str, float], title: str) -> CourseFigure:
    """Each task's share of right answers over the rise in perplexity, both beside the float model's.

    rows: by task, then by configuration, the share that is left of the float model's score, 1 for all of it. rises: of the
    configurations, 0.01 for 1 %.
    """
    order = sorted(rises, key=rises.__getitem__)
    worst = order[-1]
    alt = f"{title}, by task, over the rise in perplexity. At the largest rise, {100 * rises[worst]:.0f} %, is left: " + ", ".join(
        f"{task} {100 * left[worst]:.0f} %" for task, left in rows.items()
    )
    figure, axis = base.new(alt + ".", size=(base.WIDTH, 3.6))
    for (task, left), (color, marker, line) in base.styled(rows.items()):
        x, y = [100 * rises[name] for name in order], [100 * left[name] for name in order]
        axis.plot(x, y, marker=marker, linestyle=line, color=color, markersize=5, linewidth=1.2, label=task)
    axis.axhline(100, color=base.GREY, linewidth=0.8)
    axis.set_xscale("log")
    scales.plain_numbers(axis.xaxis)
    axis.set_ylim(0, None)
    base.label(axis, title, "rise in perplexity (%)", "left of the float model's score (%)")
    base.beside(axis)
    return figure


def windows(needed: Mapping[str, float], at_hand: int) -> CourseFigure:
    """How many windows each metric needs before its interval excludes 0, as bars along a logarithm; and how many there are."""
    alt = "Windows needed: " + ", ".join(f"{metric} {count:,.0f}" for metric, count in needed.items()) + f"; there are {at_hand}."
    figure, axis = base.new(alt, size=(base.WIDTH, 0.9 + 0.4 * len(needed)))
    for place, (metric, (color, hatch)) in enumerate(base.filled(needed)):
        axis.barh(place, needed[metric], color=color, hatch=hatch, edgecolor="white", height=0.6)
        axis.text(needed[metric], place, f" {needed[metric]:,.0f}", va="center", fontsize=base.SMALL)
    axis.axvline(at_hand, color=base.BLACK, linestyle="--", linewidth=1)
    axis.text(at_hand, -0.62, f" {at_hand} at hand", fontsize=base.SMALL, va="bottom")
    axis.set_xscale("log")
    scales.plain_numbers(axis.xaxis)
    axis.set_xlim(0.5, 6 * max(*needed.values(), at_hand))
    axis.set_yticks(range(len(needed)), list(needed))
    axis.set_ylim(len(needed) - 0.5, -0.9)
    base.label(axis, "Windows until the interval excludes 0", "windows of 512 tokens", "")
    return figure


def families(rows: Mapping[str, Sequence[tuple[str, float, float, Change]]], title: str, bytes_of: str) -> CourseFigure:
    """Families of models over their bytes: perplexity with its interval, each configuration named.

    rows: by family, (name, bytes, perplexity, change with its interval beside one reference). bytes_of: what is counted, with
    its unit.
    """
    alt = f"{title}: " + "; ".join(
        f"{family}: " + ", ".join(f"{name} {size / 1e6:.2f} MB, perplexity {value:.4g}" for name, size, value, _ in sorted_rows)
        for family, sorted_rows in rows.items()
    )
    figure, axis = base.new(alt + ".", size=(base.WIDTH, 4))
    for (family, found), (color, marker, line) in base.styled(rows.items()):
        found = sorted(found, key=lambda row: row[1])
        x, y = [size / 1e6 for _, size, _, _ in found], [value for _, _, value, _ in found]
        reference = [value / (1 + change[0]) for _, _, value, change in found]
        bars = [
            [value - of * (1 + change[1]) for value, of, (*_, change) in zip(y, reference, found, strict=True)],
            [of * (1 + change[2]) - value for value, of, (*_, change) in zip(y, reference, found, strict=True)],
        ]
        axis.errorbar(x, y, yerr=bars, color=color, marker=marker, linestyle=line, capsize=3, markersize=5, label=family)
        for (name, *_), place, value in zip(found, x, y, strict=True):
            axis.annotate(name, (place, value), (4, 4), textcoords="offset points", fontsize=base.SMALL, color=color)
    axis.set_yscale("log")
    scales.one_two_five(axis.yaxis)
    base.label(axis, title, bytes_of, "perplexity (no unit)")
    base.legend(axis)
    return figure
