"""Where experts lie, and a loss that keeps tokens near (LocMoE 2401.13920, section 3.2).

T tokens, E experts, X ranks that share them, P of these that one process stands for, N nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moebed.errors import ConfigError
from moebed.model.config import ModelConfig


class Placement(NamedTuple):
    """E experts on X ranks in order, E / X on each; ranks on nodes in order, ``ranks_per_node`` on each.

    A process stands for ``parts`` of the ranks, from ``first`` on: its tokens are those of so many parts of a batch,
    one after another. So one process computes what X ranks would.
    """

    ranks: int
    ranks_per_node: int
    first: int
    parts: int

    @classmethod
    def of(cls, config: ModelConfig, process: int = 0, processes: int = 1) -> Placement:
        """What one of several processes stands for; they are the X ranks, or share them, or repeat them.

        Raises:
            ConfigError: Neither of the numbers of processes and of ranks divides the other.
        """
        ranks = config.expert_ranks
        if max(ranks, processes) % min(ranks, processes):
            raise ConfigError(
                f"model config: expert_ranks is {ranks}, but there are {processes} processes; one of the two numbers "
                "must divide the other"
            )
        count = max(1, ranks // processes)
        return cls(ranks, config.ranks_per_node, process * count % ranks, count)

    def check_batch(self, batch_size: int) -> None:
        """Raise ConfigError for a process's batch that cannot be cut into the parts of its ranks."""
        if batch_size % self.parts:
            raise ConfigError(
                f"data.batch_size is {batch_size}, and a process stands for {self.parts} of the {self.ranks} ranks of "
                "model.config.expert_ranks, each of which takes an equal part of its batch; give a multiple"
            )

    @property
    def nodes(self) -> int:
        """N."""
        return self.ranks // self.ranks_per_node


def locality_loss(router_probs: Tensor, token_mask: Tensor, placement: Placement, epsilon: float) -> Tensor:
    """KL(D_c ‖ D_l) of where a rank's tokens go over where they were to go, mean over ranks; float32, 0 for one node.

    D_c(n) is the mean over the tokens of a rank of the probability of all experts on node n. D_l is 1 − ε on the rank's
    own node and ε / (N − 1) on each other one. The paper gives neither in full: "current" and "fully localised".

    Args:
        router_probs: (T, E), the tokens of one rank after those of another; T is a multiple of P.
        token_mask: (T,) bool, which of them count.
        placement: Of the experts, and which ranks these tokens are of.
        epsilon: ε, above 0: with 0 the loss is infinite wherever a token may leave.
    """
    nodes, parts = placement.nodes, placement.parts
    if nodes == 1:
        return router_probs.new_zeros(())
    weight = token_mask.to(torch.float32).view(parts, -1)  # (P, T / P)
    by_node = router_probs.view(parts, weight.shape[1], nodes, -1).sum(dim=-1)  # (P, T / P, N)
    mass = (weight.unsqueeze(-1) * by_node).sum(dim=1)  # (P, N)
    tiny = torch.finfo(mass.dtype).tiny
    current = mass / mass.sum(dim=1, keepdim=True).clamp_min(tiny)
    own = (placement.first + torch.arange(parts, device=mass.device)) // placement.ranks_per_node  # (P,)
    at_home = own.unsqueeze(1) == torch.arange(nodes, device=mass.device)
    wanted = torch.where(at_home, 1 - epsilon, epsilon / (nodes - 1))
    divergence = (current * (current.clamp_min(tiny).log() - wanted.log())).sum(dim=1)  # (P,)
    has_tokens = weight.any(dim=1)
    return (divergence * has_tokens).sum() / has_tokens.sum().clamp(min=1)
