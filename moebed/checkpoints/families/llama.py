"""LLaMA (2302.13971) and models of its shape: dense."""

from moebed.checkpoints.families.base import Family
from moebed.checkpoints.families.layout import DENSE_FFN, LLAMA

LLAMA_FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors={**LLAMA, **DENSE_FFN},
    fields={"intermediate_size": "intermediate_size"},
    fixed={"num_experts": 0},
    defaults={"rms_norm_eps": 1e-6},
)
