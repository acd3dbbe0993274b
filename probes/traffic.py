"""Traffic: how far would tokens travel, were the experts on several ranks? (LocMoE 2401.13920)

T tokens, E experts, K experts per token, X ranks that share the experts, g ranks a node, N nodes, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from moebed.errors import ConfigError
from moebed.parallel.traffic import (
    between_ranks,
    bytes_per_trip,
    link_bytes,
    of_distance,
    slowest_link,
    trips_between_ranks,
    trips_to_all,
)
from moebed.views.layer import LayerView, Need, ProbeText
from probes.contract import Arrays, Headline, Probe, ProbeOptions, ProbeResult, by_layer, numbers, per_layer
from probes.measures.choices import assignments, first_middle_last
from probes.measures.expert_matrices import num_experts
from probes.measures.resampling import unit_notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DISTANCES = ("self", "node", "across")
LAYOUT = "no interval, as which rank has which text is part of the layout"
_GB = 1e9


@dataclass(frozen=True)
class TrafficOptions(ProbeOptions):
    """The layout.

    Args:
        ranks: X, over which the experts are spread in order.
        ranks_per_node: g.
        by_domain: Cut the text domain after domain, so that ranks have domains of their own; else as it comes.
        itemsize: Bytes of an element of what travels; 2 for bfloat16.
        exchange: How tokens travel, as ``parallel.exchange`` of a run says; all_gather sends every token to every rank.
        recomputed: The forward pass is done twice (activation checkpointing), but for the way back: no norm follows.
        bandwidth_node: GB/s of a link between two ranks of a node.
        bandwidth_across: GB/s of a link between two nodes.
    """

    ranks: int = 4
    ranks_per_node: int = 2
    by_domain: bool = True
    itemsize: int = 2
    exchange: Literal["all_to_all", "all_gather"] = "all_to_all"
    recomputed: bool = False
    bandwidth_node: float = 300.0
    bandwidth_across: float = 25.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks < 1 or self.ranks_per_node < 1 or self.ranks % self.ranks_per_node:
            raise ConfigError(
                f"probes: traffic has ranks {self.ranks} and ranks_per_node {self.ranks_per_node}; each is at least 1, "
                "and the second divides the first"
            )
        if min(self.itemsize, self.bandwidth_node, self.bandwidth_across) <= 0:
            raise ConfigError(
                "probes: traffic has an itemsize or a bandwidth that is not above 0; give a number above 0"
            )


class Traffic(Probe):
    """Assignments between ranks, from the routing alone: the text is taken as one batch, cut into X equal parts.

    Stored for each layer: ``assignments (X, X)``, from the rank of the token to that of its expert; ``trips (X, X)``,
    in which a token counts once for each rank that has some of its experts; ``bytes (X, X)``, what one rank sends to
    another in a step, forward and backward, which is what ``moebed.parallel.exchange`` sends; ``saved``, the share of
    what would leave its rank if each assignment travelled by itself that is not sent, below 0 where more is;
    ``self``, ``node``, ``across``, shares of the assignments that stay on the rank, on its node, or leave it, and
    ``node_expected``, ``across_expected``, the shares if the tokens of every rank went where all tokens go;
    ``busiest``, bytes that leave the busiest rank over the mean; ``seconds``, the slowest link's by the two bandwidths
    of the options. Stored once: ``layout (2,)``, X and g; ``tokens``, T; ``gathered``, true, where every token goes to
    every rank (option ``exchange``). Even routing has shares 1 / X, (g − 1) / X and
    (X − g) / X. Layers whose experts X does not divide are left out.
    """

    name = "traffic"
    question = "How far would tokens travel, were the experts on several ranks?"
    needs = frozenset({Need.ROUTING})
    Options = TrafficOptions
    options: TrafficOptions

    def update(self, view: LayerView) -> None:
        """Count one layer's assignments."""
        if view.routing is None or view.text is None or view.moe_input is None:
            return
        told, index = self.options, assignments(view)
        self.put("layout", None, np.array([told.ranks, told.ranks_per_node]))
        self.put("tokens", None, len(index))
        if told.exchange == "all_gather":
            self.put("gathered", None, True)
        self.put("num_experts", view.index, view.num_experts)
        if view.num_experts % told.ranks or len(index) < told.ranks:
            return
        given = (index, _ranks_of(view.text, told), view.num_experts, told.ranks)
        found, trips = between_ranks(*given), trips_between_ranks(*given)
        row = (view.moe_input.shape[1], told.itemsize)
        made = trips_to_all(given[1], told.ranks) if told.exchange == "all_gather" else trips
        sent = link_bytes(made, bytes_per_trip(*row, index.shape[1], told.recomputed))
        one_by_one = link_bytes(found, bytes_per_trip(*row, 1, told.recomputed))
        distance = of_distance(told.ranks, told.ranks_per_node)
        alike = np.outer(found.sum(axis=1), found.sum(axis=0)) / max(found.sum(), 1)
        self.put("assignments", view.index, found)
        self.put("trips", view.index, trips)
        self.put("bytes", view.index, sent)
        self.put("saved", view.index, 1 - sent[distance > 0].sum() / max(one_by_one[distance > 0].sum(), 1))
        for number, where in enumerate(DISTANCES):
            self.put(where, view.index, found[distance == number].sum() / max(found.sum(), 1))
            self.put(f"{where}_expected", view.index, alike[distance == number].sum() / max(found.sum(), 1))
        leaving = np.where(distance == 0, 0, sent).sum(axis=1)  # (X,)
        self.put("busiest", view.index, leaving.max() / max(leaving.mean(), 1e-12) if leaving.any() else 1.0)
        seconds = slowest_link(sent, distance, _GB * told.bandwidth_node, _GB * told.bandwidth_across)
        self.put("seconds", view.index, seconds)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Shares, bytes a token, and the matrix in a picture."""
        found = by_layer(arrays, "assignments")
        if not found:
            why = (
                "the ranks do not divide any layer's experts" if "layout" in arrays else "no layer has experts and text"
            )
            return ProbeResult(arrays, notes=[f"{why}: there is no traffic"])
        ranks, on_node = map(int, arrays["layout"])
        scalars: dict[str, float] = {}
        for key in (*DISTANCES, *(f"{where}_expected" for where in DISTANCES), "busiest", "seconds", "saved"):
            scalars |= per_layer(key, numbers(arrays, key))
        sent = {layer: float(value.sum(dtype=np.float64)) for layer, value in by_layer(arrays, "bytes").items()}
        tokens = int(arrays["tokens"])
        scalars |= per_layer("bytes_per_token", {layer: value / tokens for layer, value in sent.items()})
        layout = f"{ranks} ranks, {on_node} a node"
        far = "across" if on_node < ranks else "node"
        where = "to another node" if far == "across" else "to another rank"
        even = (ranks - on_node) / ranks if far == "across" else (ranks - 1) / ranks
        headlines = {
            far: Headline(
                scalars[far],
                f"With experts on {layout}, and the text cut among them, {scalars[far]:.1%} of the assignments go "
                f"{where}; {scalars[f'{far}_expected']:.1%} if the tokens of every rank went where all tokens go, "
                f"{even:.1%} if they went everywhere alike.",
                no_interval=LAYOUT,
            ),
            "self": Headline(
                scalars["self"],
                f"{scalars['self']:.1%} of the assignments stay on their rank; {scalars['self_expected']:.1%} if the "
                f"tokens of every rank went where all tokens go, {1 / ranks:.1%} if they went everywhere alike.",
                no_interval=LAYOUT,
            ),
            "busiest": Headline(
                scalars["busiest"],
                f"The rank that sends most sends {scalars['busiest']:.2f} times the mean, on average over layers.",
                no_interval=LAYOUT,
            ),
        }
        headlines["saved"] = Headline(
            scalars["saved"],
            _saved(scalars["saved"], "gathered" in arrays),
            no_interval=LAYOUT,
        )
        left = [str(layer) for layer in num_experts(arrays) if layer not in found]
        notes = [f"left out, as {ranks} ranks do not divide their experts: layers {', '.join(left)}"] if left else []
        pictures = {"matrix": partial(_draw_matrix, arrays, layout), "over_depth": partial(_draw_depth, arrays, layout)}
        return ProbeResult(arrays, scalars, headlines, pictures, notes + unit_notes(arrays, headlines))


def _saved(share: float, gathered: bool) -> str:
    if gathered:
        return f"Every token goes to every rank: {1 - share:.2f} times the bytes of a row for each assignment are sent."
    return (
        f"A token travels once to a rank that has several of its experts: {share:.1%} of the bytes of a row for each "
        "assignment are not sent."
    )


def _ranks_of(text: ProbeText, told: TrafficOptions) -> np.ndarray:
    """(T,) the rank that has each token: equal parts of the text, one after another."""
    sequence, domain = text.sequence.cpu().numpy(), text.domain.cpu().numpy()
    tokens = len(sequence)
    place = np.empty(tokens, np.int64)
    order = np.argsort(domain[sequence], kind="stable") if told.by_domain else np.arange(tokens)
    place[order] = np.arange(tokens)
    return place * told.ranks // max(tokens, 1)


def _draw_matrix(arrays: Arrays, layout: str) -> Figure:
    from matplotlib.patches import Rectangle

    from probes.figures import drawing

    found, (ranks, on_node) = by_layer(arrays, "assignments"), map(int, arrays["layout"])
    layers = first_middle_last(list(found))
    fig = drawing.new_figure(
        max(7.0, 1.6 + 3.0 * len(layers)),
        4.7,
        f"Assignments of each rank's tokens (row) to each rank's experts (column),\n"
        f"as a multiple of an even share: {layout}; boxes are nodes",
    )
    axes = fig.subplots(1, len(layers), squeeze=False)[0]
    over = {n: ranks * found[n] / np.maximum(found[n].sum(axis=1, keepdims=True), 1) for n in layers}
    norm = drawing.ratio_norm(list(over.values()))
    for ax, layer in zip(axes, layers, strict=True):
        image = drawing.heat_map(ax, over[layer], cmap="RdBu_r", norm=norm)
        if ranks <= 12:
            drawing.write_values(ax, over[layer], norm)
        for start in range(0, ranks, on_node):
            corner = (start - 0.5, start - 0.5)
            ax.add_patch(Rectangle(corner, on_node, on_node, fill=False, edgecolor=drawing.INK, lw=1.6))
        ax.set_title(f"layer {layer}", fontsize=10)
        drawing.index_ticks(ax.xaxis, range(ranks))
        drawing.index_ticks(ax.yaxis, range(ranks))
        ax.set_xlabel("rank of the expert", fontsize=9)
    axes[0].set_ylabel("rank of the token", fontsize=9)
    drawing.colour_bar(fig, image, axes, "share / even share (1 = even)")
    return fig


def _draw_depth(arrays: Arrays, layout: str) -> Figure:
    from probes.figures import drawing

    fig = drawing.new_figure(7.0, 3.4, f"How far assignments travel over depth: {layout}")
    ax = fig.subplots()
    names = {"self": "its own rank", "node": "another of its node", "across": "another node"}
    for (key, name), colour in zip(names.items(), drawing.SERIES, strict=False):
        drawing.depth_line(ax, numbers(arrays, key), colour, name)
        drawing.depth_line(ax, numbers(arrays, f"{key}_expected"), colour, f"{name}, by loads alone", dashed=True)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("share of assignments", fontsize=9)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig
