"""Chosen against the rest: are the experts that are chosen together more alike than those left out?

T tokens, T' of them compared, K experts per token, E routed experts, U units that are drawn anew to tell how sure.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moebed.views import Need
from probes.base import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer
from probes.resampling import interval, resample_within

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {"cos_chosen_pairs": "chosen", "cos_chosen_other": "mixed", "cos_other_pairs": "other"}
ENOUGH_SEQUENCES = 8  # to draw from; with fewer, stretches of the text are drawn
STRETCHES = 100


class ChosenVsRest(Probe):
    """Mean cosine of routed experts' outputs, over pairs and over the tokens that ``expert_outputs`` compared.

    Stored for each layer: ``cos_chosen_pairs ()``, over pairs of experts both chosen for the token;
    ``cos_other_pairs``, neither; ``cos_chosen_other``, one of the two; each where there are such pairs. Where there are
    the first two: ``difference_sum (U,)`` and ``difference_count (U,)``, their difference summed over the tokens of
    each unit, and how many those are. A unit is a sequence, or of fewer than 8 sequences one of up to 100 stretches of
    the text: tokens beside each other are not independent.
    """

    name = "chosen_vs_rest"
    question = "Are the experts chosen together more alike than those left out?"
    needs = frozenset({Need.ROUTING})  # the outputs are looked at by its source
    sources = ("expert_outputs",)

    def derive(self, found: Mapping[str, Arrays]) -> None:
        """Average what was found at each token."""
        arrays = found["expert_outputs"]
        for layer, taken in by_layer(arrays, "tokens_taken").items():
            means = {
                key: arrays[f"token_cos_{kind}/{layer}"].astype(np.float64)
                for key, kind in KINDS.items()
                if f"token_cos_{kind}/{layer}" in arrays
            }
            for key, values in means.items():
                self.arrays[f"{key}/{layer}"] = np.asarray(values.mean(), np.float32)
            if "cos_chosen_pairs" in means and "cos_other_pairs" in means:
                unit = _units(arrays[f"sequence/{layer}"], taken, int(arrays[f"num_tokens/{layer}"]))
                total = np.bincount(unit, weights=means["cos_chosen_pairs"] - means["cos_other_pairs"])
                self.arrays[f"difference_sum/{layer}"] = total.astype(np.float32)
                self.arrays[f"difference_count/{layer}"] = np.bincount(unit)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Means over layers, and whether the chosen are more alike."""
        means = {key: {layer: float(v) for layer, v in by_layer(arrays, key).items()} for key in KINDS}
        if not any(means.values()):
            return ProbeResult(arrays, notes=["no layer with two routed experts or more has seen text"])
        scalars: dict[str, float] = {}
        for key, values in means.items():
            scalars |= per_layer(key, values)
        pictures = {"over_depth": partial(_draw_over_depth, arrays)}
        sums, counts = by_layer(arrays, "difference_sum"), by_layer(arrays, "difference_count")
        if not sums:
            why = "no layer has two chosen experts and two others: there is nothing to hold the one against the other"
            return ProbeResult(arrays, scalars, {}, pictures, [why])
        scalars |= per_layer("difference", {layer: float(sums[layer].sum() / counts[layer].sum()) for layer in sums})
        value = scalars["difference"]
        draws = _draws(sums, counts)
        low, high = map(float, interval(np.mean(list(draws.values()), axis=0)))
        both, neither = (
            np.mean([means[key][layer] for layer in sums]) for key in ("cos_chosen_pairs", "cos_other_pairs")
        )
        verdict = (
            "more alike than" if low > 0 else "less alike than" if high < 0 else "as alike, as far as can be told, as"
        )
        sentence = (
            f"Experts chosen together are {verdict} those left out: their outputs at a token have cosine {both:.3f}, "
            f"those of two experts left out {neither:.3f}; the difference is {value:+.3f}, 0 if the choice were blind."
        )
        return ProbeResult(arrays, scalars, {"difference": Headline(value, sentence, (low, high))}, pictures)


def _units(sequence: np.ndarray, taken: np.ndarray, tokens: int) -> np.ndarray:
    """What each token (T',) is drawn with: its sequence, or where these are few, its stretch of the text."""
    if len(np.unique(sequence)) >= ENOUGH_SEQUENCES:
        return sequence
    return taken * min(tokens, STRETCHES) // tokens


def _draws(sums: Mapping[int, np.ndarray], counts: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Mean difference of each layer, (R,), with the same units drawn in every layer."""
    units = max(map(len, sums.values()))
    times = resample_within(np.zeros(units, np.int64)).astype(np.float64)
    found = {}
    for layer, values in sums.items():
        drawn = times[:, : len(values)]
        found[layer] = drawn @ values / np.maximum(drawn @ counts[layer], 1)
    return found


def _draw_over_depth(arrays: Arrays) -> Figure:
    from probes import figures

    fig = figures.new_figure(9.5, 3.4, "Cosine of two experts' outputs at a token, by whether they are chosen for it")
    left, right = fig.subplots(1, 2)
    names = {"cos_chosen_pairs": "both chosen", "cos_chosen_other": "one chosen", "cos_other_pairs": "none chosen"}
    for (key, name), colour in zip(names.items(), figures.SERIES, strict=False):
        values = {layer: float(value) for layer, value in by_layer(arrays, key).items()}
        if values:
            figures.depth_line(left, values, colour, name)
    left.set_title("mean cosine over pairs and tokens", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    sums, counts = by_layer(arrays, "difference_sum"), by_layer(arrays, "difference_count")
    if not sums:
        right.remove()
        return fig
    ends = {layer: interval(drawn) for layer, drawn in _draws(sums, counts).items()}
    middle = {layer: sums[layer].sum() / counts[layer].sum() for layer in sums}
    figures.depth_band(right, {n: np.array([ends[n][0], middle[n], ends[n][1]]) for n in sums}, figures.SERIES[3])
    right.axhline(0, color=figures.MUTED, lw=1, ls="--")
    right.set_title("both chosen minus none chosen, 95 % interval", fontsize=10)
    return fig
