"""EMO's forward pass by plain loops, from the facts of allenai/EMO@fb07783: no class of transformers has it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def tiny_emo(**changes: Any) -> tuple[dict[str, Any], Weights]:
    """Settings as the published ``config.json`` has them, but small, and weights, every one of them random."""
    settings: dict[str, Any] = {
        "architectures": ["EmoForCausalLM"],
        "model_type": "emo",
        "auto_map": {"AutoConfig": "configuration_emo.EmoConfig"},
        "always_active_experts": None,
        "always_active_experts_per_layer": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dense_intermediate_size": None,
        "dense_mlp_bias": False,
        "dtype": "float32",
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 24,
        "initializer_range": 0.02,
        "intermediate_size": 12,
        "max_position_embeddings": 64,
        "norm_topk_prob": False,
        "num_attention_heads": 4,
        "num_experts": 9,
        "num_experts_per_layer": None,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "num_shared_experts": 1,
        "num_shared_experts_per_layer": None,
        "output_router_logits": True,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500000,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": 50,
    } | changes  # fmt: skip
    draw = torch.Generator().manual_seed(3)
    hidden, vocabulary, width = (settings[key] for key in ("hidden_size", "vocab_size", "intermediate_size"))
    weights: Weights = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=draw) / math.sqrt(columns)

    def vector(name: str, size: int, mean: float) -> None:
        weights[name] = mean + 0.3 * torch.randn(size, generator=draw)

    def feed_forward(name: str, width: int) -> None:
        for one in ("gate", "up"):
            matrix(f"{name}.{one}_proj", width, hidden)
        matrix(f"{name}.down_proj", hidden, width)

    matrix("model.embed_tokens", vocabulary, hidden)
    matrix("lm_head", vocabulary, hidden)
    vector("model.norm.weight", hidden, 1.0)
    for index in range(settings["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        of_a_head = hidden // settings["num_attention_heads"]
        for one in "qkvo":
            rows = of_a_head * settings["num_key_value_heads"] if one in "kv" else hidden
            matrix(f"{layer}.self_attn.{one}_proj", rows, hidden)
            if settings["attention_bias"]:
                vector(f"{layer}.self_attn.{one}_proj.bias", rows, 0.0)
        for one in ("attention", "feedforward"):
            vector(f"{layer}.pre_{one}_layernorm.weight", hidden, 1.0)
        experts, _ = experts_of(settings, index)
        if not experts:
            feed_forward(f"{layer}.mlp", settings["dense_intermediate_size"])
            continue
        matrix(f"{layer}.mlp.gate", experts, hidden)
        weights[f"{layer}.mlp.gate.weight"] *= 3
        for expert in range(experts):
            feed_forward(f"{layer}.mlp.experts.{expert}", width)
    return settings, weights


def experts_of(settings: dict[str, Any], layer: int) -> tuple[int, int]:
    """Experts of a layer, and how many of them are shared."""
    if settings["num_experts_per_layer"] is None:
        return settings["num_experts"], settings["num_shared_experts"]
    experts = settings["num_experts_per_layer"][layer]
    each = settings["num_shared_experts_per_layer"]
    return experts, min(settings["num_shared_experts"], experts) if each is None else each[layer]


def logits(settings: dict[str, Any], weights: Weights, ids: Tensor) -> Tensor:
    """Of one sequence of ids (S,): (S, V)."""
    found = [weights["model.embed_tokens.weight"][one] for one in ids.tolist()]
    for index in range(settings["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        seen = [_norm(x, weights[f"{layer}.pre_attention_layernorm.weight"], settings) for x in found]
        added = _attention(settings, weights, f"{layer}.self_attn", seen)
        found = [x + more for x, more in zip(found, added, strict=True)]
        experts = experts_of(settings, index)
        for place, x in enumerate(found):
            seen_one = _norm(x, weights[f"{layer}.pre_feedforward_layernorm.weight"], settings)
            found[place] = x + _mlp(settings, weights, f"{layer}.mlp", seen_one, *experts)
    last = [_norm(x, weights["model.norm.weight"], settings) for x in found]
    return torch.stack([weights["lm_head.weight"] @ x for x in last])


def _norm(x: Tensor, weight: Tensor, settings: dict[str, Any]) -> Tensor:
    return weight * x / (x.square().mean() + settings["rms_norm_eps"]).sqrt()


def _turned(x: Tensor, position: int, theta: float) -> Tensor:
    """A head x (D,) at a position: dimension j and j + D/2 turn together."""
    half, out = len(x) // 2, x.clone()
    for j in range(half):
        angle = position * theta ** (-2 * j / len(x))
        cos, sin = math.cos(angle), math.sin(angle)
        out[j], out[j + half] = x[j] * cos - x[j + half] * sin, x[j + half] * cos + x[j] * sin
    return out


def _attention(settings: dict[str, Any], weights: Weights, name: str, xs: list[Tensor]) -> list[Tensor]:
    heads, groups = settings["num_attention_heads"], settings["num_key_value_heads"]
    width = settings["hidden_size"] // heads

    def projected(one: str, x: Tensor) -> Tensor:
        bias = weights.get(f"{name}.{one}_proj.bias")
        out = weights[f"{name}.{one}_proj.weight"] @ x
        return out if bias is None else out + bias

    parts = {one: [projected(one, x).view(-1, width) for x in xs] for one in "qkv"}
    outputs = []
    for place in range(len(xs)):
        found = []
        for head in range(heads):
            group = head * groups // heads
            query = _turned(parts["q"][place][head], place, settings["rope_theta"])
            keys = [_turned(parts["k"][i][group], i, settings["rope_theta"]) for i in range(place + 1)]
            shares = torch.stack([query @ key / math.sqrt(width) for key in keys]).softmax(0)
            found.append(sum(share * parts["v"][i][group] for i, share in enumerate(shares)))
        outputs.append(projected("o", torch.cat(found)))
    return outputs


def _feed_forward(weights: Weights, name: str, x: Tensor) -> Tensor:
    gate = weights[f"{name}.gate_proj.weight"] @ x
    return weights[f"{name}.down_proj.weight"] @ (gate * gate.sigmoid() * (weights[f"{name}.up_proj.weight"] @ x))


def _mlp(settings: dict[str, Any], weights: Weights, name: str, x: Tensor, experts: int, shared: int) -> Tensor:
    if not experts:
        return _feed_forward(weights, name, x)
    scores = weights[f"{name}.gate.weight"] @ x
    routed = scores[: experts - shared].softmax(0)
    chosen = routed.argsort(descending=True)[: settings["num_experts_per_tok"] - shared].tolist()
    weight = {expert: routed[expert] for expert in chosen}
    if settings["norm_topk_prob"]:
        total = sum(weight.values())
        weight = {expert: value / total for expert, value in weight.items()}
    beside = scores[experts - shared :].softmax(0)  # of one it is 1
    weight |= {experts - shared + i: value for i, value in enumerate(beside)}
    return sum((w * _feed_forward(weights, f"{name}.experts.{e}", x) for e, w in weight.items()), torch.zeros(len(x)))
