"""Norm against score: does the router choose the experts whose outputs are large? (2406.18219, section 5.2)

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moebed.views import ExpertView, LayerView, Need
from probes.base import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURED_LAYERS = 11
READABLE_COUNT = 50  # a cell of 50 tokens is within 14 % of chance by chance


class NormVsScore(Probe):
    """Every routed expert is run on every token; its output norm is ranked against its router score, both in float32.

    Stored for each layer: ``output_norm (T, E)``, L2 norm of the unweighted output; ``rank_count_score_by_norm``
    (E, E), tokens whose expert of score rank i (row) has norm rank j (column), 0 = smallest, ties by expert index;
    ``spearman``, mean over tokens of the rank correlation over experts, ties averaged, 0 for a token whose ranks are
    all tied; ``topk_overlap``, P(an expert of the top K by norm is in the top K by score); ``topk_overlap_random``,
    K/E. Stored once for each number of experts: ``rank_count_all_layers/<E>``, summed over the layers with E experts.
    """

    name = "norm_vs_score"
    question = "Does the router choose the experts whose outputs are large?"
    needs = frozenset({Need.ROUTING, Need.OUTPUTS})

    def __init__(self) -> None:
        super().__init__()
        self._norms: list[Tensor] = []

    def update_expert(self, view: LayerView, expert: ExpertView) -> None:
        """Keep the norm of one expert's outputs; the shared expert has no score."""
        if expert.index < view.num_experts:
            assert expert.output is not None
            self._norms.append(torch.linalg.vector_norm(expert.output.float(), dim=-1))  # (T,)

    def update(self, view: LayerView) -> None:
        """Compare norms with scores of one layer."""
        if view.routing is None:
            return
        norm = torch.stack(self._norms, dim=1)  # (T, E)
        self._norms.clear()
        score = view.routing.router_probs.float()
        experts, chosen = view.num_experts, view.num_experts_per_tok
        cell = _rank(score) * experts + _rank(norm)
        count = torch.bincount(cell.flatten(), minlength=experts**2).view(experts, experts)
        both = count[experts - chosen :, experts - chosen :].sum().item()
        self.arrays |= {
            f"output_norm/{view.index}": norm.cpu().numpy(),
            f"rank_count_score_by_norm/{view.index}": count.cpu().numpy(),
            f"spearman/{view.index}": np.asarray(rank_correlation(score, norm).mean().item(), np.float32),
            f"topk_overlap/{view.index}": np.asarray(both / (len(norm) * chosen), np.float32),
            f"topk_overlap_random/{view.index}": np.asarray(chosen / experts, np.float32),
        }

    def compute(self) -> ProbeResult:
        """The result, with the counts of equally wide layers summed."""
        for count in by_layer(self.arrays, "rank_count_score_by_norm").values():
            key = f"rank_count_all_layers/{len(count)}"
            self.arrays[key] = self.arrays.get(key, 0) + count
        return super().compute()

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Rank correlations and overlaps, and the rank pictures."""
        rho = {layer: float(value) for layer, value in by_layer(arrays, "spearman").items()}
        if not rho:
            return ProbeResult(arrays, notes=["no layer has routed experts"])
        overlap = {layer: float(value) for layer, value in by_layer(arrays, "topk_overlap").items()}
        random = {layer: float(value) for layer, value in by_layer(arrays, "topk_overlap_random").items()}
        scalars = per_layer("spearman", rho) | per_layer("topk_overlap", overlap)
        blind = sum(random.values()) / len(random)
        mean_rho = scalars["spearman"]
        kind = "tends to prefer" if mean_rho > 0.1 else "tends to avoid" if mean_rho < -0.1 else "does not look for"
        headlines = {
            "spearman": Headline(
                mean_rho,
                f"The router {kind} experts with large outputs: rank correlation {mean_rho:+.2f} "
                "between score and output norm (1 same order, 0 unrelated).",
            ),
            "topk_overlap": Headline(
                scalars["topk_overlap"],
                f"{scalars['topk_overlap']:.0%} of the experts with the K largest outputs are among the K best scored; "
                f"{blind:.0%} if the two were unrelated.",
            ),
        }
        pictures = {
            "rank_counts": partial(_draw_rank_counts, arrays),
            "over_depth": partial(_draw_over_depth, rho, overlap, random),
        }
        return ProbeResult(arrays, scalars, headlines, pictures)


def _rank(values: Tensor) -> Tensor:
    """Rank of each entry in its row, 0 = smallest, ties by index: (T, E) int64."""
    return values.argsort(dim=-1, stable=True).argsort(dim=-1)


def _average_rank(values: Tensor) -> Tensor:
    """Rank of each entry in its row, tied entries sharing the mean of their ranks: (T, E) float64."""
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values.contiguous())
    upto = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + upto - 1).double() / 2


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rho of each row of a and b (T, E): (T,) float64; 0 where a row is all tied."""
    x, y = _average_rank(a), _average_rank(b)
    x, y = x - x.mean(dim=-1, keepdim=True), y - y.mean(dim=-1, keepdim=True)
    size = (x.square().sum(dim=-1) * y.square().sum(dim=-1)).sqrt()
    return torch.where(size > 0, (x * y).sum(dim=-1) / size.clamp(min=1e-12), 0.0)


def _grouped(count: np.ndarray) -> tuple[np.ndarray, int]:
    """Counts (E, E) with neighbouring ranks put together until a cell's mean count stands out of chance; group size."""
    experts = len(count)
    sizes = [size for size in range(1, experts) if experts % size == 0 and (size == 1 or experts // size >= 4)]
    size = next((size for size in sizes if count.mean() * size**2 >= READABLE_COUNT), sizes[-1])
    groups = experts // size
    return count.reshape(groups, size, groups, size).sum(axis=(1, 3)), size


def _draw_rank_counts(arrays: Arrays) -> Figure:
    from probes import figures

    counts = by_layer(arrays, "rank_count_score_by_norm")
    panels = {
        "all layers" + (f" with {experts} experts" if len({len(c) for c in counts.values()}) > 1 else ""): count
        for experts, count in by_layer(arrays, "rank_count_all_layers").items()
    }
    panels |= {f"layer {layer}": counts[layer] for layer in figures.pick(list(counts), PICTURED_LAYERS)}
    grouped = {name: _grouped(count) for name, count in panels.items() if len(count) > 1}
    if not grouped:
        return figures.new_figure(6.5, 1.0, "Every layer has one expert: there are no ranks to compare")
    relative = {name: count / count.sum(axis=1, keepdims=True) * len(count) for name, (count, _) in grouped.items()}
    fig, axes = figures.panel_grid(
        len(relative),
        "Given an expert's rank by score (row), how often does it have each rank by output norm (column)?\n"
        "As a multiple of chance; red along the dashed diagonal: the higher the norm, the higher the score",
    )
    norm = figures.ratio_norm(list(relative.values()), share=0.995)
    for ax, (name, values) in zip(axes, relative.items(), strict=True):
        image = figures.heat_map(ax, values, norm=norm, cmap="RdBu_r", origin="lower")
        ax.plot([0, len(values) - 1], [0, len(values) - 1], color=figures.INK, lw=0.8, ls="--", alpha=0.6)
        ax.set_title(name, fontsize=10)
        ranks = range(0, len(values) * grouped[name][1], grouped[name][1])
        figures.index_ticks(ax.xaxis, ranks)
        figures.index_ticks(ax.yaxis, ranks)
        ax.set_xlabel("rank by norm (0 = smallest)", fontsize=8)
        ax.set_ylabel("rank by score", fontsize=8)
    figures.colour_bar(fig, image, axes, "frequency / chance (1 = unrelated)", extend="max")
    return fig


def _draw_over_depth(rho: dict[int, float], overlap: dict[int, float], random: dict[int, float]) -> Figure:
    from probes import figures

    fig = figures.new_figure(9.5, 3.3, "Do large outputs go with high scores? Over depth")
    left, right = fig.subplots(1, 2)
    figures.depth_line(left, rho, figures.SERIES[0], "mean over tokens")
    left.axhline(0, color=figures.MUTED, ls="--", lw=1)
    left.set_ylim(-1.05, 1.05)
    left.set_title("Spearman's rho of score and output norm", fontsize=10)
    figures.depth_line(right, overlap, figures.SERIES[1], "measured")
    figures.depth_line(right, random, figures.MUTED, "chance, K/E", dashed=True)
    right.set_ylim(0, 1.05)
    right.set_title("overlap of top K by score and top K by norm", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    return fig
