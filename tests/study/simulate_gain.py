"""How often intervals of a share of the gain hold it: ``python tests/study/simulate_gain.py`` prints a table.

Losses of three arms share the luck of their seed; the oracle gains .3 nats over random, and the arm a share of that.
Only studies count whose t-interval of the oracle's gain excludes 0, as only those are given a share.
"""

import numpy as np

from moebed.study.gain import gain_share

GAIN = 0.3


def losses(rng: np.random.Generator, share: float, seeds: int, deviation: float) -> list[dict[int, float]]:
    """Of an arm, of random and of the oracle, by seed."""
    luck = rng.normal(2.0, deviation, seeds)
    return [dict(enumerate(luck - gained * GAIN + rng.normal(0.0, deviation, seeds))) for gained in (share, 0.0, 1.0)]


def bootstrap(rng: np.random.Generator, arms: list[dict[int, float]]) -> tuple[float, float]:
    """The percentile interval of 1000 draws of seeds."""
    arm, random, oracle = (np.array(list(of_arm.values())) for of_arm in arms)
    drawn = rng.integers(len(arm), size=(1000, len(arm)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (random - arm)[drawn].mean(1) / (random - oracle)[drawn].mean(1)
    low, high = np.nanquantile(ratio, [0.025, 0.975])
    return float(low), float(high)


def coverage(share: float, seeds: int, deviation: float, simulated: int) -> tuple[float, float, float]:
    """Of Fieller's interval, of the bootstrap's, and the part of the studies that is given one."""
    rng = np.random.default_rng(seeds)
    fieller, drawn, given = 0, 0, 0
    for _ in range(simulated):
        arms = losses(rng, share, seeds, deviation)
        found = gain_share(*arms)
        if found.interval is None:
            continue
        given += 1
        fieller += found.interval[0] <= share <= found.interval[1]
        low, high = bootstrap(rng, arms)
        drawn += low <= share <= high
    return fieller / given, drawn / given, given / simulated


if __name__ == "__main__":
    for deviation in (0.02, 0.1):
        for seeds in (3, 4, 8):
            for share in (0.0, 0.5, 0.9):
                found = coverage(share, seeds, deviation, 4000)
                print(
                    f"deviation {deviation}, {seeds} seeds, share {share}: Fieller {found[0]:.3f}, "
                    f"bootstrap {found[1]:.3f}; given {found[2]:.3f}"
                )
