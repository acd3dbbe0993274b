"""Whether two runs took the same steps, and how far apart they may be. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# Of losses and gradient norms, relative; a GPU adds gradients of the embedding in no fixed order.
CONTINUED = {"cpu": 1e-6, "cuda": 1e-3}
LAID_OUT = {"cpu": 1e-5, "cuda": 1e-3}  # other layouts sum in another order as well
Steps = Mapping[int, Sequence[float]]  # what was noted of each step


def largest_difference(found: Steps, wanted: Steps) -> float:
    """Relative; infinite where there are other steps, or something is not a number."""
    if found.keys() != wanted.keys() or not wanted:
        return math.inf
    pairs = [pair for step, values in wanted.items() for pair in zip(found[step], values, strict=True)]
    off = [abs(ours - theirs) / abs(theirs) for ours, theirs in pairs]
    return max(off) if all(map(math.isfinite, off)) else math.inf
