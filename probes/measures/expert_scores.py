"""Scores by which experts are kept or removed, each from the tokens that chose the expert and its weight as applied.

T tokens, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moebed.machine.float64 import double
from moebed.views.interventions import assigned_weights
from moebed.views.layer import ExpertKind, ExpertView, LayerView
from probes.measures.resampling import SEED

# What each sums or means over the tokens of an expert, g its weight and E(x) its output.
SCORES = {
    "frequency": "tokens that chose it",
    "probability": "mean router probability, over all tokens (EMO)",
    "ean": "sum of ‖E(x)‖",
    "reap": "mean of g·‖E(x)‖ (REAP, 2510.13999)",
    "weighted": "sum of g·‖E(x)‖",
    "easy_ep": "sum of g·‖E(x)‖·max(0, 1 − cos(h, h + routed output)), h the residual before (EASY-EP)",
}
RANDOM = "random"


class LayerScores:
    """The scores of one layer's experts, as one after another is seen.

    Args:
        view: The layer, with what text did there.
        tokens: (T,) bool, those that count.
    """

    def __init__(self, view: LayerView, tokens: Tensor) -> None:
        assert view.routing is not None
        assert view.moe_input is not None
        self._view, self._tokens = view, tokens.to(view.moe_input.device)
        self._weight = assigned_weights(view.routing)[self._tokens]  # (t, E)
        self._norm = torch.zeros_like(self._weight)
        self._routed = torch.zeros_like(view.moe_input[self._tokens])  # (t, H)

    def add(self, expert: ExpertView) -> None:
        """See what one expert made of every token."""
        if expert.kind is ExpertKind.ROUTED:
            output = expert.output[self._tokens]
            self._norm[:, expert.index] = torch.linalg.vector_norm(output, dim=-1)
            self._routed += output * self._weight[:, expert.index : expert.index + 1]

    def found(self) -> dict[str, np.ndarray]:
        """The scores (E,) by name; of no tokens all are 0."""
        view = self._view
        assert view.routing is not None
        assert view.residual is not None
        chosen, residual = self._weight != 0, view.residual[self._tokens]
        added = double(self._weight * self._norm)
        turned = (1 - F.cosine_similarity(residual, residual + self._routed, dim=-1)).clamp_min(0)
        count = chosen.sum(dim=0)
        probability = double(view.routing.router_probs[self._tokens]).sum(dim=0) / max(1, len(chosen))
        scores = {
            "frequency": double(count),
            "probability": probability,
            "ean": double(chosen * self._norm).sum(dim=0),
            "reap": added.sum(dim=0) / count.clamp_min(1),
            "weighted": added.sum(dim=0),
            "easy_ep": (added * double(turned).unsqueeze(1)).sum(dim=0),
        }
        return {name: score.cpu().numpy() for name, score in scores.items()}


def random_scores(experts: int, layer: int, draw: int) -> np.ndarray:
    """Scores (E,) that mean nothing, others in each layer and draw."""
    return np.random.default_rng((SEED, layer, draw)).random(experts)


def best(scores: np.ndarray, count: int) -> tuple[int, ...]:
    """The experts of the largest scores (E,), in their order; of equal ones the first."""
    return tuple(sorted(np.argsort(-np.asarray(scores, np.float64), kind="stable")[:count].tolist()))


def best_over_layers(scores: Mapping[int, np.ndarray], share: float) -> dict[int, tuple[int, ...]]:
    """The experts of the largest scores of all layers together, each over its layer's mean; at least one a layer.

    Args:
        scores: (E,) by layer.
        share: Of all experts.
    """
    relative = {n: np.asarray(of, np.float64) / max(float(np.mean(of)), 1e-300) for n, of in scores.items()}
    kept = {n: {int(of.argmax())} for n, of in relative.items()}
    ranked = sorted(((-value, n, e) for n, of in relative.items() for e, value in enumerate(of)))
    wanted = max(len(kept), round(share * len(ranked)))
    for _, n, expert in ranked:
        if sum(map(len, kept.values())) >= wanted:
            break
        kept[n].add(expert)
    return {n: tuple(sorted(some)) for n, some in kept.items()}


def calibration_texts(domain: np.ndarray) -> np.ndarray:
    """Which texts (B,) of these domains are scored on: every other one of each domain; the rest are kept apart.

    A text that is alone in its domain is kept apart.
    """
    taken = np.zeros(len(domain), bool)
    for number in np.unique(domain):
        taken[np.flatnonzero(domain == number)[1::2]] = True
    return taken
