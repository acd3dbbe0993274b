"""Qwen2 and Qwen2.5 (2407.10671): dense, with biases on queries, keys and values."""

from moebed.families.base import Family
from moebed.families.layout import ATTENTION_BIAS, DENSE_FFN, LLAMA

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    tensors={**LLAMA, **ATTENTION_BIAS, **DENSE_FFN},
    fields={"intermediate_size": "intermediate_size"},
    fixed={"num_experts": 0, "attention_bias": True},
    defaults={"rms_norm_eps": 1e-6},
    # Its sliding window differs between layers.
    accepts={"use_sliding_window": (None, False), "attention_bias": (None, True, False)},
)
