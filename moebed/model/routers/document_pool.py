"""Experts of a document: in training, all its tokens choose among the same few (EMO).

T tokens, E experts, K experts per token, H hidden, P experts of a document's pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebed.errors import ConfigError
from moebed.model.config import LayerConfig, ModelConfig, setting
from moebed.model.routers.contract import ExpertOutputs
from moebed.model.routers.controls import uniform_numbers
from moebed.model.routers.reference import OUTSIDE
from moebed.model.routers.softmax import SoftmaxTopK
from moebed.model.routing import Routing, TokenContext


class DocumentPool(SoftmaxTopK):
    """``softmax_topk`` whose documents have, in training, a pool of experts each (EMO, allenai/EMO@fb07783).

    With p = softmax(x W_gᵀ), a document's pool is the P experts with the largest sum of p over its tokens. P is drawn
    for each document and layer call, evenly from ``least_pool`` to ``most_pool``. Tokens are routed by the softmax
    within the pool, and their K experts are of it; the balancing losses see what is routed by. The draw is a function
    of seed, step, layer and the document's place in the step's batch, so that a resumed run, a recomputed pass and any
    layout of ranks and micro-batches draw the same.

    A pool follows from all tokens of its document, so in training a token's experts depend, a little, on later ones.
    In evaluation there is no pool: the router is ``softmax_topk``, and generates text as that does. A document is here
    what a window holds of it.
    """

    @dataclass
    class Options(SoftmaxTopK.Options):
        """Settings of the pools."""

        least_pool: int | None = setting("Fewest experts of a document; K if not given.", None)
        most_pool: int | None = setting("Most experts of a document; all if not given.", None)
        seed: int = setting("Of the sizes of pools.", 0, least=0)

    options: Options
    evaluated_as = "softmax_topk"
    needs_context = True

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.layer = layer.index
        # Which part of the step's batch this call has; a tensor, so that a compiled pass is not compiled anew for each.
        self.part = torch.zeros((), dtype=torch.int64)
        self.sizes = self.pool_sizes(config, layer)

    @classmethod
    def plan_bytes(cls, config: ModelConfig, layer: LayerConfig, is_narrow: bool) -> int:
        """Which experts are in the pool, E."""
        return layer.num_experts

    @classmethod
    def pool_sizes(cls, config: ModelConfig, layer: LayerConfig) -> tuple[int, int]:
        """Fewest and most experts of a pool."""
        options = config.router_options
        assert isinstance(options, cls.Options)
        least = layer.num_experts_per_tok if options.least_pool is None else options.least_pool
        return least, layer.num_experts if options.most_pool is None else options.most_pool

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Refuse pools that hold fewer experts than a token has, or more than there are."""
        for index in config.moe_layers:
            layer = config.layer(index)
            least, most = cls.pool_sizes(config, layer)
            if not layer.num_experts_per_tok <= least <= most <= layer.num_experts:
                raise ConfigError(
                    f"model config: router {config.router} has pools of {least} to {most} experts (router_options."
                    f"least_pool, most_pool); in layer {index} they must lie between num_experts_per_tok "
                    f"{layer.num_experts_per_tok} and num_experts {layer.num_experts}"
                )

    @classmethod
    def caution(cls, config: ModelConfig) -> str | None:
        """What a person should know who chose it."""
        if not config.router_aux_loss_coef or config.router_aux_loss_scope in ("global", "window"):
            return None
        return (
            f"router {config.router} gives a document few experts, which router_aux_loss_scope "
            f"{config.router_aux_loss_scope} works against; use global, or window where batches are accumulated"
        )

    def begin_step(self, step: int) -> None:
        """Sizes of their own for each micro-batch and rank."""
        self.part = torch.tensor(self.micro_batch * self.ranks + self.rank)

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route hidden_states (T, H) of tokens whose documents (T,) are known in training."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = self.logits(hidden_states)
            if not self.training or context is None or context.document is None:
                return self.choose(logits)
            pool = self.pools(logits.detach().softmax(dim=-1), context.document)
            return self.choose(torch.where(pool, logits, logits + OUTSIDE))

    def pools(self, probs: Tensor, document: Tensor) -> Tensor:
        """Which experts are in the pool of each token's document, (T, E) bool.

        Args:
            probs: (T, E).
            document: (T,) numbers below T.
        """
        sums = torch.zeros_like(probs).index_add(0, document, probs)  # (T, E), a row a document; many are of none
        place = sums.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return (place < self.drawn_sizes(len(probs), probs.device).unsqueeze(1))[document]

    def drawn_sizes(self, num_documents: int, device: torch.device) -> Tensor:
        """Experts of each document's pool, (T,) int64, in this layer and this part of the step's batch."""
        least, most = self.sizes
        key = (self.options.seed, self.layer, self.optimizer_step)
        uniform = uniform_numbers(key, (num_documents, 1), device, first=self.part * num_documents).squeeze(1)
        return (least + (uniform * (most - least + 1)).to(torch.int64)).clamp(max=most)
