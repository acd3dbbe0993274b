"""Routing by online k-means: an expert's gate embedding is the mean of the tokens that it gets.

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moebed.machine.float32 import float32_linear
from moebed.model.config import LayerConfig, ModelConfig, RouterOptions, setting
from moebed.model.routers.contract import ExpertOutputs, Load, Router
from moebed.model.routing import Routing, TokenContext


class KMeans(Router):
    """s = cos(x, μ_e) / τ; the K largest; weight softmax(s), over its sum over the chosen with norm_topk_prob.

    No gradient reaches μ_e (E, H): after each optimizer step μ_e ← (1 − η) μ_e + η · mean of the x that went to e, over
    all ranks and micro-batches (after 2605.12476, whose rate, temperature, weights and start are not known: they are
    ours). The first step routes by random directions, and then each μ_e becomes one token of the step's first
    micro-batch, spread evenly over it. An expert without tokens keeps its centroid. Padding counts as well.
    """

    @dataclass
    class Options(RouterOptions):
        """Settings of the centroids."""

        seed: int = setting("Of the first directions and of the tokens that centroids start from.", 0, least=0)
        centroid_rate: float = setting("What each centroid moves by toward the mean of its tokens.", 0.01, 0, 1)
        centroid_temperature: float = setting("What cosines with centroids are divided by.", 0.1, least=1e-6)

    options: Options
    adaptive = True
    keeps_input = False
    other_teacher = True  # no parameters
    INPUTS, TOKENS = "inputs", "tokens"
    centroids: Tensor
    started: Tensor
    places: Tensor
    idle_centroids: Tensor

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.layer = layer.index
        shape = layer.num_experts, config.hidden_size
        self.register_buffer("centroids", torch.zeros(shape, dtype=torch.float32))  # μ (E, H)
        self.register_buffer("started", torch.zeros(1, dtype=torch.float32))  # 1 once they are means of tokens
        # Where in the first micro-batch of all ranks each starts, of 1; not persistent, as the seed says it.
        self.register_buffer("places", torch.zeros(layer.num_experts, dtype=torch.float32), persistent=False)
        self.register_buffer("idle_centroids", torch.zeros((), dtype=torch.float32), persistent=False)
        self.is_first = torch.zeros((), dtype=torch.bool)  # micro-batch of a step; a tensor, or each were a graph
        self.reset_state()

    def reset_state(self) -> None:
        """Random directions, and no token seen."""
        generator = np.random.Generator(np.random.Philox(key=self.options.seed, counter=[0, 0, 0, self.layer]))
        spread = (np.arange(self.num_experts) + generator.random(self.num_experts)) / self.num_experts
        self.centroids.copy_(torch.from_numpy(generator.standard_normal(self.centroids.shape).astype(np.float32)))
        self.places.copy_(torch.from_numpy(spread.astype(np.float32)))
        self.started.zero_()

    def begin_step(self, step: int) -> None:
        """Centroids start from the first micro-batch of a step."""
        self.is_first = torch.full((), self.micro_batch == 0, device=self.centroids.device)  # a copy would wait

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route hidden_states (T, H)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            cosines = float32_linear(
                F.normalize(hidden_states.float(), dim=-1), F.normalize(self.centroids, dim=-1)
            )  # (T, E)
            routing = self.choose(cosines / self.options.centroid_temperature)
            if not self.training:
                return routing
            return routing._replace(statistics=self.tokens_of(hidden_states.detach().float(), routing.topk_index))

    def tokens_of(self, x: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Sums (E, H) and numbers (E,) of the tokens x (T, H) that go to index (T, K); at first of one token each."""
        chosen = torch.zeros(len(x), self.num_experts, device=x.device).scatter(1, index, 1.0)
        token = self.rank * len(x) + torch.arange(len(x), device=x.device)
        start = (self.places * (self.ranks * len(x))).long()
        first = ((token.unsqueeze(1) == start) & self.is_first).float()  # (T, E)
        taken = torch.where(self.started > 0, chosen, first)
        return {self.INPUTS: float32_linear(taken.t(), x.t()), self.TOKENS: taken.sum(dim=0)}

    @torch.no_grad()
    def end_step(self, load: Load) -> None:
        """Move each centroid toward the mean of its tokens; in the first step, to one of them."""
        tokens = load.statistics[self.TOKENS].unsqueeze(1)  # (E, 1)
        rate = torch.where(self.started > 0, self.options.centroid_rate, 1.0)
        mean = load.statistics[self.INPUTS] / tokens.clamp(min=1)
        self.centroids += torch.where(tokens > 0, rate * (mean - self.centroids), 0.0)
        self.idle_centroids.copy_((tokens == 0).sum())
        self.started.fill_(1)

    def numbers(self) -> dict[str, Tensor]:
        """Experts without a token in the last step."""
        return {"idle_centroids": self.idle_centroids}

    @classmethod
    def other_products(cls, config: ModelConfig, layer: LayerConfig) -> int:
        """x times the centroids."""
        return layer.num_experts * config.hidden_size
