"""What a setting of a model means: whether two configs say the same model, and what checkpoints keep of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from moebed.model.config import ModelConfig
from moebed.model.routers import ROUTERS

PER_LAYER = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts")

# How a model is trained or computed, not what it is: a checkpoint does not keep these. The last one is a router's.
NOT_IN_CHECKPOINTS = frozenset(
    {
        "router_aux_loss_coef",
        "router_aux_loss_scope",
        "router_z_loss_coef",
        "output_diversity_loss_coef",
        "weight_diversity_loss_coef",
        "output_orthogonality_loss_coef",
        "probability_variance_loss_coef",
        "router_orthogonality_loss_coef",
        "router_orthogonality",
        "router_coupling_loss_coef",
        "router_coupling_alpha",
        "router_coupling_gradient",
        "locality_loss_coef",
        "locality_epsilon",
        "expert_ranks",
        "ranks_per_node",
        "initializer_range",
        "base_hidden_size",
        "base_moe_intermediate_size",
        "experts_backend",
        "attention_backend",
        "bias_update_rate",
    }
)


def same_setting(config: ModelConfig, other: Mapping[str, Any], name: str) -> bool:
    """Whether a field means in config what it means in the plain data of another one."""
    return _plain(config, name, config.to_dict()[name]) == _plain(config, name, other[name])


def beside_experts(config: ModelConfig, other: ModelConfig) -> dict[str, str]:
    """What a model has beside its experts that another lacks, and that begins by adding nothing: fields, with words."""
    found: dict[str, str] = {}
    if config.hyper_experts is not None and other.hyper_experts is None:
        found["hyper_experts"] = f"adapters, {config.hyper_experts.adapters}"
    if any(config.layer(i).num_shared_experts for i in config.moe_layers) and not any(
        other.layer(i).num_shared_experts for i in other.moe_layers
    ):
        fields = ("num_shared_experts", "shared_expert_intermediate_size", "shared_expert_gate")
        found |= dict.fromkeys(fields, "shared experts")
    return found


def _plain(config: ModelConfig, name: str, value: Any) -> Any:
    """A field's value in a model such as config: the same where it means the same, None where it means nothing."""
    layers, moe = config.num_hidden_layers, config.moe_layers
    if name == "attention_multiplier":
        return (config.head_dim or 1) ** -0.5 if value is None else value
    if name == "intermediate_size" and len(moe) == layers:
        return None
    if name in ("norm_topk_prob", "router", "router_options") and not moe:
        return None
    if name == "shared_expert_gate" and not any(config.layer(i).num_shared_experts for i in moe):
        return None
    if name == "router":
        return _evaluated_as(value)
    if name == "router_options":
        kept = {one.name for one in fields(ROUTERS[_evaluated_as(config.router)].Options)} - NOT_IN_CHECKPOINTS
        return {key: one for key, one in value.items() if key in kept}
    if name not in PER_LAYER:
        return value
    values = value if isinstance(value, list) else [value] * layers
    return values if name == "num_experts" else [values[i] for i in moe]


def _evaluated_as(router: str) -> str:
    """The rule by which a model is used that was trained with a router."""
    return ROUTERS[router].evaluated_as or router


def one_number(config: ModelConfig, name: str) -> Any:
    """The value of a per-layer field in the layers that have experts; the first one, if they differ."""
    value = getattr(config, name)
    if name in PER_LAYER and isinstance(value, list):
        return value[config.moe_layers[0]] if config.moe_layers else 0
    return value
