"""How often the intervals of a fitted law hold the planted one: ``python tests/laws/measure_coverage.py N [FORM ...]``.

Runs are made anew N times from a law whose constants are known, with scatter; each time the law is fitted (from the
planted constants on, since starts are not the question), and 100 resamples give the intervals: of predictions within
the runs, and with four times N and four times the tokens; of what is best, for a budget of the largest run's FLOPs; and
of over-trained models of one shape beside another's optimum.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from planted import GRIDS, PLANTED, problem, top2

from moebed.laws.choices import COSTS, bounded_cost, bounded_loss, optimum
from moebed.laws.contract import Law, LossLaw, Shape
from moebed.laws.fitting import Fit, Problem, bootstrap, interval, refine

RESAMPLES, SIGMA = 100, {"leverage": 0.03}
CASES = (
    ("joint", True, 72),
    ("joint", True, 24),
    ("krajewski", False, 45),
    ("krajewski", False, 15),
    ("yun", True, 80),
    ("abnar", False, 80),
    ("leverage", False, 36),
    ("leverage", False, 12),
)
SHAPES = {
    "joint": (Shape(4), Shape(8)),
    "yun": (top2(4), top2(8)),
    "krajewski": (Shape(64, 1, 4), Shape(64, 1, 8)),
    "abnar": (Shape(4), Shape(8)),
}


def asked(law: Law, constants: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What is asked of a law, by name, (B,) each of constants (B, 1)."""
    columns, found = GRIDS[law.form], {}
    for name, factor in (("within the runs", 1), ("four times as far", 4)):
        place = {name: np.array([np.median(column)]) for name, column in columns.items()}
        place |= {name: np.array([columns[name].max() * factor]) for name in ("N", "tok", "flops") if name in columns}
        place = place if factor > 1 else {name: np.array([np.median(column)]) for name, column in columns.items()}
        found[name] = law.predict(constants, **place)[:, 0]
    if not isinstance(law, LossLaw):
        bends = constants["gamma"][:, 0] > 0
        return found | {"best granularity": np.where(bends, law.best_granularity(constants)[:, 0], np.nan)}
    one, other = SHAPES[law.form]
    budget = float(law.flops_per_token(columns["N"].max(), one) * columns["tok"].max())
    best = optimum(law, constants, budget, one)
    found |= {"best N": best.size, "best tokens": best.tokens, "least loss": best.loss}
    found["cost ratio"] = bounded_loss(law, constants, budget, one, other, COSTS["total"])
    found["loss at equal cost"] = bounded_cost(law, constants, budget, one, other, COSTS["total"])
    found["shapes apart"] = optimum(law, constants, budget, other).loss - best.loss
    if law.form == "abnar":
        found["best sparsity"] = law.best_sparsity(constants, float(np.median(columns["N"])), budget)
    return found


def trial(form: str, fixed: bool, runs: int, seed: int) -> dict[str, bool | None]:
    """Whether each interval holds what is planted; None of what has none."""
    planted = problem(form, SIGMA.get(form, 0.004), seed, fixed)
    kept = np.sort(np.random.default_rng(seed + 1000).permutation(len(planted.measured))[:runs])
    part = Problem(planted.law, {name: column[kept] for name, column in planted.columns.items()}, planted.fixed)
    law, start = part.law, part.law.pack(PLANTED[form])[part.free][None]
    fitted = Fit(part, refine(part, start, np.ones((1, runs)))[0], 0.0)
    found = asked(law, law.unpack(bootstrap(fitted, RESAMPLES, seed)))
    true = asked(law, {name: np.array([[value]]) for name, value in PLANTED[form].items()})
    ends = {name: interval(values) for name, values in found.items()}
    return {name: None if one is None else one[0] <= true[name][0] <= one[1] for name, one in ends.items()}


def main(trials: int = 200, *forms: str) -> None:
    """A line a case."""
    for form, fixed, runs in CASES:
        if forms and form not in forms:
            continue
        held = defaultdict(list)
        for seed in range(trials):
            for name, one in trial(form, fixed, runs, seed).items():
                held[name].append(one)
        told = {name: [one for one in of if one is not None] for name, of in held.items()}
        cells = (f"{name} {100 * np.mean(of):.1f} % of {len(of)}" for name, of in told.items() if of)
        print(f"{form}{', Ê given' if fixed else ''}, {runs} runs: {'; '.join(cells)}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
