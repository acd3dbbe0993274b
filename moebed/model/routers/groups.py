"""Groups of experts: a token's experts are among those of its few best groups (DeepSeek-V2 2405.04434, section 2.2.2).

T tokens, E experts, K experts per token, N groups of E / N experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebed.errors import ConfigError
from moebed.model.config import ModelConfig, RouterOptions, setting
from moebed.model.routers.softmax import GatedRouter
from moebed.model.routing import Routing


@dataclass
class GroupOptions(RouterOptions):
    """Settings of routers that know groups, named as in Hugging Face's configs."""

    n_group: int = setting("Groups of equally many experts, one after another.", 1, least=1)
    topk_group: int = setting("Groups in which a token's experts may be.", 1, least=1)
    routed_scaling_factor: float = setting("What the weights are multiplied with, after their division.", 1.0, least=0)


def check_groups(config: ModelConfig, options: GroupOptions) -> None:
    """Raise ConfigError where a layer's experts cannot be cut into the groups, or too few may be chosen."""
    count, most = options.n_group, options.topk_group
    if most > count:
        raise ConfigError(
            f"model config: router_options.topk_group is {most}, but there are {count} groups (n_group); "
            "give that many at most"
        )
    for index in config.moe_layers:
        layer = config.layer(index)
        if layer.num_experts % count or layer.num_experts_per_tok > layer.num_experts // count * most:
            raise ConfigError(
                f"model config: router_options.n_group is {count} and topk_group {most}, but layer {index} has "
                f"{layer.num_experts} experts, {layer.num_experts_per_tok} of them a token; n_group must divide the "
                "experts, and topk_group groups must hold a token's"
            )


def within_best_groups(scores: Tensor, options: GroupOptions, best: int) -> Tensor:
    """Scores (T, E), and -inf outside the groups in which the sum of the ``best`` best scores is largest."""
    if options.n_group == options.topk_group:
        return scores
    grouped = scores.unflatten(-1, (options.n_group, -1))  # (T, N, E / N)
    of_group = grouped.topk(min(best, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    chosen = of_group.topk(options.topk_group, dim=-1).indices
    outside = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, chosen, False)
    return grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)


class GroupLimitedTopK(GatedRouter):
    """p = softmax(x W_gᵀ); the K largest in the groups with the largest p; weight r · p, or r · p / Σ_topK p.

    DeepSeek-V2's choice, which it calls group_limited_greedy; r is routed_scaling_factor.
    """

    Options = GroupOptions
    options: GroupOptions
    has_plan_formula = True

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raise ConfigError for groups that do not fit the experts."""
        assert isinstance(config.router_options, GroupOptions)
        check_groups(config, config.router_options)

    def choose(self, logits: Tensor) -> Routing:
        """The decision that follows from logits (T, E)."""
        probs = logits.softmax(dim=-1)
        index = within_best_groups(probs, self.options, 1).topk(self.num_experts_per_tok, dim=-1).indices
        weight = probs.gather(1, index)
        if self.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return Routing(logits, probs, index, weight * self.options.routed_scaling_factor)
