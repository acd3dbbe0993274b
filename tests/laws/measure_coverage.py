"""How often the intervals of predictions hold the planted law: ``python tests/laws/measure_coverage.py``.

Runs are made anew from a law whose constants are known, with scatter; each time the law is fitted (from the planted
constants on, since starts are not the question), and 100 resamples give the interval of one prediction, within the
runs, and of another with four times N and four times the tokens.
"""

import numpy as np
from planted import GRIDS, PLANTED, problem

from moebed.laws.fitting import Fit, Problem, bootstrap, interval, refine

TRIALS, RESAMPLES, SIGMA = 100, 100, 0.004


def trial(form: str, fixed: bool, runs: int, seed: int) -> list[bool]:
    """Whether each of the two intervals holds."""
    planted = problem(form, SIGMA, seed, fixed)
    kept = np.sort(np.random.default_rng(seed + 1000).permutation(len(planted.measured))[:runs])
    part = Problem(planted.law, {name: column[kept] for name, column in planted.columns.items()}, planted.fixed)
    start = part.law.pack(PLANTED[form])[part.free][None]
    found = Fit(part, refine(part, start, np.ones((1, runs)))[0], 0.0)
    draws = part.law.unpack(bootstrap(found, RESAMPLES, seed))
    held = []
    for factor in (1, 4):
        place = {name: np.array([np.median(column)]) for name, column in GRIDS[form].items()}
        place |= {name: np.array([GRIDS[form][name].max() * factor]) for name in ("N", "tok") if factor > 1}
        ends = interval(part.law.predict(draws, **place)[:, 0])
        truth = part.law.predict(PLANTED[form], **place)[0]
        held.append(ends is not None and ends[0] <= truth <= ends[1])
    return held


def main() -> None:
    """A line a case."""
    for form, fixed, runs in (
        ("joint", True, 72),
        ("joint", True, 24),
        ("krajewski", False, 45),
    ):
        held = np.mean([trial(form, fixed, runs, seed) for seed in range(TRIALS)], axis=0)
        given = ", Ê given" if fixed else ""
        print(f"{form}{given}, {runs} runs: within {100 * held[0]:.1f} %, four times as far {100 * held[1]:.1f} %")


if __name__ == "__main__":
    main()
