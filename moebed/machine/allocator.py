"""Keeps the memory of freed CPU tensors in the process, where the C library allows it.

By default glibc gives every large block back to the kernel when it is freed, and the next tensor of that size pays for
fresh, zeroed pages. A training step frees and takes the same sizes over and over.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_KEEP_EVERYTHING = 2**31 - 1
_LARGEST_KEPT = 1 << 25  # bytes; glibc takes no more


def keep_freed_memory() -> bool:
    """Ask glibc to serve large blocks from the heap and not to shrink it; True if it agreed, False elsewhere."""
    return _set(_M_MMAP_MAX, 0) and _set(_M_TRIM_THRESHOLD, _KEEP_EVERYTHING)


def keep_freed_blocks() -> bool:
    """The same for blocks below 32 MB alone, where what is larger must not stay; True if glibc agreed.

    Threads that pass over matrices a megabyte at a time need it most: for fresh pages they wait for one another.
    """
    return _set(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and _set(_M_TRIM_THRESHOLD, _KEEP_EVERYTHING)


def _set(option: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return bool(mallopt and mallopt(option, value))


def release_freed_memory() -> None:
    """Ask glibc to give what is freed back to the kernel, holes between live blocks included; nothing elsewhere."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
