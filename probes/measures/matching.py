"""Which neuron of one expert is which of another? Exact assignment on the cosines of their neurons, fast.

N neurons of an expert, H hidden.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor

from moebed.machine.float32 import exact_products
from moebed.machine.float64 import double
from probes.measures.assignment import assign

_MEMORY_BUDGET = 5 << 30  # bytes, for all pairs under work; half of what is free, where that is less


class Matching(NamedTuple):
    """The neurons of one expert in another.

    Args:
        first: The expert that keeps its order.
        second: The expert whose neurons are reordered.
        permutation: (N,) the neuron of ``second`` that takes each place in the order of ``first``.
        cosine_before: Cosine of the flattened matrices as they are.
        cosine_after: The same after reordering ``second``.
    """

    first: int
    second: int
    permutation: np.ndarray
    cosine_before: float
    cosine_after: float


def match_pairs(
    neurons: Callable[[int], Tensor], pairs: Sequence[tuple[int, int]], count: int, memory: int | None = None
) -> Iterator[Matching]:
    """Match the neurons of pairs of experts, several pairs at a time: one to a core where memory allows.

    Args:
        neurons: Gives an expert's neurons (N, H) in any floating dtype; called from this thread, often.
        pairs: Experts to match.
        count: Number of experts.
        memory: Bytes that the work may take, if there is a limit; one pair is matched at a time in any case.

    Yields:
        One matching a pair, in order. Where a matrix is not finite, its cosines are NaN and nothing is reordered.
    """
    on_device, is_bf16 = [], True
    for index in range(count):
        matrix = neurons(index)
        on_device.append(torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32))
        is_bf16 = is_bf16 and holds_bf16(matrix)
    norms = torch.stack(on_device).cpu()  # (count, N)
    threads = torch.get_num_threads()
    size, width = neurons(0).shape
    workers, dense = _plan(size, width, min(threads, len(pairs)), memory)
    waiting: deque[Future[Matching]] = deque()
    held: tuple[int, Tensor] | None = None
    with exact_products(is_bf16), ThreadPoolExecutor(workers, "match", _use_threads, (threads // workers,)) as pool:
        try:
            for first, second in pairs:
                if held is None or held[0] != first:
                    held = first, neurons(first).float()
                task = (first, second, held[1], neurons(second), norms[first], norms[second], dense)
                waiting.append(pool.submit(_match, *task))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(threads)  # the workers' setting is also the default of later threads


def cosines(a: Tensor, b: Tensor, norm_a: Tensor, norm_b: Tensor) -> Tensor:
    """Cosines of all neurons of ``a`` (N, H) with all of ``b`` (N, H), as (N, N) float32 in main memory.

    Only within ``exact_products`` is this as exact as it is fast.
    """
    product = torch.mm(a, b.float().T).cpu()
    product.mul_(_inverse(norm_b))
    return product.mul_(_inverse(norm_a).unsqueeze(1))  # (N, N)


def _match(
    first: int, second: int, a: Tensor, b: Tensor, norm_a: Tensor, norm_b: Tensor, dense: threading.Semaphore
) -> Matching:
    lengths = float(double(norm_a).norm()) * float(double(norm_b).norm())
    if not np.isfinite(lengths):
        return Matching(first, second, np.arange(len(a)), np.nan, np.nan)
    similarity = cosines(a, b, norm_a, norm_b)
    permutation = assign(similarity, dense)
    similar, weight = similarity.numpy(), double(norm_a).numpy()
    before = np.sum(similar.diagonal() * weight * norm_b.numpy())
    after = np.sum(similar[np.arange(len(a)), permutation] * weight * norm_b.numpy()[permutation])
    scale = 1 / lengths if lengths else 0.0
    return Matching(first, second, permutation, float(before * scale), float(after * scale))


def _inverse(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, 1 / norm, 0.0)


def holds_bf16(matrix: Tensor) -> bool:
    """Whether each value is one of bfloat16, whatever the dtype."""
    return matrix.dtype == torch.bfloat16 or bool((matrix == matrix.bfloat16()).all())


def _plan(size: int, width: int, most: int, memory: int | None = None) -> tuple[int, threading.Semaphore]:
    """How many pairs to work on at a time, at most ``most``, and how many of them may run the dense solver."""
    budget = min(_MEMORY_BUDGET, psutil.virtual_memory().available // 2, *(() if memory is None else (memory,)))
    dense, pair = 8 * size * size, 4 * size * size + 8 * size * width
    workers = max(1, min(most, (budget - dense) // pair))
    return workers, threading.Semaphore(max(1, min(workers, (budget - workers * pair) // max(1, dense))))


def _use_threads(number: int) -> None:
    """Threads of PyTorch's products in this worker; without it each would take all cores."""
    torch.set_num_threads(max(1, number))
