"""Gate similarity: are the router's gate embeddings alike? (2406.18219, section 4.3)

E experts, H hidden.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moebed.views import LayerView, Need
from probes.base import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer
from probes.similarity import cosine_matrix, off_diagonal

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
            self.arrays[f"gate_cos/{view.index}"] = cosine_matrix(view.gate.unsqueeze(1))

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Mean similarity over pairs of gates, and the heat maps."""
        cosines = by_layer(arrays, "gate_cos")
        if not cosines:
            return ProbeResult(arrays, notes=["skipped: no layer has a router with gate embeddings"])
        pictures = {"heat_maps": partial(_draw_heat_maps, cosines)}
        mean = {n: float(off_diagonal(m).mean(dtype=np.float64)) for n, m in cosines.items() if len(m) > 1}
        if not mean:
            return ProbeResult(arrays, figures=pictures, notes=["every layer has one expert: no pairs to compare"])
        scalars = per_layer("mean_cos", mean)
        sentence = f"Two gate embeddings have cosine {scalars['mean_cos']:.2g} on average (0 unrelated, 1 the same)."
        pictures["over_depth"] = partial(_draw_over_depth, mean)
        return ProbeResult(arrays, scalars, {"mean_cos": Headline(scalars["mean_cos"], sentence)}, pictures)


def _draw_heat_maps(cosines: dict[int, np.ndarray]) -> Figure:
    from probes import figures

    return figures.similarity_grid({"gate": cosines}, "Cosine of the router's gate embeddings (diagonal in grey)")


def _draw_over_depth(mean: dict[int, float]) -> Figure:
    from probes import figures

    fig = figures.new_figure(6.5, 3.2, "Mean cosine of two gate embeddings over depth")
    ax = fig.subplots()
    figures.depth_line(ax, mean, figures.SERIES[0], "gate embeddings")
    ax.axhline(0, color=figures.MUTED, lw=1, ls="--")
    ax.set_ylabel("cosine", fontsize=9)
    return fig
