"""Channels that matter, drawn: how loud each is, what stretching one costs, which scale a search picks, and the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.ticker import NullLocator

from labsupport.figures import base
from labsupport.figures.base import CourseFigure
from labsupport.figures.scales import Change, bars, one_two_five, plain_numbers


def channels(models: Mapping[str, tuple[torch.Tensor, torch.Tensor]], share: float = 0.01) -> CourseFigure:
    """Mean |x| and mean |w| of each input channel, over their medians, loudest first; one panel a model, the top `share` shaded.

    models: (mean |x|, mean |w|) by title, float [in_features] each.
    """
    summaries = []
    figure, axes = base.new("", 1, len(models), size=(base.WIDTH, 3.3), squeeze=False, sharey=True)
    for axis, (title, (loud, weight)) in zip(axes[0], models.items(), strict=True):
        loud, weight = base.drawable(loud), base.drawable(weight)
        order = loud.argsort(descending=True)
        count = -int(-share * len(loud) // 1)
        axis.axvspan(-0.5, count - 0.5, color=base.ORANGE, alpha=0.45, linewidth=0, label=f"top {100 * share:g} %")
        for (name, values), (color, marker, _) in zip({"|w|": weight, "|x|": loud}.items(), base.SERIES[1::-1], strict=True):
            axis.plot(range(len(order)), (values / values.median())[order], marker, color=color, markersize=2.5, label=name)
        ratios = [(values.max() / values.median()).item() for values in (loud, weight)]
        summaries.append(f"{title}: the loudest |x| {ratios[0]:.1f} times the median, the largest |w| {ratios[1]:.1f} times")
        axis.set_yscale("log")
        one_two_five(axis.yaxis)
        base.label(axis, title, "input channel, loudest first (rank)", "mean magnitude (times the median)")
    for axis in axes[0][1:]:
        axis.set_ylabel("")
    base.legend(axes[0][-1], loc="upper right", markerscale=2)
    figure.alt = "Magnitude of inputs and weights by channel. " + "; ".join(summaries) + "."
    return figure


def by_model(methods: Mapping[str, Mapping[str, Change]], title: str) -> CourseFigure:
    """Rise in perplexity of every method, a panel of bars for each model, each with a scale of its own.

    methods[method][model] = (change, low, high).
    """
    models, summaries = list(next(iter(methods.values()))), []
    figure, axes = base.new("", 1, len(models), size=(base.WIDTH, 1.1 + 0.42 * len(methods)), squeeze=False)
    for axis, model, color in zip(axes[0], models, (base.SKY, base.ORANGE, base.GREY), strict=False):
        found = [methods[method][model] for method in methods]
        values = [100 * change for change, _, _ in found]
        axis.barh(range(len(values)), values, xerr=bars(found), color=color, ecolor=base.BLACK, capsize=3, height=0.62)
        ends = [100 * high for *_, high in found]
        for place, (value, end) in enumerate(zip(values, ends, strict=True)):
            axis.text(end, place, f"  {_percent(value)}", va="center", fontsize=base.SMALL)
        left, right = min(0.0, *(100 * low for _, low, _ in found)), max(0.0, *ends)
        axis.set_xlim(left, right + 0.3 * (right - left))  # of random weights a method may lower the perplexity
        first = axis is axes[0][0]
        axis.set_yticks(range(len(methods)) if first else [], list(methods) if first else [])
        axis.set_ylim(len(methods) - 0.5, -0.5)
        base.label(axis, f"{title}, {model}" if first else model, "rise in perplexity (%)", "")
        summaries.append(f"{model}: " + ", ".join(f"{m} {_percent(v)} %" for m, v in zip(methods, values, strict=True)))
    figure.alt = f"{title}. Rise in perplexity. " + "; ".join(summaries) + "."
    return figure


def _percent(value: float) -> str:
    """With a sign and three digits, or all of a large number's."""
    return f"{value:+,.0f}" if abs(value) >= 1000 else f"{value:+.3g}"


def stretch(
    factors: Sequence[float], own: Sequence[float], others: Sequence[float], kinks: tuple[float, float], title: str
) -> CourseFigure:
    """Squared error of the output while one channel is stretched: the channel's own part, that of the others, and the sum.

    All in percent of the sum at factor 1. kinks: between which factors the middle half of rows begin to pay.
    """
    total = [a + b for a, b in zip(own, others, strict=True)]
    best = min(range(len(total)), key=total.__getitem__)
    alt = (
        f"{title}. The channel's own error falls from {own[0]:.0f} to {min(own):.1f} % of the sum at factor 1, that of the others "
        f"rises from {others[0]:.0f} to {others[-1]:.0f} %; their sum is least, {total[best]:.0f} %, at {factors[best]:.2g}. Half "
        f"of the rows have their kink between {kinks[0]:.2g} and {kinks[1]:.2g}, shaded."
    )
    figure, axis = base.new(alt, size=(base.WIDTH, 3.4))
    axis.axvspan(*kinks, color=base.ORANGE, alpha=0.3, linewidth=0, label="kinks, middle half of rows")
    lines = {"the channel's own": own, "all others'": others, "sum": total}
    for (name, values), (color, _, style) in base.styled(lines.items()):
        axis.plot(factors, values, color=color, linestyle=style, linewidth=1.7, label=name)
    axis.plot(factors[best], total[best], "*", color=base.BLACK, markersize=12, zorder=5)
    axis.set_xscale("log", base=2)
    plain_numbers(axis.xaxis)
    axis.set_ylim(0, 1.1 * max(total[0], min(total[-1], 2 * total[0])))
    base.label(axis, title, "s, by which the channel is stretched (times)", "squared error (% of the sum at s = 1)")
    base.beside(axis)
    return figure


def ratios(models: Mapping[str, Mapping[str, torch.Tensor]], title: str) -> CourseFigure:
    """Loss against the ratio, over the loss at ratio 0, a thin line for each group of linears; a panel a model.

    models[title][name of the first linear]: losses, float [n_grid].
    """
    summaries, colors = [], {}
    figure, axes = base.new("", 1, len(models), size=(base.WIDTH, 3.4), squeeze=False, sharey=True)
    for axis, (model, groups) in zip(axes[0], models.items(), strict=True):
        best, groups = [], base.all_drawable(groups)
        for name, losses in groups.items():
            kind = name.rsplit(".", 1)[-1]
            new = kind not in colors
            color, marker, style = colors.setdefault(kind, base.SERIES[len(colors) % len(base.SERIES)])
            relative = (losses / losses[0]).tolist()
            x = [i / len(relative) for i in range(len(relative))]
            place = min(range(len(x)), key=relative.__getitem__)
            best.append(x[place])
            axis.plot(x, relative, color=color, linestyle=style, linewidth=1, alpha=0.8, label=kind if new else None)
            axis.plot(x[place], relative[place], marker, color=color, markersize=4)
        lowest = min((losses / losses[0]).min().item() for losses in groups.values())
        summaries.append(
            f"{model}: the best ratios lie from {min(best):.2g} to {max(best):.2g}, the least loss is {lowest:.2g} times"
        )
        axis.axhline(1, color=base.GREY, linewidth=0.8)
        base.label(axis, model, "ratio (exponent of mean |x|)", "loss (times that of ratio 0)")
        axis.set_yscale("log")
        axis.set_ylim(0.8 * lowest, 3)
        one_two_five(axis.yaxis)
    for axis in axes[0][1:]:
        axis.set_ylabel("")
    figure.legend(loc="outside right upper", fontsize=base.SMALL, frameon=False, title="read by", title_fontsize=base.SMALL)
    figure.suptitle(title, fontsize=base.FONT + 1, x=0.01, ha="left")
    figure.alt = f"{title}. Loss against the ratio, over plain rounding. " + "; ".join(summaries) + "."
    return figure


def scales(loud: torch.Tensor, scale: torch.Tensor, title: str, share: float = 0.01) -> CourseFigure:
    """The scale of every channel against its mean |x|, float [in_features] each; the top `share` of channels marked."""
    count = -int(-share * len(loud) // 1)
    loud, scale = base.drawable(loud), base.drawable(scale)
    top = torch.zeros(len(loud), dtype=torch.bool)
    top[loud.topk(count).indices] = True
    alt = (
        f"{title}. A dot for each of {len(loud)} channels, on a rising straight line: scales from {scale.min().item():.2f} to "
        f"{scale.max().item():.2f}. The {count} loudest are marked at its upper end; none stands apart from the line."
    )
    figure, axis = base.new(alt, size=(6.2, 3.4))
    axis.plot(loud[~top], scale[~top], "o", color=base.BLUE, markersize=3.5, label="all other channels")
    axis.plot(loud[top], scale[top], "s", color=base.RED, markersize=6, label=f"top {100 * share:g} %")
    axis.axhline(1, color=base.GREY, linewidth=0.8)
    axis.set(xscale="log", yscale="log")
    one_two_five(axis.xaxis)
    one_two_five(axis.yaxis)
    base.label(axis, title, "mean |x| of the channel (no unit)", "scale (times)")
    base.legend(axis, loc="upper left")
    return figure


def clips(losses: torch.Tensor, share_of: torch.Tensor, title: str) -> CourseFigure:
    """Left: the loss of a few groups against the limit, over that without clipping. Right: the limits that all groups take.

    losses: float [groups shown, steps], at the limits 1, 0.95, ... share_of: the limits found, over the largest magnitude, any
    shape.
    """
    losses, share_of = base.drawable(losses), base.drawable(share_of)
    limits = [1 - step / 20 for step in range(losses.shape[1])]
    relative = (losses / losses[:, :1]).tolist()
    counts = [100 * ((share_of - limit).abs() < 1e-3).float().mean().item() for limit in limits]
    alt = (
        f"{title}. Left: loss against the limit for {len(relative)} groups, with minima of "
        f"{', '.join(f'{min(values):.2f}' for values in relative)} times the loss without clipping. Right: {counts[0]:.0f} % of "
        f"all groups are best left as they are, {counts[-1]:.0f} % take the smallest limit, {limits[-1]:.2f}."
    )
    figure, (left, right) = base.new(alt, 1, 2, size=(base.WIDTH, 3.2))
    for number, (values, (color, marker, style)) in enumerate(base.styled(relative), 1):
        left.plot(limits, values, color=color, marker=marker, linestyle=style, markersize=4, label=f"group {number}")
    left.axhline(1, color=base.GREY, linewidth=0.8)
    left.set_ylim(0, 2.5)
    left.invert_xaxis()
    base.label(left, "Four groups", "limit (times the largest magnitude)", "loss (times that without clipping)")
    base.legend(left, loc="upper left", ncols=2)
    right.bar(limits, counts, width=0.04, color=base.SKY, edgecolor=base.BLUE)
    right.invert_xaxis()
    base.label(right, "What all groups take", "limit (times the largest magnitude)", "groups (%)")
    return figure


def flip(methods: Mapping[str, Mapping[str, Change]], title: str, live: tuple[str, str, float] | None = None) -> CourseFigure:
    """Rise in perplexity, a line for each method from one way of writing the model to the next, so that crossings are seen.

    methods[method][model] = (change, low, high). live: (method, model, change) just measured.
    """
    models = list(next(iter(methods.values())))
    summaries, ends = [], []
    figure, axis = base.new("", size=(7.4, 4.0))
    for place, ((method, found), (color, marker, style)) in enumerate(base.styled(methods.items())):
        x = [i + 0.03 * (place - (len(methods) - 1) / 2) for i in range(len(models))]
        y = [100 * found[model][0] for model in models]
        axis.errorbar(
            x,
            y,
            bars([found[m] for m in models]),
            color=color,
            marker=marker,
            linestyle=style,
            markersize=5,
            capsize=2,
            label=method,
        )
        ends.append((y[-1], method, color))
        summaries.append(f"{method} " + ", ".join(f"{v:+.3g} % {m}" for v, m in zip(y, models, strict=True)))
    if live is not None:
        axis.plot(models.index(live[1]), 100 * live[2], "*", color=base.BLACK, markersize=12, zorder=5, label="measured just now")
    axis.set_yscale("log")
    one_two_five(axis.yaxis)
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xticks(range(len(models)), models)
    axis.set_xlim(-0.25, len(models) - 0.75)
    axis.grid(axis="y", alpha=0.25)
    base.label(axis, title, "", "rise in perplexity (%)")
    base.beside(axis)
    figure.alt = f"{title}. Rise in perplexity: " + "; ".join(summaries) + "."
    return figure


def one_sided(values: torch.Tensor, read_back: Mapping[str, torch.Tensor], title: str) -> CourseFigure:
    """Values of one sign, and what they read back as on several grids. float [n] each."""
    summary = ", ".join(f"{name} from {v.min().item():.2f} to {v.max().item():.2f}" for name, v in read_back.items())
    alt = f"{title}. Values from {values.min().item():g} to {values.max().item():g} read back as: {summary}."
    figure, axis = base.new(alt, size=(6.2, 3.3))
    values, read_back = base.drawable(values), base.all_drawable(read_back)
    order = values.argsort()
    axis.plot(values[order], values[order], color=base.GREY, linewidth=1, label="exact")
    for (name, found), (color, marker, style) in base.styled(read_back.items()):
        axis.plot(values[order], found[order], marker, color=color, linestyle=style, markersize=3, linewidth=1, label=name)
    axis.set_ylim(0, 1.15 * max(v.max().item() for v in read_back.values()))
    base.label(axis, title, "weight", "value read back")
    base.legend(axis)
    return figure
