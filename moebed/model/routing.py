"""What a router is told of tokens, and what it decides, as experts, losses and probes read it.

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moebed.errors import ConfigError


class TokenContext(NamedTuple):
    """What is known of tokens beside their hidden states; of (B, S) or of (T,) alike.

    All but the ids is there where a router of the model asks for it (``Router.needs_context``), and None elsewhere.
    Tokens of a sequence lie side by side, from its first on.
    """

    ids: Tensor
    domain: Tensor | None = None  # which of the data's domains a token is of; None too where nobody knows
    document: Tensor | None = None  # which document of this call a token is of, in training; below the number of tokens
    sequence: Tensor | None = None  # which sequence of this call a token is of
    position: Tensor | None = None  # of a token in its sequence

    @classmethod
    def of_batch(cls, ids: Tensor, domain: Tensor | None = None, document: Tensor | None = None) -> TokenContext:
        """All that is known of sequences ids (B, S), of domains (B, S) and documents (B, S)."""
        rows, columns = (torch.arange(size, device=ids.device) for size in ids.shape)
        return cls(ids, domain, document, rows.unsqueeze(1).expand_as(ids), columns.expand_as(ids))

    def changed(self, change: Callable[[Tensor], Tensor]) -> TokenContext:
        """The same with each tensor changed in one way."""
        return TokenContext(change(self.ids), *(None if one is None else change(one) for one in self[1:]))


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
    statistics: dict[str, Tensor] | None = (
        None  # by name, of all tokens together and without a gradient: Router.statistics
    )

    @property
    def assigned(self) -> Tensor:
        """Which of the T·K assignments stand: (T, K) bool."""
        return self.topk_weight != 0 if self.ragged else torch.ones_like(self.topk_index, dtype=torch.bool)

    def without_precomputed(self) -> Routing:
        """The routing without what the experts alone need, so that keeping it holds no memory of their size."""
        # Not _replace, through which torch 2.11's compiler loses the class.
        return Routing(*self[:4], None, *self[5:])


def require_routing(found: object, router: object, tokens: int, num_experts: int) -> None:
    """Raise ConfigError where what a router gave for T tokens and E experts is none of its decisions."""
    rule = type(router).__qualname__
    if not isinstance(found, Routing):
        raise ConfigError(f"router {rule}: forward gives a {type(found).__name__}; it must return a Routing")
    for name in ("router_logits", "router_probs"):
        shape = tuple(getattr(found, name).shape)
        if shape != (tokens, num_experts):
            raise ConfigError(
                f"router {rule}: {name} has shape {shape}; of {tokens} tokens and {num_experts} experts it must be "
                f"{(tokens, num_experts)}"
            )
    if found.topk_index.shape != found.topk_weight.shape or len(found.topk_index) != tokens:
        raise ConfigError(
            f"router {rule}: topk_index and topk_weight have shapes {tuple(found.topk_index.shape)} and "
            f"{tuple(found.topk_weight.shape)}; both must be (T, K), of {tokens} tokens"
        )
    index, weight = found.topk_index, found.topk_weight
    if index.dtype != torch.int64 or not weight.is_floating_point():
        raise ConfigError(
            f"router {rule}: topk_index is {index.dtype} and topk_weight {weight.dtype}; they must be torch.int64 and "
            "torch.float32"
        )
    # A device would be waited for; its kernels assert as much.
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        least, most = int(index.min()), int(index.max())
        if not 0 <= least <= most < num_experts:
            raise ConfigError(
                f"router {rule}: topk_index has numbers from {least} to {most}; of {num_experts} experts they must be "
                f"between 0 and {num_experts - 1}"
            )


def ragged(logits: Tensor, probs: Tensor, weights: Tensor, cut: bool) -> Routing:
    """The decision of a router that gives each token to any number of experts: those of which its weight is not 0.

    There are E columns, or as many as the busiest token needs, which takes a wait for the device.

    Args:
        logits: (T, E).
        probs: (T, E).
        weights: (T, E) as applied to every expert's output.
        cut: Whether columns that no token needs are cut off (``Router.cuts_columns``); never in a graph, whose shapes
            are static.
    """
    weight, index = weights.sort(dim=-1, descending=True, stable=True)
    if cut and not torch.compiler.is_compiling():
        columns = max(1, int((weight > 0).any(dim=0).sum()))
        weight, index = weight[:, :columns], index[:, :columns]
    return Routing(logits, probs, index, weight, ragged=True)
