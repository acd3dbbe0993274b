"""ModelConfig: the plain data from which every decoder is built.

One object describes every family of the paper. Names are those of the Hugging Face configs where they have one.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from numbers import Integral
from typing import Any, Literal

from moebed.model.allocation import allocate
from moebed.model.checks import (
    check_latent,
    check_layer,
    check_numbers,
    check_ranks,
    check_sizes,
    require,
    require_choice,
)
from moebed.model.checks import require_known as require_known
from moebed.model.hyper_config import HyperExperts, settle_hyper_experts
from moebed.model.kinds import choices_of, require_kinds, require_kinds_of
from moebed.model.layer_config import LayerConfig as LayerConfig
from moebed.model.rope_config import scaling_of
from moebed.model.router_options import RouterOptions as RouterOptions  # for plug-ins: what a router imports of configs
from moebed.model.router_options import setting as setting
from moebed.names import ROUTERS

PerLayer = int | list[int]
OWN_ROUTER = "; one of your own is made known by --plugins FILE.py"


@dataclass
class ModelConfig:
    """Shape and behaviour of a decoder. Validated at construction; raises ConfigError in one line.

    Fields typed ``int | list[int]`` are one number for all layers or one number a layer.

    Args:
        vocab_size: Rows of the embedding and of the head; at least as many as the tokenizer has ids.
        hidden_size: Width of the residual stream (H).
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads (GQA); the number of query heads if not given (MHA).
        head_dim: Width of a head; hidden_size / num_attention_heads if not given.
        intermediate_size: Width of a dense FFN, used in layers without experts; must be given if there are any.
        num_experts: Routed experts (E) in each layer; 0 means a dense FFN in that layer.
        num_experts_per_tok: Experts that a token is sent to (K); at most the number of experts of that layer.
        moe_intermediate_size: Width (F) of one routed expert; must be given if there are any.
        num_shared_experts: Experts that every token passes, as one FFN of num_shared_experts * moe_intermediate_size.
        shared_expert_intermediate_size: Width of that FFN where it is another; num_shared_experts then says only in
            which layers there is one.
        shared_expert_gate: Scale the shared expert's output by a learned sigmoid gate (Qwen2-MoE).
        hyper_experts: HyperMoE, or one of its controls: an adapter beside the experts; none if not given.
        hidden_act: Activation on the gate projection: silu (SwiGLU), gelu (GeGLU, exact), gelu_tanh, or clamped_swiglu
            of gate and up, (clamp(up, ±7) + 1) · g · sigmoid(1.702 g) with g = min(gate, 7) (gpt-oss).
        experts_bias: Biases on the three projections of routed experts (gpt-oss).
        router: Name of the routing rule (moebed/README.md lists them), or of one that --plugins made known.
        router_options: Settings of the router; those of other routers are passed over.
        norm_topk_prob: Divide the weights of the chosen experts by their sum (Mixtral does, DeepSeek and Grok do not);
            if not given, as in the router's paper.
        router_aux_loss_coef: Coefficient of the load-balancing loss; 0 turns it off.
        router_aux_loss_scope: Tokens over which the load-balancing loss counts assignments: micro (one forward pass
            of one rank), global (summed over data-parallel ranks and over the accumulation steps so far), window (over
            all ranks and all accumulation steps, exactly: where batches are accumulated, each step begins with a
            forward pass more over all of them) or sequence (each sequence is to be balanced by itself, which leaves no
            room to specialise by domain).
        router_z_loss_coef: Coefficient of the router z-loss; 0 turns it off.
        output_diversity_loss_coef: Coefficient of the mean cosine between the outputs of the experts that a token
            passes; 0 turns it off. It takes each output by itself, which costs memory.
        weight_diversity_loss_coef: Coefficient of the mean squared cosine between the experts' mean neurons; 0 turns
            it off.
        output_orthogonality_loss_coef: Coefficient of the squared length of each of a token's expert outputs within
            what its others span (2505.22323); 0 turns it off. It takes each output by itself, and grows with them.
        probability_variance_loss_coef: Coefficient of the negative variance over the experts of a token's router
            probabilities, which makes the router decide (2505.22323); 0 turns it off.
        router_orthogonality_loss_coef: Coefficient of a loss that keeps gate embeddings at right angles; 0 turns it
            off.
        router_orthogonality: Which one: ernie, the mean squared cosine (ERNIE 4.5), or simbal, which pulls their
            lengths to 1 as well, and with which they begin orthogonal (SimBal).
        router_coupling_loss_coef: Coefficient of the expert-router coupling loss (ERC): each expert is to answer to its
            own gate embedding more than to others, and more than others do; 0 turns it off.
        router_coupling_alpha: Share of its answer to its own embedding that an expert's answers to others may reach.
        router_coupling_gradient: Whether that loss moves the gate embeddings too; else it moves the experts alone.
        locality_loss_coef: Coefficient of the locality loss, which keeps the tokens of a rank on the experts of its
            node; 0 turns it off (see moebed.model.locality).
        locality_epsilon: Share of a rank's tokens that the locality loss leaves to other nodes; above 0 and below 1.
        expert_ranks: Ranks over which the experts are thought to be spread, in order, by the locality loss and by
            routers that choose among the tokens of a rank. A process stands for as many of them as its number leaves,
            and cuts its batch into so many parts; where parallel.expert is above 1 it must be the same.
        ranks_per_node: Of these ranks; must divide them.
        norm_type: Of the residual stream's norms: rms (RMSNorm), or layer (LayerNorm with a bias, Phi-3.5-MoE).
        rms_norm_eps: Added to the mean square in every RMSNorm, and to the variance in every LayerNorm.
        rope_theta: Base of the rotary position embedding.
        rope_scaling: How the rotary embedding is stretched to longer texts: rope_type and its settings, as
            transformers calls them (linear, dynamic, llama3, yarn, longrope; see moebed.model.rope_config); not at all
            if not given.
        partial_rotary_factor: Share of a head's dimensions that turn, the first ones (GLM-4.5: .5).
        rope_interleave: Turn neighbouring dimensions together, not those half a head apart (ERNIE 4.5, DeepSeek-V3).
        max_position_embeddings: Longest sequence, in tokens.
        kv_lora_rank: Width of the latent of which keys and values are made (multi-head latent attention, DeepSeek-V2);
            none if not given. With it the three widths of a head are, and head_dim is the sum of the first two.
        q_lora_rank: Width of the latent of which queries are made; of none if not given.
        qk_nope_head_dim: Dimensions of a head's queries and keys that do not turn.
        qk_rope_head_dim: Those that do; of keys, all heads have the same.
        v_head_dim: Dimensions of a head's values.
        sliding_window: Tokens that a token may look back at, itself included; all of them if not given. One number, or
            a list of one a layer, null where a layer has none (gpt-oss).
        attention_bias: Biases on the query, key and value projections (Qwen2).
        attention_output_bias: A bias on the output projection (gpt-oss).
        attention_sinks: One more logit in the softmax of each head, learned, which takes its share of the attention
            and brings no value (gpt-oss).
        qk_norm: RMSNorm of queries and keys: none, head (each by itself, Qwen3) or full (all heads together, OLMoE).
        pre_norms: A norm before attention and one before the FFN or MoE, which without them see the residual stream
            itself (FlexOlmo).
        post_norms: A norm after attention and one after the FFN or MoE, before the residual is added (Grok-1).
        attention_multiplier: Scale of the attention logits; 1 / sqrt(head_dim) if not given.
        attn_logit_softcapping: Attention logits become cap * tanh(logits / cap), in float32 (Grok-1: 30).
        embedding_multiplier: Scale of the embeddings (Grok-1).
        residual_multiplier: Scale of what attention and FFN or MoE add to the residual stream (Granite).
        logits_multiplier: Scale of the output logits (Grok-1).
        tie_word_embeddings: The head uses the embedding's weights.
        lm_head_bias: A bias on the output logits (Phi-3.5-MoE).
        initializer_range: Standard deviation of initial weights.
        base_hidden_size: Hidden size at which initializer_range and the learning rate were chosen: both are then
            scaled to this model's by the role of each parameter (muP, see moebed.model.width); left as they are if not
            given.
        base_moe_intermediate_size: Width of an expert there; if not given, it has grown as the hidden size has.
        experts_backend: How the expert products are computed: auto, grouped_mm, loop, native (compiled on first
            use, for CPUs with AVX2 or more) or triton (see moebed.model.experts). On a GPU auto is triton from the size
            on at which `moebed check` has found it right and faster there, and grouped_mm otherwise; on a CPU native
            where that was measured to be faster.
        attention_backend: auto, sdpa (PyTorch's fused attention), math (plain matrix products) or native (compiled on
            first use, for float32 on CPUs with AVX2 or more; what it does not fit is done as by auto). auto is native
            in float32 on a CPU where that was measured to be faster; math where a soft cap asks for it and in
            bfloat16 on a CPU up to 1024 positions, where it is faster; sdpa otherwise.
        allocation: How the experts are spread over the layers, num_experts being their mean: uniform, ascending,
            ascending_small_last, descending, {dense_at: LAYER}, or a list of relative sizes (see
            moebed.model.allocation). Resolved at construction into num_experts and intermediate_size, and not kept
            beside them.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    num_experts: PerLayer = 8
    num_experts_per_tok: PerLayer = 2
    moe_intermediate_size: int | list[int] | None = None
    num_shared_experts: PerLayer = 0
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    hyper_experts: HyperExperts | None = None
    hidden_act: Literal["silu", "gelu", "gelu_tanh", "clamped_swiglu"] = "silu"
    experts_bias: bool = False
    router: str = "softmax_topk"
    router_options: RouterOptions = field(default_factory=dict)  # type: ignore[assignment]
    norm_topk_prob: bool | None = None
    router_aux_loss_coef: float = 0.01
    router_aux_loss_scope: Literal["micro", "global", "window", "sequence"] = "micro"
    router_z_loss_coef: float = 0.0
    output_diversity_loss_coef: float = 0.0
    weight_diversity_loss_coef: float = 0.0
    output_orthogonality_loss_coef: float = 0.0
    probability_variance_loss_coef: float = 0.0
    router_orthogonality_loss_coef: float = 0.0
    router_orthogonality: Literal["ernie", "simbal"] = "ernie"
    router_coupling_loss_coef: float = 0.0
    router_coupling_alpha: float = 1.0
    router_coupling_gradient: bool = False
    locality_loss_coef: float = 0.0
    locality_epsilon: float = 0.1
    expert_ranks: int = 1
    ranks_per_node: int = 1
    norm_type: Literal["rms", "layer"] = "rms"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    rope_interleave: bool = False
    max_position_embeddings: int = 4096
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    sliding_window: int | list[int | None] | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_sinks: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    pre_norms: bool = True
    post_norms: bool = False
    attention_multiplier: float | None = None
    attn_logit_softcapping: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
    initializer_range: float = 0.02
    base_hidden_size: int | None = None
    base_moe_intermediate_size: int | None = None
    experts_backend: Literal["auto", "grouped_mm", "loop", "native", "triton"] = "auto"
    attention_backend: Literal["auto", "sdpa", "math", "native"] = "auto"
    allocation: InitVar[str | dict[str, int] | list[float] | None] = None

    def __post_init__(self, allocation: str | dict[str, int] | list[float] | None) -> None:
        require_kinds(self, "model config")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        check_sizes(self)
        self._settle_heads()
        check_numbers(self)
        self._settle_windows()
        for name, choices in choices_of(ModelConfig).items():
            self._check_choice(name, choices)
        self._check_router()
        require(
            self.attention_backend != "sdpa" or self.needs_attention_logits is None,
            f"attention_backend sdpa cannot apply {self.needs_attention_logits}; use auto or math",
        )
        if allocation is not None:
            self._allocate(allocation)
        settle_hyper_experts(self, self._rule.fixed_top_k)
        for layer in range(self.num_hidden_layers):
            check_layer(self, layer)
        self._settle_shared_width()
        check_ranks(self)
        _routers().ROUTERS[self.router].check(self)

    def _settle_heads(self) -> None:
        if check_latent(self):
            self.head_dim, self.num_key_value_heads = self.qk_head_dim, self.num_attention_heads
        if self.head_dim is None:
            require(
                self.hidden_size % self.num_attention_heads == 0,
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
                "change one of them or give head_dim",
            )
            self.head_dim = self.hidden_size // self.num_attention_heads
        share = "qk_rope_head_dim" if self.kv_lora_rank else f"partial_rotary_factor {self.partial_rotary_factor}"
        require(
            self.rotary_dim % 2 == 0 and 2 <= self.rotary_dim <= self.head_dim,
            f"head_dim is {self.head_dim}, of which {self.rotary_dim} dimensions turn ({share}); rotary embeddings "
            "need an even number",
        )
        self.rope_scaling = scaling_of(self.rope_scaling, self.rotary_dim, self.rope_theta)

    def _settle_windows(self) -> None:
        """A window that is the same in all layers is one number, so that one model has one config."""
        windows = {self.window(index) for index in range(self.num_hidden_layers)}
        if len(windows) == 1:
            self.sliding_window = windows.pop()

    def _check_router(self) -> None:
        routers = _routers()
        self._check_choice("router", tuple(routers.ROUTERS), OWN_ROUTER)
        rule = self._rule
        self.router_options = routers.options_of(self)
        if self.norm_topk_prob is None:
            self.norm_topk_prob = rule.default_norm_topk_prob
        reason = rule.experts_class.without_kernel(self)
        require(
            reason is None or self.experts_backend not in rule.experts_class.kernels_alone,
            f"experts_backend {self.experts_backend} has no kernel for these experts ({reason}); use auto",
        )
        for name in ("output_diversity_loss_coef", "output_orthogonality_loss_coef"):
            require(
                rule.fixed_top_k or not getattr(self, name),
                f"{name} compares the K experts of a token, but router {self.router} has no fixed K; set it to 0",
            )

    @property
    def _rule(self) -> Any:
        """The router's class."""
        return _routers().ROUTERS[self.router]

    def _allocate(self, allocation: str | dict[str, int] | list[float]) -> None:
        for name in ("num_experts", "num_experts_per_tok", "num_shared_experts", "moe_intermediate_size"):
            value = getattr(self, name)
            require(
                isinstance(value, int),
                f"allocation {allocation!r} spreads one number over the layers, but {name} is {value}",
            )
        require(
            self.shared_expert_intermediate_size is None,
            f"allocation {allocation!r} counts shared experts; leave shared_expert_intermediate_size out",
        )
        layer = self.layer(0)
        sizes = layer.num_experts, layer.num_experts_per_tok, layer.num_shared_experts, layer.moe_intermediate_size
        require(min(sizes[0], sizes[3]) >= 1, f"allocation {allocation!r} needs experts; num_experts is 0")
        self.num_experts, dense_width = allocate(allocation, self.num_hidden_layers, *sizes, self.intermediate_size)
        self.intermediate_size = dense_width or self.intermediate_size

    def _settle_shared_width(self) -> None:
        """A width that is a number of experts is said by that number alone, so that one model has one config."""
        width, one = self.shared_expert_intermediate_size, self.moe_intermediate_size
        if width is None:
            return
        shared = any(self.layer(i).num_shared_experts for i in self.moe_layers)
        require(shared, f"shared_expert_intermediate_size is {width}, but num_shared_experts is 0")
        if isinstance(self.num_shared_experts, int) and isinstance(one, int) and width % one == 0:
            self.num_shared_experts, self.shared_expert_intermediate_size = width // one, None

    def _check_choice(self, name: str, choices: Sequence[str], more: str = "") -> None:
        require_choice(name, getattr(self, name), choices, more)

    def layer(self, index: int) -> LayerConfig:
        """The FFN or MoE of one layer, with per-layer lists resolved."""
        return LayerConfig(
            num_experts=self._at("num_experts", index),
            num_experts_per_tok=self._at("num_experts_per_tok", index),
            moe_intermediate_size=self._at("moe_intermediate_size", index) if self.moe_intermediate_size else 0,
            num_shared_experts=self._at("num_shared_experts", index),
            shared_width=self.shared_expert_intermediate_size,
            index=index,
        )

    def window(self, index: int) -> int | None:
        """Tokens that a token may look back at in one layer, itself included; all of them if None."""
        return None if self.sliding_window is None else self._at("sliding_window", index)

    @property
    def norms_per_layer(self) -> int:
        """Norms of the residual stream's width in a layer."""
        return 2 * (self.pre_norms + self.post_norms)

    @property
    def needs_attention_logits(self) -> str | None:
        """The setting for which attention needs its logits one by one, which no fused attention gives; None without."""
        capped = self.attn_logit_softcapping is not None
        return "attn_logit_softcapping" if capped else "attention_sinks" if self.attention_sinks else None

    def _at(self, name: str, index: int) -> Any:
        value = getattr(self, name)
        if isinstance(value, Integral):
            return value
        require(
            len(value) == self.num_hidden_layers,
            f"{name} lists {len(value)} numbers for {self.num_hidden_layers} layers; give one number a layer",
        )
        return value[index]

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that turn with the position."""
        if self.qk_rope_head_dim is not None:
            return self.qk_rope_head_dim
        assert self.head_dim is not None
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def qk_head_dim(self) -> int:
        """Dimensions of a head's queries and keys in latent attention."""
        assert self.qk_nope_head_dim is not None
        return self.qk_nope_head_dim + self.rotary_dim

    @property
    def value_head_dim(self) -> int:
        """Dimensions of a head's values."""
        assert self.head_dim is not None
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def diversity_losses(self) -> dict[str, float]:
        """Coefficients of the losses that keep experts and gate embeddings apart, or together, by name."""
        return {
            "output_diversity": self.output_diversity_loss_coef,
            "weight_diversity": self.weight_diversity_loss_coef,
            "output_orthogonality": self.output_orthogonality_loss_coef,
            "probability_variance": self.probability_variance_loss_coef,
            "router_orthogonality": self.router_orthogonality_loss_coef,
            "router_coupling": self.router_coupling_loss_coef,
        }

    @property
    def layer_losses(self) -> dict[str, float]:
        """Coefficients of what a config asks of a layer beside balancing, by name."""
        return {**self.diversity_losses, "locality": self.locality_loss_coef}

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers that have experts."""
        return [i for i in range(self.num_hidden_layers) if self.layer(i).num_experts > 0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for YAML or JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def look_first(cls, data: Mapping[str, Any]) -> None:
        """Refuse of some settings, or all, what takes no router's class to see; needs no PyTorch.

        Raises:
            ConfigError: A key is unknown, or a value is of another kind or none of those that there are.
        """
        require_known(data, inspect.signature(cls).parameters)
        choices = choices_of(ModelConfig) | {"router": tuple(ROUTERS)}
        for name in data.keys() & choices.keys():
            require_choice(name, data[name], choices[name], OWN_ROUTER if name == "router" else "")
        require_kinds_of(cls, data, "model config")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Build from plain data; an unknown key is an error that names the nearest known one."""
        require_known(data, inspect.signature(cls).parameters)
        return cls(**data)


def _routers() -> Any:
    """The package, by its name: routers are built of configs, and are looked up when the first config is made."""
    return importlib.import_module("moebed.model.routers")
