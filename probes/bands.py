"""Sums over all coordinates of several matrices laid side by side, a few coordinates at a time on each core.

What passes over numbers again and again is fast only while they lie in a core's cache.

M matrices, n coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from moebed.float64 import double

_CACHED_ELEMENTS = 1 << 18  # of a piece: a megabyte in float32
_HALF = (torch.bfloat16, torch.float16)


def all_half(blocks: Iterable[Tensor]) -> bool:
    """Whether all are of 16 bits, whose products float32 holds exactly, or to their last digit."""
    return all(block.dtype in _HALF for block in blocks)


def sum_over_bands(bands: Iterable[Sequence[Tensor]], product: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum, in float64 and main memory, of what ``product`` makes of the coordinates of matrices, piece by piece.

    Args:
        bands: The same rows of all matrices at a time, on one device.
        product: Is given (M, n), which it may write over: in float32 where all are of 16 bits, else in float64. Called
            from several threads, each of which has one core.
    """
    threads, total = torch.get_num_threads(), torch.zeros((), dtype=torch.float64)

    def one(rows: Sequence[Tensor]) -> Tensor:
        piece = torch.stack([part.reshape(-1) for part in rows])
        return product(piece.float() if all_half(rows) else double(piece)).cpu().double()

    with ThreadPoolExecutor(threads, "bands", torch.set_num_threads, (1,)) as pool:
        try:
            for blocks in bands:
                step = max(1, _CACHED_ELEMENTS // (len(blocks) * blocks[0].shape[1]))
                for part in pool.map(one, zip(*(block.split(step) for block in blocks), strict=True)):
                    total = total + part
        finally:
            torch.set_num_threads(threads)  # the workers' setting is also the default of later threads
    return total
