"""Every plot of the course: pure functions from data to a Figure, one file a theme."""

from labsupport.figures import (
    cache,
    calibration,
    compensate,
    course,
    curves,
    grids,
    groups,
    kernels,
    layouts,
    levels,
    listening,
    merging,
    outliers,
    planning,
    roofline,
    saliency,
    shootout,
    straight_through,
)
from labsupport.figures import tables as tables  # no figures

__all__ = [
    "cache",
    "calibration",
    "compensate",
    "course",
    "curves",
    "grids",
    "groups",
    "kernels",
    "layouts",
    "levels",
    "listening",
    "merging",
    "outliers",
    "planning",
    "roofline",
    "saliency",
    "shootout",
    "straight_through",
]
