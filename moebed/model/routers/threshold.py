"""Experts that take every token above a threshold of their own, and experts that choose their tokens in training.

T tokens, E experts, K experts per token, meant on average, P parts of a batch (the ranks that a process stands for).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from moebed.errors import UserError
from moebed.model.config import LayerConfig, ModelConfig, RouterOptions, setting
from moebed.model.routers.contract import Load
from moebed.model.routers.quantiles import histogram, upper_quantile
from moebed.model.routers.softmax import GatedRouter
from moebed.model.routing import Routing, ragged


class Threshold(GatedRouter):
    """s = x W_gᵀ; expert e serves a token where s_e > θ_e, with weight sigmoid(s_e) (after 2603.11535).

    θ_e is a running mean over optimizer steps of what K/E of all tokens' s_e lie above, counted in bins, which add up
    over micro-batches and ranks. So experts are evenly loaded and a token has K of them on average, or none: it depends
    on no other token of its batch, in training as in evaluation. Score, weight, decay and start are ours, as the
    paper's are not known: θ begins where an x of RMS 1 and a gate as it is drawn have it, and the first steps count
    fully.
    """

    @dataclass
    class Options(RouterOptions):
        """Settings of the running mean."""

        threshold_decay: float = setting(
            "What is kept of the thresholds in an optimizer step; they are a plain mean until it holds that long.",
            0.99,
            least=0,
            most=1,
        )

    options: Options
    fixed_top_k = False
    shift_invariant = False
    adaptive = True
    other_teacher = True  # its weights are never divided by their sum
    SCORES, UNSERVED = "scores", "unserved"
    threshold: Tensor
    steps: Tensor
    experts_per_token: Tensor
    unserved_share: Tensor

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.share = self.num_experts_per_tok / self.num_experts
        self.first_deviation = config.initializer_range * math.sqrt(config.hidden_size)  # of logits, for x of RMS 1
        self.register_buffer("threshold", torch.zeros(layer.num_experts, dtype=torch.float32))  # θ (E,)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.float32))  # that θ is a mean of
        # Of the last step, for the log.
        self.register_buffer("experts_per_token", torch.zeros((), dtype=torch.float32), persistent=False)
        self.register_buffer("unserved_share", torch.zeros((), dtype=torch.float32), persistent=False)
        self.reset_state()

    def scores(self, logits: Tensor) -> Tensor:
        """What is held against the thresholds: (T, E)."""
        return logits

    def weights(self, scores: Tensor) -> Tensor:
        """What outputs are weighed with, of scores (T, E)."""
        return scores.sigmoid()

    def served(self, scores: Tensor) -> Tensor:
        """Who serves whom, (T, E) bool, by scores (T, E)."""
        return scores > self.threshold

    def choose(self, logits: Tensor) -> Routing:
        """The decision that follows from logits (T, E)."""
        scores = self.scores(logits)
        weights = self.weights(scores)
        probs = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return ragged(logits, probs, weights.masked_fill(~self.served(scores), 0.0), self.cuts_columns)

    @torch.no_grad()
    def statistics(self, routing: Routing, token_mask: Tensor) -> dict[str, Tensor]:
        """Scores, counted, and the tokens that no expert serves."""
        unserved = (token_mask & ~routing.assigned.any(dim=1)).sum().float()
        return {self.SCORES: histogram(self.scores(routing.router_logits), token_mask), self.UNSERVED: unserved}

    def reset_state(self) -> None:
        """θ where a gate as it is drawn has it; below everything where K is E."""
        reach = NormalDist().inv_cdf(1 - self.share) if self.share < 1 else -math.inf
        self.threshold.fill_(self.first_threshold() + self.first_deviation * reach)
        self.steps.zero_()

    def first_threshold(self) -> float:
        """Of half of the tokens, at the start."""
        return 0.0

    @torch.no_grad()
    def end_step(self, load: Load) -> None:
        """Move every threshold toward that of the step."""
        counts = load.statistics[self.SCORES]
        self.experts_per_token.copy_(load.density * self.num_experts_per_tok)
        self.unserved_share.copy_(load.statistics[self.UNSERVED] / counts[0].sum().clamp(min=1))
        self.steps += 1
        if self.share < 1:
            rate = (1 / self.steps).clamp(min=1 - self.options.threshold_decay)
            self.threshold += rate * (upper_quantile(counts, self.share) - self.threshold)

    def numbers(self) -> dict[str, Tensor]:
        """Experts of a token, over all layers, and the share of tokens that have none."""
        return {"experts_per_token": self.experts_per_token, "unserved_share": self.unserved_share}


class ExpertChoice(Threshold):
    """p = softmax(x W_gᵀ); in training each expert takes the T·K/E tokens with the largest p; weight p (2202.09368).

    **Expert choice sees the whole batch**: it leaks later tokens into what trains earlier ones, and cannot be decoded.
    So evaluation is by ``threshold`` on ln p, with thresholds that were learned beside the training, unless
    ``chooses_tokens`` is set. Experts choose among the tokens of one rank, so P parts of a batch are P choices; padding
    is not told apart.
    """

    sees_batch = True
    shift_invariant = True

    @classmethod
    def caution(cls, config: ModelConfig) -> str | None:
        """That it leaks, and what that means for its losses."""
        return (
            f"router {config.router} lets experts choose among the tokens of a batch, so that in training a token's "
            "experts depend on tokens after it: train/loss knows of them. val/loss is by a threshold for each expert, "
            "as a model that decodes must route; val/loss_by_expert_choice stands beside it"
        )

    def scores(self, logits: Tensor) -> Tensor:
        """ln p (T, E)."""
        return logits.log_softmax(dim=-1)

    def weights(self, scores: Tensor) -> Tensor:
        """p (T, E)."""
        return scores.exp()

    def first_threshold(self) -> float:
        """As if all experts were as likely."""
        return -math.log(self.num_experts)

    def served(self, scores: Tensor) -> Tensor:
        """Who serves whom, (T, E) bool: by each expert's choice in training."""
        if not (self.training or self.chooses_tokens):
            return super().served(scores)
        tokens, parts = len(scores), self.token_parts
        if tokens % parts:
            raise UserError(
                f"{tokens} tokens cannot be cut into the parts of {parts} ranks (model.config.expert_ranks); give a "
                "data.batch_size that they divide"
            )
        by_part = scores.detach().view(parts, tokens // parts, -1)  # (P, T/P, E)
        chosen = by_part.topk(max(1, int(by_part.shape[1] * self.share)), dim=1).indices
        return torch.zeros_like(by_part, dtype=torch.bool).scatter(1, chosen, True).view_as(scores)
