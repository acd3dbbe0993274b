"""Triton grouped-expert kernels: routing, fused products, combine, and their gradients, behind ``expert_mlp``.

Importing the package imports neither torch nor Triton; the first use of a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton_kernels.mlp import expert_mlp
    from triton_kernels.mlp.checks import why_not
    from triton_kernels.shipped import SHIPPED

__all__ = ["SHIPPED", "expert_mlp", "why_not"]

_HOMES = {
    "SHIPPED": "triton_kernels.shipped",
    "expert_mlp": "triton_kernels.mlp",
    "why_not": "triton_kernels.mlp.checks",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
