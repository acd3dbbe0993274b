"""Which neuron of one expert is which of another? Exact assignment on the cosines of their neurons, fast.

Three ways to the same optimum, from the cheapest on:

1. each neuron's nearest one is nobody else's: done, no assignment can be better;
2. the likely candidates alone, as a sparse problem, whose dual prices are then checked against *all* cosines; the
   candidates that the check finds missing are added until it finds none, which proves the optimum;
3. scipy's dense solver, where the prices cannot be had.

N neurons of an expert, H hidden, C candidates.
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
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.special import ndtri
from torch import Tensor

from moebed.machine.float32 import exact_products
from moebed.machine.float64 import double

_DENSE_BELOW = 256  # neurons; smaller problems take the dense solver a millisecond
_CANDIDATES = 80  # a neuron, about
_ROUNDS = 12
_BAND_ELEMENTS = 1 << 17  # a band of cosines that stays in the processor's cache
_TOLERANCE = 1e-11
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
    norms, is_bf16 = [], True
    for index in range(count):
        matrix = neurons(index)
        norms.append(torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32).cpu())
        is_bf16 = is_bf16 and holds_bf16(matrix)
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


def assign(similarity: Tensor, dense_turns: threading.Semaphore | None = None) -> np.ndarray:
    """The permutation that maximises the sum of ``similarity[i, permutation[i]]``, exactly.

    Args:
        similarity: (N, N) float32, finite, of the order of 1, as cosines are.
        dense_turns: Held while the dense solver runs, which needs 8 N² bytes.

    Returns:
        (N,) int64.
    """
    size = len(similarity)
    best, nearest = similarity.max(dim=1)
    permutation = nearest.numpy()
    if (np.bincount(permutation, minlength=size) == 1).all():
        return permutation
    if torch.equal(similarity.diagonal(), best):  # nothing is nearer than one's own place: ties
        return np.arange(size)
    found = _assign_sparse(similarity, best) if size >= _DENSE_BELOW else None
    if found is not None:
        return found
    with dense_turns or threading.Semaphore():
        return linear_sum_assignment(np.negative(similarity.numpy(), dtype=np.float64))[1]


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


def _assign_sparse(similarity: Tensor, best: Tensor) -> np.ndarray | None:
    """The optimum by way of few candidates and their prices; None where that does not lead there."""
    size = len(similarity)
    flat = similarity.numpy().reshape(-1)
    edges = _candidates(similarity, best)
    for _ in range(_ROUNDS):
        if edges is None:
            return None
        value = flat[edges].astype(np.float64)
        row, column = edges // size, edges % size
        start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=size))])
        cost = 1 + value.max() - value  # above 0, which the sparse solver takes for no edge
        try:
            permutation = min_weight_full_bipartite_matching(csr_array((cost, column, start), shape=(size, size)))[1]
        except ValueError:  # the candidates leave a neuron without a partner
            return None
        chosen = flat[np.arange(size) * size + permutation].astype(np.float64)
        price = _prices(start, column, value - chosen[row], permutation)
        missing = None if price is None else _missing(similarity, chosen - price[permutation], price)
        if missing is None:
            return None
        if not len(missing):
            return permutation.astype(np.int64)
        edges = np.union1d(edges, missing)
    return None


def _candidates(similarity: Tensor, best: Tensor) -> np.ndarray | None:
    """Flat indices, in order, of about the largest entries of each row: those above a quantile, taken as normal.

    None where ties make them very many.
    """
    size = len(similarity)
    deviation, mean = torch.std_mean(similarity[:, :: max(1, size // 256)], dim=1)
    above = float(ndtri(1 - min(0.5, _CANDIDATES / size)))
    least = torch.minimum(mean + above * deviation, best)
    return _where(similarity, lambda block, rows: block >= least[rows].unsqueeze(1), limit=size * 8 * _CANDIDATES)


def _prices(start: np.ndarray, column: np.ndarray, gain: np.ndarray, permutation: np.ndarray) -> np.ndarray | None:
    """The least prices v ≥ 0 of the columns at which no row gains by another column than its own.

    That is v[j] ≥ gain[i, j] + v[permutation[i]] for each candidate, by relaxing the rows whose own price has risen.

    Args:
        start: (N + 1,) where each row's candidates begin.
        column: (C,) column of each candidate.
        gain: (C,) what a row gains in similarity by that column in place of its own.
        permutation: (N,) each row's own column.

    Returns:
        (N,) float64; None where they rise for ever, which they do if the permutation is not the best.
    """
    size = len(permutation)
    price = np.zeros(size)
    owner = np.argsort(permutation)
    risen = np.arange(size)
    for _ in range(size + 1):
        if not len(risen):
            return price
        many = start[risen + 1] - start[risen]
        edge = np.arange(many.sum()) + np.repeat(start[risen] - np.cumsum(many) + many, many)
        asked = gain[edge] + np.repeat(price[permutation[risen]], many)
        target = column[edge]
        higher = asked > price[target] + _TOLERANCE / 10
        target = target[higher]
        np.maximum.at(price, target, asked[higher])
        risen = owner[np.unique(target)]
    return None


def _missing(similarity: Tensor, profit: np.ndarray, price: np.ndarray) -> np.ndarray | None:
    """Flat indices of all entries that exceed profit (N,) of their row plus price (N,) of their column.

    None of them means that the assignment is optimal among all. A float32 pass with a margin finds the few entries that
    come near; float64 decides. Returns None where very many come near.
    """
    size = len(similarity)
    margin = 1e-6 * (1 + float(price.max()))
    column = torch.from_numpy(price.astype(np.float32))
    row = torch.from_numpy((profit - margin).astype(np.float32)).unsqueeze(1)
    near = _where(similarity, lambda block, rows: block - column > row[rows], limit=size * 4 * _CANDIDATES)
    if near is None:
        return None
    exact = similarity.numpy().reshape(-1)[near].astype(np.float64)
    return near[exact > profit[near // size] + price[near % size] + _TOLERANCE]


def _where(similarity: Tensor, test: Callable[[Tensor, slice], Tensor], limit: float = np.inf) -> np.ndarray | None:
    """Flat indices where a test holds, a band of rows at a time; None once there are more than ``limit``."""
    size = len(similarity)
    step = max(1, _BAND_ELEMENTS // size)
    found, total = [], 0
    for first in range(0, size, step):
        rows = slice(first, first + step)
        hits = np.flatnonzero(test(similarity[rows], rows).numpy()) + first * size
        found.append(hits)
        total += len(hits)
        if total > limit:
            return None
    return np.concatenate(found)


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
