"""ERNIE 4.5 (model_type ernie4_5_moe): softmax scores and a bias on the choice; neighbours turn together."""

from typing import Any

from moebed.checkpoints.families.base import Family, Settings, Stored, require_count
from moebed.checkpoints.families.layout import DENSE_FFN, EXPERTS, LLAMA, ROUTER, shared_expert
from moebed.checkpoints.families.meaning import one_number
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig


def _decode(settings: Settings) -> dict[str, Any]:
    layers, experts = settings["num_hidden_layers"], require_count(settings, "moe_num_experts")
    start, every = require_count(settings, "moe_layer_start_index", 0), require_count(settings, "moe_layer_interval")
    end = settings["moe_layer_end_index"]
    if isinstance(end, bool) or not isinstance(end, int):
        raise ConfigError(f"moe_layer_end_index is {end!r}; it must be a layer, or -1 for the last one")
    end = layers - 1 if end == -1 else end
    return {
        "num_experts": [experts if (i + 1) % every == 0 and start <= i <= end else 0 for i in range(layers)],
        "num_shared_experts": require_count(settings, "moe_num_shared_experts", 0),
    }


def _encode(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe_layers
    if not moe:
        raise ConfigError("model config: no layer has experts; write it as a dense family, such as llama")
    return {
        "moe_num_experts": one_number(config, "num_experts"),
        "moe_num_shared_experts": one_number(config, "num_shared_experts"),
        "moe_layer_start_index": moe[0],
        "moe_layer_end_index": moe[-1],
        "moe_layer_interval": moe[1] - moe[0] if len(moe) > 1 else 1,
        # The class wants a width for dense layers, also where there are none.
        "intermediate_size": config.intermediate_size or one_number(config, "moe_intermediate_size"),
    }


ERNIE = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    tensors={
        **LLAMA,
        **DENSE_FFN,
        **ROUTER,
        **shared_expert("shared_experts"),
        "layers.{i}.mlp.router.expert_bias": Stored(
            "model.layers.{i}.mlp.moe_statics.e_score_correction_bias", before=(1,)
        ),
    },
    experts=EXPERTS,
    fields={
        "num_experts_per_tok": "moe_k",
        "moe_intermediate_size": "moe_intermediate_size",
        "intermediate_size": "intermediate_size",
    },
    fixed={"router": "softmax_bias_topk", "norm_topk_prob": True, "rope_interleave": True},
    defaults={
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
    },
    accepts={"use_bias": (False, None), "moe_norm_min": (1e-12,)},
    same={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
    other_names={"layers.{i}.mlp.router.expert_bias": "model.layers.{i}.mlp.gate.moe_statics.e_score_correction_bias"},
    further="mtp",
    decode=_decode,
    encode=_encode,
)
