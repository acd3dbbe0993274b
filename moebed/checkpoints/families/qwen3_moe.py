"""Qwen3-MoE (2505.09388): 128 experts, each head's queries and keys normalised by themselves."""

from typing import Any

from moebed.checkpoints.families.base import Family, Settings
from moebed.checkpoints.families.layout import (
    ALL_ATTENTION_BIAS,
    BIASED_ATTENTION,
    DENSE_FFN,
    EXPERTS,
    LLAMA,
    QK_NORM,
    ROUTER,
)
from moebed.checkpoints.families.qwen2_moe import SPARSE_DEFAULTS, SPARSE_FIELDS, sparse_layers, sparse_settings
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig


def _decode(settings: Settings) -> dict[str, Any]:
    used = settings["use_sliding_window"]
    if not isinstance(used, bool):
        raise ConfigError(f"use_sliding_window is {used!r}; it must be true or false")
    window = settings["sliding_window"] if used else None
    return {"num_experts": sparse_layers(settings), "sliding_window": window}


def _encode(config: ModelConfig) -> dict[str, Any]:
    window = {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    return {**sparse_settings(config), **window}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    tensors={**LLAMA, **ALL_ATTENTION_BIAS, **QK_NORM, **DENSE_FFN, **ROUTER},
    experts=EXPERTS,
    fields={**SPARSE_FIELDS, **BIASED_ATTENTION},
    fixed={"qk_norm": "head"},
    same={"num_local_experts": "num_experts"},  # transformers writes the one or the other
    defaults={**SPARSE_DEFAULTS, "use_sliding_window": False, "sliding_window": 4096},
    reads=("num_experts",),
    decode=_decode,
    encode=_encode,
)
