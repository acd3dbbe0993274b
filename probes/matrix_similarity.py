"""Matrix similarity: are the experts' weights alike? (2406.18219, section 4.1)

E experts, F expert intermediate, H hidden.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moebed.views import MATRICES, LayerView, Need
from probes.base import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer
from probes.similarity import cosine_matrix, off_diagonal

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class MatrixSimilarity(Probe):
    """Cosine of the experts' flattened up, gate and down matrices.

    Stored for each layer: ``matrix_cos/<layer>/<up|gate|down> (E', E')``; routed experts first, then the shared expert
    where its shape is that of a routed one; ``num_experts/<layer>``, E. Scalars and headlines are over pairs of routed
    experts; a layer with one expert has none.
    """

    name = "matrix_similarity"
    question = "Are the experts' weights alike?"
    needs = frozenset({Need.WEIGHTS})

    def update(self, view: LayerView) -> None:
        """Compare the experts of one layer."""
        if not view.num_experts:
            return
        for name in MATRICES:
            matrices, shared = view.matrix(name), view.shared_matrix(name)
            if shared is not None and shared.shape != matrices.shape[1:]:
                shared = None
            self.arrays[f"matrix_cos/{view.index}/{name}"] = cosine_matrix(matrices, shared)
        self.arrays[f"num_experts/{view.index}"] = np.asarray(view.num_experts, np.int64)

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
        pictures = {"heat_maps": partial(_draw_heat_maps, matrices)}
        if not mean["up"]:
            return ProbeResult(arrays, figures=pictures, notes=["every layer has one expert: no pairs to compare"])
        scalars: dict[str, float] = {}
        headlines = {}
        for name, values in mean.items():
            scalars |= per_layer(f"mean_cos_{name}", values)
            value = scalars[f"mean_cos_{name}"]
            sentence = f"Two experts' {name} matrices have cosine {value:.2g} on average (0 unrelated, 1 the same)."
            headlines[f"mean_cos_{name}"] = Headline(value, sentence)
        pictures["over_depth"] = partial(_draw_over_depth, mean)
        return ProbeResult(arrays, scalars, headlines, pictures)


def _draw_heat_maps(matrices: dict[str, dict[int, np.ndarray]]) -> Figure:
    from probes import figures

    return figures.similarity_grid(matrices, "Cosine of the experts' weight matrices (diagonal in grey)")


def _draw_over_depth(mean: dict[str, dict[int, float]]) -> Figure:
    from probes import figures

    fig = figures.new_figure(6.5, 3.4, "Mean cosine of two experts' matrices over depth")
    ax = fig.subplots()
    for (name, values), colour in zip(mean.items(), figures.SERIES, strict=False):
        figures.depth_line(ax, values, colour, name)
    ax.axhline(0, color=figures.MUTED, lw=1, ls="--")
    ax.set_ylabel("cosine", fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    return fig
