"""Points: clouds on principal components, and scatters with a regression line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from probes.figures import drawing

ByMatrix = Mapping[str, Mapping[int, np.ndarray]]
_PANELS_ACROSS = 6
_NAMED_UP_TO = 16  # experts in a panel that can all be named
_MOST_POINTS = 3000


def scatter_grid(
    points: Mapping[str, Mapping[int, tuple[np.ndarray, np.ndarray]]],
    title: str,
    across: str = "gate cosine",
    up: str = "neuron cosine",
) -> Figure:
    """A row a matrix, a column a layer: pairs of experts (P,), their regression line and r²."""
    fig, layers, axes = _grid(points, title, 2)
    for row, (name, by_layer) in enumerate(points.items()):
        for column, layer in enumerate(layers):
            ax, (x, y) = axes[row, column], by_layer[layer]
            drawing.style_axes(ax)
            shown = np.linspace(0, len(x) - 1, min(len(x), _MOST_POINTS)).astype(int)
            dense = len(x) > 300
            ax.scatter(
                x[shown], y[shown], s=4 if dense else 12, alpha=0.35 if dense else 0.7, lw=0, color=drawing.SERIES[0]
            )
            if len(x) > 1 and np.ptp(x) > 0 and np.isfinite(x).all() and np.isfinite(y).all():
                slope, offset = np.polyfit(x.astype(np.float64), y.astype(np.float64), 1)
                ends = np.array([x.min(), x.max()])
                ax.plot(ends, slope * ends + offset, color=drawing.SERIES[1], lw=1.6)
                r = np.corrcoef(x, y)[0, 1] if np.ptp(y) > 0 else math.nan
                ax.text(0.04, 0.93, f"r² {r * r:.2f}", transform=ax.transAxes, fontsize=8.5, color=drawing.SERIES[1],
                        va="top", bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1})  # fmt: skip
            _few_ticks(ax)
            _titles(ax, row, column, len(points), name, layer, across, up)
    return fig


def labelled_clouds(
    points: ByMatrix,
    share: ByMatrix,
    labels: Mapping[int, Sequence[str]],
    experts: Mapping[int, int],
    dims: int,
    title: str,
) -> Figure:
    """A row a matrix, a column a layer: one point an expert, with its number where there is room."""
    fig, layers, axes = _grid(points, title, dims)
    for row, (name, by_layer) in enumerate(points.items()):
        for column, layer in enumerate(layers):
            ax, where = axes[row, column], by_layer[layer][:, :dims]
            _style(ax, dims)
            if np.isfinite(where).all():
                routed = where[: experts[layer]]
                ax.scatter(*routed.T, s=22, color=drawing.SERIES[0], lw=0)
                rest = where[experts[layer] :]
                if len(rest):
                    ax.scatter(*rest.T, s=34, color=drawing.SERIES[1], marker="D", lw=0)
                for index, place in enumerate(where):
                    if len(where) <= _NAMED_UP_TO or index >= experts[layer]:
                        ax.text(*place, f" {labels[layer][index]}", fontsize=7.5, color=drawing.INK)
                ax.margins(0.15)
            _few_ticks(ax)
            across, up = (f"PC{axis + 1}, {share[name][layer][axis]:.1%}" for axis in (0, 1))
            _titles(ax, row, column, len(points), name, layer, across, up, every=True)
    return fig


def coloured_clouds(
    points: ByMatrix,
    share: ByMatrix,
    experts: Mapping[int, np.ndarray],
    dropped: ByMatrix,
    dims: int,
    title: str,
) -> Figure:
    """A row a matrix, a column a layer: one point a neuron, its colour the expert's, drawn in mixed order."""
    fig, layers, axes = _grid(points, title, dims)
    count = max(int(of.max()) + 1 for of in experts.values())
    few = colormaps["tab10"].colors[:count]  # type: ignore[attr-defined]
    colours = ListedColormap(few) if count <= len(few) else colormaps["turbo"].resampled(count)
    norm = BoundaryNorm(np.arange(-0.5, count), count)
    image = None
    for row, (name, by_layer) in enumerate(points.items()):
        for column, layer in enumerate(layers):
            ax, where, of = axes[row, column], by_layer[layer][:, :dims], experts[layer]
            _style(ax, dims)
            if name in dropped and layer in dropped[name]:
                where, of = where[~dropped[name][layer]], of[~dropped[name][layer]]
            if len(where) and np.isfinite(where).all():
                mixed = np.random.default_rng(0).permutation(len(where))[:_MOST_POINTS]
                image = ax.scatter(*where[mixed].T, s=4, c=of[mixed], cmap=colours, norm=norm, lw=0, alpha=0.8)
            _few_ticks(ax)
            across, up = (f"PC{axis + 1}, {share[name][layer][axis]:.1%}" for axis in (0, 1))
            _titles(ax, row, column, len(points), name, layer, across, up, every=True)
    if image is not None:
        bar = fig.colorbar(image, ax=axes, fraction=0.03, pad=0.015, aspect=28)
        drawing.index_ticks(bar.ax.yaxis, range(count))
        bar.set_label("expert", fontsize=9)
        bar.ax.tick_params(labelsize=8, length=0)
        bar.outline.set_visible(False)
    return fig


def _grid(by_matrix: Mapping[str, Mapping[int, Any]], title: str, dims: int) -> tuple[Figure, list[int], Any]:
    every = list(next(iter(by_matrix.values())))
    layers = drawing.pick(every, _PANELS_ACROSS)
    if len(layers) < len(every):
        title += f"; {len(layers)} of {len(every)} layers"
    fig = drawing.new_figure(max(6.5, 0.8 + 2.5 * len(layers)), 0.8 + 2.4 * len(by_matrix), title)
    projection = {"projection": "3d"} if dims == 3 else {}
    return fig, layers, fig.subplots(len(by_matrix), len(layers), squeeze=False, subplot_kw=projection)


def _style(ax: Axes, dims: int) -> None:
    if dims == 2:
        drawing.style_axes(ax)
        ax.axhline(0, color=drawing.GRID, lw=1)
        ax.axvline(0, color=drawing.GRID, lw=1)
    else:
        ax.tick_params(labelsize=6, pad=-3)


def _few_ticks(ax: Axes) -> None:
    ax.locator_params(nbins=4)
    if hasattr(ax, "zaxis"):
        for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
            axis.set_ticklabels([])


def _titles(
    ax: Axes, row: int, column: int, rows: int, name: str, layer: int, across: str, up: str, every: bool = False
) -> None:
    """Layer above, matrix on the left; what an axis is below and on the left, or on every panel."""
    if row == 0:
        ax.set_title(f"layer {layer}", fontsize=10)
    solid = hasattr(ax, "zaxis")
    if every or row == rows - 1:
        ax.set_xlabel(across, fontsize=8, labelpad=-10 if solid else 2)
    if solid and column == 0:
        ax.text2D(-0.02, 0.5, name, transform=ax.transAxes, fontsize=9)  # type: ignore[attr-defined]
    left = f"{name}\n" if column == 0 and not solid else ""
    if left or every:
        ax.set_ylabel(f"{left}{up}", fontsize=8, labelpad=-10 if solid else 2)
