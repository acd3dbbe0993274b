"""What a router decides, as experts, losses and probes read it.

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """A router's decision for T tokens; logits, probabilities and weights are float32.

    A named tuple because it then passes through ``torch.compile``, activation checkpointing and hooks as it is.
    """

    router_logits: Tensor  # (T, E)
    router_probs: Tensor  # (T, E) the distribution that balancing losses and probes see
    topk_index: Tensor  # (T, K) int64, in descending weight
    topk_weight: Tensor  # (T, K) as applied to the experts' outputs
    precomputed: Tensor | None = None  # (T, K, ·) of the chosen experts, what the router computed already: see Experts
    losses: dict[str, Tensor] | None = None  # by name, (T,): what the router asks of each token, without coefficient
    ragged: bool = False  # an assignment of weight 0 is none: the number of experts differs from token to token
    # By name, (T, E): what the router's losses of a batch need of each token and expert; summed over the tokens of a
    # batch it goes to Router.batch_losses.
    sums: dict[str, Tensor] | None = None

    @property
    def assigned(self) -> Tensor:
        """Which of the T·K assignments stand: (T, K) bool."""
        return self.topk_weight != 0 if self.ragged else torch.ones_like(self.topk_index, dtype=torch.bool)

    def without_precomputed(self) -> Routing:
        """The routing without what the experts alone need, so that keeping it holds no memory of their size."""
        # Not _replace, through which torch 2.11's compiler loses the class.
        return Routing(*self[:4], None, *self[5:])
