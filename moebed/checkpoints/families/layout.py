"""Tensor names that many families share."""

from __future__ import annotations

from moebed.checkpoints.families.base import ExpertNames

OUTSIDE = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
NORMS = {
    "layers.{i}.pre_attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.pre_ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
}
PRE_NORMS = {
    "layers.{i}.pre_attn_norm.weight": "model.layers.{i}.pre_attention_layernorm.weight",
    "layers.{i}.pre_ffn_norm.weight": "model.layers.{i}.pre_feedforward_layernorm.weight",
}
ATTENTION = {f"layers.{{i}}.self_attn.{p}_proj.weight": f"model.layers.{{i}}.self_attn.{p}_proj.weight" for p in "qkvo"}
ATTENTION_BIAS = {f"layers.{{i}}.self_attn.{p}_proj.bias": f"model.layers.{{i}}.self_attn.{p}_proj.bias" for p in "qkv"}
ALL_ATTENTION_BIAS = {
    **ATTENTION_BIAS,
    "layers.{i}.self_attn.o_proj.bias": "model.layers.{i}.self_attn.o_proj.bias",
}
# Fields of ours -> their one setting, where it is of all four.
BIASED_ATTENTION = {name: "attention_bias" for name in ("attention_bias", "attention_output_bias")}
NORM_BIAS = {
    ours.replace(".weight", ".bias"): theirs.replace(".weight", ".bias")
    for ours, theirs in {"norm.weight": OUTSIDE["norm.weight"], **NORMS}.items()
}
QK_NORM = {f"layers.{{i}}.self_attn.{p}_norm.weight": f"model.layers.{{i}}.self_attn.{p}_norm.weight" for p in "qk"}
DENSE_FFN = {
    f"layers.{{i}}.mlp.{m}_proj.weight": f"model.layers.{{i}}.mlp.{m}_proj.weight" for m in ("gate", "up", "down")
}
# Fields of ours -> settings of theirs, where all layers have experts.
NUM_EXPERTS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "intermediate_size",
}
NUM_LOCAL_EXPERTS = {**NUM_EXPERTS, "num_experts": "num_local_experts"}
ROUTER = {"layers.{i}.mlp.router.weight": "model.layers.{i}.mlp.gate.weight"}
LLAMA = {**OUTSIDE, **NORMS, **ATTENTION}

EXPERTS = ExpertNames(
    gate="model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
    up="model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    down="model.layers.{i}.mlp.experts.{e}.down_proj.weight",
    gate_up_fused="model.layers.{i}.mlp.experts.gate_up_proj",
    down_fused="model.layers.{i}.mlp.experts.down_proj",
)


def shared_expert(theirs: str) -> dict[str, str]:
    """Names of the shared expert's matrices, where a family calls it ``theirs``."""
    return {
        f"layers.{{i}}.mlp.shared_expert.{m}_proj.weight": f"model.layers.{{i}}.mlp.{theirs}.{m}_proj.weight"
        for m in ("gate", "up", "down")
    }
