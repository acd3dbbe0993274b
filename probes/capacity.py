"""Capacity: how many tokens would an expert need, to see one that is as near as those that it got? (LocMoE 2401.13920)

T tokens, E experts, H hidden, δ the cosine of a token with an expert's gate embedding.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, by_part, per_layer
from probes.measures.choices import assignments, chosen_mask
from probes.measures.resampling import LARGEST, unit_notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOUNDS = {"exact": "1 / (E·p)", "erfc": "1 / (E·erfc √q)", "exp": "e^q / E"}
SPHERE = "no interval, as it is what uniform tokens would need, a bound that no text changes but through δ"


def sphere_share(delta: np.ndarray, hidden: int) -> np.ndarray:
    """p = P(∣cos∣ ≥ δ) of a uniform direction with a fixed one: 1 − I_{δ²}(½, (H − 1) / 2)."""
    from scipy.special import betaincc

    return betaincc(0.5, (hidden - 1) / 2, np.clip(np.asarray(delta, np.float64), 0, 1) ** 2)


def capacity_bounds(delta: np.ndarray, hidden: int, experts: int) -> dict[str, np.ndarray]:
    """Fewest tokens of a uniform batch that an expert must receive to expect one with ∣cos∣ ≥ δ (2401.13920).

    ``exact``, 1 / (E·p); ``erfc``, 1 / (E·erfc √q), for large H; ``exp``, e^q / E, which is always below it; with
    q = δ²H / (2 − δ²). ``erfc`` is no bound of ``exact``: at H 384 it is 3 % above it for δ .2, and far below it for
    δ near 1. Infinite where they exceed float64.
    """
    from scipy.special import erfc

    delta = np.asarray(delta, np.float64)
    q = delta**2 * hidden / (2 - delta**2)
    with np.errstate(divide="ignore", over="ignore"):
        found = {"exact": sphere_share(delta, hidden), "erfc": erfc(np.sqrt(q)), "exp": np.exp(-q)}
        return {name: 1 / (experts * share) for name, share in found.items()}


class Capacity(Probe):
    """Nearness of the tokens that an expert was given, and the bound on its capacity that LocMoE derives from it.

    Stored for each layer: ``delta_chosen``, ``delta_max (E,)``, mean and largest ∣cos∣ with the expert's gate embedding
    over the tokens that chose it, NaN where none did; ``load (E,)``, how many did; ``share_measured (E,)``, of all
    tokens, how many are as near as ``delta_chosen`` or nearer, and ``share_sphere (E,)``, of uniform directions;
    ``log10_bound_<which>/<layer>/<of> (E,)``, the three bounds (``exact``, ``erfc``, ``exp``) at either δ (``chosen``,
    ``max``), as powers of ten. Tokens lie on no sphere: the measured share beside p says by how much. Layers without
    gate embeddings are left out.
    """

    name = "capacity"
    question = "How many tokens would an expert need, to see one as near as those it gets?"
    needs = frozenset({Need.ROUTING})

    def update(self, view: LayerView) -> None:
        """Measure one layer's cosines."""
        if view.routing is None or view.gate is None or view.moe_input is None:
            return
        x = F.normalize(view.moe_input.float(), dim=-1)
        gate = F.normalize(view.gate.float(), dim=-1).to(x.device)
        near = F.linear(x, gate).abs().cpu().numpy()  # (T, E)
        chosen = chosen_mask(assignments(view), view.num_experts)  # (T, E)
        load = chosen.sum(axis=0)
        mean = np.divide((near * chosen).sum(axis=0, dtype=np.float64), load, out=_nothing(load), where=load > 0)
        largest = np.where(load > 0, np.where(chosen, near, 0).max(axis=0, initial=0), np.nan)
        self.put("load", view.index, load)
        self.put("delta_chosen", view.index, mean)
        self.put("delta_max", view.index, largest)
        known = load > 0
        share = np.where(known, (near >= np.nan_to_num(mean, nan=2.0)).mean(axis=0), np.nan)
        self.put("share_measured", view.index, share)
        hidden = view.moe_input.shape[1]
        self.put("share_sphere", view.index, np.where(known, sphere_share(np.nan_to_num(mean), hidden), np.nan))
        for part, delta in (("chosen", mean), ("max", largest)):
            for which, bound in capacity_bounds(delta, hidden, view.num_experts).items():
                self.put(f"log10_bound_{which}", view.index, np.log10(bound), part)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Medians over experts, and the bounds beside what the experts get."""
        load = by_layer(arrays, "load")
        if not load:
            return ProbeResult(arrays, notes=["no layer has gate embeddings and text"])
        scalars: dict[str, float] = {}
        for key in ("delta_chosen", "delta_max", "share_measured", "share_sphere"):
            scalars |= per_layer(key, _medians(by_layer(arrays, key)))
        for which in BOUNDS:
            for part, layers in by_part(arrays, f"log10_bound_{which}").items():
                scalars |= per_layer(f"log10_bound_{which}_{part}", _medians(layers))
        scalars |= per_layer("load", {layer: float(value.mean()) for layer, value in load.items()})
        bound = scalars.get("log10_bound_exact_chosen", np.inf)
        headlines = {
            "delta_max": Headline(
                scalars["delta_max"],
                f"The nearest token that an expert is given has a cosine of {scalars['delta_max']:.3f} with its gate "
                f"embedding, the others {scalars['delta_chosen']:.3f} on average (median over experts).",
                no_interval=LARGEST,
            ),
            "bound": Headline(
                bound,
                f"Were tokens uniform on a sphere, an expert would have to be given at least {_power(bound)} to expect "
                f"one as near as its own are on average; it is given {scalars['load']:.0f} of this text. As near are "
                f"{scalars['share_measured']:.2%} of the tokens, where of a sphere {scalars['share_sphere']:.2%} were.",
                no_interval=SPHERE,
            ),
        }
        pictures = {"bounds": partial(_draw, arrays)}
        return ProbeResult(arrays, scalars, headlines, pictures, unit_notes(arrays, headlines))


def _nothing(like: np.ndarray) -> np.ndarray:
    return np.full(like.shape, np.nan)


def _medians(values: dict[int, np.ndarray]) -> dict[int, float]:
    """Over the experts that any token chose, and of what float64 can hold."""
    finite = {layer: value[np.isfinite(value)] for layer, value in values.items()}
    return {layer: float(np.median(value)) for layer, value in finite.items() if len(value)}


def _power(log10: float) -> str:
    if not np.isfinite(log10):
        return "more tokens than can be counted"
    return f"{10**log10:.3g} tokens" if log10 < 6 else f"10^{log10:.0f} tokens"


def _draw(arrays: Arrays) -> Figure:
    from matplotlib.ticker import MaxNLocator

    from probes.figures import drawing

    fig = drawing.new_figure(12.0, 3.6, "Cosines of tokens with their experts, and the capacity that they stand for")
    left, right = fig.subplots(1, 2)
    for key, colour, label in (
        ("delta_max", drawing.SERIES[1], "the nearest"),
        ("delta_chosen", drawing.SERIES[0], "on average"),
    ):
        drawing.depth_line(left, _medians(by_layer(arrays, key)), colour, label)
    left.set_ylabel("∣cos∣ with the gate embedding", fontsize=9)
    left.set_ylim(bottom=0)
    left.legend(fontsize=8, frameon=False)
    for (which, formula), colour in zip(BOUNDS.items(), drawing.SERIES, strict=False):
        parts = by_part(arrays, f"log10_bound_{which}")
        label = f"needed at the average cosine, {formula}"
        drawing.depth_line(right, _medians(parts.get("chosen", {})), colour, label, dashed=which == "erfc")
    furthest = _medians(by_part(arrays, "log10_bound_exact").get("max", {}))
    drawing.depth_line(right, furthest, drawing.SERIES[3], f"needed at the nearest, {BOUNDS['exact']}")
    load = {layer: float(np.log10(max(value.mean(), 1))) for layer, value in by_layer(arrays, "load").items()}
    drawing.depth_line(right, load, drawing.MUTED, "tokens that an expert got", dashed=True)
    right.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # whole powers of ten
    right.yaxis.set_major_formatter(lambda power, _: f"{10**power:.3g}")
    right.set_ylabel("tokens an expert", fontsize=9)
    right.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig
