"""Pictures of short texts, token by token: what the experts of some layers make of each.

T tokens, E routed experts, E' with the shared expert and the dense reference, C columns of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from probes.contract import Arrays, by_layer, numbers
from probes.measures.choices import NONE
from probes.measures.expert_matrices import labels_of
from probes.measures.output_pairs import angular_similarity
from probes.measures.short_texts import token_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURED_LAYERS = 3
BESIDE_UP_TO = 16  # experts whose norm and score are drawn as bars side by side


# The panel of a token: its axes, the layer, the token and its name, whether it is the first or the last of its row.
Panel = tuple["Axes", int, int, str, bool, bool]


def _panels(
    names: Sequence[str],
    layers: Sequence[int],
    across: int,
    size: tuple[float, float],
    least: float,
    margin: tuple[float, float],
    title: str,
) -> tuple[Figure, np.ndarray, list[Panel]]:
    """A figure with a panel for each token, at most so many in a row, once for each layer; lengths in inches."""
    from probes.figures import drawing

    rows = math.ceil(len(names) / across)
    columns = math.ceil(len(names) / rows)
    width, height = size[0] * columns, size[1] * rows * len(layers)
    fig = drawing.new_figure(max(least, margin[0] + width), margin[1] + height, title)
    axes = fig.subplots(rows * len(layers), columns, squeeze=False)
    panels: list[Panel] = []
    for place, layer in enumerate(layers):
        own = axes[place * rows : (place + 1) * rows].ravel()
        for token, (ax, name) in enumerate(zip(own, names, strict=False)):
            last = (token + 1) % columns == 0 or token == len(names) - 1
            panels.append((ax, layer, token, name, token % columns == 0, last))
        for ax in own[len(names) :]:
            ax.set_visible(False)
    return fig, axes, panels


def _names(arrays: Arrays, count: int) -> list[str]:
    from probes.figures.letters import plain

    return [plain(name) for name in token_names(arrays, count)]


def _of_all(layers: Sequence[int], every: dict[int, np.ndarray]) -> str:
    return f"; {len(layers)} of {len(every)} layers" if len(layers) < len(every) else ""


def draw_similarities(arrays: Arrays) -> Figure:
    """Angular similarity (E', E') of the experts' outputs at each token, as ``expert_outputs`` stores it."""
    from probes.figures import drawing

    every, labels, chosen = by_layer(arrays, "output_cos"), labels_of(arrays), by_layer(arrays, "chosen")
    layers = drawing.pick(list(every), PICTURED_LAYERS)
    angular = {n: angular_similarity(torch.from_numpy(every[n]).double()).numpy() for n in layers}
    for values in angular.values():
        values[:, np.arange(values.shape[1]), np.arange(values.shape[1])] = np.nan
    flat = np.concatenate([values[np.isfinite(values)] for values in angular.values()])
    lowest, highest = (float(flat.min()), float(flat.max())) if flat.size else (0.0, 1.0)
    title = (
        f"Angular similarity of the experts' outputs at each token (diagonal in grey){_of_all(layers, every)}\n"
        "Above each panel: the token, and the experts chosen for it"
    )
    names = _names(arrays, len(angular[layers[0]]))
    fig, axes, panels = _panels(names, layers, 6, (2.0, 2.35), 7.5, (1.2, 1.0), title)
    for ax, layer, token, name, first, _ in panels:
        image = drawing.heat_map(ax, angular[layer][token], "viridis", vmin=lowest, vmax=highest)
        for axis in (ax.xaxis, ax.yaxis):
            drawing.row_ticks(axis, labels[layer])
        ax.tick_params(labelsize=6.5)
        here = chosen[layer][token]
        ax.set_title(f"{name}\n{' '.join(map(str, here[here != NONE]))}", fontsize=8)
        if first:
            ax.set_ylabel(f"layer {layer}\nexpert", fontsize=8.5)
    drawing.colour_bar(fig, image, axes, "angular similarity")
    return fig


def draw_norms(arrays: Arrays) -> Figure:
    """Norm and score (E,) of each expert at each token, as ``norm_vs_score`` stores them; the paper's Figure 3."""
    from probes.figures import drawing

    scores, norms = by_layer(arrays, "score"), by_layer(arrays, "output_norm")
    dense = by_layer(arrays, "dense_ffn_output_norm")
    layers = drawing.pick(list(scores), PICTURED_LAYERS)
    line = "; dotted: norm of the dense model's FFN output" if dense else ""
    title = (
        f"Each expert's output norm (left, blue) and score (right, red) at each token{_of_all(layers, scores)}\n"
        f"Experts in order of their number{line}"
    )
    names = _names(arrays, len(scores[layers[0]]))
    fig, _, panels = _panels(names, layers, 4, (3.0, 1.75), 7.0, (1.0, 1.1), title)
    for ax, layer, token, name, first, last in panels:
        experts = np.arange(scores[layer].shape[1])
        both = [norms[layer], dense[layer][:, None]] if layer in dense else [norms[layer]]
        highest = max(float(np.nan_to_num(values).max()) for values in both) or 1.0
        drawing.style_axes(ax)
        other = ax.twinx()
        # Many experts have no room for two bars each: the score's stands in front of the norm's.
        few = len(experts) <= BESIDE_UP_TO
        norm_bar, score_bar = ((-0.2, 0.4, 1.0), (0.2, 0.4, 1.0)) if few else ((0.0, 0.9, 0.4), (0.0, 0.5, 1.0))
        for panel, (shift, width, alpha), values, colour in (
            (ax, norm_bar, norms[layer][token], drawing.SERIES[0]),
            (other, score_bar, scores[layer][token], drawing.SERIES[1]),
        ):
            panel.bar(experts + shift, values, width=width, alpha=alpha, color=colour, lw=0)
        if layer in dense:
            ax.axhline(dense[layer][token], color=drawing.INK, lw=1, ls=":")
        ax.set_ylim(0, 1.08 * highest)
        other.set_ylim(0, 1.08 * (float(np.nan_to_num(scores[layer]).max()) or 1.0))
        other.tick_params(labelsize=8, length=2, color=drawing.MUTED)
        for side in ("top", "left", "bottom"):
            other.spines[side].set_visible(False)
        other.spines["right"].set_color(drawing.MUTED)
        drawing.index_ticks(ax.xaxis, experts.tolist())
        ax.set_title(name, fontsize=9)
        ax.grid(visible=False, axis="x")
        if first:
            ax.set_ylabel(f"layer {layer}\nnorm", fontsize=8.5, color=drawing.SERIES[0])
        else:
            ax.set_yticklabels([])
        if last:
            other.set_ylabel("score", fontsize=8.5, color=drawing.SERIES[1])
        else:
            other.set_yticklabels([])
    return fig


def draw_neurons(arrays: Arrays) -> Figure:
    """Activations (E, C) at each token, as ``activations`` stores them: a row a token, a column a layer."""
    from probes.figures import drawing

    every, width = by_layer(arrays, "act_gate_map"), numbers(arrays, "num_neurons")
    layers = drawing.pick(list(every), PICTURED_LAYERS)
    names = _names(arrays, len(every[layers[0]]))
    grouped = any(every[n].shape[2] < width[n] for n in layers)
    kind = "Mean |activation| of groups of neurons beside each other" if grouped else "|activation| of each neuron"
    title = f"{kind}, by expert and token{_of_all(layers, every)}"
    height = min(2.6, max(1.15, 0.045 * max(every[layer].shape[1] for layer in layers)))
    fig = drawing.new_figure(1.6 + 4.0 * len(layers), 0.9 + height * len(names), title)
    axes = fig.subplots(len(names), len(layers), squeeze=False)
    for column, layer in enumerate(layers):
        values = every[layer]
        highest = float(np.nan_to_num(np.quantile(values, 0.995))) or 1.0
        for row, name in enumerate(names):
            ax = axes[row, column]
            extent = (0, width[layer], values.shape[1] - 0.5, -0.5)
            image = drawing.heat_map(ax, values[row], "viridis", vmin=0, vmax=highest, aspect="auto", extent=extent)
            drawing.index_ticks(ax.yaxis, range(values.shape[1]))
            if row == 0:
                ax.set_title(f"layer {layer}", fontsize=10)
            if row == len(names) - 1:
                ax.set_xlabel("neuron", fontsize=9)
            else:
                ax.set_xticklabels([])
            if column == 0:
                ax.set_ylabel(f"{name}\nexpert", fontsize=9)
        drawing.colour_bar(fig, image, list(axes[:, column]), "", extend="max", location="bottom")
    return fig
