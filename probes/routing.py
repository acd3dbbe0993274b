"""Routing: who was sent where?

T tokens, E experts, K experts per token, B sequences.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moebed.views import LayerView, Need
from probes.base import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer
from probes.choices import domain_arrays, ranked
from probes.coloured_tokens import draw_coloured, write_coloured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURED_TOKENS = 48
PICTURED_DOMAINS = 6
PICTURED_LAYERS = 3


class RoutingMap(Probe):
    """The router's decisions as they are.

    Stored for each layer: ``router_probs (T, E)``, ``topk_index (T, K)`` and ``topk_weight (T, K)``, chosen experts and
    their weights as applied, in descending weight. Stored once: ``token_ids (T,)``; ``sequence_start (B,)``, index of
    each sequence's first token; ``domain (B,)`` and ``domain_names``; ``token_text (T,)`` where a tokenizer tells it.
    """

    name = "routing"
    question = "Which experts does each token go to?"
    needs = frozenset({Need.ROUTING})

    def update(self, view: LayerView) -> None:
        """Keep one layer's routing."""
        if view.routing is None or view.text is None:
            return
        if "token_ids" not in self.arrays:
            self.arrays |= {
                "token_ids": view.text.token_ids.cpu().numpy(),
                "sequence_start": view.text.sequence_start.cpu().numpy(),
            } | domain_arrays(view.text)
            if len(view.text.token_text):
                self.arrays["token_text"] = np.array(view.text.token_text, dtype=np.str_)
        index, weight = ranked(view.routing)  # (T, K)
        self.arrays |= {
            f"router_probs/{view.index}": view.routing.router_probs.float().cpu().numpy(),
            f"topk_index/{view.index}": index.astype(np.int32),
            f"topk_weight/{view.index}": weight,
        }

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Probability mass of the chosen experts, and the token × expert picture."""
        probs, index = by_layer(arrays, "router_probs"), by_layer(arrays, "topk_index")
        if not probs:
            return ProbeResult(arrays, notes=["no layer has a router"])
        mass = {n: np.take_along_axis(probs[n], index[n], axis=1).sum(axis=1).mean(dtype=np.float64) for n in probs}
        weight = {n: value[:, 0].mean(dtype=np.float64) for n, value in by_layer(arrays, "topk_weight").items()}
        blind = float(np.mean([index[n].shape[1] / probs[n].shape[1] for n in probs]))
        scalars = per_layer("topk_mass", mass) | per_layer("first_weight", weight)
        sentence = (
            f"The chosen experts hold {scalars['topk_mass']:.0%} of the router's probability; "
            f"they would hold {blind:.0%} if it had no preference."
        )
        headlines = {"topk_mass": Headline(scalars["topk_mass"], sentence)}
        pictures = {"tokens": partial(_draw_tokens, arrays), "coloured_tokens": partial(draw_coloured, arrays)}
        pages = {"coloured_tokens": partial(write_coloured, arrays)}
        return ProbeResult(arrays, scalars, headlines, pictures, pages=pages)


def _draw_tokens(arrays: Arrays) -> Figure:
    from probes import figures

    probs, index = by_layer(arrays, "router_probs"), by_layer(arrays, "topk_index")
    layers = figures.pick(list(probs), PICTURED_LAYERS)
    names, domain = arrays["domain_names"], arrays["domain"]
    pictured = [number for number in range(len(names)) if (domain == number).any()][:PICTURED_DOMAINS]
    bounds = np.append(arrays["sequence_start"], len(arrays["token_ids"]))
    most = max(probs[layer].shape[1] for layer in layers)
    height = min(3.2, max(1.5, 0.075 * most))
    fig = figures.new_figure(
        1.5 + 4.0 * len(layers),
        1.2 + height * len(pictured),
        "Router probability of each expert for the first tokens of each domain; the experts chosen are marked in red",
    )
    axes = fig.subplots(len(pictured), len(layers), squeeze=False)
    highest = max(float(np.nan_to_num(np.quantile(probs[layer], 0.998))) for layer in layers) or 1.0
    for row, number in enumerate(pictured):
        sequence = int(np.argmax(domain == number))
        tokens = slice(bounds[sequence], min(bounds[sequence + 1], bounds[sequence] + PICTURED_TOKENS))
        for column, layer in enumerate(layers):
            ax = axes[row, column]
            shown = probs[layer][tokens].T  # (E, tokens)
            image = figures.heat_map(ax, shown, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
            position = np.repeat(np.arange(shown.shape[1]), index[layer].shape[1])
            few = len(shown) <= 24
            mark = (
                {"s": 14, "facecolor": "none", "edgecolor": figures.SERIES[1], "linewidth": 0.9}
                if few
                else {"s": 3.5, "color": figures.SERIES[1], "linewidth": 0}
            )
            ax.scatter(position, index[layer][tokens].ravel(), **mark)
            figures.index_ticks(ax.xaxis, range(shown.shape[1]))
            figures.index_ticks(ax.yaxis, range(len(shown)))
            if row == 0:
                ax.set_title(f"layer {layer}", fontsize=10)
            if row == len(pictured) - 1:
                ax.set_xlabel("token", fontsize=9)
            if column == 0:
                ax.set_ylabel(f"{names[number]}\nexpert", fontsize=9)
    figures.colour_bar(fig, image, axes, "router probability", extend="max")
    return fig
