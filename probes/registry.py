"""The probes by name, and how a person's choice of names becomes probes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from moebed.errors import ConfigError
from probes.balance import Balance
from probes.base import Probe
from probes.expert_geometry import ExpertGeometry
from probes.expert_projection import ExpertProjection
from probes.gate_projection import GateProjection
from probes.gate_similarity import GateSimilarity
from probes.matrix_similarity import MatrixSimilarity
from probes.neuron_matching import NeuronMatching
from probes.neuron_similarity import NeuronSimilarity
from probes.norm_vs_score import NormVsScore
from probes.router_state import RouterState
from probes.routing import RoutingMap

_WITH_TEXT: tuple[type[Probe], ...] = (Balance, RouterState, RoutingMap, NormVsScore)
_STATIC: tuple[type[Probe], ...] = (
    MatrixSimilarity,
    NeuronSimilarity,
    NeuronMatching,
    GateSimilarity,
    GateProjection,
    ExpertProjection,
    ExpertGeometry,
)
PROBES: dict[str, type[Probe]] = {probe.name: probe for probe in _WITH_TEXT + _STATIC}
STATIC_PROBES: tuple[str, ...] = tuple(probe.name for probe in _STATIC)  # these need weights alone
# What a training run measures unasked: neuron_matching and expert_geometry take minutes a layer of a large model.
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

    What a probe takes its numbers from comes with it.

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
    return tuple(dict.fromkeys(one for name in names for one in (*PROBES[name].sources, name)))
