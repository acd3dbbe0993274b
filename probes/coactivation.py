"""Co-activation: which experts are chosen together, and which one after the other? (OLMoE, arXiv 2409.02060, section 5)

T tokens, E experts, K experts per token; N_i tokens that chose expert i, N_ij that chose i and j.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, numbers, per_layer
from probes.measures.choices import assignments, chosen_mask, first_middle_last
from probes.measures.expert_matrices import num_experts
from probes.measures.resampling import LARGEST, unit_notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NULL_DRAWS = 20
FITTINGS = 200
SEED = 20240902


class Coactivation(Probe):
    """How often experts are chosen by the same token, within a layer and from one MoE layer to the next.

    Stored for each layer: ``coactivation (E, E)``, N_ij / N_i over all pairs in a token's top K, 1 on the diagonal, NaN
    in the row of an expert that no token chose; ``coactivation_expected (E, E)``, if partners came by load alone, every
    expert with its load and every token with experts all different; ``partner``, the largest entry of a row off the
    diagonal, averaged over the experts chosen; ``partner_chance``, the same of counts drawn from what is expected, as
    the largest of finite counts is always above it. For each layer but the last one: ``coactivation_next (E, E of the
    next)``, P(the token chooses j in the next MoE layer, given that it chose i here); ``coactivation_next_expected``,
    N_j / T in each row; ``next_partner``, ``next_partner_chance``; ``next_layer``, which one that is. With K = 1
    nothing is chosen together: the first four are left out.
    """

    name = "coactivation"
    question = "Which experts are chosen together?"
    needs = frozenset({Need.CHOICES})

    def update(self, view: LayerView) -> None:
        """Count the pairs of a layer, and keep its choices for the next one."""
        if view.routing is None:
            return
        index = assignments(view)
        # Kept until compute, so that a layer can be forgotten, or be taken from a pass that was stopped.
        self.put("choice", view.index, index.astype(np.int16))
        self.put("num_experts", view.index, view.num_experts)
        if index.shape[1] == 1:
            return
        mask = chosen_mask(index, view.num_experts).astype(np.float32)
        together = (mask.T @ mask).astype(np.float64)  # (E, E), whole numbers
        count = together.diagonal().copy()  # (E,)
        joint = expected_pairs(together, len(index))
        expected = np.divide(joint, count[:, None], out=np.zeros_like(joint), where=count[:, None] > 0)
        drawn = _drawn(count, expected)
        np.fill_diagonal(together, 0.0)
        self._store(view.index, "partner", together, count, drawn)
        share = _per_row(together, count)
        np.fill_diagonal(share, np.where(count > 0, 1.0, np.nan))
        np.fill_diagonal(expected, 1.0)
        self.put("coactivation", view.index, share)
        self.put("coactivation_expected", view.index, expected)

    def compute(self) -> ProbeResult:
        """The result, with each layer's choices joined to those of the next one."""
        choices, experts = by_layer(self.arrays, "choice"), num_experts(self.arrays)
        layers = list(choices)
        masks: dict[int, np.ndarray] = {}
        for layer, following in pairwise(layers):
            for one in (layer, following):
                if one not in masks:
                    masks[one] = chosen_mask(choices[one].astype(np.int64), experts[one]).astype(np.float32)
            mask, after = masks.pop(layer), masks[following]
            both = (mask.T @ after).astype(np.float64)  # (E, E of the next)
            count, share = mask.sum(axis=0, dtype=np.float64), after.mean(axis=0, dtype=np.float64)
            expected = np.repeat(share[None, :], len(count), axis=0)
            self._store(layer, "next_partner", both, count, _drawn(count, expected))
            self.put("coactivation_next", layer, _per_row(both, count))
            self.put("coactivation_next_expected", layer, expected)
            self.put("next_layer", layer, following)
        self.drop("choice")
        return self.describe(self.arrays)

    def _store(self, layer: int, key: str, together: np.ndarray, count: np.ndarray, drawn: np.ndarray) -> None:
        """Mean over the experts chosen of the largest share in a row, of what was measured (E, E') and drawn (draws,
        E, E')."""
        used = count > 0
        for name, counts in ((key, together), (f"{key}_chance", drawn)):
            largest = counts.max(axis=-1)[..., used] / count[used]
            self.put(name, layer, largest.mean() if used.any() else 0.0)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """How firm the closest partnerships are, beside chance, and the matrices in pictures."""
        if not num_experts(arrays):
            return ProbeResult(arrays, notes=["no layer has experts and text: nothing is chosen together"])
        scalars: dict[str, float] = {}
        for key in ("partner", "partner_chance", "next_partner", "next_partner_chance"):
            scalars |= per_layer(key, numbers(arrays, key))
        headlines, notes = {}, []
        pictures = {}
        if "partner" in scalars:
            value, blind = scalars["partner"], scalars["partner_chance"]
            sentence = (
                f"The expert most often chosen together with a given one joins it in {value:.0%} of its tokens on "
                f"average; {blind:.0%} if partners came by load alone."
            )
            headlines["partner"] = Headline(value, sentence, no_interval=LARGEST)
            pictures["within_layer"] = partial(_draw, arrays, "coactivation")
        else:
            notes.append("every token goes to one expert: within a layer nothing is chosen together")
        if "next_partner" in scalars:
            value, blind = scalars["next_partner"], scalars["next_partner_chance"]
            sentence = (
                f"Of the tokens of an expert, {value:.0%} on average go on to the expert of the next layer that most "
                f"of them choose; {blind:.0%} if the layers chose independently."
            )
            headlines["next_partner"] = Headline(value, sentence, no_interval=LARGEST)
            pictures["next_layer"] = partial(_draw, arrays, "coactivation_next")
        return ProbeResult(arrays, scalars, headlines, pictures, notes + unit_notes(arrays, headlines))


def _per_row(together: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Each row divided by its count; NaN where that is 0."""
    nothing = np.full_like(together, np.nan)
    return np.divide(together, count[:, None], out=nothing, where=count[:, None] > 0)


def expected_pairs(together: np.ndarray, tokens: int) -> np.ndarray:
    """Pairs (E, E) that are expected if partners came by load alone, with a diagonal of 0.

    Args:
        together: N_ij, with N_i, the tokens that chose expert i, on the diagonal.
        tokens: T.

    Each expert is in as many pairs as it was, and no pair in more tokens than either of the two. The start is the
    joint inclusion of a sample of fixed size without replacement (Hájek 1964, eq. 5.27); fitting its rows to the sums
    that were measured in turn (quasi-independence; Goodman 1968) makes it exact for K = 2.
    """
    count = together.diagonal()
    wanted = together.sum(axis=1) - count
    most = np.minimum.outer(count, count)
    share = count / max(tokens, 1)
    spread = max(float((share * (1 - share)).sum()), 1e-12)
    found = np.outer(share, share) * np.maximum(1 - np.outer(1 - share, 1 - share) / spread, 1e-3)
    np.fill_diagonal(found, 0.0)
    np.fill_diagonal(most, 0.0)
    for _ in range(FITTINGS):
        total = found.sum(axis=1)
        scale = np.sqrt(np.divide(wanted, total, out=np.zeros_like(total), where=total > 0))
        found = np.minimum(found * np.outer(scale, scale), most)
    return found


def _drawn(count: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Counts (draws, E, E') of the tokens of each expert that meet each other one, with chances expected (E, E')."""
    random = np.random.default_rng(SEED)
    chances = expected.clip(0, 1)
    return random.binomial(count[None, :, None].astype(np.int64), chances, (NULL_DRAWS, *expected.shape))


def _draw(arrays: Arrays, key: str) -> Figure:
    from probes.figures import drawing

    values, expected = by_layer(arrays, key), by_layer(arrays, f"{key}_expected")
    layers, following = first_middle_last(list(values)), by_layer(arrays, "next_layer")
    if key == "coactivation":
        title = "Of the tokens that chose one expert (row), what share chose another one (column) as well?"
    else:
        title = "Of the tokens that chose one expert (row), what share chooses each of the next layer's (column)?"
    title += "\nAbove: the share. Below: as a multiple of what the loads alone would give"
    fig = drawing.new_figure(max(7.0, 1.4 + 3.0 * len(layers)), 7.0, title)
    axes = fig.subplots(2, len(layers), squeeze=False)
    shares, ratios = {}, {}
    for layer in layers:
        shares[layer] = values[layer].astype(np.float64)
        if key == "coactivation":
            np.fill_diagonal(shares[layer], np.nan)
        wanted = expected[layer].astype(np.float64)
        ratios[layer] = np.divide(shares[layer], wanted, out=np.full_like(wanted, np.nan), where=wanted > 0)
    highest = max((float(np.nanmax(v)) for v in shares.values() if np.isfinite(v).any()), default=1.0)
    norm = drawing.ratio_norm(list(ratios.values()), share=0.99, most=10.0)
    for column, layer in enumerate(layers):
        top, bottom = axes[:, column]
        share = drawing.heat_map(top, shares[layer], cmap="Blues", vmin=0, vmax=highest)
        ratio = drawing.heat_map(bottom, ratios[layer], cmap="RdBu_r", norm=norm)
        if max(shares[layer].shape) <= 10:
            drawing.write_values(bottom, ratios[layer], norm)
        onward = f" to {int(following[layer])}" if key == "coactivation_next" else ""
        top.set_title(f"layer {layer}{onward}", fontsize=10)
        for ax in (top, bottom):
            drawing.index_ticks(ax.xaxis, range(shares[layer].shape[1]))
            drawing.index_ticks(ax.yaxis, range(shares[layer].shape[0]))
            if column == 0:
                ax.set_ylabel("expert", fontsize=9)
        bottom.set_xlabel("other expert" if key == "coactivation" else "expert of the next layer", fontsize=9)
    drawing.colour_bar(fig, share, axes[0], "share of the row's tokens")
    drawing.colour_bar(fig, ratio, axes[1], "share / expected", extend="max")
    return fig
