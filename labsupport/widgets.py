"""Controls. Thin: a control calls a pure function of `figures` and shows the picture that comes back.

Only what ipywidgets 7.7 and 8 have in common. A picture is an Image widget and not an Output: it needs no display machinery, so
it is the same in JupyterLab, in Colab and in a test.
"""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
import torch

from labsupport.figures import groups

GROUP_SIZES = (8, 16, 32, 64, 128, 256)


def group_size(row: torch.Tensor, bits: int = 4, start: int = 32, sizes: Sequence[int] = GROUP_SIZES) -> ipywidgets.VBox:
    """A slider over group sizes above the picture of `row` [in_features] at that size.

    Sizes that do not divide the row are left out. `start` is where the slider stands at first.
    Raises ValueError where `start` is not among the sizes that fit.
    """
    row = row.detach().cpu().float().flatten()
    fitting = [size for size in sizes if len(row) % size == 0]
    if start not in fitting:
        raise ValueError(f"start is {start}, wanted one of the sizes that divide a row of {len(row)}: {fitting}")
    slider = ipywidgets.SelectionSlider(
        options=fitting, value=start, description="group size", continuous_update=False, style={"description_width": "initial"}
    )
    picture = ipywidgets.Image(format="png", value=groups.row_in_groups(row, start, bits).png())

    def redraw(change) -> None:
        picture.value = groups.row_in_groups(row, change["new"], bits).png()

    slider.observe(redraw, names="value")
    return ipywidgets.VBox([slider, picture])
