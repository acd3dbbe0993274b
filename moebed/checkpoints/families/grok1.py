"""Grok-1, as ported to Hugging Face (model_type grok-1): four norms a layer, capped attention logits, scaled ends."""

from typing import Any

from moebed.checkpoints.families.base import ExpertNames, Family, Settings
from moebed.checkpoints.families.layout import NUM_EXPERTS
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig

_LAYER, _MOE = "model.layers.{i}", "model.layers.{i}.moe_block"
_NORMS = {
    "pre_attn_norm": "pre_attn_norm",
    "post_attn_norm": "post_attn_norm",
    "pre_ffn_norm": "pre_moe_norm",
    "post_ffn_norm": "post_moe_norm",
}


def _decode(settings: Settings) -> dict[str, Any]:
    cap = settings["max_attn_value"]
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int | float) or cap < 0):
        raise ConfigError(f"max_attn_value is {cap!r}; it must be a number, or null for none")
    scale = settings["attn_output_multiplier"]
    if not scale:
        raise ConfigError(f"attn_output_multiplier is {scale!r}; it must be a number other than 0")
    return {"attn_logit_softcapping": cap or None}


def _encode(config: ModelConfig) -> dict[str, Any]:
    assert config.head_dim is not None
    return {
        "max_attn_value": config.attn_logit_softcapping,
        "attn_output_multiplier": config.attention_multiplier or config.head_dim**-0.5,
    }


GROK1 = Family(
    model_type="grok-1",
    architecture="Grok1ModelForCausalLM",
    tensors={
        "embed_tokens.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.scale",
        "lm_head.weight": "lm_head.weight",
        **{f"layers.{{i}}.{ours}.weight": f"{_LAYER}.{theirs}.scale" for ours, theirs in _NORMS.items()},
        **{f"layers.{{i}}.self_attn.{p}_proj.weight": f"{_LAYER}.attn.{p}_proj.weight" for p in "qkvo"},
        "layers.{i}.mlp.router.weight": f"{_MOE}.gate.weight",
    },
    experts=ExpertNames(
        gate=f"{_MOE}.experts.{{e}}.linear.weight",
        up=f"{_MOE}.experts.{{e}}.linear_v.weight",
        down=f"{_MOE}.experts.{{e}}.linear_1.weight",
    ),
    fields={
        **NUM_EXPERTS,
        "attention_multiplier": "attn_output_multiplier",
        "embedding_multiplier": "embedding_multiplier_scale",
        "logits_multiplier": "output_multiplier_scale",
    },
    fixed={"norm_topk_prob": False, "post_norms": True},
    # As the port has them, of which transformers writes none. It computes the exact GELU; a config may ask for the tanh
    # form of the original with hidden_act.
    defaults={
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-5,
        "max_attn_value": 1.0,
        "attn_output_multiplier": 1.0,
        "embedding_multiplier_scale": 1.0,
        "output_multiplier_scale": 1.0,
        "tie_word_embeddings": True,
    },
    in_transformers=False,
    decode=_decode,
    encode=_encode,
)
