"""Where norms come from: the token's size, the expert, or the token's direction as the expert sees it?

A router that chooses by norms (AoE 2501.13074, CompeteSMoE 2402.02526) compares the experts at one token, so what the
norm of the token's own hidden state does to all of them alike cannot carry its choice.

T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, find, per_layer
from probes.measures.ranks import ONE_NORM
from probes.measures.resampling import SHARE, WITHOUT, Units, interval_of, unit_notes, units_of, without

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("input", "token", "expert", "choice")  # in the order of the stored shares
LABELS = (
    "norm of the hidden state",
    "token, beyond that norm",
    "expert, whatever the token",
    "which expert meets which token",
)
ROUNDING = 1e-5  # logarithms that differ by less are equal in float32
KINDS = {"norm": "log norm of the experts' outputs", "score": "log score of the router"}


class NormOrigin(Probe):
    """The variance of the log of ‖E_i(x)‖ over tokens and experts, split into four parts that add up to 1.

    Stored for each layer: ``input_norm (T,)``, ‖x‖₂ of the normalised hidden state that router and experts see;
    ``norm_share (4,)`` in the order ``input``, what a straight line in log ‖x‖ explains (nothing, where all inputs have
    one norm within a thousandth); ``token``, the rest of what
    depends on the token alone; ``expert``, what depends on the expert alone; ``choice``, what is left. Where every
    logit of the router is positive, as norms are, ``score_share (4,)``, the same of the logarithm of the logits. A
    token at which an expert has the norm 0 is left out; a layer where all are equal has no shares.
    """

    name = "norm_origin"
    question = "Does the norm of an output come from the token, the expert, or how they meet?"
    needs = frozenset({Need.ROUTING})  # the outputs are looked at by its source
    sources = ("norm_vs_score",)

    def update(self, view: LayerView) -> None:
        """Keep the norms of what the experts see, and split those of scores that may be norms."""
        if view.routing is None or view.moe_input is None:
            return
        seen = torch.linalg.vector_norm(view.moe_input.float(), dim=-1).cpu().numpy()
        self.put("input_norm", view.index, seen)
        units = units_of(view.text, len(seen))
        self.arrays |= units.arrays()
        self.put("unit", view.index, units.of_token.astype(np.int16))
        scores = view.routing.router_logits.float().cpu().numpy()
        if (scores > 0).all():
            self._keep("score", view.index, scores, seen)

    def derive(self, found: Mapping[str, Arrays]) -> None:
        """Split the norms of the outputs."""
        for layer, norms in by_layer(found["norm_vs_score"], "output_norm").items():
            if (seen := find(self.arrays, "input_norm", layer)) is not None:
                self._keep("norm", layer, norms, seen)

    def _keep(self, kind: str, layer: int, values: np.ndarray, seen: np.ndarray) -> None:
        units = Units(by_layer(self.arrays, "unit")[layer].astype(np.int64), self.arrays["unit_stratum"])
        shares = shares_by_unit(values, seen, units)
        if shares is not None:
            self.put(f"{kind}_share", layer, shares[0])
            self.put(f"{kind}_choice{WITHOUT}", layer, shares[1:, -1])

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Means over layers, in words."""
        scalars: dict[str, float] = {}
        headlines: dict[str, Headline] = {}
        for kind, what in KINDS.items():
            shares = by_layer(arrays, f"{kind}_share")
            if not shares:
                continue
            for part, name in enumerate(PARTS):
                scalars |= per_layer(f"{kind}_{name}", {layer: float(share[part]) for layer, share in shares.items()})
            size, token, expert, choice = (scalars[f"{kind}_{name}"] for name in PARTS)
            headlines[f"{kind}_choice"] = Headline(
                choice,
                f"Of the variance of the {what}, the hidden state's norm explains {size:.0%}, the token otherwise "
                f"{token:.0%}, the expert {expert:.0%}; {choice:.0%} is which expert meets which token, by direction.",
                interval_of(arrays, f"{kind}_choice", choice, within=SHARE),
            )
        if not headlines:
            return ProbeResult(arrays, notes=["no layer has seen text with experts whose norms differ"])
        pictures = {"over_depth": partial(_draw_over_depth, arrays)}
        return ProbeResult(arrays, scalars, headlines, pictures, unit_notes(arrays, headlines))


def shares_by_unit(values: np.ndarray, seen: np.ndarray, units: Units) -> np.ndarray | None:
    """Split the variance of log values over tokens and experts.

    Tokens and experts are crossed, so that means of rows, means of columns, and what is left are orthogonal.

    Args:
        values: (T, E), not negative.
        seen: (T,) norms of the tokens, not negative.
        units: Of the text.

    Returns: (1 + U, 4) float32, in the order of PARTS, each with sum 1: of the whole text, and without each unit in
    turn (NaN where nothing is left); None where there is no variance.
    """
    usable = (values > 0).all(axis=1) & (seen > 0)
    logs, size = np.log(values[usable].astype(np.float64)), np.log(seen[usable].astype(np.float64))
    if not len(logs) or logs.max() - logs.min() <= ROUNDING:
        return None
    logs, size = logs - logs.mean(), size - size.mean()  # so that differences of sums lose nothing
    if size.max() - size.min() <= ONE_NORM:
        size[:] = 0.0
    of_token = logs.mean(axis=1)
    taken = np.flatnonzero(usable)
    quantities = (
        np.ones(len(logs)),
        np.square(logs).mean(axis=1),
        of_token,
        of_token**2,
        size,
        size**2,
        of_token * size,
    )
    sums = units.sums(np.concatenate([np.stack(quantities, axis=1), logs], axis=1), taken)  # (U, 7 + E)
    both = np.concatenate([sums.sum(axis=0)[None], without(sums, units.stratum)])
    count = both[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        square, token, token2, norm, norm2, cross = (both[:, column] / count for column in range(1, 7))
        total, by_token, by_norm = square - token**2, token2 - token**2, norm2 - norm**2
        line = np.where(by_norm > ROUNDING**2, (cross - token * norm) ** 2 / np.maximum(by_norm, 1e-300), 0.0)
        parts = np.stack([line, by_token - line, (both[:, 7:] / count[:, None]).var(axis=1)], axis=1) / total[:, None]
        parts = np.concatenate([parts, 1 - parts.sum(axis=1, keepdims=True)], axis=1)
    return np.clip(parts, 0, 1).astype(np.float32)


def _draw_over_depth(arrays: Arrays) -> Figure:
    from probes.figures import drawing

    kinds = {kind: by_layer(arrays, f"{kind}_share") for kind in KINDS}
    shown = {kind: shares for kind, shares in kinds.items() if shares}
    layers = max(map(len, shown.values()))
    fig = drawing.new_figure(
        max(5.5, 1.6 + 0.34 * layers) * len(shown), 3.9, "What do norms depend on? Share of their variance"
    )
    axes = fig.subplots(1, len(shown), squeeze=False)[0]
    colours = (drawing.SERIES[0], "#9dbfe3", drawing.MUTED, drawing.SERIES[1])
    for ax, (kind, shares) in zip(axes, shown.items(), strict=True):
        drawing.layer_axis(ax)
        below = np.zeros(len(shares))
        for part, (label, colour) in enumerate(zip(LABELS, colours, strict=True)):
            height = np.array([share[part] for share in shares.values()])
            ax.bar(list(shares), height, bottom=below, width=0.8, color=colour, label=label, lw=0)
            below += height
        ax.set_ylim(0, 1)
        ax.set_title(KINDS[kind], fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return fig
