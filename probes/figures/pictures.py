"""Whole pictures that several weight probes share, built from ``probes.figures.drawing``, which is imported only to
draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Matrices = Mapping[str, Mapping[int, np.ndarray]]


def draw_heat_maps(
    matrices: Matrices, labels: Mapping[int, Sequence[str]], title: str, quantity: str = "cosine"
) -> dict[str, Callable[[], Figure]]:
    """Heat maps by matrix and layer, once with a colour scale over all layers and once with one for each layer."""
    return {
        "heat_maps": partial(_draw_heat_maps, matrices, labels, title, quantity, False),
        "heat_maps_scaled_by_layer": partial(_draw_heat_maps, matrices, labels, title, quantity, True),
    }


def _draw_heat_maps(
    matrices: Matrices, labels: Mapping[int, Sequence[str]], title: str, quantity: str, scale_by_layer: bool
) -> Figure:
    from probes.figures import drawing

    if scale_by_layer:
        title += ", each layer on a scale of its own"
    return drawing.similarity_grid(matrices, title, labels, quantity, scale_by_layer)


UNRELATED = {0.0: "0, unrelated"}


def draw_depth(
    values: Mapping[str, Mapping[int, float]], title: str, quantity: str, marks: Mapping[float, str] = UNRELATED
) -> Figure:
    """A quantity over layers, a line a matrix; ``marks`` are values to see it beside, and what they mean."""
    from probes.figures import drawing

    fig = drawing.new_figure(6.5, 3.4, title)
    ax = fig.subplots()
    for (name, by_layer), colour in zip(values.items(), drawing.SERIES, strict=False):
        drawing.depth_line(ax, by_layer, colour, name)
    for (value, meaning), dashes in zip(marks.items(), ("--", ":"), strict=False):
        ax.axhline(value, color=drawing.MUTED, lw=1, ls=dashes, label=meaning)
    ax.set_ylabel(quantity, fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    return fig
