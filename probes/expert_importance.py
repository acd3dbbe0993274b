"""Expert importance: which experts does the model need? (REAP, 2510.13999; masking one expert at a time)

T tokens, E routed experts, K experts per token.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from moebed.machine.float64 import double
from moebed.views.layer import ExpertKind, ExpertView, LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, finite, per_layer
from probes.figures import importance
from probes.measures.ranks import EQUAL, correlation, rankable, ranks
from probes.measures.resampling import LARGEST, unit_notes

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

    def begin_layer(self, view: LayerView) -> None:
        """Norms (T,) of the outputs of this layer's routed experts."""
        self._norms: list[Tensor] = []

    def update_expert(self, view: LayerView, expert: ExpertView) -> None:
        """Keep the norm of one expert's outputs."""
        if expert.kind is ExpertKind.ROUTED:
            self._norms.append(torch.linalg.vector_norm(expert.output.float(), dim=-1))  # (T,)

    def update(self, view: LayerView) -> None:
        """Weigh one layer's experts."""
        if view.routing is None or not self._norms:
            return
        index, weight = view.routing.topk_index, view.routing.topk_weight.float()
        added = weight * torch.stack(self._norms, dim=1).gather(1, index)  # (T, K)
        stands = view.routing.assigned
        cell, wide = index[stands], double(added[stands])
        count = torch.bincount(cell, minlength=view.num_experts).cpu().numpy()  # (E,)
        total = torch.bincount(cell.to(wide.device), wide, minlength=view.num_experts).cpu().numpy()
        self.put("reap", view.index, total / np.maximum(count, 1))
        self.put("count", view.index, count)
        if view.ablate is None or view.num_experts <= view.num_experts_per_tok:
            return
        whole = double(view.ablate(-1))
        if bool(whole.isnan().all()):
            self.put("no_target", view.index, 1)
            return
        rise, error = [], []
        for expert in range(view.num_experts):
            change = double(view.ablate(expert)) - whole
            change = change[~change.isnan()]  # the last token of a sequence has nothing to predict
            rise.append(float(change.mean()))
            error.append(float(change.std() / len(change) ** 0.5) if len(change) > 1 else 0.0)
        self.put("ablation_loss", view.index, np.array(rise))
        self.put("ablation_error", view.index, np.array(error))

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
        pictures = {"reap": partial(importance.draw_reap, relative, counts)}
        rises = by_layer(arrays, "ablation_loss")
        if not rises:
            why = NO_TARGET if by_layer(arrays, "no_target") else NO_ABLATION
            return ProbeResult(arrays, scalars, headlines, pictures, [*notes, why, *unit_notes(arrays, headlines)])
        scalars |= per_layer("ablation_loss_max", {layer: float(rise.max()) for layer, rise in rises.items()})
        scalars |= per_layer("ablation_loss_mean", {n: float(v.mean(dtype=np.float64)) for n, v in rises.items()})
        agreement = finite({n: _agreement(reap[n] * counts[n], rise) for n, rise in rises.items()})
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
        pictures["ablation"] = partial(importance.draw_ablation, rises)
        pictures["reap_vs_ablation"] = partial(importance.draw_agreement, arrays)
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
    return float(correlation(ranks(one, within=EQUAL), ranks(other, within=EQUAL))[0])
