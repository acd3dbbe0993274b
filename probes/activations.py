"""Activations: how many neurons of an expert does a token wake? (2406.18219, appendix, Figure 10)

T tokens, E routed experts, F expert intermediate (neurons), C columns of a picture.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moebed.model.config import ModelConfig
from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer
from probes.figures.experts_by_token import draw_neurons
from probes.measures.resampling import SHARE, interval_of, keep, unit_notes, units_of
from probes.measures.short_texts import keep_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOVE = 1e-3
SHORT_TEXT = 8  # tokens up to which the activations themselves are stored
COLUMNS = 128
_BLOCK_ELEMENTS = 1 << 19  # activations looked at at a time
_QUANTITIES = {
    "act_gate_frac_above_1e-3": "share of neurons with |activation| > 0.001",
    "act_gate_frac_positive": "share of neurons with activation > 0",
    "act_gate_absmean": "mean |activation|",
}


class Activations(Probe):
    """Of act(x W_gate) over the neurons of each routed expert, whether it was chosen or not.

    Stored for each layer, all (T, E): ``act_gate_absmean``, mean absolute value; ``act_gate_frac_positive``, share
    above 0; ``act_gate_frac_above_1e-3``, share with an absolute value above 0.001. Of texts of up to 8 tokens also
    ``act_gate_map (T, E, C)``, mean absolute value of groups of neurons beside each other, at most 128 groups, and
    stored once ``token_ids (T,)`` and ``token_text (T,)``.
    """

    name = "activations"
    question = "How many neurons of an expert does a token wake?"
    needs = frozenset({Need.ROUTING, Need.ACTIVATIONS})

    def begin_layer(self, view: LayerView) -> None:
        """What is measured of each expert of this layer, block of tokens after block."""
        self._found: list[list[Tensor]] = [[] for _ in range(view.num_experts)]
        self._maps: list[list[Tensor]] = [[] for _ in range(view.num_experts)]

    @classmethod
    def token_bytes(cls, config: ModelConfig, layer: int | None) -> int:
        """Its quantities; the map of a short text is none of them."""
        return 0 if layer is None else 4 * len(_QUANTITIES) * config.layer(layer).num_experts

    def update_activations(self, view: LayerView, expert: int, tokens: slice, activations: Tensor) -> None:
        """Measure some tokens' activations of one routed expert."""
        self._found[expert].append(_measured(activations))
        self._neurons = activations.shape[1]
        if view.moe_input is not None and len(view.moe_input) <= SHORT_TEXT:
            self._maps[expert].append(_grouped(activations.abs()))

    def update(self, view: LayerView) -> None:
        """Store what was measured of one layer."""
        if view.routing is None or not any(self._found):
            return
        found = [torch.cat(blocks, dim=1) for blocks in self._found]
        units = units_of(view.text, found[0].shape[1])
        self.arrays |= units.arrays()
        for key, values in zip(_QUANTITIES, torch.stack(found, dim=2).cpu().numpy(), strict=True):
            rest = units.means_without(values.mean(axis=1, dtype=np.float64))
            keep(self, key, view.index, np.ascontiguousarray(values), rest)
        self.put("num_neurons", view.index, self._neurons)
        if keep_tokens(self.arrays, view, SHORT_TEXT):
            maps = torch.stack([torch.cat(blocks) for blocks in self._maps], dim=1)
            self.put("act_gate_map", view.index, maps)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Means over tokens and experts, and curves over depth; of a short text, the activations themselves."""
        scalars: dict[str, float] = {}
        for key in _QUANTITIES:
            means = {layer: float(values.mean(dtype=np.float64)) for layer, values in by_layer(arrays, key).items()}
            scalars |= per_layer(key.removeprefix("act_gate_"), means)
        if not scalars:
            return ProbeResult(arrays, notes=["no layer with routed experts has seen text"])
        above, positive = scalars["frac_above_1e-3"], scalars["frac_positive"]
        headlines = {
            "frac_above_1e-3": Headline(
                above,
                f"{above:.1%} of an expert's neurons have an activation beyond ±0.001 at a token.",
                interval_of(arrays, "act_gate_frac_above_1e-3", above, within=SHARE),
            ),
            "frac_positive": Headline(
                positive,
                f"{positive:.1%} of an expert's neurons have a positive activation at a token; "
                "50% if inputs were as often positive as negative.",
                interval_of(arrays, "act_gate_frac_positive", positive, within=SHARE),
            ),
        }
        pictures = {"over_depth": partial(_draw_over_depth, arrays)}
        if by_layer(arrays, "act_gate_map"):
            pictures["neurons"] = partial(draw_neurons, arrays)
        return ProbeResult(arrays, scalars, headlines, pictures, unit_notes(arrays, headlines))


def _measured(activation: Tensor) -> Tensor:
    """The three quantities of activations (T, F), in the order of ``_QUANTITIES``: (3, T) float32."""
    tokens, neurons = activation.shape
    step = max(1, _BLOCK_ELEMENTS // neurons)
    found = torch.empty((3, tokens), dtype=torch.float32, device=activation.device)
    # Written over and over: fresh memory for each block costs more than what is done with it.
    work = torch.empty((2, min(step, tokens), neurons), dtype=torch.float32, device=activation.device)
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        values = activation[part].float()
        size, answer = work[:, : len(values)]
        torch.abs(values, out=size)
        # Comparing into floats and averaging those is several times faster than counting truths.
        found[0, part] = torch.gt(size, ABOVE, out=answer).mean(dim=-1)
        found[1, part] = torch.gt(values, 0, out=answer).mean(dim=-1)
        found[2, part] = size.mean(dim=-1)
    return found


def _grouped(values: Tensor) -> Tensor:
    """Means of groups of neurons beside each other, as equally large as can be: (T, F) to (T, min(F, 128))."""
    neurons = values.shape[1]
    columns = min(neurons, COLUMNS)
    group = torch.arange(neurons, device=values.device) * columns // neurons
    count = torch.bincount(group, minlength=columns)
    return values.new_zeros((len(values), columns)).index_add_(1, group, values) / count


def _draw_over_depth(arrays: Arrays) -> Figure:
    from probes.figures import drawing

    fig = drawing.new_figure(
        11.5,
        3.4,
        "The experts' activations over depth: median over tokens and experts, band between the quartiles",
    )
    for ax, (key, title), colour in zip(
        fig.subplots(1, len(_QUANTITIES)), _QUANTITIES.items(), drawing.SERIES, strict=False
    ):
        quartiles = {layer: np.quantile(value, (0.25, 0.5, 0.75)) for layer, value in by_layer(arrays, key).items()}
        drawing.depth_band(ax, quartiles, colour)
        ax.set_title(title, fontsize=10)
        ax.set_ylim(0, 1.03 if "frac" in key else None)
    return fig
