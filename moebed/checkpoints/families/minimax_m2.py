"""MiniMax-M2 (model_type minimax_m2): Mixtral's experts, chosen by sigmoid scores and a bias; heads turn in part."""

from typing import Any

from moebed.checkpoints.families.base import Family, Settings, require_count
from moebed.checkpoints.families.layout import NUM_LOCAL_EXPERTS, QK_NORM
from moebed.checkpoints.families.mixtral import MIXTRAL
from moebed.model.config import ModelConfig


def _partial(settings: Settings) -> float:
    """What turns of a head, in its published configs a number of dimensions."""
    if settings.get("rotary_dim") is None:
        return 1.0
    return require_count(settings, "rotary_dim") / require_count(settings, "head_dim")


def _encode(config: ModelConfig) -> dict[str, Any]:
    return {"rotary_dim": config.rotary_dim}


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    tensors={
        **MIXTRAL.tensors,
        **QK_NORM,
        "layers.{i}.mlp.router.expert_bias": "model.layers.{i}.block_sparse_moe.e_score_correction_bias",
    },
    experts=MIXTRAL.experts,
    fields=NUM_LOCAL_EXPERTS,
    fixed={"norm_topk_prob": True, "qk_norm": "full", "router": "sigmoid_topk"},
    same={"num_experts": "num_local_experts"},
    other_names={
        **MIXTRAL.other_names,
        "layers.{i}.mlp.router.expert_bias": "model.layers.{i}.mlp.e_score_correction_bias",
    },
    defaults={"rope_theta": 5e6, "rms_norm_eps": 1e-6, "head_dim": 128, "rotary_dim": None},
    partial_rotary=_partial,
    encode=_encode,
)
