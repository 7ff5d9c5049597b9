"""Bytes against operations: what models weigh, rooflines, and what batches do to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from labsupport.evidence.roofline import Device
from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure

PARTS = ("codes", "scales and zero-points", "kept in 16 bits")


def model_sizes(models: Mapping[str, Mapping[int, Sequence[float]]], cards: Sequence[float] = (16, 24, 80)) -> CourseFigure:
    """Bars of stored bytes, one panel a model, one bar a width.

    models: by name and by bits, the GB of codes, of scales and zero-points, and of what stays in 16 bits.
    cards: memory of graphics cards in GB; a line is drawn for each that falls inside a panel.
    """
    totals = {name: {bits: sum(parts) for bits, parts in widths.items()} for name, widths in models.items()}
    summary = "; ".join(
        f"{name}: " + ", ".join(f"{total:.3g} GB in {bits} bits" for bits, total in t.items()) for name, t in totals.items()
    )
    figure, axes = base.new(f"Bars of stored bytes. {summary}.", 1, len(models), size=(base.WIDTH, 3.0), squeeze=False)
    for axis, (name, widths) in zip(axes[0], models.items(), strict=True):
        reach = 1.22 * max(totals[name].values())
        for place, parts in enumerate(widths.values()):
            start = 0.0
            for (label, (color, hatch)), size in zip(base.filled(PARTS), parts, strict=True):
                axis.barh(place, size, left=start, color=color, hatch=hatch, edgecolor="white", linewidth=0.3, label=label)
                start += size
            total = axis.text(start + reach * 0.02, place, f"{start:.1f}", va="center", fontsize=base.SMALL)
            total.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        for card in cards:
            if 0.15 * reach < card < reach:
                axis.axvline(card, color=base.RED, linestyle="--", linewidth=1, label="memory of a graphics card, GB", zorder=0)
                axis.text(card, -0.72, f"{card:g}", color=base.RED, fontsize=base.SMALL, ha="center", va="bottom")
        axis.set(xlim=(0, reach), ylim=(len(widths) - 0.5, -0.75), yticks=range(len(widths)))
        axis.set_yticklabels([f"{bits} bits" for bits in widths])
        base.label(axis, name, "GB of weights", "")
        axis.set_title(name, fontsize=base.FONT + 1, loc="left", pad=12)
    shown = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown), fontsize=base.SMALL, frameon=False)
    return figure


def _of_device(i: int) -> tuple[str, str, str]:
    """Color, marker and line of the i-th device; the first, this machine, is black."""
    return base.SERIES[i - 1] if i else (base.BLACK, "o", "-")


def rooflines(devices: Sequence[Device], marks: Mapping[str, float], first: str = "measured here") -> CourseFigure:
    """Operations a second against operations a byte, one roof a device; `marks` are intensities of workloads by name.

    The first device is drawn heavier: it is this machine, as `first` says in the legend.
    """
    ridges = ", ".join(f"{d.name} {d.ridge:.3g}" for d in devices)
    where = ", ".join(f"{name} {x:.3g}" for name, x in marks.items())
    alt = f"Rooflines on logarithmic axes: each rises with operations a byte, then is flat. Ridges: {ridges}. Marked: {where}."
    figure, axis = base.new(alt, size=(7.2, 4.3))
    low, high = 0.25, 4096.0
    for i, device in enumerate(devices):
        color, marker, style = _of_device(i)
        x = sorted([low, device.ridge, high])
        y = [min(device.rate, v * device.bandwidth) / 1e12 for v in x]
        name = f"{device.name}, {first}" if i == 0 else device.name
        axis.plot(x, y, color=color, linestyle=style, linewidth=2.4 if i == 0 else 1.4, label=f"{name}: ridge {device.ridge:.0f}")
        axis.plot(device.ridge, device.rate / 1e12, marker=marker, color=color, markersize=5)
    axis.set(xscale="log", yscale="log", xlim=(low, high))
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, top * 300)
    for name, x in marks.items():
        axis.axvline(x, color=base.GREY, linewidth=0.9, linestyle=":")
        axis.text(x, top * 250, name, rotation=90, fontsize=base.SMALL, ha="right", va="top", color=base.DARK_GREY)
    base.label(axis, "At most: the lower of the two limits", "operations a byte", "10$^{12}$ operations a second")
    base.beside(axis)
    return figure


def intensity_against_batch(
    batches: Sequence[int], curves: Mapping[str, Sequence[float]], ridges: Mapping[str, float], title: str
) -> CourseFigure:
    """Operations a byte against the number of tokens multiplied together, with the ridges of some machines as levels."""
    ends = ", ".join(f"{name} from {y[0]:.3g} to {y[-1]:.3g}" for name, y in curves.items())
    levels = ", ".join(f"{name} {y:.3g}" for name, y in ridges.items())
    alt = f"Operations a byte against tokens in a batch, rising in proportion and then bending over: {ends}. Ridges: {levels}."
    figure, axis = base.new(alt, size=(6.2, 3.6))
    for (name, y), (color, marker, style) in base.styled(curves.items()):
        axis.plot(batches, y, color=color, marker=marker, linestyle=style, markersize=4, label=name)
    for name, y in ridges.items():
        axis.axhline(y, color=base.GREY, linewidth=1)
        axis.text(batches[-1], y * 1.08, f"ridge of {name}", fontsize=base.SMALL, ha="right", color=base.DARK_GREY)
    scales.powers_of_two(axis, batches)
    axis.set_yscale("log")
    base.label(axis, title, "tokens in one product", "operations a byte")
    base.legend(axis, loc="upper left")
    return figure


def throughput(
    batches: Sequence[int], measured: Mapping[str, Sequence[float]], limits: Mapping[str, Sequence[float]], title: str
) -> CourseFigure:
    """Tokens a second against the batch: measured points, and for each the roofline's limit in its color, with hollow markers."""
    summary = "; ".join(
        f"{name}: {y[0]:.3g} tokens a second at batch {batches[0]} and {y[-1]:.3g} at {batches[-1]}, "
        f"limits {limits[name][0]:.3g} and {limits[name][-1]:.3g}"
        for name, y in measured.items()
    )
    figure, axis = base.new(f"Tokens a second against batch, on logarithmic axes. {summary}.", size=(6.2, 3.8))
    for (name, y), (color, marker, _) in base.styled(measured.items()):
        hollow = {"marker": marker, "markersize": 5, "markerfacecolor": "white"}
        axis.plot(batches, limits[name], color=color, linestyle="--", linewidth=1.1, label=f"{name}, limit", **hollow)
        axis.plot(batches, y, color=color, marker=marker, linestyle="-", markersize=5, label=f"{name}, measured")
    scales.powers_of_two(axis, batches)
    axis.set_yscale("log")
    axis.grid(alpha=0.25)
    base.label(axis, title, "batch (sequences decoded together)", "tokens a second, all sequences")
    base.legend(axis)
    return figure


def gain_against_batch(batches: Sequence[int], gains: Mapping[str, Sequence[float]], title: str) -> CourseFigure:
    """How many times faster a step gets, against the batch, one line a machine; the first is this one."""
    summary = "; ".join(f"{name}: {y[0]:.2f} at batch {batches[0]}, {y[-1]:.2f} at {batches[-1]}" for name, y in gains.items())
    figure, axis = base.new(f"Predicted gain of 4-bit weights against batch, falling to 1. {summary}.", size=(7.0, 3.6))
    for i, (name, y) in enumerate(gains.items()):
        color, marker, style = _of_device(i)
        axis.plot(batches, y, color=color, marker=marker, linestyle=style, markersize=4, label=name)
    axis.axhline(1, color=base.GREY, linewidth=1)
    scales.powers_of_two(axis, batches)
    axis.set_ylim(0, 4.2)
    base.label(axis, title, "batch (sequences decoded together)", "times faster than 16 bits")
    base.beside(axis)
    return figure
