"""The probes by name, and how a person's choice of names becomes probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from moebed.errors import ConfigError, did_you_mean
from moebed.names import PROBES as KNOWN
from moebed.views.layer import Need
from probes.activations import Activations
from probes.balance import Balance
from probes.capacity import Capacity
from probes.chosen_vs_rest import ChosenVsRest
from probes.coactivation import Coactivation
from probes.committee import Committee
from probes.contract import Probe, in_order
from probes.control_content import ControlContent
from probes.domain_purity import DomainPurity
from probes.domain_share import DomainShare
from probes.expert_geometry import ExpertGeometry
from probes.expert_importance import ExpertImportance
from probes.expert_lens import ExpertLens
from probes.expert_outputs import ExpertOutputs
from probes.expert_projection import ExpertProjection
from probes.gate_projection import GateProjection
from probes.gate_similarity import GateSimilarity
from probes.interventions import Interventions
from probes.keep_k import KeepK
from probes.layer_diversity import LayerDiversity
from probes.matrix_similarity import MatrixSimilarity
from probes.neuron_matching import NeuronMatching
from probes.neuron_similarity import NeuronSimilarity
from probes.norm_origin import NormOrigin
from probes.norm_vs_score import NormVsScore
from probes.observed_vs_needed import ObservedVsNeeded
from probes.prediction import Logits, Prediction
from probes.random_routes import RandomRoutes
from probes.repeats import Repeats
from probes.router_coupling import RouterCoupling
from probes.router_state import RouterState
from probes.routing import RoutingMap
from probes.routing_ladder import RoutingLadder
from probes.saturation import Saturation
from probes.strength_vs_score import StrengthVsScore
from probes.super_experts import SuperExperts
from probes.traffic import Traffic
from probes.vocabulary import Vocabulary
from probes.weight_vs_output import WeightVsOutput

_WITH_TEXT: tuple[type[Probe], ...] = (
    Prediction,
    Logits,
    Balance,
    RouterState,
    RoutingMap,
    DomainShare,
    DomainPurity,
    Committee,
    Repeats,
    Coactivation,
    Vocabulary,
    Traffic,
    Capacity,
    Saturation,
    NormVsScore,
    NormOrigin,
    StrengthVsScore,
    ExpertOutputs,
    ChosenVsRest,
    WeightVsOutput,
    LayerDiversity,
    Activations,
    ExpertImportance,
    Interventions,
    KeepK,
    SuperExperts,
    RoutingLadder,
    ExpertLens,
    ControlContent,
    ObservedVsNeeded,
    RandomRoutes,
)
_STATIC: tuple[type[Probe], ...] = (
    MatrixSimilarity,
    NeuronSimilarity,
    NeuronMatching,
    GateSimilarity,
    GateProjection,
    RouterCoupling,
    ExpertProjection,
    ExpertGeometry,
)
PROBES: dict[str, type[Probe]] = {probe.name: probe for probe in _WITH_TEXT + _STATIC}
STATIC_PROBES: tuple[str, ...] = tuple(probe.name for probe in _STATIC)  # these need weights alone
# Large to store; forward passes beside that of the text.
BY_NAME_ONLY = (
    "logits",
    "expert_importance",
    "interventions",
    "keep_k",
    "super_experts",
    "routing_ladder",
    "expert_lens",
    "control_content",
    "observed_vs_needed",
    "random_routes",
)
TRAINING_ONLY = ("saturation",)  # follows a model over steps
# What a training run measures unasked, every few hundred steps: nothing that takes longer than a step or two.
DEFAULT_PROBES: tuple[str, ...] = (
    "balance",
    "router_state",
    "routing",
    "domain_share",
    "repeats",
    "coactivation",
    "saturation",
    "norm_vs_score",
    "matrix_similarity",
    "gate_similarity",
)


Own = TypeVar("Own", bound=type[Probe])


def register(probe: Own) -> Own:
    """Class decorator: lists of probes may name this one, by its ``name``.

    Raises:
        ConfigError: It has no name or no question, or another probe has the name.
    """
    for attribute in ("name", "question"):
        if not isinstance(getattr(probe, attribute, None), str):
            raise ConfigError(f"probe {probe.__qualname__} has no {attribute}; give it one, a text, in its class")
    for attribute in ("needs", "wants"):
        asked = getattr(probe, attribute, None)
        if not isinstance(asked, frozenset) or not all(isinstance(one, Need) for one in asked):
            raise ConfigError(
                f"probe {probe.name!r}: {attribute} is {asked!r}; write it such as frozenset({{Need.ROUTING}})"
            )
    if probe.name in PROBES:
        raise ConfigError(f"probe {probe.name!r} is {PROBES[probe.name].__qualname__} already; choose another name")
    PROBES[probe.name] = probe
    return probe


Settings = Mapping[str, Mapping[str, Any]]  # of probes, by the probe's name and the setting's


def make_probes(names: Sequence[str], options: Settings | None = None) -> list[Probe]:
    """A fresh object of each of these probes, with its settings where some are given.

    Raises:
        ConfigError: Settings are given of a probe that does not run, or one is unknown or of another kind.
    """
    options = options or {}
    for name in options:
        if name not in names:
            hint = did_you_mean(name, names, f"those that do are {', '.join(names)}")
            raise ConfigError(f"probes: options are given for {name!r}, which does not run; {hint}")
    probes = []
    for name in names:
        probe, given = PROBES[name](), options.get(name, {})
        known = {one.name: one.default for one in fields(probe.Options)}
        if not isinstance(given, Mapping):
            raise ConfigError(f"probes: the options of {name} are {given!r}; give them by name, such as {{ranks: 8}}")
        for key in given:
            if key not in known:
                hint = did_you_mean(key, known, f"it has {', '.join(known) or 'none'}")
                raise ConfigError(f"probes: {name} has no option {key!r}; {hint}")
        # A list of one number, such as layers=3, is read from a command line or a file as the number.
        probe.options = probe.Options(
            **{
                key: str(of) if type(known[key]) is str and type(of) in (int, float) else of
                for key, of in given.items()
            }
        )
        probes.append(probe)
    return probes


def resolve_probes(names: Sequence[str] | None) -> tuple[str, ...]:
    """Probe names a person asked for, checked: None means the default ones.

    ``all`` is every one that is not in ``BY_NAME_ONLY``; those can be named beside it. What a probe takes its numbers
    from comes with it.

    Raises:
        ConfigError: A name is unknown (the message offers the nearest one), or what ``in_order`` refuses.
    """
    if names is None:
        return DEFAULT_PROBES
    for name in names:
        KNOWN.require(name, "probes", also=("all",))
    if "all" in names:
        return tuple(name for name in PROBES if name in names or name not in BY_NAME_ONLY)
    return in_order(names, PROBES)
