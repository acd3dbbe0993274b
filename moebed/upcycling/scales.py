"""What the routed experts' output is multiplied with where they are parts of a dense FFN.

y = s · Σ p_i E_i(x) over the K chosen of E parts, Σ p_i = 1. Of random routing, p_i near 1 / K and parts that do not go
together, the output has the dense one's mean with s = E, its norm with √(E·K), and the least squared error with K, the
plain sum of the chosen parts (MoEfication, 2110.01786). E / K is LLaMA-MoE's (2406.16554), which keeps none of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FORMULAS = {
    "published": lambda experts, chosen: experts / chosen,
    "sum": lambda experts, chosen: float(chosen),
    "norm": lambda experts, chosen: math.sqrt(experts * chosen),
    "mean": lambda experts, chosen: float(experts),
}
SCALES = (*FORMULAS, "calibrate")


def output_scale(scale: float | str | None, experts: int, chosen: int) -> float | None:
    """The factor s; None where it is a vector that text has to tell, as for ``calibrate``."""
    if isinstance(scale, str) or scale is None:
        formula = FORMULAS.get(scale or "published")
        return None if formula is None else formula(experts, chosen)
    return scale


def calibrated(wanted: Tensor, found: Tensor) -> Tensor:
    """Deviation of each channel of wanted (T, H) over that of found (T, H): (H,) float32; 1 where either is 0."""
    import torch  # not before: what the scales are called is asked for earlier

    wanted, found = wanted.float().std(dim=0), found.float().std(dim=0)
    return torch.where((wanted > 0) & (found > 0), wanted / found, 1.0)
