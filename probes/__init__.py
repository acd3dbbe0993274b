"""Probes: what do the experts and the router of an MoE do? One file an analysis, and the registry of them.

May import ``probes.figures`` and what lies below.

Importing the package is cheap: the names below are loaded on first use.
"""

from moebed.lazy import loaded_on_use

_LAZY = {
    "PROBES": "probes.registry",
    "DEFAULT_PROBES": "probes.registry",
    "register": "probes.registry",
    "Probe": "probes.contract",
    "ProbeResult": "probes.contract",
    "Headline": "probes.contract",
    "run_probes": "probes.running.driver",
    "ProbeCallback": "probes.running.callback",
    "write_report": "probes.report.page",
    "load": "probes.running.interactive",
    "probe": "probes.running.interactive",
    "Finding": "probes.running.interactive",
}
__all__ = sorted(_LAZY)
__getattr__ = loaded_on_use(__name__, _LAZY)
