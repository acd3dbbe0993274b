"""FlexOlmo (2507.07024; model_type flex_olmo): norms after attention and experts alone; the router sees the stream."""

from moebed.checkpoints.families.base import Family
from moebed.checkpoints.families.layout import (
    ALL_ATTENTION_BIAS,
    ATTENTION,
    EXPERTS,
    OUTSIDE,
    QK_NORM,
    ROUTER,
)
from moebed.checkpoints.families.olmoe import OLMOE

# Its class's own defaults are of a vocabulary of 100,352; who writes a folder says which there are.
NO_IDS = {"pad_token_id": None, "eos_token_id": None}

FLEX_OLMO = Family(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    tensors={
        **OUTSIDE,
        **ATTENTION,
        **ALL_ATTENTION_BIAS,
        **QK_NORM,
        **ROUTER,
        "layers.{i}.post_attn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "layers.{i}.post_ffn_norm.weight": "model.layers.{i}.post_feedforward_layernorm.weight",
    },
    experts=EXPERTS,
    fields=OLMOE.fields,
    fixed={**OLMOE.fixed, "pre_norms": False, "post_norms": True},
    defaults={
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-6,
        "norm_topk_prob": False,
        "num_experts_per_tok": 5,
        "num_experts": 7,
    },
    same=OLMOE.same,
    encode=lambda config: NO_IDS,
)
