"""Rounding, drawn: number formats, a staircase, codes and errors as heatmaps, clipping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.colors import TwoSlopeNorm

from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure
from labsupport.quant import grid


def float_levels(exponent_bits: int, mantissa_bits: int, top: float) -> torch.Tensor:
    """Every value from 0 to `top` of a binary floating-point format, subnormals included, as float64, ascending."""
    bias = 2 ** (exponent_bits - 1) - 1
    fraction = torch.arange(2**mantissa_bits, dtype=torch.float64) / 2**mantissa_bits
    exponents = torch.arange(1, 2**exponent_bits, dtype=torch.float64) - bias
    normal = ((1 + fraction) * torch.exp2(exponents)[:, None]).flatten()
    levels = torch.cat([fraction * 2.0 ** (1 - bias), normal])
    return levels[levels <= top]


def formats(largest: float = 2.0) -> CourseFigure:
    """Left: the levels of three 8- and 4-bit formats between 0 and `largest`. Right: the gap to the next level, by magnitude."""
    strips = {
        "fp8 e4m3": float_levels(4, 3, largest),
        "int8 grid": torch.arange(128) * largest / 127,
        "int4 grid": torch.arange(8) * largest / 7,
    }
    alt = (
        "Two panels. Left: levels of fp8 e4m3 crowd toward zero, levels of int8 and int4 grids are evenly spaced. "
        "Right: the gap between neighboring levels grows with magnitude in fp16, bf16 and fp8, and is flat for the integer grids."
    )
    colors = {"fp8 e4m3": base.GREEN, "bf16": base.RED, "fp16": base.BLUE, "int4 grid": base.ORANGE, "int8 grid": base.BLACK}
    figure, (left, right) = base.new(alt, 1, 2, size=(base.WIDTH, 3.2))
    for y, (name, levels) in enumerate(reversed(strips.items())):
        left.vlines(levels, y - 0.3, y + 0.3, color=colors[name], linewidth=0.9)
    left.set_yticks(range(3), list(reversed(strips)))
    base.label(left, "Where the levels stand", "value", "")
    for name, e, m, style in (("fp8 e4m3", 4, 3, "-."), ("bf16", 8, 7, "--"), ("fp16", 5, 10, "-")):
        exponent = torch.arange(-10, 2, dtype=torch.float64)
        smallest = 2.0 ** (2 - 2 ** (e - 1) - m)
        gap = torch.exp2(exponent - m).clamp(min=smallest)
        right.step(torch.exp2(exponent), gap, where="post", color=colors[name], linestyle=style, label=name)
    for name, steps, style in (("int4 grid", 7, (0, (7, 2))), ("int8 grid", 127, ":")):
        right.axhline(largest / steps, color=colors[name], linestyle=style, linewidth=1.4, label=name)
    right.set(xscale="log", yscale="log", xlim=(2**-10, largest))
    base.label(right, "Gap to the next level", "magnitude of the value", "gap")
    base.beside(right)
    return figure


def staircase(row: torch.Tensor, scale: float, zero_point: float, bits: int, title: str = "") -> CourseFigure:
    """The function that rounds to a grid, the values of `row` on it, and below, the error it makes."""
    row = base.drawable(row).flatten()
    low = min(row.min().item(), (0 - zero_point) * scale) - scale
    high = max(row.max().item(), (2**bits - 1 - zero_point) * scale) + scale
    scale_t, zero_t = torch.tensor(float(scale)), torch.tensor(float(zero_point))

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return grid.dequantize(grid.quantize(x, scale_t, zero_t, bits), scale_t, zero_t)

    line = torch.linspace(low, high, 1601)
    worst = (rounded(row) - row).abs().max().item()
    alt = (
        f"Above: a staircase of {2**bits} steps of width {scale:.3g} with {len(row)} values marked on it. "
        f"Below: the rounding error, a sawtooth between minus and plus half a step inside the grid and growing outside. "
        f"The largest error of the marked values is {worst:.3g}."
    )
    figure, (top, bottom) = base.new(alt, 2, 1, size=(5.6, 4.4), sharex=True, height_ratios=(2, 1))
    top.plot(line, line, color=base.GREY, linewidth=0.8, label="no rounding")
    top.plot(line, rounded(line), color=base.BLUE, label="reconstruction")
    top.plot(row, rounded(row), "o", color=base.RED, markersize=5, label="the weights")
    top.vlines(row, row, rounded(row), color=base.RED, linewidth=0.8)
    base.label(top, title or f"{bits} bits: {2**bits} levels, {scale:.3g} apart", "", "value read back")
    base.legend(top, loc="upper left")
    bottom.axhspan(-scale / 2, scale / 2, color=base.SKY, alpha=0.3, linewidth=0)
    bottom.plot(line, rounded(line) - line, color=base.BLUE)
    bottom.plot(row, rounded(row) - row, "o", color=base.RED, markersize=5)
    base.label(bottom, "Error; the band is half a step either way", "weight", "error")
    return figure


def heatmaps(weight: torch.Tensor, codes: torch.Tensor, reconstruction: torch.Tensor, bits: int) -> CourseFigure:
    """A corner of a weight, its codes, what is read back, and the error, side by side."""
    weight, codes, reconstruction = base.drawable(weight), base.drawable(codes), base.drawable(reconstruction)
    error = reconstruction - weight
    alt = (
        f"Four heatmaps of {list(weight.shape)} values: the weight, its {bits}-bit codes, the reconstruction, "
        "which looks like the weight in fewer shades, and the error, which looks like noise without structure."
    )
    figure, axes = base.new(alt, 1, 4, size=(base.WIDTH, 3.0))
    reach = weight.abs().max().item()
    panels = (
        ("Weight", weight, base.SIGNED, TwoSlopeNorm(0, -reach, reach)),
        (f"Codes, 0 to {2**bits - 1}", codes, base.AMOUNTS, None),
        ("Read back", reconstruction, base.SIGNED, TwoSlopeNorm(0, -reach, reach)),
        ("Error, its own color scale", error, base.SIGNED, None),
    )
    for axis, (title, values, colors, norm) in zip(axes, panels, strict=True):
        image = axis.imshow(values, cmap=colors, norm=norm, interpolation="nearest", aspect="auto")
        base.label(axis, title, "in_features", "out_features" if title == "Weight" else "")
        axis.set_xticks([]), axis.set_yticks([])
        scales.color_bar(figure, image, axis, location="bottom", shrink=0.9)
    return figure


def error_histogram(errors: Mapping[str, torch.Tensor]) -> CourseFigure:
    """Rounding errors in units of the step, a panel for each case, against the uniform density that step**2/12 assumes."""
    errors = base.all_drawable(errors)
    ratios = {name: 12 * values.pow(2).mean().item() for name, values in errors.items()}
    alt = (
        "Histograms of rounding errors in steps, from minus to plus half, against a flat line. Mean square over step²/12: "
        + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    )
    figure, axes = base.new(alt, 1, len(errors), size=(base.WIDTH, 3.0), sharey=True)
    for axis, (name, values) in zip(axes, errors.items(), strict=True):
        style = {"density": True, "color": base.SKY, "edgecolor": base.BLUE, "linewidth": 0.4}
        axis.hist(values.flatten(), bins=40, range=(-0.5, 0.5), **style)
        axis.set_xticks((-0.5, 0, 0.5))
        axis.axhline(1, color=base.RED, linestyle="--", linewidth=1.2)
        base.label(axis, f"{name}\n{ratios[name]:.2f} x step²/12", "error (steps)", "density" if axis is axes[0] else "")
    axes[0].set_ylim(0, max(1.5, axes[0].get_ylim()[1]))
    axes[0].annotate("uniform", (-0.48, 1.1), color=base.RED, fontsize=base.SMALL)
    return figure


def sqnr(bits: Sequence[int], curves: Mapping[str, Sequence[float]]) -> CourseFigure:
    """Signal-to-quantization-noise ratio against bits, with the line of 6.02 dB a bit through the last point of the first curve."""
    alt = "Lines of signal-to-noise ratio against bits; a dashed line shows 6.02 dB for each bit. " + "; ".join(
        f"{name} goes from {values[0]:.1f} to {values[-1]:.1f} dB" for name, values in curves.items()
    )
    figure, axis = base.new(alt)
    first = next(iter(curves.values()))
    axis.plot(bits, [first[-1] - 6.02 * (bits[-1] - b) for b in bits], color=base.GREY, linestyle="--", label="6.02 dB a bit")
    for (name, values), (color, marker, style) in base.styled(curves.items()):
        axis.plot(bits, values, color=color, marker=marker, linestyle=style, markersize=4, label=name)
    base.label(axis, "What a bit buys depends on the row", "bits", "signal to noise (dB)")
    base.legend(axis)
    return figure


def clip_curve(factors: torch.Tensor, rounding: torch.Tensor, clipping: torch.Tensor, bits: int) -> CourseFigure:
    """Squared error against the clip factor, split into what rounding and what clipping cost. All 1-D, errors in one unit."""
    factors, rounding, clipping = base.drawable(factors), base.drawable(rounding), base.drawable(clipping)
    total = rounding + clipping
    best = int(total.argmin())
    alt = (
        f"Squared error against the clip factor at {bits} bits. Rounding error rises with the factor, clipping error falls, "
        f"their sum is a U with its bottom at {factors[best]:.2f}, {100 * (1 - total[best] / total[-1]):.0f} % below no clipping."
    )
    figure, axis = base.new(alt)
    for (name, values), (color, _, style) in base.styled({"sum": total, "clipping": clipping, "rounding": rounding}.items()):
        axis.plot(factors, values, color=color, linestyle=style, label=name)
    axis.plot(factors[best], total[best], "o", color=base.BLACK, markersize=6)
    axis.annotate(
        f"best {factors[best]:.2f}",
        (factors[best], total[best]),
        (0, 9),
        textcoords="offset points",
        ha="center",
        fontsize=base.SMALL,
    )
    axis.set_ylim(0, float(total[-1]) * 1.6)
    base.label(axis, f"{bits} bits: cutting the ends off pays", "clip factor (1 = no clipping)", "squared error / weight²")
    base.legend(axis)
    return figure
