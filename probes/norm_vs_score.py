"""Norm against score: does the router choose the experts whose outputs are large? (2406.18219, section 5.2)

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moebed.model.config import ModelConfig
from moebed.views.layer import ExpertKind, ExpertView, LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, numbers, per_layer
from probes.figures.experts_by_token import draw_norms
from probes.measures.ranks import correlation, joined, rankable, ranks
from probes.measures.resampling import SHARE, interval_of, keep, unit_notes, units_of
from probes.measures.short_texts import keep_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURED_LAYERS = 11
READABLE_COUNT = 50  # a cell of 50 tokens is within 14 % of chance by chance


class NormVsScore(Probe):
    """Every routed expert is run on every token; its output norm is ranked against its router score, both in float32.

    Stored for each layer: ``output_norm (T, E)``, L2 norm of the unweighted output; ``rank_count_score_by_norm`` (E,
    E), tokens whose expert of score rank i (row) has norm rank j (column), 0 = smallest, ties by expert index, copies
    of an expert too;
    ``ranked``, the share of tokens at which there is something to rank, since neither all norms nor all scores are
    equal; the others are left out of all that follows. ``spearman``, mean over tokens of the rank correlation over
    experts, ties averaged; ``topk_overlap``, P(an expert of the top K by norm is in the top K by score);
    ``topk_overlap_random``, K/E; where a dense reference is given, ``dense_ffn_output_norm (T,)``, the norm of what its
    FFN made of the dense model's own hidden states. Stored once for each number of experts:
    ``rank_count_all_layers/<E>``, summed over the layers with E experts. Of texts of up to 12 tokens also ``score (T,
    E)``, the router's, and stored once ``token_ids (T,)`` and ``token_text (T,)``.
    """

    name = "norm_vs_score"
    question = "Does the router choose the experts whose outputs are large?"
    needs = frozenset({Need.ROUTING, Need.OUTPUTS})

    def begin_layer(self, view: LayerView) -> None:
        """Norms (T,) of the outputs of this layer's experts, by what they are."""
        self._norms: dict[ExpertKind, list[Tensor]] = {kind: [] for kind in ExpertKind}

    @classmethod
    def token_bytes(cls, config: ModelConfig, layer: int | None) -> int:
        """Its norms."""
        return 0 if layer is None else 4 * config.layer(layer).num_experts

    def update_expert(self, view: LayerView, expert: ExpertView) -> None:
        """Keep the norm of one expert's outputs."""
        self._norms[expert.kind].append(torch.linalg.vector_norm(expert.output.float(), dim=-1))

    def update(self, view: LayerView) -> None:
        """Compare norms with scores of one layer."""
        if view.routing is None:
            return
        norm = torch.stack(self._norms[ExpertKind.ROUTED], dim=1).cpu().numpy()  # (T, E)
        score = view.routing.router_probs.float().cpu().numpy()
        experts, chosen = view.num_experts, view.num_experts_per_tok
        by_score, by_norm = ranks(joined(score)), ranks(joined(norm))
        told = rankable(score) & rankable(norm) & (experts > 1)  # (T,)
        self.put("output_norm", view.index, norm)
        if experts > 1:
            self.put("ranked", view.index, told.mean() if len(told) else 0.0)
        for dense in self._norms[ExpertKind.REFERENCE]:
            self.put("dense_ffn_output_norm", view.index, dense)
        if keep_tokens(self.arrays, view):
            self.put("score", view.index, score.copy())
        if not told.any():
            return
        units = units_of(view.text, len(norm))
        rho = np.where(told, correlation(by_score, by_norm), np.nan)
        top = experts - chosen
        overlap = ((by_score.whole >= top) & (by_norm.whole >= top)).sum(axis=1) / chosen
        overlap = np.where(told, overlap, np.nan)
        keep(self, "spearman", view.index, float(np.nanmean(rho)), units.means_without(rho))
        keep(self, "topk_overlap", view.index, float(np.nanmean(overlap)), units.means_without(overlap))
        self.arrays |= units.arrays()
        cell = torch.from_numpy((by_score.whole * experts + by_norm.whole)[told])
        count = torch.bincount(cell.flatten(), minlength=experts**2).view(experts, experts).numpy()
        self.put("rank_count_score_by_norm", view.index, count)
        self.put("topk_overlap_random", view.index, chosen / experts)

    def compute(self) -> ProbeResult:
        """The result, with the counts of equally wide layers summed."""
        for count in by_layer(self.arrays, "rank_count_score_by_norm").values():
            before = by_layer(self.arrays, "rank_count_all_layers").get(len(count), 0)  # by the number of experts
            self.put("rank_count_all_layers", len(count), before + count)
        return super().compute()

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Rank correlations and overlaps, and the rank pictures."""
        rho, told = numbers(arrays, "spearman"), numbers(arrays, "ranked")
        notes = [
            f"layer {layer}: at {1 - share:.0%} of the tokens all experts have the same norm or the same score: there "
            "is nothing to rank, and they are left out"
            for layer, share in told.items()
            if share < 1
        ]
        if not rho:
            drawn = {"tokens": partial(draw_norms, arrays)} if by_layer(arrays, "score") else {}
            return ProbeResult(arrays, figures=drawn, notes=notes or ["no layer has two routed experts to rank"])
        overlap, random = numbers(arrays, "topk_overlap"), numbers(arrays, "topk_overlap_random")
        scalars = per_layer("spearman", rho) | per_layer("topk_overlap", overlap)
        blind = sum(random.values()) / len(random)
        mean_rho = scalars["spearman"]
        kind = "tends to prefer" if mean_rho > 0.1 else "tends to avoid" if mean_rho < -0.1 else "does not look for"
        headlines = {
            "spearman": Headline(
                mean_rho,
                f"The router {kind} experts with large outputs: rank correlation {mean_rho:+.2f} "
                "between score and output norm (1 same order, 0 unrelated).",
                interval_of(arrays, "spearman", mean_rho, within=(-1.0, 1.0)),
            ),
            "topk_overlap": Headline(
                scalars["topk_overlap"],
                f"{scalars['topk_overlap']:.0%} of the experts with the K largest outputs are among the K best scored; "
                f"{blind:.0%} if the two were unrelated.",
                interval_of(arrays, "topk_overlap", scalars["topk_overlap"], within=SHARE),
            ),
        }
        pictures = {
            "rank_counts": partial(_draw_rank_counts, arrays),
            "over_depth": partial(_draw_over_depth, rho, overlap, random),
        }
        if by_layer(arrays, "score"):
            pictures["tokens"] = partial(draw_norms, arrays)
        return ProbeResult(arrays, scalars, headlines, pictures, notes + unit_notes(arrays, headlines))


def _grouped(count: np.ndarray) -> tuple[np.ndarray, int]:
    """Counts (E, E) with neighbouring ranks put together until a cell's mean count stands out of chance; group size."""
    experts = len(count)
    sizes = [size for size in range(1, experts) if experts % size == 0 and (size == 1 or experts // size >= 4)]
    size = next((size for size in sizes if count.mean() * size**2 >= READABLE_COUNT), sizes[-1])
    groups = experts // size
    return count.reshape(groups, size, groups, size).sum(axis=(1, 3)), size


def _draw_rank_counts(arrays: Arrays) -> Figure:
    from probes.figures import drawing

    counts = by_layer(arrays, "rank_count_score_by_norm")
    panels = {
        "all layers" + (f" with {experts} experts" if len({len(c) for c in counts.values()}) > 1 else ""): count
        for experts, count in by_layer(arrays, "rank_count_all_layers").items()
    }
    panels |= {f"layer {layer}": counts[layer] for layer in drawing.pick(list(counts), PICTURED_LAYERS)}
    grouped = {name: _grouped(count) for name, count in panels.items() if len(count) > 1}
    if not grouped:
        return drawing.new_figure(6.5, 1.0, "Every layer has one expert: there are no ranks to compare")
    relative = {name: count / count.sum(axis=1, keepdims=True) * len(count) for name, (count, _) in grouped.items()}
    fig, axes = drawing.panel_grid(
        len(relative),
        "Given an expert's rank by score (row), how often does it have each rank by output norm (column)?\n"
        "As a multiple of chance; red along the dashed diagonal: the higher the norm, the higher the score",
    )
    norm = drawing.ratio_norm(list(relative.values()), share=0.995)
    for ax, (name, values) in zip(axes, relative.items(), strict=True):
        image = drawing.heat_map(ax, values, norm=norm, cmap="RdBu_r", origin="lower")
        ax.plot([0, len(values) - 1], [0, len(values) - 1], color=drawing.INK, lw=0.8, ls="--", alpha=0.6)
        ax.set_title(name, fontsize=10)
        ranks = range(0, len(values) * grouped[name][1], grouped[name][1])
        drawing.index_ticks(ax.xaxis, ranks)
        drawing.index_ticks(ax.yaxis, ranks)
        ax.set_xlabel("rank by norm (0 = smallest)", fontsize=8)
        ax.set_ylabel("rank by score", fontsize=8)
    drawing.colour_bar(fig, image, axes, "frequency / chance (1 = unrelated)", extend="max")
    return fig


def _draw_over_depth(rho: dict[int, float], overlap: dict[int, float], random: dict[int, float]) -> Figure:
    from probes.figures import drawing

    fig = drawing.new_figure(9.5, 3.3, "Do large outputs go with high scores? Over depth")
    left, right = fig.subplots(1, 2)
    drawing.depth_line(left, rho, drawing.SERIES[0], "mean over tokens")
    left.axhline(0, color=drawing.MUTED, ls="--", lw=1)
    left.set_ylim(-1.05, 1.05)
    left.set_title("Spearman's rho of score and output norm", fontsize=10)
    drawing.depth_line(right, overlap, drawing.SERIES[1], "measured")
    drawing.depth_line(right, random, drawing.MUTED, "chance, K/E", dashed=True)
    right.set_ylim(0, 1.05)
    right.set_title("overlap of top K by score and top K by norm", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    return fig
