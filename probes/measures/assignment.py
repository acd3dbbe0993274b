"""The permutation that maximises a sum of similarities: exact, and fast where the matrix is large.

Three ways to the same optimum, from the cheapest on:

1. each row's nearest column is nobody else's: done, no assignment can be better;
2. the likely candidates alone, as a sparse problem, whose dual prices are then checked against *all* entries; the
   candidates that the check finds missing are added until it finds none, which proves the optimum;
3. scipy's dense solver, where the matrix is small or that does not lead there.

The second is the compiled library's where there is one (``moebed.model.native.assignment``), which goes on from the
optimum over fewer candidates; else scipy's sparse solver and NumPy's.

Rows that lean in one direction all want the same columns, and others are nobody's candidate. So both 2 and 3 are given
similarities less prices of the columns that balance what these are asked for; the optimum is the same.

Of several permutations that are equally good, which one is found is left open; the same matrix gives the same one.

N rows and columns, C candidates, r rows of a band.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching, min_weight_full_bipartite_matching
from torch import Tensor

from moebed.model.native import assignment as native_assignment

_DENSE_BELOW = 256  # rows; smaller problems take the dense solver a millisecond
_CANDIDATES = 80  # a row, about
_ROUNDS = 16
_LEFT_OVER = 0.01  # of the rows; where the candidates leave more of them, the sparse solver may take for ever
_NONE = np.empty(0, np.int64)
_BAND_ELEMENTS = 1 << 17  # a band of similarities that stays in the processor's cache
_SAMPLED_ROWS = (256, 1024)  # that prices are balanced over, at least and at most; between them a fifth
_EVERY = 8  # columns, of which one tells from where on an entry is among a row's largest
_BALANCING_STEPS = 30
_BALANCED = 0.3  # in the logarithm of what a column is asked for
_TOLERANCE = 1e-11


def assign(similarity: Tensor, dense_turns: threading.Semaphore | None = None) -> np.ndarray:
    """The permutation that maximises the sum of ``similarity[i, permutation[i]]``, exactly.

    Args:
        similarity: (N, N) float32, finite, of the order of 1, as cosines are.
        dense_turns: Held while the dense solver runs, which needs 8 N² bytes.

    Returns:
        (N,) int64.

    Raises:
        ValueError: Where the matrix is not square, or a row's largest entry is not finite.
        RuntimeError: The prices that are to prove an optimum do not, which is a fault of this module.
    """
    size = len(similarity)
    if tuple(similarity.shape) != (size, size):
        raise ValueError(f"similarities of {' × '.join(map(str, similarity.shape))} are not square")
    best, nearest = similarity.max(dim=1)
    if not bool(best.isfinite().all()):
        raise ValueError("similarities that are not finite have no best assignment")
    permutation = nearest.numpy()
    if (np.bincount(permutation, minlength=size) == 1).all():
        return permutation
    if torch.equal(similarity.diagonal(), best):  # nothing is nearer than one's own place: ties
        return np.arange(size)
    price = np.zeros(size)
    if size >= _DENSE_BELOW:
        price, edges = _likely(similarity)
        found = _assign_sparse(similarity, price, edges)
        if found is not None:
            return found
    with dense_turns or threading.Semaphore():
        return linear_sum_assignment(np.subtract(price, similarity.numpy(), dtype=np.float64))[1]


def _likely(similarity: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Prices (N,) of the columns, and flat indices of candidates at these; no prices where each column has some."""
    size = len(similarity)
    price = np.zeros(size)
    edges = _candidates(similarity, price)
    if np.bincount(edges % size, minlength=size).min() >= _CANDIDATES // 4:
        return price, edges
    price = _balancing_prices(similarity)
    return price, _candidates(similarity, price)


def _assign_sparse(similarity: Tensor, price: np.ndarray, edges: np.ndarray) -> np.ndarray | None:
    """The optimum by way of few candidates and their prices; None where that does not lead there."""
    solve = _solve_compiled if native_assignment.fits(similarity) else _solve_by_scipy
    found = _Optimum(np.full(len(price), -1), np.zeros(len(price)), price)
    for _ in range(_ROUNDS):
        solved = solve(similarity, edges, found)
        if solved is None:
            return None
        found, further = solved
        if not len(further):
            further = _missing(similarity, found.profit, found.price)
            if not len(further):
                return found.permutation
        edges = _merged(edges, further)
    return None


class _Optimum(NamedTuple):
    """The best permutation among some candidates, and why.

    Args:
        permutation: (N,) each row's column, or -1.
        profit: (N,) of the rows, in float64: the similarity to their column, less its price.
        price: (N,) of the columns, in float64, at which no row gains by another candidate.
    """

    permutation: np.ndarray
    profit: np.ndarray
    price: np.ndarray


def _solve_compiled(similarity: Tensor, edges: np.ndarray, known: _Optimum) -> tuple[_Optimum, np.ndarray] | None:
    """The optimum over candidates, begun at that over fewer, and the candidates that a full permutation lacks.

    None where these are many.
    """
    found = _Optimum(*(array.copy() for array in known))
    arrays = found.price, found.profit, found.permutation
    left = native_assignment.improve(similarity, edges, *arrays, _most_left(len(similarity)))
    if left == 0:
        return found, _NONE
    further = _left_over(found.permutation) if left > 0 else None
    return None if further is None else (found, further)


def _solve_by_scipy(similarity: Tensor, edges: np.ndarray, known: _Optimum) -> tuple[_Optimum, np.ndarray] | None:
    """``_solve_compiled`` without a compiler: only prices are taken from what is known."""
    size, (_, profit, price) = len(similarity), known
    flat, every = similarity.numpy().reshape(-1), np.arange(size)
    row, column = edges // size, edges % size
    start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=size))])
    value = flat[edges].astype(np.float64) - profit[row] - price[column]  # same optimum, and found sooner
    cost = 1 + value.max() - value  # above 0, which the sparse solver takes for no edge
    graph = csr_array((cost, column, start), shape=(size, size))
    try:
        permutation = min_weight_full_bipartite_matching(graph)[1].astype(np.int64)
    except ValueError:  # the candidates leave a row without a partner
        further = _left_over(maximum_bipartite_matching(graph, perm_type="column"))
        return None if further is None else (known, further)
    chosen = flat[every * size + permutation].astype(np.float64) - profit - price[permutation]
    risen = _prices(start, column, value - chosen[row], permutation)
    if risen is None:
        return None
    return _Optimum(permutation, profit + chosen - risen[permutation], price + risen), _NONE


def _merged(edges: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Both in order. They have none in common: scipy's solvers write beyond their memory where an edge is there twice.

    Raises:
        RuntimeError: What a proof misses is a candidate already: prices or proof are wrong.
    """
    place = np.searchsorted(edges, more)
    known = np.count_nonzero(edges.take(place, mode="clip") == more)
    if known:
        raise RuntimeError(f"an assignment's prices do not prove it: {known} of its own candidates exceed them")
    return np.insert(edges, place, more)


def _balancing_prices(similarity: Tensor) -> np.ndarray:
    """Prices of the columns at which rows ask for all of them about equally often.

    A row asks for each column with the softmax of its similarity less the column's price, over half the deviation of a
    row: that of about as many as are candidates. What stands out, as a partner does, counts no more than other large
    entries, since it says nothing of the rest. In turn (Sinkhorn and Knopp's iteration), on some of the rows.

    Returns:
        (N,) float64 that float32 holds.
    """
    size = len(similarity)
    least, most = _SAMPLED_ROWS
    rows = min(size, most, max(least, size // 5))
    sample = similarity[torch.linspace(0, size - 1, rows).long()]
    deviation, mean = torch.std_mean(sample, dim=1, keepdim=True)
    temperature = 0.5 * float(deviation.median())
    price = torch.zeros(size)
    if temperature == 0:
        return price.numpy().astype(np.float64)
    sample = torch.minimum(sample, mean + 3 * deviation).div_(temperature)
    for _ in range(_BALANCING_STEPS):
        asked = sample - price
        asked = asked.sub_(asked.amax(dim=1, keepdim=True)).exp_()
        share = (1 / asked.sum(dim=1)) @ asked * (size / len(sample))  # 1 where all are asked for equally
        step = share.clamp_min(1e-30).log()
        if float(step.abs().quantile(0.99)) < _BALANCED:
            break
        price += step
    return price.mul_(temperature).numpy().astype(np.float64)


def _candidates(similarity: Tensor, price: np.ndarray) -> np.ndarray:
    """Flat indices, in order, of about the largest entries of each row, less the prices of the columns."""
    size = len(similarity)
    rank = max(1, min(_CANDIDATES, size) // _EVERY)
    column = torch.from_numpy(price.astype(np.float32))
    if native_assignment.fits(similarity):
        reached = native_assignment.reached(similarity, column, None, 2 * _CANDIDATES * size, rank, _EVERY)
        if reached is not None:
            return reached
    found = []
    for rows in _bands(size):
        gain = similarity[rows] - column
        least = gain[:, ::_EVERY].topk(rank, dim=1).values[:, -1:]
        found.append(_reached(gain, least) + rows.start * size)
    return np.concatenate(found)


def _left_over(permutation: np.ndarray) -> np.ndarray | None:
    """Flat indices, in order, of new edges between those without a partner in a largest matching: each has one then.

    None where they are many.
    """
    size = len(permutation)
    rows, columns = np.flatnonzero(permutation < 0), np.setdiff1d(np.arange(size), permutation)
    if len(rows) > _most_left(size):
        return None
    return (rows[:, None] * size + columns).reshape(-1)


def _most_left(size: int) -> int:
    return 1 + int(_LEFT_OVER * size)


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
        risen = owner[np.bincount(target, minlength=size) > 0]
    return None


def _missing(similarity: Tensor, profit: np.ndarray, price: np.ndarray) -> np.ndarray:
    """Flat indices, in order, of entries that exceed profit (N,) of their row plus price (N,) of their column.

    None of them means that the assignment is optimal among all. Once they are as many as candidates, those that exceed
    most in each row are enough to go on with. A float32 pass with a margin finds the few entries that come near;
    float64 decides.
    """
    size = len(similarity)
    margin = 1e-6 * (1 + float(np.abs(price).max() + np.abs(profit).max()))
    column = torch.from_numpy(price.astype(np.float32))
    least = torch.from_numpy((profit - margin).astype(np.float32))

    def beyond(near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        excess = similarity.numpy().reshape(-1)[near].astype(np.float64) - profit[near // size] - price[near % size]
        kept = excess > _TOLERANCE
        return near[kept], excess[kept]

    if native_assignment.fits(similarity):
        near = native_assignment.reached(similarity, column, least, size * _CANDIDATES)
        if near is not None:
            return beyond(near)[0]
    found, total = [], 0
    for rows in _bands(size):
        reach = (similarity[rows] - column >= least[rows].unsqueeze(1)).numpy()
        near, excess = beyond(np.flatnonzero(reach) + rows.start * size)
        if total + len(near) > size * _CANDIDATES:
            near = _foremost(near // size, near, excess, _CANDIDATES // 8)
        found.append(near)
        total += len(near)
    return np.concatenate(found)


def _foremost(row: np.ndarray, entry: np.ndarray, excess: np.ndarray, most: int) -> np.ndarray:
    """Of entries in order, the ``most`` of each row that exceed most, in order."""
    if len(entry) <= most:
        return entry
    order = np.lexsort((-excess, row))
    rank = np.arange(len(row)) - np.searchsorted(row, row)  # rows ascend, in any order of the entries of one
    return np.sort(entry[order[rank < most]])


def _bands(size: int) -> Iterator[slice]:
    step = max(1, _BAND_ELEMENTS // size)
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


def _reached(gain: Tensor, least: Tensor) -> np.ndarray:
    """Flat indices, in order, of entries of a band (r, N) that reach their row's least (r, 1); of many ties, some."""
    hits = np.flatnonzero((gain >= least).numpy())
    most = _CANDIDATES * len(gain)
    if len(hits) <= 2 * most:
        return hits
    tied = (gain == least).numpy().reshape(-1)[hits]
    kept = ~tied
    kept[np.flatnonzero(tied)[:: 1 + np.count_nonzero(tied) // most]] = True  # other columns in each row
    return hits[kept]
