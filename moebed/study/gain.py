"""The share of what routing can gain at all: 0 where a router does as well as a random one, 1 as the oracle.

For losses L of a seed, (L_random − L) / (L_random − L_oracle), a ratio of means over seeds. An oracle need not be a
bound: a share above 1 says that a router found something better than the domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moebed.study.statistics import TAIL, t_interval

ROLES = ("random", "oracle")  # of arms, in a study's ``gain``


@dataclass(frozen=True)
class GainShare:
    """An arm's share of the gain.

    Args:
        pairs: Seeds that are finished in the arm and in both references.
        share: The ratio of mean differences; None where there is none to be had.
        interval: 95 %; None likewise, and with one seed.
        why: Why there is none, in words.
    """

    pairs: int
    share: float | None = None
    interval: tuple[float, float] | None = None
    why: str = ""


def gain_share(arm: Mapping[int, float], random: Mapping[int, float], oracle: Mapping[int, float]) -> GainShare:
    """The share of an arm, from losses by seed.

    The interval is Fieller's (1954), of the ratio of two paired means: like a t-interval it holds 95 % with few seeds,
    where a percentile bootstrap of four holds 78 to 81 (``tests/study/simulate_gain.py``). It has an end exactly where
    the t-interval of the denominator excludes 0; elsewhere there is nothing to take a share of, and none is given.
    """
    seeds = [seed for seed in arm if seed in random and seed in oracle]
    if not seeds:
        return GainShare(0, why="no seed is finished in this arm and in both references")
    gained = np.array([random[seed] - arm[seed] for seed in seeds])
    whole = np.array([random[seed] - oracle[seed] for seed in seeds])
    if len(seeds) < 2:
        share = float(gained[0] / whole[0]) if whole[0] > 0 else None
        return GainShare(1, share, why="one seed has no interval")
    low, high = t_interval(whole)
    if low <= 0:
        where = "below" if high < 0 else "not told from"
        said = f"the oracle's gain {whole.mean():+.4f} [{low:+.4f}, {high:+.4f}] is {where} 0: nothing to share"
        return GainShare(len(seeds), why=said)
    return GainShare(len(seeds), float(gained.mean() / whole.mean()), fieller(gained, whole))


def fieller(over: Sequence[float] | np.ndarray, under: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % interval of mean(over) / mean(under) of n ≥ 2 pairs, where the interval of mean(under) excludes 0."""
    from scipy import stats

    n = len(over)
    squared = float(stats.t.ppf(TAIL, n - 1)) ** 2
    spread = np.cov(over, under) / n
    a, b = float(np.mean(over)), float(np.mean(under))
    square = b * b - squared * float(spread[1, 1])
    middle = a * b - squared * float(spread[0, 1])
    last = a * a - squared * float(spread[0, 0])
    reach = math.sqrt(max(0.0, middle * middle - square * last))
    return (middle - reach) / square, (middle + reach) / square
