"""Every router by the name that a config gives it."""

from __future__ import annotations

from moebed.config import LayerConfig, ModelConfig
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
