"""How sure is a number that was measured on a few texts? Bootstrap over sequences, and shuffled labels.

Tokens of one text are anything but independent, so a sequence is the unit that is drawn. Seeded: the same arrays give
the same intervals. R draws, B sequences.
"""

from __future__ import annotations

import math

import numpy as np

DRAWS = 1000
SEED = 20240618


def resample_within(group: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """Draw each group's members anew, with replacement, as many as it has.

    Args:
        group: (B,) the group of each sequence.
        draws: R.
        seed: Of the random numbers.

    Returns:
        (R, B) float32, how often each sequence was drawn; statistics of sums over sequences are a product with it.
    """
    random = np.random.default_rng(seed)
    times = np.zeros((draws, len(group)), np.float32)
    for number in np.unique(group):
        members = np.flatnonzero(group == number)
        picked = random.integers(len(members), size=(draws, len(members)))
        cell = picked + np.arange(draws)[:, None] * len(members)
        times[:, members] = np.bincount(cell.ravel(), minlength=cell.size).reshape(draws, len(members))
    return times


def shuffle_labels(labels: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """(R, B) labels in random order: what the groups would be if they meant nothing."""
    return np.random.default_rng(seed + 1).permuted(np.tile(labels.astype(np.int16), (draws, 1)), axis=1)


def interval(values: np.ndarray) -> np.ndarray:
    """The central 95 % of draws (R, ...): (2, ...), lower and upper end."""
    return np.quantile(values, (0.025, 0.975), axis=0)


def p_value(observed: float | np.ndarray, null: np.ndarray) -> np.ndarray:
    """How often draws (R, ...) under the null are at least as large as what was observed (...), itself counted."""
    # Sums in another order may differ in the last bits from what was observed.
    return (1 + (null >= np.asarray(observed) * (1 - 1e-6)).sum(axis=0)) / (1 + len(null))


def smallest_p(labels: np.ndarray) -> float:
    """The smallest p that shuffling these labels can give: 1 / number of different groupings of the sequences."""
    sizes = np.unique(labels, return_counts=True)[1]
    equal = np.unique(sizes, return_counts=True)[1]  # groups of one size may change places
    ways = math.lgamma(len(labels) + 1) - sum(math.lgamma(n + 1) for n in (*sizes, *equal))
    return math.exp(-min(ways, 700.0))
