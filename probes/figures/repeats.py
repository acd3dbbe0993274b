"""Pictures of ``repeats``: consecutive tokens with an expert in common, and runs of one expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from probes.contract import Arrays, by_layer, by_part, numbers
from probes.measures.choices import ALL, first_middle_last, names_by_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_over_depth(arrays: Arrays, kinds: Mapping[str, str]) -> Figure:
    """How often consecutive tokens have each of the kinds, given with what it is, in common; by domain."""
    from probes.figures import domains, drawing

    names = names_by_key(arrays)
    fig = drawing.new_figure(11.0, 4.0, "How often does a token go where the one before it went? By domain, over depth")
    axes = fig.subplots(1, len(kinds))
    for ax, (kind, label) in zip(axes, kinds.items(), strict=True):
        values = by_part(arrays, f"repeat_{kind}")
        if len(values) > 1 and len(values) <= 2:
            values.pop(ALL)  # one domain is all there is
        spread = by_part(arrays, f"repeat_{kind}_interval")
        domains.domain_lines(
            ax,
            {names.get(k, k): numbers(arrays, f"repeat_{kind}", k) for k in values if k != ALL or len(values) == 1},
            {names.get(key, key): layers for key, layers in spread.items()},
        )
        chance = numbers(arrays, f"random_{kind}")
        drawing.depth_line(ax, chance, drawing.MUTED, "chance, all experts alike", dashed=True)
        if kind == "first":
            expected = numbers(arrays, "repeat_first_expected", ALL)
            drawing.depth_line(ax, expected, drawing.INK, "chance, with the loads measured", dashed=True)
            handles = ax.get_legend_handles_labels()
        ax.set_ylim(0, min(1.05, 1.2 * max(ax.get_ylim()[1], max(chance.values()))))
        ax.set_title(f"share of consecutive tokens with {label}", fontsize=10)
    fig.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return fig


def draw_runs(arrays: Arrays) -> Figure:
    """How long the runs of one first choice are."""
    from matplotlib.ticker import MaxNLocator

    from probes.figures import drawing

    lengths = by_layer(arrays, "run_length")
    expected = numbers(arrays, "repeat_first_expected", ALL)
    layers = first_middle_last(list(lengths))
    fig = drawing.new_figure(4.0 * max(len(layers), 2), 3.5, "How many tokens in a row have the same first choice?")
    axes = fig.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    most = len(next(iter(lengths.values())))  # tokens or more in the longest runs that are told apart
    x = np.arange(1, most + 1)
    longest = max(int(np.flatnonzero(value)[-1]) + 1 for value in lengths.values() if value.any())
    for ax, layer in zip(axes, layers, strict=True):
        share = lengths[layer] / max(lengths[layer].sum(), 1)
        again = expected[layer]
        ax.bar(x, share, color=drawing.SERIES[0], label="measured")
        blind = (1 - again) * again ** (x - 1)
        ax.plot(x, blind, color=drawing.MUTED, ls="--", lw=1.2, label="in random order, loads as measured")
        drawing.style_axes(ax)
        ax.set_yscale("log")
        ax.set_ylim(max(0.5 / max(lengths[layer].sum(), 1), 1e-6), 1.3)
        drawing.log_ticks(ax.yaxis)
        ax.set_xlim(0.4, max(longest, 6) + 0.6)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(f"layer {layer}", fontsize=10)
        more = f" ({most}: or more)" if longest == most else ""
        ax.set_xlabel(f"tokens in a row{more}", fontsize=9)
    axes[0].set_ylabel("share of runs", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    return fig
