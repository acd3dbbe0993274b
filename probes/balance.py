"""Balance: do the experts share the work?

T tokens, E experts, K experts per token, B sequences.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, numbers, per_layer
from probes.measures.choices import assignments, counts_by_sequence, sequence_of
from probes.measures.resampling import LARGEST, unit_notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEAD_SHARE = 0.001


class Unevenness(NamedTuple):
    """How uneven the loads of E experts are; see :class:`Balance`."""

    load: np.ndarray  # (E,)
    max_violation: float
    cv: float
    entropy: float
    dead: int


def unevenness(counts: np.ndarray) -> Unevenness:
    """Loads and their unevenness, from how often each expert was chosen (E,)."""
    experts = len(counts)
    load = counts / max(counts.sum(), 1)
    used = load[load > 0]
    entropy = -(used * np.log(used)).sum() / math.log(experts) if experts > 1 else 1.0
    violation, cv = load.max() * experts - 1, load.std() * experts
    return Unevenness(load, float(violation), float(cv), float(entropy), int((load < DEAD_SHARE).sum()))


class Balance(Probe):
    """Share of the T·K assignments that each expert gets, and how uneven the shares are.

    Where tokens differ in how many experts they have, T·K are the assignments that stand.

    Stored for each layer: ``load (E,)``, sums to 1; ``max_violation``, max load / mean load − 1 over the whole text
    (0 when balanced, E/K − 1 when the same K experts take all); ``cv``, standard deviation / mean; ``entropy``, of the
    loads in units of ln E, 1 when balanced and by definition with one expert; ``dead``, number of experts below 0.1 %.
    Where there is text also ``max_violation_batch``: max_violation of each sequence by itself, averaged. A training
    step's batch is not seen here; a sequence stands for it, the least that reaches the experts together. It is high
    where sequences differ from each other, though the whole text may be balanced, and where they are short.
    """

    name = "balance"
    question = "Do the experts share the work?"
    needs = frozenset({Need.CHOICES})

    def update(self, view: LayerView) -> None:
        """Count the assignments of one layer."""
        if view.routing is None:
            return
        index = assignments(view)
        sequence = sequence_of(view.text) if view.text is not None else np.zeros(len(index), np.int64)
        counts = counts_by_sequence(index, sequence, int(sequence.max(initial=0)) + 1, view.num_experts)  # (B, E)
        whole = unevenness(counts.sum(axis=0).astype(np.float64))
        for key, value in whole._asdict().items():
            self.put(key, view.index, value)
        if view.text is not None:
            counts = counts[counts.any(axis=1)]
            most = counts.max(axis=1) / counts.mean(axis=1) - 1
            self.put("max_violation_batch", view.index, most.mean())

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Scalars, headlines and the load picture."""
        load = by_layer(arrays, "load")
        if not load:
            return ProbeResult(arrays, notes=["no layer has experts: nothing to balance"])
        violation, dead = numbers(arrays, "max_violation"), numbers(arrays, "dead")
        scalars: dict[str, float] = {}
        for quantity in ("max_violation", "max_violation_batch", "cv", "entropy", "dead"):
            scalars |= per_layer(quantity, numbers(arrays, quantity))
        worst = max(violation, key=lambda layer: violation[layer])
        experts = sum(len(value) for value in load.values())
        headlines = {
            "max_violation": Headline(
                scalars["max_violation"],
                f"The busiest expert of a layer gets {1 + scalars['max_violation']:.2f} times the mean load on average "
                f"over layers, {1 + violation[worst]:.2f} times in layer {worst}, the worst.",
                no_interval=LARGEST,
            ),
            "dead_share": Headline(
                sum(dead.values()) / experts,
                f"{sum(dead.values()):.0f} of {experts} experts get less than 0.1 % of their layer's assignments.",
                no_interval="no interval, as it counts rare cases",
            ),
        }
        pictures = {"load": partial(_draw_load, load)}
        return ProbeResult(arrays, scalars, headlines, pictures, unit_notes(arrays, headlines))


def _draw_load(load: dict[int, np.ndarray]) -> Figure:
    from probes.figures import drawing

    by_count: dict[int, list[int]] = {}
    for layer, value in load.items():
        by_count.setdefault(len(value), []).append(layer)
    relative = {layer: value * len(value) for layer, value in load.items()}
    norm = drawing.ratio_norm(list(relative.values()))
    heights = [max(1.0, 0.34 * len(layers)) for layers in by_count.values()]
    fig = drawing.new_figure(9.5, 1.6 + sum(heights), "Load of each expert, as a multiple of an even share")
    axes = fig.subplots(len(by_count), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (experts, layers) in zip(axes, by_count.items(), strict=True):
        values = np.stack([relative[layer] for layer in layers])  # (layers, E)
        image = drawing.heat_map(ax, values, norm=norm, cmap="RdBu_r", aspect="auto")
        drawing.index_ticks(ax.xaxis, range(experts))
        drawing.index_ticks(ax.yaxis, layers)
        ax.set_xlabel("expert", fontsize=9)
        ax.set_ylabel("layer", fontsize=9)
        if experts <= 16 and len(layers) <= 32:
            drawing.write_values(ax, values, norm)
    drawing.colour_bar(fig, image, axes, "load / even share (1 = even)")
    return fig
