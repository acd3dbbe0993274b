"""Router state: how decided is the router, and do its logits grow?

T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer
from probes.measures.choices import assignments, chosen_mask
from probes.measures.expert_matrices import num_experts
from probes.measures.resampling import interval_of, keep, unit_notes, units_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


TIED = 0.01  # share of tokens from which ties are told


class RouterState(Probe):
    """Per token, from the router's float32 distribution.

    Stored for each layer: ``logit_norm (T,)``, L2 norm of the router logits; ``router_entropy (T,)``, in nats;
    ``margin (T,)``, probability of the last expert chosen minus that of the first one left out, below 0 where a bias
    on the choice decided against the probabilities; with all experts chosen, that of the last; ``num_experts``, E.
    """

    name = "router_state"
    question = "How decided is the router?"
    needs = frozenset({Need.ROUTING})

    def update(self, view: LayerView) -> None:
        """Measure one layer's distributions."""
        if view.routing is None:
            return
        probs = view.routing.router_probs.float()  # (T, E)
        chosen = torch.from_numpy(chosen_mask(assignments(view), view.num_experts)).to(probs.device)  # (T, E)
        last = probs.masked_fill(~chosen, torch.inf).amin(dim=-1)
        first = probs.masked_fill(chosen, -torch.inf).amax(dim=-1)
        margin = torch.where(last.isinf(), 0.0, last) - torch.where(first.isinf(), 0.0, first)
        measured = {
            "logit_norm": view.routing.router_logits.float().norm(dim=-1),
            "router_entropy": torch.xlogy(probs, probs).sum(dim=-1).neg(),
            "margin": margin,
        }
        units = units_of(view.text, len(probs))
        self.arrays |= units.arrays()
        for key, value in measured.items():
            keep(self, key, view.index, value, units.means_without(value.cpu().numpy()))
        self.put("num_experts", view.index, view.num_experts)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Means over tokens, headlines and curves over depth."""
        experts = num_experts(arrays)
        if not experts:
            return ProbeResult(arrays, notes=["no layer has a router"])
        scalars: dict[str, float] = {}
        for quantity in ("logit_norm", "router_entropy", "margin"):
            means = {layer: float(v.mean(dtype=np.float64)) for layer, v in by_layer(arrays, quantity).items()}
            scalars |= per_layer(quantity, means)
        uniform = sum(math.log(count) for count in experts.values()) / len(experts)
        entropy = scalars["router_entropy"]
        headlines = {
            "router_entropy": Headline(
                entropy,
                f"The router's distribution over experts has {entropy:.2f} nats of entropy on average; "
                f"a router without preference would have {uniform:.2f}.",
                interval_of(arrays, "router_entropy", entropy, within=(0.0, math.inf)),
            ),
            "margin": Headline(
                scalars["margin"],
                f"The last expert chosen is ahead of the first one left out by {scalars['margin']:.3f} in probability.",
                interval_of(arrays, "margin", scalars["margin"], within=(-1.0, 1.0)),
            ),
        }
        tied = {n: float((v == 0).mean()) for n, v in by_layer(arrays, "margin").items()}
        notes = [
            f"layer {layer}: at {share:.0%} of the tokens the last expert chosen and the first one left out score the "
            "same, so that their numbers decide"
            for layer, share in tied.items()
            if share >= TIED
        ]
        pictures = {"over_depth": partial(_draw_over_depth, arrays, experts)}
        return ProbeResult(arrays, scalars, headlines, pictures, notes + unit_notes(arrays, headlines))


def _draw_over_depth(arrays: Arrays, experts: dict[int, int]) -> Figure:
    from probes.figures import drawing

    fig = drawing.new_figure(
        10.5, 3.3, "The router's state over depth: median over tokens, band from the 1st to the 3rd quartile"
    )
    panels = {
        "router_entropy": "entropy of the choice (nats)",
        "margin": "margin of choice K over K+1",
        "logit_norm": "L2 norm of the logits",
    }
    axes = fig.subplots(1, len(panels))
    for ax, (key, label), colour in zip(axes, panels.items(), drawing.SERIES, strict=False):
        quartiles = {layer: np.quantile(value, (0.25, 0.5, 0.75)) for layer, value in by_layer(arrays, key).items()}
        drawing.depth_band(ax, quartiles, colour)
        ax.set_title(label, fontsize=10)
        if key != "margin":
            ax.set_ylim(bottom=0)
    uniform = {layer: math.log(count) for layer, count in experts.items()}
    drawing.depth_line(axes[0], uniform, drawing.MUTED, "ln E: no preference", dashed=True)
    axes[0].set_ylim(0, 1.15 * max(max(uniform.values()), axes[0].get_ylim()[1] / 1.15, 0.1))
    axes[0].legend(fontsize=8, frameon=False, loc="lower left")
    return fig
