"""Routers that are balanced by a bias on the choice instead of a loss.

T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebed.model.config import LayerConfig, ModelConfig, setting
from moebed.model.routers.contract import Load
from moebed.model.routers.groups import GroupOptions, check_groups, within_best_groups
from moebed.model.routers.softmax import GatedRouter
from moebed.model.routing import Routing


class SigmoidTopK(GatedRouter):
    """s = sigmoid(x W_gᵀ); the K largest s + b; weight r · s, or r · s / Σ_topK s with norm_topk_prob.

    r is routed_scaling_factor. Where there are groups, the choice is among the experts of the topk_group groups whose
    two best s + b have the largest sum (DeepSeek-V3 2412.19437, which calls it noaux_tc). The bias decides who is
    chosen and never weighs an output. After each optimizer step b_i += u · sign(mean(c) − c_i) for the assignments c of
    all ranks (loss-free balancing, 2408.15664, algorithm 1). Balancing losses and probes see the scores divided by
    their sum.
    """

    @dataclass
    class Options(GroupOptions):
        """Settings of the balancing, and of the groups."""

        bias_update_rate: float = setting("What the selection bias changes by in each optimizer step.", 1e-3, least=0)

    options: Options
    shift_invariant = False
    has_plan_formula = True
    adaptive = True
    expert_bias: Tensor

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.register_buffer("expert_bias", torch.zeros(layer.num_experts, dtype=torch.float32))  # (E,)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raise ConfigError for groups that do not fit the experts."""
        assert isinstance(config.router_options, GroupOptions)
        check_groups(config, config.router_options)

    def scores(self, logits: Tensor) -> Tensor:
        """What the choice and the weights are made of, (T, E), from logits (T, E)."""
        return logits.sigmoid()

    def choose(self, logits: Tensor) -> Routing:
        """The decision that follows from logits (T, E)."""
        scores = self.scores(logits)  # (T, E)
        preferred = (scores + self.expert_bias).masked_fill(logits.isneginf(), -torch.inf)
        preferred = within_best_groups(preferred, self.options, 2)
        index = preferred.topk(self.num_experts_per_tok, dim=-1).indices  # (T, K) in the order of s + b, not of s
        weight, order = scores.gather(1, index).sort(dim=-1, descending=True, stable=True)
        if self.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        if self.options.routed_scaling_factor != 1:
            weight = weight * self.options.routed_scaling_factor
        probs = scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
        return Routing(logits, probs, index.gather(1, order), weight)

    def reset_state(self) -> None:
        """No expert is preferred."""
        self.expert_bias.zero_()

    @torch.no_grad()
    def end_step(self, load: Load) -> None:
        """Raise the bias of every expert with less than its share, lower that of the others."""
        self.expert_bias += self.options.bias_update_rate * torch.sign(load.counts.mean() - load.counts)

    def numbers(self) -> dict[str, Tensor]:
        """How far the biases lie apart."""
        return {"expert_bias_range": self.expert_bias.max() - self.expert_bias.min()}


class SoftmaxBiasTopK(SigmoidTopK):
    """p = softmax(x W_gᵀ); the K largest p + b; weight r · p, or r · p / Σ_topK p; balanced as ``sigmoid_topk`` is.

    ERNIE 4.5's rule.
    """

    shift_invariant = True

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities (T, E) from logits (T, E)."""
        return logits.softmax(dim=-1)
