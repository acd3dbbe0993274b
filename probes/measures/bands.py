"""Work on one core each: on matrices, and on a few coordinates at a time of several laid side by side.

What passes over numbers again and again is fast only while they lie in a core's cache.

M matrices, n coordinates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moebed.machine.float64 import double

_CACHED_ELEMENTS = 1 << 18  # of a piece: a megabyte in float32
_HALF = (torch.bfloat16, torch.float16)


def all_half(blocks: Iterable[Tensor]) -> bool:
    """Whether all are of 16 bits, whose products float32 holds exactly, or to their last digit."""
    return all(block.dtype in _HALF for block in blocks)


def _begin_worker(device: int | None) -> None:
    torch.set_num_threads(1)
    if device is not None:
        torch.cuda.set_device(device)  # a thread of its own has no context, and cuBLAS warns that it makes one


@cache
def _load_linear_algebra(device: int) -> None:
    """PyTorch loads CUDA's decompositions when one is first asked for, and fails where several threads ask at once."""
    torch.linalg.eigh(torch.eye(2, device=f"cuda:{device}"))


@contextmanager
def one_core_each(name: str) -> Iterator[Callable[..., Iterator[Any]]]:
    """Gives a ``map`` that works on as many things at a time as PyTorch uses cores, each with one.

    It takes the things from their iterable in the caller's thread, few of them ahead.
    """
    threads = torch.get_num_threads()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    if device is not None:
        _load_linear_algebra(device)
    with ThreadPoolExecutor(threads, name, _begin_worker, (device,)) as pool:
        waiting: deque[Future[Any]] = deque()

        def each(work: Callable[[Any], Any], things: Iterable[Any]) -> Iterator[Any]:
            for thing in things:
                waiting.append(pool.submit(work, thing))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield each
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(threads)  # the workers' setting is also the default of later threads


def sum_over_bands(bands: Iterable[Sequence[Tensor]], product: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum, in float64 and main memory, of what ``product`` makes of the coordinates of matrices, piece by piece.

    Args:
        bands: The same rows of all matrices at a time, on one device.
        product: Is given (M, n), which it may write over: in float32 where all are of 16 bits, else in float64. Called
            from several threads, each of which has one core.
    """
    total = torch.zeros((), dtype=torch.float64)

    def pieces() -> Iterator[Sequence[Tensor]]:
        for blocks in bands:
            step = max(1, _CACHED_ELEMENTS // (len(blocks) * blocks[0].shape[1]))
            yield from zip(*(block.split(step) for block in blocks), strict=True)

    def one(rows: Sequence[Tensor]) -> Tensor:
        piece = torch.stack([part.reshape(-1) for part in rows])
        return product(piece.float() if all_half(rows) else double(piece)).cpu().double()

    with one_core_each("bands") as each:
        for part in each(one, pieces()):
            total = total + part
    return total
