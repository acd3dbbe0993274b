"""Gate and projection: are experts with like gate embeddings alike themselves? (2406.18219, section 4.3 and Table 3)

E routed experts, P = E (E − 1) / 2 pairs of them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from moebed.views.layer import MATRICES, LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, by_part, finite, numbers, per_layer
from probes.figures.pictures import draw_depth
from probes.measures.expert_matrices import mean_neurons
from probes.measures.similarity import cosine_matrix, off_diagonal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDING = 1e-6  # similarities that differ by less are equal in float32
Points = dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]


class GateProjection(Probe):
    """Correlation over pairs of experts of gate similarity with the similarity of the experts' average neurons.

    Stored for each layer: ``gate_cos (E, E)``, and for each matrix ``neuron_mean_cos (E, E)`` over routed experts,
    ``gate_vs_proj_r`` and ``gate_vs_proj_r2 ()``, Pearson's r between their lower triangles and its square. Layers with
    fewer than three experts (two points always lie on a line) or without gate embeddings are left out.

    ``paper_rounding_<matrix>`` is the average of r² the way the published numbers came about, similarities rounded to
    bfloat16 and each r² to two decimals; the headlines are ours, unrounded.
    """

    name = "gate_projection"
    question = "Are experts with like gate embeddings alike themselves?"
    needs = frozenset({Need.WEIGHTS})

    def update_matrix(self, view: LayerView, name: str) -> None:
        """Compare one matrix of the experts with their gate embeddings."""
        if view.gate is None or view.num_experts < 3:
            return
        gate = cosine_matrix(view.gate.unsqueeze(1))
        mean = cosine_matrix(mean_neurons(view, name)[0][: view.num_experts].unsqueeze(1))
        r = pearson(off_diagonal(gate), off_diagonal(mean))
        self.put("gate_cos", view.index, gate)
        self.put("neuron_mean_cos", view.index, mean, name)
        self.put("gate_vs_proj_r", view.index, r, name)
        self.put("gate_vs_proj_r2", view.index, r * r, name)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Table 3's averages, unrounded and with the paper's rounding; scatter and curves over depth."""
        gates, means = by_layer(arrays, "gate_cos"), by_part(arrays, "neuron_mean_cos")
        if not gates:
            return ProbeResult(arrays, notes=["skipped: no layer has gate embeddings and three experts or more"])
        points: Points = {
            name: {layer: (off_diagonal(gates[layer]), off_diagonal(mean)) for layer, mean in layers.items()}
            for name, layers in means.items()
        }
        scalars: dict[str, float] = {}
        headlines = {}
        r_by_depth = {}
        for name in MATRICES:
            r_by_depth[name] = r = finite(numbers(arrays, "gate_vs_proj_r", name))
            if not r:
                continue
            scalars |= per_layer(f"r_{name}", r)
            scalars |= per_layer(f"r2_{name}", {layer: value * value for layer, value in r.items()})
            rounded = [round(pearson(*map(_bf16, points[name][layer])) ** 2, 2) for layer in r]
            value = scalars[f"r2_{name}"]
            sentence = f"Gate similarity explains {value:.1%} of how alike the experts' average {name} neurons are."
            headlines[f"r2_{name}"] = Headline(value, sentence)
            rounded = [value for value in rounded if np.isfinite(value)]
            if rounded:
                value = scalars[f"paper_rounding_{name}"] = float(np.mean(rounded))
                sentence = f"Rounded as the published numbers were, that is {value:.4g}."
                headlines[f"paper_rounding_{name}"] = Headline(value, sentence)
        pictures = {
            "scatter": partial(_draw_scatter, points),
            "over_depth": partial(draw_depth, r_by_depth, "Gate similarity with neuron similarity over depth", "r"),
        }
        return ProbeResult(arrays, scalars, headlines, pictures)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r of two samples (P,); NaN where one does not vary."""
    if any(np.ptp(v) <= ROUNDING * max(1.0, float(np.abs(v).max())) for v in (x, y)):
        return float("nan")
    x, y = (v.astype(np.float64) - v.mean(dtype=np.float64) for v in (x, y))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def _bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().float().numpy()


def _draw_scatter(points: Points) -> Figure:
    from probes.figures import clouds

    return clouds.scatter_grid(points, "Pairs of experts: gate similarity and average-neuron similarity")
