"""Drawing pieces that the probes share.

Only matplotlib's object API: no pyplot, so no global state and no display. Imported by figure builders alone.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from PIL import Image

from probes.figures.letters import give_fonts

INK, MUTED, GRID, MASKED = "#1f2933", "#6b7785", "#dde3ea", "#98a1ab"
SERIES = ("#2f6db5", "#d1603d", "#3b9a6d", "#8a5fb0", "#b8860b")
MANY = (*SERIES, "#c2477f", "#4a9fb5", "#7a7a2e")
DPI = 110
TITLE_LETTER = 0.086  # inches of a title's letters, on average
PICTURED_LAYERS = 8

Item = TypeVar("Item")


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of width × height inches that says what it shows, in as many lines as that takes."""
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, int(width / TITLE_LETTER))]
    fig = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(fig)
    fig.suptitle("\n".join(lines), fontsize=11.5, color=INK)
    return fig


def to_rgb(fig: Figure) -> np.ndarray:
    """The figure's pixels, (height, width, 3) uint8."""
    give_fonts(fig)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def to_png(fig: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    # A lower level of compression is several times faster, for files that are a tenth larger.
    Image.fromarray(to_rgb(fig)).save(buffer, format="png", compress_level=3)
    return buffer.getvalue()


def pick(items: Sequence[Item], limit: int) -> list[Item]:
    """At most ``limit`` items, evenly spread, with the first and the last."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def ratio_norm(values: Sequence[np.ndarray], share: float = 1.0, most: float = math.inf) -> TwoSlopeNorm:
    """Colour scale of ratios, with the neutral colour at 1: 0 to the ``share`` quantile of the values, at least 2.

    It ends at ``most``: where nearly nothing is expected, a single token is thousands of times as much.
    """
    flat = np.concatenate([value.ravel() for value in values])
    flat = flat[np.isfinite(flat)]
    highest = float(np.quantile(flat, share)) if flat.size else 2.0
    return TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=min(max(2.0, highest), most))


def heat_map(ax: Axes, values: np.ndarray, cmap: str, **image: Any) -> Any:
    """Draw values (rows, columns); what is masked or not finite is grey. Returns the image for the colour bar."""
    colours = colormaps[cmap].with_extremes(bad=MASKED)
    drawn = ax.imshow(np.ma.masked_invalid(values), cmap=colours, interpolation="nearest", **image)
    ax.tick_params(labelsize=8, length=2, color=MUTED, labelcolor=INK)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return drawn


def write_values(ax: Axes, values: np.ndarray, norm: Normalize) -> None:
    """Write each cell's value into it, in the ink that can be read on its colour."""
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            ink = "white" if abs(float(norm(value)) - 0.5) > 0.33 else INK
            ax.text(column, row, cell_text(value), ha="center", va="center", fontsize=7.5, color=ink, in_layout=False)


def cell_text(value: float) -> str:
    """A value in two digits, as many characters as a cell has room for: 0.089, 4.8, 550, 45k."""
    size = abs(float(f"{value:.2g}"))
    if size < 100:
        return f"{value:.2g}"
    return f"{float(f'{value:.2g}'):.0f}" if size < 10_000 else f"{value / 1e3:.2g}k" if size < 1e5 else f"{value:.0e}"


def index_ticks(axis: Any, labels: Sequence[int]) -> None:
    """Tick some of the positions 0, 1, ... with their labels, so that about ten can be read."""
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 30) if len(labels) <= 12 * s)
    positions = list(range(0, len(labels), step))
    axis.set_ticks(positions, [str(labels[i]) for i in positions])


def colour_bar(fig: Figure, image: Any, axes: Any, label: str, **options: Any) -> None:
    """One colour bar for all axes."""
    bar = fig.colorbar(image, ax=axes, fraction=0.03, pad=0.015, aspect=28, **options)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)
    if isinstance(image.norm, LogNorm):
        log_ticks(bar.ax.yaxis)
    if isinstance(image.norm, TwoSlopeNorm):  # of ratios: what is neutral has its tick, however far the others reach
        most = float(image.norm.vmax or 2.0)
        above = [tick for tick in MaxNLocator(4).tick_values(0.0, most) if 0.85 + 0.15 * most < tick <= most]
        bar.set_ticks([0.0, 0.5, 1.0, *above], labels=[f"{tick:g}" for tick in (0.0, 0.5, 1.0, *above)])


def log_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis, whose limits are known, as plain numbers: 3 in place of 3 × 10⁰."""
    low, high = axis.get_view_interval()
    few = high > 1000 * low
    axis.set_major_locator(LogLocator(subs=(1.0,) if few else (1.0, 2.0, 5.0) if high > 8 * low else range(1, 10)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def style_axes(ax: Axes) -> None:
    """Light grid, no box."""
    ax.grid(color=GRID, lw=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(MUTED)
    ax.tick_params(labelsize=8, length=2, color=MUTED)
    for axis in (ax.xaxis, ax.yaxis):
        if isinstance(formatter := axis.get_major_formatter(), ScalarFormatter):
            formatter.set_useOffset(False)  # a tick says its number, whatever all have in common


def layer_axis(ax: Axes) -> None:
    """Layers from left to right."""
    style_axes(ax)
    ax.set_xlabel("layer", fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # there may be one layer


def legend(ax: Axes, why: str) -> None:
    """What a panel's lines are; where none is known, why, in the panel's place."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7.5, frameon=False)
        return
    for reference in list(ax.lines):
        reference.remove()
    ax.text(
        0.5,
        0.5,
        textwrap.fill(f"not known: {why}", 36),
        transform=ax.transAxes,
        ha="center",
        va="center",
        fontsize=9,
        color=INK,
    )
    ax.set_axis_off()


def legend_above(fig: Figure, axes: Sequence[Axes], only: Sequence[str] | None = None) -> None:
    """One legend above all panels, in as many columns as fit; the figure grows by its rows."""
    lines = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    labels = list(lines) if only is None else list(only)
    columns = max(1, int(fig.get_figwidth() / (0.65 + 0.08 * max(map(len, labels), default=1))))
    fig.set_figheight(fig.get_figheight() + 0.2 * (len(labels) // columns))
    fig.legend(
        [lines[label] for label in labels],
        labels,
        loc="outside upper left",
        ncols=columns,
        handlelength=2.8,
        fontsize=8.5,
        frameon=False,
    )


def depth_line(ax: Axes, values: Mapping[int, float], colour: str, label: str, dashed: bool = False) -> None:
    """One quantity by layer; nothing, in the legend neither, where it is known of no layer."""
    layer_axis(ax)
    if not any(map(math.isfinite, values.values())):
        return
    style = {"ls": "--", "lw": 1.2} if dashed else {"marker": "o", "ms": 4, "lw": 1.6}
    ax.plot(list(values), list(values.values()), color=colour, label=label, **style)  # type: ignore[arg-type]
    if len(values) == 1:
        ax.plot(list(values), list(values.values()), "o", ms=4, color=colour)


def depth_band(ax: Axes, quartiles: Mapping[int, np.ndarray], colour: str) -> None:
    """The median by layer, with a band from the first to the third quartile (3,)."""
    layers = list(quartiles)
    low, middle, high = np.stack([quartiles[layer] for layer in layers], axis=1)
    ax.fill_between(layers, low, high, color=colour, alpha=0.2, lw=0)
    ax.errorbar(
        layers, middle, yerr=[middle - low, high - middle], fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.5
    )
    ax.plot(layers, middle, color=colour, marker="o", ms=4, lw=1.6)
    layer_axis(ax)


def panel_grid(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` square panels, at most four a row."""
    columns = min(4, count)
    rows = math.ceil(count / columns)
    fig = new_figure(max(6.5, 1.0 + 2.75 * columns), 1.0 + 2.75 * rows, title)
    axes = fig.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes[count:]:
        ax.remove()
    return fig, axes[:count]


def similarity_grid(
    matrices: Mapping[str, Mapping[int, np.ndarray]],
    title: str,
    labels: Mapping[int, Sequence[str]] | None = None,
    quantity: str = "cosine",
    scale_by_layer: bool = False,
) -> Figure:
    """Square similarity matrices (E', E'): a row a matrix name, a column a layer.

    The colour scale is that of the entries off the diagonal, which would otherwise vanish beside the 1s: one for all,
    or one for each layer, with its own colour bar.

    Args:
        matrices: Matrix name -> layer -> (E', E').
        title: What is shown.
        labels: Layer -> what its rows are; expert numbers if not given.
        quantity: What the colours mean.
        scale_by_layer: One colour scale for each layer.
    """
    every = list(next(iter(matrices.values())))
    layers = pick(every, PICTURED_LAYERS)
    if len(layers) < len(every):
        title += f"; {len(layers)} of {len(every)} layers"
    shown: dict[tuple[str, int], np.ndarray] = {}
    for name, by_layer in matrices.items():
        for layer in layers:
            values = by_layer[layer].astype(np.float64)
            np.fill_diagonal(values, np.nan)
            shown[name, layer] = values
    whole = _similarity_scale(list(shown.values()))
    if len(matrices) == 1:
        fig, panels = panel_grid(len(layers), title)
        axes = np.array(panels)[None, :]
    else:
        fig = new_figure(
            max(6.0, 1.4 + 1.9 * len(layers)), (1.5 if scale_by_layer else 0.9) + 2.0 * len(matrices), title
        )
        axes = fig.subplots(len(matrices), len(layers), squeeze=False)
    for column, layer in enumerate(layers):
        norm, cmap = _similarity_scale([shown[name, layer] for name in matrices]) if scale_by_layer else whole
        names = list(labels[layer]) if labels else []
        for row, name in enumerate(matrices):
            ax = axes[row, column]
            values = shown[name, layer]
            image = heat_map(ax, values, cmap, norm=norm)
            for axis in (ax.xaxis, ax.yaxis):
                row_ticks(axis, names[: len(values)] or [str(index) for index in range(len(values))])
            if row == 0:
                ax.set_title(f"layer {layer}", fontsize=10)
            if row == len(matrices) - 1:
                ax.set_xlabel("expert", fontsize=9)
            if column == 0:
                ax.set_ylabel(f"{name}\nexpert", fontsize=9)
        if scale_by_layer:
            bar = fig.colorbar(image, ax=axes[:, column], location="bottom", fraction=0.03, pad=0.02, aspect=14)
            bar.ax.tick_params(labelsize=7, length=2)
            bar.ax.xaxis.set_major_locator(MaxNLocator(3))
            bar.outline.set_visible(False)
            bar.set_label(quantity, fontsize=8)
    if not scale_by_layer:
        colour_bar(fig, image, axes, quantity)
    return fig


def row_ticks(axis: Any, labels: Sequence[str]) -> None:
    """Tick about ten of the experts, and what follows them (``SE``, ``F``) always; in one where rows are narrow."""
    experts = [position for position, label in enumerate(labels) if label.isdigit()]
    rest = range(len(experts), len(labels))
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 30) if len(labels) <= 12 * s)
    room = step * len(rest)  # for the labels that follow
    free = [position for position in experts[::step] if len(experts) - position >= room]
    ticks: dict[float, str] = {position: labels[position] for position in free}
    if len(rest) > 1 and step > 1:
        ticks[sum(rest) / len(rest)] = "+".join(labels[position] for position in rest)
    else:
        ticks |= {position: labels[position] for position in rest}
    axis.set_ticks(list(ticks), list(ticks.values()))


def _similarity_scale(values: Sequence[np.ndarray]) -> tuple[Normalize, str]:
    """Scale and colours: diverging about 0 where the values lie on both sides of it, from least to most otherwise."""
    flat = np.concatenate([value.ravel() for value in values])
    flat = flat[np.isfinite(flat)]
    low, high = (float(flat.min()), float(flat.max())) if flat.size else (0.0, 1.0)
    if high - low < 1e-6:  # all the same: what rounding leaves is no finding
        low, high = low - 0.01, high + 0.01
    if low < 0 and abs(low) > 0.2 * high:
        most = max(abs(low), abs(high))
        return Normalize(-most, most), "RdBu_r"
    return Normalize(low, high), "viridis"
