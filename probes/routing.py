"""Routing: who was sent where?

T tokens, E experts, K experts per token, B sequences.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moebed.model.config import ModelConfig
from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, numbers, per_layer
from probes.figures.coloured_tokens import draw_coloured, write_coloured
from probes.measures.choices import NONE, domain_arrays, ranked
from probes.measures.resampling import SHARE, interval_of, keep, unit_notes, units_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURED_TOKENS = 48
PICTURED_DOMAINS = 6
PICTURED_LAYERS = 3


class RoutingMap(Probe):
    """The router's decisions as they are.

    Stored for each layer: ``router_probs (T, E)``, ``topk_index (T, K)`` and ``topk_weight (T, K)``, chosen experts and
    their weights as applied, in descending weight, -1 and 0 where a token has no more; ``topk_mass ()``, the
    probability that they hold together, mean over tokens. Stored once: ``token_ids (T,)``; ``sequence_start (B,)``,
    index of each sequence's first token; ``domain (B,)`` and ``domain_names``; ``token_text (T,)`` where a tokenizer
    tells it.
    """

    name = "routing"
    question = "Which experts does each token go to?"
    needs = frozenset({Need.ROUTING})

    @classmethod
    def token_bytes(cls, config: ModelConfig, layer: int | None) -> int:
        """All probabilities, and the chosen experts with their weights."""
        return 0 if layer is None else 4 * config.layer(layer).num_experts + 8 * config.layer(layer).num_experts_per_tok

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
        index, weight = ranked(view.routing, view.num_experts_per_tok)  # (T, K)
        probs = view.routing.router_probs.float().cpu().numpy()
        mass = (np.take_along_axis(probs, index, axis=1) * (index != NONE)).sum(axis=1, dtype=np.float64)
        units = units_of(view.text, len(index))
        keep(self, "topk_mass", view.index, mass.mean(), units.means_without(mass))
        self.arrays |= units.arrays()
        self.put("router_probs", view.index, probs)
        self.put("topk_index", view.index, index.astype(np.int32))
        self.put("topk_weight", view.index, weight)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Probability mass of the chosen experts, and the token × expert picture."""
        probs, index = by_layer(arrays, "router_probs"), by_layer(arrays, "topk_index")
        if not probs:
            return ProbeResult(arrays, notes=["no layer has a router"])
        mass = numbers(arrays, "topk_mass")
        weight = {n: value[:, 0].mean(dtype=np.float64) for n, value in by_layer(arrays, "topk_weight").items()}
        blind = float(np.mean([(index[n] != NONE).sum(axis=1).mean() / probs[n].shape[1] for n in probs]))
        scalars = per_layer("topk_mass", mass) | per_layer("first_weight", weight)
        sentence = (
            f"The chosen experts hold {scalars['topk_mass']:.0%} of the router's probability; "
            f"they would hold {blind:.0%} if it had no preference."
        )
        ends = interval_of(arrays, "topk_mass", scalars["topk_mass"], within=SHARE)
        headlines = {"topk_mass": Headline(scalars["topk_mass"], sentence, ends)}
        pictures = {"tokens": partial(_draw_tokens, arrays), "coloured_tokens": partial(draw_coloured, arrays)}
        pages = {"coloured_tokens": partial(write_coloured, arrays)}
        return ProbeResult(arrays, scalars, headlines, pictures, unit_notes(arrays, headlines), pages)


def _draw_tokens(arrays: Arrays) -> Figure:
    from probes.figures import drawing
    from probes.figures.letters import plain

    probs, index = by_layer(arrays, "router_probs"), by_layer(arrays, "topk_index")
    layers = drawing.pick(list(probs), PICTURED_LAYERS)
    names, domain = arrays["domain_names"], arrays["domain"]
    pictured = [number for number in range(len(names)) if (domain == number).any()][:PICTURED_DOMAINS]
    bounds = np.append(arrays["sequence_start"], len(arrays["token_ids"]))
    most = max(probs[layer].shape[1] for layer in layers)
    height = min(3.2, max(1.5, 0.075 * most))
    fig = drawing.new_figure(
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
            image = drawing.heat_map(ax, shown, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
            here = index[layer][tokens]
            position = np.nonzero(here != NONE)[0]
            few = len(shown) <= 24
            mark = (
                {"s": 14, "facecolor": "none", "edgecolor": drawing.SERIES[1], "linewidth": 0.9}
                if few
                else {"s": 3.5, "color": drawing.SERIES[1], "linewidth": 0}
            )
            ax.scatter(position, here[here != NONE], **mark)
            drawing.index_ticks(ax.xaxis, range(shown.shape[1]))
            drawing.index_ticks(ax.yaxis, range(len(shown)))
            if row == 0:
                ax.set_title(f"layer {layer}", fontsize=10)
            if row == len(pictured) - 1:
                ax.set_xlabel("token", fontsize=9)
            if column == 0:
                ax.set_ylabel(f"{plain(str(names[number]), 22)}\nexpert", fontsize=9)
    drawing.colour_bar(fig, image, axes, "router probability", extend="max")
    return fig
