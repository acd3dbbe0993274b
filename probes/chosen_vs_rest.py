"""Chosen against the rest: are the experts that are chosen together more alike than those left out?

T tokens, T' of them compared, K experts per token, E routed experts, U units of the text
(``probes.measures.resampling``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moebed.views.layer import Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, find, numbers, per_layer
from probes.measures.resampling import as_interval, interval_of, jackknife, keep, unit_notes, without

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {"cos_chosen_pairs": "chosen", "cos_chosen_other": "mixed", "cos_other_pairs": "other"}


class ChosenVsRest(Probe):
    """Mean cosine of routed experts' outputs, over pairs and over the tokens that ``expert_outputs`` compared.

    Stored for each layer: ``cos_chosen_pairs ()``, over pairs of experts both chosen for the token;
    ``cos_other_pairs``, neither; ``cos_chosen_other``, one of the two; each where there are such pairs. Where there are
    the first two: ``difference ()``, the first minus the second, over tokens that have both.
    """

    name = "chosen_vs_rest"
    question = "Are the experts chosen together more alike than those left out?"
    needs = frozenset({Need.ROUTING})  # the outputs are looked at by its source
    sources = ("expert_outputs",)

    def derive(self, found: Mapping[str, Arrays]) -> None:
        """Average what was found at each token."""
        arrays = found["expert_outputs"]
        for layer, unit in by_layer(arrays, "unit").items():
            means = {
                key: cosines.astype(np.float64)
                for key, kind in KINDS.items()
                if (cosines := find(arrays, f"token_cos_{kind}", layer)) is not None
            }
            for key, values in means.items():
                if np.isfinite(values).any():
                    self.put(key, layer, float(np.nanmean(values)))
            if "cos_chosen_pairs" in means and "cos_other_pairs" in means:
                difference = means["cos_chosen_pairs"] - means["cos_other_pairs"]
                known = np.isfinite(difference)
                if not known.any():
                    continue
                self.arrays["unit_stratum"] = arrays["unit_stratum"]
                unit, stratum = unit[known], arrays["unit_stratum"]
                total = without(np.bincount(unit, difference[known], len(stratum)), stratum)
                count = without(np.bincount(unit, minlength=len(stratum)).astype(np.float64), stratum)
                rest = np.divide(total, count, out=np.full(len(stratum), np.nan), where=count > 0)
                keep(self, "difference", layer, difference[known].mean(), rest)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Means over layers, and whether the chosen are more alike."""
        means = {key: numbers(arrays, key) for key in KINDS}
        if not any(means.values()):
            return ProbeResult(arrays, notes=["no layer with two routed experts or more has seen text"])
        scalars: dict[str, float] = {}
        for key, values in means.items():
            scalars |= per_layer(key, values)
        pictures = {"over_depth": partial(_draw_over_depth, arrays)}
        found = numbers(arrays, "difference")
        if not found:
            why = "no layer has two chosen experts and two others: there is nothing to hold the one against the other"
            return ProbeResult(arrays, scalars, {}, pictures, [why])
        scalars |= per_layer("difference", found)
        value = scalars["difference"]
        ends = interval_of(arrays, "difference", value, within=(-2.0, 2.0))
        low, high = ends or (-2.0, 2.0)
        both, neither = (
            np.mean([means[key][layer] for layer in found]) for key in ("cos_chosen_pairs", "cos_other_pairs")
        )
        verdict = (
            "more alike than" if low > 0 else "less alike than" if high < 0 else "as alike, as far as can be told, as"
        )
        sentence = f"Experts chosen together are {verdict} those left out: their" if ends else "Of chosen experts the"
        sentence += (
            f" outputs at a token have cosine {both:.3f}, "
            f"those of two experts left out {neither:.3f}; the difference is {value:+.3f}, 0 if the choice were blind."
        )
        headlines = {"difference": Headline(value, sentence, ends)}
        return ProbeResult(arrays, scalars, headlines, pictures, unit_notes(arrays, headlines))


def _draw_over_depth(arrays: Arrays) -> Figure:
    from probes.figures import drawing

    fig = drawing.new_figure(9.5, 3.4, "Cosine of two experts' outputs at a token, by whether they are chosen for it")
    left, right = fig.subplots(1, 2)
    names = {"cos_chosen_pairs": "both chosen", "cos_chosen_other": "one chosen", "cos_other_pairs": "none chosen"}
    for (key, name), colour in zip(names.items(), drawing.SERIES, strict=False):
        values = numbers(arrays, key)
        if values:
            drawing.depth_line(left, values, colour, name)
    left.set_title("mean cosine over pairs and tokens", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    middle = numbers(arrays, "difference")
    if not middle:
        right.remove()
        return fig
    stratum = arrays["unit_stratum"]
    bands = {}
    for layer, rest in by_layer(arrays, "difference_without").items():
        low, high = as_interval(jackknife(middle[layer], rest, stratum)) or (middle[layer], middle[layer])
        bands[layer] = np.array([low, middle[layer], high])
    drawing.depth_band(right, bands, drawing.SERIES[3])
    right.axhline(0, color=drawing.MUTED, lw=1, ls="--")
    right.set_title("both chosen minus none chosen, 95 % interval", fontsize=10)
    return fig
