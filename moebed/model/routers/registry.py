"""Every router by the name that a config gives it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Union, get_type_hints

from moebed.errors import ConfigError
from moebed.model.config import LayerConfig, ModelConfig, RouterOptions, require_known
from moebed.model.routers.autonomy import Autonomy
from moebed.model.routers.competition import CompeteSMoE, CompeteSMoEv2, ExpertNorm
from moebed.model.routers.contract import Router
from moebed.model.routers.controls import Balanced, FactorisedGate, FrozenGate, Hash
from moebed.model.routers.document_pool import DocumentPool
from moebed.model.routers.grap import GrAP
from moebed.model.routers.groups import GroupLimitedTopK
from moebed.model.routers.kmeans import KMeans
from moebed.model.routers.locmoe_plus import LocMoEPlus
from moebed.model.routers.noisy import NoisyTopK
from moebed.model.routers.quantile import Quantile
from moebed.model.routers.reference import AntiOracle, Oracle, OracleHash
from moebed.model.routers.relu import ReLU
from moebed.model.routers.sigmoid import SigmoidTopK, SoftmaxBiasTopK
from moebed.model.routers.softmax import SoftmaxTopK
from moebed.model.routers.sparsemixer import SparseMixer
from moebed.model.routers.threshold import ExpertChoice, Threshold

ROUTERS: dict[str, type[Router]] = {
    "softmax_topk": SoftmaxTopK,
    "sigmoid_topk": SigmoidTopK,
    "softmax_bias_topk": SoftmaxBiasTopK,
    "group_limited_topk": GroupLimitedTopK,
    "sparsemixer": SparseMixer,
    "expert_norm": ExpertNorm,
    "competesmoe": CompeteSMoE,
    "competesmoe_v2": CompeteSMoEv2,
    "autonomy": Autonomy,
    "relu": ReLU,
    "noisy_topk": NoisyTopK,
    "grap": GrAP,
    "locmoe_plus": LocMoEPlus,
    "quantile": Quantile,
    "threshold": Threshold,
    "expert_choice": ExpertChoice,
    "kmeans": KMeans,
    "random": FrozenGate,
    "hash": Hash,
    "factorised_gate": FactorisedGate,
    "balanced": Balanced,
    "document_pool": DocumentPool,
    "oracle": Oracle,
    "oracle_hash": OracleHash,
    "anti_oracle": AntiOracle,
}


def build_router(config: ModelConfig, layer: LayerConfig) -> Router:
    """The router that ``config.router`` names, which the config has checked."""
    router = ROUTERS[config.router](config, layer)
    for parameter in router.parameters():
        # What a router has written into it since is what it begins with.
        if getattr(parameter, "is_drawn", False) and not parameter.is_inference() and parameter._version:
            del parameter.is_drawn  # type: ignore[attr-defined]
    return router


def options_of(config: ModelConfig) -> RouterOptions:
    """The Options of a config's router, of settings among which there may be other routers', which are passed over.

    Raises:
        ConfigError: A setting is unknown to every router, or out of bounds, or one that has no default is not given.
    """
    given: RouterOptions | Mapping[str, Any] = config.router_options
    if isinstance(given, RouterOptions):
        given = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    found = {**given, **(given.get("own") or {})}  # as settings of a router of one's own were once written
    found.pop("own", None)
    require_known(found, _settings(), "router_options")
    kind = ROUTERS[config.router].Options
    wanted = {field.name: found.get(field.name) for field in dataclasses.fields(kind)}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    for field in dataclasses.fields(kind):
        if field.name not in wanted and field.default is field.default_factory is dataclasses.MISSING:
            advice = field.metadata.get("advice") or (lambda _: f"{config.router} has no default for it")
            raise ConfigError(
                f"model config: router {config.router} needs router_options.{field.name}; {advice(config)}"
            )
    return kind(**wanted)


def all_options() -> type[RouterOptions]:
    """A dataclass of every known router's settings, each with its sentence: what ``--help`` shows."""
    fields: list[tuple[str, Any, Any]] = []
    lines = []
    for key, users in _settings().items():
        defaults = [field.default for field, _ in users.values()]
        same = all(default == defaults[0] for default in defaults) and defaults[0] is not dataclasses.MISSING
        kind: Any = Union[tuple(hint for _, hint in users.values())]  # noqa: UP007
        fields.append((key, kind, defaults[0]) if same else (key, kind | None, None))
        said: dict[str, list[str]] = {}
        for name, (field, _) in users.items():
            said.setdefault(field.metadata.get("sentence", "Not described"), []).append(name)
        lines.append(" ".join(f"{words} ({', '.join(names)})" for words, names in said.items()))
    fields.append(("own", dict[str, Any] | None, None))
    lines.append("How settings of a router of one's own were once written.")
    doc = "".join(f"\n    {field[0]}: {line}" for field, line in zip(fields, lines, strict=True))
    doc = f"Settings of the router.\n\nArgs:{doc}\n"
    return dataclasses.make_dataclass("AllOptions", fields, bases=(RouterOptions,), namespace={"__doc__": doc})


def _settings() -> dict[str, dict[str, tuple[dataclasses.Field[Any], Any]]]:
    """Fields and types of every router's settings: by the setting's name, then by the router's."""
    found: dict[str, dict[str, tuple[dataclasses.Field[Any], Any]]] = {}
    for name, rule in ROUTERS.items():
        hints = get_type_hints(rule.Options)
        for field in dataclasses.fields(rule.Options):
            found.setdefault(field.name, {})[name] = field, hints[field.name]
    return found


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


def cautions(config: ModelConfig) -> list[str]:
    """What a person should know of a config's router before it is trained."""
    said = [untaught(config), ROUTERS[config.router].caution(config)]
    if config.moe_layers and all(config.layer(index).num_experts_per_tok == 1 for index in config.moe_layers):
        said += [
            f"{name} compares a token's experts with each other, but num_experts_per_tok is 1: the loss is 0"
            for name in ("output_diversity_loss_coef", "output_orthogonality_loss_coef")
            if getattr(config, name)
        ]
    if config.locality_loss_coef and config.expert_ranks == config.ranks_per_node:
        said.append(
            f"locality_loss_coef is {config.locality_loss_coef:g}, but expert_ranks {config.expert_ranks} with "
            f"ranks_per_node {config.ranks_per_node} are one node, on which the loss is 0"
        )
    return [one for one in said if one]


Rule = TypeVar("Rule", bound=type[Router])


def register(name: str) -> Callable[[Rule], Rule]:
    """Class decorator: ``model.config.router`` may name this router of one's own.

    Raises:
        ConfigError: The name is taken by another router, or it cannot be called as a router is.
    """

    def add(rule: Rule) -> Rule:
        try:
            inspect.signature(rule.forward).bind(None, "hidden_states", "experts", "context")
        except TypeError as error:
            raise ConfigError(
                f"router {name!r}: forward of {rule.__qualname__} is to take (self, hidden_states, experts, "
                f"context=None), and does not ({error})"
            ) from error
        if name in ROUTERS:
            raise ConfigError(f"router {name!r} is {ROUTERS[name].__qualname__} already; choose another name")
        ROUTERS[name] = rule
        return rule

    return add
