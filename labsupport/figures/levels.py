"""Levels, drawn: where sixteen of them stand, how often each is used, and what each costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import NormalDist

import torch

from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure

EVEN = 100 / 16


def _cells(values: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Levels in order; the share of the squared error in each one's cell, in percent; the cells' borders, within the values."""
    levels = base.drawable(levels).sort().values
    bounds = (levels[:-1] + levels[1:]) / 2
    codes = torch.bucketize(values, bounds)
    error = (values - levels[codes]).double().pow(2)
    by_cell = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, codes, error)
    return levels, 100 * by_cell / by_cell.sum().clamp(min=1e-300), [-1.0, *bounds.tolist(), 1.0]


def ratio_db(values: torch.Tensor, levels: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in decibels of values from -1 to 1, each taken to the nearest level."""
    values, levels = base.drawable(values), base.drawable(levels).sort().values
    codes = torch.bucketize(values, (levels[:-1] + levels[1:]) / 2)
    noise = (values - levels[codes]).double().pow(2).sum().clamp(min=1e-300)
    return (10 * torch.log10(values.double().pow(2).sum() / noise)).item()


def on_values(values: torch.Tensor, levels: torch.Tensor, name: str = "") -> CourseFigure:
    """Above: a histogram of values from -1 to 1 and the levels over it. Below: the share of the squared error in each cell."""
    values = base.drawable(values).flatten()
    ordered, share, borders = _cells(values, levels)
    ratio = ratio_db(values, levels)
    worst = int(share.argmax())
    name = name or "these levels"
    alt = (
        f"Above: a histogram of {len(values)} weights over their block's largest, a bell between spikes at -1 and 1, with "
        f"{name} as {len(ordered)} vertical lines from {ordered[0].item():.2f} to {ordered[-1].item():.2f}. Below: bars of squared "
        f"error by cell; the most, {share[worst].item():.0f} %, at the level {ordered[worst].item():.2f}. {ratio:.2f} dB."
    )
    figure, (top, bottom) = base.new(alt, 2, 1, size=(7.2, 4.4), sharex=True, height_ratios=(3, 2))
    counts, edges = torch.histogram(values, bins=80, range=(-1.0, 1.0))
    density = counts / counts.sum() * 100
    top.bar(edges[:-1].tolist(), density.tolist(), width=2 / 80, align="edge", color=base.SKY, label="weights")
    height = 1.25 * density[1:-1].max().item()
    top.vlines(ordered.tolist(), 0, height, color=base.RED, linewidth=1.1, label="levels")
    top.set_ylim(0, 1.25 * height)
    base.label(top, f"{name}: {ratio:.2f} dB", "", "weights (%)")
    base.legend(top, loc="upper right", ncols=2)
    widths = [max(right - left, 0.0) for left, right in pairwise(borders)]
    bottom.bar(borders[:-1], share.tolist(), width=widths, align="edge", color=base.ORANGE, edgecolor="white", linewidth=0.8)
    bottom.plot(ordered, [0] * len(ordered), "|", color=base.RED, markersize=12, clip_on=False)
    bottom.set_ylim(0, max(30, 1.05 * share.max().item()))
    bottom.set_xlim(-1.09, 1.09)
    base.label(bottom, "Where the squared error comes from", "weight / largest magnitude of its block", "of the error (%)")
    return figure


def slices(codebooks: Mapping[str, torch.Tensor]) -> CourseFigure:
    """Above: a normal curve in 16 slices of equal area. Below: codebooks of 16 levels from -1 to 1, one line each."""
    codebooks, curve = base.all_drawable(codebooks), NormalDist()
    edges = [curve.inv_cdf(i / 16) for i in range(1, 16)]
    reach = 2.6
    zeros = [name for name, levels in codebooks.items() if (levels == 0).any()]
    alt = (
        "Above: a normal curve cut into 16 slices of equal area, narrow in the middle and wide at the ends, a dot halving each. "
        f"Below: the levels of {', '.join(codebooks)} as marks from -1 to 1; with a level at 0: {', '.join(zeros) or 'none'}."
    )
    figure, (top, bottom) = base.new(alt, 2, 1, size=(7.2, 3.9), height_ratios=(3, 2))
    for i, (left, right) in enumerate(zip([-reach, *edges], [*edges, reach], strict=True)):
        x = torch.linspace(left, right, 40)
        y = [curve.pdf(value) for value in x.tolist()]
        top.fill_between(x, y, color=(base.SKY, base.BLUE)[i % 2], alpha=0.6, linewidth=0)
    middles = [curve.inv_cdf((i + 0.5) / 16) for i in range(16)]
    top.plot(middles, [0] * 16, base.SERIES[0][1], color=base.SERIES[0][0], markersize=5, clip_on=False, zorder=3)
    top.set_xlim(-reach, reach)
    top.set_ylim(0)
    base.label(top, "Sixteen slices, each 1/16 of the area, and their middles", "value (standard deviations)", "density")
    for place, ((name, levels), (color, marker, _)) in enumerate(base.styled(codebooks.items())):
        bottom.plot(levels, [place] * len(levels), marker, color=color, markersize=5, label=name)
        bottom.hlines(place, -1, 1, color=color, linewidth=0.5)
    bottom.axvline(0, color=base.GREY, linewidth=0.8)
    bottom.set_yticks(range(len(codebooks)), list(codebooks))
    bottom.set_ylim(len(codebooks) - 0.5, -0.5)
    bottom.set_xlim(-1.09, 1.09)
    base.label(bottom, "Sixteen levels", "weight / largest magnitude of its block", "")
    return figure


def code_use(use: Mapping[str, Sequence[float]], title: str) -> CourseFigure:
    """How often each of the 16 codes is taken, in percent, one line for each entry of `use`, and the line of even use."""
    summary = "; ".join(f"{name} from {min(shares):.1f} to {max(shares):.1f} %" for name, shares in use.items())
    figure, axis = base.new(f"How often each of 16 codes is used: {summary}. Even use would be 6.25 %.", size=(6.6, 3.3))
    for place, ((name, shares), (color, marker, style)) in enumerate(base.styled(use.items())):
        # Smaller and smaller markers: lines that lie on each other can still be told apart.
        size = 8 - 2 * min(place, 2)
        axis.plot(range(len(shares)), shares, color=color, marker=marker, linestyle=style, markersize=size, label=name)
    axis.axhline(EVEN, color=base.GREY, linewidth=1, label="even use")
    axis.set_xticks(range(16))
    axis.set_ylim(0, 1.25 * max(max(shares) for shares in use.values()))
    base.label(axis, title, "code (0 stands for the lowest level)", "of all weights (%)")
    base.legend(axis, loc="upper left", ncols=2)
    return figure


def densities(samples: Mapping[str, torch.Tensor], title: str, reach: float = 1.0) -> CourseFigure:
    """Histograms of several samples of one scale, as outlines; and how much of each lies at the very ends."""
    samples = base.all_drawable(samples)
    ends = {name: 100 * (values.abs() >= reach).float().mean().item() for name, values in samples.items()}
    summary = "; ".join(f"{name} with {share:.1f} % at or beyond the ends" for name, share in ends.items())
    figure, axis = base.new(f"Outlines of histograms from {-reach:g} to {reach:g}: {summary}.", size=(6.6, 3.2))
    for (name, values), (color, _, style) in base.styled(samples.items()):
        counts, edges = torch.histogram(values.flatten().clamp(-reach, reach), bins=61, range=(-reach, reach))
        share = 100 * counts / counts.sum()
        axis.stairs(
            share.tolist(),
            edges.tolist(),
            color=color,
            linestyle=style,
            linewidth=1.4,
            label=f"{name} ({ends[name]:.1f} % at the ends)",
        )
    base.label(axis, title, "weight (over its divisor)", "of all weights (%)")
    base.legend(axis, loc="upper right")
    axis.set_ylim(0, 1.35 * axis.get_ylim()[1])
    return figure


def table(rows: Mapping[str, Mapping[str, float]], title: str) -> CourseFigure:
    """Decibels of each codebook (column) on each distribution (row). The color is the distance to the best of the row."""
    columns = list(next(iter(rows.values())))
    values = torch.tensor([list(row.values()) for row in rows.values()], dtype=torch.float64)
    behind = values - values.amax(1, keepdim=True)
    best = {name: max(row, key=row.get) for name, row in rows.items()}
    summary = "; ".join(f"{name}: {winner} with {rows[name][winner]:.1f} dB" for name, winner in best.items())
    figure, axis = base.new(
        f"A table in color, the best codebook for each distribution: {summary}.", size=(6.8, 0.9 + 0.42 * len(rows))
    )
    image = axis.imshow(behind, cmap=base.AMOUNTS, aspect="auto", vmin=min(-4.0, behind.min().item()), vmax=0)
    for y, row in enumerate(values.tolist()):
        for x, value in enumerate(row):
            won = behind[y, x] == 0
            dark = image.norm(behind[y, x].item()) < 0.55
            axis.text(
                x, y, f"{value:.1f}", ha="center", va="center", fontsize=base.SMALL, weight="bold" if won else "normal",
                color="white" if dark else "black",
            )  # fmt: skip
    axis.set_xticks(range(len(columns)), columns, fontsize=base.SMALL)
    axis.set_yticks(range(len(rows)), list(rows))
    base.label(axis, title, "", "")
    scales.color_bar(figure, image, axis, "behind the best (dB)")
    return figure


def error_and_loss(points: Mapping[str, tuple[float, float, float, float]], title: str) -> CourseFigure:
    """A codebook's decibels on the weights against what it costs the model: (dB, change, low, high), 0.01 being 1 %."""
    summary = "; ".join(f"{name} {db:.2f} dB and {100 * change:+.1f} %" for name, (db, change, _, _) in points.items())
    figure, axis = base.new(f"Rise in perplexity against decibels, with intervals: {summary}.", size=(6.2, 3.5))
    for (name, (db, change, low, high)), (color, marker, _) in base.styled(points.items()):
        bars = scales.bars([(change, low, high)])
        axis.errorbar(db, 100 * change, bars, color=color, marker=marker, markersize=6, capsize=3, linestyle="none", label=name)
    axis.set_ylim(0, 1.15 * max(100 * high for *_, high in points.values()))
    axis.margins(x=0.12)
    axis.grid(alpha=0.25)
    base.label(axis, title, "signal to quantization noise of the weights (dB), more is better", "rise in perplexity (%)")
    base.legend(axis)
    return figure


def rises(series: Mapping[str, Sequence[Mapping[str, float]]], title: str, live: tuple[float, float] | None = None) -> CourseFigure:
    """Rise in perplexity against stored bits a weight on plain scales, for changes of one size: a line for each series.

    Rows hold bits_per_weight, change, low and high (1 % is 0.01). live: a point that the notebook has just measured.
    """
    summary = "; ".join(
        f"{name} from {100 * max(r['change'] for r in rows):.2f} to {100 * min(r['change'] for r in rows):.2f} %"
        for name, rows in series.items()
    )
    figure, axis = base.new(f"Rise in perplexity against stored bits a weight, with intervals: {summary}.", size=(6.6, 3.8))
    for (name, rows), (color, marker, style) in base.styled(series.items()):
        ordered = sorted(rows, key=lambda r: r["bits_per_weight"])
        y = [100 * r["change"] for r in ordered]
        bars = scales.bars([(r["change"], r["low"], r["high"]) for r in ordered])
        x = [r["bits_per_weight"] for r in ordered]
        axis.errorbar(x, y, bars, color=color, marker=marker, linestyle=style, markersize=5, capsize=2, label=name)
    if live is not None:
        axis.plot(live[0], 100 * live[1], "*", color=base.BLACK, markersize=12, zorder=5, label="measured just now")
    axis.set_ylim(0, 1.3 * max(100 * r["high"] for rows in series.values() for r in rows))
    axis.grid(alpha=0.25)
    base.label(axis, title, "bits a weight, all that is stored", "rise in perplexity (%)")
    base.legend(axis, ncols=3, loc="upper center")
    return figure
