"""Matrix similarity: are the experts' weights alike? (2406.18219, section 4.1)

E experts, F expert intermediate, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from moebed.views.layer import MATRICES, LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer
from probes.figures.pictures import draw_depth, draw_heat_maps
from probes.measures.expert_matrices import labels_of
from probes.measures.similarity import cosines, expert_gram, off_diagonal


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
        self.arrays[f"matrix_cos/{view.index}/{name}"] = cosines(gram)
        self.arrays[f"num_experts/{view.index}"] = np.asarray(view.num_experts, np.int64)
        if others:
            self.arrays[f"others/{view.index}/{name}"] = np.asarray(others)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Mean similarity over pairs of experts, and the heat maps."""
        experts = {layer: int(value) for layer, value in by_layer(arrays, "num_experts").items()}
        if not experts:
            return ProbeResult(arrays, notes=["no layer has routed experts"])
        matrices = {name: {layer: arrays[f"matrix_cos/{layer}/{name}"] for layer in experts} for name in MATRICES}
        routed = {name: {n: m[: experts[n], : experts[n]] for n, m in rows.items()} for name, rows in matrices.items()}
        mean = {
            name: {n: float(off_diagonal(m).mean(dtype=np.float64)) for n, m in rows.items() if len(m) > 1}
            for name, rows in routed.items()
        }
        title = "Cosine of the experts' weight matrices (diagonal in grey)"
        pictures = draw_heat_maps(matrices, labels_of(arrays), title)
        if not mean["up"]:
            return ProbeResult(arrays, figures=pictures, notes=["every layer has one expert: no pairs to compare"])
        scalars: dict[str, float] = {}
        headlines = {}
        for name, values in _reference_means(arrays, experts).items():
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


def _reference_means(arrays: Arrays, experts: Mapping[int, int]) -> dict[str, dict[int, float]]:
    """Mean cosine of a layer's routed experts with the dense reference, by matrix and layer, where there is one."""
    found: dict[str, dict[int, float]] = {}
    for name in MATRICES:
        for layer, count in experts.items():
            others = arrays.get(f"others/{layer}/{name}")
            if others is not None and "F" in others.tolist():
                row = count + others.tolist().index("F")
                value = arrays[f"matrix_cos/{layer}/{name}"][row, :count].mean(dtype=np.float64)
                found.setdefault(name, {})[layer] = float(value)
    return found
