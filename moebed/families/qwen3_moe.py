"""Qwen3-MoE (2505.09388): 128 experts, each head's queries and keys normalised by themselves."""

from typing import Any

from moebed.config import ModelConfig
from moebed.families.base import Family, Settings
from moebed.families.layout import DENSE_FFN, EXPERTS, LLAMA, QK_NORM, ROUTER
from moebed.families.qwen2_moe import SPARSE_DEFAULTS, SPARSE_FIELDS, sparse_layers, sparse_settings


def _decode(settings: Settings) -> dict[str, Any]:
    # transformers writes the number of experts under either name.
    count = settings.get("num_experts") or settings["num_local_experts"]
    window = settings.get("sliding_window") if settings.get("use_sliding_window") else None
    return {"num_experts": sparse_layers({**settings, "num_experts": count}), "sliding_window": window}


def _encode(config: ModelConfig) -> dict[str, Any]:
    window = {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    return {**sparse_settings(config), **window}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    tensors={**LLAMA, **QK_NORM, **DENSE_FFN, **ROUTER},
    experts=EXPERTS,
    fields=SPARSE_FIELDS,
    fixed={"qk_norm": "head"},
    defaults=SPARSE_DEFAULTS,
    decode=_decode,
    encode=_encode,
)
