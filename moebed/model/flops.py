"""Parameters and floating-point operations of a config, counted without building the model.

H hidden, F expert intermediate, E experts, K experts per token, V vocabulary, S sequence length.
"""

from __future__ import annotations

import math

import torch

from moebed.model.config import ModelConfig
from moebed.model.hyper_experts import num_sets
from moebed.model.latent_attention import build_attention
from moebed.model.routers import ROUTERS, build_router

Shapes = dict[str, list[tuple[int, ...]]]  # of parameters, by part


def outer_shapes(config: ModelConfig) -> Shapes:
    """Shapes of the parameters outside the layers."""
    matrix = (config.vocab_size, config.hidden_size)
    shapes: Shapes = {
        "embedding": [matrix],
        "norms": _norms(config, 1),
        "head": [] if config.tie_word_embeddings else [matrix],
    }
    if config.lm_head_bias:
        shapes["head"].append((config.vocab_size,))
    if config.hyper_experts is not None:
        shapes["adapter generator"] = config.hyper_experts.generator_shapes(config.hidden_size)
    return shapes


def layer_shapes(config: ModelConfig, index: int) -> Shapes:
    """Shapes of the parameters of one layer; those of "experts" have E as their first axis."""
    hidden, layer = config.hidden_size, config.layer(index)
    with torch.device("meta"):
        attention = build_attention(config).named_parameters()
    shapes: Shapes = {"attention": [], "norms": _norms(config, config.norms_per_layer)}
    for name, parameter in attention:
        shapes["norms" if "norm" in name else "attention"].append(tuple(parameter.shape))
    if layer.num_experts == 0:
        assert config.intermediate_size is not None
        return shapes | {"dense FFN": _gated_ffn(hidden, config.intermediate_size)}
    with torch.device("meta"):
        shapes["router"] = [tuple(parameter.shape) for parameter in build_router(config, layer).parameters()]
    shapes["experts"] = list(ROUTERS[config.router].experts_class.shapes(config, layer).values())
    if layer.num_shared_experts:
        shapes["shared experts"] = _gated_ffn(hidden, layer.shared_intermediate_size)
        if config.shared_expert_gate:
            shapes["shared experts"].append((1, hidden))
    if config.hyper_experts is not None:
        part = "adapter embeddings" if config.hyper_experts.is_generated else "adapters"
        shapes[part] = config.hyper_experts.layer_shapes(hidden, layer.num_experts)
    return shapes


def _norms(config: ModelConfig, number: int) -> list[tuple[int, ...]]:
    """Scales, and biases where norms have them."""
    return [(config.hidden_size,)] * (number if config.norm_type == "rms" else 2 * number)


def _gated_ffn(hidden: int, width: int) -> list[tuple[int, ...]]:
    return [(width, hidden), (width, hidden), (hidden, width)]


def count(shapes: list[tuple[int, ...]]) -> int:
    """Elements of tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


def count_parameters(config: ModelConfig, training: bool = False) -> tuple[int, int]:
    """Parameters in total, and those active for one token (embedding and head included).

    Active are the K experts that a token is sent to, and where the router runs more, those; in expectation where chance
    decides (competesmoe in training), or where K is an average (relu). A router is active as a whole, but for what it
    has for training alone (noisy_topk). Of HyperMoE the weights of one adapter a layer are, and not what generates
    them, which runs once for a set of experts and not for a token (:func:`generator_flops`).
    """
    outer = outer_shapes(config)
    total = sum(map(count, outer.values()))
    active = total - count(outer.get("adapter generator", []))
    hyper = config.hyper_experts
    adapter = 0 if hyper is None else hyper.adapter_parameters(config.hidden_size)
    for index in range(config.num_hidden_layers):
        shapes, layer = layer_shapes(config, index), config.layer(index)
        experts, adapters = count(shapes.pop("experts", [])), count(_pop_adapters(shapes))
        common = sum(map(count, shapes.values()))
        total += common + experts + adapters
        active += common + (adapter if adapters else 0)
        if experts:
            run = ROUTERS[config.router].experts_run(config, layer, training)
            active += round(experts / layer.num_experts * run)
            active -= 0 if training else ROUTERS[config.router].idle_parameters(config, layer)
    return total, active


def flops_per_token(config: ModelConfig, sequence_length: int, training: bool = False) -> int:
    """Forward FLOPs of one token, a multiply-add as two: matrices of the active path, head, and causal attention.

    Attention products count S / 2 keys a token on average (or the sliding window). Backward takes twice as many.
    In training a router may run more experts than in evaluation.
    """
    assert config.head_dim is not None
    _, active = count_parameters(config, training)
    norms = count(_norms(config, 1 + config.num_hidden_layers * config.norms_per_layer))
    matrices = active - norms - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    windows = [config.window(index) or sequence_length for index in range(config.num_hidden_layers)]
    keys = sum(min(sequence_length / 2, window) for window in windows)
    widths = config.head_dim + config.value_head_dim
    attention = 2 * keys * config.num_attention_heads * widths
    rule = ROUTERS[config.router]
    matrices += sum(rule.other_products(config, config.layer(index)) for index in config.moe_layers)
    return int(2 * matrices + attention)


def generator_flops(config: ModelConfig, num_tokens: int) -> int:
    """Forward FLOPs that HyperMoE's generator takes at most in a pass of so many tokens: once for each set of experts.

    Two for each of its weights and set, and for each of those of the layer's own map; 0 where nothing is generated.
    """
    if config.hyper_experts is None or not config.hyper_experts.is_generated:
        return 0
    shared, total = _weights(config.hyper_experts.generator_shapes(config.hidden_size)), 0
    for index in config.moe_layers:
        layer = config.layer(index)
        own = _weights(_pop_adapters(layer_shapes(config, index)))
        total += 2 * min(num_tokens, num_sets(config, layer)) * (shared + own)
    return total


def _pop_adapters(shapes: Shapes) -> list[tuple[int, ...]]:
    """Take out what a layer's adapters have of their own."""
    return shapes.pop("adapters", []) + shapes.pop("adapter embeddings", [])


def _weights(shapes: list[tuple[int, ...]]) -> int:
    return count([shape for shape in shapes if len(shape) == 2])


def scaling_sizes(config: ModelConfig) -> dict[str, float] | None:
    """What scaling laws call a model's size, each another count, and the shape of its experts.

    Returns:
        ``dense_parameters`` of the model with one expert in place of each layer's experts and without router and
        embeddings; ``active_parameters`` and ``total_parameters``, embeddings included;
        ``total_nonembedding_parameters``, without routers too; ``E`` experts and ``K`` of a token, 1 and 1 in a dense
        model; ``G``, the parameters of a dense FFN of 8H² over those of an expert; ``expansion_rate``, E / G. None
        where layers with experts differ in these.
    """
    total, active = count_parameters(config)
    layers = [config.layer(index) for index in config.moe_layers or range(1)]
    kinds = {(layer.num_experts or 1, layer.num_experts_per_tok, layer.moe_intermediate_size) for layer in layers}
    if len(kinds) != 1:
        return None
    experts, chosen, width = kinds.pop()
    if not config.moe_layers:
        assert config.intermediate_size is not None
        chosen, width = 1, config.intermediate_size
    outer = sum(count(shapes) for part, shapes in outer_shapes(config).items() if part != "adapter generator")
    dense = routers = 0
    for index in range(config.num_hidden_layers):
        shapes = layer_shapes(config, index)
        routers += count(shapes.pop("router", []))
        _pop_adapters(shapes)
        dense += count(shapes.pop("experts", [])) // experts + sum(map(count, shapes.values()))
    granularity = 8 * config.hidden_size / (3 * width)
    return {
        "dense_parameters": dense,
        "active_parameters": active,
        "total_parameters": total,
        "total_nonembedding_parameters": total - outer - routers,
        "E": experts,
        "K": chosen,
        "G": granularity,
        "expansion_rate": experts / granularity,
    }
