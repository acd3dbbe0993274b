"""Parameters and floating-point operations of a config, counted without building the model.

H hidden, F expert intermediate, E experts, K experts per token, V vocabulary, S sequence length.
"""

from __future__ import annotations

import torch

from moebed.config import LayerConfig, ModelConfig
from moebed.routers import ROUTERS, build_router


def count_parameters(config: ModelConfig, training: bool = False) -> tuple[int, int]:
    """Parameters in total, and those active for one token (embedding and head included).

    Active are the K experts that a token is sent to, and where the router runs more, those; in expectation where chance
    decides (competesmoe in training), or where K is an average (relu).
    """
    hidden = config.hidden_size
    embedding = config.vocab_size * hidden
    total = active = hidden + embedding * (1 if config.tie_word_embeddings else 2)
    for index in range(config.num_hidden_layers):
        layer = config.layer(index)
        common = _attention_parameters(config) + hidden * (4 if config.post_norms else 2)
        total += common
        active += common
        if layer.num_experts == 0:
            assert config.intermediate_size is not None
            total += 3 * hidden * config.intermediate_size
            active += 3 * hidden * config.intermediate_size
            continue
        router = ROUTERS[config.router]
        expert = (router.gate_width(config) + 2 * hidden) * layer.moe_intermediate_size
        shared = layer.num_shared_experts * 3 * hidden * layer.moe_intermediate_size
        if layer.num_shared_experts and config.shared_expert_gate:
            shared += hidden
        common = shared + _router_parameters(config, layer)
        total += layer.num_experts * expert + common
        active += round(router.experts_run(config, layer, training) * expert) + common
    return total, active


def _router_parameters(config: ModelConfig, layer: LayerConfig) -> int:
    """All of them are active for every token."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_router(config, layer).parameters())


def _attention_parameters(config: ModelConfig) -> int:
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    parameters = config.hidden_size * (2 * queries + 2 * keys)
    if config.attention_bias:
        parameters += queries + 2 * keys
    if config.qk_norm != "none":
        parameters += 2 * config.head_dim if config.qk_norm == "head" else queries + keys
    return parameters


def flops_per_token(config: ModelConfig, sequence_length: int, training: bool = False) -> int:
    """Forward FLOPs of one token, a multiply-add as two: matrices of the active path, head, and causal attention.

    Attention products count S / 2 keys a token on average (or the sliding window). Backward takes twice as many.
    In training a router may run more experts than in evaluation.
    """
    assert config.head_dim is not None
    hidden = config.hidden_size
    _, active = count_parameters(config, training)
    norms = hidden * (1 + config.num_hidden_layers * (4 if config.post_norms else 2))
    matrices = active - norms - (0 if config.tie_word_embeddings else config.vocab_size * hidden)
    keys = sequence_length / 2 if config.sliding_window is None else min(sequence_length / 2, config.sliding_window)
    attention = 4 * keys * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return int(2 * matrices + attention)
