"""OLMoE (2409.02060): 64 experts, queries and keys normalised over all heads together."""

from moebed.checkpoints.families.base import Family
from moebed.checkpoints.families.layout import (
    ALL_ATTENTION_BIAS,
    BIASED_ATTENTION,
    EXPERTS,
    LLAMA,
    NUM_EXPERTS,
    QK_NORM,
    ROUTER,
)

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    tensors={**LLAMA, **ALL_ATTENTION_BIAS, **QK_NORM, **ROUTER},
    experts=EXPERTS,
    fields={**NUM_EXPERTS, "norm_topk_prob": "norm_topk_prob", **BIASED_ATTENTION},
    fixed={"qk_norm": "full"},
    defaults={"rms_norm_eps": 1e-5, "norm_topk_prob": False},
    same={"num_local_experts": "num_experts"},
    # A window would be used by some of transformers' kinds of attention and passed over by others.
    accepts={"clip_qkv": (None,), "sliding_window": (None,)},
)
