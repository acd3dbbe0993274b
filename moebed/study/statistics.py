"""Paired differences over seeds: interval, p-value, and the smallest difference that could have been seen.

n pairs, usually 3 to 12; a pair is two runs of one seed, so of one data order and one draw of the initial weights.

Everything follows from Student's t of the paired differences: the interval, the call (the interval excludes 0), p
(below .05 exactly where it does), and what could have been seen. Intervals of another kind beside them would contradict
them in some studies. Differences of means of many tokens are near enough to normal; the tests simulate what the
interval covers where they are not.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

TAIL = 0.975  # of a two-sided 95 % interval
POWER = 0.80


@dataclass(frozen=True)
class Difference:
    """An arm's loss minus the baseline's, over pairs.

    Args:
        mean: Of the paired differences.
        pairs: n.
        deviation: Standard deviation of the paired differences; None with one pair.
        interval: 95 %; None with one pair.
        p: Two-sided paired t-test; None with one pair.
        detectable: The smallest difference that n pairs of this deviation show with 80 % power at 5 %; None with one.
            The deviation is itself estimated from these pairs: see ``detectable_range``.
    """

    mean: float
    pairs: int
    deviation: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    detectable: float | None = None

    @property
    def detectable_range(self) -> tuple[float, float] | None:
        """The same at the ends of the 95 % interval of the deviation, which few pairs leave wide; None likewise."""
        if not self.deviation:
            return None
        low, high = deviation_range(self.deviation, self.pairs - 1)
        return detectable(low, self.pairs), detectable(high, self.pairs)

    @property
    def called(self) -> bool:
        """Whether the interval excludes 0: the only ground on which a difference is claimed."""
        return self.interval is not None and not self.interval[0] <= 0.0 <= self.interval[1]


def compare(arm: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare two arms, whose entries belong together in pairs."""
    differences = np.asarray(arm, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    mean, pairs = float(differences.mean()), len(differences)
    if pairs < 2:
        return Difference(mean, pairs)
    from scipy import stats

    deviation = float(differences.std(ddof=1))
    if deviation == 0.0:  # the same run twice, as in a study of an arm against itself
        return Difference(mean, pairs, 0.0, (mean, mean), 1.0 if mean == 0.0 else 0.0, 0.0)
    p = float(2 * stats.t.sf(abs(mean) * math.sqrt(pairs) / deviation, pairs - 1))
    return Difference(mean, pairs, deviation, t_interval(differences), p, detectable(deviation, pairs))


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of n ≥ 2 values, by Student's t."""
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    reach = float(stats.t.ppf(TAIL, n - 1) * values.std(ddof=1)) / math.sqrt(n)
    return mean - reach, mean + reach


def pooled_freedom(differences: np.ndarray) -> float:
    """Degrees of freedom of the mean variance of A arms' differences (A, n): n − 1 of one arm, and less than A times as
    many of several, as they share the baseline's runs (Satterthwaite's, of their covariance C: tr² C / tr C²).
    """
    covariance = np.atleast_2d(np.cov(differences))
    total = float(np.square(covariance).sum())
    return (differences.shape[1] - 1) * (float(np.trace(covariance)) ** 2 / total if total else 1.0)


def deviation_range(deviation: float, freedom: float) -> tuple[float, float]:
    """95 % interval of the standard deviation that was estimated with so many degrees of freedom, by chi-square."""
    from scipy import stats

    low, high = (deviation * math.sqrt(freedom / stats.chi2.ppf(tail, freedom)) for tail in (TAIL, 1 - TAIL))
    return low, high


def detectable(deviation: float, pairs: int, comparisons: int = 1) -> float:
    """The mean difference at which a two-sided paired t-test at 5 % has 80 % power.

    Args:
        deviation: Standard deviation of the paired differences (σ).
        pairs: n ≥ 2.
        comparisons: m, which are to hold together: the test is then at 5 % / m, as the first step of Holm's is.

    Returns:
        δ with P(|Z + δ·sqrt(n) / σ| > t_{1 - .025/m, n-1} · S) = .8, Z normal and S² chi-square over its n - 1 degrees.
    """
    return _detectable_shift(pairs, comparisons) * deviation / math.sqrt(pairs)


@lru_cache
def _detectable_shift(pairs: int, comparisons: int) -> float:
    """δ·sqrt(n) / σ."""
    from scipy import optimize, stats

    freedom = pairs - 1
    # The chance given S is a difference of normal ones; its mean over 4000 equally likely values of S is plain and
    # sure where scipy's noncentral t is not a number.
    scale = np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, freedom) / freedom)
    critical = stats.t.ppf(1 - (1 - TAIL) / comparisons, freedom) * scale

    def missing(shift: float) -> float:
        return float((stats.norm.cdf(shift - critical) + stats.norm.cdf(-shift - critical)).mean()) - POWER

    return float(optimize.brentq(missing, 0.0, 100.0 * comparisons))


def pairs_needed(deviation: float, difference: float, most: int = 200, comparisons: int = 1) -> int | None:
    """The fewest pairs whose :func:`detectable` difference is at most this one; None if more than ``most``."""
    pairs = range(2, most + 1)
    # Sought by halves: the more pairs, the smaller the difference that they detect.
    at = bisect.bisect_left(pairs, -difference, key=lambda n: -detectable(deviation, n, comparisons))
    return pairs[at] if at < len(pairs) else None
