"""Gate similarity: are the router's gate embeddings alike? (2406.18219, section 4.3)

E experts, H hidden.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer
from probes.figures.pictures import draw_depth, draw_heat_maps
from probes.measures.similarity import cosine_matrix, off_diagonal


class GateSimilarity(Probe):
    """Cosine of the rows of W_g (E, H), one gate embedding an expert.

    Stored for each layer: ``gate_cos (E, E)``. A layer whose router has no gate embeddings is left out.
    """

    name = "gate_similarity"
    question = "Are the router's gate embeddings alike?"
    needs = frozenset({Need.WEIGHTS})

    def update(self, view: LayerView) -> None:
        """Compare the gate embeddings of one layer."""
        if view.gate is not None:
            self.put("gate_cos", view.index, cosine_matrix(view.gate.unsqueeze(1)))

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Mean similarity over pairs of gates, and the heat maps."""
        cosines = by_layer(arrays, "gate_cos")
        if not cosines:
            return ProbeResult(arrays, notes=["skipped: no layer has a router with gate embeddings"])
        labels = {layer: [str(index) for index in range(len(values))] for layer, values in cosines.items()}
        pictures = draw_heat_maps(
            {"gate": cosines}, labels, "Cosine of the router's gate embeddings (diagonal in grey)"
        )
        mean = {n: float(off_diagonal(m).mean(dtype=np.float64)) for n, m in cosines.items() if len(m) > 1}
        if not mean:
            return ProbeResult(arrays, figures=pictures, notes=["every layer has one expert: no pairs to compare"])
        scalars = per_layer("mean_cos", mean)
        sentence = f"Two gate embeddings have cosine {scalars['mean_cos']:.2g} on average (0 unrelated, 1 the same)."
        title = "Mean cosine of two gate embeddings over depth"
        pictures["over_depth"] = partial(draw_depth, {"gate embeddings": mean}, title, "cosine")
        return ProbeResult(arrays, scalars, {"mean_cos": Headline(scalars["mean_cos"], sentence)}, pictures)
