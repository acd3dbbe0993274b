"""The probes by name, and how a person's choice of names becomes probes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from moebed.errors import ConfigError
from probes.balance import Balance
from probes.base import Probe
from probes.gate_similarity import GateSimilarity
from probes.matrix_similarity import MatrixSimilarity
from probes.norm_vs_score import NormVsScore
from probes.router_state import RouterState
from probes.routing import RoutingMap

PROBES: dict[str, type[Probe]] = {
    probe.name: probe for probe in (Balance, RouterState, RoutingMap, NormVsScore, MatrixSimilarity, GateSimilarity)
}
DEFAULT_PROBES: tuple[str, ...] = (
    "balance",
    "router_state",
    "routing",
    "norm_vs_score",
    "matrix_similarity",
    "gate_similarity",
)


def resolve_probes(names: Sequence[str] | None) -> tuple[str, ...]:
    """Probe names a person asked for, checked: None means the default ones, ``all`` every one there is.

    Raises:
        ConfigError: A name is unknown; the message offers the nearest one.
    """
    if names is None:
        return DEFAULT_PROBES
    if "all" in names:
        return tuple(PROBES)
    for name in names:
        if name not in PROBES:
            near = difflib.get_close_matches(name, PROBES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose all or some of {', '.join(PROBES)}"
            raise ConfigError(f"probes: unknown probe {name!r}; {hint}")
    return tuple(dict.fromkeys(names))
