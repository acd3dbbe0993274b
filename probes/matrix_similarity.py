"""Matrix similarity: are the experts' weights alike? (2406.18219, section 4.1)

E experts, F expert intermediate, H hidden.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from moebed.views.layer import ExpertKind, LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, by_part, per_layer
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
        for name, values in _reference_means(arrays).items():
            scalars |= per_layer(f"reference_cos_{name}", values)
            value = scalars[f"reference_cos_{name}"]
            sentence = f"An expert's {name} matrix and the dense model's have cosine {value:.2g} on average."
            headlines[f"reference_cos_{name}"] = Headline(value, sentence)
        for name, values in mean.items():
            scalars |= per_layer(f"mean_cos_{name}", values)
            value = scalars[f"mean_cos_{name}"]
            sentence = f"Two experts' {name} matrices have cosine {value:.2g} on average (0 unrelated, 1 the same)."
            headlines[f"mean_cos_{name}"] = Headline(value, sentence)
        title = "Mean cosine of two experts' matrices over depth"
        pictures["over_depth"] = partial(draw_depth, mean, title, "cosine")
        return ProbeResult(arrays, scalars, headlines, pictures)


def _reference_means(arrays: Arrays) -> dict[str, dict[int, float]]:
    """Mean cosine of a layer's routed experts with the dense reference, by matrix and layer, where there is one."""
    found: dict[str, dict[int, float]] = {}
    for name, layers in by_part(arrays, "others").items():
        for layer, others in layers.items():
            if ExpertKind.REFERENCE.value in others.tolist():
                count = num_experts(arrays)[layer]
                row = count + others.tolist().index(ExpertKind.REFERENCE.value)
                value = by_layer(arrays, "matrix_cos", name)[layer][row, :count].mean(dtype=np.float64)
                found.setdefault(name, {})[layer] = float(value)
    return found
