"""What a fitted law says, as plain data: ``law.json``, from which tables, sentences and the page are made."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moebed.laws.abnar import Abnar
from moebed.laws.choices import COST_WORDS, COSTS, bounded_cost, bounded_loss, optimum
from moebed.laws.contract import Array, Law, LossLaw, Shape
from moebed.laws.fitting import Fit, LeftOut, interval
from moebed.laws.leverage import Leverage
from moebed.laws.reading import RunTable

SHAPES = 6  # compared with one another, at most
DIGITS = 7


@dataclass(frozen=True)
class Fitted:
    """A law, the runs that it was fitted to, and the fits to resamples of them.

    Args:
        table: The runs, the law's columns.
        fit: To all of them.
        draws: All constants of the fits to resamples, (B, P).
        left_out: How the fit without the largest runs predicts them; None where the rest is too few.
        budgets: Training FLOPs that are asked about.
        cost: Name of the cost model.
    """

    table: RunTable
    fit: Fit
    draws: Array
    left_out: LeftOut | None
    budgets: tuple[float, ...]
    cost: str = "total"

    @property
    def law(self) -> Law:
        """The law."""
        return self.fit.problem.law

    @cached_property
    def constants(self) -> dict[str, Array]:
        """The fit's constants as row 0 and those of the resamples below, (1 + B, 1) each."""
        best = self.law.unpack(self.fit.problem.whole(self.fit.free)[None])
        return {name: np.concatenate([best[name], values]) for name, values in self.law.unpack(self.draws).items()}

    @cached_property
    def shapes(self) -> list[Shape]:
        """The shapes that the runs have; of many, some from the first to the last."""
        columns = [self.table.columns[name] for name in ("E", "K", "G")]
        found = sorted({Shape(*map(float, row)) for row in zip(*columns, strict=True)})
        return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, SHAPES).round().astype(int))]

    @cached_property
    def parts(self) -> list[str]:
        """What the shapes of the runs differ in; E alone where there is one shape."""
        return [name for name in ("E", "K", "G") if np.ptp(self.table.columns[name])] or ["E"]

    def inside(self, **values: float) -> bool:
        """Whether a place lies within the least and the most that the runs have of each of these columns."""
        columns = self.table.columns
        return all(
            columns[name].min() * 0.999 <= value <= columns[name].max() * 1.001 for name, value in values.items()
        )


def plain(values: Array) -> dict[str, Any]:
    """A fit's value and its interval, of an array (1 + B,) whose first is the fit's."""
    ends = interval(values[1:]) if np.isfinite(values[0]) else None
    return {"value": _number(values[0]), "interval": None if ends is None else [_number(end) for end in ends]}


def _number(value: Any) -> float | None:
    """A number with seven digits: more would only say on which machine it was computed."""
    return float(f"{float(value):.{DIGITS}g}") if np.isfinite(value) else None


def describe(found: Fitted) -> dict[str, Any]:
    """Everything that is kept of a fitted law, but for its provenance."""
    law, table, best = found.law, found.table, found.fit
    content: dict[str, Any] = {
        "form": law.form,
        "formula": law.formula,
        "source": law.source,
        "N": law.size_words,
        "target": law.target,
        "table": {
            "name": table.name,
            "runs": table.runs,
            "notes": table.notes,
            "ranges": {name: [_number(column.min()), _number(column.max())] for name, column in table.columns.items()},
        },
        "fit": {
            "huber": law.huber,
            "objective": _number(best.objective),
            "rms_log_error": _number(np.sqrt(np.mean(best.residuals**2))),
            "resamples": len(found.draws),
            "constants": {
                constant.name: {
                    **plain(found.constants[constant.name][:, 0]),
                    "fixed": constant.name in best.problem.fixed,
                    "published": law.published.get(constant.name),
                }
                for constant in law.constants
            },
            "published_words": law.published_words,
        },
        "largest_left_out": None
        if found.left_out is None
        else {name: _number(value) for name, value in vars(found.left_out).items()},
    }
    if isinstance(law, LossLaw):
        content |= _of_losses(found, law)
    elif isinstance(law, Leverage):
        content |= _of_leverage(found, law)
    return content


# Laws of the loss -----------------------------------------------------------------------------------------------------


def _of_losses(found: Fitted, law: LossLaw) -> dict[str, Any]:
    optima = [_optima(found, law, budget) for budget in found.budgets]
    sparsity = {"best_sparsity": _sparsity(found, law)} if isinstance(law, Abnar) else {}
    return {
        **sparsity,
        "shape_parts": found.parts,
        "predictions": _predictions(found, law),
        "optima": optima,
        "cost": {"name": found.cost, "words": COST_WORDS[found.cost]},
        "over_trained": [_over_trained(found, law, budget) for budget in found.budgets],
    }


def _sparsity(found: Fitted, law: Abnar) -> list[dict[str, Any]]:
    """The best sparsity of models as large as the smallest and the largest run, and of one between."""
    sizes = np.geomspace(found.table.columns["N"].min(), found.table.columns["N"].max(), 3)
    rows = []
    for budget, size in itertools.product(found.budgets, sizes):
        best = law.best_sparsity(found.constants, size, budget)
        rows.append(
            {
                "budget": _number(budget),
                "N": _number(size),
                **plain(best),
                "published": _number(law.best_sparsity(law.published, size, budget)[0]),
                "inside": found.inside(N=size, S=best[0], flops=budget),
            }
        )
    return rows


def _predictions(found: Fitted, law: LossLaw) -> list[dict[str, Any]]:
    """Of the largest size on the most tokens, and of four times either and both, for each shape."""
    columns = found.table.columns
    rows = []
    for shape, (more, longer) in itertools.product(found.shapes, ((1, 1), (4, 1), (1, 4), (4, 4))):
        size, tokens = columns["N"].max() * more, columns["tok"].max() * longer
        loss = law.loss(found.constants, np.array([size]), tokens, shape)[:, 0]
        place = {"N": _number(size), "tok": _number(tokens), "shape": _plain_shape(shape)}
        rows.append({**place, "inside": found.inside(N=size, tok=tokens), **plain(loss)})
    return rows


def _optima(found: Fitted, law: LossLaw, budget: float) -> dict[str, Any]:
    """The loss-optimal model of each shape, and which shape is best."""
    rows, losses = [], []
    for shape in found.shapes:
        best = optimum(law, found.constants, budget, shape)
        losses.append(best.loss)
        row: dict[str, Any] = {
            "shape": _plain_shape(shape),
            "N": plain(best.size),
            "tok": plain(best.tokens),
            "loss": plain(best.loss),
            "inside": found.inside(N=best.size[0], tok=best.tokens[0]),
        }
        if law.published:
            theirs = optimum(law, law.published, budget, shape)
            row["published"] = {"N": _number(theirs.size[0]), "tok": _number(theirs.tokens[0])}
        rows.append(row)
    return {"budget": _number(budget), "shapes": rows, "best": _best(found.shapes, np.array(losses))}


def _best(shapes: Sequence[Shape], losses: Array) -> dict[str, Any] | None:
    """The shape of the lowest loss beside the second, (shapes, 1 + B) losses."""
    if len(shapes) < 2:
        return None
    first, second = np.argsort(losses[:, 0], kind="stable")[:2]
    return {
        "shape": _plain_shape(shapes[first]),
        "second": _plain_shape(shapes[second]),
        "difference": plain(losses[first] - losses[second]),
        "share_of_resamples": _number(np.mean(np.argmin(losses[:, 1:], axis=0) == first)),
    }


def _over_trained(found: Fitted, law: LossLaw, budget: float) -> dict[str, Any]:
    """For each pair of shapes: cost at equal loss, and loss at equal cost, of one over the optimum of the other."""
    cost = COSTS[found.cost]
    rows = []
    for reference, shape in itertools.permutations(found.shapes, 2):
        rows.append(
            {
                "reference": _plain_shape(reference),
                "shape": _plain_shape(shape),
                "cost_ratio": plain(bounded_loss(law, found.constants, budget, reference, shape, cost)),
                "loss_difference": plain(bounded_cost(law, found.constants, budget, reference, shape, cost)),
            }
        )
    return {"budget": _number(budget), "pairs": rows}


def _plain_shape(shape: Shape) -> dict[str, float]:
    return {name: float(f"{value:.{DIGITS}g}") for name, value in shape._asdict().items()}


# Efficiency leverage --------------------------------------------------------------------------------------------------


def _of_leverage(found: Fitted, law: Leverage) -> dict[str, Any]:
    columns = found.table.columns
    places = sorted(set(zip(columns["A"].tolist(), columns["G"].tolist(), strict=True)))
    places = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, 2 * SHAPES).round().astype(int))]
    rows = []
    for budget, (share, granularity) in itertools.product(found.budgets, places):
        place = {"flops": budget, "A": share, "G": granularity}
        rows.append(
            {
                **{name: _number(value) for name, value in place.items()},
                "inside": found.inside(flops=budget),
                **plain(law.predict(found.constants, **place)[:, 0]),
                "published": _number(law.predict(law.published, **place)),
            }
        )
    exponents: Mapping[str, Array] = found.constants
    bends = exponents["gamma"][:, 0] > 0  # else the parabola has no lowest point: the finest or the coarsest is best
    granularity = np.where(bends, law.best_granularity(exponents)[:, 0], np.nan)
    return {
        "predictions": rows,
        "best_granularity": {
            **plain(granularity),
            "published": _number(law.best_granularity(law.published)),
            "range": [_number(columns["G"].min()), _number(columns["G"].max())],
        },
    }
