"""What DeepSeek-V3 and models made after it say of their experts: dense layers first, shared experts, groups, a scale.

Their tensors have DeepSeek's names as well.
"""

from __future__ import annotations

from typing import Any

from moebed.checkpoints.families.base import Settings, require_count
from moebed.checkpoints.families.layout import DENSE_FFN, LLAMA, ROUTER, shared_expert
from moebed.checkpoints.families.meaning import one_number
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig

SELECTION_BIAS = "model.layers.{i}.mlp.gate.e_score_correction_bias"
TENSORS = {**LLAMA, **DENSE_FFN, **ROUTER, **shared_expert("shared_experts")}
BIASED_TENSORS = {**TENSORS, "layers.{i}.mlp.router.expert_bias": SELECTION_BIAS}
FIELDS = {
    "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
    "intermediate_size": "intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
}
DEFAULTS = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0}
READS = ("n_routed_experts", "n_shared_experts")
# The layer after the last one predicts a further token.
FURTHER_LAYER = r"^model\.layers\.{layers}\."


def decode(settings: Settings) -> dict[str, Any]:
    """Experts of each layer, shared experts, and the choice by sigmoid scores and a bias."""
    experts, first = require_count(settings, "n_routed_experts"), require_count(settings, "first_k_dense_replace", 0)
    scale = settings["routed_scaling_factor"]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale < 0:
        raise ConfigError(f"routed_scaling_factor is {scale!r}; it must be a number, 0 or more")
    groups, best = require_count(settings, "n_group"), require_count(settings, "topk_group")
    chosen = require_count(settings, "num_experts_per_tok")
    if experts % groups or best > groups or chosen > experts // groups * best:
        raise ConfigError(
            f"n_routed_experts {experts} in n_group {groups}, of which topk_group {best} hold the num_experts_per_tok "
            f"{chosen} of a token: that cannot be"
        )
    return {
        "num_experts": [experts if i >= first else 0 for i in range(settings["num_hidden_layers"])],
        "num_shared_experts": require_count(settings, "n_shared_experts"),
        "router": "sigmoid_topk",
        "router_options": {
            "n_group": groups,
            "topk_group": best,
            "routed_scaling_factor": scale,
        },
    }


def encode(config: ModelConfig) -> dict[str, Any]:
    """What :func:`decode` reads."""
    moe, options = config.moe_layers, config.router_options
    if not moe:
        raise ConfigError("model config: no layer has experts; write it as a dense family, such as llama")
    shared = config.layer(moe[0]).num_shared_experts
    if not shared:
        raise ConfigError("model config: num_shared_experts is 0, but a checkpoint of this family has a shared expert")
    return {
        "n_routed_experts": one_number(config, "num_experts"),
        "n_shared_experts": shared,
        "first_k_dense_replace": moe[0],
        "n_group": getattr(options, "n_group", 1),
        "topk_group": getattr(options, "topk_group", 1),
        "routed_scaling_factor": getattr(options, "routed_scaling_factor", 1.0),
        # The class wants a width for dense layers, also where there are none.
        "intermediate_size": config.intermediate_size or one_number(config, "moe_intermediate_size"),
    }
