"""The text itself, each token on the colour of its first choice (Mixtral, arXiv 2401.04088, section 5, Figure 8).

Drawn from what ``routing`` stores: as HTML, where a token also tells its experts and their weights, and as an image.

T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moebed.machine.templates import render
from probes.contract import Arrays, by_layer
from probes.measures.choices import first_middle_last

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE_TOKENS, PAGE_DOMAINS = 200, 8  # tokens of each domain
IMAGE_LINES, IMAGE_COLUMNS, IMAGE_DOMAINS = 4, 62, 3
LEGEND = 64  # experts
# Light enough for dark text, and far apart for the few experts that most models here have.
_FEW = ("#a6cee3", "#fdbf6f", "#b2df8a", "#fb9a99", "#cab2d6", "#ffff99", "#8dd3c7", "#d9d9d9", "#fccde5", "#d8b48a")


def expert_colours(experts: int) -> list[str]:
    """A light colour for each expert; with many experts neighbours by number differ most."""
    if experts <= len(_FEW):
        return list(_FEW[:experts])
    colours = []
    for expert in range(experts):
        red, green, blue = colorsys.hls_to_rgb(expert * 0.61803398875 % 1.0, (0.88, 0.8, 0.72)[expert % 3], 0.7)
        colours.append("#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue)))
    return colours


def _words(arrays: Arrays, tokens: slice) -> list[str]:
    """What the tokens say; their ids where that is not known."""
    if "token_text" in arrays:
        said = zip(arrays["token_text"][tokens], arrays["token_ids"][tokens], strict=True)
        return [str(text) or f"#{one}" for text, one in said]
    return [f"{int(one)} " for one in arrays["token_ids"][tokens]]


def _passages(arrays: Arrays, tokens: int, domains: int) -> list[tuple[str, slice]]:
    """The first tokens of the first sequence of each domain."""
    names, domain = arrays["domain_names"], arrays["domain"]
    bounds = np.append(arrays["sequence_start"], len(arrays["token_ids"]))
    lengths = np.diff(bounds)
    passages = []
    for number, name in enumerate(names):
        own = np.flatnonzero((domain == number) & (lengths > 0))
        if len(own):
            start = int(bounds[own[0]])
            passages.append((str(name), slice(start, min(start + tokens, int(bounds[own[0] + 1])))))
    return passages[:domains]


def write_coloured(arrays: Arrays) -> str:
    """The page: for the first, the middle and the last layer a legend and each domain's text."""
    index, weight = by_layer(arrays, "topk_index"), by_layer(arrays, "topk_weight")
    probs = by_layer(arrays, "router_probs")
    widths = {layer: probs[layer].shape[1] for layer in first_middle_last(list(index))}
    layers = []
    for layer, experts in widths.items():
        passages = []
        for name, tokens in _passages(arrays, PAGE_TOKENS, PAGE_DOMAINS):
            words = zip(_words(arrays, tokens), index[layer][tokens], weight[layer][tokens], strict=True)
            told = [_told(word, chosen, weights) for word, chosen, weights in words]
            passages.append({"domain": name, "tokens": told})
        layers.append({"number": layer, "experts": experts, "passages": passages})
    palettes = {experts: expert_colours(experts) for experts in sorted(set(widths.values()))}
    return render("probes.figures/coloured_tokens.html", palettes=palettes, layers=layers, legend=LEGEND)


def _told(word: str, chosen: np.ndarray, weights: np.ndarray) -> dict[str, object]:
    """What the page shows of a token."""
    told = ", ".join(f"{expert} ({weight:.2f})" for expert, weight in zip(chosen, weights, strict=True))
    shown, rest = word.rstrip("\n\r"), word[len(word.rstrip("\n\r")) :]
    shown = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in shown) + "⏎\n" * rest.count("\n")
    return {"word": shown, "first": int(chosen[0]), "chosen": told}


def draw_coloured(arrays: Arrays) -> Figure:
    """The image: a column a layer, a row a domain, as much of the text as fits."""
    from matplotlib.patches import Patch

    from probes.figures import drawing
    from probes.figures.letters import plain

    index, probs = by_layer(arrays, "topk_index"), by_layer(arrays, "router_probs")
    layers = first_middle_last(list(index))
    passages = _passages(arrays, IMAGE_LINES * IMAGE_COLUMNS, IMAGE_DOMAINS)
    most = max(probs[layer].shape[1] for layer in layers)
    title = "The text, each token on the colour of the expert that is its first choice"
    title += "" if most <= 24 else f"\nSome of {most} colours look alike; the page of the same name tells the experts"
    fig = drawing.new_figure(max(7.5, 5.0 * len(layers) + 0.4), 1.3 + 0.9 * len(passages), title)
    axes = fig.subplots(len(passages), len(layers), squeeze=False)
    for row, (name, tokens) in enumerate(passages):
        words = _words(arrays, tokens)
        for column, layer in enumerate(layers):
            colours = expert_colours(probs[layer].shape[1])
            _set_text(axes[row, column], words, [colours[int(one)] for one in index[layer][tokens, 0]])
            axes[row, column].set_title(f"{plain(name, 40)}, layer {layer}", fontsize=9, loc="left")
    if most <= 24:
        columns = min(most, 12 if len(layers) == 1 else 24)
        handles = [Patch(color=colour, label=str(expert)) for expert, colour in enumerate(expert_colours(most))]
        fig.legend(
            handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False, title="expert",
            title_fontsize=8, handlelength=1.2, columnspacing=1.0,
        )  # fmt: skip
    return fig


def _set_text(ax: Axes, words: Sequence[str], colours: Sequence[str]) -> None:
    """Set words on a grid of characters, broken where a line is full."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    from probes.figures import drawing
    from probes.figures.letters import columns

    boxes, paints = [], []
    line = column = 0
    for word, colour in zip(words, colours, strict=True):
        for piece in _pieces(_drawable(word)):
            if piece == "\n":
                piece, ends = "⏎", True
            else:
                ends = False
            if column + columns(piece) > IMAGE_COLUMNS and column:
                line, column = line + 1, 0
                piece = piece.lstrip(" ") or " "
            if line >= IMAGE_LINES:
                break
            width = columns(piece)
            boxes.append(Rectangle((column, line), width, 0.92))
            paints.append(colour)
            ax.text(
                column + width / 2, line + 0.46, piece.replace(" ", "\xa0"), fontsize=7, family="monospace",
                ha="center", va="center", color=drawing.INK, parse_math=False, clip_on=True, in_layout=False,
            )  # fmt: skip
            line, column = (line + 1, 0) if ends else (line, column + width)
    ax.add_collection(PatchCollection(boxes, facecolor=paints, edgecolor="white", linewidth=0.6))
    ax.set_xlim(0, IMAGE_COLUMNS)
    ax.set_ylim(IMAGE_LINES, 0)
    ax.axis("off")


def _pieces(word: str) -> list[str]:
    """A word cut at its line ends and where it is longer than a line."""
    from probes.figures.letters import columns

    pieces: list[str] = []
    for position, part in enumerate(word.split("\n")):
        pieces += ["\n"] if position else []
        start = len(pieces)
        for letter in part:
            if len(pieces) == start or columns(pieces[-1] + letter) > IMAGE_COLUMNS:
                pieces.append("")
            pieces[-1] += letter
    return pieces


def _drawable(word: str) -> str:
    """The word with a box for what no font here has a letter for."""
    from probes.figures.letters import BOX, font_with

    return "".join(c if c == "\n" or font_with(c) is not None else BOX for c in word.replace("\t", "  "))
