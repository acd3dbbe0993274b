"""Probes: what do the experts and the router of an MoE do?

Importing the package is cheap: the names below are loaded on first use.
"""

from importlib import import_module
from typing import Any

_LAZY = {
    "PROBES": "probes.registry",
    "DEFAULT_PROBES": "probes.registry",
    "register": "probes.registry",
    "Probe": "probes.base",
    "ProbeResult": "probes.base",
    "Headline": "probes.base",
    "run_probes": "probes.driver",
    "ProbeCallback": "probes.callback",
    "write_report": "probes.report",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'probes' has no attribute {name!r}")
