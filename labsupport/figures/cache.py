"""The cache, drawn: its bytes, its keys and values, which tokens wait, what bits cost, and whether two costs add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.colors import LogNorm

from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure
from labsupport.figures.scales import Change

GIB = 2**30


def weights_and_cache(tokens: Sequence[int], caches: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> CourseFigure:
    """Bytes of caches against tokens a sequence, a line for each kind of attention, and of weights, one or two level lines."""
    if len(weights) > 2:
        raise ValueError(f"weights holds {len(weights)} levels, wanted at most 2: more lines cannot be told apart")
    summary = "; ".join(f"{name} {values[-1] / GIB:,.0f} GiB at {tokens[-1]} tokens" for name, values in caches.items())
    levels = ", ".join(f"{name} {value / GIB:.3g} GiB" for name, value in weights.items())
    figure, axis = base.new(f"Bytes of a cache, rising in proportion to tokens: {summary}. Level lines: {levels}.", size=(7.4, 3.8))
    for (name, values), (color, marker, style) in base.styled(caches.items()):
        axis.plot(tokens, [v / GIB for v in values], color=color, marker=marker, linestyle=style, markersize=5, label=name)
    for (name, value), style in zip(weights.items(), (":", "--"), strict=False):
        axis.axhline(value / GIB, color=base.GREY, linestyle=style, linewidth=1.3, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    scales.plain_numbers(axis.xaxis)
    scales.plain_numbers(axis.yaxis)
    axis.tick_params(axis="x", labelrotation=30)
    axis.grid(alpha=0.25)
    base.label(axis, "A batch of 32, 16 bits a number", "tokens of each sequence", "memory (GiB)")
    base.beside(axis)
    return figure


def maps(panels: Mapping[str, torch.Tensor], unit: str) -> CourseFigure:
    """Magnitudes as colors, one panel each: tokens downward, channels to the right. float [tokens, channels] by title."""
    magnitudes = {title: base.drawable(values).abs() for title, values in panels.items()}
    largest = max(values.max().item() for values in magnitudes.values())
    norm = LogNorm(vmin=largest / 300, vmax=largest)
    summaries = []
    figure, axes = base.new("", 1, len(panels), size=(base.WIDTH, 3.6), squeeze=False, sharey=True)
    for axis, (title, values) in zip(axes[0], magnitudes.items(), strict=True):
        loud = values.mean(0)
        image = axis.imshow(values.clamp(min=largest / 300), cmap=base.AMOUNTS, norm=norm, aspect="auto", interpolation="nearest")
        base.label(axis, title, "channel (no unit)", "place in the text (tokens)" if axis is axes[0][0] else "")
        summaries.append(
            f"{title}: the loudest channel is {(loud.max() / loud.median().clamp(min=1e-9)).item():.1f} times the median one"
        )
    scales.color_bar(figure, image, list(axes[0]), unit)
    figure.alt = f"Heat maps, {unit}, tokens by channels. " + "; ".join(summaries) + "."
    return figure


def who_waits(stored: Mapping[str, Sequence[int]]) -> CourseFigure:
    """How many tokens are still in 16 bits as they come one by one. stored: quantized tokens after 0, 1, ... by name."""
    summaries, count = [], len(next(iter(stored.values())))
    figure, axis = base.new("", size=(7.0, 3.2))
    for (name, values), (color, _, style) in base.styled(stored.items()):
        waiting = [tokens - quantized for tokens, quantized in enumerate(values)]
        axis.plot(range(count), waiting, color=color, linestyle=style, linewidth=1.5, label=name)
        summaries.append(f"{name}: at most {max(waiting)}, {waiting[-1]} after the last")
    base.label(axis, "Who waits", "tokens in the cache", "of them in 16 bits (tokens)")
    axis.set_ylim(-3, 1.3 * max(t - q for values in stored.values() for t, q in enumerate(values)))
    base.legend(axis, loc="upper left", ncols=2)
    figure.alt = f"Tokens in 16 bits while {count - 1} tokens come. " + "; ".join(summaries) + "."
    return figure


def by_bits(panels: Mapping[str, Mapping[str, Mapping[int, Change]]], live: tuple[str, int, float] | None = None) -> CourseFigure:
    """Rise in perplexity against bits, a line for each way of grouping, a panel for each title.

    panels[title][way][bits] = (change, low, high). live: (title, bits, change) just measured.
    """
    summaries = []
    figure, axes = base.new("", 1, len(panels), size=(base.WIDTH, 3.8), squeeze=False, sharey=True)
    for axis, (title, ways) in zip(axes[0], panels.items(), strict=True):
        for place, ((way, found), (color, marker, style)) in enumerate(base.styled(ways.items())):
            bits = sorted(found, reverse=True)
            y = [100 * found[b][0] for b in bits]
            bars = scales.bars([found[b] for b in bits])
            x = [i + 0.06 * (place - (len(ways) - 1) / 2) for i in range(len(bits))]
            axis.errorbar(x, y, bars, color=color, marker=marker, linestyle=style, markersize=5, capsize=2, label=way)
            summaries.append(f"{title}, {way}: " + ", ".join(f"{v:+.2f} % at {b} bits" for v, b in zip(y, bits, strict=True)))
        if live is not None and live[0] == title:
            axis.plot(bits.index(live[1]), 100 * live[2], "*", color=base.BLACK, markersize=12, zorder=5, label="measured just now")
        axis.set_xticks(range(len(bits)), [f"{b} bits" for b in bits])
        base.label(axis, title, "", "rise in perplexity (%)" if axis is axes[0][0] else "")
    top = max(100 * high for ways in panels.values() for found in ways.values() for *_, high in found.values())
    for axis in axes[0]:
        scales.percent(axis, 1)
    axes[0][0].set_ylim(-0.4, 4 * top)
    base.legend(axes[0][0], loc="upper left")
    figure.alt = "Rise in perplexity against bits. " + "; ".join(summaries) + "."
    return figure


def against_size(rows: Mapping[str, tuple[float, Change]], title: str) -> CourseFigure:
    """Rise in perplexity of whole caches against what a number of them takes. rows[name] = (bits a number, (change, low, high))."""
    summary = "; ".join(f"{name} {bits:.2f} bits and {100 * change:+.2f} %" for name, (bits, (change, *_)) in rows.items())
    figure, axis = base.new(f"{title}. Bits a number, and rise in perplexity: {summary}.", size=(7.0, 3.6))
    for (name, (bits, change)), (color, marker, _) in base.styled(rows.items()):
        axis.errorbar(
            bits, 100 * change[0], scales.bars([change]), color=color, marker=marker, markersize=7, capsize=3, linestyle="none",
            label=name,
        )  # fmt: skip
    scales.percent(axis, 1)
    axis.set_ylim(-0.2, 1.3 * max(100 * high for _, (*_, high) in rows.values()))
    axis.set_xlim(2, 10.5)
    axis.grid(alpha=0.25)
    base.label(axis, title, "bits a number of the cache, all that is stored", "rise in perplexity (%)")
    base.beside(axis)
    return figure


def by_position(edges: Sequence[int], series: Mapping[str, Sequence[Change]]) -> CourseFigure:
    """Rise in perplexity by place in the window, with intervals, one line each: entry i lies between edges[i] and edges[i + 1]."""
    summary = "; ".join(f"{name} from {100 * f[0][0]:+.2f} to {100 * f[-1][0]:+.2f} %" for name, f in series.items())
    figure, axis = base.new(f"Rise in perplexity by tokens before, first bin and last: {summary}.", size=(7.0, 3.4))
    width = edges[1] - edges[0]
    for place, ((name, found), (color, marker, style)) in enumerate(base.styled(series.items())):
        x = [edge + width * (0.5 + 0.08 * (place - (len(series) - 1) / 2)) for edge in edges[:-1]]
        y = [100 * c for c, *_ in found]
        axis.errorbar(x, y, scales.bars(found), color=color, marker=marker, linestyle=style, markersize=5, capsize=2, label=name)
    axis.axhline(0, color=base.GREY, linewidth=0.8)
    axis.set_xticks(edges)
    axis.grid(axis="y", alpha=0.25)
    base.label(axis, "Does a longer context suffer more?", "context (tokens before the one predicted)", "rise in perplexity (%)")
    base.legend(axis, loc="upper left", ncols=2)
    axis.set_ylim(None, 1.35 * max(100 * high for found in series.values() for *_, high in found))
    return figure


def factorial(losses: Mapping[str, Mapping[str, float]], extra: Mapping[str, Change]) -> CourseFigure:
    """Above: extra loss of every pairing, a line for each kind of weights; parallel lines add up. Below: what is left over.

    losses[weights][cache]: nats a token more than without either. extra["weights; cache"]: nats a token beyond the sum, and the
    interval, in the color of the weights.
    """
    caches = list(next(iter(losses.values())))
    summary = "; ".join(
        f"{name} weights: " + ", ".join(f"{1000 * row[c]:.1f} with {c}" for c in caches) for name, row in losses.items()
    )
    beyond = "; ".join(f"{name} {1000 * low:+.1f} to {1000 * high:+.1f}" for name, (_, low, high) in extra.items())
    alt = f"Above, extra loss in thousandths of a nat a token: {summary}. Below, beyond the sum: {beyond}."
    figure, (top, bottom) = base.new(alt, 2, 1, size=(7.0, 3.9 + 0.27 * len(extra)), height_ratios=(3, 0.8 + 0.27 * len(extra)))
    for (name, row), (color, marker, style) in base.styled(losses.items()):
        y = [1000 * row[c] for c in caches]
        top.plot(range(len(caches)), y, color=color, marker=marker, linestyle=style, markersize=5, label=name)
    top.set_xticks(range(len(caches)), caches)
    top.set_ylim(0, 1.1 * max(1000 * v for row in losses.values() for v in row.values()))
    top.grid(axis="y", alpha=0.25)
    base.label(top, "Weights and cache together", "cache (bits)", "extra loss (1/1000 nats a token)")
    base.beside(top, title="weights")
    styles = dict(base.styled(losses))
    for place, (name, change) in enumerate(extra.items()):
        color, marker, _ = styles[name.split("; ")[0]]
        bars = scales.bars([change], unit=1000)
        bottom.errorbar(1000 * change[0], place, xerr=bars, color=color, marker=marker, capsize=4, markersize=5)
    bottom.axvline(0, color=base.GREY, linewidth=0.8)
    bottom.set_yticks(range(len(extra)), list(extra))
    bottom.set_ylim(len(extra) - 0.5, -0.5)
    base.label(bottom, "Beyond the sum (weights; cache)", "loss of both - sum of both alone (1/1000 nats a token)", "")
    return figure
