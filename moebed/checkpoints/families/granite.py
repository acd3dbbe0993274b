"""Granite 3 MoE and PowerMoE (model_type granitemoe), and with shared experts (granitemoeshared): four multipliers."""

from typing import Any

from moebed.checkpoints.families.base import ExpertNames, Family, Settings, Stored, require_count
from moebed.checkpoints.families.layout import ALL_ATTENTION_BIAS, BIASED_ATTENTION, LLAMA, NUM_LOCAL_EXPERTS
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig

_MOE = "model.layers.{i}.block_sparse_moe"
_SHARED = "model.layers.{i}.shared_mlp"
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


def _decode(settings: Settings) -> dict[str, Any]:
    for key in _MULTIPLIERS:
        value = settings[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{key} is {value!r}; it must be a number")
    if not settings["logits_scaling"]:
        raise ConfigError(f"logits_scaling is {settings['logits_scaling']!r}; logits are divided by it")
    return {"logits_multiplier": 1 / settings["logits_scaling"]}


def _decode_shared(settings: Settings) -> dict[str, Any]:
    width = require_count(settings, "shared_intermediate_size", 0)
    shared = {"num_shared_experts": 1, "shared_expert_intermediate_size": width} if width else {}
    return {**_decode(settings), **shared}


def _encode(config: ModelConfig) -> dict[str, Any]:
    assert config.head_dim is not None
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ConfigError(f"model config: head_dim is {config.head_dim}, but a granitemoe's is hidden_size over heads")
    scale = config.attention_multiplier
    return {
        "logits_scaling": 1 / config.logits_multiplier,
        "attention_multiplier": config.head_dim**-0.5 if scale is None else scale,
    }


def _encode_shared(config: ModelConfig) -> dict[str, Any]:
    width = config.layer(config.moe_layers[0]).shared_intermediate_size if config.moe_layers else 0
    return {**_encode(config), "shared_intermediate_size": width}


def _granite(model_type: str, architecture: str, shared: bool) -> Family:
    beside = {
        f"layers.{{i}}.mlp.shared_expert.{ours}_proj.weight": stored
        for ours, stored in {
            "gate": Stored(f"{_SHARED}.input_linear.weight", 0, 2),
            "up": Stored(f"{_SHARED}.input_linear.weight", 1, 2),
            "down": Stored(f"{_SHARED}.output_linear.weight"),
        }.items()
    }
    return Family(
        model_type=model_type,
        architecture=architecture,
        tensors={
            **LLAMA,
            **ALL_ATTENTION_BIAS,
            "layers.{i}.mlp.router.weight": f"{_MOE}.router.layer.weight",
            **(beside if shared else {}),
        },
        # All experts in one tensor.
        experts=ExpertNames("", "", "", f"{_MOE}.input_linear.weight", f"{_MOE}.output_linear.weight"),
        fields={
            **NUM_LOCAL_EXPERTS,
            "embedding_multiplier": "embedding_multiplier",
            "residual_multiplier": "residual_multiplier",
            "attention_multiplier": "attention_multiplier",
            **BIASED_ATTENTION,
        },
        fixed={"norm_topk_prob": True},
        defaults={
            **dict.fromkeys(_MULTIPLIERS, 1.0),
            "rms_norm_eps": 1e-6,
            **({"shared_intermediate_size": 0} if shared else {}),
        },
        other_names={  # as transformers from version 5 on holds them
            "layers.{i}.mlp.router.weight": f"{_MOE}.router.weight",
            "layers.{i}.mlp.experts.gate_up_proj": f"{_MOE}.experts.gate_up_proj",
            "layers.{i}.mlp.experts.down_proj": f"{_MOE}.experts.down_proj",
        },
        decode=_decode_shared if shared else _decode,
        encode=_encode_shared if shared else _encode,
    )


GRANITE = _granite("granitemoe", "GraniteMoeForCausalLM", shared=False)
GRANITE_SHARED = _granite("granitemoeshared", "GraniteMoeSharedForCausalLM", shared=True)
