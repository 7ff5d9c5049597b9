"""Controls. Thin: a control calls a pure function of `figures` and shows the picture that comes back.

Only what ipywidgets 7.7 and 8 have in common, and of that only what a screen reader can name: a menu, a field for a number and a
button are elements of HTML with a label, while the handle of a slider has no name and an Image widget no alternative text. So a
picture is an HTML widget. It is not an Output, which would need display machinery: it is the same in JupyterLab, in Colab and in a
test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets
import torch

from labsupport.evidence import planner as plans
from labsupport.evidence import tables
from labsupport.figures import base, groups, planning
from labsupport.figures import levels as drawn

GROUP_SIZES = (8, 16, 32, 64, 128, 256)
CONTEXTS = tuple(2**power for power in range(9, 18))
STEP = 0.01  # of an arrow key, or a click on an arrow, in a field for a level
USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def group_size(row: torch.Tensor, bits: int = 4, start: int = 32, sizes: Sequence[int] = GROUP_SIZES) -> ipywidgets.VBox:
    """A menu of group sizes above the picture of `row` [in_features] at the size that is chosen.

    Sizes that do not divide the row are left out. `start` is the size that is chosen at first.
    Raises ValueError where `start` is not among the sizes that fit.
    """
    row = base.drawable(row).flatten()
    fitting = [size for size in sizes if len(row) % size == 0]
    if start not in fitting:
        raise ValueError(f"start is {start}, wanted one of the sizes that divide a row of {len(row)}: {fitting}")
    menu = ipywidgets.Dropdown(options=fitting, value=start, description="group size", style={"description_width": "initial"})
    picture = ipywidgets.HTML(groups.row_in_groups(row, start, bits).html())

    def redraw(change) -> None:
        picture.value = groups.row_in_groups(row, change["new"], bits).html()

    menu.observe(redraw, names="value")
    return ipywidgets.VBox([menu, picture])


def levels(values: torch.Tensor, presets: Mapping[str, torch.Tensor]) -> ipywidgets.VBox:
    """A field for each level above the picture of `values` (from -1 to 1) with the levels as they stand; a button for each preset.

    presets: codebooks of one length by name, in the order of their buttons; the first is what stands in the fields at first.
    Raises ValueError where there is none, or where their lengths differ.
    """
    values = base.drawable(values).flatten()
    books = {name: [_shortest(level) for level in base.drawable(book).sort().values] for name, book in presets.items()}
    if len({len(book) for book in books.values()}) != 1:
        raise ValueError(
            f"presets hold {[len(book) for book in books.values()]} levels, wanted at least one preset, all of one length"
        )
    start = next(iter(books))
    style = {"min": -1.1, "max": 1.1, "step": STEP, "layout": {"width": "165px"}, "style": {"description_width": "52px"}}
    fields = [
        ipywidgets.BoundedFloatText(value=level, description=f"level {code}", **style) for code, level in enumerate(books[start])
    ]
    buttons = [ipywidgets.Button(description=name) for name in books]
    picture = ipywidgets.HTML()
    state = {"name": start, "moving": False}

    def redraw() -> None:
        standing = torch.tensor([field.value for field in fields])
        picture.value = drawn.on_values(values, standing, state["name"]).html()

    def moved(change) -> None:
        if not state["moving"]:
            state["name"] = "your levels"
            redraw()

    def chosen(button) -> None:
        state.update(name=button.description, moving=True)
        for field, level in zip(fields, books[button.description], strict=True):
            field.value = level
        state["moving"] = False
        redraw()

    for field in fields:
        field.observe(moved, names="value")
    for button in buttons:
        button.on_click(chosen)
    redraw()
    rows = ipywidgets.Box(fields, layout={"flex_flow": "row wrap", "max_width": "700px"})  # four in a row where there is room
    return ipywidgets.VBox([ipywidgets.HBox(buttons), rows, picture])


def _shortest(level: torch.Tensor) -> float:
    """The same float32 in as few digits as it takes: a field shows all that a number has."""
    return float(str(level.numpy()))


def planner(
    model: str = "Llama-3.1-8B", card: str = "RTX 4090", format: str = "w4a16-g128", context: int = 8192, users: int = 4
) -> ipywidgets.VBox:
    """Choices of model, card, context, users and format above the picture of their bytes, beside those in 16 bits.

    What is given is where the choices stand at first. Raises ValueError for what is not among them.
    """
    choices = {
        "model": (tuple(tables.architectures()), model), "card": (tuple(tables.cards()), card), "context": (CONTEXTS, context),
        "users": (USERS, users), "format": (tuple(tables.formats()), format), "cache": (tuple(plans.CACHES), "bf16"),
    }  # fmt: skip
    for name, (options, start) in choices.items():
        if start not in options:
            raise ValueError(f"{name} is {start!r}, wanted one of {', '.join(map(str, options))}")
    controls = {
        name: ipywidgets.Dropdown(options=options, value=start, description=name) for name, (options, start) in choices.items()
    }
    picture = ipywidgets.HTML()

    def redraw(change=None) -> None:
        shape = tables.architectures()[controls["model"].value].shape
        at = tables.cards()[controls["card"].value], controls["context"].value, controls["users"].value
        picture.value = planning.bytes_on_card(compared(shape, *at, controls["format"].value, controls["cache"].value)).html()

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    rows = [ipywidgets.HBox(list(controls.values())[i : i + 3]) for i in (0, 3)]
    return ipywidgets.VBox([*rows, picture])


def compared(shape: plans.Shape, card: tables.Card, context: int, users: int, format: str, cache: str = "bf16") -> list[plans.Plan]:
    """The plans that the widget draws: 16 bits, and the format and the cache that were chosen."""
    return [plans.plan(shape, card, "bf16", context, users), plans.plan(shape, card, format, context, users, cache)]
