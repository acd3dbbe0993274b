"""Every router by the name that a config gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from moebed.errors import ConfigError
from moebed.model.config import ROUTER_NAMES, LayerConfig, ModelConfig
from moebed.model.routers.autonomy import Autonomy
from moebed.model.routers.competition import CompeteSMoE, CompeteSMoEv2, ExpertNorm
from moebed.model.routers.contract import Router
from moebed.model.routers.controls import Balanced, FactorisedGate, FrozenGate, Hash
from moebed.model.routers.relu import ReLU
from moebed.model.routers.sigmoid import SigmoidTopK
from moebed.model.routers.softmax import SoftmaxTopK

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
    router = ROUTERS[config.router](config, layer)
    for parameter in router.parameters():
        # What a router has written into it since is what it begins with.
        if getattr(parameter, "is_drawn", False) and not parameter.is_inference() and parameter._version:
            del parameter.is_drawn  # type: ignore[attr-defined]
    return router


def untaught(config: ModelConfig) -> str | None:
    """Why the language-model loss teaches a model's router nothing, if so: its one weight is divided by itself."""
    alone = [i for i in config.moe_layers if config.layer(i).num_experts_per_tok == 1 < config.layer(i).num_experts]
    if not alone or not config.norm_topk_prob or ROUTERS[config.router].other_teacher:
        return None
    where = (
        "" if alone == config.moe_layers else f" in layer{'s' if len(alone) > 1 else ''} {', '.join(map(str, alone))}"
    )
    return (
        f"num_experts_per_tok is 1{where} and norm_topk_prob divides that one weight by itself: it is 1 whatever "
        f"router {config.router} says, so the language-model loss teaches the router nothing; set norm_topk_prob: false"
    )


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
