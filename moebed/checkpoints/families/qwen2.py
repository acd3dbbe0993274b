"""Qwen2 and Qwen2.5 (2407.10671): dense, with biases on queries, keys and values."""

from typing import Any

from moebed.checkpoints.families.base import Family, Settings
from moebed.checkpoints.families.layout import ATTENTION_BIAS, DENSE_FFN, LLAMA
from moebed.checkpoints.families.windows import (
    WINDOW_DEFAULTS,
    WINDOW_KEYS,
    uncomputed_windows,
    window_settings,
    windows_of,
)
from moebed.model.config import ModelConfig


def _slides(settings: Settings, layer: int) -> bool:
    return settings.get("sliding_window", 4096) is not None and layer >= settings["max_window_layers"]


def _decode(settings: Settings) -> dict[str, Any]:
    return {"sliding_window": windows_of(settings, _slides)}


def _encode(config: ModelConfig) -> dict[str, Any]:
    if config.sliding_window is None:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "max_window_layers": 0, **window_settings(config)}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    tensors={**LLAMA, **ATTENTION_BIAS, **DENSE_FFN},
    fields={"intermediate_size": "intermediate_size"},
    fixed={"num_experts": 0, "attention_bias": True},
    defaults={"rms_norm_eps": 1e-6, **WINDOW_DEFAULTS},
    accepts={"attention_bias": (True, False)},
    reads=WINDOW_KEYS,
    uncomputed=lambda settings: uncomputed_windows(settings, _slides),
    decode=_decode,
    encode=_encode,
)
