"""GLM-4.5 and GLM-4.5-Air (2508.06471; model_type glm4_moe): half of each head turns."""

from typing import Any

from moebed.checkpoints.families import fine_grained
from moebed.checkpoints.families.base import Family, Settings
from moebed.checkpoints.families.layout import ATTENTION_BIAS, EXPERTS, QK_NORM
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig


def _decode(settings: Settings) -> dict[str, Any]:
    normed = settings["use_qk_norm"]
    if not isinstance(normed, bool):
        raise ConfigError(f"use_qk_norm is {normed!r}; it must be true or false")
    return {**fine_grained.decode(settings), "qk_norm": "head" if normed else "none"}


def _encode(config: ModelConfig) -> dict[str, Any]:
    return {**fine_grained.encode(config), "use_qk_norm": config.qk_norm == "head"}


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    tensors={**fine_grained.BIASED_TENSORS, **ATTENTION_BIAS, **QK_NORM},
    experts=EXPERTS,
    fields={**fine_grained.FIELDS, "attention_bias": "attention_bias"},
    defaults={
        **fine_grained.DEFAULTS,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-5,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "attention_bias": False,
    },
    reads=fine_grained.READS,
    harmless=("num_mtp_layers", "num_nextn_predict_layers"),
    same={"num_local_experts": "n_routed_experts"},
    further=fine_grained.FURTHER_LAYER,
    partial_rotary=lambda settings: 0.5,
    decode=_decode,
    encode=_encode,
)
