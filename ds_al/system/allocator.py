"""Tuning of glibc's allocator: freed memory is kept for reuse instead of being returned to the system.

A training step on a CPU allocates and frees the same tensors each time. By default glibc returns free memory at the end
of the heap to the kernel, which clears every page when it is touched again: for small convolutions this takes up to a
tenth of the step. Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_NEVER, _LARGEST = -1, 32 * 2**20


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the rest of this process, except blocks of more than 32 MiB.

    Returns:
        Whether the process uses glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
