"""The C library's memory.

Every training step allocates the activations anew and frees them. glibc gives large blocks back to the system at once,
and the next step waits until the system has filled as many pages with zeros: half of the time of a small convolutional
network (measured: docs/performance.md). Freed memory is kept here instead, up to ``KEPT_BYTES`` of a process.
"""

import ctypes
import os
from functools import cache

KEPT_BYTES = 2**30
"""Freed memory that stays with the process."""

LARGEST_BYTES = 2**25
"""Larger blocks are mapped and given back one by one; glibc allows no more."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SET_OUTSIDE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


@cache
def keep_freed_memory() -> bool:
    """Let this process keep what it frees, once; return whether it does.

    Nothing happens where the C library is not glibc, or where the environment says how its memory is to be kept.
    """
    environment = os.environ
    if any(name in environment for name in _SET_OUTSIDE) or "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)) and bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_BYTES))
