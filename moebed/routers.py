"""Routers: which experts a token goes to, and with what weight.

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebed.config import LayerConfig, ModelConfig
from moebed.errors import ConfigError

if TYPE_CHECKING:
    from moebed.experts import Experts


class Routing(NamedTuple):
    """A router's decision for T tokens; float32 throughout.

    A named tuple because it then passes through ``torch.compile``, activation checkpointing and hooks as it is.
    """

    router_logits: Tensor  # (T, E)
    router_probs: Tensor  # (T, E) the distribution that balancing losses and probes see
    topk_index: Tensor  # (T, K) int64, in descending weight
    topk_weight: Tensor  # (T, K) as applied to the experts' outputs
    outputs: Tensor | None = None  # (T, K, H) outputs of the chosen experts, not weighted, where they ran already
    losses: dict[str, Tensor] | None = None  # by name, (T,): what the layer asks of each token, without coefficient

    def decision(self) -> Routing:
        """The decision without what the experts alone need, so that keeping it holds no memory of their size."""
        return self._replace(outputs=None)


class Router(nn.Module):
    """Contract of every router: hidden states in, a :class:`Routing` out.

    A rule that chooses by what the experts compute is handed the layer's experts as well.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.num_experts = layer.num_experts
        self.num_experts_per_tok = layer.num_experts_per_tok

    def forward(self, hidden_states: Tensor, experts: Experts) -> Routing:
        """Route hidden_states (T, H)."""
        raise TypeError(f"{type(self).__name__} does not define forward")


class SoftmaxTopK(Router):
    """p = softmax(x W_gᵀ); the K largest; weight p, or p / Σ_topK p with norm_topk_prob (Shazeer 2017; Jiang 2024)."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(layer.num_experts, config.hidden_size))  # gate embeddings W_g (E, H)

    def forward(self, hidden_states: Tensor, experts: Experts) -> Routing:
        """Route hidden_states (T, H)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.choose(F.linear(hidden_states.float(), self.weight.float()))

    def choose(self, logits: Tensor) -> Routing:
        """The decision that follows from logits (T, E)."""
        probs = logits.softmax(dim=-1)  # (T, E)
        weight, index = probs.topk(self.num_experts_per_tok, dim=-1, sorted=True)  # (T, K)
        if self.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return Routing(logits, probs, index, weight)


ROUTERS: dict[str, type[Router]] = {"softmax_topk": SoftmaxTopK}


def build_router(config: ModelConfig, layer: LayerConfig) -> Router:
    """The router that ``config.router`` names."""
    if config.router not in ROUTERS:
        raise ConfigError(f"model config: unknown router {config.router!r}; choose one of {', '.join(ROUTERS)}")
    return ROUTERS[config.router](config, layer)
