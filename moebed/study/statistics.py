"""Paired differences over seeds: interval, p-value, and the smallest difference that could have been seen.

n pairs, usually 3 to 12; a pair is two runs of one seed, so of one data order and one draw of the initial weights.

The interval is a bootstrap over pairs, widened. With so few pairs the plain percentile bootstrap is much too narrow
(it covers the truth in 75 % of cases with 3 pairs and 80 % with 4, where 95 % are meant), and the studentised one too
wide (infinite with 3 pairs, since one resample in nine holds one pair three times). So the percentile interval's
distances from the mean are multiplied by t_{n-1} / z · sqrt(n / (n - 1)): what makes it as wide as the t interval where
the differences are normal, while their skew still shows. Its coverage is simulated in the tests (test_study_statistics).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probes.resampling import interval, resample_within

DRAWS = 10_000
LEVEL = 0.95
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
    """

    mean: float
    pairs: int
    deviation: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    detectable: float | None = None

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
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(mean, pairs, deviation, bootstrap_interval(differences), p, detectable(deviation, pairs))


def bootstrap_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Widened percentile-bootstrap 95 % interval of the mean of n ≥ 2 values; see the top of this file."""
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    means = resample_within(np.zeros(n), DRAWS) @ values / n  # (R,)
    tail = (1 + LEVEL) / 2
    widening = float(stats.t.ppf(tail, n - 1) / stats.norm.ppf(tail)) * math.sqrt(n / (n - 1))
    low, high = values.mean() + widening * (interval(means) - values.mean())
    return float(low), float(high)


def detectable(deviation: float, pairs: int, power: float = POWER) -> float:
    """The mean difference at which a two-sided paired t-test at 5 % has this power.

    Args:
        deviation: Standard deviation of the paired differences (σ).
        pairs: n ≥ 2.
        power: Wanted chance to see it.

    Returns:
        δ with P(|Z + δ·sqrt(n) / σ| > t_{.975, n-1} · S) = power, Z normal and S² chi-square over its n - 1 degrees.
    """
    from scipy import optimize, stats

    freedom = pairs - 1
    # The chance given S is a difference of normal ones; its mean over 4000 equally likely values of S is plain and
    # sure where scipy's noncentral t is not a number.
    scale = np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, freedom) / freedom)
    critical = stats.t.ppf((1 + LEVEL) / 2, freedom) * scale

    def missing(shift: float) -> float:
        return float((stats.norm.cdf(shift - critical) + stats.norm.cdf(-shift - critical)).mean()) - power

    return float(optimize.brentq(missing, 0.0, 100.0)) * deviation / math.sqrt(pairs)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: each is at most 5 % with 5 % chance that any is, if no arm differs (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
