"""Weights against outputs: do experts with like weights have like outputs? (2406.18219, section 5.1)

E routed experts, P = E (E − 1) / 2 pairs of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moebed.views.layer import MATRICES, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, by_part, find, finite, numbers, per_layer
from probes.figures.pictures import draw_depth
from probes.gate_projection import pearson
from probes.measures.expert_matrices import num_experts
from probes.measures.resampling import unit_notes
from probes.measures.similarity import off_diagonal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOWERED = (
    "no interval, as few texts make pairs differ that are alike, which brings r nearer to 0, and by how much cannot be "
    "told"
)
# What is held against the outputs: the ending of its keys -> probe, that probe's key, what it is.
_KINDS = {
    "": ("matrix_similarity", "matrix_cos", "matrices"),
    "_mean": ("neuron_similarity", "neuron_mean_cos", "average neurons"),
    "_reordered": ("neuron_matching", "reorder_cos", "matrices, neurons reordered to fit"),
}


class WeightVsOutput(Probe):
    """Correlation over pairs of routed experts of how alike their weights and how alike their outputs are.

    Stored for each layer with three experts or more: ``pairs_output (P,)``, angular similarity of outputs averaged over
    tokens; for each matrix ``pairs_weight (P,)``, cosine of the flattened matrices, and ``weight_output_r ()``,
    Pearson's r of the two (NaN where one does not vary); the same with ``_mean`` for the cosine of average neurons, and
    with ``_reordered`` for that of matrices after reordering, where ``neuron_matching`` runs as well.

    No interval of r is given: few texts bring it nearer to 0, and neither of two corrections by the jackknife held 95 %
    (one 90 to 95 %; the other 95 to 98 %, with intervals nearly as wide as all that r can be).
    """

    name = "weight_vs_output"
    question = "Do experts with like weights have like outputs?"
    needs = frozenset({Need.ROUTING})  # weights and outputs are looked at by its sources
    sources = ("matrix_similarity", "neuron_similarity", "expert_outputs")
    optional_sources = ("neuron_matching",)

    def derive(self, found: Mapping[str, Arrays]) -> None:
        """Correlate what the sources found, layer by layer."""
        outputs = found["expert_outputs"]
        angular = by_layer(outputs, "output_angular_mean")
        for layer, count in num_experts(outputs).items():
            if count < 3:
                continue
            alike = off_diagonal(angular[layer][:count, :count])
            for ending, (probe, key, _) in _KINDS.items():
                for name in MATRICES:
                    values = find(found.get(probe, {}), key, layer, name)
                    if values is None:
                        continue
                    weights = off_diagonal(values[:count, :count])
                    self.put("pairs_output", layer, alike)
                    self.put(f"pairs_weight{ending}", layer, weights, name)
                    self.put(f"weight_output_r{ending}", layer, pearson(weights, alike), name)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Average correlations, scatters and curves over depth."""
        outputs = by_layer(arrays, "pairs_output")
        if not outputs:
            return ProbeResult(arrays, notes=["no layer with three routed experts or more has seen text"])
        scalars: dict[str, float] = {}
        headlines = {}
        pictures = {}
        for ending, (_, _, what) in _KINDS.items():
            weights = by_part(arrays, f"pairs_weight{ending}")
            if not weights:
                continue
            points = {
                name: {layer: (values, outputs[layer]) for layer, values in layers.items()}
                for name, layers in weights.items()
            }
            pictures[f"scatter{ending}"] = partial(_draw_scatter, points, what)
            r_by_depth = {}
            for name in weights:
                r = finite(numbers(arrays, f"weight_output_r{ending}", name))
                if not r:
                    continue
                r_by_depth[name] = r
                scalars |= per_layer(f"r{ending}_{name}", r)
                value = scalars[f"r{ending}_{name}"]
                sentence = (
                    f"How alike two experts' {_subject(ending, name)} are, and how alike their outputs, "
                    f"go together with r = {value:+.2f} (0 unrelated, 1 in step)."
                )
                headlines[f"r{ending}_{name}"] = Headline(value, sentence, no_interval=LOWERED)
            if r_by_depth:
                title = f"Correlation of how alike weights and outputs are, over pairs of experts\nWeights: {what}"
                pictures[f"over_depth{ending}"] = partial(draw_depth, r_by_depth, title, "Pearson's r over pairs")
        notes = [] if headlines else ["all pairs of experts are equally alike: there is nothing to correlate"]
        return ProbeResult(arrays, scalars, headlines, pictures, notes + unit_notes(arrays, headlines))


def _subject(ending: str, name: str) -> str:
    return {
        "": f"{name} matrices",
        "_mean": f"average {name} neurons",
        "_reordered": f"{name} matrices, neurons reordered to fit,",
    }[ending]


def _draw_scatter(points: Mapping[str, Mapping[int, tuple[np.ndarray, np.ndarray]]], what: str) -> Figure:
    from probes.figures import clouds

    title = f"Pairs of experts: similarity of weights ({what}) and of outputs"
    return clouds.scatter_grid(points, title, "weights: cosine", "outputs: angular")
