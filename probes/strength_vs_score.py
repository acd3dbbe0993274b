"""Strength against score: is an expert that the router scores high also strongly activated? (2605.12476)

What ``router_coupling`` looks for in weights, seen on text: not the size of outputs, as in ``norm_vs_score``, but of
what comes before ``up`` and ``down``.

T tokens, E routed experts, F expert intermediate (neurons).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, numbers, per_layer
from probes.measures.choices import assignments, chosen_mask
from probes.measures.ranks import ONE_NORM, Ranks, correlation, joined, rankable, ranks, settled
from probes.measures.resampling import interval_of, keep, unit_notes, units_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_TOKENS = 10  # of an expert, for a correlation over them
_EXPERT_KEYS = {
    "score_strength_expert": "over all tokens",
    "score_strength_expert_partial": "over all tokens, given ‖x‖",
    "score_strength_own": "over its own tokens",
    "score_strength_own_partial": "over its own tokens, given ‖x‖",
}


class StrengthVsScore(Probe):
    """Every routed expert is run on every token; its strength is ‖act(W_gate x)‖₂ / √F, its score ``router_probs``.

    Stored for each layer: ``score_strength_token ()``, mean over tokens of the rank correlation of score and strength
    over experts, with ``ranked ()``, the share of tokens at which neither is the same for all experts; the others are
    left out. Of each expert (E,), its rank correlation over tokens, in which scores are compared between tokens:
    ``score_strength_expert`` over all of them, ``score_strength_own`` over those that chose it, which selection makes
    smaller; and ``..._partial`` of each, with the norm of the layer's input held constant, as both grow with it; the
    same where all inputs have one norm within a thousandth. An expert with fewer than 10 tokens has NaN. Tokens that
    have seen the same ids, as the first ones of all texts, share their rank.
    """

    name = "strength_vs_score"
    question = "Is an expert that the router scores high also strongly activated?"
    needs = frozenset({Need.ROUTING, Need.ACTIVATIONS})

    def begin_layer(self, view: LayerView) -> None:
        """Strengths of this layer's experts, block of tokens after block."""
        self._found: list[list[Tensor]] = [[] for _ in range(view.num_experts)]

    def update_activations(self, view: LayerView, expert: int, tokens: slice, activations: Tensor) -> None:
        """Measure some tokens' activations of one routed expert."""
        size = torch.linalg.vector_norm(activations.float(), dim=1)
        self._found[expert].append(size / activations.shape[1] ** 0.5)

    def update(self, view: LayerView) -> None:
        """Compare strengths with scores of one layer."""
        if view.routing is None or view.moe_input is None or view.num_experts < 2 or not all(self._found):
            return
        strength = torch.stack([torch.cat(blocks) for blocks in self._found], dim=1).cpu().numpy()  # (T, E)
        score = view.routing.router_probs.float().cpu().numpy()
        told = rankable(score) & rankable(strength)  # (T,)
        self.put("ranked", view.index, told.mean() if len(told) else 0.0)
        if not told.any():
            return
        rho = np.where(told, correlation(ranks(joined(score)), ranks(joined(strength))), np.nan)
        units = units_of(view.text, len(rho))
        keep(self, "score_strength_token", view.index, float(np.nanmean(rho)), units.means_without(rho))
        self.arrays |= units.arrays()
        size = torch.linalg.vector_norm(view.moe_input.float(), dim=-1).cpu().numpy()
        if view.text is not None:
            alike = view.text.first_with_past.numpy()
            score, strength, size = (settled(values, alike) for values in (score, strength, size))
        chosen = chosen_mask(assignments(view), view.num_experts)
        everyone = np.ones_like(chosen)
        for key, taken in (("score_strength_expert", everyone), ("score_strength_own", chosen)):
            pairs = [_over_tokens(score[own, e], strength[own, e], size[own]) for e, own in enumerate(taken.T)]
            plain, given = np.array(pairs).T
            self.put(key, view.index, plain)
            self.put(f"{key}_partial", view.index, given)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Mean correlation over experts of a token, and over tokens of an expert; curves over depth."""
        rho = numbers(arrays, "score_strength_token")
        if not rho:
            return ProbeResult(arrays, notes=["no layer has seen text with experts whose scores and strengths differ"])
        scalars = per_layer("score_strength_token", rho)
        for key in _EXPERT_KEYS:
            scalars |= per_layer(key, _means(arrays, key))
        value = scalars["score_strength_token"]
        own = scalars.get("score_strength_own_partial")
        within = f"; {own:+.2f} over an expert's own tokens of one norm" if own is not None else ""
        headline = Headline(
            value,
            f"At a token, an expert's score and how strongly it is activated have rank correlation {value:+.2f} "
            f"(1 same order, 0 unrelated){within}.",
            interval_of(arrays, "score_strength_token", value, within=(-1.0, 1.0)),
        )
        headlines = {"score_strength_token": headline}
        pictures = {"over_depth": partial(_draw_over_depth, arrays)}
        return ProbeResult(arrays, scalars, headlines, pictures, unit_notes(arrays, headlines))


def _over_tokens(score: np.ndarray, strength: np.ndarray, size: np.ndarray) -> tuple[float, float]:
    """Spearman's rho of score and strength (T,), and the same with size (T,) held constant; NaN of few tokens."""
    if len(score) < LEAST_TOKENS:
        return np.nan, np.nan
    a, b, c = (ranks(values[None]) for values in (score, strength, size))
    plain, with_size, of_size = (_rho(x, y) for x, y in ((a, b), (a, c), (b, c)))
    if not rankable(size[None], ONE_NORM)[0]:
        return plain, plain
    left = (1 - with_size**2) * (1 - of_size**2)
    return plain, (plain - with_size * of_size) / left**0.5 if left > 1e-12 else np.nan


def _rho(a: Ranks, b: Ranks) -> float:
    return float(correlation(a, b)[0])


def _means(arrays: Arrays, key: str) -> dict[int, float]:
    """Means over experts by layer, of the experts and layers that have one."""
    return {n: float(np.nanmean(v)) for n, v in by_layer(arrays, key).items() if np.isfinite(v).any()}


def _draw_over_depth(arrays: Arrays) -> Figure:
    from probes.figures import drawing

    fig = drawing.new_figure(9.5, 3.5, "Do high scores go with strong activations? Over depth")
    left, right = fig.subplots(1, 2)
    drawing.depth_line(left, numbers(arrays, "score_strength_token"), drawing.SERIES[0], "over experts")
    left.set_title("at a token, over experts", fontsize=10)
    right.set_title("of an expert, over tokens; mean over experts", fontsize=10)
    for (key, label), colour in zip(_EXPERT_KEYS.items(), drawing.SERIES[1:], strict=True):
        drawing.depth_line(right, _means(arrays, key), colour, label)
    for ax in (left, right):
        ax.axhline(0, color=drawing.MUTED, ls="--", lw=1)
        ax.set_ylim(-1.05, 1.05)
        ax.set_ylabel("Spearman's rho", fontsize=9)
    drawing.legend(right, f"no expert has {LEAST_TOKENS} tokens that can be ranked")
    return fig
