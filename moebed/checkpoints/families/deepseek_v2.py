"""DeepSeek-V2, V2-Lite (2405.04434), V3 and R1 (2412.19437): latent attention, experts chosen within groups."""

from typing import Any

from moebed.checkpoints.families import fine_grained
from moebed.checkpoints.families.base import Family, Settings, require_count
from moebed.checkpoints.families.layout import EXPERTS
from moebed.checkpoints.families.rope import rope_block
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig
from moebed.model.rope_config import positive, yarn_magnitude

_ATTENTION = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "kv_b_proj": "kv_b_proj",
    "o_proj": "o_proj",
}
_LATENT = {
    f"layers.{{i}}.self_attn.{ours}.weight": f"model.layers.{{i}}.self_attn.{theirs}.weight"
    for ours, theirs in _ATTENTION.items()
}
_WIDTHS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_FIELDS = {**{name: name for name in (*_WIDTHS, "q_lora_rank")}, **fine_grained.FIELDS}
# Of the balancing, of layouts over ranks, or made of other settings.
_HARMLESS = ("aux_loss_alpha", "seq_aux", "ep_size", "qk_head_dim", "num_nextn_predict_layers", "num_mtp_layers")


def _scale(settings: Settings) -> float | None:
    """Of the attention logits; with YaRN's mscale_all_dim it grows by the square of that."""
    mscale, factor = _magnitude(settings)
    if not (positive(mscale) and positive(factor)):
        return None
    width = settings["qk_nope_head_dim"] + settings["qk_rope_head_dim"]
    return width**-0.5 * yarn_magnitude(factor, mscale) ** 2


def _magnitude(settings: Settings) -> tuple[Any, Any]:
    """mscale_all_dim and the factor that goes with it; nothing where positions are not stretched, or without it."""
    _, block, kind = rope_block(settings)
    mscale = None if kind == "default" else block.get("mscale_all_dim")
    return (mscale, block.get("factor")) if mscale else (None, None)


def _attention(settings: Settings) -> dict[str, Any]:
    for name in _WIDTHS:
        require_count(settings, name)
    # The class has a head_dim of its own: what turns.
    return {"head_dim": None, "num_key_value_heads": None, "attention_multiplier": _scale(settings)}


def _uncomputed(settings: Settings) -> list[str]:
    found = []
    mscale, factor = _magnitude(settings)
    if mscale is not None and not (positive(mscale) and positive(factor)):
        found.append(f"mscale_all_dim is {mscale!r} and factor {factor!r}; both must be numbers above 0")
    for name, other in (("num_key_value_heads", "num_attention_heads"), ("head_dim", "qk_rope_head_dim")):
        value = settings.get(name)
        if value is not None and value != settings.get(other):
            found.append(f"{name} is {value!r}; with latent attention it is {other}, {settings.get(other)!r}")
    return found


def _decode_v2(settings: Settings) -> dict[str, Any]:
    grouped = settings["topk_method"] == "group_limited_greedy"
    read = {**settings, **({} if grouped else {"n_group": 1, "topk_group": 1})}
    found = {**fine_grained.decode(read), **_attention(settings), "router": "group_limited_topk"}
    if not grouped and settings["routed_scaling_factor"] == 1:
        found |= {"router": "softmax_topk", "router_options": {}}
    return found


def _decode_v3(settings: Settings) -> dict[str, Any]:
    return {
        **fine_grained.decode(settings),
        **_attention(settings),
        "rope_interleave": bool(settings["rope_interleave"]),
    }


def _encode(config: ModelConfig) -> dict[str, Any]:
    if config.kv_lora_rank is None:
        raise ConfigError("model config: kv_lora_rank is None, but this family has latent attention")
    return {**fine_grained.encode(config), "head_dim": config.rotary_dim}


def _encode_v2(config: ModelConfig) -> dict[str, Any]:
    settings = _encode(config)
    grouped = settings["n_group"] > 1
    return {**settings, "topk_method": "group_limited_greedy" if grouped else "greedy"}


def _encode_v3(config: ModelConfig) -> dict[str, Any]:
    return {**_encode(config), "rope_interleave": config.rope_interleave}


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    tensors={**fine_grained.TENSORS, **_LATENT},
    experts=EXPERTS,
    fields={ours: theirs for ours, theirs in _FIELDS.items() if ours != "norm_topk_prob"},
    fixed={"norm_topk_prob": False, "rope_interleave": True},
    defaults={
        **fine_grained.DEFAULTS,
        "n_group": None,
        "topk_group": None,
        "topk_method": "greedy",
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rms_norm_eps": 1e-6,
    },
    # transformers' class passes the division of weights over.
    accepts={
        "norm_topk_prob": (False, None),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "moe_layer_freq": (1,),
    },
    harmless=_HARMLESS,
    same={"num_experts": "n_routed_experts"},
    uncomputed=_uncomputed,
    decode=_decode_v2,
    encode=_encode_v2,
)
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    tensors={**fine_grained.BIASED_TENSORS, **_LATENT},
    experts=EXPERTS,
    fields=_FIELDS,
    defaults={
        "num_key_value_heads": 128,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "intermediate_size": 18432,
        "norm_topk_prob": True,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_interleave": True,
    },
    accepts={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    harmless=_HARMLESS,
    same={"num_local_experts": "n_routed_experts"},
    further=fine_grained.FURTHER_LAYER,
    uncomputed=_uncomputed,
    decode=_decode_v3,
    encode=_encode_v3,
)
