"""Searches of one variable, for all draws of a law's constants at once (B draws)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moebed.laws.contract import Array

_CELLS, _ROUNDS = 32, 7


def lowest(function: Callable[[Array], Array], low: Any, high: Any) -> tuple[Array, Array]:
    """Where and how low a function of one variable is lowest, for every draw at once.

    A grid of 32 cells, then one over the two cells beside its lowest point, seven in all.

    Args:
        function: (B, 33) -> (B, 33).
        low: Left end, a number or (B, 1).
        high: Right end.

    Returns:
        The place and the value, (B,) each.
    """
    low, high = np.atleast_2d(low), np.atleast_2d(high)
    parts = np.linspace(0.0, 1.0, _CELLS + 1)
    for _ in range(_ROUNDS):
        places = low + (high - low) * parts
        values = function(places)
        places = np.broadcast_to(places, values.shape)
        best = np.nanargmin(values, axis=1)[:, None]
        low, high = (np.take_along_axis(places, np.clip(best + step, 0, _CELLS), axis=1) for step in (-1, 1))
    return tuple(np.take_along_axis(array, best, axis=1)[:, 0] for array in (places, values))  # type: ignore[return-value]


def crossing(function: Callable[[Array], Array], low: Array, high: Array, steps: int = 40) -> Array:
    """Where a function that falls from above 0 to below it is 0; not a number where it does not.

    Args:
        function: (B,) -> (B,).
        low: Left end, (B,).
        high: Right end, (B,).
        steps: Halvings.
    """
    found = (function(low) >= 0) & (function(high) <= 0)
    for _ in range(steps):
        middle = (low + high) / 2
        above = function(middle) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(found, (low + high) / 2, np.nan)
