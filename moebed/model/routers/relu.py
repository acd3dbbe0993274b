"""ReLU routing: as many experts as a token's logits make positive, kept few by an adaptive penalty.

T tokens, E experts, K experts per token, meant on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebed.model.config import LayerConfig, ModelConfig, RouterOptions, setting
from moebed.model.routers.contract import Load
from moebed.model.routers.softmax import GatedRouter
from moebed.model.routing import Routing, ragged


class ReLU(GatedRouter):
    """w = ReLU(x W_gᵀ), no top-K (ReMoE 2412.14711).

    λ · mean over tokens of Σ_i w_i joins the loss, and after each optimizer step λ ← λ · 1.2^sign(target sparsity −
    sparsity), both over all layers, where the target is 1 − K/E. The assignments of a token come in descending weight;
    those of weight 0 are none and are not computed. There are as many columns as the busiest token needs, or E in
    evaluation and where shapes are static (``torch.compile``, ``parallel.exchange``). Balancing losses see w / Σ w.
    """

    @dataclass
    class Options(RouterOptions):
        """Settings of the penalty."""

        l1_coef: float = setting("Of the penalty on router weights at the start.", 1e-8, least=0)
        l1_factor: float = setting("What that is multiplied with, or divided by, after each step.", 1.2, least=1)

    options: Options
    fixed_top_k = False
    shift_invariant = False
    adaptive = True
    other_teacher = True  # its weights are never divided by their sum
    LOSS = "relu_l1"
    l1_coefficient: Tensor
    experts_per_token: Tensor

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.register_buffer("l1_coefficient", torch.full((1,), self.options.l1_coef, dtype=torch.float32))
        # In the last step, for the log.
        self.register_buffer("experts_per_token", torch.zeros((), dtype=torch.float32), persistent=False)

    def choose(self, logits: Tensor) -> Routing:
        """The decision that follows from logits (T, E)."""
        weights = logits.relu()  # (T, E)
        total = weights.sum(dim=-1, keepdim=True)
        probs = weights / total.clamp_min(torch.finfo(total.dtype).tiny)
        losses = {self.LOSS: weights.sum(dim=-1)} if self.training else None
        return ragged(logits, probs, weights, self.cuts_columns)._replace(losses=losses)

    def loss_coefficients(self) -> dict[str, float | Tensor]:
        """λ."""
        return {self.LOSS: self.l1_coefficient.squeeze(0)}

    def reset_state(self) -> None:
        """λ as at the start."""
        self.l1_coefficient.fill_(self.options.l1_coef)

    @torch.no_grad()
    def end_step(self, load: Load) -> None:
        """Penalise more where more experts than meant were active, less where fewer were."""
        self.l1_coefficient *= self.options.l1_factor ** torch.sign(load.density - 1)
        self.experts_per_token.copy_(load.density * self.num_experts_per_tok)

    def numbers(self) -> dict[str, Tensor]:
        """λ, and how many experts it came with."""
        return {"relu_l1_coefficient": self.l1_coefficient.squeeze(0), "experts_per_token": self.experts_per_token}
