"""Stands in for the module that Colab's kernels have: what asks "is this Colab?" is told yes. The course uses nothing of it."""

from google.colab import output  # noqa: F401
