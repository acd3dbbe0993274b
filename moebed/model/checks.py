"""What the numbers of a ModelConfig must be; each raises ConfigError in one line."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from moebed.errors import ConfigError, did_you_mean

Config = Any  # a ModelConfig, whose file imports this one
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_OPTIONAL_SIZES = (
    "intermediate_size",
    "shared_expert_intermediate_size",
    "base_hidden_size",
    "base_moe_intermediate_size",
)
_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_COEFFICIENTS = (
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "output_diversity_loss_coef",
    "weight_diversity_loss_coef",
    "output_orthogonality_loss_coef",
    "probability_variance_loss_coef",
    "router_orthogonality_loss_coef",
    "router_coupling_loss_coef",
    "router_coupling_alpha",
    "locality_loss_coef",
    "initializer_range",
)


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with a message where a condition does not hold."""
    if not condition:
        raise ConfigError(f"model config: {message}")


def check_sizes(config: Config) -> None:
    """What must be given is at least 1."""
    for name in _SIZES:
        require(getattr(config, name) >= 1, f"{name} is {getattr(config, name)}; it must be at least 1")


def check_latent(config: Config) -> bool:
    """Whether attention is latent; what it needs is given with it alone, and nothing that it does not compute."""
    given = [name for name in _LATENT if getattr(config, name) is not None]
    require(
        len(given) == len(_LATENT) or (not given and config.q_lora_rank is None),
        f"{', '.join(given) or 'q_lora_rank'} is given; latent attention needs all of {', '.join(_LATENT)}",
    )
    for name in (*given, "q_lora_rank"):
        value = getattr(config, name)
        require(value is None or value >= 1, f"{name} is {value}; it must be at least 1")
    if given:
        width = config.qk_nope_head_dim + config.qk_rope_head_dim
        for name, wanted in (
            ("head_dim", (None, width)),
            ("num_key_value_heads", (config.num_attention_heads,)),
            ("attention_bias", (False,)),
            ("attention_output_bias", (False,)),
            ("attention_sinks", (False,)),
            ("qk_norm", ("none",)),
            ("partial_rotary_factor", (1,)),
        ):
            value = getattr(config, name)
            require(value in wanted, f"{name} is {value!r}; with latent attention (kv_lora_rank) it is {wanted[-1]!r}")
    return bool(given)


def check_numbers(config: Config) -> None:
    """What may be left out is at least 1, coefficients are not negative, heads can be shared."""
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    require(
        key_heads is not None and key_heads >= 1 and heads % key_heads == 0,
        f"num_attention_heads {heads} is not a multiple of num_key_value_heads {key_heads}",
    )
    for name in _OPTIONAL_SIZES:
        value = getattr(config, name)
        require(value is None or value >= 1, f"{name} is {value}; it must be at least 1")
    require(config.pre_norms or config.post_norms, "pre_norms and post_norms are both false; a layer needs norms")
    windows = config.sliding_window if isinstance(config.sliding_window, list) else [config.sliding_window]
    for value in windows:
        require(value is None or value >= 1, f"sliding_window is {value}; it must be at least 1")
    for name in _COEFFICIENTS:
        require(getattr(config, name) >= 0, f"{name} is {getattr(config, name)}; it must not be negative")


def check_layer(config: Config, layer: int) -> None:
    """A layer has a dense FFN, or experts and as many as a token is sent to."""
    ffn = config.layer(layer)
    where = f"layer {layer}"
    require(ffn.num_experts >= 0, f"num_experts is {ffn.num_experts} in {where}; use 0 for a dense layer")
    if ffn.num_experts == 0:
        require(
            config.intermediate_size is not None, f"{where} has no experts: give intermediate_size for its dense FFN"
        )
        return
    require(ffn.moe_intermediate_size >= 1, f"{where} has experts: give moe_intermediate_size, their width")
    require(
        1 <= ffn.num_experts_per_tok <= ffn.num_experts,
        f"num_experts_per_tok is {ffn.num_experts_per_tok} but {where} has {ffn.num_experts} experts; "
        "choose between 1 and the number of experts",
    )
    require(ffn.num_shared_experts >= 0, f"num_shared_experts is {ffn.num_shared_experts} in {where}")


def check_ranks(config: Config) -> None:
    """Experts can be spread over the ranks and nodes that are thought of."""
    ranks, on_node = config.expert_ranks, config.ranks_per_node
    require(ranks >= 1, f"expert_ranks is {ranks}; it must be at least 1")
    require(on_node >= 1 and ranks % on_node == 0, f"ranks_per_node is {on_node}; it must divide expert_ranks {ranks}")
    require(
        0 < config.locality_epsilon < 1,
        f"locality_epsilon is {config.locality_epsilon}; it must be above 0, where the loss is infinite, and below 1",
    )
    for index in config.moe_layers if ranks > 1 else ():
        experts = config.layer(index).num_experts
        require(
            experts >= ranks // on_node,
            f"layer {index} has {experts} experts for {ranks // on_node} nodes (expert_ranks {ranks}, "
            f"ranks_per_node {on_node}): a node without one has nowhere to keep its tokens; give one a node",
        )
        require(experts % ranks == 0, f"expert_ranks is {ranks}; it must divide the {experts} experts of layer {index}")


def require_choice(name: str, value: Any, choices: Sequence[str], more: str = "") -> None:
    """Raise ConfigError for a value that is none of those that there are; it names the nearest."""
    near = did_you_mean(value, choices)
    hint = f" ({near})" if near else ""
    require(value in choices, f"{name} is {value!r}; choose one of {', '.join(choices)}{hint}{more}")


def require_known(keys: Iterable[str], known: Collection[str], where: str = "") -> None:
    """Raise ConfigError for a key that is none of the known ones; it names the nearest."""
    for key in keys:
        if key not in known:
            near = did_you_mean(key, known)
            place = f" in {where}" if where else ""
            raise ConfigError(f"model config: unknown key {key!r}{place}" + (f"; {near}" if near else ""))
