"""Expert importance: which experts does the model need? (REAP, 2510.13999; masking one expert at a time)

T tokens, E routed experts, K experts per token.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moebed.machine.float64 import double
from moebed.views.layer import ExpertView, LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer
from probes.measures.ranks import correlation, rankable, ranks
from probes.measures.resampling import LARGEST, unit_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_TARGET = "no token is followed by another, so there is no loss that could rise: no expert was masked out"
NO_ABLATION = "no expert was masked out: that needs a whole model in memory and an expert to take the place of another"


NAMED_UP_TO = 8  # experts without tokens


class ExpertImportance(Probe):
    """What an expert adds to its own tokens, and what the model loses without it.

    Stored for each layer: ``reap (E,)``, mean over an expert's own tokens of g·‖E(x)‖, with g its weight as applied, 0
    for an expert without tokens; ``count (E,)``, its tokens. Where the model is in memory as a whole and K < E, also
    ``ablation_loss (E,)``, by how much the loss rises, in nats per token, when the expert is masked out of the choice
    at this layer, and ``ablation_error (E,)``, the standard error of that over tokens. That takes E + 1 passes a layer,
    so this probe runs only where it is asked for by name.
    """

    name = "expert_importance"
    question = "Which experts does the model need?"
    needs = frozenset({Need.ROUTING, Need.OUTPUTS})

    def __init__(self) -> None:
        super().__init__()
        self._norms: list[Tensor] = []

    def update_expert(self, view: LayerView, expert: ExpertView) -> None:
        """Keep the norm of one expert's outputs."""
        if expert.index == 0:  # also where the layer before failed halfway
            self._norms.clear()
        if expert.index < view.num_experts:
            self._norms.append(torch.linalg.vector_norm(expert.output.float(), dim=-1))  # (T,)

    def update(self, view: LayerView) -> None:
        """Weigh one layer's experts."""
        norms, self._norms = self._norms, []
        if view.routing is None or not norms:
            return
        index, weight = view.routing.topk_index, view.routing.topk_weight.float()
        added = weight * torch.stack(norms, dim=1).gather(1, index)  # (T, K)
        stands = view.routing.assigned
        cell, wide = index[stands], double(added[stands])
        count = torch.bincount(cell, minlength=view.num_experts).cpu().numpy()  # (E,)
        total = torch.bincount(cell.to(wide.device), wide, minlength=view.num_experts).cpu().numpy()
        self.arrays[f"reap/{view.index}"] = (total / np.maximum(count, 1)).astype(np.float32)
        self.arrays[f"count/{view.index}"] = count
        if view.ablate is None or view.num_experts <= view.num_experts_per_tok:
            return
        whole = double(view.ablate(-1))
        if bool(whole.isnan().all()):
            self.arrays[f"no_target/{view.index}"] = np.asarray(1, np.int64)
            return
        rise, error = [], []
        for expert in range(view.num_experts):
            change = double(view.ablate(expert)) - whole
            change = change[~change.isnan()]  # the last token of a sequence has nothing to predict
            rise.append(float(change.mean()))
            error.append(float(change.std() / len(change) ** 0.5) if len(change) > 1 else 0.0)
        self.arrays[f"ablation_loss/{view.index}"] = np.asarray(rise, np.float32)
        self.arrays[f"ablation_error/{view.index}"] = np.asarray(error, np.float32)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """How unequal the experts are, and whether the two measures agree."""
        reap, counts = by_layer(arrays, "reap"), by_layer(arrays, "count")
        if not reap:
            return ProbeResult(arrays, notes=["no layer with routed experts has seen text"])
        relative = {layer: _relative(values, counts[layer]) for layer, values in reap.items()}
        ratio = {n: float(np.nanmax(v)) for n, v in relative.items() if np.isfinite(v).any()}
        if not ratio:
            return ProbeResult(arrays, notes=["no token went to any expert"])
        unused = {layer: float((count == 0).mean()) for layer, count in counts.items()}
        scalars = per_layer("reap_max_to_mean", ratio) | per_layer("unused", unused)
        value = scalars["reap_max_to_mean"]
        headlines = {
            "reap_max_to_mean": Headline(
                value,
                f"The expert that adds most to its own tokens adds {value:.1f} times as much as the average one "
                "in use in its layer (1 if all were equal).",
                no_interval=LARGEST,
            )
        }
        notes = [
            f"layer {layer}: no token went to {len(idle)} of {len(count)} experts"
            + (f" ({', '.join(map(str, idle))})" if len(idle) <= NAMED_UP_TO else "")
            for layer, count in counts.items()
            if len(idle := np.flatnonzero(count == 0))
        ]
        pictures = {"reap": partial(_draw_reap, relative, counts)}
        rises = by_layer(arrays, "ablation_loss")
        if not rises:
            why = NO_TARGET if by_layer(arrays, "no_target") else NO_ABLATION
            return ProbeResult(arrays, scalars, headlines, pictures, [*notes, why, *unit_notes(arrays, headlines)])
        scalars |= per_layer("ablation_loss_max", {layer: float(rise.max()) for layer, rise in rises.items()})
        scalars |= per_layer("ablation_loss_mean", {n: float(v.mean(dtype=np.float64)) for n, v in rises.items()})
        agreement = {n: _agreement(reap[n] * counts[n], rise) for n, rise in rises.items()}
        agreement = {n: value for n, value in agreement.items() if np.isfinite(value)}
        scalars |= per_layer("reap_vs_ablation", agreement)
        worst = max(rises, key=lambda layer: float(rises[layer].max()))
        most, mean = float(rises[worst].max()), scalars["ablation_loss_mean"]
        headlines |= {
            "ablation_loss_max": Headline(
                most,
                f"Without expert {int(rises[worst].argmax())} of layer {worst} the loss rises by {most:.3g} nats per "
                f"token, the most of all; without one expert it rises by {mean:.3g} on average.",
                no_interval=LARGEST,
            )
        }
        if agreement:
            value = scalars["reap_vs_ablation"]
            headlines["reap_vs_ablation"] = Headline(
                value,
                "What an expert adds, summed over its tokens, and the loss without it have rank correlation "
                f"{value:+.2f} within a layer (1 same order, 0 unrelated).",
                no_interval="no interval, as ranks of few experts go by steps, and few texts shuffle them",
            )
        else:
            notes.append("the experts add equally much, or the loss rises equally: there is nothing to rank")
        pictures["ablation"] = partial(_draw_ablation, rises)
        pictures["reap_vs_ablation"] = partial(_draw_agreement, arrays)
        return ProbeResult(arrays, scalars, headlines, pictures, notes + unit_notes(arrays, headlines))


def _relative(reap: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Over the mean of the experts in use (E,); NaN for the others."""
    used = count > 0
    mean = reap[used].mean(dtype=np.float64)
    return np.where(used, reap / mean if mean > 0 else 1.0, np.nan)


def _agreement(added: np.ndarray, rise: np.ndarray) -> float:
    """Rank correlation of two rows (E,); NaN where one is all tied."""
    one, other = added[None].astype(np.float64), rise[None].astype(np.float64)
    if not np.isfinite(other).all() or not (rankable(one) & rankable(other))[0]:
        return float("nan")
    return float(correlation(ranks(one), ranks(other))[0])


def _strip(ax: Axes, rows: dict[int, np.ndarray], title: str, **image: Any) -> Any:
    """A row a layer, a column an expert; grey where a layer has fewer experts than the widest."""
    from probes.figures import drawing

    widest = max(map(len, rows.values()))
    values = np.full((len(rows), widest), np.nan)
    for row, found in enumerate(rows.values()):
        values[row, : len(found)] = found
    drawn = drawing.heat_map(ax, values, aspect="auto", **image)
    drawing.index_ticks(ax.xaxis, range(widest))
    drawing.index_ticks(ax.yaxis, list(rows))
    ax.set_xlabel(title, fontsize=9)
    ax.set_ylabel("layer", fontsize=9)
    return drawn


def _size(rows: dict[int, np.ndarray]) -> tuple[float, float]:
    widest = max(map(len, rows.values()))
    return min(13.0, max(9.0, 2.2 + 0.16 * widest)), min(9.0, max(2.9, 1.5 + 0.2 * len(rows)))


def _draw_reap(relative: dict[int, np.ndarray], counts: dict[int, np.ndarray]) -> Figure:
    from probes.figures import drawing

    fig = drawing.new_figure(
        *_size(relative),
        "What an expert adds to its own tokens: mean of weight × output norm (REAP), over its layer's mean\n"
        "(grey with a cross: no token went there; grey: no such expert)",
    )
    ax = fig.subplots()
    norm = drawing.ratio_norm(list(relative.values()), share=0.995)
    image = _strip(ax, relative, "expert", cmap="RdBu_r", norm=norm)
    idle = [(row, e) for row, count in enumerate(counts.values()) for e in np.flatnonzero(count == 0)]
    if idle:
        row, column = np.array(idle).T
        ax.scatter(column, row, marker="x", s=12, color="white", linewidth=0.9)
    drawing.colour_bar(fig, image, ax, "over the layer's mean", extend="max")
    return fig


def _draw_ablation(rises: dict[int, np.ndarray]) -> Figure:
    from probes.figures import drawing

    fig = drawing.new_figure(
        *_size(rises), "By how much the loss rises with one expert masked out of the choice (nats per token)"
    )
    most = max(float(np.abs(values).max()) for values in rises.values()) or 1.0
    ax = fig.subplots()
    image = _strip(ax, rises, "expert masked out", cmap="RdBu_r", vmin=-most, vmax=most)
    drawing.colour_bar(fig, image, ax, "rise of the loss")
    return fig


def _draw_agreement(arrays: Arrays) -> Figure:
    from probes.figures import drawing

    reap, counts, rises = (by_layer(arrays, key) for key in ("reap", "count", "ablation_loss"))
    errors = by_layer(arrays, "ablation_error")
    layers = drawing.pick(list(rises), 8)
    fig, axes = drawing.panel_grid(
        len(layers), "What an expert adds, summed over its tokens, and the loss without it (± standard error)"
    )
    for ax, layer in zip(axes, layers, strict=True):
        drawing.style_axes(ax)
        ax.errorbar(reap[layer] * counts[layer], rises[layer], yerr=errors[layer], fmt="o", ms=3.5,
                    color=drawing.SERIES[0], elinewidth=0.7)  # fmt: skip
        ax.axhline(0, color=drawing.MUTED, lw=1, ls="--")
        ax.set_title(f"layer {layer}", fontsize=10)
        ax.set_xlabel("sum of weight × norm", fontsize=8)
        ax.set_ylabel("rise of the loss (nats)", fontsize=8)
    return fig
