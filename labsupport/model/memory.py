"""Memory that is freed and yet not given back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_MMAP_THRESHOLD = -3  # malloc.h of glibc


def return_freed(least: int) -> None:
    """Have glibc give back what is freed, if it has `least` bytes or more. Otherwise it keeps some, a little more each time."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, least)
