"""Keeps the memory of freed CPU tensors in the process, where the C library allows it.

By default glibc gives every large block back to the kernel when it is freed, and the next tensor of that size pays for
fresh, zeroed pages. A training step frees and takes the same sizes over and over.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_KEEP_EVERYTHING = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask glibc to serve large blocks from the heap and not to shrink it; True if it agreed, False elsewhere."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _KEEP_EVERYTHING))


def release_freed_memory() -> None:
    """Ask glibc to give what is freed back to the kernel, holes between live blocks included; nothing elsewhere."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
