"""The learned gate, and the plainest rule on its logits.

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebed.machine.float32 import float32_linear
from moebed.model.config import LayerConfig, ModelConfig
from moebed.model.routers.contract import ExpertOutputs, Router, drawn
from moebed.model.routing import Routing, TokenContext


class GatedRouter(Router):
    """A router whose logits are x W_gᵀ, or those of a rule that has this gate beside it.

    The product is of float32 operands, and summed in float32, whatever the rest of the model computes in; in a
    bf16-true run x and W_g are rounded to bfloat16 before.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.weight = drawn(layer.num_experts, config.hidden_size)  # gate embeddings W_g (E, H)

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route hidden_states (T, H)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.choose(float32_linear(hidden_states, self.weight))

    def gate(self) -> Tensor:
        """Gate embeddings (E, H)."""
        return self.weight


class SoftmaxTopK(GatedRouter):
    """p = softmax(x W_gᵀ); the K largest; weight p, or p / Σ_topK p with norm_topk_prob (Shazeer 2017; Jiang 2024)."""

    has_plan_formula = True
