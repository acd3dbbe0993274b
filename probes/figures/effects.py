"""Pictures of effects on the loss.

Q bins of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from probes.measures.effects import Effect

SHOWN = 40  # rows
LABELS = {"domain": "frequency in the own domain", "other_domain": "frequency in another domain"}
NAME_LETTERS = 60  # of an intervention


def draw_effects(rows: Sequence[tuple[str, Effect, bool]], noise: float) -> Figure:
    """Each intervention's effect and interval, by name; grey where it is not called, as chance does as much."""
    from probes.figures import drawing
    from probes.figures.letters import plain

    rows = sorted(rows, key=lambda row: -abs(row[1].mean))[:SHOWN]
    fig = drawing.new_figure(
        9.0,
        1.4 + 0.28 * len(rows),
        "By how much the loss changes (nats per token), with 95 % intervals over texts\n"
        f"grey: chance does as much (p after Holm, interval); identity, nothing at all, changes a token by {noise:.1g}",
    )
    ax = fig.subplots()
    drawing.style_axes(ax)
    for place, (_, effect, called) in enumerate(rows):
        colour = drawing.SERIES[0 if effect.mean < 0 else 1] if called else drawing.MUTED
        if effect.interval is not None:
            ax.plot(effect.interval, [place, place], color=colour, lw=1.6, solid_capstyle="butt")
        ax.plot([effect.mean], [place], "o", ms=4.5, color=colour)
    ax.axvline(0, color=drawing.MUTED, lw=1, ls="--")
    ax.set_yticks(range(len(rows)), [plain(name, NAME_LETTERS) for name, _, _ in rows], fontsize=8)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("change of the loss", fontsize=9)
    return fig


def draw_by_confidence(rises: Mapping[str, np.ndarray]) -> Figure:
    """Mean rise (Q,) of each intervention, from the tokens that the model is sure of to those that it is not."""
    from probes.figures import drawing
    from probes.figures.letters import plain

    fig = drawing.new_figure(7.5, 4.0, "Whom does it hurt? Change of the loss by how sure the model was of the token")
    ax = fig.subplots()
    drawing.style_axes(ax)
    for number, (name, rise) in enumerate(rises.items()):
        style = "-" if number < len(drawing.MANY) else "--"
        ax.plot(range(1, len(rise) + 1), rise, style, marker="o", ms=4, lw=1.5,
                color=drawing.MANY[number % len(drawing.MANY)], label=plain(name, NAME_LETTERS))  # fmt: skip
    ax.axhline(0, color=drawing.MUTED, lw=1, ls="--")
    ax.set_xticks(range(1, 6), ["surest", "2nd", "3rd", "4th", "least sure"], fontsize=8)
    ax.set_xlabel("fifths of the tokens by their loss as it is", fontsize=9)
    ax.set_ylabel("change of the loss (nats)", fontsize=9)
    ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def draw_keep_k(shares: Sequence[float], effects: Mapping[str, Sequence[Effect]]) -> Figure:
    """The rise of the loss against the share of experts that are kept, a line a score; random ones with a band."""
    from probes.figures import drawing

    fig = drawing.new_figure(
        8.5, 4.4, "The loss with some experts of each layer alone, on texts that chose none of them"
    )
    ax = fig.subplots()
    drawing.style_axes(ax)
    places = range(len(shares))
    scores = [name for name in effects if name != "random"]
    for name, colour in zip(scores, drawing.MANY, strict=False):
        rows = effects[name]
        ends = [row.interval or (row.mean, row.mean) for row in rows]
        reach = [[row.mean - low for row, (low, _) in zip(rows, ends, strict=True)],
                 [high - row.mean for row, (_, high) in zip(rows, ends, strict=True)]]  # fmt: skip
        ax.errorbar(places, [row.mean for row in rows], yerr=reach, color=colour, marker="o", ms=4, lw=1.5,
                    elinewidth=0.8, label=LABELS.get(name, name))  # fmt: skip
    chance = effects["random"]
    ax.plot(places, [row.mean for row in chance], color=drawing.INK, lw=1.4, ls="--", label="random")
    if all(row.interval is not None for row in chance):
        low, high = zip(*(row.interval for row in chance if row.interval is not None), strict=True)
        ax.fill_between(places, low, high, color=drawing.MUTED, alpha=0.18, lw=0)
    ax.axhline(0, color=drawing.MUTED, lw=1, ls=":")
    ax.set_xticks(places, [f"1/{1 / share:g}" for share in shares], fontsize=8)
    known = any(row.interval is not None for rows in effects.values() for row in rows)
    ax.set_xlabel(f"experts kept in each layer{'; 95 % intervals over texts' if known else ''}", fontsize=9)
    ax.set_ylabel("rise of the loss (nats per token)", fontsize=9)
    ax.legend(fontsize=8, frameon=False, title="chosen by", title_fontsize=8, loc="center left",
              bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    return fig
