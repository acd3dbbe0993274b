"""Neuron matching: do experts hold the same neurons in another order? (2406.18219, section 4.2 and Table 2)

E routed experts, E' with the shared expert and the dense FFN where they fit, F expert intermediate, H hidden.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.stats import kendalltau

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_part, finite, per_layer
from probes.figures.pictures import draw_depth, draw_heat_maps
from probes.measures.expert_matrices import compared, fitting, keep_rows, labels_of, num_experts, pair_means
from probes.measures.matching import match_pairs

_SECONDS_BETWEEN_LINES = 10.0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class NeuronMatching(Probe):
    """Cosine of the experts' flattened matrices after the neurons of one are reordered to fit the other's.

    For each pair i < j, the permutation of j's neurons that maximises the sum of neuron cosines, found exactly; each
    matrix by itself. Only the choice of the permutation looks at normalised neurons: the cosine after it is that of the
    matrices as they are.

    Stored for each layer and matrix, all (E', E') and symmetric: ``reorder_cos``; ``reorder_kendall``, Kendall's tau
    between the permutation and the identity; ``reorder_gain``, reorder_cos minus the cosine in the experts' own order.
    With ``num_experts/<layer>`` and ``others/<layer>/<matrix>``, the labels of the rows after the routed experts'.
    Scalars and headlines are over pairs of routed experts, as in Table 2.

    A layer of a large model takes minutes; ``say`` is told how far it is, at most every ten seconds.
    """

    name = "neuron_matching"
    question = "Do experts hold the same neurons in another order?"
    needs = frozenset({Need.WEIGHTS})
    say: Callable[[str], None] = staticmethod(_say)

    def update_matrix(self, view: LayerView, name: str) -> None:
        """Match one matrix of all pairs of experts of one layer."""
        rest = fitting(view, name)
        count = view.num_experts + len(rest)
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        fetch = compared(view, name, rest)
        whole = np.diag(torch.stack([(fetch(i) != 0).any() for i in range(count)]).cpu().numpy().astype(np.float64))
        cosine, tau, gain = whole, np.eye(count), np.zeros((count, count))
        start = said = time.perf_counter()
        for done, match in enumerate(match_pairs(fetch, pairs, count, view.work_bytes), start=1):
            at = (*match[:2],), (match.second, match.first)
            for place in at:
                cosine[place], gain[place] = match.cosine_after, match.cosine_after - match.cosine_before
                tau[place] = kendall(match.permutation) if math.isfinite(match.cosine_after) else math.nan
            now = time.perf_counter()
            if now - said > _SECONDS_BETWEEN_LINES and done < len(pairs):
                said, left = now, (now - start) / done * (len(pairs) - done)
                self.say(f"{self.name}: layer {view.index}, {name}: {done} of {len(pairs)} pairs, {left:.0f} s left")
        for key, values in (("reorder_cos", cosine), ("reorder_kendall", tau), ("reorder_gain", gain)):
            self.put(key, view.index, values, name)
        keep_rows(self, view, rest, name)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Table 2's figures (mean gain, its order of growth, mean tau), heat maps, and curves over depth."""
        if not num_experts(arrays):
            return ProbeResult(arrays, notes=["no layer has routed experts"])
        labels, cosines = labels_of(arrays), by_part(arrays, "reorder_cos")
        pictures = draw_heat_maps(cosines, labels, "Cosine of the experts' matrices, neurons reordered to fit")
        taus = draw_heat_maps(
            by_part(arrays, "reorder_kendall"), labels, "Kendall's tau of the reordering (1 none)", "tau"
        )
        pictures["kendall"] = taus["heat_maps"]
        means = {key: pair_means(arrays, f"reorder_{key}") for key in ("cos", "gain", "kendall")}
        if not means["cos"]["up"]:
            return ProbeResult(arrays, figures=pictures, notes=["every layer has one expert: no pairs to match"])
        scalars: dict[str, float] = {}
        for key, matrices in means.items():
            for name, values in matrices.items():
                scalars |= per_layer(f"mean_{key}_{name}", values)
            scalars[f"mean_{key}"] = float(np.mean([scalars[f"mean_{key}_{name}"] for name in matrices]))
        for name, values in means["gain"].items():
            orders = finite({layer: order_of_growth(value) for layer, value in values.items()})
            scalars |= per_layer(f"gain_order_{name}", orders)
        pictures["over_depth"] = partial(draw_depth, means["cos"], "Mean cosine after reordering over depth", "cosine")
        pictures["gain_over_depth"] = partial(
            draw_depth, means["gain"], "Cosine gained by reordering over depth", "gain in cosine", {0.0: "0, nothing"}
        )
        pictures["kendall_over_depth"] = partial(
            draw_depth, means["kendall"], "Kendall's tau of the reordering over depth", "tau"
        )
        return ProbeResult(arrays, scalars, _headlines(scalars), pictures)


def _headlines(scalars: dict[str, float]) -> dict[str, Headline]:
    cosine, gain, tau = (scalars[f"mean_{key}"] for key in ("cos", "gain", "kendall"))
    order = order_of_growth(gain)
    found = {
        "mean_cos": Headline(cosine, f"With neurons reordered to fit, two experts' matrices have cosine {cosine:.2g}."),
        "mean_gain": Headline(gain, f"Reordering the neurons gains {gain:.2g} in cosine on average."),
        "mean_tau": Headline(
            tau, f"The best order has Kendall's tau {tau:.2g} with the experts' own (1 the same order, 0 unrelated)."
        ),
    }
    if math.isfinite(order):
        found["gain_order"] = Headline(order, f"That gain is of the order of 10^{order:.0f}.")
    return found


def order_of_growth(gain: float) -> float:
    """The power of ten nearest below a gain, log10 rounded down; NaN without a gain."""
    return float(math.floor(math.log10(gain))) if gain > 1e-9 else math.nan


def kendall(permutation: np.ndarray) -> float:
    """Kendall's tau between a permutation (N,) and the identity; 1 for a single neuron, which has no order."""
    if len(permutation) < 2:
        return 1.0
    return float(kendalltau(np.arange(len(permutation)), permutation).statistic)
