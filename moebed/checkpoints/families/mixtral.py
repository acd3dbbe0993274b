"""Mixtral 8x7B and 8x22B (2401.04088)."""

from moebed.checkpoints.families.base import ExpertNames, Family
from moebed.checkpoints.families.layout import LLAMA, NUM_LOCAL_EXPERTS

_MOE = "model.layers.{i}.block_sparse_moe"

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    tensors={**LLAMA, "layers.{i}.mlp.router.weight": f"{_MOE}.gate.weight"},
    experts=ExpertNames(
        gate=f"{_MOE}.experts.{{e}}.w1.weight",
        up=f"{_MOE}.experts.{{e}}.w3.weight",
        down=f"{_MOE}.experts.{{e}}.w2.weight",
        gate_up_fused="model.layers.{i}.mlp.experts.gate_up_proj",
        down_fused="model.layers.{i}.mlp.experts.down_proj",
    ),
    fields={**NUM_LOCAL_EXPERTS, "sliding_window": "sliding_window"},
    fixed={"norm_topk_prob": True},
    same={"num_experts": "num_local_experts"},
    # As transformers from version 5 on holds it, and writes it with save_original_format=False.
    other_names={"layers.{i}.mlp.router.weight": "model.layers.{i}.mlp.gate.weight"},
    defaults={"sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
)
