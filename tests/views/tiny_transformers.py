"""Tiny models of transformers' MoE classes, every number of them drawn at random: defaults hide errors."""

from __future__ import annotations

import torch
from torch import nn

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FINE = {"moe_intermediate_size": 24, "intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
LATENT = FINE | {"num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                 "qk_rope_head_dim": 4, "v_head_dim": 6, "n_shared_experts": 2}  # fmt: skip
GRANITE = {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2, "embedding_multiplier": 12.0,
           "attention_multiplier": 0.125, "residual_multiplier": 0.22, "logits_scaling": 6.0,
           "tie_word_embeddings": True}  # fmt: skip
QWEN = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 40}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("mixtral", {"intermediate_size": 24, "num_local_experts": 4}),
    "olmoe": ("olmoe", {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}),
    "qwen2_moe": ("qwen2_moe", QWEN | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "qwen3_moe": ("qwen3_moe", QWEN | {"head_dim": 8, "norm_topk_prob": True}),
    "qwen3_next": ("qwen3_next", QWEN | {
        "head_dim": 16, "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    "deepseek_v2": ("deepseek_v2", LATENT | {"topk_method": "greedy", "routed_scaling_factor": 1.0}),
    "deepseek_v2 groups": ("deepseek_v2", LATENT | {
        "q_lora_rank": 12, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 16.0}),
    "deepseek_v3": ("deepseek_v3", LATENT | {
        "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}),
    "gpt_oss": ("gpt_oss", {"head_dim": 8, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
                            "sliding_window": 8}),
    "ernie4_5_moe": ("ernie4_5_moe", {
        "moe_intermediate_size": 24, "intermediate_size": 48, "moe_num_experts": 8, "moe_k": 3,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1}),
    "glm4_moe": ("glm4_moe", FINE | {
        "head_dim": 8, "use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 1.5}),
    "phimoe": ("phimoe", {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", GRANITE),
    "granitemoeshared": ("granitemoeshared", GRANITE | {"shared_intermediate_size": 20}),
    "flex_olmo": ("flex_olmo", {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}),
    "minimax_m2": ("minimax_m2", {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2,
                                  "head_dim": 8, "rotary_dim": 4}),
    "dots1": ("dots1", FINE | {"norm_topk_prob": True, "routed_scaling_factor": 2.5}),
    "jamba": ("jamba", {"intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 4,
                        "mamba_dt_rank": 4, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1,
                        "expert_layer_period": 2, "expert_layer_offset": 0}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"intermediate_size": 24, "num_experts": 4, "moe_topk": 2, "head_dim": 8}),
    "lfm2_moe": ("lfm2_moe", {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 8,
                              "num_experts_per_tok": 2, "num_dense_layers": 1,
                              "layer_types": ["conv", "full_attention", "conv"]}),
    "nemotron_h": ("nemotron_h", {
        "layers_block_type": ["mamba", "moe", "attention", "moe"], "head_dim": 8, "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "intermediate_size": 48, "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 20, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}),
}  # fmt: skip


def make(name: str, **changes: object) -> nn.Module:
    """One of them, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, settings = MODELS[name]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON | settings | changes))
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in key or not tensor.is_floating_point():
                continue
            norm = tensor.ndim == 1 and ("norm" in key) and key.endswith("weight")
            tensor.normal_(1.0 if norm else 0.0, 0.05 if "correction_bias" in key or "expert_bias" in key else 0.2)
    return model.eval()
