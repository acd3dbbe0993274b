"""Pictures of ``expert_importance``: what each expert adds, and what the model loses without it.

E routed experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probes.contract import Arrays, by_layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def strip(ax: Axes, rows: dict[int, np.ndarray], title: str, **image: Any) -> Any:
    """A row a layer, a column an expert; grey where a layer has fewer experts than the widest."""
    from probes.figures import drawing

    widest = max(map(len, rows.values()))
    values = np.full((len(rows), widest), np.nan)
    for row, found in enumerate(rows.values()):
        values[row, : len(found)] = found
    drawn = drawing.heat_map(ax, values, aspect="auto", **image)
    drawing.index_ticks(ax.xaxis, range(widest))
    drawing.index_ticks(ax.yaxis, list(rows))
    ax.set_xlabel(title, fontsize=9)
    ax.set_ylabel("layer", fontsize=9)
    return drawn


def strip_size(rows: dict[int, np.ndarray]) -> tuple[float, float]:
    widest = max(map(len, rows.values()))
    return min(13.0, max(9.0, 2.2 + 0.16 * widest)), min(9.0, max(2.9, 1.5 + 0.2 * len(rows)))


def draw_reap(relative: dict[int, np.ndarray], counts: dict[int, np.ndarray]) -> Figure:
    """REAP's score (E,) of each layer over its mean; a cross where no token went."""
    from probes.figures import drawing

    fig = drawing.new_figure(
        *strip_size(relative),
        "What an expert adds to its own tokens: mean of weight × output norm (REAP), over its layer's mean\n"
        "(grey with a cross: no token went there; grey: no such expert)",
    )
    ax = fig.subplots()
    norm = drawing.ratio_norm(list(relative.values()), share=0.995)
    image = strip(ax, relative, "expert", cmap="RdBu_r", norm=norm)
    idle = [(row, e) for row, count in enumerate(counts.values()) for e in np.flatnonzero(count == 0)]
    if idle:
        row, column = np.array(idle).T
        ax.scatter(column, row, marker="x", s=12, color="white", linewidth=0.9)
    drawing.colour_bar(fig, image, ax, "over the layer's mean", extend="max")
    return fig


def draw_ablation(rises: dict[int, np.ndarray]) -> Figure:
    """The rise of the loss (E,) without each expert, by layer."""
    from probes.figures import drawing

    fig = drawing.new_figure(
        *strip_size(rises), "By how much the loss rises with one expert masked out of the choice (nats per token)"
    )
    most = max(float(np.abs(values).max()) for values in rises.values()) or 1.0
    ax = fig.subplots()
    image = strip(ax, rises, "expert masked out", cmap="RdBu_r", vmin=-most, vmax=most)
    drawing.colour_bar(fig, image, ax, "rise of the loss")
    return fig


def draw_agreement(arrays: Arrays) -> Figure:
    """The two of them against each other, a panel a layer."""
    from probes.figures import drawing

    reap, counts, rises = (by_layer(arrays, key) for key in ("reap", "count", "ablation_loss"))
    errors = by_layer(arrays, "ablation_error")
    layers = drawing.pick(list(rises), 8)
    fig, axes = drawing.panel_grid(
        len(layers), "What an expert adds, summed over its tokens, and the loss without it (± standard error)"
    )
    for ax, layer in zip(axes, layers, strict=True):
        drawing.style_axes(ax)
        ax.errorbar(reap[layer] * counts[layer], rises[layer], yerr=errors[layer], fmt="o", ms=3.5,
                    color=drawing.SERIES[0], elinewidth=0.7)  # fmt: skip
        ax.axhline(0, color=drawing.MUTED, lw=1, ls="--")
        ax.set_title(f"layer {layer}", fontsize=10)
        ax.set_xlabel("sum of weight × norm", fontsize=8)
        ax.set_ylabel("rise of the loss (nats)", fontsize=8)
    return fig


def draw_largest(sizes: dict[int, np.ndarray], found: np.ndarray) -> Figure:
    """The largest number (E,) in each expert's outputs, by layer; a ring around those that stand out (n, 2)."""
    from matplotlib.colors import LogNorm

    from probes.figures import drawing

    fig = drawing.new_figure(
        *strip_size(sizes),
        "The largest number in an expert's outputs for its own tokens (a ring: it stands out; grey: no token)",
    )
    ax = fig.subplots()
    seen = (
        np.concatenate([of[of > 0] for of in sizes.values()]) if any((of > 0).any() for of in sizes.values()) else [1]
    )
    shown = {layer: np.where(of > 0, of, np.nan) for layer, of in sizes.items()}
    image = strip(ax, shown, "expert", cmap="viridis", norm=LogNorm(float(np.min(seen)), float(np.max(seen)) * 1.01))
    rows = {layer: row for row, layer in enumerate(sizes)}
    ax.scatter(
        [expert for _, expert in found], [rows[int(layer)] for layer, _ in found], s=60, facecolors="none",
        edgecolors=drawing.SERIES[1], linewidth=1.6,
    )  # fmt: skip
    drawing.colour_bar(fig, image, ax, "largest size of a number")
    return fig
