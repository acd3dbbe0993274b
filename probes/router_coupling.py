"""Router coupling: does an expert answer its own row of the router more than other rows?

For a token, the row of the router that chose an expert and the expert's input weights get gradients along the same
hidden state (2605.12476), so that the two may come to lie along each other. The response is the quantity that expert-
router coupling losses compare, without their noise. Softmax over experts does not see a vector that all rows share, the
response does: where the router ignores it, rows are taken less their mean, and as they are beside it.

E routed experts, F expert intermediate (neurons), H hidden, r_i the i-th gate embedding (a row of W_g), W^j expert j's
matrix ``gate`` (F, H), D permutations.
"""

from __future__ import annotations

from functools import partial
from itertools import islice, permutations
from math import factorial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moebed.machine.float64 import double
from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, by_part, find, finite, per_layer
from probes.measures.expert_matrices import num_experts
from probes.measures.ranks import EQUAL, ranks
from probes.measures.resampling import DRAWS, SEED, p_value
from probes.measures.similarity import cosine_matrix, off_diagonal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CENTRED, RAW = "centred", "raw"  # rows less their mean; rows as they are
PICTURED_LAYERS = 8
_ALL_ORDERS = 6  # experts up to which every order of them is looked at
_BAND_ELEMENTS = 1 << 19  # of a matrix at a time: two megabytes in float32, which stay in a cache


class RouterCoupling(Probe):
    """What each expert's matrices make of each of the router's rows, from the weights alone.

    Stored for each layer, and for rows ``centred`` (less their mean; only where the router's choices do not depend on
    it) and ``raw``: ``response (E, E)``, ‖W^j r_i‖₂ of row i and expert j; ``response_relative (E, E)``, that times √H
    / (‖W^j‖_F ‖r_i‖), 1 for a direction at random; ``gate_cos_mean (E, E)``, mean over the neurons n of cos(r_i,
    W^j_n), whose sign tells since an activation is one-sided; ``up_energy (E, E)``, mean over neurons of the squared
    cosine with those of ``up``, 1/H at random; ``row_cos ()``, mean cosine of two rows. Of ``response_relative``:
    ``matched ()`` and ``unmatched ()``, means on and off its diagonal; ``top1_expert ()``, share of rows that their own
    expert answers most; ``top1_row ()``, share of experts that answer their own row most, of n that do alike an n-th;
    ``coupling_p ()``, how often
    experts in another order match as well: of all orders up to six experts, of 1000 beyond. What is zero has response
    and cosine 0. ``num_experts/<layer>``, E.

    Left out are layers without gate embeddings in the experts' own space, with one expert, and with two where rows are
    centred: each is then the other's negative, which every expert answers as strongly.
    """

    name = "router_coupling"
    question = "Do experts answer their own row of the router most?"
    needs = frozenset({Need.WEIGHTS})

    def update_matrix(self, view: LayerView, name: str) -> None:
        """See what the experts' ``gate``, and ``up``, make of the router's rows."""
        if name == "down" or not _comparable(view):
            return
        assert view.gate is not None
        rows = double(view.gate)  # (E, H)
        mean = rows.mean(dim=0, keepdim=True)
        both = torch.cat([rows - mean, mean]).float()  # what rows share must not drown what they differ by
        seen = [_respond(view, name, expert, both) for expert in range(view.num_experts)]
        for part, kind in ((CENTRED, 0), (RAW, 1)):
            if part == CENTRED and not view.shift_invariant:
                continue
            size = torch.linalg.vector_norm(rows - mean if part == CENTRED else rows, dim=1).cpu().numpy()  # (E,)
            if name == "up":
                energy = np.stack([expert.energy[kind] for expert in seen], axis=1)
                self.put("up_energy", view.index, _divided(energy, np.square(size)[:, None]), part)
                continue
            response = np.stack([expert.length[kind] for expert in seen], axis=1)
            cosine = np.stack([expert.cosine[kind] for expert in seen], axis=1)
            scale = size[:, None] * np.array([expert.norm for expert in seen]) / np.sqrt(rows.shape[1])
            self.put("response", view.index, response, part)
            self.put("gate_cos_mean", view.index, _divided(cosine, size[:, None]), part)
            self._compare(view.index, _divided(response, scale), part)
            directions = rows - mean if part == CENTRED else rows
            self.put("row_cos", view.index, off_diagonal(cosine_matrix(directions.unsqueeze(1))).mean(), part)
        self.put("num_experts", view.index, view.num_experts)

    def _compare(self, layer: int, relative: np.ndarray, part: str) -> None:
        own = np.arange(len(relative))
        matched, unmatched = _on_and_off(relative)
        found = {
            "response_relative": relative,
            "matched": matched,
            "unmatched": unmatched,
            "top1_expert": ranks(relative, within=EQUAL).top()[own, own].mean(),
            "top1_row": ranks(relative.T, within=EQUAL).top()[own, own].mean(),
            "coupling_p": p_value(matched, _matched_in(relative, _orders(len(relative), layer))),
        }
        for key, value in found.items():
            self.put(key, layer, value, part)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Own expert beside the others, by layer and overall; heat maps and curves over depth."""
        experts = num_experts(arrays)
        if not experts:
            why = (
                "skipped: no layer has a router with gate embeddings, and experts enough to tell their own from others"
            )
            return ProbeResult(arrays, notes=[why])
        kinds = by_part(arrays, "matched")
        part = CENTRED if CENTRED in kinds else RAW
        scalars: dict[str, float] = {}
        for kind in kinds:
            suffix = "" if kind == part else f"_{kind}"
            for quantity, values in _by_depth(arrays, kind).items():
                scalars |= per_layer(quantity + suffix, finite(values))
        pictures = {
            "heat_maps": partial(_draw_heat_maps, arrays, part),
            "over_depth": partial(_draw_over_depth, arrays, part),
        }
        if "matched" not in scalars:
            return ProbeResult(arrays, scalars, figures=pictures, notes=["the weights are not finite in any layer"])
        return ProbeResult(arrays, scalars, _headlines(arrays, part, scalars), pictures)


class Answer(NamedTuple):
    """What one matrix (F, H) makes of E rows; each entry first of centred rows, then of rows as they are."""

    length: np.ndarray  # (2, E) ‖W r_i‖₂
    cosine: np.ndarray  # (2, E) mean over neurons of cos(r_i, W_n) · ‖r_i‖
    energy: np.ndarray  # (2, E) mean over neurons of its square
    norm: float  # ‖W‖_F


def _comparable(view: LayerView) -> bool:
    gate, least = view.gate, 3 if view.shift_invariant else 2
    return gate is not None and view.num_experts >= least and gate.shape[1] == view.expert_shape("gate")[1]


def _respond(view: LayerView, name: str, expert: int, rows: Tensor) -> Answer:
    """What an expert's matrix makes of centred rows, and of their mean after them: rows (E + 1, H) float32."""
    matrix = view.expert_matrix(name, expert)  # (F, H)
    total = torch.zeros(3, 2, len(rows) - 1, dtype=torch.float64)
    norm = 0.0
    for band in matrix.split(max(1, _BAND_ELEMENTS // matrix.shape[1])):
        neurons = band.float()
        product = neurons @ rows.T  # (f, E + 1)
        answer = torch.stack([product[:, :-1], product[:, :-1] + product[:, -1:]])  # (2, f, E)
        size = torch.linalg.vector_norm(neurons, dim=1)  # (f,)
        cosine = answer * torch.where(size > 0, 1 / size, 0.0).unsqueeze(1)
        total += double(torch.stack([answer.square(), cosine, cosine.square()]).sum(dim=2)).cpu()
        norm += float(size.square().sum())
    length, cosine, energy = total.numpy()
    return Answer(np.sqrt(length), cosine / len(matrix), energy / len(matrix), norm**0.5)


def _divided(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Values (E, E) over a scale; 0 where that is 0."""
    scale = np.broadcast_to(scale, values.shape)
    return np.divide(values, scale, out=np.zeros_like(values), where=scale != 0)


def _on_and_off(values: np.ndarray) -> tuple[float, float]:
    """Means on the diagonal of (E, E) and off it."""
    matched, count = float(np.trace(values)), len(values)
    return matched / count, float((values.sum(dtype=np.float64) - matched) / (count * (count - 1)))


def _orders(experts: int, layer: int) -> np.ndarray:
    """Orders (D, E) of the experts other than their own: all of them, or, of many, some at random."""
    if experts <= _ALL_ORDERS:
        return np.fromiter(islice(permutations(range(experts)), 1, None), (np.int64, experts), factorial(experts) - 1)
    return _shuffled(experts, layer)


def _shuffled(experts: int, layer: int) -> np.ndarray:
    """Orders (D, E) drawn at random, others in each layer."""
    return np.random.default_rng((SEED, layer)).permuted(np.tile(np.arange(experts), (DRAWS, 1)), axis=1)


def _matched_in(values: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Means on the diagonal of (E, E), its columns in these orders (D, E): (D,)."""
    return values[np.arange(len(values)), orders].mean(axis=1, dtype=np.float64)


def _p_of_all_layers(arrays: Arrays, part: str) -> float:
    """How often experts in another order match as well on average over layers, in each layer an order of its own."""
    layers = by_layer(arrays, "response_relative", part)
    null = np.mean([_matched_in(values, _shuffled(len(values), layer)) for layer, values in layers.items()], axis=0)
    return float(p_value(float(np.mean([_on_and_off(values)[0] for values in layers.values()])), null))


def _by_depth(arrays: Arrays, part: str) -> dict[str, dict[int, float]]:
    """Numbers of each layer, by what they are."""
    keys = ("matched", "unmatched", "top1_expert", "top1_row", "coupling_p", "row_cos")
    found = {key: {n: float(value) for n, value in by_layer(arrays, key, part).items()} for key in keys}
    on_and_off = zip(found["matched"].items(), found["unmatched"].values(), strict=True)
    found["coupling"] = {n: matched / unmatched if unmatched else np.nan for (n, matched), unmatched in on_and_off}
    for key, name in {"gate_cos_mean": "gate_cos", "up_energy": "up_energy"}.items():
        pairs = {n: _on_and_off(values) for n, values in by_layer(arrays, key, part).items()}
        found |= {
            f"{name}_{whose}": {n: pair[at] for n, pair in pairs.items()} for at, whose in enumerate(("own", "other"))
        }
    return found


def _headlines(arrays: Arrays, part: str, scalars: dict[str, float]) -> dict[str, Headline]:
    rows = "row of the router, less what all rows share," if part == CENTRED else "row of the router"
    found = {}
    if "coupling" in scalars:
        value = scalars["coupling"]
        found["coupling"] = Headline(
            value,
            f"A {rows} is answered {value:.3g} times as strongly by its own expert's gate matrix as by another's "
            f"(1 if unrelated; p {_p_of_all_layers(arrays, part):.2g} by experts in another order).",
        )
    experts = num_experts(arrays)
    chance = sum(1 / count for count in experts.values()) / len(experts)
    value = scalars["top1_expert"]
    found["top1_expert"] = Headline(
        value, f"{value:.0%} of the router's rows are answered most by their own expert; {chance:.0%} by chance."
    )
    for key, whose in {"matched": "its own", "unmatched": "another's"}.items():
        value = scalars[key]
        found[key] = Headline(
            value, f"An expert answers {whose} {rows} {value:.3g} times as strongly as a direction at random."
        )
    own, other = scalars["gate_cos_own"], scalars["gate_cos_other"]
    found["gate_cos_own"] = Headline(
        own,
        f"The cosine of a router's row with its own expert's gate neurons is {own:+.2g} on average, with another's "
        f"{other:+.2g}.",
    )
    alike = finite(_by_depth(arrays, RAW)["row_cos"])
    if alike:
        value = sum(alike.values()) / len(alike)
        found["row_cos_raw"] = Headline(
            value, f"Two of the router's rows have cosine {value:+.2g} on average, with what all rows share."
        )
    return found


def _draw_heat_maps(arrays: Arrays, part: str) -> Figure:
    from probes.figures import drawing

    every = by_layer(arrays, "response_relative", part)
    layers = drawing.pick(list(every), PICTURED_LAYERS)
    some = f"; {len(layers)} of {len(every)} layers" if len(layers) < len(every) else ""
    less = ", less what all rows share" if part == CENTRED else ""
    fig, axes = drawing.panel_grid(
        len(layers),
        f"How strongly each expert (column) answers each of the router's rows{less}{some}\n"
        "As a multiple of its answer to a random direction; red on the diagonal: its own row more than others",
    )
    norm = drawing.ratio_norm([every[layer] for layer in layers], share=0.995)
    for ax, layer in zip(axes, layers, strict=True):
        image = drawing.heat_map(ax, every[layer], "RdBu_r", norm=norm)
        for axis in (ax.xaxis, ax.yaxis):
            drawing.index_ticks(axis, range(len(every[layer])))
        ax.set_title(f"layer {layer}, p {float(_at(arrays, 'coupling_p', layer, part)):.2g}", fontsize=10)
        ax.set_xlabel("expert", fontsize=9)
        ax.set_ylabel("row of the router", fontsize=9)
    drawing.colour_bar(fig, image, axes, "response / random direction's", extend="max")
    return fig


def _at(arrays: Arrays, key: str, layer: int, part: str) -> np.ndarray:
    found = find(arrays, key, layer, part)
    assert found is not None
    return found


def _draw_over_depth(arrays: Arrays, part: str) -> Figure:
    from probes.figures import drawing

    values, experts = _by_depth(arrays, part), num_experts(arrays)
    fig = drawing.new_figure(11.5, 3.4, "Router and experts over depth: own against others")
    response, top, rows = fig.subplots(1, 3)
    drawing.depth_line(response, values["matched"], drawing.SERIES[0], "own expert")
    drawing.depth_line(response, values["unmatched"], drawing.SERIES[1], "other experts")
    response.axhline(1, color=drawing.MUTED, lw=1, ls="--")
    response.set_title("response / random direction's", fontsize=10)
    drawing.depth_line(top, values["top1_expert"], drawing.SERIES[0], "rows: own expert answers most")
    drawing.depth_line(top, values["top1_row"], drawing.SERIES[2], "experts: own row answered most")
    drawing.depth_line(top, {layer: 1 / n for layer, n in experts.items()}, drawing.MUTED, "chance, 1/E", dashed=True)
    top.set_ylim(-0.03, 1.05)
    top.set_title("share that agree", fontsize=10)
    drawing.depth_line(rows, _by_depth(arrays, RAW)["row_cos"], drawing.SERIES[3], "as they are")
    if part == CENTRED:
        drawing.depth_line(rows, values["row_cos"], drawing.SERIES[4], "less what all share")
        floor = {layer: -1 / (n - 1) for layer, n in experts.items()}
        drawing.depth_line(rows, floor, drawing.MUTED, "-1/(E - 1), the least", dashed=True)
    rows.set_title("mean cosine of two rows", fontsize=10)
    for ax in (response, top, rows):
        ax.legend(fontsize=7.5, frameon=False)
    return fig
