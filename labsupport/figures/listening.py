"""Who listens to a token, and which token pays: section 7.9, and the picture on the first screen of README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.ticker import NullLocator

from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure
from labsupport.figures.scales import Change


def who_pays(
    edges: Sequence[int], errors: Mapping[str, Sequence[float]], heard: Sequence[float], rises: Mapping[str, Change], subject: str
) -> CourseFigure:
    """Error of the values by place in the window, as a multiple of rounding's, beside what each way costs the whole model.

    edges: where bins of places begin, and the end. errors: by way, for each bin, divided by rounding's. heard: share of all
    attention, squared, that a bin gets. rises: of perplexity (0.1 is 10 %), with its interval; rounding's first, then those of
    `errors` in their order. subject: model, bits and groups, for the title.
    """
    places = [str(start + 1) if end == start + 1 else f"{start + 1}-{end}" for start, end in pairwise(edges)]
    by_way = "; ".join(
        f"{way}: {values[0]:.2g} on the first token, {values[-1]:.2g} on the last ones" for way, values in errors.items()
    )
    costs = "; ".join(f"{way} {100 * rise[0]:+.1f} %" for way, rise in rises.items())
    alt = (
        f"{subject}. Error of a token's values, as a multiple of rounding's, by its place in the window. {by_way}. The first token "
        f"gets {100 * heard[0]:.0f} % of all attention, squared. Rise in perplexity of the whole model: {costs}."
    )
    figure, (left, right) = base.new(alt, 1, 2, size=(base.WIDTH, 3.3), width_ratios=(3, 2))
    left.axhline(1, color=base.GREY, linewidth=1.2)
    left.text(len(places) - 1, 1.08, next(iter(rises)), fontsize=base.SMALL, color=base.DARK_GREY, ha="right", va="bottom")
    colors = {}
    for (way, values), (color, marker, style) in base.styled(errors.items()):
        left.plot(range(len(places)), values, color=color, marker=marker, linestyle=style, markersize=5, label=way)
        colors[way] = color
    left.set_yscale("log")
    left.set_ylim(top=1.7 * max(1.0, *(max(values) for values in errors.values())))
    scales.one_two_five(left.yaxis)
    left.yaxis.set_minor_locator(NullLocator())
    left.set_xticks(range(len(places)), places, rotation=45, ha="right", rotation_mode="anchor")
    sentence = f"it gets {100 * heard[0]:.0f} % of all attention, squared"
    highest, line = max(values[0] for values in errors.values()), {"arrowstyle": "-", "color": base.GREY}
    left.annotate(
        sentence, (0, highest), xytext=(0.9, 0), textcoords=("data", "offset points"), fontsize=base.SMALL, va="center",
        arrowprops=line,
    )  # fmt: skip
    base.label(
        left, "GPTQ spares all tokens but the first", "place in the window (tokens)", "error of the values (times rounding's)"
    )
    base.legend(left, loc="center right", bbox_to_anchor=(1.0, 0.3))
    for place, (way, (rise, low, high)) in enumerate(rises.items()):
        right.barh(place, 100 * rise, color=colors.get(way, base.GREY), height=0.6)
        right.plot([100 * low, 100 * high], [place, place], color=base.BLACK, linewidth=1.2)
        right.text(100 * high + 0.8, place, f"{100 * rise:+.1f} %", fontsize=base.SMALL, va="center")
    right.set_yticks(range(len(rises)), list(rises))
    right.invert_yaxis()
    right.set_xlim(0, 140 * max(high for _, _, high in rises.values()))
    base.label(right, "What the whole model loses", "rise in perplexity (%)", "")
    figure.suptitle(subject, fontsize=base.FONT + 1, x=0.01, ha="left")
    return figure
