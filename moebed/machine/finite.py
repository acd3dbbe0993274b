"""Whether numbers are all finite, at the rate of memory and on the caller's core alone.

A sum tells as well, but PyTorch's takes all cores, which wait for each other where one is busy: it passes over matrices
of 6 MB at 1 GB/s then, where a core by itself reads 5.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CACHED_BYTES = 1 << 19
# As integers: signed and unsigned ones of the same width, and the bits of +Inf, the least of all that are not finite.
_BITS = {
    torch.bfloat16: (torch.int16, np.uint16, 0x7F80),
    torch.float16: (torch.int16, np.uint16, 0x7C00),
    torch.float32: (torch.int32, np.uint32, 0x7F800000),
    torch.float64: (torch.int64, np.uint64, 0x7FF0000000000000),
}


def all_finite(values: Tensor) -> bool:
    """Whether no number of a tensor is NaN or Inf; of the types that checkpoints have, on any device.

    Finite numbers lie below +Inf as signed integers where they are positive, below -Inf as unsigned ones where they are
    negative, so that two maxima tell. NumPy takes each on one core, and both find a piece in its cache.
    """
    if values.device.type != "cpu":
        return bool(values.isfinite().all())
    signed, unsigned, infinity = _BITS[values.dtype]
    numbers = values.detach().view(signed).numpy().reshape(-1)
    minus_infinity = infinity | 1 << 8 * numbers.itemsize - 1
    step = _CACHED_BYTES // numbers.itemsize
    pieces = (numbers[first : first + step] for first in range(0, numbers.size, step))
    return all(piece.max() < infinity and piece.view(unsigned).max() < minus_infinity for piece in pieces)
