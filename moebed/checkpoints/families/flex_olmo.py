"""FlexOlmo (2507.07024; model_type flex_olmo): norms after attention and experts alone; the router sees the stream."""

from moebed.checkpoints.families.base import Family
from moebed.checkpoints.families.layout import (
    ALL_ATTENTION_BIAS,
    ATTENTION,
    BIASED_ATTENTION,
    EXPERTS,
    OUTSIDE,
    QK_NORM,
    ROUTER,
)

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
    fields={
        "num_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "moe_intermediate_size": "intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
        **BIASED_ATTENTION,
    },
    fixed={"qk_norm": "full", "pre_norms": False, "post_norms": True},
    defaults={
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-6,
        "norm_topk_prob": False,
        "num_experts_per_tok": 5,
        "num_experts": 7,
    },
    same={"num_local_experts": "num_experts"},
    # Its own defaults are of a vocabulary of 100,352; who writes a folder says which there are.
    encode=lambda config: {"pad_token_id": None, "eos_token_id": None},
)
