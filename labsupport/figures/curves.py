"""Quality against size: the curves that every method of the course is drawn on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure

Row = Mapping[str, float]


def bits_against_perplexity(
    series: Mapping[str, Sequence[Row]], baseline: float, title: str, live: tuple[float, float] | None = None
) -> CourseFigure:
    """Rise in perplexity against bits a weight, one line a series, bars for the interval.

    Rows hold bits_per_weight, change, low and high (1 % is 0.01). baseline: perplexity of the unquantized model, for the title.
    live: a point (bits_per_weight, change) that the notebook has just measured.
    """
    summary = "; ".join(
        f"{name} from {100 * max(r['change'] for r in rows):.3g} % to {100 * min(r['change'] for r in rows):.2g} %"
        for name, rows in series.items()
    )
    figure, axis = base.new(f"Rise in perplexity against stored bits a weight, both ends of each line: {summary}.", size=(6.4, 3.8))
    for (name, rows), (color, marker, style) in base.styled(series.items()):
        ordered = sorted(rows, key=lambda r: r["bits_per_weight"])
        x = [r["bits_per_weight"] for r in ordered]
        y = [100 * r["change"] for r in ordered]
        bars = scales.bars([(r["change"], r["low"], r["high"]) for r in ordered])
        axis.errorbar(x, y, bars, color=color, marker=marker, linestyle=style, markersize=4.5, capsize=2, label=name)
    if live is not None:
        axis.plot(live[0], 100 * live[1], "*", color=base.BLACK, markersize=13, zorder=5, label="measured just now")
    if min(r["low"] for rows in series.values() for r in rows) > 0.001:
        axis.set_yscale("log")
        scales.plain_numbers(axis.yaxis)
    else:
        scales.percent(axis, 0.1)
    axis.grid(alpha=0.25)
    base.label(axis, f"{title} (16 bits: {baseline:.2f})", "bits a weight, all that is stored", "rise in perplexity (%)")
    base.legend(axis)
    return figure


def by_block(panels: Mapping[str, Mapping[str, Sequence[float]]], unit: str, log: bool = False) -> CourseFigure:
    """A value for each block of a model: panels[title][series], one value a block. unit: of all values, named on the left.

    log: a logarithmic axis. The panels share it.
    """
    summaries = []
    for title, series in panels.items():
        for name, values in series.items():
            most = max(range(len(values)), key=values.__getitem__)
            summaries.append(f"{title}, {name}: from {min(values):.3g} to {values[most]:.3g}, most in block {most}")
    figure, axes = base.new(
        f"{unit}, by block. {'; '.join(summaries)}.", 1, len(panels), size=(base.WIDTH, 3.6), squeeze=False, sharey=True
    )
    for axis, (title, series) in zip(axes[0], panels.items(), strict=True):
        for (name, values), (color, marker, style) in base.styled(series.items()):
            axis.plot(range(len(values)), values, color=color, marker=marker, linestyle=style, markersize=3.5, label=name)
        if log:
            axis.set_yscale("log")
            scales.plain_numbers(axis.yaxis)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        base.label(axis, title, "block", unit if axis is axes[0][0] else "")
    if not log:
        axes[0][0].set_ylim(0, 1.35 * max(v for series in panels.values() for values in series.values() for v in values))
    for axis in axes[0] if len({tuple(series) for series in panels.values()}) > 1 else axes[0][:1]:
        base.legend(axis, loc="upper left")
    return figure
