"""Routers that choose by the outputs of the experts: competition in full, and a gate that learns its result.

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moebed.model.config import LayerConfig, ModelConfig, RouterOptions, setting
from moebed.model.routers.contract import ExpertOutputs, Router
from moebed.model.routers.norms import norms, of_chosen
from moebed.model.routers.softmax import GatedRouter
from moebed.model.routing import Routing, TokenContext


def _all_outputs(experts: ExpertOutputs, hidden_states: Tensor, num_experts: int) -> Tensor:
    everyone = torch.arange(num_experts, device=hidden_states.device).expand(len(hidden_states), -1)
    return experts.each(hidden_states, everyone)  # (T, E, H)


class ExpertNorm(Router):
    """Every expert runs, s_i = ‖E_i(x)‖₂, the K largest; weight softmax over the chosen s.

    The suggestion of 2406.18219 (section 6) taken literally, and CompeteSMoE's competition (2402.02526, eq. 4) in every
    step: the upper bound in cost. It has no parameters.
    """

    runs_experts = True
    other_teacher = True  # no parameters

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route hidden_states (T, H)."""
        outputs = _all_outputs(experts, hidden_states, self.num_experts)
        with torch.autocast(hidden_states.device.type, enabled=False):
            routing = self.choose(norms(outputs))
        return routing._replace(precomputed=of_chosen(outputs, routing.topk_index))


class CompeteSMoE(GatedRouter):
    """A gate that learns from competitions between the experts (CompeteSMoE 2402.02526).

    In evaluation, and in most steps, the gate routes as ``softmax_topk`` does. With probability r per step and layer
    all experts run, s_i = ‖E_i(x)‖₂ decides, weight softmax over the chosen s, and the gate is taught the result by
    MSE(softmax(x W_gᵀ), stop-gradient softmax(s)). The coin is a function of seed, step and layer, so that all ranks
    and a resumed run see the same one without exchanging it.
    """

    other_teacher = True  # the competitions
    compiles = False  # steps with competition and without are different graphs
    LOSS = "router_competition"

    @dataclass
    class Options(RouterOptions):
        """Settings of the competitions."""

        seed: int = setting("Of the draw of the steps with competition.", 0, least=0)
        competition_rate: float = setting("Probability, per step and layer, that all experts compete.", 0.07, 0, 1)
        competition_loss_coef: float = setting("Of the gate's loss in steps with competition.", 1e-3, least=0)

    options: Options

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.layer = layer.index
        self.competes = False

    def begin_step(self, step: int) -> None:
        """Draw the coin of this step and layer."""
        self.competes = coin(self.options.seed, step, self.layer, self.options.competition_rate)

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route hidden_states (T, H)."""
        gated = super().forward(hidden_states, experts)
        if not (self.training and self.competes):
            return gated
        outputs = _all_outputs(experts, hidden_states, self.num_experts)
        with torch.autocast(hidden_states.device.type, enabled=False):
            won = self.compete(outputs)
            winners = of_chosen(outputs, won.topk_index)  # (T, K, H)
            return won._replace(precomputed=winners, losses=self.lessons(gated, won, winners))

    def compete(self, outputs: Tensor) -> Routing:
        """The decision of a competition between outputs (T, E, H)."""
        return self.choose(norms(outputs))

    def lessons(self, gated: Routing, won: Routing, winners: Tensor) -> dict[str, Tensor]:
        """Losses (T,) by name: what the gate decided, against who won with the outputs winners (T, K, H)."""
        return {self.LOSS: (gated.router_probs - won.router_probs.detach()).square().mean(dim=-1)}

    def loss_coefficients(self) -> dict[str, float | Tensor]:
        """Of the gate's lesson."""
        return {self.LOSS: self.options.competition_loss_coef}

    @classmethod
    def experts_run(cls, config: ModelConfig, layer: LayerConfig, training: bool = False) -> float:
        """K; in training all of them with probability r."""
        assert isinstance(config.router_options, cls.Options)
        rate = config.router_options.competition_rate if training else 0.0
        return rate * layer.num_experts + (1 - rate) * layer.num_experts_per_tok


class CompeteSMoEv2(CompeteSMoE):
    """The second version (2505.13380): s_i = mean softplus(E_i(x)), weight s / Σ_topK s.

    The gate's lesson counts the winners once more, with weight θ, and the winners' outputs are kept apart by their mean
    cosine. Both in steps with competition alone.
    """

    @dataclass
    class Options(CompeteSMoE.Options):
        """Settings of the competitions, and of the winners' part in the losses."""

        winners_weight: float = setting("What the winners count for once more in the gate's loss.", 0.2, least=0)
        winner_similarity_coef: float = setting("Of the mean cosine between the winners' outputs.", 1e-3, least=0)

    options: Options
    WINNERS, DIVERSITY = "router_winners", "winner_similarity"

    def compete(self, outputs: Tensor) -> Routing:
        """The decision of a competition between outputs (T, E, H)."""
        scores = F.softplus(outputs.float()).mean(dim=-1)  # (T, E)
        weight, index = scores.topk(self.num_experts_per_tok, dim=-1, sorted=True)  # (T, K)
        return Routing(scores, scores.softmax(dim=-1), index, weight / weight.sum(dim=-1, keepdim=True))

    def lessons(self, gated: Routing, won: Routing, winners: Tensor) -> dict[str, Tensor]:
        """Losses (T,) by name."""
        off = (gated.router_probs - won.router_probs.detach()).gather(1, won.topk_index)  # (T, K)
        return {
            **super().lessons(gated, won, winners),
            self.WINNERS: off.square().mean(dim=-1),
            self.DIVERSITY: mean_cosine(winners),
        }

    def loss_coefficients(self) -> dict[str, float | Tensor]:
        """Of the gate's lesson, of the winners' part in it, and of the winners' similarity."""
        whole = self.options.competition_loss_coef
        return {
            self.LOSS: whole,
            self.WINNERS: whole * self.options.winners_weight,
            self.DIVERSITY: self.options.winner_similarity_coef,
        }


def coin(seed: int, step: int, layer: int, rate: float) -> bool:
    """True with probability rate; the same for the same numbers, on every rank and after every restart."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, layer]))
    return bool(generator.random() < rate)


def mean_cosine(outputs: Tensor) -> Tensor:
    """Mean cosine of the pairs among outputs (T, K, H) of a token: (T,) float32; 0 where K is 1."""
    pairs = outputs.shape[1] * (outputs.shape[1] - 1)
    unit = F.normalize(outputs.float(), dim=-1)
    # ‖Σ u‖² holds every pair twice, and each vector with itself.
    both = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))
    return both / max(pairs, 1)
