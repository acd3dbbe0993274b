"""Token choice, then expert choice (LocMoE+ 2406.00023, later called Expert-Token Resonance).

T tokens, E experts, K experts per token, H hidden, P parts of a batch (the ranks that a process stands for), t = T / P.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moebed.errors import UserError
from moebed.model.config import LayerConfig, ModelConfig, setting
from moebed.model.routers.contract import ExpertOutputs, Load, Router
from moebed.model.routers.grap import GrAP
from moebed.model.routing import Routing, TokenContext


class LocMoEPlus(GrAP):
    """Tokens choose K experts as ``grap`` does; then each expert keeps its C nearest tokens, and drops the rest.

    Near is δ = cos(x, ω_i). (The paper's equation 6 keeps the C farthest; its text and figures mean the nearest.) C is
    a multiple of the even share, or the fewest tokens whose δ, where positive, sum up to a share of that of all tokens
    that chose the expert: the paper's own rule, from a "range of score sums", is not specified. An assignment that is
    dropped has weight 0, and a token that no expert keeps passes through the residual alone. Balancing losses count
    what is kept.

    **Expert choice sees the whole batch**: it leaks later tokens into what trains earlier ones, and cannot be decoded.
    So evaluation is by token choice, without drops, unless ``chooses_tokens`` is set. Experts choose among the tokens
    of one rank, so P parts of a batch are P choices.
    """

    @dataclass
    class Options(GrAP.Options):
        """Settings of the logits, and of how many tokens an expert keeps."""

        affinity_share: float = setting(
            "Share of its tokens' cosines that each expert keeps; its choice sees later tokens, so training leaks them "
            "and evaluation goes by token choice.",
            0.95,
            least=0,
            most=1,
        )
        capacity_factor: float = setting(
            "Tokens that an expert keeps at most, over its even share; 0 lets affinity_share decide. Either way its "
            "choice sees later tokens, so training leaks them and evaluation goes by token choice.",
            0.0,
            least=0,
        )

    options: Options
    fixed_top_k = False
    adaptive = True  # what the log says of a step
    sees_batch = True
    dropped_share: Tensor

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.register_buffer("dropped_share", torch.zeros((), dtype=torch.float32), persistent=False)

    @classmethod
    def caution(cls, config: ModelConfig) -> str | None:
        """That it leaks, and what that means for its losses."""
        leak = (
            f"router {config.router} lets experts choose among the tokens of a batch, so that in training a token's "
            "experts depend on tokens after it: train/loss knows of them. val/loss is by token choice without drops, "
            "as a model that decodes must route; val/loss_by_expert_choice stands beside it"
        )
        quiet = super().caution(config)
        return f"{leak}; {quiet}" if quiet else leak

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route hidden_states (T, H)."""
        routing = super().forward(hidden_states, experts, context)
        if not (self.training or self.chooses_tokens):
            return routing
        length = hidden_states.detach().float().norm(dim=-1, keepdim=True)
        scale = math.sqrt(self.num_experts / self.hidden_size)  # ‖ω_i‖
        affinity = routing.router_logits.detach() / (scale * length).clamp_min(torch.finfo(length.dtype).tiny)
        return self.keep_nearest(routing, affinity)

    def keep_nearest(self, routing: Routing, affinity: Tensor) -> Routing:
        """The routing with each expert's own choice among the tokens that chose it, by their affinity δ (T, E)."""
        tokens, parts = len(affinity), self.token_parts
        if tokens % parts:
            raise UserError(
                f"{tokens} tokens cannot be cut into the parts of {parts} ranks (model.config.expert_ranks); give a "
                "data.batch_size that they divide"
            )
        chose = torch.zeros_like(affinity, dtype=torch.bool).scatter(1, routing.topk_index, True)
        by_part = affinity.masked_fill(~chose, -torch.inf).view(parts, tokens // parts, -1)  # (P, t, E)
        nearest, order = by_part.sort(dim=1, descending=True, stable=True)
        is_kept = self._is_kept(nearest).logical_and(nearest.isfinite())
        kept = torch.zeros_like(is_kept).scatter(1, order, is_kept).view(tokens, -1)  # (T, E)
        weight = routing.topk_weight.masked_fill(~kept.gather(1, routing.topk_index), 0.0)
        weight, place = weight.sort(dim=-1, descending=True, stable=True)
        index = routing.topk_index.gather(1, place)
        return Routing(routing.router_logits, routing.router_probs, index, weight, ragged=True)

    def _is_kept(self, nearest: Tensor) -> Tensor:
        """Whether an expert keeps its first, second, ... token; of their affinities in descending order (P, t, E)."""
        tokens = nearest.shape[1]
        if self.options.capacity_factor:
            even = tokens * self.num_experts_per_tok / self.num_experts
            rank = torch.arange(tokens, device=nearest.device).view(1, -1, 1)
            return (rank < math.ceil(self.options.capacity_factor * even)).expand_as(nearest)
        positive = nearest.clamp_min(0)
        reached = positive.cumsum(dim=1)
        return reached - positive < self.options.affinity_share * reached[:, -1:]

    @torch.no_grad()
    def end_step(self, load: Load) -> None:
        """How many assignments were dropped, over all layers."""
        self.dropped_share.copy_(1 - load.density)

    def numbers(self) -> dict[str, Tensor]:
        """That share."""
        return {"dropped_share": self.dropped_share}


@contextmanager
def choosing_tokens(routers: Sequence[Router]) -> Iterator[None]:
    """Routers that see a batch route in evaluation as they do in training."""
    for router in routers:
        router.chooses_tokens = router.sees_batch
    try:
        yield
    finally:
        for router in routers:
            router.chooses_tokens = False
