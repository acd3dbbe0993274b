"""SparseMixer's choice: one expert after another, each weighed among those that nearly were chosen in its place.

T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebed.model.config import LayerConfig, ModelConfig, RouterOptions, setting
from moebed.model.routers.softmax import GatedRouter
from moebed.model.routing import Routing


class SparseMixer(GatedRouter):
    """K times the largest logit s of those not chosen yet; its weight a softmax over those near it (2409.12136).

    Near the largest m is whose (m − s) / max(∣s∣, m) is at most twice router_jitter_noise, among those not chosen yet.
    The weights need not sum to 1. This is the rule by which Phi-3.5-MoE is used; of its training, which samples experts
    and estimates a gradient of the choice (Heun's method), nothing is done here: weights alone teach the gate.
    """

    @dataclass
    class Options(RouterOptions):
        """Settings of the choice."""

        router_jitter_noise: float = setting("Half of what a logit may be below the largest one, as a share.", 0.01, 0)

    options: Options
    default_norm_topk_prob = False
    shift_invariant = False
    has_plan_formula = True

    @classmethod
    def plan_bytes(cls, config: ModelConfig, layer: LayerConfig, is_narrow: bool) -> int:
        """Of each choice who is far, a softmax and its place, E + 4·E + 8; and the order of the K weights, 8·K."""
        return layer.num_experts_per_tok * (5 * layer.num_experts + 16)

    def choose(self, logits: Tensor) -> Routing:
        """The decision that follows from logits (T, E)."""
        left, weights, chosen = logits, [], []
        for _ in range(self.num_experts_per_tok):
            with torch.no_grad():
                most, index = left.max(dim=-1, keepdim=True)
                is_far = (most - logits) / logits.abs().clamp(min=most) > 2 * self.options.router_jitter_noise
            weights.append(left.masked_fill(is_far, -torch.inf).softmax(dim=-1).gather(-1, index))
            chosen.append(index)
            left = left.scatter(-1, index, -torch.inf)
        weight, order = torch.cat(weights, dim=-1).sort(dim=-1, descending=True, stable=True)
        if self.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return Routing(logits, logits.softmax(dim=-1), torch.cat(chosen, dim=-1).gather(1, order), weight)
