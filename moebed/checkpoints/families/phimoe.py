"""Phi-3.5-MoE (2404.14219; model_type phimoe): LayerNorm, biases, SparseMixer's choice, two magnitudes of LongRoPE."""

from typing import Any

from moebed.checkpoints.families.base import Family, Settings
from moebed.checkpoints.families.layout import ALL_ATTENTION_BIAS, BIASED_ATTENTION, NORM_BIAS, NUM_LOCAL_EXPERTS
from moebed.checkpoints.families.mixtral import MIXTRAL
from moebed.checkpoints.families.rope import MAGNITUDES, rope_block
from moebed.model.config import ModelConfig
from moebed.model.rope_config import positive

_CHOSEN = 2  # the class chooses two, whatever it is told


def _decode(settings: Settings) -> dict[str, Any]:
    return {"router_options": {"router_jitter_noise": settings["router_jitter_noise"]}}


def _encode(config: ModelConfig) -> dict[str, Any]:
    noise = getattr(config.router_options, "router_jitter_noise", 0.01)
    return {"router_jitter_noise": noise, "input_jitter_noise": 0.0}


def _uncomputed(settings: Settings) -> list[str]:
    found = []
    if settings["num_experts_per_tok"] != _CHOSEN:
        found.append(f"num_experts_per_tok is {settings['num_experts_per_tok']!r}; phimoe chooses {_CHOSEN} experts")
    key, block, kind = rope_block(settings)
    if kind != "default" and not (kind == "longrope" and all(positive(block.get(name)) for name in MAGNITUDES)):
        found.append(f"{key} is {dict(block)!r}; phimoe has longrope with {', '.join(MAGNITUDES)}, or none")
    return found


PHIMOE = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    tensors={
        **MIXTRAL.tensors,
        **ALL_ATTENTION_BIAS,
        **NORM_BIAS,
        "lm_head.bias": "lm_head.bias",
    },
    experts=MIXTRAL.experts,
    fields={
        **NUM_LOCAL_EXPERTS,
        "sliding_window": "sliding_window",
        "lm_head_bias": "lm_head_bias",
        **BIASED_ATTENTION,
    },
    fixed={"norm_type": "layer", "router": "sparsemixer", "norm_topk_prob": False},
    defaults={
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 2,
        "num_local_experts": 16,
        "router_jitter_noise": 0.01,
        "lm_head_bias": False,
    },
    harmless=("input_jitter_noise",),  # of training
    same={"num_experts": "num_local_experts"},
    other_names={"layers.{i}.mlp.router.weight": "model.layers.{i}.mlp.router.weight"},
    rope_magnitudes=True,
    uncomputed=_uncomputed,
    decode=_decode,
    encode=_encode,
)
