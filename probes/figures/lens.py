"""What experts write: the words that each raises most, and what it adds, over depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from probes.contract import Arrays, by_layer
from probes.measures.choices import first_middle_last
from probes.measures.words import words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN_EXPERTS, DRAWN_WORDS, DRAWN_LETTERS = 16, 6, 9


def draw_words(arrays: Arrays) -> Figure:
    """A line an expert, a column a layer: its words, and of how many the other half of the texts says the same."""
    from probes.figures import drawing
    from probes.figures.letters import token

    known, ids = words_of(arrays), by_layer(arrays, "lens_ids")
    overlap = by_layer(arrays, "lens_overlap")
    layers = first_middle_last(list(ids))
    rows = min(DRAWN_EXPERTS, max(len(ids[layer]) for layer in layers))
    title = "Words that each expert raises most over its layer's mean; in brackets, of ten, those of other texts"
    fig = drawing.new_figure(max(8.5, 5.6 * len(layers)), 0.9 + 0.24 * rows, title)
    for ax, layer in zip(fig.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        for row, expert in enumerate(drawing.pick(range(len(ids[layer])), DRAWN_EXPERTS)):
            said = [token(known, int(one), DRAWN_LETTERS) for one in ids[layer][expert] if one >= 0][:DRAWN_WORDS]
            same = overlap[layer][expert]
            line = (f"[{same:.0f}] " if np.isfinite(same) else "[–] ") + "  ".join(said) if said else "–"
            for place, text in ((0.0, str(expert)), (0.06, line)):
                ax.text(place, row, text, fontsize=7.5, family="monospace", va="center", color=drawing.INK,
                        in_layout=False)  # fmt: skip
        ax.set_title(f"layer {layer}: expert, words", fontsize=9, loc="left")
        ax.set_xlim(0, 1)
        ax.set_ylim(rows - 0.5, -0.5)
        ax.axis("off")
    return fig


def draw_over_depth(arrays: Arrays, cosines: Mapping[str, Mapping[int, float]]) -> Figure:
    """Cosines of the first choice with all; attributions beside shuffled ones; words in common."""
    from probes.figures import drawing

    fig = drawing.new_figure(13.0, 3.6, "What experts write, over depth")
    first, added, words = fig.subplots(1, 3)
    labels = {
        "top1_cos_output": "with the sum of all",
        "top1_cos_sizes": "the same, at right angles",
        "top1_cos_residual": "of the stream after the layer",
    }
    for (key, label), colour in zip(labels.items(), drawing.SERIES, strict=False):
        drawing.depth_line(first, cosines[key], colour, label, dashed=key == "top1_cos_sizes")
    first.set_title("cosine of the first expert's part", fontsize=10)
    for key, label, colour in (
        ("target", "of the token that follows", drawing.SERIES[0]),
        ("shuffled", "of one that follows elsewhere", drawing.MUTED),
    ):
        if sums := by_layer(arrays, f"dla_{key}"):
            tokens = max(1, int(arrays["lens_predicted"].sum()))
            mean = {layer: float(of.sum(dtype=np.float64)) / tokens for layer, of in sums.items()}
            drawing.depth_line(added, mean, colour, label, dashed=key == "shuffled")
    added.axhline(0, color=drawing.MUTED, lw=1, ls=":")
    added.set_title("what a layer's experts add to the logit", fontsize=10)
    for key, label, colour in (
        ("lens_overlap", "its own, on other texts", drawing.SERIES[0]),
        ("lens_overlap_other", "another expert's", drawing.MUTED),
    ):
        means = {layer: float(np.nanmean(of)) for layer, of in by_layer(arrays, key).items() if np.isfinite(of).any()}
        drawing.depth_line(words, means, colour, label, dashed=key == "lens_overlap_other")
    words.set_ylim(-0.3, 10.3)
    words.set_title("of an expert's ten words, the same", fontsize=10)
    for ax, why in ((first, "no token has experts"), (added, "no token follows"), (words, "there is one text")):
        drawing.layer_axis(ax)
        drawing.legend(ax, why)
    return fig
