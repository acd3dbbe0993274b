"""LLaMA (2302.13971) and models of its shape: dense."""

from moebed.checkpoints.families.base import Family
from moebed.checkpoints.families.layout import ALL_ATTENTION_BIAS, BIASED_ATTENTION, DENSE_FFN, LLAMA

LLAMA_FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors={**LLAMA, **ALL_ATTENTION_BIAS, **DENSE_FFN},
    fields={"intermediate_size": "intermediate_size", **BIASED_ATTENTION},
    fixed={"num_experts": 0},
    defaults={"rms_norm_eps": 1e-6},
)
