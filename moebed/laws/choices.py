"""What a law of the loss says to do: optima under a training budget, and models whose use is counted too.

B draws of the constants, arrays (B, 1): all answers are arrays (B,), one for each draw. A loss at a fixed budget falls
with N until the tokens are too few, then rises; searches are of one variable, the logarithm of N or of the budget.

The two choices of an over-trained model are those of 2404.02852, section 5: with a bounded loss, the smallest model
that one budget trains to the loss of another shape's optimum; with a bounded cost, the loss of the model that costs as
much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moebed.laws.contract import Array, Constants, LossLaw, Shape
from moebed.laws.search import crossing, lowest

Cost = Callable[[LossLaw, Any, Shape], Any]  # of N of a shape: what using a model of it costs

COSTS: Mapping[str, Cost] = {
    "total": lambda law, size, shape: law.total_parameters(size, shape),
    "active": lambda law, size, shape: law.active_parameters(size, shape),
}
COST_WORDS = {
    "total": "cost is taken as all parameters that must be held, in which 2404.02852 finds it nearly linear",
    "active": "cost is taken as the parameters that a token meets",
}

_SIZES = np.log(1e3), np.log(1e16)
_BUDGETS = np.log(1e10), np.log(1e32)


@dataclass(frozen=True)
class Optimum:
    """A model, its training and its loss; arrays (B,).

    Args:
        size: N.
        tokens: Trained on.
        loss: Nats a token.
    """

    size: Array
    tokens: Array
    loss: Array


def optimum(law: LossLaw, constants: Constants, budget: Any, shape: Shape) -> Optimum:
    """The size and the tokens of the lowest loss that so many training FLOPs buy.

    Args:
        law: The law.
        constants: (B, 1) each.
        budget: FLOPs, a number or (B,).
        shape: Of the experts.
    """
    budget = np.asarray(budget, dtype=np.float64)
    places, losses = lowest(lambda place: _at(law, constants, budget[..., None], shape, place), *_SIZES)
    size = np.exp(places)
    return Optimum(size, budget / law.flops_per_token(size, shape), np.exp(losses))


def _at(law: LossLaw, constants: Constants, budget: Any, shape: Shape, place: Array) -> Array:
    """Log loss of a model of N = e^place on the tokens that the budget leaves."""
    size = np.exp(place)
    columns = {"N": size, "tok": budget / law.flops_per_token(size, shape), **shape._asdict()}
    return law.log_target(constants, columns)


def smallest_size(law: LossLaw, constants: Constants, budget: float, shape: Shape, loss: Array) -> Array:
    """The smallest N that a budget trains to a loss: an over-trained model; not a number where none reaches it."""
    best = optimum(law, constants, budget, shape)

    def excess(place: Array) -> Array:
        return _at(law, constants, budget, shape, place[:, None])[:, 0] - np.log(loss)

    places = np.log(best.size)
    return np.exp(crossing(excess, places - np.log(1e5), places))


def budget_for_loss(law: LossLaw, constants: Constants, shape: Shape, loss: Array) -> Array:
    """The least training FLOPs that reach a loss, (B,)."""

    def excess(place: Array) -> Array:
        return optimum(law, constants, np.exp(place), shape).loss - loss

    return np.exp(_over_budgets(excess, loss))


def optimum_of_size(law: LossLaw, constants: Constants, size: float, shape: Shape) -> Optimum:
    """The loss-optimal model of a given N: trained for as long as makes N the best size for its FLOPs."""
    draws = next(np.shape(value)[0] if np.ndim(value) else 1 for value in constants.values())

    def excess(place: Array) -> Array:
        return size - optimum(law, constants, np.exp(place), shape).size

    budget = np.exp(_over_budgets(excess, np.empty(draws)))
    return optimum(law, constants, budget, shape)


def _over_budgets(excess: Callable[[Array], Array], like: Array) -> Array:
    low, high = (np.full(np.shape(like), end) for end in _BUDGETS)
    return crossing(excess, low, high, steps=34)


def bounded_loss(
    law: LossLaw, constants: Constants, budget: float, reference: Shape, shape: Shape, cost: Cost
) -> Array:
    """Equal budget, equal loss: what a smaller, over-trained model costs over the loss-optimal one of another shape.

    Args:
        law: The law.
        constants: (B, 1) each.
        budget: Training FLOPs of both.
        reference: Shape of the loss-optimal model.
        shape: Shape of the over-trained one.
        cost: See ``COSTS``.

    Returns:
        A ratio, (B,); not a number where the shape does not reach the loss.
    """
    best = optimum(law, constants, budget, reference)
    size = smallest_size(law, constants, budget, shape, best.loss)
    return cost(law, size, shape) / cost(law, best.size, reference)


def size_of_cost(law: LossLaw, wanted: Array, shape: Shape, cost: Cost) -> Array:
    """The largest N that costs no more, (B,), of a cost that grows with N."""
    low, high = (np.full(np.shape(wanted), end) for end in _SIZES)
    return np.exp(crossing(lambda place: wanted - cost(law, np.exp(place), shape), low, high, steps=50))


def bounded_cost(
    law: LossLaw, constants: Constants, budget: float, reference: Shape, shape: Shape, cost: Cost
) -> Array:
    """Equal budget, equal cost: loss of a shape's model minus that of the loss-optimal one of another shape, (B,)."""
    best = optimum(law, constants, budget, reference)
    size = size_of_cost(law, cost(law, best.size, reference), shape, cost)
    return np.exp(_at(law, constants, budget, shape, np.log(size)[:, None])[:, 0]) - best.loss


def best_below_cost(
    law: LossLaw, constants: Constants, budget: float, shape: Shape, cost: Cost, most: float
) -> Optimum:
    """The lowest loss for a budget among the models that cost no more than ``most``."""
    best = optimum(law, constants, budget, shape)
    size = np.minimum(best.size, size_of_cost(law, np.full(np.shape(best.size), most), shape, cost))
    loss = np.exp(_at(law, constants, budget, shape, np.log(size)[:, None])[:, 0])
    return Optimum(size, budget / law.flops_per_token(size, shape), loss)
