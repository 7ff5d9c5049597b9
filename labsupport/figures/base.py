"""What every figure shares: size, colors, and a text for those who cannot see it.

Figures are made without pyplot: no global state, nothing to close, and the last line of a cell shows them. Colors are from the
palette of Okabe and Ito, in an order of falling lightness where it matters; markers and line styles tell the same.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#999999"
SERIES = ((BLUE, "o", "-"), (RED, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":"), (ORANGE, "v", "-"), (BLACK, "x", "--"))
T = TypeVar("T")
DPI = 110
FONT = 9


class CourseFigure(Figure):
    """A matplotlib Figure that Jupyter shows as PNG with alternative text."""

    alt: str = ""

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None):
        width, height = self.get_size_inches() * DPI
        about = {"alt": self.alt, "width": int(width), "height": int(height)}
        return {"image/png": self.png(), "text/plain": f"Figure: {self.alt}"}, {"image/png": about}

    def _ipython_display_(self):
        # Once pyplot is imported, IPython has a printer of its own for figures, which drops the alternative text.
        from IPython.display import display

        data, about = self._repr_mimebundle_()
        display(data, metadata=about, raw=True)


def styled(series: Iterable[T]) -> Iterator[tuple[T, tuple[str, str, str]]]:
    """Each series with a color, marker and line of its own. Raises ValueError for more than there are: none is left out unseen."""
    series = list(series)
    if len(series) > len(SERIES):
        raise ValueError(f"series holds {len(series)} series, wanted at most {len(SERIES)}: more cannot be told apart")
    return zip(series, SERIES, strict=False)


def new(alt: str, rows: int = 1, columns: int = 1, size: tuple[float, float] = (5.6, 3.2), **options):
    """A figure and its axes, an array of them where there are several. `alt` says what a reader would see."""
    figure = CourseFigure(figsize=size, layout="constrained")
    figure.alt = alt
    axes = figure.subplots(rows, columns, **options)
    for axis in figure.axes:
        plain(axis)
    return figure, axes


def plain(axis: Axes) -> None:
    """Small type, no box."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=FONT - 1)
    axis.title.set_fontsize(FONT + 1)
    axis.xaxis.label.set_fontsize(FONT)
    axis.yaxis.label.set_fontsize(FONT)


def label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=FONT + 1, loc="left")
    axis.set_xlabel(x, fontsize=FONT)
    axis.set_ylabel(y, fontsize=FONT)


def legend(axis: Axes, **options) -> None:
    axis.legend(fontsize=FONT - 1, frameon=False, **options)
