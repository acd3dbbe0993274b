"""llama.cpp's architectures: which family each is, and what a file's metadata are as that family's ``config.json``.

What files do not say, since llama.cpp has it in its code, stands here: whether weights of the chosen experts are
renormalised, which order rows of queries and keys have, the constants of Grok-1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moebed.checkpoints.gguf.header import Header
from moebed.errors import ConfigError, UserError

_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
_ROPE = {  # rope.scaling.* -> transformers' name
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_SOFTMAX, _SIGMOID, _SOFTMAX_OF_CHOSEN = 1, 2, 3  # of expert_gating_func
# What changes nothing of what a model computes, or is seen in the tensors themselves. llama.cpp reads Grok's cap on
# router logits and does not apply it; xai-org's release has none.
_HARMLESS = ("vocab_size", "rope.scaling.finetuned", "router_logit_softcapping")
_LAYERS_AT_MOST = 1 << 12


class Facts:
    """A file's metadata under its architecture's prefix, and its tensors."""

    def __init__(self, header: Header, architecture: str) -> None:
        self.header, self._prefix = header, f"{architecture}."
        self.where = str(header.path)

    def size(self, name: str, default: int | None = None) -> int:
        """A size, at least 1; see :meth:`Header.size`."""
        return self.header.size(self._prefix + name, default)

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """A value; see :meth:`Header.get`."""
        return self.header.get(self._prefix + name, kind, default)

    def rows(self, tensor: str, default: int = 1) -> int:
        """Rows of a tensor's matrices; the default where there is no such tensor."""
        found = self.header.tensors.get(tensor)
        return found.shape[-2] if found is not None and len(found.shape) > 1 else default

    @property
    def layers(self) -> int:
        """Layers of the model: blocks, without those that predict further tokens."""
        return self.size("block_count") - self.get("nextn_predict_layers", int, 0)

    def layers_with(self, suffix: str) -> list[int]:
        """Layers that have a tensor of this name."""
        return [i for i in range(self.size("block_count")) if f"blk.{i}.{suffix}" in self.header.tensors]

    def unread(self) -> list[str]:
        """Keys of the architecture that nothing asked for."""
        known = self.header.used | {self._prefix + name for name in _HARMLESS}
        return sorted(key for key in self.header.values if key.startswith(self._prefix) and key not in known)


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Args:
        settings: Its family's ``config.json``, beside what all have.
        pairs: Whether the rows of queries and keys are in the order of neighbouring pairs.
        gating: What expert_gating_func may be, the first where it is left out; 0 is none, too.
        routed: Whether it reads the groups and the scale of its routing; others must have none.
        latent: Whether keys and values come of a latent, so that a head's widths are its own business.
        stretched: What of stretched positions does not stand under rope.scaling, or not as in a ``config.json``.
        notes: What a person should know of its files.
    """

    settings: Callable[[Facts], dict[str, Any]]
    pairs: bool = False
    gating: tuple[int, ...] = (_SOFTMAX,)
    routed: bool = False
    latent: bool = False
    stretched: Callable[[Facts], dict[str, Any]] = lambda facts: {}
    notes: tuple[str, ...] = ()


def _llama(facts: Facts) -> dict[str, Any]:
    """Mixtral where there are experts; else LLaMA or Mistral, which such a file does not tell apart."""
    width = {"intermediate_size": facts.size("feed_forward_length")}
    window = facts.get("attention.sliding_window", int)
    if facts.get("expert_count", int, 0):
        experts = {"num_local_experts": facts.size("expert_count"), **_chosen(facts)}
        return {"model_type": "mixtral", "sliding_window": window, **width, **experts}
    called = str(facts.header.get("general.name", str, "")).lower()
    if window or "mistral" in called:
        return {"model_type": "mistral", "sliding_window": window, **width}
    return {"model_type": "llama", **width}


def _chosen(facts: Facts) -> dict[str, Any]:
    return {"num_experts_per_tok": facts.size("expert_used_count")}


def _qwen2(facts: Facts) -> dict[str, Any]:
    return {"model_type": "qwen2", "intermediate_size": facts.size("feed_forward_length")}


def _qwen_moe(facts: Facts, model_type: str, normalised: bool) -> dict[str, Any]:
    sparse = facts.layers_with("ffn_gate_inp.weight")
    experts = facts.rows(f"blk.{sparse[0]}.ffn_gate_exps.weight") if sparse else 1
    return {
        "model_type": model_type,
        "num_experts": facts.size("expert_count"),
        "moe_intermediate_size": facts.size("expert_feed_forward_length", experts),
        "intermediate_size": facts.size("feed_forward_length", experts),
        "norm_topk_prob": facts.get("expert_weights_norm", bool, normalised),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(facts.size("block_count")) if i not in sparse],
        **_chosen(facts),
    }


def _qwen2moe(facts: Facts) -> dict[str, Any]:
    settings = _qwen_moe(facts, "qwen2_moe", normalised=False)
    shared = facts.layers_with("ffn_gate_shexp.weight")
    width = facts.rows(f"blk.{shared[0]}.ffn_gate_shexp.weight") if shared else None
    settings["shared_expert_intermediate_size"] = facts.size("expert_shared_feed_forward_length", width)
    settings["qkv_bias"] = bool(facts.layers_with("attn_q.bias"))
    return settings


def _qwen3moe(facts: Facts) -> dict[str, Any]:
    return _qwen_moe(facts, "qwen3_moe", normalised=True)


def _olmoe(facts: Facts) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "num_experts": facts.size("expert_count"),
        "intermediate_size": facts.size("feed_forward_length"),
        "norm_topk_prob": facts.get("expert_weights_norm", bool, False),
        "clip_qkv": facts.get("attention.clamp_kqv", float),
        **_chosen(facts),
    }


def _deepseek(facts: Facts) -> dict[str, Any]:
    sparse = facts.layers_with("ffn_gate_inp.weight")
    first = sparse[0] if sparse else facts.size("block_count")
    width = facts.size("expert_feed_forward_length")
    shared = facts.rows(f"blk.{first}.ffn_gate_shexp.weight", 0) // width
    return {
        "model_type": "deepseek",
        "n_routed_experts": facts.size("expert_count"),
        "n_shared_experts": facts.get("expert_shared_count", int, shared) or None,
        "moe_intermediate_size": width,
        "intermediate_size": facts.size("feed_forward_length"),
        "first_k_dense_replace": facts.get("leading_dense_block_count", int, first),
        "moe_layer_freq": 1,
        "norm_topk_prob": facts.get("expert_weights_norm", bool, False),
        "scoring_func": "softmax",
        **_chosen(facts),
    }


def _grok(facts: Facts) -> dict[str, Any]:
    """Files from before these had keys mean Grok-1's own numbers."""
    return {
        "model_type": "grok-1",
        "num_experts": facts.size("expert_count"),
        "intermediate_size": facts.size("feed_forward_length"),
        "hidden_act": "gelu_pytorch_tanh",
        "max_attn_value": facts.get("attn_logit_softcapping", float, 30.0),
        "attn_output_multiplier": facts.get("attention.output_scale", float, 0.08838834764831845),
        "embedding_multiplier_scale": facts.get("embedding_scale", float, 78.38367176906169),
        "output_multiplier_scale": facts.get("logit_scale", float, 0.5773502691896257),
        **({"final_logit_softcapping": cap} if (cap := facts.get("final_logit_softcapping", float, 0.0)) else {}),
        **_chosen(facts),
    }


def _gpt_oss(facts: Facts) -> dict[str, Any]:
    """Which layers have the window does not stand in files: every other one, from the first on."""
    return {
        "model_type": "gpt_oss",
        "num_local_experts": facts.size("expert_count"),
        "intermediate_size": facts.size("expert_feed_forward_length"),
        "sliding_window": facts.size("attention.sliding_window", 128),
        "attention_bias": bool(facts.layers_with("attn_q.bias")),
        **_chosen(facts),
    }


def _deepseek2(facts: Facts) -> dict[str, Any]:
    """DeepSeek-V3 where scores are sigmoids, else V2. Newer files keep a head's widths under names of their own."""
    sigmoid = facts.get("expert_gating_func", int, _SOFTMAX) == _SIGMOID
    rotary, groups = facts.size("rope.dimension_count"), facts.get("expert_group_count", int, 0) or 1
    width = facts.size("attention.key_length_mla", facts.size("attention.key_length"))
    found = {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "num_hidden_layers": facts.layers,
        "num_key_value_heads": facts.size("attention.head_count"),
        "head_dim": rotary,
        "kv_lora_rank": facts.size("attention.kv_lora_rank"),
        "q_lora_rank": facts.get("attention.q_lora_rank", int, 0) or None,
        "qk_nope_head_dim": width - rotary,
        "qk_rope_head_dim": rotary,
        "v_head_dim": facts.size("attention.value_length_mla", facts.size("attention.value_length")),
        "n_routed_experts": facts.size("expert_count"),
        "n_shared_experts": facts.size("expert_shared_count"),
        "moe_intermediate_size": facts.size("expert_feed_forward_length"),
        "intermediate_size": facts.size("feed_forward_length"),
        "first_k_dense_replace": facts.get("leading_dense_block_count", int, 0),
        "routed_scaling_factor": facts.get("expert_weights_scale", float, 0.0) or 1.0,
        "n_group": groups,
        "topk_group": facts.get("expert_group_used_count", int, 0) or 1,
        **_chosen(facts),
    }
    if sigmoid:
        return {**found, "norm_topk_prob": facts.get("expert_weights_norm", bool, False)}
    return {**found, "topk_method": "greedy" if groups == 1 else "group_limited_greedy"}


def _deepseek2_stretched(facts: Facts) -> dict[str, Any]:
    """llama.cpp keeps a tenth of mscale_all_dim; mscale is equal to it in all published models."""
    mscale = 10 * facts.get("rope.scaling.yarn_log_multiplier", float, 0.0)
    return {"mscale": mscale, "mscale_all_dim": mscale} if mscale else {}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, pairs=True),
    "qwen2": Architecture(_qwen2),
    "qwen2moe": Architecture(_qwen2moe),
    "qwen3moe": Architecture(_qwen3moe),
    "olmoe": Architecture(_olmoe),
    "deepseek": Architecture(_deepseek, pairs=True),
    "deepseek2": Architecture(
        _deepseek2, gating=(_SOFTMAX, _SIGMOID), routed=True, latent=True, stretched=_deepseek2_stretched
    ),
    "gpt-oss": Architecture(
        _gpt_oss,
        gating=(_SOFTMAX_OF_CHOSEN, _SOFTMAX),
        stretched=lambda facts: {"truncate": False},
        notes=(
            "YaRN's bounds are not rounded to whole dimensions, as in the release; llama.cpp rounds them, so that "
            "outputs are the release's and not llama.cpp's",
        ),
    ),
    "grok": Architecture(
        _grok,
        notes=(
            "llama.cpp renormalises the weights of a token's two experts, xai-org's release does not; they are left as "
            "they are here, so that outputs are the release's and not llama.cpp's",
        ),
    ),
}


def settings_of(facts: Facts, architecture: Architecture) -> dict[str, Any]:
    """A file's metadata as a ``config.json`` of its family.

    Raises:
        UserError: One is missing, of another kind, or does not go with the tensors.
    """
    _require_layers(facts)
    embedding = facts.header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{facts.where}: tensor token_embd.weight is missing, or no matrix")
    hidden, heads = facts.size("embedding_length"), facts.size("attention.head_count")
    head = facts.size("attention.key_length", max(1, hidden // heads))
    epsilon = facts.get("attention.layer_norm_rms_epsilon", float)
    if epsilon is None:
        raise UserError(f"{facts.where}: attention.layer_norm_rms_epsilon is missing from its metadata")
    if not architecture.latent and facts.size("attention.value_length", head) != head:
        raise ConfigError(f"{facts.where}: heads of keys and of values differ in width, which is not supported")
    settings = {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": facts.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.size("attention.head_count_kv", heads),
        "head_dim": head,
        "rms_norm_eps": epsilon,
        "max_position_embeddings": facts.size("context_length"),
        "rope_theta": facts.get("rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in facts.header.tensors,
        "hidden_act": "silu",
        **architecture.settings(facts),
    }
    settings |= _rope(facts, architecture, settings["head_dim"])
    _require_experts(facts)
    _require_known_routing(facts, architecture)
    tokens = {ours: facts.header.get(f"tokenizer.ggml.{theirs}", int) for ours, theirs in _TOKENS.items()}
    return settings | {name: token for name, token in tokens.items() if token is not None}


def _rope(facts: Facts, architecture: Architecture, head: int) -> dict[str, Any]:
    """What a file says of positions beside the base."""
    turned = facts.size("rope.dimension_count", head)
    found: dict[str, Any] = {} if turned == head else {"partial_rotary_factor": turned / head}
    kind = facts.get("rope.scaling.type", str, "none")
    values = {theirs: facts.get(f"rope.scaling.{ours}", float) for ours, theirs in _ROPE.items()}
    if kind != "none":
        given = {name: value for name, value in values.items() if value is not None}
        found["rope_scaling"] = {"rope_type": kind, **given, **architecture.stretched(facts)}
    return found


def llama3_scaling(divisors: Sequence[float], theta: float) -> dict[str, float]:
    """Llama 3's stretching of positions, which files keep as a number to divide each frequency by (D/2,).

    Raises:
        ConfigError: These are no such numbers.
    """
    factor, low, high, original = max(divisors), 1.0, 4.0, 8192
    for place, found in enumerate(divisors):
        length = 2 * math.pi * theta ** (place / len(divisors))
        smooth = min(1.0, max(0.0, (original / length - low) / (high - low)))
        wanted = 1 / ((1 - smooth) / factor + smooth)
        if not abs(found / wanted - 1) < 1e-4:
            raise ConfigError(
                f"rope_freqs.weight divides frequency {place} by {found:.6g}; only Llama 3's stretching is supported, "
                f"which divides it by {wanted:.6g}"
            )
    scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return {**scaling, "original_max_position_embeddings": original}


def _require_known_routing(facts: Facts, architecture: Architecture) -> None:
    """Weights of the chosen experts are what the architecture has them be, and in most of them that alone."""
    known: dict[str, tuple[type, tuple[float, ...]]] = {"expert_gating_func": (int, architecture.gating)}
    if not architecture.routed:
        known |= {"expert_weights_scale": (float, (1.0,)), "expert_group_count": (int, (1,))}
    for name, (kind, wanted) in known.items():
        if (found := facts.get(name, kind, wanted[0])) not in (*wanted, 0):
            raise ConfigError(f"{facts.where}: {name} is {found}; supported is {' or '.join(map(str, wanted))} only")


def _require_layers(facts: Facts) -> None:
    """The announced layers are those that are there; anything else would be room made for a number in a header."""
    count = facts.size("block_count")
    names = (name.split(".") for name in facts.header.tensors if name.startswith("blk."))
    there = {parts[1] for parts in names if len(parts) > 2}
    if count > _LAYERS_AT_MOST or count != len(there):
        raise UserError(f"{facts.where}: block_count is {count} but tensors of {len(there)} layers are there")


def _require_experts(facts: Facts) -> None:
    """The same of experts."""
    count = facts.get("expert_count", int, 0)
    for name, info in facts.header.tensors.items():
        if name.endswith("_exps.weight") and (len(info.shape) != 3 or info.shape[0] != count):
            raise UserError(
                f"{info.path}: tensor {name} has shape {list(info.shape)} but expert_count is {count}; the file is "
                "damaged"
            )
    most = max((info.shape[0] for name, info in facts.header.tensors.items() if "ffn_gate_inp." in name), default=0)
    if count > most:
        raise UserError(f"{facts.where}: expert_count is {count} but a router has {most} rows; the file is damaged")
