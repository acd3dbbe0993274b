"""Ranks within rows, and their correlation.

``scipy.stats.rankdata`` gives the ranks that ties share, bit for bit, but whole ones only of a second sort, and sorting
is what the probes of routing spend their time on; so both come of one here.

T rows (tokens, say), E entries of each (experts, say).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Ranks(NamedTuple):
    """Rank of each entry in its row, 0 = smallest: ties by index, (T, E) int64, and tied entries sharing their mean."""

    whole: np.ndarray
    shared: np.ndarray


def ranks(values: np.ndarray) -> Ranks:
    """Rank each row of (T, E), with one sort."""
    order = values.argsort(axis=1)  # its order among equals is anyone's guess
    first = np.arange(len(values))[:, None] * values.shape[1]  # of each row, in the flat array
    ordered = values.ravel()[order + first]
    tied = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    order[tied] = values[tied].argsort(axis=1, kind="stable")
    place = np.broadcast_to(np.arange(values.shape[1]), order.shape)
    whole = np.empty_like(order)
    whole.ravel()[order + first] = place
    if not tied.any():
        return Ranks(whole, whole)
    some, place = ordered[tied], place[tied]
    new = np.ones(some.shape, dtype=bool)  # where a run of equal values begins
    new[:, 1:] = some[:, 1:] != some[:, :-1]
    last = np.ones(some.shape, dtype=bool)
    last[:, :-1] = new[:, 1:]
    begin = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    end = np.minimum.accumulate(np.where(last, place, values.shape[1])[:, ::-1], axis=1)[:, ::-1]
    mean = np.empty(some.shape)
    np.put_along_axis(mean, order[tied], (begin + end) / 2, axis=1)
    shared = whole.astype(np.float64)
    shared[tied] = mean
    return Ranks(whole, shared)


EQUAL = 1e-5  # values that differ by less of the largest are equal in float32, however they were summed
# Norms of what an RMSNorm whose weights are all alike gives out differ by what its epsilon takes from small tokens.
# Ranked, they are mostly rounding, which is another on another device; and so small a difference changes nothing after.
ONE_NORM = 1e-3


def rankable(values: np.ndarray, apart: float = EQUAL) -> np.ndarray:
    """Whether the entries of each row of (T, E) differ by more than this share of the largest: (T,) bool."""
    largest, least = values.max(axis=1), values.min(axis=1)
    return largest - least > apart * np.maximum(np.abs(largest), np.abs(least))


def correlation(a: Ranks, b: Ranks) -> np.ndarray:
    """Pearson's r of shared ranks (T, E), row by row: (T,) float64; 0 where a row is all tied."""
    middle = (a.shared.shape[1] - 1) / 2
    x, y = a.shared - middle, b.shared - middle
    product, xx, yy = (np.einsum("te,te->t", one, other) for one, other in ((x, y), (x, x), (y, y)))
    size = np.sqrt(xx * yy)
    return np.divide(product, size, out=np.zeros_like(product), where=size > 0)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rho of each row of a and b (T, E): (T,) float64; 0 where a row is all tied."""
    return torch.from_numpy(correlation(ranks(a.cpu().numpy()), ranks(b.cpu().numpy())))
