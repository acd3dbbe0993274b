"""Could chance have done it? Signs flipped over texts, and Holm's adjustment for several questions at a time.

B texts, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

_EVERY = 12  # texts up to which every combination of signs is looked at
_DRAWS = 9999
_SEED = 20240618  # of the signs; its own, since a study's statistics are to need no PyTorch, which resampling does


def sign_flip_p(sums: np.ndarray) -> float:
    """How often sums (B,) by text, each with its sign at random, come as far from 0 in total as they do.

    Two-sided, itself counted; exact up to twelve texts. With B texts it is at least 2 / 2^B. Texts of which nothing
    changed have no sign.
    """
    sums = np.asarray(sums, np.float64)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    observed = abs(sums.sum()) * (1 - 1e-9)  # sums in another order differ in the last bits
    if len(sums) <= _EVERY:
        signs = np.array(list(product((1.0, -1.0), repeat=len(sums))))
        return float((np.abs(signs @ sums) >= observed).mean())
    signs = np.random.default_rng(_SEED).choice((1.0, -1.0), size=(_DRAWS, len(sums)))
    return float((1 + (np.abs(signs @ sums) >= observed).sum()) / (1 + _DRAWS))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: each is at most 5 % with 5 % chance that any is, if no arm differs (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
