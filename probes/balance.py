"""Balance: do the experts share the work?

T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from moebed.views import LayerView, Need
from probes.base import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEAD_SHARE = 0.001


class Balance(Probe):
    """Share of the T·K assignments that each expert gets, and how uneven the shares are.

    Stored for each layer: ``load (E,)``, sums to 1; ``max_violation``, max load / mean load − 1 over the whole text
    (0 when balanced, E/K − 1 when the same K experts take all); ``cv``, standard deviation / mean; ``entropy``, of the
    loads in units of ln E, 1 when balanced and by definition with one expert; ``dead``, number of experts below 0.1 %.
    """

    name = "balance"
    question = "Do the experts share the work?"
    needs = frozenset({Need.ROUTING})

    def update(self, view: LayerView) -> None:
        """Count the assignments of one layer."""
        if view.routing is None:
            return
        experts = view.num_experts
        counts = torch.bincount(view.routing.topk_index.flatten(), minlength=experts).double().cpu().numpy()
        load = counts / counts.sum()  # (E,)
        used = load[load > 0]
        entropy = -(used * np.log(used)).sum() / math.log(experts) if experts > 1 else 1.0
        self.arrays |= {
            f"load/{view.index}": load.astype(np.float32),
            f"max_violation/{view.index}": np.asarray(load.max() * experts - 1, np.float32),
            f"cv/{view.index}": np.asarray(load.std() * experts, np.float32),
            f"entropy/{view.index}": np.asarray(entropy, np.float32),
            f"dead/{view.index}": np.asarray((load < DEAD_SHARE).sum(), np.int64),
        }

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Scalars, headlines and the load picture."""
        load = by_layer(arrays, "load")
        if not load:
            return ProbeResult(arrays, notes=["no layer has experts: nothing to balance"])
        violation = {layer: float(value) for layer, value in by_layer(arrays, "max_violation").items()}
        dead = {layer: float(value) for layer, value in by_layer(arrays, "dead").items()}
        scalars: dict[str, float] = {}
        for quantity in ("max_violation", "cv", "entropy", "dead"):
            scalars |= per_layer(quantity, {layer: float(v) for layer, v in by_layer(arrays, quantity).items()})
        worst = max(violation, key=lambda layer: violation[layer])
        experts = sum(len(value) for value in load.values())
        headlines = {
            "max_violation": Headline(
                scalars["max_violation"],
                f"The busiest expert of a layer gets {1 + scalars['max_violation']:.2f} times the mean load on average "
                f"over layers, {1 + violation[worst]:.2f} times in layer {worst}, the worst.",
            ),
            "dead_share": Headline(
                sum(dead.values()) / experts,
                f"{sum(dead.values()):.0f} of {experts} experts get less than 0.1 % of their layer's assignments.",
            ),
        }
        return ProbeResult(arrays, scalars, headlines, {"load": partial(_draw_load, load)})


def _draw_load(load: dict[int, np.ndarray]) -> Figure:
    from probes import figures

    by_count: dict[int, list[int]] = {}
    for layer, value in load.items():
        by_count.setdefault(len(value), []).append(layer)
    relative = {layer: value * len(value) for layer, value in load.items()}
    norm = figures.ratio_norm(list(relative.values()))
    heights = [max(1.0, 0.34 * len(layers)) for layers in by_count.values()]
    fig = figures.new_figure(9.5, 1.6 + sum(heights), "Load of each expert, as a multiple of an even share")
    axes = fig.subplots(len(by_count), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (experts, layers) in zip(axes, by_count.items(), strict=True):
        values = np.stack([relative[layer] for layer in layers])  # (layers, E)
        image = figures.heat_map(ax, values, norm=norm, cmap="RdBu_r", aspect="auto")
        figures.index_ticks(ax.xaxis, range(experts))
        figures.index_ticks(ax.yaxis, layers)
        ax.set_xlabel("expert", fontsize=9)
        ax.set_ylabel("layer", fontsize=9)
        if experts <= 16 and len(layers) <= 32:
            figures.write_values(ax, values, norm)
    figures.colour_bar(fig, image, axes, "load / even share (1 = even)")
    return fig
