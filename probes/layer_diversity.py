"""Layer diversity: does it grow with depth, and does the last layer differ? (2406.18219, sections 4 and 5)

E routed experts, L layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moebed.views.layer import MATRICES, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, by_part, find, finite, numbers, per_layer
from probes.measures.expert_matrices import num_experts
from probes.measures.resampling import SHARE, WITHOUT, interval_of, unit_notes
from probes.measures.similarity import off_diagonal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH_LAYERS = 5
HAS_P = "no interval, but a p, as layers are counted here and not texts"
SURE = 0.05  # p below which a trend, or an outlier, is called one
_EXACT = 7  # layers up to which all orders are tried
_ROUNDING = 1e-4  # a spread below this is that of the numbers' last digits
_KINDS = {"weights": [f"matrix_{name}" for name in MATRICES], "outputs": ["outputs"]}


class LayerDiversity(Probe):
    """1 − mean similarity over pairs of routed experts, of each layer with two or more.

    Stored for each layer: ``diversity/<layer>/<kind> ()``, where the kind is ``matrix_up``, ``matrix_gate`` or
    ``matrix_down`` (cosine of the flattened matrices), ``neuron_up``, ``neuron_gate`` or ``neuron_down`` (cosine of
    average neurons), or ``outputs`` (angular similarity averaged over tokens).

    ``rises_weights`` (mean over ``matrix_*``) and ``rises_outputs`` are Spearman's correlation of diversity with the
    layer, the last layer left out. ``last_layer_weights`` and ``last_layer_outputs`` say how far the last layer is from
    the straight line through the others, in units of the spread that a further layer on that line would have; its p is
    that of Student's t. The last layer is the last one that has experts.
    """

    name = "layer_diversity"
    question = "Do the experts grow more diverse with depth, and is the last layer an exception?"
    needs = frozenset({Need.ROUTING})  # weights and outputs are looked at by its sources
    sources = ("matrix_similarity", "neuron_similarity", "expert_outputs")

    def derive(self, found: Mapping[str, Arrays]) -> None:
        """Average the similarities that the sources found."""
        outputs = found["expert_outputs"]
        angular, without = by_layer(outputs, "output_angular_mean"), by_layer(outputs, f"pairs{WITHOUT}")
        for layer, count in num_experts(outputs).items():
            if count < 2:
                continue
            similar = {"outputs": angular[layer]}
            for ending, probe, key in (
                ("matrix", "matrix_similarity", "matrix_cos"),
                ("neuron", "neuron_similarity", "neuron_mean_cos"),
            ):
                for name in MATRICES:
                    if (cosines := find(found[probe], key, layer, name)) is not None:
                        similar[f"{ending}_{name}"] = cosines
            self.arrays["unit_stratum"] = outputs["unit_stratum"]
            rest = without[layer][:, : count * (count - 1) // 2]
            self.put(f"outputs{WITHOUT}", layer, 1 - rest.mean(axis=1, dtype=np.float64))
            for kind, values in similar.items():
                mean = off_diagonal(values[:count, :count]).mean(dtype=np.float64)
                self.put("diversity", layer, 1 - mean, kind)

    @staticmethod
    def of_weights(similarity: Arrays) -> dict[str, np.ndarray]:
        """What follows from the arrays of ``matrix_similarity`` alone, where this probe did not run."""
        probe, counts = LayerDiversity(), num_experts(similarity)
        for name, layers in by_part(similarity, "matrix_cos").items():
            for layer, values in layers.items():
                if (count := counts[layer]) >= 2:
                    mean = off_diagonal(values[:count, :count]).mean(dtype=np.float64)
                    probe.put("diversity", layer, 1 - mean, f"matrix_{name}")
        return probe.arrays

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Whether diversity rises, whether the last layer stands out, and the curves over depth."""
        every = {kind: finite(numbers(arrays, "diversity", kind)) for kind in by_part(arrays, "diversity")}
        every = {kind: rows for kind, rows in every.items() if rows}
        if not every:
            return ProbeResult(arrays, notes=["no layer with two routed experts or more has seen text"])
        scalars: dict[str, float] = {}
        for kind, rows in every.items():
            scalars |= per_layer(f"diversity_{kind}", rows)
        headlines = {}
        for subject, kinds in _KINDS.items():
            values = _mean_of([every[kind] for kind in kinds if kind in every])
            if len(values) >= ENOUGH_LAYERS:
                headlines[f"rises_{subject}"] = _trend_headline(subject, values)
                headlines[f"last_layer_{subject}"] = _last_headline(subject, values)
        notes = []
        if not headlines:
            mean = scalars.get("diversity_outputs", math.nan)  # where text was seen
            sentence = f"The experts' outputs have diversity {mean:.3f} on average (0 all the same, 0.5 unrelated)."
            ends = interval_of(arrays, "outputs", mean, within=SHARE)
            headlines = {"diversity_outputs": Headline(mean, sentence, ends)} if math.isfinite(mean) else {}
            notes = [
                f"with fewer than {ENOUGH_LAYERS} layers of two experts or more it cannot be told whether diversity "
                "rises with depth or whether the last layer is an exception"
            ]
        notes += unit_notes(arrays, headlines)
        return ProbeResult(arrays, scalars, headlines, {"over_depth": partial(_draw_over_depth, every)}, notes)


class Finding(NamedTuple):
    """A statistic and the probability of one at least as far from nothing, either way, by chance."""

    value: float
    p: float


def trend(values: np.ndarray) -> Finding:
    """Spearman's rho of values (L,) with their order; p from all orders of up to 7 values, else from Student's t.

    ``scipy.stats.spearmanr`` has Student's p at any length, and of a perfect order p = 0.
    """
    from scipy.stats import rankdata
    from scipy.stats import t as student

    count = len(values)
    rank = rankdata(values) - (count + 1) / 2
    order = np.arange(count) - (count - 1) / 2
    size = math.sqrt((rank @ rank) * (order @ order))
    if size == 0:
        return Finding(0.0, 1.0)
    rho = float(rank @ order / size)
    if count <= _EXACT:
        orders = np.array(list(itertools.permutations(order)))
        return Finding(rho, float((np.abs(orders @ rank) >= abs(rho) * size * (1 - 1e-9)).mean()))
    if abs(rho) > 1 - 1e-12:
        return Finding(rho, 2 / math.factorial(count))
    return Finding(rho, float(2 * student.sf(abs(rho) * math.sqrt((count - 2) / (1 - rho * rho)), count - 2)))


def deviation(layers: np.ndarray, values: np.ndarray) -> tuple[float, Finding]:
    """How far the last of values (L,) is from the line through the others.

    Returns:
        The distance, and the distance over its standard error s·√(1 + 1/n + (x − x̄)²/Σ(xᵢ − x̄)²), n = L − 1 and s² the
        squared residuals over n − 2, with the p of Student's t with n − 2 degrees of freedom.
    """
    from scipy.stats import t as student

    x, y, last = layers[:-1].astype(np.float64), values[:-1].astype(np.float64), float(layers[-1])
    count, centred = len(x), x - x.mean()
    slope = centred @ y / (centred @ centred)
    rest = y - y.mean() - slope * centred
    spread = max(math.sqrt(rest @ rest / (count - 2)), _ROUNDING)
    away = float(values[-1] - y.mean() - slope * (last - x.mean()))
    value = away / (spread * math.sqrt(1 + 1 / count + (last - x.mean()) ** 2 / (centred @ centred)))
    return away, Finding(value, float(2 * student.sf(abs(value), count - 2)))


def _mean_of(kinds: list[dict[int, float]]) -> dict[int, float]:
    """Mean over kinds, of the layers that all of them have."""
    if not kinds:
        return {}
    shared = [layer for layer in kinds[0] if all(layer in rows for rows in kinds)]
    return {layer: sum(rows[layer] for rows in kinds) / len(kinds) for layer in shared}


def _p_text(p: float) -> str:
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


def _trend_headline(subject: str, values: Mapping[int, float]) -> Headline:
    rho, p = trend(np.array(list(values.values()))[:-1])
    verdict = "shows no sure trend" if p >= SURE else "rises with depth" if rho > 0 else "falls with depth"
    sentence = (
        f"Diversity of the experts' {subject} {verdict}: rank correlation with the layer {rho:+.2f} "
        f"(1 rises always, 0 unrelated; {_p_text(p)}), the last layer left out."
    )
    return Headline(rho, sentence, no_interval=HAS_P)


def _last_headline(subject: str, values: Mapping[int, float]) -> Headline:
    away, (value, p) = deviation(np.array(list(values)), np.array(list(values.values())))
    side = "above" if away > 0 else "below"
    verdict = "stands out" if p < SURE else "does not surely stand out"
    sentence = (
        f"The last layer {verdict} in the diversity of its experts' {subject}: it is {abs(away):.2g} {side} the line "
        f"through the other layers, {abs(value):.1f} times the spread expected ({_p_text(p)})."
    )
    return Headline(value, sentence, no_interval=HAS_P)


def _draw_over_depth(every: Mapping[str, Mapping[int, float]]) -> Figure:
    from probes.figures import drawing

    panels = {
        "flattened matrices (cosine)": ([f"matrix_{name}" for name in MATRICES], 1.0),
        "average neurons (cosine)": ([f"neuron_{name}" for name in MATRICES], 1.0),
        "outputs (angular similarity)": (["outputs"], 0.5),
    }
    panels = {title: panel for title, panel in panels.items() if any(kind in every for kind in panel[0])}
    fig = drawing.new_figure(
        max(6.5, 3.85 * len(panels)), 3.4, "Diversity of experts over depth: 1 − mean similarity; dashed: if unrelated"
    )
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, (kinds, unrelated)) in zip(axes, panels.items(), strict=True):
        shown = [kind for kind in kinds if kind in every]
        for kind, colour in zip(shown, drawing.SERIES if len(kinds) > 1 else drawing.SERIES[3:], strict=False):
            drawing.depth_line(ax, every[kind], colour, kind.rpartition("_")[2])
        ax.axhline(unrelated, color=drawing.MUTED, lw=1, ls="--")
        ax.set_title(title, fontsize=10)
        if len(shown) > 1:
            ax.legend(fontsize=8, frameon=False)
    return fig
