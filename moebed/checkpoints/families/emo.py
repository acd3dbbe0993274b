"""EMO and the standard mixtures beside it (2605.06663; model_type emo): the last expert is shared; and a dense model.

transformers has no class for them. What is here was read from allenai/EMO@fb07783: the code that lies beside the
checkpoints (src/hf_trust_remote_code) and what writes them (src/olmo_core/nn/hf).
"""

import json
from typing import Any

from moebed.checkpoints.families.base import ExpertNames, Family, Settings, Stored, require_count
from moebed.checkpoints.families.flex_olmo import FLEX_OLMO, NO_IDS
from moebed.checkpoints.families.layout import (
    ALL_ATTENTION_BIAS,
    ATTENTION,
    BIASED_ATTENTION,
    DENSE_FFN,
    OUTSIDE,
    PRE_NORMS,
)
from moebed.checkpoints.families.meaning import one_number
from moebed.errors import ConfigError
from moebed.model.config import ModelConfig

_MLP = "model.layers.{i}.mlp"
_EXPERT = f"{_MLP}.experts.{{e}}"
_OF_EACH, _SHARED_OF_EACH = "num_experts_per_layer", "num_shared_experts_per_layer"


def _numbers(settings: Settings, key: str) -> list[int]:
    found, layers = settings[key], settings["num_hidden_layers"]
    whole = isinstance(found, list) and all(type(number) is int and number >= 0 for number in found)
    if not whole or len(found) != layers:
        raise ConfigError(f"{key} is {json.dumps(found)}; it must be a number for each of num_hidden_layers {layers}")
    return found


def _layers(settings: Settings) -> list[tuple[int, int]]:
    """Experts of each layer, 0 where it is dense, and how many of them are shared."""
    beside = require_count(settings, "num_shared_experts", 0)
    if settings[_OF_EACH] is None:
        return [(require_count(settings, "num_experts"), beside)] * settings["num_hidden_layers"]
    experts = _numbers(settings, _OF_EACH)
    given = settings[_SHARED_OF_EACH] is not None
    shared = _numbers(settings, _SHARED_OF_EACH) if given else [min(beside, count) for count in experts]
    found = [(count, one if count else 0) for count, one in zip(experts, shared, strict=True)]
    for key, values in zip(("num_experts", "num_shared_experts"), zip(*found, strict=True), strict=True):
        if settings[key] not in [value for value, count in zip(values, experts, strict=True) if count]:
            raise ConfigError(f"{key} is {json.dumps(settings[key])}, which {key}_per_layer has of no layer's experts")
    return found


def _decode(settings: Settings) -> dict[str, Any]:
    layers, chosen = _layers(settings), require_count(settings, "num_experts_per_tok")
    for count, shared in layers:
        if shared > 1:
            raise ConfigError(
                f"num_shared_experts is {shared}; supported is one, or none: to several of them emo's class gives "
                "weights by a softmax of their own"
            )
        if count and (count <= shared or chosen <= shared):
            raise ConfigError(
                f"num_shared_experts is {shared} of num_experts {count} and of num_experts_per_tok {chosen}, which "
                "leaves none to choose"
            )
    dense = settings["dense_intermediate_size"]
    if dense is None and any(not count for count, _ in layers):
        raise ConfigError(f"dense_intermediate_size is missing, but {_OF_EACH} has layers without experts")
    return {
        "num_experts": [count - shared for count, shared in layers],
        "num_experts_per_tok": [chosen - shared for _, shared in layers],
        "num_shared_experts": [shared for _, shared in layers],
        "intermediate_size": None if dense is None else require_count(settings, "dense_intermediate_size"),
    }


def _encode(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe_layers
    if not moe:
        raise ConfigError("model config: no layer has experts; write it as a dense family, such as llama")
    layers = [config.layer(index) for index in range(config.num_hidden_layers)]
    shared = [layer.num_shared_experts if layer.num_experts else 0 for layer in layers]
    experts = [layer.num_experts + beside for layer, beside in zip(layers, shared, strict=True)]
    alike = len({*zip(experts, shared, strict=True)}) == 1
    return {
        "num_experts": experts[moe[0]],
        "num_shared_experts": shared[moe[0]],
        "num_experts_per_tok": one_number(config, "num_experts_per_tok") + shared[moe[0]],
        _OF_EACH: None if alike else experts,
        _SHARED_OF_EACH: None if alike else shared,
        "dense_intermediate_size": config.intermediate_size,
        **NO_IDS,
    }


def _uncomputed(settings: Settings) -> list[str]:
    found = []
    if settings[_OF_EACH] is None and settings[_SHARED_OF_EACH] is not None:
        found.append(f"{_SHARED_OF_EACH} means something beside {_OF_EACH} alone, which is not there")
    if settings["norm_topk_prob"] and (settings["num_shared_experts"] or any(settings[_SHARED_OF_EACH] or ())):
        found.append("norm_topk_prob is true beside a shared expert, which emo's class does not compute")
    return found


EMO = Family(
    model_type="emo",
    architecture="EmoForCausalLM",
    tensors={
        **OUTSIDE,
        **PRE_NORMS,
        **ATTENTION,
        **ALL_ATTENTION_BIAS,
        **DENSE_FFN,
        # The shared expert is the one after the others. It has a row of the gate, whose softmax over itself alone is 1.
        "layers.{i}.mlp.router.weight": Stored(f"{_MLP}.gate.weight", unused="num_shared_experts"),
        **{f"layers.{{i}}.mlp.shared_expert.{m}_proj.weight": f"{_EXPERT}.{m}_proj.weight" for m in ("gate", "up")},
        "layers.{i}.mlp.shared_expert.down_proj.weight": f"{_EXPERT}.down_proj.weight",
    },
    experts=ExpertNames(*(f"{_EXPERT}.{m}_proj.weight" for m in ("gate", "up", "down"))),
    fields={
        "moe_intermediate_size": "intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
        **BIASED_ATTENTION,
    },
    defaults={
        **FLEX_OLMO.defaults,  # after which its class was made
        "num_shared_experts": 0,
        _OF_EACH: None,
        _SHARED_OF_EACH: None,
        "dense_intermediate_size": None,
    },
    accepts={
        "always_active_experts": (None, []),
        "always_active_experts_per_layer": (None,),
        "dense_mlp_bias": (False, None),
        "ghost_extend_eval": (False, None),  # an expert more, mixed of all the others; of another version of the code
    },
    harmless=("ghost_extend_coeff_mode", "ghost_extend_random_k"),  # of ghost_extend_eval alone
    in_transformers=False,
    uncomputed=_uncomputed,
    decode=_decode,
    encode=_encode,
    # Its shares add up to 1, over the routed experts of each layer, as ours do.
    balancing=lambda config: {"router_aux_loss_coef": config.router_aux_loss_coef},
)

EMO_DENSE = Family(
    model_type="olmo2_noqknorm_prenorm",
    architecture="Olmo2NoQKNormPrenormForCausalLM",
    tensors={**OUTSIDE, **PRE_NORMS, **ATTENTION, **ALL_ATTENTION_BIAS, **DENSE_FFN},
    fields={"intermediate_size": "intermediate_size", **BIASED_ATTENTION},
    fixed={"num_experts": 0},
    defaults={"rope_theta": 1e4, "rms_norm_eps": 1e-5},
    in_transformers=False,
    encode=lambda config: NO_IDS,
)
