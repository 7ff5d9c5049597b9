"""What every figure shares: sizes, colors, and a text for those who cannot see it.

Figures are made without pyplot: no global state, nothing to close, and the last line of a cell shows them. Most colors are from the
palette of Okabe and Ito. No two series differ in color alone: each has a marker and a line style, each filled area a hatch.
"""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
GREY, DARK_GREY = "#999999", "#444444"  # reference lines, and the words on them
# Light enough for black words on them, and apart in greyscale.
PALE_BLUE, PALE_YELLOW, PALE_SKY, PALE_GREEN, PALE_PINK = "#DCEBF5", "#F0E4B2", "#A9D6F0", "#BBE3D6", "#E8C9DA"
AMOUNTS, SIGNED, SIGNED_FROM_ZERO = "cividis", "RdBu_r", "PuOr"  # color maps
SERIES = (
    (BLUE, "o", "-"),
    (RED, "s", "--"),
    (GREEN, "^", "-."),
    (PURPLE, "D", ":"),
    (ORANGE, "v", (0, (7, 2))),
    (BLACK, "x", (0, (5, 1, 1, 1, 1, 1))),
    (SKY, "P", (0, (2, 2))),
)
FILLS = ((SKY, ""), (ORANGE, "///"), (RED, "xxx"), (BLUE, ""), (GREY, "..."))

DPI = 110
WIDTH = 7.6  # inches: the widest that a page shows without scaling it, and its words, down
FONT, SMALL = 9, 8  # points; nothing is smaller
LETTER = 0.56  # of its size, the width of an average letter

T = TypeVar("T")
Style = tuple[str, str, Any]


def as_html(png: str, about: Mapping[str, Any]) -> str:
    """An image element. png: in base64. about: what stands beside it in a notebook, `alt` and width and height in pixels."""
    size = "".join(f' {side}="{int(about[side])}"' for side in ("width", "height") if side in about)
    alt = html.escape(about["alt"], quote=True)
    return f'<img alt="{alt}"{size} style="max-width: 100%; height: auto" src="data:image/png;base64,{png}">'


class CourseFigure(Figure):
    """A matplotlib Figure that Jupyter shows as an image with alternative text."""

    alt: str = ""

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()

    def svg(self) -> str:
        """For README.md: text as text, on white, the same on every run."""
        settings = {
            "svg.fonttype": "none", "svg.hashsalt": "labs", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
        }  # fmt: skip
        with matplotlib.rc_context(settings):
            buffer = io.StringIO()
            self.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"

    def html(self) -> str:
        """The image and its alternative text as they stand now."""
        return as_html(base64.b64encode(self.png()).decode("ascii"), self._about())

    def _about(self) -> dict[str, Any]:
        width, height = self.get_size_inches() * DPI
        return {"alt": self.alt, "width": int(width), "height": int(height)}

    def _repr_mimebundle_(self, include=None, exclude=None):
        # JupyterLab shows a PNG without its alternative text, whatever its metadata say, and prefers HTML. nbconvert, GitHub and
        # the course's pages take the PNG; `labs build` stores it alone.
        png, about = self.png(), self._about()
        data = {"image/png": png, "text/plain": f"Figure: {self.alt}"}
        return data | {"text/html": as_html(base64.b64encode(png).decode("ascii"), about)}, {"image/png": about}

    def _ipython_display_(self):
        # Once pyplot is imported, IPython has a printer of its own for figures, which drops the alternative text.
        from IPython.display import display

        data, metadata = self._repr_mimebundle_()
        display(data, metadata=metadata, raw=True)


def drawable(values: torch.Tensor) -> torch.Tensor:
    """The tensor in a form that can be computed with and drawn: detached, on the CPU, in float32 or, if it came so, float64."""
    values = values.detach().cpu()
    return values if values.dtype == torch.float64 else values.float()


def all_drawable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`drawable` for each entry."""
    return {name: drawable(values) for name, values in tensors.items()}


def styled(series: Iterable[T]) -> Iterator[tuple[T, Style]]:
    """Each series with a color, marker and line of its own. Raises ValueError for more series than there are styles."""
    series = list(series)
    if len(series) > len(SERIES):
        raise ValueError(f"series holds {len(series)} series, wanted at most {len(SERIES)}: more cannot be told apart")
    return zip(series, SERIES, strict=False)


def filled(parts: Iterable[T]) -> Iterator[tuple[T, tuple[str, str]]]:
    """Each part of a bar with a color and a hatch of its own. Raises ValueError for more parts than there are fills."""
    parts = list(parts)
    if len(parts) > len(FILLS):
        raise ValueError(f"parts holds {len(parts)} parts, wanted at most {len(FILLS)}: more cannot be told apart")
    return zip(parts, FILLS, strict=False)


def new(
    alt: str, rows: int = 1, columns: int = 1, size: tuple[float, float] = (5.6, 3.2), **options: Any
) -> tuple[CourseFigure, Any]:
    """A figure and its axes, an array of them where there are several. `alt` says what a reader would see. size: in inches."""
    figure = CourseFigure(figsize=size, layout="constrained")
    figure.alt = alt
    axes = figure.subplots(rows, columns, **options)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=SMALL)
    return figure, axes


def label(axis: Axes, title: str, x: str, y: str) -> None:
    """Name a panel and its axes. What is longer than the panel is broken into lines."""
    width, height = _inches(axis)
    axis.set_title(_lines(title, width, FONT + 1), fontsize=FONT + 1, loc="left")
    axis.set_xlabel(_lines(x, width, FONT), fontsize=FONT)
    axis.set_ylabel(_lines(y, height, FONT), fontsize=FONT)


def legend(axis: Axes, **options: Any) -> None:
    axis.legend(fontsize=SMALL, title_fontsize=SMALL, frameon=False, **options)


def beside(axis: Axes, **options: Any) -> None:
    """A legend to the right of the panel."""
    legend(axis, loc="center left", bbox_to_anchor=(1.0, 0.5), **options)


def _inches(axis: Axes) -> tuple[float, float]:
    """Roughly the width and height of a panel without its tick labels and names."""
    figure = axis.get_figure()
    width, height = figure.get_size_inches()
    place = axis.get_subplotspec()
    if place is not None:
        grid = place.get_gridspec()
        width *= _share(grid.get_width_ratios(), grid.ncols, place.colspan)
        height *= _share(grid.get_height_ratios(), grid.nrows, place.rowspan)
    return width - 0.6, height - 0.7


def _share(ratios: Any, count: int, span: range) -> float:
    ratios = ratios or [1] * count
    return sum(ratios[i] for i in span) / sum(ratios)


def _lines(text: str, inches: float, points: float) -> str:
    letters = max(12, int(72 * inches / (LETTER * points)))
    return "\n".join(textwrap.fill(line, letters) for line in text.split("\n"))
