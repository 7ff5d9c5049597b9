"""GPTQ, drawn: the loss over two weights, errors on their way across columns, and weight errors traded for output errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from labsupport.figures import base, scales
from labsupport.figures.base import CourseFigure

REACH = 1.25  # steps that are drawn around the original


def two_weights(
    weight: torch.Tensor, hessian: torch.Tensor, ends: Mapping[str, torch.Tensor], path: Sequence[torch.Tensor]
) -> CourseFigure:
    """Lines of equal output error over two weights of one row, the points of a grid with step 1, and where each method ends.

    weight: float [2], in steps. hessian: [2, 2]. ends: lattice points by name. path: points from the weight to one of the ends.
    """
    weight, hessian, ends = base.drawable(weight), base.drawable(hessian), base.all_drawable(ends)
    w1, w2 = weight.tolist()
    axis_1, axis_2 = (torch.linspace(w - REACH, w + REACH, 121) for w in (w1, w2))
    e1, e2 = torch.meshgrid(axis_1 - w1, axis_2 - w2, indexing="xy")
    (a, b), (_, c) = hessian.tolist()
    loss = a * e1**2 + 2 * b * e1 * e2 + c * e2**2

    def facts(end: torch.Tensor) -> tuple[float, float]:
        error = end - weight
        return (error @ hessian @ error).item(), error.norm().item()

    summary = "; ".join(
        f"{name} at ({end[0]:g}, {end[1]:g}), {facts(end)[1]:.2f} steps away with error {facts(end)[0]:.3f}"
        for name, end in ends.items()
    )
    figure, axis = base.new(f"Ellipses of equal output error around ({w1:g}, {w2:g}) over a lattice: {summary}.", size=(5.8, 3.3))
    levels = [0.03, 0.12, 0.27, 0.48, 0.75, 1.1]
    axis.contour(axis_1, axis_2, loss, levels=levels, colors=base.GREY, linewidths=0.8)
    whole = [(x, y) for x in range(-3, 4) for y in range(-3, 4) if abs(x - w1) < REACH and abs(y - w2) < REACH]
    axis.plot(*zip(*whole, strict=True), ".", color=base.BLACK, markersize=6, label="what the grid can store")
    axis.plot(w1, w2, "*", color=base.BLACK, markersize=12, label="the original")
    axis.plot(
        *torch.stack([base.drawable(point) for point in path]).T.tolist(),
        color=base.RED,
        linewidth=1.4,
        linestyle="--",
        zorder=1,
        label="GPTQ's way",
    )
    for (name, end), (color, marker, _) in base.styled(ends.items()):
        error, distance = facts(end)
        where = f"{name}: error {error:.3f}, {distance:.2f} away"
        axis.plot(*end.tolist(), marker, color=color, markersize=10, fillstyle="none", markeredgewidth=2, label=where)
    axis.set(xlim=(w1 - REACH, w1 + REACH), ylim=(w2 - REACH, w2 + REACH), aspect="equal")
    base.label(axis, "Equal output error on each ellipse", "first weight (steps)", "second weight (steps)")
    base.beside(axis)
    return figure


def spectrum(energies: Mapping[str, torch.Tensor]) -> CourseFigure:
    """What a weight error of size 1 does to the output, along every direction of H; energies: eigenvalues, ascending, by name."""
    energies = base.all_drawable(energies)
    summary = "; ".join(f"{name} from {e[0]:.1e} to {e[-1]:.1e}" for name, e in energies.items())
    figure, axis = base.new(f"Eigenvalues of Hessians from quietest to loudest direction: {summary}.", size=(6.2, 3.3))
    for (name, e), (color, _, style) in base.styled(energies.items()):
        axis.plot(torch.linspace(0, 100, len(e)), e, color=color, linestyle=style, linewidth=1.6, label=name)
    axis.set_yscale("log")
    axis.grid(alpha=0.25)
    base.label(
        axis, "The same weight error, along other directions", "directions, from quiet to loud (%)", "output error (no unit)"
    )
    base.legend(axis, loc="upper left")
    return figure


def frames(drift: Mapping[int, torch.Tensor]) -> CourseFigure:
    """How far weights are from the originals once so many columns are done; drift: [rows, columns] in steps, by that count."""
    drift = {done: base.drawable(d) for done, d in drift.items()}
    most = max(d.abs().max().item() for d in drift.values())
    still = {done: d[:, done:].abs().max().item() if done < d.shape[1] else 0.0 for done, d in drift.items()}
    summary = "; ".join(f"after {done} columns those to come have moved by up to {far:.2f} steps" for done, far in still.items())
    alt = f"Frames of a weight, colored by the distance from the original: {summary}."
    rows = -(-len(drift) // 2)
    figure, axes = base.new(alt, rows, min(2, len(drift)), (7.0, 0.6 + 2.1 * rows), sharex=True, sharey=True, squeeze=False)
    for number, (axis, (done, d)) in enumerate(zip(axes.flat, drift.items(), strict=False)):
        image = axis.imshow(d, cmap=base.SIGNED_FROM_ZERO, vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
        if done < d.shape[1]:
            axis.axvline(done - 0.5, color=base.BLACK, linewidth=1.5)
        below, left = number + 2 >= len(drift), number % 2 == 0
        base.label(axis, f"{done} of {d.shape[1]} columns done", "column (of in_features)" * below, "row (of out_features)" * left)
    for axis in axes.flat[len(drift) :]:
        axis.remove()
    scales.color_bar(figure, image, axes, "distance from the original (steps)")
    return figure


def trade(layers: Mapping[str, Sequence[tuple[float, float]]]) -> CourseFigure:
    """GPTQ over rounding, a marker for each linear: (weight error, output error), both squared errors as a ratio, by kind."""
    summary = "; ".join(
        f"{kind}: weights {min(x for x, _ in p):.2f} to {max(x for x, _ in p):.2f} times the error, "
        f"outputs {min(y for _, y in p):.2f} to {max(y for _, y in p):.2f} times"
        for kind, p in layers.items()
    )
    figure, axis = base.new(f"Squared errors of GPTQ over those of rounding. {summary}.", size=(6.4, 3.8))
    for (kind, points), (color, marker, _) in base.styled(layers.items()):
        axis.plot(*zip(*points, strict=True), marker, color=color, markersize=6, alpha=0.8, label=kind)
    axis.plot(1, 1, "X", color=base.BLACK, markersize=9, label="rounding")
    axis.axvline(1, color=base.GREY, linewidth=0.8)
    axis.axhline(1, color=base.GREY, linewidth=0.8)
    axis.set_ylim(0)
    axis.grid(alpha=0.25)
    title = "Weights further off, outputs nearer"
    base.label(axis, title, "error of the weights (times that of rounding)", "error of the outputs (times)")
    base.beside(axis)
    return figure


def by_sensitivity(lines: Mapping[str, Sequence[float]]) -> CourseFigure:
    """Root mean square errors in steps, for columns in groups of equal size from the least sensitive to the most; a line each."""
    summary = "; ".join(f"{name} from {v[0]:.2f} to {v[-1]:.2f} steps" for name, v in lines.items())
    figure, axis = base.new(f"Errors from the least sensitive columns to the most: {summary}.", size=(6.4, 3.3))
    for place, ((name, values), (color, marker, style)) in enumerate(base.styled(lines.items())):
        # Smaller and smaller markers: lines that lie on each other can still be told apart.
        size, tenths = 9 - 2 * min(place, 2), range(1, len(values) + 1)
        axis.plot(tenths, values, color=color, marker=marker, linestyle=style, markersize=size, label=name)
    low, high = min(min(values) for values in lines.values()), max(max(values) for values in lines.values())
    axis.set_ylim(low - 0.2 * (high - low) - 0.01, high + 0.35 * (high - low) + 0.01)
    axis.set_xticks(range(1, len(next(iter(lines.values()))) + 1))
    axis.grid(alpha=0.25)
    title = "Are sensitive columns rounded more carefully?"
    base.label(axis, title, "tenth of the columns (10: most sensitive, by the diagonal of H)", "error (steps, root mean square)")
    base.legend(axis, ncols=2, loc="upper center")
    return figure


def run_times(measured: Mapping[str, Mapping[float, float]], limit: float) -> CourseFigure:
    """Minutes against billions of parameters on logarithmic scales, a line for each entry, and a line at `limit` minutes."""
    summary = "; ".join(
        f"{name}: " + ", ".join(f"{billions:.3g} billion in {minutes:.3g} minutes" for billions, minutes in points.items())
        for name, points in measured.items()
    )
    figure, axis = base.new(f"Minutes that GPTQ takes. {summary}.", size=(6.4, 3.6))
    for (name, points), (color, marker, style) in base.styled(measured.items()):
        axis.plot(list(points), list(points.values()), color=color, marker=marker, linestyle=style, markersize=6, label=name)
    axis.axhline(limit, color=base.BLACK, linewidth=1, linestyle=":")
    lowest = min(min(points) for points in measured.values())
    axis.text(lowest, 1.15 * limit, f"{limit:g} minutes", fontsize=base.SMALL)
    axis.set(xscale="log", yscale="log")
    scales.plain_numbers(axis.xaxis)
    scales.plain_numbers(axis.yaxis)
    axis.grid(alpha=0.25)
    base.label(axis, "How long it takes depends on the model", "parameters (billions)", "time (minutes)")
    base.legend(axis, loc="lower right")
    return figure
