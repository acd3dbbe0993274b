"""Expert outputs: do the experts make the same of a token? (2406.18219, section 5.1 and Figure 2)

T tokens, T' of them taken, E routed experts, E' with the shared expert and the dense reference, K experts per token,
H hidden, P pairs of the E'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moebed.machine.float64 import double
from moebed.views.layer import ExpertKind, ExpertView, LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer
from probes.figures.experts_by_token import draw_similarities
from probes.figures.pictures import draw_heat_maps
from probes.measures.choices import assignments
from probes.measures.expert_matrices import keep_rows, labels_of, num_experts
from probes.measures.output_pairs import angular_similarity, chosen_means, pair_cosines, taken_tokens, to_square
from probes.measures.resampling import SHARE, WITHOUT, as_interval, jackknife, unit_notes, units_of, without
from probes.measures.short_texts import PICTURED_TOKENS, keep_tokens
from probes.measures.similarity import off_diagonal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHORT_TEXT = 64  # tokens up to which the cosines of each one are stored
SHARED, REFERENCE = ExpertKind.SHARED.value, ExpertKind.REFERENCE.value


class ExpertOutputs(Probe):
    """Cosine and angular similarity, 1 − arccos(cos)/π, of all experts' unweighted outputs at each token.

    Rows are the routed experts, then the shared expert and the dense reference FFN, which has seen the dense model's
    own hidden states. All experts' outputs at a token are in memory together: where that would be more than
    ``output_bytes`` for all tokens, an evenly spread part of them is taken.

    Stored for each layer: ``output_angular_mean (E', E')``, mean over the tokens taken, diagonal 1; ``num_experts``, E;
    ``others``, labels of the rows after the routed ones; ``num_tokens``, T; ``tokens_taken (T',)``, indices among the
    T; ``unit (T',)``, which unit of the text each is of (``probes.measures.resampling``); ``pairs_without (U, P)``,
    angular similarity of each pair averaged over the tokens without each unit in turn; where there are such pairs,
    ``token_cos_chosen (T',)``, ``token_cos_other`` and ``token_cos_mixed``, mean cosine over pairs of routed experts of
    which both, none or one are chosen for the token. Of texts of up to 64 tokens also ``output_cos (T, E', E')`` and
    ``chosen (T, K)``, and stored once ``token_ids (T,)`` and ``token_text (T,)``.
    """

    name = "expert_outputs"
    question = "Do the experts make the same of a token?"
    needs = frozenset({Need.ROUTING, Need.OUTPUTS})
    output_bytes = 512 << 20

    def begin_layer(self, view: LayerView) -> None:
        """The experts' outputs by label, and the tokens that they are taken at."""
        self._outputs: dict[str, Tensor] = {}
        if view.moe_input is not None:
            most = view.num_experts + 2  # a shared expert and a reference may follow
            self._taken = taken_tokens(len(view.moe_input), most, view.moe_input.shape[1], self.output_bytes)

    def update_expert(self, view: LayerView, expert: ExpertView) -> None:
        """Keep one expert's output at the tokens taken."""
        every = len(self._taken) == len(expert.output)
        self._outputs[expert.label] = expert.output if every else expert.output[self._taken.to(expert.output.device)]

    def update(self, view: LayerView) -> None:
        """Compare the outputs of one layer's experts."""
        outputs, self._outputs = self._outputs, {}  # they are large
        if view.routing is None or not outputs:
            return
        taken = self._taken
        device = next(iter(outputs.values())).device
        chosen = torch.from_numpy(assignments(view)).to(device)
        short = keep_tokens(self.arrays, view, SHORT_TEXT) and len(taken) == len(chosen)
        units = units_of(view.text, len(chosen))
        unit = torch.from_numpy(units.of_token).to(device)
        pairs = math.comb(len(outputs), 2)
        by_unit = double(torch.zeros(len(units.stratum), pairs, device=device))
        cosines: list[Tensor] = []
        by_token: dict[str, list[Tensor]] = {"chosen": [], "other": [], "mixed": []}
        where = taken.to(device)
        for part, cosine in pair_cosines(list(outputs.values())):
            of = unit[where[part]].to(by_unit.device)
            by_unit.index_add_(0, of, double(angular_similarity(cosine)))
            for kind, mean in chosen_means(cosine, chosen[where[part]], view.num_experts)._asdict().items():
                if mean is not None:
                    by_token[kind].append(mean)
            if short:
                cosines.append(cosine)
        angular, taken_of = by_unit.sum(dim=0), np.bincount(units.of_token[taken.numpy()], minlength=len(units.stratum))
        counted = without(taken_of.astype(np.float64), units.stratum)
        rest = without(by_unit.cpu().numpy(), units.stratum) / np.maximum(counted, 1e-12)[:, None]
        self.arrays |= units.arrays()
        found = {
            f"pairs{WITHOUT}": torch.from_numpy(rest),
            "output_angular_mean": to_square((angular / len(taken)).float(), len(outputs)),
            "tokens_taken": taken,
            "unit": unit[where],
        } | {f"token_cos_{kind}": torch.cat(means) for kind, means in by_token.items() if means}
        if short:
            found |= {"output_cos": to_square(torch.cat(cosines), len(outputs)), "chosen": chosen}
        found["num_tokens"] = torch.tensor(len(chosen))
        for key, value in found.items():
            self.put(key, view.index, value)
        keep_rows(self, view, list(outputs)[view.num_experts :])

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Mean similarities, heat maps of each layer and of each token of a short text."""
        experts = num_experts(arrays)
        if not experts:
            return ProbeResult(arrays, notes=["no layer with routed experts has seen text"])
        angular = by_layer(arrays, "output_angular_mean")
        means = _mean_similarities(angular, labels_of(arrays), experts)
        title = "Angular similarity of the experts' outputs, averaged over tokens (diagonal in grey)"
        pictures = draw_heat_maps({"output": angular}, labels_of(arrays), title, "angular similarity")
        notes = [
            f"layer {layer}: {len(taken)} of {total} tokens, evenly spread, are compared, to bound memory"
            for layer, total in by_layer(arrays, "num_tokens").items()
            if len(taken := by_layer(arrays, "tokens_taken")[layer]) < total
        ]
        cosines = by_layer(arrays, "output_cos")
        if cosines and len(next(iter(cosines.values()))) <= PICTURED_TOKENS:
            pictures["tokens"] = partial(draw_similarities, arrays)
        scalars: dict[str, float] = {}
        headlines = {}
        subjects = {
            "experts": ("mean_angular", "Two experts' outputs at a token"),
            SHARED: ("shared_angular", "The outputs of an expert and the shared one at a token"),
            REFERENCE: ("reference_angular", "The outputs of an expert and of the dense model's FFN at a token"),
        }
        for kind, (key, subject) in subjects.items():
            if means[kind]:
                scalars |= per_layer(key, means[kind])
                value = scalars[key]
                sentence = f"{subject} have angular similarity {value:.3f} on average (1 the same, 0.5 unrelated)."
                rest = [_pairs_of(arrays, kind, layer).mean(axis=1, dtype=np.float64) for layer in means[kind]]
                ends = jackknife(value, np.mean(rest, axis=0), arrays["unit_stratum"], SHARE)
                headlines[key] = Headline(value, sentence, as_interval(ends))
        notes += unit_notes(arrays, headlines)
        if not headlines:
            notes.append("every layer has one expert: no pairs to compare")
            return ProbeResult(arrays, figures=pictures, notes=notes)
        pictures["over_depth"] = partial(_draw_over_depth, means)
        return ProbeResult(arrays, scalars, headlines, pictures, notes)


def _mean_similarities(
    angular: Mapping[int, np.ndarray], labels: Mapping[int, Sequence[str]], experts: Mapping[int, int]
) -> dict[str, dict[int, float]]:
    """Mean over pairs of routed experts, and over pairs of one with the shared expert or the reference, by layer."""
    means: dict[str, dict[int, float]] = {"experts": {}, SHARED: {}, REFERENCE: {}}
    for layer, values in angular.items():
        count = experts[layer]
        if count > 1:
            means["experts"][layer] = float(off_diagonal(values[:count, :count]).mean(dtype=np.float64))
        for row, label in enumerate(labels[layer][count:], start=count):
            means[label][layer] = float(values[row, :count].mean(dtype=np.float64))
    return means


def _pairs_of(arrays: Arrays, kind: str, layer: int) -> np.ndarray:
    """Columns of ``pairs_without`` of the pairs of routed experts, or of those with a row by its label."""
    count, rest = num_experts(arrays)[layer], by_layer(arrays, f"pairs{WITHOUT}")[layer]
    if kind == "experts":
        return rest[:, : count * (count - 1) // 2]
    row = labels_of(arrays)[layer].index(kind)
    return rest[:, row * (row - 1) // 2 :][:, :count]


def _draw_over_depth(means: Mapping[str, Mapping[int, float]]) -> Figure:
    from probes.figures import drawing

    fig = drawing.new_figure(7, 3.4, "Mean angular similarity of outputs over depth")
    ax = fig.subplots()
    names = {"experts": "two experts", SHARED: "expert and shared expert", REFERENCE: "expert and dense FFN"}
    for (kind, name), colour in zip(names.items(), drawing.SERIES, strict=False):
        if means[kind]:
            drawing.depth_line(ax, means[kind], colour, name)
    ax.axhline(0.5, color=drawing.MUTED, lw=1, ls="--", label="unrelated")
    ax.set_ylabel("angular similarity", fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    return fig
