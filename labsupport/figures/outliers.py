"""Outliers, drawn: where large values are, what they do to int8, which columns the rescue takes out and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.ticker import NullLocator

from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure
from labsupport.figures.scales import Change


def by_block(inputs: Mapping[str, torch.Tensor], threshold: float) -> CourseFigure:
    """What enters the layers, block by block: its largest magnitude; columns that reach `threshold` in any token, and in one.

    inputs: float [tokens, features] by the name of the linear that reads it, such as "model.layers.0.mlp.down_proj".
    """
    kinds: dict[str, dict[int, tuple[float, float, float]]] = {}
    for name, x in base.all_drawable(inputs).items():
        large = x.abs() >= threshold
        block = int(next(part for part in name.split(".") if part.isdigit()))
        facts = (x.abs().max().item(), 100 * large.any(0).float().mean().item(), 100 * large.float().mean().item())
        kinds.setdefault(name.rsplit(".", 1)[-1], {})[block] = facts
    summaries = []
    for kind, facts in kinds.items():
        most = [max(f[i] for f in facts.values()) for i in range(3)]
        summaries.append(f"{kind}: up to {most[0]:.1f}; {most[1]:.0f} % of columns in any token, {most[2]:.1f} % in one")
    titles = (
        (f"Largest magnitude; the line is {threshold:g}", "largest magnitude (no unit)"),
        (f"Columns that reach {threshold:g} in any token", "share of columns (%)"),
        ("... and in a single token, on average", "share of columns (%)"),
    )
    alt = f"What enters the linears of each block, and threshold {threshold:g}. " + ". ".join(summaries) + "."
    figure, axes = base.new(alt, 1, 3, size=(base.WIDTH, 3.4))
    for panel, (axis, (title, unit)) in enumerate(zip(axes, titles, strict=True)):
        for (kind, facts), (color, marker, style) in base.styled(kinds.items()):
            values = [facts[block][panel] for block in sorted(facts)]
            axis.plot(sorted(facts), values, color=color, marker=marker, linestyle=style, markersize=4, label=kind)
        base.label(axis, title, "block", unit)
        if panel == 0:
            axis.set_yscale("log")
            axis.axhline(threshold, color=base.GREY, linewidth=1)
            scales.one_two_five(axis.yaxis)
        else:
            axis.set_ylim(-4, 104)
    base.legend(axes[1], title="read by", loc="center left", bbox_to_anchor=(0.0, 0.5))
    return figure


def token_map(inputs: Mapping[str, torch.Tensor], threshold: float, tokens: int = 96) -> CourseFigure:
    """A dot for every value that reaches `threshold`: columns to the right, the first `tokens` tokens downward.

    inputs: float [tokens, features] by title.
    """
    summaries = []
    figure, axes = base.new("", 1, len(inputs), size=(base.WIDTH, 3.4), squeeze=False)
    for axis, (title, x), color in zip(axes[0], base.all_drawable(inputs).items(), (base.BLUE, base.RED, base.GREEN), strict=False):
        large = x[:tokens].abs() >= threshold
        token, column = large.nonzero(as_tuple=True)
        axis.plot(column, token, ".", color=color, markersize=2.5 if len(token) > 100 else 5)
        steady = int((large.float().mean(0) >= 0.25).sum())
        columns, count = int(large.any(0).sum()), int(large.sum())
        summaries.append(
            f"{title}: {count} dots in {columns} of {x.shape[1]} columns, {steady} of them large in a quarter of the tokens"
        )
        axis.set(xlim=(-0.02 * x.shape[1], 1.02 * x.shape[1]), ylim=(tokens, -1))
        base.label(
            axis, f"{title}\n{count} values in {columns} of {x.shape[1]} columns", "column (of in_features)", "token in the text"
        )
    figure.alt = f"Dots where a value reaches {threshold:g}, columns against tokens. " + "; ".join(summaries) + "."
    return figure


def columns_against_tokens(
    tokens: Sequence[int], columns: Mapping[str, Sequence[int]], features: Mapping[str, int]
) -> CourseFigure:
    """How many columns leave int8, as a share of all, when so many tokens are multiplied together; one line an input."""
    shares = {name: [100 * c / features[name] for c in counts] for name, counts in columns.items()}
    summary = "; ".join(f"{name} from {values[0]:.1f} to {values[-1]:.0f} %" for name, values in shares.items())
    alt = f"Share of columns that leave int8, from {tokens[0]} to {tokens[-1]} tokens at a time: {summary}."
    figure, axis = base.new(alt, size=(6.4, 3.4))
    for (name, values), (color, marker, style) in base.styled(shares.items()):
        axis.plot(tokens, values, color=color, marker=marker, linestyle=style, markersize=4, label=name)
    axis.set_xscale("log", base=2)
    scales.plain_numbers(axis.xaxis)
    axis.set_ylim(-4, 104)
    base.label(axis, "The more tokens, the less is left in int8", "tokens multiplied together", "columns taken out of int8 (%)")
    base.legend(axis, loc="upper left")
    return figure


def one_column(factors: Sequence[float], ratios: Mapping[str, Sequence[float]]) -> CourseFigure:
    """Signal to noise of the output, in dB, while one column of the activations grows by `factors`; one line a method."""
    summary = "; ".join(f"{name} from {values[0]:.1f} to {values[-1]:.1f} dB" for name, values in ratios.items())
    figure, axis = base.new(f"Signal to noise while one column grows {factors[-1]:g} times: {summary}.", size=(6.4, 3.5))
    for (name, values), (color, marker, style) in base.styled(ratios.items()):
        axis.plot(factors, values, color=color, marker=marker, linestyle=style, markersize=4.5, label=name)
    axis.set_xscale("log", base=2)
    scales.plain_numbers(axis.xaxis)
    axis.grid(alpha=0.25)
    base.label(axis, "One column grows: what is left of the others", "the column's factor (times)", "signal to noise (dB)")
    base.legend(axis, loc="lower left")
    return figure


def rises(methods: Mapping[str, Mapping[str, Change]], title: str, marks: Sequence[float] = (1.0,)) -> CourseFigure:
    """Rise in perplexity of every method, side by side for every model: methods[method][model] = (change, low, high).

    marks: lines in percent.
    """
    models = list(next(iter(methods.values())))
    summaries = []
    figure, axis = base.new("", size=(base.WIDTH, 4.0))
    for row, (model, (color, marker, _)) in enumerate(base.styled(models)):
        changes = [found[model] for found in methods.values()]
        places = [i + 0.2 * (row - (len(models) - 1) / 2) for i in range(len(methods))]
        values = [100 * c for c, _, _ in changes]
        axis.errorbar(
            places, values, scales.bars(changes), color=color, marker=marker, linestyle="", capsize=3, markersize=5, label=model
        )
        summaries.append(f"{model}: " + ", ".join(f"{m} {v:+.2g} %" for m, v in zip(methods, values, strict=True)))
    scales.percent(axis, 0.1)
    for mark in marks:
        axis.axhline(mark, color=base.BLACK, linewidth=0.8, linestyle=":")
        axis.text(len(methods) - 0.45, mark, f"{mark:g} %", fontsize=base.SMALL, va="bottom", ha="right")
    axis.set_xticks(range(len(methods)), list(methods))
    axis.set_xlim(-0.5, len(methods) - 0.42)
    base.label(axis, title, "", "rise in perplexity (%)")
    base.legend(axis, loc="upper right")
    figure.alt = f"{title}. " + "; ".join(summaries) + "."
    return figure


def against_threshold(
    models: Mapping[str, Mapping[float, Change]], all_int8: Mapping[str, Change], live: tuple[float, float] | None = None
) -> CourseFigure:
    """Rise in perplexity against the threshold, one line a model, and at the right end with all columns in int8.

    models[model][threshold] and all_int8[model]: (change, low, high). live: a point (threshold, change) just measured.
    """
    summaries = []
    figure, axis = base.new("", size=(6.8, 3.8))
    end = 2 * max(t for found in models.values() for t in found)
    for (model, found), (color, marker, style) in base.styled(models.items()):
        places, changes = sorted(found), [found[t] for t in sorted(found)]
        values = [100 * c for c, _, _ in changes]
        axis.errorbar(
            places,
            values,
            scales.bars(changes),
            color=color,
            marker=marker,
            linestyle=style,
            capsize=2,
            markersize=4.5,
            label=model,
        )
        last = all_int8[model]
        axis.errorbar([end], [100 * last[0]], scales.bars([last]), color=color, marker=marker, markerfacecolor="white", capsize=2)
        ends = f"{values[0]:+.2g} % at {places[0]:g}, {values[-1]:+.2g} % at {places[-1]:g}"
        summaries.append(f"{model} {ends}, {100 * last[0]:+.2g} % without one")
    if live is not None:
        axis.plot(live[0], 100 * live[1], "*", color=base.BLACK, markersize=13, zorder=5, label="measured just now")
    scales.percent(axis, 0.1)
    axis.set_xscale("log", base=2)
    ticks = sorted(next(iter(models.values())))
    axis.set_xticks([*ticks, end], [*(f"{t:g}" for t in ticks), "none"])
    axis.xaxis.set_minor_locator(NullLocator())
    base.label(
        axis, "Rise against threshold; hollow: all in int8", "threshold on the magnitude (no unit)", "rise in perplexity (%)"
    )
    base.legend(axis, loc="upper left")
    figure.alt = "Rise in perplexity against the threshold: " + "; ".join(summaries) + "."
    return figure


def time_parts(parts: Mapping[str, Sequence[float]], names: Sequence[str], marks: Mapping[str, float]) -> CourseFigure:
    """Stacked bars: the time of a layer in parts, one bar a case, in multiples of a reference; `marks` are other products."""
    totals = [sum(values) for values in zip(*parts.values(), strict=True)]
    summary = ", ".join(f"{name} {total:.2g}" for name, total in zip(names, totals, strict=True))
    others = ", ".join(f"{name} {value:.2g}" for name, value in marks.items())
    figure, axis = base.new(
        f"Time of a layer as a multiple of the float32 product. {summary}; marked {others}.", size=(base.WIDTH, 3.2)
    )
    left = [0.0] * len(names)
    for (part, values), (color, hatch) in base.filled(parts.items()):
        axis.barh(range(len(names)), values, left=left, color=color, hatch=hatch, edgecolor="white", height=0.65, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for place, total in enumerate(totals):
        text = axis.text(total, place, f" {total:.2f}", va="center", fontsize=base.SMALL)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4})
    limit = 1.15 * max(*totals, *marks.values())
    for name, value in marks.items():
        axis.axvline(value, color=base.BLACK, linestyle="--", linewidth=1)
        side = "right" if value > 0.3 * limit else "left"
        axis.text(value, -0.62, f" {name} ", fontsize=base.SMALL, ha=side, va="bottom")
    axis.set_yticks(range(len(names)), names)
    axis.set(ylim=(len(names) - 0.5, -0.9), xlim=(0, limit))
    base.label(axis, "A product, part by part", "time (multiples of the float32 product)", "")
    base.beside(axis)
    return figure


def two_errors(
    loudness: torch.Tensor, places: Mapping[str, torch.Tensor], errors: Mapping[str, tuple[float, float]]
) -> CourseFigure:
    """Left: columns by loudness, and which columns two errors are in. Right: each error in the weight and the output, in percent.

    loudness: root mean square of each column, [features]. places: columns by name. errors: relative, of weight and output.
    """
    summary = "; ".join(f"{name}: weight {100 * w:.2g} %, output {100 * o:.2g} %" for name, (w, o) in errors.items())
    figure, (left, right) = base.new(
        f"Two errors of a weight, one size. {summary}.", 1, 2, size=(base.WIDTH, 3.2), width_ratios=(3, 2)
    )
    loudness = base.drawable(loudness)
    order = loudness.argsort(descending=True)
    rank = order.argsort()
    left.plot(range(len(order)), loudness[order], color=base.BLACK, linewidth=1)
    for place, ((name, columns), (color, marker, _)) in enumerate(base.styled(places.items())):
        columns = columns.cpu()
        left.plot(rank[columns], loudness[columns], marker, color=color, markersize=3, label=name)
        values = [100 * value for value in errors[name]]
        bars = right.bar(
            [x + 0.4 * place for x in (0, 1)], values, width=0.36, color=color, hatch=("", "//")[place % 2], label=name
        )
        right.bar_label(bars, fmt="%.2g", fontsize=base.SMALL)
    left.set_yscale("log")
    scales.one_two_five(left.yaxis)
    base.label(left, "Where each error sits", "column, loudest first (rank)", "rms over tokens (no unit)")
    right.set_xticks((0.2, 1.2), ("in the weight", "in the output"))
    right.margins(y=0.18)
    base.label(right, "The same error, twice", "", "relative error (%)")
    base.legend(left, loc="lower left")
    return figure
