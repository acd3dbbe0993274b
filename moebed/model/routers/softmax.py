"""The learned gate, and the plainest rule on its logits.

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebed.machine.float32 import float32_linear
from moebed.model.config import LayerConfig, ModelConfig, RouterOptions, setting
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
            return self.choose(self.logits(hidden_states))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Of hidden_states (T, H): (T, E) float32."""
        return float32_linear(hidden_states, self.weight)

    def gate(self) -> Tensor:
        """Gate embeddings (E, H)."""
        return self.weight


class SoftmaxTopK(GatedRouter):
    """p = softmax(x W_gᵀ); the K largest; weight p, or p / Σ_topK p with norm_topk_prob (Shazeer 2017; Jiang 2024).

    With router_bias p = softmax(x W_gᵀ + b), and b is learned as W_g is (gpt-oss).
    """

    @dataclass
    class Options(RouterOptions):
        """Settings of the gate."""

        router_bias: bool = setting("Add a learned bias to each expert's logit.", False)

    options: Options
    has_plan_formula = True

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.bias = drawn(layer.num_experts) if self.options.router_bias else None  # b (E,)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Of hidden_states (T, H): (T, E) float32."""
        found = super().logits(hidden_states)
        return found if self.bias is None else found + self.bias.float()
