"""Constants of a law from a table of runs: one fitter for all laws.

B draws (starts, or resamples), n runs, p constants that are free. What is minimised is the weighted mean over runs of
Huber's loss of log prediction minus log measured: squares near 0, absolute values beyond the law's ``huber``.

Many starts are looked at, L-BFGS goes down from the best of them, and Levenberg-Marquardt steps finish what L-BFGS
leaves in the long flat valleys that these laws have. Resamples of the runs, and fits without some of them, are no more
than other weights, so they go through the same steps, all at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moebed.errors import UserError
from moebed.laws.contract import Array, Columns, Law

SCREENED, DESCENDED = 4096, 12  # starts that are looked at, and those from which L-BFGS goes down
MORE_THAN_CONSTANTS = 5  # runs, for a fit to say anything
_IMAGINARY = 1e-20
_ROUNDS = 200


@dataclass(frozen=True)
class Problem:
    """A law and the runs that it is fitted to.

    Args:
        law: The law.
        columns: Its columns, (n,) each.
        fixed: Constants that are given.
    """

    law: Law
    columns: Columns
    fixed: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def measured(self) -> Array:
        """Logarithm of what was measured, (n,)."""
        return np.log(self.columns[self.law.target])

    @cached_property
    def free(self) -> Array:
        """Indices of the free constants, (p,)."""
        return np.array([i for i, c in enumerate(self.law.constants) if c.name not in self.fixed])

    @cached_property
    def bounds(self) -> Array:
        """Least and most of the free constants, (2, p)."""
        return np.array([self.law.constants[i].bounds for i in self.free]).T

    def whole(self, free: Array) -> Array:
        """Vectors of all constants, (..., P), from those of the free ones, (..., p)."""
        vector = np.zeros((*free.shape[:-1], len(self.law.constants)), dtype=free.dtype)
        for index, constant in enumerate(self.law.constants):
            if constant.name in self.fixed:
                vector[..., index] = constant.coordinate(self.fixed[constant.name])
        vector[..., self.free] = free
        return vector

    def residuals(self, free: Array) -> Array:
        """Log prediction minus log measured, (..., n); infinite where the formula has no value."""
        with np.errstate(all="ignore"):
            found = self.law.log_target(self.law.unpack(self.whole(free)), self.columns) - self.measured
        return found if np.iscomplexobj(found) else np.where(np.isfinite(found), found, np.inf)

    def linearised(self, free: Array) -> tuple[Array, Array]:
        """Residuals (B, n) and their derivatives by the free constants (B, p, n)."""
        moved = free[:, None, :] + 1j * _IMAGINARY * np.eye(free.shape[-1])  # (B, p, p)
        found = self.residuals(moved)
        return found[:, 0].real, found.imag / _IMAGINARY

    def objective(self, free: Array, weights: Array) -> Array:
        """What is minimised, (B,); weights (B, n) or (n,)."""
        return (weights * huber(self.residuals(free), self.law.huber)).sum(-1) / weights.sum(-1)


def huber(residuals: Array, delta: float) -> Array:
    """Half the square up to ``delta``, then as steep as there."""
    size = np.abs(residuals)
    return np.where(size <= delta, residuals**2 / 2, delta * (size - delta / 2))


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Args:
        problem: What was fitted.
        free: Free constants, (p,).
        objective: Reached.
    """

    problem: Problem
    free: Array
    objective: float

    @property
    def constants(self) -> dict[str, float]:
        """By name."""
        return {name: float(value[0]) for name, value in self.problem.law.unpack(self.problem.whole(self.free)).items()}

    @property
    def residuals(self) -> Array:
        """Log prediction minus log measured, (n,)."""
        return self.problem.residuals(self.free)


def fit(problem: Problem, seed: int, weights: Array | None = None) -> Fit:
    """The best constants from many starts.

    Args:
        problem: A law and its runs.
        seed: Of the starts.
        weights: (n,); 1 each if not given.
    """
    from scipy.optimize import minimize

    weights = np.ones(len(problem.measured)) if weights is None else weights
    rng = np.random.default_rng(seed)
    low, high = np.array([problem.law.constants[i].starts for i in problem.free]).T
    starts = rng.uniform(low, high, (SCREENED, len(problem.free)))
    best = np.argsort(problem.objective(starts, weights), kind="stable")[:DESCENDED]
    scale = problem.law.huber**2  # so that L-BFGS's tolerances mean something

    def value_and_gradient(free: Array) -> tuple[float, Array]:
        residuals, slopes = problem.linearised(free[None])
        if not np.isfinite(residuals).all():
            return 1e30, np.zeros_like(free)
        pull = weights * np.clip(residuals[0], -problem.law.huber, problem.law.huber) / weights.sum()
        return float(problem.objective(free[None], weights)[0]) / scale, slopes[0] @ pull / scale

    reached = np.array(
        [
            minimize(
                value_and_gradient,
                starts[i],
                jac=True,
                method="L-BFGS-B",
                bounds=list(zip(*problem.bounds, strict=True)),
                options={"maxiter": 100, "maxfun": 200},  # what is left is for the steps below
            ).x
            for i in best
        ]
    )
    reached = refine(problem, reached, np.broadcast_to(weights, (len(reached), len(weights))))
    values = problem.objective(reached, weights)
    winner = int(np.argmin(values))
    return Fit(problem, reached[winner], float(values[winner]))


def refine(problem: Problem, free: Array, weights: Array) -> Array:
    """Levenberg-Marquardt steps from where each draw is, to a minimum near it.

    Huber's loss is taken as squares whose weights are 1 within ``huber`` and fall as 1/|residual| beyond, which never
    makes a step that lowers the one raise the other. Steps end at the bounds; a constant that a bound holds rests.

    Args:
        problem: A law and its runs.
        free: (B, p).
        weights: Of the runs, (B, n).
    """
    low, high = problem.bounds
    damping = np.full(len(free), 1e-2)
    value = problem.objective(free, weights)
    moving = np.isfinite(value)
    for _ in range(_ROUNDS):
        rows = np.flatnonzero(moving)
        if not len(rows):
            break
        trial = free[rows] + _steps(problem, free[rows], weights[rows], damping[rows])
        trial = np.clip(trial, low, high)
        found = problem.objective(trial, weights[rows])
        better = found < value[rows]
        gained = np.where(better, value[rows] - found, 0.0)
        free[rows[better]], value[rows[better]] = trial[better], found[better]
        damping[rows] = np.where(better, damping[rows] / 5, damping[rows] * 6)
        small = better & (gained < 1e-9 * value[rows] + 1e-22) & (damping[rows] < 1e-3)
        moving[rows[small | (damping[rows] > 1e9)]] = False
    return free


def _steps(problem: Problem, free: Array, weights: Array, damping: Array) -> Array:
    """The damped steps, (B, p)."""
    low, high = problem.bounds
    residuals, slopes = problem.linearised(free)  # (B, n), (B, p, n)
    size = np.maximum(np.abs(residuals), problem.law.huber)
    weighted = slopes * (weights * problem.law.huber / size)[:, None]
    gradient = (weighted @ residuals[..., None])[..., 0]
    square = weighted @ slopes.swapaxes(1, 2)  # (B, p, p)
    held = ((free <= low) & (gradient > 0)) | ((free >= high) & (gradient < 0))
    gradient = np.where(held, 0.0, gradient)
    square = np.where(held[:, :, None] | held[:, None, :], 0.0, square)
    diagonal = np.einsum("bii->bi", square)
    floor = 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
    index = np.arange(free.shape[1])
    square[:, index, index] += damping[:, None] * np.maximum(diagonal, floor) + floor
    return -np.linalg.solve(square, gradient[..., None])[..., 0]


def bootstrap(found: Fit, resamples: int, seed: int) -> Array:
    """The fit repeated on runs drawn with replacement: all constants, (resamples, P), as ``Law.unpack`` takes them.

    Args:
        found: The fit to all runs.
        resamples: How many.
        seed: Of the draws.
    """
    runs = len(found.problem.measured)
    weights = np.random.default_rng(seed).multinomial(runs, np.full(runs, 1 / runs), size=resamples).astype(float)
    start = np.repeat(found.free[None], resamples, axis=0)
    return found.problem.whole(refine(found.problem, start, weights))


def interval(draws: Array) -> tuple[float, float] | None:
    """95 % of the draws of a prediction; None where it is not defined in more than one draw of fifty."""
    draws = np.asarray(draws, dtype=np.float64)
    kept = draws[np.isfinite(draws)]
    if len(kept) < 0.98 * len(draws):
        return None
    low, high = np.quantile(kept, (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class LeftOut:
    """How a fit without the largest runs predicts them.

    Args:
        runs: Left out.
        rms: Root mean square of log prediction minus log measured.
        mean: Its mean: above 0 where the law says too much.
        worst: Its largest size.
    """

    runs: int
    rms: float
    mean: float
    worst: float


def leave_largest_out(problem: Problem, order: Array, seed: int) -> LeftOut | None:
    """Fit to all but the largest fifth of the runs, at least two, and predict those.

    Args:
        problem: A law and its runs.
        order: What makes a run large, (n,).
        seed: Of the starts.

    Returns:
        None where the rest would be too few for a fit.
    """
    count = max(2, len(order) // 5)
    largest = order >= np.sort(order)[-count]  # runs of one size stay together
    if (~largest).sum() < len(problem.free) + MORE_THAN_CONSTANTS:
        return None
    rest = Problem(problem.law, {k: np.asarray(v)[~largest] for k, v in problem.columns.items()}, problem.fixed)
    error = problem.residuals(fit(rest, seed).free)[largest]
    return LeftOut(
        int(largest.sum()), float(np.sqrt(np.mean(error**2))), float(error.mean()), float(np.abs(error).max())
    )


def check(law: Law, columns: Mapping[str, Any], fixed: Mapping[str, float], where: str) -> None:
    """Whether a table can tell the constants of a law at all.

    Args:
        law: The law.
        columns: Its columns.
        fixed: Constants that are given.
        where: The table, for the error.

    Raises:
        UserError: It cannot, and why.
    """
    runs = len(next(iter(columns.values())))
    free = len(law.constants) - len(fixed)
    if runs < free + MORE_THAN_CONSTANTS:
        raise UserError(
            f"{where} has {runs} runs that count; the law {law.form} has {free} constants to be fitted, which takes at "
            f"least {free + MORE_THAN_CONSTANTS}: add runs, or fix constants with --fix"
        )
    still = [name for name in law.varies if np.ptp(columns[name]) == 0]
    if still:
        raise UserError(
            f"{where}: {', '.join(still)} {'is' if len(still) == 1 else 'are'} the same in all {runs} runs, so that "
            f"what the law {law.form} says of it cannot be told; add runs that differ in it"
        )
    settings = len(np.unique(np.stack([columns[name] for name in law.varies]), axis=1).T)
    if settings < free:
        raise UserError(
            f"{where} has {runs} runs, but only {settings} that differ in {', '.join(law.varies)}; {free} constants "
            f"cannot be told from them: add runs of other sizes, or fix constants with --fix"
        )
