"""Axes that several figures share: plain numbers along a logarithm, percent with a place for nothing, what a color stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from labsupport.figures import base

Change = tuple[float, float, float]  # a change and its interval; 0.01 is 1 %


def plain_numbers(axis: Axis) -> None:
    """Numbers such as 0.01 and 100 in place of powers, without moving the ticks."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def one_two_five(axis: Axis) -> None:
    """Ticks at 1, 2, 5, 10, 20, ... of a logarithmic axis, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain_numbers(axis)


def ticks_at(axis: Axis, values: Sequence[float]) -> None:
    """Ticks at these values of a logarithmic axis and nowhere else, as plain numbers."""
    axis.set_ticks(sorted(set(values)))
    axis.set_minor_locator(NullLocator())
    plain_numbers(axis)


def powers_of_two(axis: Axes, values: Sequence[int]) -> None:
    """Batches, or the like, along the bottom: a logarithmic axis with these values."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [str(value) for value in values])


def percent(axis: Axes, linear: float) -> None:
    """Percent up the side, logarithmic above `linear` and linear below it, so that a change of nothing, or less, has a place.

    To be called when everything is drawn: the ticks depend on how far it reaches.
    """
    axis.set_yscale("symlog", linthresh=linear, linscale=0.6)
    axis.axhline(0, color=base.GREY, linewidth=0.8)
    wide = axis.dataLim.y1 > 500 * linear
    ticks = [m * 10.0**e for e in range(-3, 7) for m in ((1,) if wide else (1, 2, 5))]
    axis.set_yticks([0, *(tick for tick in ticks if linear / 2 <= tick <= 2 * axis.dataLim.y1)])
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", alpha=0.25)


def bars(changes: Sequence[Change], unit: float = 100) -> list[list[float]]:
    """Lengths of error bars, downward and upward, in percent or another unit: how many of it are 1."""
    return [[unit * (change - low) for change, low, _ in changes], [unit * (high - change) for change, _, high in changes]]


def color_bar(figure: Figure, image: Any, axes: Any, name: str = "", **options: Any) -> None:
    """What the colors of an image stand for."""
    bar = figure.colorbar(image, ax=axes, **options)
    bar.set_label(name, fontsize=base.FONT)
    bar.ax.tick_params(which="both", labelsize=base.SMALL)
    if bar.orientation == "horizontal":
        bar.locator = MaxNLocator(3)
        bar.update_ticks()
