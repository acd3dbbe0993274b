"""Quantile balancing: a bias on the choice that would have evened out the load of the step before.

T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebed.model.config import LayerConfig, ModelConfig, RouterOptions, setting
from moebed.model.routers.contract import Load
from moebed.model.routers.quantiles import histogram, upper_quantile
from moebed.model.routers.softmax import GatedRouter
from moebed.model.routing import Routing


class Quantile(GatedRouter):
    """s = x W_gᵀ; the K largest s + b; weight softmax(s), or that over its sum over the chosen, with norm_topk_prob.

    By how much a token has an expert or misses it is its margin, s + b − α, where α is the token's (K + 1)-th largest
    s + b. After each optimizer step b_e goes down by ρ times the margin that parts the T·K/E tokens which are most the
    expert's own from the others, and the mean of b to 0 (J. Su, kexue.fm/archives/11619; Megatron-LM's
    ``quantile`` balancing). Margins are counted in bins, which add up over micro-batches and ranks. The bias decides
    who is chosen and never weighs an output. All experts' biases move at once, so that together they can overshoot.
    """

    @dataclass
    class Options(RouterOptions):
        """Settings of the balancing."""

        bias_rate: float = setting(
            "Share of the way to what would have balanced the last step that each bias goes.", 1.0, least=0, most=1
        )

    options: Options
    has_plan_formula = True
    adaptive = True
    MARGINS = "margins"
    expert_bias: Tensor

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.register_buffer("expert_bias", torch.zeros(layer.num_experts, dtype=torch.float32))  # (E,)

    def choose(self, logits: Tensor) -> Routing:
        """The decision that follows from logits (T, E)."""
        probs = logits.softmax(dim=-1)  # (T, E)
        index = (logits + self.expert_bias).topk(self.num_experts_per_tok, dim=-1).indices  # in the order of s + b
        weight, order = probs.gather(1, index).sort(dim=-1, descending=True, stable=True)
        if self.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        return Routing(logits, probs, index.gather(1, order), weight)

    @torch.no_grad()
    def statistics(self, routing: Routing, token_mask: Tensor) -> dict[str, Tensor]:
        """Margins, counted; nothing where every token goes to every expert."""
        if self.num_experts_per_tok == self.num_experts:
            return {}
        preferred = routing.router_logits + self.expert_bias
        next_best = preferred.topk(self.num_experts_per_tok + 1, dim=-1).values[:, -1:]
        return {self.MARGINS: histogram(preferred - next_best, token_mask)}

    def reset_state(self) -> None:
        """No expert is preferred."""
        self.expert_bias.zero_()

    @torch.no_grad()
    def end_step(self, load: Load) -> None:
        """Move every bias to where the expert would have had its share of the tokens, had the others stayed."""
        if self.MARGINS in load.statistics:
            margin = upper_quantile(load.statistics[self.MARGINS], self.num_experts_per_tok / self.num_experts)
            self.expert_bias -= self.options.bias_rate * margin
            self.expert_bias -= self.expert_bias.mean()

    def numbers(self) -> dict[str, Tensor]:
        """How far the biases lie apart."""
        return {"expert_bias_range": self.expert_bias.max() - self.expert_bias.min()}
