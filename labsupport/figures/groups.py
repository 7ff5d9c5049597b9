"""Groups, drawn: levels along a row, the bill in bits, layers side by side, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure
from labsupport.model import models
from labsupport.model.evaluate import Evaluation
from labsupport.quant import grid, rtn


def row_in_groups(row: torch.Tensor, group_size: int, bits: int) -> CourseFigure:
    """Above: the weights of a row and the levels that each group's grid offers them. Below: the errors, and half a step."""
    row = base.drawable(row).flatten()
    stored = rtn.quantize(row[None], bits, group_size)
    read_back = stored.dequantize()[0]
    ratio = grid.sqnr_db(row, read_back)
    count = len(row) // group_size
    alt = (
        f"{len(row)} weights of a row in {count} group{'s' * (count != 1)} of {group_size}. Above: each weight as a dot on the "
        f"{2**bits} levels of its group, which crowd together where the group's weights are small. Below: the errors inside a "
        f"band of half a step either way. {stored.bits_per_weight:.2f} bits a weight, {ratio:.1f} dB."
    )
    figure, (top, bottom) = base.new(alt, 2, 1, size=(base.WIDTH, 4.6), sharex=True, height_ratios=(2, 1))
    for number in range(count):
        left = number * group_size
        ends = (left - 0.5, left + group_size - 0.5)
        scale, zero = stored.scale[0, number].float(), stored.zero_point[0, number]
        levels = (torch.arange(2**bits) - zero) * scale
        top.hlines(levels.tolist(), *ends, color=base.SKY, linewidth=0.8, label="levels" if number == 0 else None)
        bottom.fill_between(ends, -scale.item() / 2, scale.item() / 2, color=base.SKY, alpha=0.35, linewidth=0)
        if number and count <= 64:
            top.axvline(ends[0], color=base.GREY, linewidth=0.4)
            bottom.axvline(ends[0], color=base.GREY, linewidth=0.4)
    places = torch.arange(len(row))
    top.plot(places, row, "o", color=base.RED, markersize=2.2, label="weights")
    bottom.vlines(places, 0, read_back - row, color=base.BLUE, linewidth=0.8)
    # One scale for every group size, so that pictures can be compared: half a step of the whole row's grid.
    reach = 0.55 * (row.max().clamp(min=0) - row.min().clamp(max=0)).item() / (2**bits - 1)
    bottom.set_ylim(-reach, reach)
    title = f"{bits} bits, groups of {group_size}: {stored.bits_per_weight:.2f} bits a weight, {ratio:.1f} dB"
    base.label(top, title, "", "weight")
    top.set_ylim(None, top.get_ylim()[1] + 0.18 * (top.get_ylim()[1] - top.get_ylim()[0]))
    base.legend(top, ncols=2, loc="upper right")
    base.label(bottom, "Error; the band is half a step either way", "place in the row (in_features)", "error")
    return figure


def bill(parts: Mapping[str, Sequence[float]], names: Sequence[str], what: str = "group size") -> CourseFigure:
    """Bits a weight of each layout in `names`, stacked from `parts` such as codes, scales and zero-points. what: `names` names.

    Raises ValueError for more parts than can be told apart.
    """
    totals = [sum(values) for values in zip(*parts.values(), strict=True)]
    alt = (
        f"Stacked bars of bits a weight, by {what}: " + "; ".join(f"{n} {t:.3f}" for n, t in zip(names, totals, strict=True)) + "."
    )
    figure, axis = base.new(alt, size=(6.4, 3.2))
    bottom = [0.0] * len(names)
    for (part, values), (color, hatch) in base.filled(parts.items()):
        axis.bar(names, values, bottom=bottom, color=color, hatch=hatch, edgecolor="white", width=0.7, label=part)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    for place, total in enumerate(totals):
        axis.annotate(f"{total:.2f}", (place, total), (0, 3), textcoords="offset points", ha="center", fontsize=base.SMALL)
    axis.set_ylim(0, 1.25 * max(totals))
    base.label(axis, "What a weight costs, counted from the tensors", what, "bits a weight")
    base.legend(axis, ncols=3, loc="upper right")
    return figure


def by_layer(panels: Mapping[str, Mapping[str, float]]) -> CourseFigure:
    """One panel for each quantity: its value in every linear, by full name, attention and MLP apart, in the model's order."""
    summaries = []
    for title, values in panels.items():
        means = {half: _mean(values, half) for half in ("attention", "mlp")}
        summaries.append(f"{title}: attention {means['attention']:.3g} on average, MLP {means['mlp']:.3g}")
    figure, axes = base.new(
        "Dots for every linear layer. " + "; ".join(summaries) + ".", 1, len(panels), size=(base.WIDTH, 3.2), squeeze=False
    )
    for axis, (title, values) in zip(axes[0], panels.items(), strict=True):
        for half, color, marker in (("attention", base.BLUE, "o"), ("mlp", base.RED, "s")):
            places = [i for i, name in enumerate(values) if models.role(name) == half]
            picked = [list(values.values())[i] for i in places]
            axis.plot(places, picked, marker, color=color, markersize=4, label="MLP" if half == "mlp" else half)
            axis.axhline(_mean(values, half), color=color, linestyle="-" if half == "attention" else "--", linewidth=1)
        base.label(axis, title.split(" (")[0], "linear layer, first to last", title.partition(" (")[2].rstrip(")") or title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=base.SMALL, frameon=False)
    return figure


def _mean(values: Mapping[str, float], half: str) -> float:
    chosen = [value for name, value in values.items() if models.role(name) == half]
    return sum(chosen) / len(chosen)


def layer_map(values: Mapping[str, float], title: str, unit: str, form: str = "{:.2g}") -> CourseFigure:
    """A value for every linear as a table in color: one column a block, one row a kind of linear."""
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in values))
    count = len(values) // len(kinds)
    table = torch.tensor(list(values.values()), dtype=torch.float64).view(count, len(kinds)).t()
    largest, least = max(values, key=values.get), min(values, key=values.get)
    alt = (
        f"A table in color of {len(kinds)} kinds of linear layers by {count} blocks: {title}. "
        f"Largest in {largest}, {form.format(values[largest])}; least in {least}, {form.format(values[least])}."
    )
    figure, axis = base.new(alt, size=(6.6, 3.4))
    image = axis.imshow(table, cmap=base.AMOUNTS, aspect="auto")
    for y, row in enumerate(table.tolist()):
        for x, value in enumerate(row):
            light = image.norm(value) > 0.55
            axis.text(x, y, form.format(value), ha="center", va="center", fontsize=base.SMALL, color="black" if light else "white")
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_xticks(range(count))
    base.label(axis, title, "block", "")
    scales.color_bar(figure, image, axis, unit)
    return figure


def paired(reference: Evaluation, other: Evaluation, names: tuple[str, str]) -> CourseFigure:
    """Left: the loss of each document under two models. Right: the difference, document by document, on a scale of its own."""
    tokens = base.drawable(reference.tokens)
    used = tokens > 0
    first, second = ((base.drawable(e.loss) / base.drawable(e.tokens))[used] for e in (reference, other))
    difference = second - first
    up = int((difference > 0).sum())
    alt = (
        f"Left: losses of {len(first)} documents, from {first.min():.1f} to {first.max():.1f} nats a token under either model, "
        f"two clouds that cover each other. Right: the difference of each document; {up} of {len(first)} lie above zero."
    )
    figure, (left, right) = base.new(alt, 1, 2, size=(base.WIDTH, 3.3))
    for place, values, color, marker in ((0, first, base.BLUE, "o"), (1, second, base.RED, "s")):
        left.plot([place] * len(values), values, marker, color=color, markersize=4, alpha=0.6)
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        left.plot((0, 1), (a, b), color=base.GREY, linewidth=0.5)
    left.set_xticks((0, 1), names)
    left.set_xlim(-0.4, 1.4)
    base.label(left, "Each document twice", "", "loss (nats a token)")
    right.axhline(0, color=base.GREY, linewidth=0.8)
    right.scatter(tokens[used], difference, color=base.BLUE, s=14)
    right.set_xscale("log")
    scales.plain_numbers(right.xaxis)
    base.label(right, "The same, as differences", "tokens of the document that were scored", "difference in loss (nats a token)")
    return figure


def intervals(rows: Mapping[str, tuple[float, float, float]], title: str) -> CourseFigure:
    """Horizontal bars for (change, low, high), 1 % being 0.01, with the line of no change."""
    alt = title + ": " + "; ".join(f"{name} {100 * low:+.1f} to {100 * high:+.1f} %" for name, (_, low, high) in rows.items()) + "."
    figure, axis = base.new(alt, size=(6.4, 0.9 + 0.45 * len(rows)))
    for place, change in enumerate(rows.values()):
        color, marker, _ = base.SERIES[place % len(base.SERIES)]
        axis.errorbar(100 * change[0], place, xerr=scales.bars([change]), color=color, marker=marker, capsize=4, markersize=5)
    axis.axvline(0, color=base.GREY, linewidth=0.8)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    base.label(axis, title, "change in perplexity (%)", "")
    return figure
