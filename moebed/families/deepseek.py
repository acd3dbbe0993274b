"""DeepSeekMoE-16B (2401.06066; model_type deepseek, the first version): fine-grained experts and shared ones."""

from typing import Any

from moebed.config import ModelConfig
from moebed.errors import ConfigError
from moebed.families.base import Family, Settings, one_number
from moebed.families.layout import DENSE_FFN, EXPERTS, LLAMA, ROUTER, shared_expert


def _decode(settings: Settings) -> dict[str, Any]:
    experts, first, every = settings["n_routed_experts"], settings["first_k_dense_replace"], settings["moe_layer_freq"]
    layers = range(settings["num_hidden_layers"])
    return {
        "num_experts": [experts if experts and i >= first and i % every == 0 else 0 for i in layers],
        "num_shared_experts": settings["n_shared_experts"] or 0,
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
        "scoring_func": "softmax",
        # The class wants a width for dense layers, also where there are none.
        "intermediate_size": config.intermediate_size,
    }


DEEPSEEK = Family(
    model_type="deepseek",
    architecture="DeepseekForCausalLM",
    tensors={**LLAMA, **DENSE_FFN, **ROUTER, **shared_expert("shared_experts")},
    experts=EXPERTS,
    fields={
        "num_experts_per_tok": "num_experts_per_tok",
        "moe_intermediate_size": "moe_intermediate_size",
        "intermediate_size": "intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
    },
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
    decode=_decode,
    encode=_encode,
)
