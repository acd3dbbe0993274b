"""Laws whose constants are known, and runs that follow them; a run's loss scatters by ``sigma`` of its logarithm."""

from pathlib import Path

import numpy as np

from moebed.laws.contract import Shape
from moebed.laws.fitting import Problem
from moebed.laws.registry import LAWS

# Ours, since none are published: it reproduces the paper's claims with cost = all parameters.
YUN = {
    "A": 370.0,
    "alpha": 0.344,
    "B": 0.64,
    "beta": 0.25,
    "C": 3250.0,
    "gamma": 0.389,
    "F": 1.44,
    "d": 7.6e-4,
    "E_start": 1.85,
    "E_max": 600.0,
}
PLANTED = {"yun": YUN, **{form: dict(law.published) for form, law in LAWS.items() if law.published}}
SATURATION = ("E_start", "E_max")
EXPERTS = np.array([1.0, 4.0, 8.0, 16.0, 32.0])


def top2(experts: float) -> Shape:
    """The shape of a model of the paper of ``yun``: two experts a token where there are any."""
    return Shape(experts, 1 if experts == 1 else 2)


def grid(**axes) -> dict[str, np.ndarray]:
    """Every combination of the values of each column."""
    return dict(zip(axes, (part.ravel() for part in np.meshgrid(*axes.values())), strict=True))


GRIDS = {
    "yun": grid(N=np.geomspace(81e6, 679e6, 4), tok=np.geomspace(2.5e9, 2e10, 4), E=EXPERTS),
    "joint": grid(N=np.geomspace(1e8, 1.5e9, 4), tok=np.geomspace(3e9, 6e10, 3), E=2.0 ** np.arange(6)),
    "krajewski": grid(N=np.geomspace(1e9, 3e10, 3), tok=np.geomspace(5e9, 1e11, 3), G=2.0 ** np.arange(5)),
    "abnar": grid(N=np.geomspace(2e8, 5e9, 4), tok=np.geomspace(5e9, 1e11, 4), E=2.0 ** np.arange(5), K=[1.0]),
    "leverage": grid(flops=np.geomspace(1e18, 3e20, 3), A=[1 / 64, 1 / 16, 1 / 4], G=[2.0, 4.0, 8.0, 16.0]),
}


def runs(form: str, sigma: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    """The columns of the runs of a law, its target among them."""
    law, columns = LAWS[form], dict(GRIDS[form])
    logs = law.log_target(PLANTED[form], columns)
    return {**columns, law.target: np.exp(logs + sigma * np.random.default_rng(seed).normal(size=len(logs)))}


def problem(form: str, sigma: float = 0.0, seed: int = 0, fixed: bool = False) -> Problem:
    """The same as a problem, with Ê's constants given if ``fixed``."""
    given = {name: PLANTED[form][name] for name in SATURATION} if fixed else {}
    return Problem(LAWS[form], runs(form, sigma, seed), given)


def write_csv(path: Path, columns: dict) -> Path:
    """A table as a person would have it."""
    names = list(columns)
    values = np.broadcast_arrays(*columns.values())
    lines = [",".join(names), *(",".join(f"{value:.10g}" for value in row) for row in zip(*values, strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
