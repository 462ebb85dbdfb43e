"""Keeps the memory that training frees with the process, where glibc would give it back and page it in anew.

A step on a CPU makes and frees the same maps each time. What lies at the end of the heap is given back whenever
enough of it is free, and every page is cleared by the kernel when it is touched again: for small convolutions up to a
tenth of the step. Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_NEVER, _LARGEST = -1, 32 * 2**20


def keep_freed_memory() -> bool:
    """Asks glibc to keep what is freed, for the rest of this process, but for pieces of more than 32 MiB.

    Returns:
        Whether there was a glibc to ask.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
