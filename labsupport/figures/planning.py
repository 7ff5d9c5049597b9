"""What a model takes on a card: bytes by part against its memory, with the tokens a second that the roofline allows."""

from __future__ import annotations

from collections.abc import Sequence

from labsupport.evidence.planner import PARTS, Plan
from labsupport.figures import base
from labsupport.figures.base import CourseFigure


def bytes_on_card(plans: Sequence[Plan]) -> CourseFigure:
    """A bar for each plan, of one model on one card with one number of users and one context; a line where the card's memory ends.

    Raises ValueError for no plan, or plans of different models, cards, contexts or users.
    """
    if len({(plan.shape.name, plan.card.name, plan.context, plan.users) for plan in plans}) != 1:
        raise ValueError("plans are of several models, cards, contexts or numbers of users, or there is none: wanted one of each")
    first, names = plans[0], [_name(plan) for plan in plans]
    memory = first.card.memory / 1e9
    title = f"{first.shape.name} on {first.card.name}, {first.users} x {first.context:,} tokens"
    figure, axis = base.new("", size=(base.WIDTH, 1.6 + 0.42 * len(plans)))
    reach = 1.02 * max(memory, *(plan.total / 1e9 for plan in plans))
    for place, plan in enumerate(plans):
        start = 0.0
        for (part, size), (_, (color, hatch)) in zip(plan.parts.items(), base.filled(PARTS), strict=True):
            label = part if place == 0 else None
            axis.barh(place, size / 1e9, left=start, color=color, hatch=hatch, edgecolor="white", linewidth=0.3, label=label)
            start += size / 1e9
        said = f"{start:,.1f} GB, {plan.tokens_per_second:,.0f} tokens/s" if plan.fits else f"{start:,.1f} GB, too much"
        place_of = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": base.SMALL}
        axis.annotate(said, (start, place), **place_of).set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    axis.axvline(memory, color=base.RED, linestyle="--", linewidth=1.3, label=f"memory of the card, {memory:,.0f} GB", zorder=0)
    axis.set(xlim=(0, 1.36 * reach), ylim=(len(plans) - 0.4, -0.6), yticks=range(len(plans)))
    axis.set_yticklabels(names)
    base.label(axis, title, "bytes (GB); tokens/s of all users together, at most", "")
    figure.legend(loc="outside lower center", ncols=3, fontsize=base.SMALL, frameon=False)
    figure.alt = f"Stacked bars of bytes. {title}; memory {memory:,.0f} GB. " + "; ".join(map(_said, plans, names)) + "."
    return figure


def _name(plan: Plan) -> str:
    return plan.form.name if plan.cache == "bf16" else f"{plan.form.name}, {plan.cache} cache"


def _said(plan: Plan, name: str) -> str:
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in plan.parts.items())
    speed = f"at most {plan.tokens_per_second:,.0f} tokens a second" if plan.fits else "does not fit"
    return f"{name}: {plan.total / 1e9:.1f} GB ({parts}), {speed}"
