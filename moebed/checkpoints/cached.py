"""Parts of files that the kernel holds in memory already: mapped as they are, they need no copy.

Only Linux tells whether it does; elsewhere, and where a part is not cached, files are read as usual.
"""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor

_SAMPLED = 1 << 20  # bytes from one look to the next
_SMALLEST = 1 << 20  # bytes; what is smaller is copied sooner than it is mapped


def map_cached(descriptor: int, offset: int, size: int) -> Tensor | None:
    """Bytes (size,) of an open file from ``offset`` on, in memory that it shares; None where they would be read.

    Writing to them leaves the file as it is.
    """
    if size < _SMALLEST or not hasattr(os, "preadv") or not hasattr(os, "RWF_NOWAIT"):
        return None
    before = offset % mmap.ALLOCATIONGRANULARITY
    try:
        if os.fstat(descriptor).st_size < offset + size or not _is_cached(descriptor, offset, size):
            return None
        memory = mmap.mmap(descriptor, before + size, access=mmap.ACCESS_COPY, offset=offset - before)
    except OSError:  # a file system that does not tell, or has no mapping: reading says what is wrong, if anything is
        return None
    if offset % torch.float32.itemsize:  # numbers would lie across words
        return None
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=before)


def _is_cached(descriptor: int, offset: int, size: int) -> bool:
    """Whether a byte of each MiB, and the last one, can be had without waiting for the disk."""
    byte = bytearray(1)
    for place in (*range(offset, offset + size, _SAMPLED), offset + size - 1):
        try:
            if os.preadv(descriptor, [byte], place, os.RWF_NOWAIT) != 1:
                return False
        except BlockingIOError:
            return False
    return True
