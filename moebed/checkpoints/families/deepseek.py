"""DeepSeekMoE-16B (2401.06066; model_type deepseek, the first version): fine-grained experts and shared ones."""

from typing import Any

from moebed.checkpoints.families.base import Family, Settings, require_count
from moebed.checkpoints.families.layout import DENSE_FFN, EXPERTS, LLAMA, ROUTER, shared_expert
from moebed.checkpoints.families.meaning import one_number
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig


def _decode(settings: Settings) -> dict[str, Any]:
    if settings["n_routed_experts"] is None:  # a dense model, as the class has it
        return {"num_experts": 0}
    experts = require_count(settings, "n_routed_experts")
    first, every = require_count(settings, "first_k_dense_replace", 0), require_count(settings, "moe_layer_freq")
    per_token = require_count(settings, "num_experts_per_tok")
    shared = 0 if settings["n_shared_experts"] is None else require_count(settings, "n_shared_experts", 0)
    if not isinstance(settings["norm_topk_prob"], bool):
        raise ConfigError(f"norm_topk_prob is {settings['norm_topk_prob']!r}; it must be true or false")
    return {
        "num_experts": [experts if i >= first and i % every == 0 else 0 for i in range(settings["num_hidden_layers"])],
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": require_count(settings, "moe_intermediate_size"),
        "num_shared_experts": shared,
        "norm_topk_prob": settings["norm_topk_prob"] and per_token > 1,  # the weight of one expert is left as it is
    }


def _encode(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe_layers
    if not moe:
        raise ConfigError("model config: no layer has experts; write it as a dense family, such as llama")
    return {
        "n_routed_experts": one_number(config, "num_experts"),
        "n_shared_experts": one_number(config, "num_shared_experts") or None,
        "first_k_dense_replace": moe[0],
        "moe_layer_freq": moe[1] - moe[0] if len(moe) > 1 else 1,
        "num_experts_per_tok": one_number(config, "num_experts_per_tok"),
        "moe_intermediate_size": one_number(config, "moe_intermediate_size"),
        "norm_topk_prob": config.norm_topk_prob,
        "scoring_func": "softmax",
        # The class wants a width for dense layers, also where there are none.
        "intermediate_size": config.intermediate_size,
    }


DEEPSEEK = Family(
    model_type="deepseek",
    architecture="DeepseekForCausalLM",
    tensors={**LLAMA, **DENSE_FFN, **ROUTER, **shared_expert("shared_experts")},
    experts=EXPERTS,
    fields={"intermediate_size": "intermediate_size"},
    defaults={
        "rms_norm_eps": 1e-6,
        "norm_topk_prob": False,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 0,
        "n_shared_experts": None,
        "n_routed_experts": None,
        "intermediate_size": None,
    },
    accepts={"scoring_func": (None, "softmax")},
    reads=("num_experts_per_tok", "moe_intermediate_size"),
    harmless=("aux_loss_alpha", "seq_aux", "ep_size"),
    in_transformers=False,
    decode=_decode,
    encode=_encode,
    # Its shares add up to 1, as ours do; by itself it would take them of each sequence.
    balancing=lambda config: {
        "aux_loss_alpha": config.router_aux_loss_coef,
        "seq_aux": config.router_aux_loss_scope == "sequence",
    },
)
