"""How often the intervals of a study cover what they are of: ``python tests/study/simulate_coverage.py`` prints tables.

Of a mean difference; and of the deviation of pairs, over several arms that share the baseline's runs.
"""

from collections.abc import Callable

import numpy as np

from moebed.study.statistics import deviation_range, pooled_freedom, t_interval

Draw = Callable[[np.random.Generator, int], np.ndarray]
SHAPES: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(0.0, 1.0, n),
    "exponential": lambda rng, n: rng.exponential(1.0, n) - 1.0,
}


def coverage(draw: Draw, pairs: int, simulated: int) -> float:
    """Share of simulated studies whose interval holds the true mean, 0."""
    rng = np.random.default_rng(pairs)
    intervals = [t_interval(draw(rng, pairs)) for _ in range(simulated)]
    return sum(low <= 0.0 <= high for low, high in intervals) / simulated


def coverage_of_deviation(arms: int, pairs: int, shared: float, simulated: int) -> float:
    """Share of simulated studies whose interval holds the deviation of their pairs.

    Args:
        arms: How many, beside the baseline.
        pairs: Of each arm.
        shared: Deviation of the baseline's losses over that of an arm's.
        simulated: Studies.
    """
    rng, true, held = np.random.default_rng(pairs), np.hypot(1.0, shared), 0
    for _ in range(simulated):
        differences = rng.normal(size=(arms, pairs)) - shared * rng.normal(size=pairs)
        pooled = float(np.sqrt(differences.var(axis=1, ddof=1).mean()))
        low, high = deviation_range(pooled, pooled_freedom(differences))
        held += low <= true <= high
    return held / simulated


if __name__ == "__main__":
    for shape, draw in SHAPES.items():
        for pairs in (2, 3, 4, 8, 12):
            print(f"{shape:<12}{pairs:>3} pairs: {coverage(draw, pairs, 10_000):.3f}")
    for shared in (0.0, 1.0, 3.0):
        for arms in (1, 2, 3, 6):
            found = (coverage_of_deviation(arms, pairs, shared, 4000) for pairs in (3, 4, 8))
            print(f"deviation, baseline {shared:g} times, {arms} arms: " + ", ".join(f"{one:.3f}" for one in found))
