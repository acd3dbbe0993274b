"""Qwen1.5-MoE and Qwen2-MoE (2407.10671): a shared expert behind a sigmoid gate."""

from typing import Any

from moebed.checkpoints.families.base import Family, Settings, require_count
from moebed.checkpoints.families.layout import ATTENTION_BIAS, DENSE_FFN, EXPERTS, LLAMA, ROUTER, shared_expert
from moebed.checkpoints.families.meaning import one_number
from moebed.checkpoints.families.windows import (
    WINDOW_DEFAULTS,
    WINDOW_KEYS,
    uncomputed_windows,
    window_settings,
    windows_of,
)
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig


def sparse_layers(settings: Settings) -> list[int]:
    """Routed experts of each layer, from ``mlp_only_layers`` and ``decoder_sparse_step``."""
    dense, layers = settings["mlp_only_layers"] or [], range(settings["num_hidden_layers"])
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise ConfigError(f"mlp_only_layers is {dense!r}; it must be a list of layers")
    count, every = require_count(settings, "num_experts", 0), require_count(settings, "decoder_sparse_step")
    return [0 if i in dense or (i + 1) % every else count for i in layers]


def sparse_settings(config: ModelConfig) -> dict[str, Any]:
    """What :func:`sparse_layers` reads, and the sizes that its models have once for all layers."""
    moe = config.moe_layers
    if not moe:
        raise ConfigError("model config: no layer has experts; write it as a dense family, such as llama")
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.num_hidden_layers) if i not in moe],
        "num_experts": one_number(config, "num_experts"),
        "num_experts_per_tok": one_number(config, "num_experts_per_tok"),
        "moe_intermediate_size": one_number(config, "moe_intermediate_size"),
        # The class wants a width for dense layers, also where there are none.
        "intermediate_size": config.intermediate_size or one_number(config, "moe_intermediate_size"),
    }


def _slides(settings: Settings, layer: int) -> bool:
    return layer % 2 == 0 and layer < settings["max_window_layers"]


def _decode(settings: Settings) -> dict[str, Any]:
    experts, shared = sparse_layers(settings), require_count(settings, "shared_expert_intermediate_size")
    found: dict[str, Any] = {"num_experts": experts, "sliding_window": windows_of(settings, _slides)}
    return found | ({"num_shared_experts": 1, "shared_expert_intermediate_size": shared} if any(experts) else {})


def _encode(config: ModelConfig) -> dict[str, Any]:
    settings = sparse_settings(config)
    width = config.layer(config.moe_layers[0]).shared_intermediate_size
    if not width:
        raise ConfigError("model config: num_shared_experts is 0, but a qwen2_moe checkpoint has a shared expert")
    windows = {} if config.sliding_window is None else {"use_sliding_window": True, **window_settings(config)}
    return {**settings, **windows, "shared_expert_intermediate_size": width}


SPARSE_FIELDS = {
    "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
    "intermediate_size": "intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
}
SPARSE_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "intermediate_size": None,
}

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    tensors={
        **LLAMA,
        **ATTENTION_BIAS,
        **DENSE_FFN,
        **ROUTER,
        **shared_expert("shared_expert"),
        "layers.{i}.mlp.shared_expert_gate.weight": "model.layers.{i}.mlp.shared_expert_gate.weight",
    },
    experts=EXPERTS,
    fields={**SPARSE_FIELDS, "attention_bias": "qkv_bias"},
    fixed={"shared_expert_gate": True},
    defaults={**SPARSE_DEFAULTS, "qkv_bias": True, **WINDOW_DEFAULTS},
    reads=("num_experts", "shared_expert_intermediate_size", *WINDOW_KEYS),
    uncomputed=lambda settings: uncomputed_windows(settings, _slides),
    decode=_decode,
    encode=_encode,
)
