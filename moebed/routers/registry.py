"""Every router by the name that a config gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from moebed.config import ROUTER_NAMES, LayerConfig, ModelConfig
from moebed.errors import ConfigError
from moebed.routers.autonomy import Autonomy
from moebed.routers.competition import CompeteSMoE, CompeteSMoEv2, ExpertNorm
from moebed.routers.contract import Router
from moebed.routers.controls import Balanced, FactorisedGate, FrozenGate, Hash
from moebed.routers.relu import ReLU
from moebed.routers.sigmoid import SigmoidTopK
from moebed.routers.softmax import SoftmaxTopK

ROUTERS: dict[str, type[Router]] = {
    "softmax_topk": SoftmaxTopK,
    "sigmoid_topk": SigmoidTopK,
    "expert_norm": ExpertNorm,
    "competesmoe": CompeteSMoE,
    "competesmoe_v2": CompeteSMoEv2,
    "autonomy": Autonomy,
    "relu": ReLU,
    "random": FrozenGate,
    "hash": Hash,
    "factorised_gate": FactorisedGate,
    "balanced": Balanced,
}


def build_router(config: ModelConfig, layer: LayerConfig) -> Router:
    """The router that ``config.router`` names, which the config has checked."""
    return ROUTERS[config.router](config, layer)


Rule = TypeVar("Rule", bound=type[Router])


def register(name: str) -> Callable[[Rule], Rule]:
    """Class decorator: ``model.config.router`` may name this router of one's own.

    Raises:
        ConfigError: The name is taken by another router.
    """

    def add(rule: Rule) -> Rule:
        if name in ROUTERS:
            raise ConfigError(f"router {name!r} is {ROUTERS[name].__qualname__} already; choose another name")
        ROUTERS[name] = rule
        ROUTER_NAMES.append(name)
        return rule

    return add
