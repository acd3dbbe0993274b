"""gpt-oss-20b and 120b (2508.10925; model_type gpt_oss): attention sinks, a window in every other layer, biases."""

from typing import Any

from moebed.checkpoints.families.base import Family, Settings, Stacked
from moebed.checkpoints.families.layout import ALL_ATTENTION_BIAS, BIASED_ATTENTION, EXPERTS, LLAMA, NUM_LOCAL_EXPERTS
from moebed.checkpoints.families.windows import WINDOW_KEYS, uncomputed_windows, window_settings, windows_of
from moebed.model.config import ModelConfig

_MLP = "model.layers.{i}.mlp"
_USED = {"use_sliding_window": True, "max_window_layers": 0}  # there are no such settings
_WINDOW = 128
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _slides(settings: Settings, layer: int) -> bool:
    return layer % 2 == 0


def _decode(settings: Settings) -> dict[str, Any]:
    return {
        "sliding_window": windows_of({**settings, **_USED}, _slides),
        "router_options": {"router_bias": True},
    }


def _encode(config: ModelConfig) -> dict[str, Any]:
    settings = window_settings(config)
    # The class makes the window's mask also where no layer has one.
    return {**settings, "sliding_window": settings["sliding_window"] or _WINDOW}


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    tensors={
        **LLAMA,
        **ALL_ATTENTION_BIAS,
        "layers.{i}.self_attn.sinks": "model.layers.{i}.self_attn.sinks",
        "layers.{i}.mlp.router.weight": f"{_MLP}.router.weight",
        "layers.{i}.mlp.router.bias": f"{_MLP}.router.bias",
    },
    experts=EXPERTS,
    stacked=tuple(
        Stacked(f"{_MLP}.experts.{name}_proj{ending}", tuple(f"{_MLP}.experts.{{e}}.{m}_proj.{kind}" for m in of))
        for name, of in (("gate_up", ("gate", "up")), ("down", ("down",)))
        for ending, kind in (("", "weight"), ("_bias", "bias"))
    ),
    fields={
        **NUM_LOCAL_EXPERTS,
        **BIASED_ATTENTION,
    },
    fixed={
        "norm_topk_prob": True,
        "hidden_act": "clamped_swiglu",
        "experts_bias": True,
        "attention_sinks": True,
    },
    defaults={
        "rope_theta": 150000.0,
        "rope_parameters": _YARN,
        "rms_norm_eps": 1e-5,
        "head_dim": 64,
        "sliding_window": _WINDOW,
        "attention_bias": True,
    },
    accepts={"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    reads=WINDOW_KEYS,
    harmless=("experts_per_token", "initial_context_length"),  # other names of what stands there too
    same={"num_experts": "num_local_experts"},
    uncomputed=lambda settings: uncomputed_windows({**settings, **_USED}, _slides),
    decode=_decode,
    encode=_encode,
)
