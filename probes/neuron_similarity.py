"""Neuron similarity: are the experts' average neurons alike? (2406.18219, section 4.2)

E routed experts, E' with the shared expert and the dense FFN, H hidden.
"""

from __future__ import annotations

from functools import partial

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_part, per_layer
from probes.figures.pictures import draw_depth, draw_heat_maps
from probes.measures.expert_matrices import keep_rows, labels_of, mean_neurons, num_experts, pair_means
from probes.measures.similarity import cosine_matrix


class NeuronSimilarity(Probe):
    """Cosine of the experts' average neurons: rows of up and gate, columns of down.

    An average has no width, so the shared expert and the dense reference FFN are always among them.

    Stored for each layer: ``neuron_mean_cos/<layer>/<up|gate|down> (E', E')``, ``num_experts/<layer>``, and
    ``others/<layer>/<matrix>``, the labels of the rows after the routed experts'. Scalars and headlines are over pairs
    of routed experts.
    """

    name = "neuron_similarity"
    question = "Are the experts' average neurons alike?"
    needs = frozenset({Need.WEIGHTS})

    def update_matrix(self, view: LayerView, name: str) -> None:
        """Average the neurons of one matrix of each expert, and compare."""
        means, rest = mean_neurons(view, name)
        self.put("neuron_mean_cos", view.index, cosine_matrix(means.unsqueeze(1)), name)
        keep_rows(self, view, rest, name)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Mean similarity over pairs of experts, and the heat maps."""
        if not num_experts(arrays):
            return ProbeResult(arrays, notes=["no layer has routed experts"])
        matrices, mean = by_part(arrays, "neuron_mean_cos"), pair_means(arrays, "neuron_mean_cos")
        title = "Cosine of the experts' average neurons (diagonal in grey)"
        pictures = draw_heat_maps(matrices, labels_of(arrays), title)
        if not mean["up"]:
            return ProbeResult(arrays, figures=pictures, notes=["every layer has one expert: no pairs to compare"])
        scalars: dict[str, float] = {}
        headlines = {}
        for name, values in mean.items():
            scalars |= per_layer(f"mean_cos_{name}", values)
            value = scalars[f"mean_cos_{name}"]
            sentence = f"Two experts' average {name} neurons have cosine {value:.2g} (0 unrelated, 1 the same)."
            headlines[f"mean_cos_{name}"] = Headline(value, sentence)
        title = "Mean cosine of two experts' average neurons over depth"
        pictures["over_depth"] = partial(draw_depth, mean, title, "cosine")
        return ProbeResult(arrays, scalars, headlines, pictures)
