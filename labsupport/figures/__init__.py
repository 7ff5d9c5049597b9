"""Every plot of the course: pure functions from data to a Figure, one file a theme."""

from labsupport.figures import curves, grids, roofline

__all__ = ["curves", "grids", "roofline"]
