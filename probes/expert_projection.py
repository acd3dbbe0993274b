"""Expert projection: where do the experts, and their neurons, lie? (2406.18219, section 4.1, figures of its appendix)

E routed experts, E' with the shared expert and the dense FFN where they fit, P neurons taken, F expert intermediate.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, by_part, numbers, per_layer
from probes.figures.pictures import draw_depth
from probes.measures.expert_matrices import compared, fitting, keep_rows, labels_of, num_experts, standardised_gram
from probes.measures.principal import matrix_components, outliers, point_components

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_NEURONS = 4096
_DIMS = 3


class ExpertProjection(Probe):
    """Principal components of the experts' matrices, and of their neurons.

    Matrices: flattened, neurons as rows (down transposed), each coordinate standardised over the routed experts
    (ddof 1). The components are those of the routed experts alone; the shared expert and the dense FFN, where they have
    their shape, are projected onto them. Neurons: points of hidden size, standardised alike; of a large layer only some
    are taken, as many of each expert and evenly spread over it, at most 4096 in all.

    Stored for each layer and matrix: ``matrix_pca (E', 2)``, ``matrix_pca_var (2,)``, the shares of the variance, and
    with three components ``matrix_pca_3d``, ``matrix_pca_3d_var``; ``neuron_pca (P, 2)``, ``neuron_pca_3d (P, 3)``,
    ``neuron_pca_var (3,)``. For each layer: ``neuron_pca_expert (P,)`` and ``neuron_pca_index (P,)``, whose neurons the
    points are; ``num_experts``. ``others/<layer>/<matrix>``, the labels of the rows after the routed experts'. A layer
    with one expert has no ``matrix_pca``.

    Args:
        drop_outliers: Leave out of the pictures the neurons that DBSCAN calls noise, on two components standardised,
            which are stored as ``neuron_outlier (P,)``.
        eps: DBSCAN's reach, in standard deviations.
        min_samples: Points within reach, itself counted, that make a core point.
    """

    name = "expert_projection"
    question = "Where do the experts and their neurons lie?"
    needs = frozenset({Need.WEIGHTS})

    def __init__(self, drop_outliers: bool = False, eps: float = 0.5, min_samples: int = 5) -> None:
        super().__init__()
        self.drop_outliers, self.eps, self.min_samples = drop_outliers, eps, min_samples

    def update_matrix(self, view: LayerView, name: str) -> None:
        """Project one matrix of the experts of one layer."""
        rest, count = fitting(view, name), view.num_experts
        fetch, found = compared(view, name, rest), dict[str, np.ndarray]()
        if count > 1:
            points, share = matrix_components(*standardised_gram(view, name), _DIMS)
            found |= {"matrix_pca": points[:, :2], "matrix_pca_3d": points}
            found |= {"matrix_pca_var": share[:2], "matrix_pca_3d_var": share}
        width = len(fetch(0))
        taken = np.linspace(0, width - 1, min(width, max(1, _MOST_NEURONS // count))).round().astype(np.int64)
        rows = torch.from_numpy(taken).to(fetch(0).device)
        neurons = torch.cat([fetch(index)[rows].float() for index in range(count)])
        points, share = point_components(neurons, _DIMS)
        found |= {"neuron_pca": points[:, :2], "neuron_pca_3d": points, "neuron_pca_var": share}
        if self.drop_outliers and np.isfinite(points).all():
            scaled = points[:, :2] / np.maximum(points[:, :2].std(axis=0), 1e-30)
            found["neuron_outlier"] = outliers(scaled, self.eps, self.min_samples)
        for key, values in found.items():
            self.put(key, view.index, values, name)
        self.put("neuron_pca_expert", view.index, np.repeat(np.arange(count), len(taken)).astype(np.int16))
        self.put("neuron_pca_index", view.index, np.tile(taken, count))
        self.put("neuron_count", view.index, width)
        keep_rows(self, view, rest, name)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """How much of the variance two components hold, and the clouds."""
        experts = num_experts(arrays)
        if not experts:
            return ProbeResult(arrays, notes=["no layer has routed experts"])
        notes = _notes(arrays)
        pictures = {f"neurons_{dims}d": partial(_draw_neurons, arrays, dims) for dims in (2, 3)}
        shares = by_part(arrays, "matrix_pca_var")
        if not shares:
            notes.append("every layer has one expert: no components of whole matrices")
            return ProbeResult(arrays, figures=pictures, notes=notes)
        pictures = {f"matrices_{dims}d": partial(_draw_matrices, arrays, dims) for dims in (2, 3)} | pictures
        held = {name: {n: float(share.sum()) for n, share in layers.items()} for name, layers in shares.items()}
        scalars: dict[str, float] = {}
        headlines = {}
        for name, values in held.items():
            scalars |= per_layer(f"variance_of_two_{name}", values)
            value = scalars[f"variance_of_two_{name}"]
            even = float(np.mean([min(1.0, 2 / (experts[layer] - 1)) for layer in values]))
            sentence = f"Two components hold {value:.1%} of the variance between {name} matrices ({even:.1%} if even)."
            headlines[f"variance_of_two_{name}"] = Headline(value, sentence)
        title = "Share of the variance between experts in two components"
        pictures["over_depth"] = partial(draw_depth, held, title, "share of variance", marks={})
        return ProbeResult(arrays, scalars, headlines, pictures, notes)


def _notes(arrays: Arrays) -> list[str]:
    notes, points = [], by_layer(arrays, "neuron_pca_expert")
    for layer, width in numbers(arrays, "neuron_count").items():
        taken = len(points[layer]) // num_experts(arrays)[layer]
        if taken < width:
            notes.append(f"neurons: {taken} of each expert's {width:.0f} are taken, evenly spread")
    dropped = [value for layers in by_part(arrays, "neuron_outlier").values() for value in layers.values()]
    if dropped:
        share = np.concatenate(dropped).mean()
        notes.append(f"neurons: the pictures leave out {share:.2%}, which DBSCAN calls outliers")
    return list(dict.fromkeys(notes))


def _draw_matrices(arrays: Arrays, dims: int) -> Figure:
    from probes.figures import clouds

    points, share = (by_part(arrays, f"matrix_pca_3d{end}") for end in ("", "_var"))
    title = "The experts' matrices on their principal components"
    return clouds.labelled_clouds(points, share, labels_of(arrays), num_experts(arrays), dims, title)


def _draw_neurons(arrays: Arrays, dims: int) -> Figure:
    from probes.figures import clouds

    points, share = by_part(arrays, "neuron_pca_3d"), by_part(arrays, "neuron_pca_var")
    experts = by_layer(arrays, "neuron_pca_expert")
    title = "The experts' neurons on their principal components, coloured by expert"
    return clouds.coloured_clouds(points, share, experts, by_part(arrays, "neuron_outlier"), dims, title)
