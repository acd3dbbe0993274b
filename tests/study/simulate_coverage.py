"""How often intervals of a mean cover it, by simulation: ``python tests/study/simulate_coverage.py`` prints a table."""

from collections.abc import Callable

import numpy as np

from moebed.study.statistics import bootstrap_interval
from probes.resampling import interval, resample_within

Draw = Callable[[np.random.Generator, int], np.ndarray]
SHAPES: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(0.0, 1.0, n),
    "exponential": lambda rng, n: rng.exponential(1.0, n) - 1.0,
}


def coverage(draw: Draw, pairs: int, simulated: int, draws: int = 1000) -> tuple[float, float]:
    """Share of simulated studies whose interval holds the true mean, 0: the widened one and the plain percentile."""
    rng, weights = np.random.default_rng(pairs), resample_within(np.zeros(pairs), draws) / pairs
    widened = plain = 0
    for _ in range(simulated):
        values = draw(rng, pairs)
        low, high = bootstrap_interval(values, draws)
        widened += low <= 0.0 <= high
        low, high = interval(weights @ values)
        plain += low <= 0.0 <= high
    return widened / simulated, plain / simulated


if __name__ == "__main__":
    for shape, draw in SHAPES.items():
        for pairs in (2, 3, 4, 8, 12):
            widened, plain = coverage(draw, pairs, 10_000)
            print(f"{shape:<12}{pairs:>3} pairs: widened {widened:.3f}, percentile {plain:.3f}")
