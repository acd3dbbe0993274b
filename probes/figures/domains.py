"""Pictures of routing that several probes share: shares by domain, and a quantity of each domain over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probes.figures import drawing
from probes.figures.letters import plain

COLOURS = (*drawing.SERIES, "#4aa3b5", "#c4568f", "#7d8b2f", "#5b6472", "#a86b4c")
NAME_LETTERS = 22
MOST_BARS = 16  # experts; with more of them the bars cannot be told apart
_INTERVAL = "95 % interval over texts"
BY_NAME = Mapping[str, Mapping[int, np.ndarray]]


def share_panels(shares: BY_NAME, intervals: BY_NAME, layers: Sequence[int], title: str) -> Figure:
    """Shares (E,) of each expert by domain, a panel a layer, with the even share.

    With few experts as bars with their intervals (2, E), as in Mixtral's Figure 7; with many as colours, with a dot
    where the interval leaves out the even share.

    Args:
        shares: Domain -> layer -> (E,).
        intervals: Domain -> layer -> (2, E).
        layers: The layers to draw.
        title: What is shown.
    """
    domains = {layer: [name for name in shares if layer in shares[name]][: len(COLOURS)] for layer in layers}
    experts = {layer: len(shares[domains[layer][0]][layer]) for layer in layers}
    wide = max(experts.values()) > MOST_BARS
    rows = max(len(names) for names in domains.values())
    if wide:
        title += ", as a multiple of an even share\n(a dot: the 95 % interval leaves out an even share)"
    title += f"; {len(COLOURS)} of {len(shares)} domains" if len(shares) > len(COLOURS) else ""
    height = 0.5 + 0.3 * rows + 0.35 if wide else 2.3
    fig = drawing.new_figure(11.0, 1.1 + height * len(layers), title)
    axes = fig.subplots(len(layers), 1, squeeze=False)[:, 0]
    relative = {layer: np.stack([shares[name][layer] * experts[layer] for name in domains[layer]]) for layer in layers}
    norm = drawing.ratio_norm(list(relative.values()), share=0.999)
    for ax, layer in zip(axes, layers, strict=True):
        ends = np.stack([intervals[name][layer] for name in domains[layer]])  # (D, 2, E)
        if wide:
            image = drawing.heat_map(ax, relative[layer], cmap="RdBu_r", norm=norm, aspect="auto")
            row, column = np.nonzero((ends[:, 0] > 1 / experts[layer]) | (ends[:, 1] < 1 / experts[layer]))
            ax.scatter(column, row, s=3, color=drawing.INK, linewidth=0)
            ax.set_yticks(range(len(domains[layer])), [plain(name, NAME_LETTERS) for name in domains[layer]])
            drawing.index_ticks(ax.xaxis, range(experts[layer]))
        else:
            _bars(ax, relative[layer] / experts[layer], ends, domains[layer])
        ax.set_title(f"layer {layer}", fontsize=10)
    axes[-1].set_xlabel("expert", fontsize=9)
    if wide:
        drawing.colour_bar(fig, image, list(axes), "share / even share (1 = even)", extend="max")
    else:
        handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda pair: len(pair[1]))
        fig.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return fig


def _bars(ax: Axes, shares: np.ndarray, ends: np.ndarray, names: Sequence[str]) -> None:
    """Bars (D, E) in groups of one expert, with intervals (D, 2, E)."""
    experts, width = shares.shape[1], 0.8 / len(names)
    for number, name in enumerate(names):
        x = np.arange(experts) + (number - (len(names) - 1) / 2) * width
        ax.bar(x, shares[number], 0.9 * width, color=COLOURS[number], label=plain(name, NAME_LETTERS))
        low, high = np.where(np.isfinite(ends[number]), ends[number], shares[number])
        ax.vlines(
            x, low, high, color=drawing.INK, lw=0.9, label=_INTERVAL if number == 0 and (high > low).any() else "_"
        )
    ax.axhline(1 / experts, color=drawing.MUTED, ls="--", lw=1.2, label="even share, 1/E")
    drawing.style_axes(ax)
    ax.grid(visible=False, axis="x")
    ax.set_xticks(range(experts))
    ax.set_ylabel("share", fontsize=9)
    # Of one text there is no interval.
    highest = float(np.nanmax(np.append(ends, shares)))
    ax.set_ylim(0, max(1.15 * highest, 1.5 / experts))


def domain_lines(ax: Axes, values: Mapping[str, Mapping[int, float]], intervals: BY_NAME | None = None) -> None:
    """A line over layers for each domain, with bars for the 95 % intervals (2,) where they are given."""
    shown = list(values)[: len(COLOURS)]
    for number, name in enumerate(shown):
        if intervals is not None and name in intervals and len(shown) <= 4:
            known = {layer: ends for layer, ends in intervals[name].items() if np.isfinite(ends).all()}
            shift = 0.06 * (number - (len(shown) - 1) / 2)
            if known:
                low, high = np.stack(list(known.values()), axis=1)
                label = "_" if number else _INTERVAL
                ax.vlines(np.array(list(known)) + shift, low, high, color=COLOURS[number], lw=1, alpha=0.6, label=label)
        drawing.depth_line(ax, values[name], COLOURS[number], plain(name, NAME_LETTERS))
