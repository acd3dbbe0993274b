"""Ranks within rows, and their correlation.

``scipy.stats.rankdata`` gives the ranks that ties share, but whole ones only of a second sort, and sorting is what the
probes of routing spend their time on; so both come of one here. And it ties what is the same bit for bit, which on
another device is something else.

T rows (tokens, say), E entries of each (experts, say).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

# Norms of what an RMSNorm whose weights are all alike gives out differ by what its epsilon takes from small tokens.
# Ranked, they are mostly rounding, which is another on another device; and so small a difference changes nothing after.
ONE_NORM = 1e-3
EQUAL = 1e-5  # values that differ by less of the largest are equal in float32, however they were summed


class Ranks(NamedTuple):
    """Rank of each entry in its row, 0 = smallest: ties by index, (T, E) int64, and tied entries sharing their mean."""

    whole: np.ndarray
    shared: np.ndarray

    def top(self) -> np.ndarray:
        """Share of the largest that each entry is, (T, E): 1 of one alone, half of each of two that are equal."""
        most = self.shared.max(axis=1, keepdims=True)
        return (self.shared == most) / (2 * (self.shared.shape[1] - 1 - most) + 1)


def ranks(values: np.ndarray, within: float = 0.0) -> Ranks:
    """Rank each row of (T, E), with one sort.

    Args:
        values: (T, E).
        within: Neighbours in order that differ by no more are tied: what rounding leaves of differences that are none,
            such as ``EQUAL`` of losses in nats. For few entries, since many lie as close as that by chance.
    """
    order = values.argsort(axis=1)  # its order among equals is anyone's guess
    first = np.arange(len(values))[:, None] * values.shape[1]  # of each row, in the flat array
    ordered = values.ravel()[order + first]
    equal = ordered[:, :-1] >= (ordered[:, 1:] - within if within else ordered[:, 1:])
    tied = equal.any(axis=1)
    place = np.arange(values.shape[1])
    whole = np.empty_like(order)
    if not tied.any():
        whole.ravel()[order + first] = place
        return Ranks(whole, whole)
    new = np.ones((int(tied.sum()), values.shape[1]), dtype=bool)  # where a run of equals begins
    new[:, 1:] = ~equal[tied]
    number = np.empty_like(order[tied])
    np.put_along_axis(number, order[tied], new.cumsum(axis=1), axis=1)
    order[tied] = number.argsort(axis=1, kind="stable")
    whole.ravel()[order + first] = place
    last = np.ones(new.shape, dtype=bool)
    last[:, :-1] = new[:, 1:]
    begin = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    end = np.minimum.accumulate(np.where(last, place, values.shape[1])[:, ::-1], axis=1)[:, ::-1]
    mean = np.empty(new.shape)
    np.put_along_axis(mean, order[tied], (begin + end) / 2, axis=1)
    shared = whole.astype(np.float64)
    shared[tied] = mean
    return Ranks(whole, shared)


def settled(values: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """Values (T, ...), in which tokens that are one and the same have the same, where they differ by rounding alone.

    A device that sums a row of a matrix otherwise than another row tells such tokens apart.

    Args:
        values: (T, ...).
        alike: (T,) the token that each is alike, itself or one before it (``ProbeText.first_with_past``).
    """
    other = values[alike]
    return np.where(np.abs(values - other) <= ONE_NORM * np.abs(other), other, values)


def joined(values: np.ndarray) -> np.ndarray:
    """Values (T, E) of experts, in which those that are equal but for rounding at every token are the same.

    An expert and its copy, as upcycling makes them, are told apart by nothing else.
    """
    found, few = values, slice(None, None, 1 + len(values) // 16)
    for one, other in pairwise(values[few].sum(axis=0).argsort(kind="stable")):  # copies are neighbours
        if all(_equal(found[rows, one], values[rows, other]) for rows in (few, slice(None))):
            found = values.copy() if found is values else found
            found[:, other] = found[:, one]
    return found


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((np.abs(one - other) <= EQUAL * np.abs(one)).all())


def first_of_largest(values: np.ndarray) -> np.ndarray:
    """The first entry of each row (T, E) that no other is larger than but by rounding: (T,) int64."""
    largest = values.max(axis=1, keepdims=True)
    room = EQUAL * np.where(np.isfinite(largest), np.abs(largest), 0)
    return (values >= largest - room).argmax(axis=1)


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
