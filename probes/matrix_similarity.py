"""Matrix similarity: are the experts' weights alike? (2406.18219, section 4.1)

E experts, F expert intermediate, H hidden.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from moebed.views.layer import ExpertKind, LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_part, per_layer
from probes.figures.pictures import draw_depth, draw_heat_maps
from probes.measures.expert_matrices import expert_gram, labels_of, num_experts, pair_means
from probes.measures.similarity import cosines


class MatrixSimilarity(Probe):
    """Cosine of the experts' flattened up, gate and down matrices.

    Stored for each layer: ``matrix_cos/<layer>/<up|gate|down> (E', E')``; routed experts first, then the shared expert
    and the dense reference, where their shape is that of a routed expert; ``others/<layer>/<up|gate|down>``, "SE" and
    "F" for those of the two that are there; ``num_experts/<layer>``, E. Scalars and headlines are over pairs of routed
    experts; a layer with one expert has none.
    """

    name = "matrix_similarity"
    question = "Are the experts' weights alike?"
    needs = frozenset({Need.WEIGHTS})

    def update_matrix(self, view: LayerView, name: str) -> None:
        """Compare one matrix of the experts of one layer."""
        gram, others = expert_gram(view, name)
        self.put("matrix_cos", view.index, cosines(gram), name)
        self.put("num_experts", view.index, view.num_experts)
        if others:
            self.put("others", view.index, np.asarray(others), name)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Mean similarity over pairs of experts, and the heat maps."""
        if not num_experts(arrays):
            return ProbeResult(arrays, notes=["no layer has routed experts"])
        matrices, mean = by_part(arrays, "matrix_cos"), pair_means(arrays, "matrix_cos")
        title = "Cosine of the experts' weight matrices (diagonal in grey)"
        pictures = draw_heat_maps(matrices, labels_of(arrays), title)
        if not mean["up"]:
            return ProbeResult(arrays, figures=pictures, notes=["every layer has one expert: no pairs to compare"])
        scalars: dict[str, float] = {}
        headlines = {}
        found = {
            "reference_cos": ("An expert's {} matrix and the dense model's", "", _reference_means(arrays)),
            "mean_cos": ("Two experts' {} matrices", " (0 unrelated, 1 the same)", mean),
        }
        for key, (subject, scale, means) in found.items():
            for name, values in means.items():
                scalars |= per_layer(f"{key}_{name}", values)
                value = scalars[f"{key}_{name}"]
                sentence = f"{subject.format(name)} have cosine {value:.2g} on average{scale}."
                headlines[f"{key}_{name}"] = Headline(value, sentence)
        title = "Mean cosine of two experts' matrices over depth"
        pictures["over_depth"] = partial(draw_depth, mean, title, "cosine")
        return ProbeResult(arrays, scalars, headlines, pictures)


def _reference_means(arrays: Arrays) -> dict[str, dict[int, float]]:
    """Mean cosine of a layer's routed experts with the dense reference, by matrix and layer, where there is one."""
    found: dict[str, dict[int, float]] = {}
    labels, experts = labels_of(arrays), num_experts(arrays)
    for name, layers in by_part(arrays, "matrix_cos").items():
        for layer, values in layers.items():
            if ExpertKind.REFERENCE.value in labels[layer]:
                row = values[labels[layer].index(ExpertKind.REFERENCE.value), : experts[layer]]
                found.setdefault(name, {})[layer] = float(row.mean(dtype=np.float64))
    return found
