"""How often intervals of a mean cover it, by simulation: ``python tests/study/simulate_coverage.py`` prints a table."""

from collections.abc import Callable

import numpy as np

from moebed.study.statistics import t_interval

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


if __name__ == "__main__":
    for shape, draw in SHAPES.items():
        for pairs in (2, 3, 4, 8, 12):
            print(f"{shape:<12}{pairs:>3} pairs: {coverage(draw, pairs, 10_000):.3f}")
