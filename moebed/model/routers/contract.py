"""The contract of every router: hidden states in, a decision out.

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moebed.errors import ConfigError
from moebed.machine.float32 import Float32Buffers
from moebed.model.config import LayerConfig, ModelConfig, RouterOptions
from moebed.model.experts import Experts
from moebed.model.routing import Routing, TokenContext


class ExpertOutputs(Protocol):
    """What a router may ask of a layer's experts; live ones and those of a streamed checkpoint answer alike."""

    def each(self, x: Tensor, topk_index: Tensor) -> Tensor:
        """Outputs (T, K, H) of the experts topk_index (T, K) for tokens x (T, H), not weighted."""
        ...


class Load(NamedTuple):
    """Assignments of one optimizer step, over all ranks and accumulation steps."""

    counts: Tensor  # (E,) float32, to each expert of a layer
    density: Tensor  # () assignments of all MoE layers together, over the T·K that are meant
    statistics: Mapping[str, Tensor] = MappingProxyType({})  # what the layer's router asked to have summed


def drawn(*shape: int) -> nn.Parameter:
    """A parameter that begins as the decoder's of its kind do.

    From N(0, initializer_range) in two dimensions or more; of one dimension it is 1, and 0 where its name ends in
    ``bias``. It stays as it is where a router fills it before it is built into a model.
    """
    parameter = nn.Parameter(torch.empty(shape))
    parameter.is_drawn = True  # type: ignore[attr-defined]
    return parameter


class Router(Float32Buffers):
    """Contract of every router.

    A rule that chooses by what the experts compute is handed the layer's experts as well. State that is not learned
    by gradient (a selection bias, an adaptive coefficient) is a persistent float32 buffer: checkpoints keep it, no
    optimizer sees it, it stays float32 where the model is cast, and training changes it in :meth:`end_step` alone, once
    an optimizer step that is taken. What only the log needs is no state: it need not be persistent. Nor is what follows
    from the number of the step (:meth:`begin_step`).
    """

    Options: type[RouterOptions] = RouterOptions  # its settings, a dataclass of moebed.model.config.setting
    options: RouterOptions  # what they are in this model
    default_norm_topk_prob = True  # where a config does not say
    fixed_top_k = True  # whether every token has K experts
    # Another rule that does the same in evaluation, of the same parameters and of those settings that it has too.
    evaluated_as: str | None = None
    has_plan_formula = False  # whether what it keeps for the backward pass is known (see plan_bytes, and moebed.plan)
    keeps_input = True  # whether the backward pass needs its input, as a product's does
    static_shapes = False  # whether a routing's shape must not depend on what is decided: ranks agree on it beforehand
    compiles = True  # whether its forward pass is one graph for torch.compile
    sees_batch = False  # whether a token's experts depend on the other tokens of a batch while `chooses_tokens`
    chooses_tokens = False  # of such a router: route as in training, in evaluation too
    needs_context = False  # whether it asks for all of a TokenContext that is known; else it has the tokens' ids
    needs_domain = False  # whether, of that, it cannot route without their domains, so that it cannot generate text
    adaptive = False  # whether it has state that end_step changes; where no router of a model has, none is called
    # Whether one number added to all of a token's logits changes no choice and no weight, as with softmax.
    shift_invariant = True
    runs_experts = False  # whether it asks for experts' outputs when it routes in evaluation
    experts_class: type[Experts] = Experts  # of its layers
    # Whether its parameters learn from more than the weights on the experts' outputs, or there are none to learn.
    other_teacher = False
    # Whose tokens these are, set before begin_step: the number of the micro-batch within the optimizer step, and of the
    # rank, whose tokens follow those of the ranks before it, and how many ranks there are.
    optimizer_step: int | Tensor = 0  # its number; a tensor, so that a compiled pass is not compiled anew for each
    micro_batch = 0
    rank = 0
    ranks = 1

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.num_experts = layer.num_experts
        self.num_experts_per_tok = layer.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.options = config.router_options
        self.token_parts = config.expert_ranks  # ranks whose tokens come one after another in a call, in training

    @property
    def cuts_columns(self) -> bool:
        """Whether a routing has no more columns than its busiest token needs: in training, which this saves work."""
        return self.training and not self.static_shapes

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raise ConfigError for a model that it cannot route."""

    @classmethod
    def caution(cls, config: ModelConfig) -> str | None:
        """What a person should know who chose it, said where a run begins."""
        return None

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route hidden_states (T, H) of tokens of which a context (T,) is known."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def choose(self, logits: Tensor) -> Routing:
        """The decision that follows from logits (T, E).

        An expert whose logit is -inf has weight 0, and is not chosen while K others have a probability that float32
        tells from 0. Here p = softmax(logits), the K largest, weight p, or p / Σ_topK p with norm_topk_prob.
        """
        probs = logits.softmax(dim=-1)  # (T, E)
        weight, index = probs.topk(self.num_experts_per_tok, dim=-1, sorted=True)  # (T, K)
        if self.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return Routing(logits, probs, index, weight)

    def initial(self, name: str, parameter: Tensor) -> Tensor:
        """What a parameter that is not :func:`drawn` begins with: a tensor of its shape, on the CPU.

        In memory it begins as ``__init__`` left it, and nobody asks. A model that is laid out over ranks is built
        without memory for its parameters, so there a router with parameters of that kind has to say it here.

        Raises:
            ConfigError: The router does not say.
        """
        raise ConfigError(
            f"router {type(self).__name__} does not say how its parameter {name} begins, which a model laid out over "
            "ranks has to know: define initial(self, name, parameter), or make the parameter with "
            "moebed.model.routers.drawn"
        )

    # What else the model may know of it -----------------------------------------------------------------------------

    def gate(self) -> Tensor | None:
        """Gate embeddings W_g (E, H), where the logits are x W_gᵀ, or that and a bias; None otherwise."""
        return None

    def gate_copy(self) -> Tensor | None:
        """The same in float32, a copy for losses to look at: ranks that share a router have it whole within a call."""
        gate = self.gate()
        return None if gate is None else gate.to(torch.float32, copy=True)

    def build_experts(self, config: ModelConfig, layer: LayerConfig) -> Experts:
        """The experts of its layer."""
        return self.experts_class(config, layer)

    @classmethod
    def experts_run(cls, config: ModelConfig, layer: LayerConfig, training: bool = False) -> float:
        """Routed experts that compute for one token, expected."""
        return layer.num_experts if cls.runs_experts else layer.num_experts_per_tok

    @classmethod
    def plan_bytes(cls, config: ModelConfig, layer: LayerConfig, is_narrow: bool) -> int:
        """Bytes that a token keeps for the backward pass beside a gate's logits, the choices and their weights.

        Args:
            config: The model.
            layer: The layer.
            is_narrow: Whether hidden states are narrower than float32, so that each product keeps a copy of them.
        """
        return 0

    @classmethod
    def idle_parameters(cls, config: ModelConfig, layer: LayerConfig) -> int:
        """Its parameters that no token passes in evaluation."""
        return 0

    @classmethod
    def other_products(cls, config: ModelConfig, layer: LayerConfig) -> int:
        """Multiply-adds of a token that no parameter stands for."""
        return 0

    @classmethod
    def width_of_equal_flops(cls, config: ModelConfig) -> int:
        """Width of experts with which a layer takes the FLOPs of a softmax gate and experts as wide as the config's."""
        return config.layer(0).moe_intermediate_size

    # Training ------------------------------------------------------------------------------------------------------

    def batch_losses(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses () by name that are no mean over tokens, from ``Routing.sums`` (E,) summed over a batch's tokens.

        The batch is that of the load-balancing loss (``router_aux_loss_scope``). They are added up over the layers.
        """
        return {}

    def loss_coefficients(self) -> dict[str, float | Tensor]:
        """What each of ``Routing.losses`` and of ``batch_losses`` is multiplied with in the training loss."""
        return {}

    def statistics(self, routing: Routing, token_mask: Tensor) -> dict[str, Tensor]:
        """What :meth:`end_step` is to know of a micro-batch beside the load, summed over all of a step.

        Sums over tokens, or counts, and never means or extremes, which depend on how a batch is cut. Taken from what a
        forward pass gave back and not while it runs, so that a pass that is recomputed does not count twice.

        Args:
            routing: This layer's.
            token_mask: (T,) bool, tokens that count.

        Returns:
            float32 tensors without a gradient, by name; the same names and shapes in each micro-batch.
        """
        return routing.statistics or {}

    def reset_state(self) -> None:
        """Set the state that is not learned by gradient to its initial value."""

    def begin_step(self, step: int) -> None:
        """An optimizer step begins, or goes on with its next micro-batch; the same number on every rank."""

    def end_step(self, load: Load) -> None:
        """An optimizer step ends that is taken; called where a router of the model is adaptive."""

    def numbers(self) -> dict[str, Tensor]:
        """Scalars of the state, by name, for the log; read after :meth:`end_step`."""
        return {}
