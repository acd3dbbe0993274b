"""Mistral 7B (2310.06825): dense, the paper's reference "F"."""

from moebed.checkpoints.families.base import Family
from moebed.checkpoints.families.layout import DENSE_FFN, LLAMA

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    tensors={**LLAMA, **DENSE_FFN},
    fields={"intermediate_size": "intermediate_size", "sliding_window": "sliding_window"},
    fixed={"num_experts": 0},
    accepts={"layer_types": (None,)},  # with them, transformers makes a Ministral of it
    defaults={"sliding_window": 4096, "rms_norm_eps": 1e-6},
)
