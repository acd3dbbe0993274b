"""What the forward pass keeps for the backward pass, counted from the tensors that autograd saves.

T tokens, S positions, H hidden, A query heads, G key-value heads, D head width, E experts, K experts per token,
F expert intermediate, R rows of the experts, V vocabulary; r bytes of the residual stream, c bytes of a product's
operands. Every formula is for eager execution; a compiled step keeps at most as much, as it recomputes what is cheap.
"""

from __future__ import annotations

from moebed.model.hyper_experts import num_sets, padding, sets_at_once
from moebed.model.losses import logits_at_once
from moebed.model.routers import ROUTERS
from moebed.plan.setup import Setup

Parts = dict[str, int]  # bytes by part


def residual(setup: Setup) -> int:
    """Bytes of the residual stream, r·T·H: what activation checkpointing keeps of a block."""
    return setup.stream.parameter * setup.tokens * setup.config.hidden_size


def _norm(setup: Setup, width: int, narrow: int) -> int:
    """An RMSNorm: its input at narrow bytes, and a float32 for each row, narrow·T·width + 4·T."""
    return (narrow * width + 4) * setup.tokens


def _stream_norm(setup: Setup) -> int:
    """Of the residual stream: r·T·H + 4·T; a LayerNorm has two numbers for each row."""
    found = _norm(setup, setup.config.hidden_size, setup.stream.parameter)
    return found if setup.config.norm_type == "rms" else found + 4 * setup.tokens


def _pre_norm(setup: Setup) -> int:
    """Before attention, FFN or MoE, where there is one."""
    return _stream_norm(setup) if setup.config.pre_norms else 0


def _post_norm(setup: Setup) -> int:
    """After them, where there is one."""
    if not setup.config.post_norms:
        return 0
    found = _product_norm(setup, setup.config.hidden_size)
    return found if setup.config.norm_type == "rms" else found + 4 * setup.tokens


def _product_norm(setup: Setup, width: int) -> int:
    """Of what a product gave: c·T·width + 4·T."""
    return _norm(setup, width, setup.stream.compute)


def _matrix_inputs(setup: Setup, products: int) -> int:
    """The normed input of several linear maps: kept once, or under autocast as a cast copy for each of them."""
    if setup.stream.autocast:
        return products * setup.stream.compute * setup.tokens * setup.config.hidden_size
    return residual(setup)


def attention(setup: Setup) -> int:
    """Norm, the input of the three projections, Q, K, V with keys repeated to A heads, what mixes, and its output.

    3·c·T·A·D for Q, K, V, or c·T·(A + 2·G)·D where a CPU's compiled attention serves, which repeats no key; c·T·A·D
    for the output projection's input; plain products keep the probabilities, c·T·A·S (a soft cap: tanh's and softmax's
    in float32, and the cast copy), fused attention 4·T·A.
    """
    config, c, tokens = setup.config, setup.stream.compute, setup.tokens
    total = _pre_norm(setup) + (_projected(setup) if config.kv_lora_rank is None else _latent(setup))
    total += _post_norm(setup)
    pairs = tokens * config.num_attention_heads * setup.sequence_length
    if not setup.keeps_attention_probabilities:
        return total + 4 * tokens * config.num_attention_heads
    if config.attn_logit_softcapping is None:
        return total + c * pairs
    return total + 8 * pairs + (c * pairs if c < 4 else 0)


def _projected(setup: Setup) -> int:
    """Queries, keys and values by a map each, and what is mixed of them."""
    config = setup.config
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    repeated = keys if setup.attention_is_compiled else queries
    total = _matrix_inputs(setup, 3) + 2 * setup.stream.compute * setup.tokens * (queries + repeated)
    if config.qk_norm != "none":
        total += _product_norm(setup, queries) + _product_norm(setup, keys)
    return total


def _latent(setup: Setup) -> int:
    """The latents before and after their norms; Q and K of n + r dimensions a head, V (v), and what is mixed (v).

    Fused attention has V and what it mixes as wide as Q, and keeps what is mixed both ways.
    """
    config, c, tokens = setup.config, setup.stream.compute, setup.tokens
    assert config.head_dim is not None
    assert config.kv_lora_rank is not None
    rank, width, values = config.kv_lora_rank, config.head_dim, config.value_head_dim
    total = _matrix_inputs(setup, 2) + _product_norm(setup, rank + config.rotary_dim) + c * tokens * rank
    if config.q_lora_rank is not None:
        total += _product_norm(setup, config.q_lora_rank) + c * tokens * config.q_lora_rank
    plain = setup.keeps_attention_probabilities
    of_head = 2 * width + 2 * values if plain else 4 * width + values
    return total + c * tokens * config.num_attention_heads * of_head


def router(setup: Setup, index: int) -> int:
    """Norm, its output in float32, logits, probabilities, their sums, choices (int64) and weights before and after.

    4·T·H + 8·T·E + 4·T + (8 + 4 + 4)·T·K, and 4·T for the sum by which the weights are divided; without 4·T·H of a
    router that has no product, and more of some (``Router.plan_bytes``).
    """
    layer, tokens = setup.config.layer(index), setup.tokens
    weights = 8 * layer.num_experts_per_tok + 4 if setup.config.norm_topk_prob else 4 * layer.num_experts_per_tok
    kept = (
        4 * setup.config.hidden_size * setup.router_keeps_input
        + 8 * layer.num_experts
        + 4
        + 8 * layer.num_experts_per_tok
        + weights
        + ROUTERS[setup.config.router].plan_bytes(setup.config, layer, setup.stream.parameter < 4)
    )
    return _pre_norm(setup) + kept * tokens


def dispatch(setup: Setup, index: int, max_violation: float = 0.0) -> int:
    """The experts' input rows, c·R·H; the order of rows and choices (int64), and the weight of each row."""
    rows = setup.expert_rows(index, max_violation)
    order = 8 * rows + 8 * setup.choices(index)
    return setup.stream.compute * rows * (setup.config.hidden_size + 1) + order


def experts(setup: Setup, index: int, max_violation: float = 0.0) -> int:
    """Gate and up before the activation (2F) and the weighted product of both after it (F): 3·c·R·F."""
    rows, width = setup.expert_rows(index, max_violation), setup.config.layer(index).moe_intermediate_size
    return 3 * setup.stream.compute * rows * width


def _gated_ffn(setup: Setup, width: int) -> int:
    """Gate, activated, up, product: 4·c·T·width."""
    return 4 * setup.stream.compute * setup.tokens * width


def shared_experts(setup: Setup, index: int) -> int:
    """As one FFN on the router's input; a gate keeps its sigmoid and the output that it scales."""
    config, layer, c = setup.config, setup.config.layer(index), setup.stream.compute
    if not layer.num_shared_experts:
        return 0
    gated = config.shared_expert_gate
    total = _gated_ffn(setup, layer.shared_intermediate_size)
    if setup.stream.autocast:
        total += _matrix_inputs(setup, 3 if gated else 2)
    elif setup.stream.parameter < 4 or not setup.router_keeps_input:  # in float32 a gate keeps this very tensor
        total += residual(setup)
    return total + (c * setup.tokens * (config.hidden_size + 1) if gated else 0)


def adapters(setup: Setup, index: int) -> int:
    """HyperMoE's: sorted rows c·R·H, their inner width c·R·A, orders and sets (int64), and one adapter's matrices for
    each of S sets, 2·c·S·A·H; of more sets than are made at a time the rows alone, since the rest is made again.
    """
    config, c = setup.config, setup.stream.compute
    hyper, hidden = config.hyper_experts, config.hidden_size
    if hyper is None:
        return 0
    sets = adapter_sets(setup, index)
    align = padding(setup.tokens, sets, setup.device, c)
    rows = -(-(setup.tokens + sets * (align - 1)) // align) * align
    order = 8 * rows + 8 * setup.tokens + (c * rows if align > 1 else 0)
    if hyper.is_generated and sets > sets_at_once(c * hyper.adapter_parameters(hidden)):
        return c * rows * hidden + order
    # A free adapter's matrices are parameters, and kept only where they are cast.
    weights = 2 * c * sets * hyper.adapter_size * hidden if hyper.is_generated else 0
    return c * rows * (hidden + hyper.adapter_size) + 8 * rows + order + weights


def adapter_sets(setup: Setup, index: int) -> int:
    """Adapters of a layer in a micro-batch on one rank (S)."""
    config, layer = setup.config, setup.config.layer(index)
    assert config.hyper_experts is not None
    return min(setup.tokens, num_sets(config, layer)) if config.hyper_experts.is_generated else layer.num_experts


def dense_ffn(setup: Setup) -> int:
    """Norm, the input of gate and up, and the FFN between."""
    assert setup.config.intermediate_size is not None
    return _pre_norm(setup) + _matrix_inputs(setup, 2) + _gated_ffn(setup, setup.config.intermediate_size)


def block(setup: Setup, index: int, max_violation: float = 0.0) -> Parts:
    """All that one block keeps, by part."""
    parts = {"attention": attention(setup)}
    if setup.config.layer(index).num_experts == 0:
        parts["dense FFN"] = dense_ffn(setup)
    else:
        parts["router"] = router(setup, index)
        parts["dispatch rows"] = dispatch(setup, index, max_violation)
        parts["expert activations"] = experts(setup, index, max_violation)
        if shared := shared_experts(setup, index):
            parts["shared experts"] = shared
        if adapted := adapters(setup, index):
            parts["adapters"] = adapted
    parts["dense FFN" if "dense FFN" in parts else "expert activations"] += _post_norm(setup)
    return parts


def block_outputs(setup: Setup, index: int) -> int:
    """What a recomputed block still keeps beside its input: the routing, which the balancing losses read, and by
    all-to-all where rows that come back belong, 8·N.
    """
    layer = setup.config.layer(index)
    if not layer.num_experts:
        return 0
    kept = (8 * layer.num_experts + 4 + 12 * layer.num_experts_per_tok) * setup.tokens
    by_trips = setup.moves_tokens and setup.layout.exchange == "all_to_all"
    return kept + (round(8 * setup.trips(index)) if by_trips else 0)


def cross_entropy(setup: Setup) -> int:
    """What the cross entropy has beside the logits for a while: 4 bytes for each exponential that it makes at a time,
    and 4 for the logit in float32 where it is of 2. On a CPU all that stays in a core's cache.
    """
    if setup.device == "cpu":
        return 0
    elements = min(setup.tokens * setup.config.vocab_size, logits_at_once(setup.device))
    return elements * (4 if setup.stream.compute == 4 else 8)


def logits(setup: Setup) -> int:
    """Last norm, the head's input, logits c·T·V, and 4·T for the sums of the cross entropy."""
    vocabulary = setup.stream.compute * setup.tokens * setup.config.vocab_size
    return _stream_norm(setup) + _matrix_inputs(setup, 1) + vocabulary + 4 * setup.tokens
