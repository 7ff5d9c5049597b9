"""Stored layouts, drawn: which bits of a word belong to which code, and how far codes are from their zero-points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from matplotlib.axes import Axes

from labsupport.figures import base
from labsupport.figures.base import CourseFigure

BITS = 32
TINTS = (base.PALE_YELLOW, base.PALE_SKY)


def words(rows: Mapping[str, Sequence[int]], title: str, what: str = "code") -> CourseFigure:
    """Words of 32 bits, one under the other, the lowest bit at the left; neighbors that hold one code are one box with its number.

    rows: for each word, by its name, the code that each of its 32 bits belongs to. Raises ValueError for another number of bits.
    """
    summaries = []
    for name, owners in rows.items():
        if len(owners) != BITS:
            raise ValueError(f"{name} has {len(owners)} bits, wanted {BITS}")
        summaries.append(f"{name}: {' '.join(str(owner) for owner, _ in groupby(owners))}")
    alt = f"Words of 32 bits as rows of boxes, from the lowest bit; which {what} each box holds. " + "; ".join(summaries) + "."
    figure, axis = base.new(alt, size=(base.WIDTH, 1.1 + 0.42 * len(rows)))
    for place, owners in enumerate(rows.values()):
        _boxes(axis, place, owners)
    for edge in range(8, BITS, 8):
        axis.axvline(edge, color=base.GREY, linestyle=":", linewidth=1, zorder=3)
    axis.set_xlim(0, BITS)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_xticks(range(0, BITS + 1, 4))
    axis.spines[["left", "bottom"]].set_visible(False)
    base.label(axis, title, "place in the word (bits, 0: the lowest)", "")
    return figure


def _boxes(axis: Axes, place: int, owners: Sequence[int]) -> None:
    start = 0
    for owner, run in groupby(owners):
        width = len(list(run))
        axis.barh(place, width, left=start, height=0.8, color=TINTS[owner % 2], edgecolor="white", linewidth=1.2)
        axis.text(start + width / 2, place, str(owner), ha="center", va="center", fontsize=base.FONT if width > 2 else base.SMALL)
        start += width


def offsets(samples: Mapping[str, torch.Tensor], title: str, reach: float = 8.0) -> CourseFigure:
    """How far the mean code of a group lies from its zero-point: an outline for each reading, all over one scale.

    samples: by the name of a reading, differences in codes, any shape. Beyond `reach` they count at the ends.
    """
    samples = base.all_drawable(samples)
    summaries = [f"{name} has mean {x.mean().item():+.2f}, spread {x.std().item():.2f}" for name, x in samples.items()]
    alt = f"Outlines of histograms of mean code less zero-point, from {-reach:g} to {reach:g}. " + "; ".join(summaries) + "."
    figure, axis = base.new(alt, size=(7.0, 3.3))
    for (name, values), (color, _, style) in base.styled(samples.items()):
        counts, edges = torch.histogram(values.flatten().clamp(-reach, reach), bins=64, range=(-reach, reach))
        share = 100 * counts / counts.sum()
        axis.stairs(share.tolist(), edges.tolist(), color=color, linestyle=style, linewidth=1.5, label=name)
    axis.axvline(0, color=base.GREY, linewidth=0.8)
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
    base.label(axis, title, "mean code of a group less its zero-point (steps)", "of all groups (%)")
    base.legend(axis, loc="upper left")
    return figure


def besides_codes(parts: Mapping[str, Sequence[float]], names: Sequence[str]) -> CourseFigure:
    """Bits a weight that are stored besides the codes, a bar for each name, from parts in the order given."""
    totals = [sum(shares) for shares in zip(*parts.values(), strict=True)]
    summary = "; ".join(
        f"{name} {total:.3f}: " + ", ".join(f"{part} {shares[i]:.3f}" for part, shares in parts.items() if shares[i])
        for i, (name, total) in enumerate(zip(names, totals, strict=True))
    )
    figure, axis = base.new(f"Stacked bars, bits a weight besides the codes. {summary}.", size=(7.4, 1.4 + 0.36 * len(names)))
    left = [0.0] * len(names)
    for (part, shares), (color, hatch) in base.filled(parts.items()):
        axis.barh(names, shares, left=left, height=0.6, color=color, hatch=hatch, edgecolor="white", label=part)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for place, total in enumerate(totals):
        axis.text(total, place, f" {total:.3f}", va="center", fontsize=base.SMALL)
    axis.set_xlim(0, 1.15 * max(totals))
    axis.invert_yaxis()
    base.label(axis, "What is stored besides four bits a code", "bits a weight", "")
    figure.legend(loc="outside lower center", ncols=len(parts), fontsize=base.SMALL, frameon=False)
    return figure
