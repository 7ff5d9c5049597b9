"""Every plot of the course: pure functions from data to a Figure, one file a theme."""

from labsupport.figures import compensate, course, curves, grids, groups, levels, outliers, roofline

__all__ = ["compensate", "course", "curves", "grids", "groups", "levels", "outliers", "roofline"]
