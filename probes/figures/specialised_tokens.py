"""The token ids of which an expert takes most, from what ``vocabulary`` stores: as an image, and as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moebed.machine.templates import render
from probes.contract import Arrays, by_layer, by_part
from probes.measures.choices import first_middle_last
from probes.measures.words import word_of, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN_EXPERTS, DRAWN_IDS, DRAWN_LETTERS = 16, 5, 8  # in the image, which is smaller than the page
SHOWN_EXPERTS = 64


def draw_tokens(arrays: Arrays, kind: str, kinds: Mapping[str, str]) -> Figure:
    """The page's first table of each layer as an image: a line an expert, a column a layer."""
    from probes.figures import drawing
    from probes.figures.letters import token

    words = words_of(arrays)
    ids, shares = by_layer(arrays, "top_ids", kind), by_layer(arrays, "top_shares", kind)
    layers = first_middle_last(list(ids))
    rows = min(DRAWN_EXPERTS, max(len(ids[layer]) for layer in layers))
    title = f"Ids of whose routings an expert takes most, sorted by {kinds[kind]}, with the share it takes"
    fig = drawing.new_figure(max(7.5, 5.2 * len(layers)), 0.9 + 0.24 * rows, title)
    for ax, layer in zip(fig.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        for row, expert in enumerate(drawing.pick(range(len(ids[layer])), DRAWN_EXPERTS)):
            own = zip(ids[layer][expert], shares[layer][expert], strict=True)
            said = [f"{token(words, int(one), DRAWN_LETTERS)} {value:.0%}" for one, value in own if one >= 0]
            line = "   ".join(said[:DRAWN_IDS]) or "–"
            for place, text in ((0.0, str(expert)), (0.06, line)):
                ax.text(place, row, text, fontsize=7.5, family="monospace", va="center", color=drawing.INK,
                        in_layout=False)  # fmt: skip
        ax.set_title(f"layer {layer}: expert, ids", fontsize=9, loc="left")
        ax.set_xlim(0, 1)
        ax.set_ylim(rows - 0.5, -0.5)
        ax.axis("off")
    return fig


def write_tokens(arrays: Arrays, kinds: Mapping[str, str]) -> str:
    """Tables: a row an expert, the tokens of which it takes most."""
    words = words_of(arrays)
    ids, shares = by_part(arrays, "top_ids"), by_part(arrays, "top_shares")
    tables = [
        {
            "layer": layer,
            "kind": kinds[kind],
            "experts": [
                [
                    {"id": int(one), "word": word_of(words, int(one)), "share": f"{value:.0%}"}
                    for one, value in zip(own, share, strict=True)
                    if one >= 0
                ]
                for own, share in zip(
                    ids[kind][layer][:SHOWN_EXPERTS], shares[kind][layer][:SHOWN_EXPERTS], strict=True
                )
            ],
            "more": max(len(ids[kind][layer]) - SHOWN_EXPERTS, 0),
        }
        for kind in ids
        for layer in first_middle_last(list(ids[kind]))
    ]
    return render("probes.figures/specialised_tokens.html", tables=tables)
