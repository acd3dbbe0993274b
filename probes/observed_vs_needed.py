"""Observed against needed: does what is seen of an expert tell whether a token needs it?

An audit of observation against cause. Experts are ranked by how often they are used, how large they answer or how much
they weigh, and taken to matter by it. Here each expert that a token goes to is silenced at that token alone (its output
0, the others keep their weights), and of its experts the one that a metric ranks highest is compared with the one that
it ranks lowest. A published audit of 200 tokens found no metric that tells (all below d = .17), where 80 % power begins
at .27: more tokens are needed, and are had here.

T tokens, n of them drawn, K experts per token, E experts, M metrics, B texts, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moebed.model.config import ModelConfig
from moebed.views.interventions import Intervention, alone, assigned_weights, drop_top, identity
from moebed.views.layer import ExpertKind, ExpertView, HeadView, LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeOptions, ProbeResult, by_layer, per_layer
from probes.measures.ranks import first_of_largest, rankable
from probes.measures.resampling import WITHOUT, as_interval, few_texts, jackknife
from probes.measures.row_effects import DrawnTokens, asked_layers, power_said, require_layers, standardised
from probes.measures.significance import holm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is seen of an expert: first of all its tokens, then of the one token. A token's own weight is the control: what
# is silenced is multiplied with it.
METRICS = {
    "use": "tokens that chose it",
    "mean_weight": "mean weight where chosen",
    "mean_norm": "mean ‖E(x)‖ where chosen",
    "std_norm": "standard deviation of ‖E(x)‖ where chosen",
    "norm": "‖E(x)‖ at this token",
    "weighted_norm": "g·‖E(x)‖ at this token",
    "dla": "what g·E(x) adds to the logit of the token that follows (direct logit attribution)",
    "weight": "g, its weight at this token (the control)",
}
CONTROL = "weight"
CALLED = 0.05


class ObservedVsNeeded(Probe):
    """The loss of single tokens without one of their experts, against what is observed of these.

    Tokens are drawn from the text, the same at each layer. Stored for each layer: ``observed (n, K, M)``, the metrics
    of each token's experts, NaN where it has no further one (what one adds to a logit is over what the norms after it
    divide by, the same for all of a token's experts); ``rise (n, K)``, by how much its loss rises without each;
    ``high_low_d (M,)``, mean over standard deviation of the rise without the expert of the highest value less that
    without the one of the lowest, over tokens where they differ; ``high_low_d_without (U, M)``, ``high_low_interval (2,
    M)``, 95 % over texts; ``high_low_p (M,)``, signs flipped over texts; ``pairs (M,)``, tokens compared. Stored once:
    ``metrics (M,)``, their names; ``token (n,)``; ``token_sequence (n,)``; ``unit_stratum (U,)``; ``noise ()``, by how
    much a token's loss changes where nothing is changed.
    """

    name = "observed_vs_needed"
    question = "Does what is observed of an expert tell whether a token needs it?"
    needs = frozenset({Need.ROUTING, Need.OUTPUTS, Need.PREDICTIONS, Need.ATTRIBUTION})

    @dataclass(frozen=True)
    class Options(ProbeOptions):
        """How many tokens are changed, and at which layers: numbers with commas between, all if empty."""

        tokens: int = 2000
        layers: str = ""

        def __post_init__(self) -> None:
            super().__post_init__()
            require_layers(self.layers, "observed_vs_needed")

    options: Options

    def interventions(self, config: ModelConfig) -> Sequence[Intervention]:
        """Each place of a token's choice silenced in turn, and nothing at all."""
        chosen = {n: config.layer(n).num_experts_per_tok for n in asked_layers(self.options.layers, config.moe_layers)}
        silenced = [self._silenced(place, n) for n, most in chosen.items() if most > 1 for place in range(most)]
        return [self._nothing(min(n for n in chosen if chosen[n] > 1)), *silenced] if silenced else []

    def _silenced(self, place: int, layer: int) -> Intervention:
        return alone(drop_top(place + 1, "zero", [layer]), self.options.tokens)

    def _nothing(self, layer: int) -> Intervention:
        return alone(identity([layer]), self.options.tokens)

    def begin_layer(self, view: LayerView) -> None:
        """Norms of this layer's experts' outputs."""
        self._norm: Tensor | None = None
        asked = view.index in asked_layers(self.options.layers, [view.index])
        if view.routing is not None and view.text is not None and asked:
            self._norm = torch.zeros_like(view.routing.router_logits)  # (T, E)
            self._toward = torch.full_like(self._norm, torch.nan)  # the same, of each expert's own tokens
            self._weight = assigned_weights(view.routing)

    def update_expert(self, view: LayerView, expert: ExpertView) -> None:
        """Measure one expert."""
        if self._norm is not None and expert.kind is ExpertKind.ROUTED:
            self._norm[:, expert.index] = torch.linalg.vector_norm(expert.output, dim=-1)
            if view.attribution is not None:
                rows, weight = view.attribution.following.of_token, self._weight[:, expert.index]
                token = torch.where((rows.to(weight.device) >= 0) & (weight != 0))[0]
                written = expert.output[token] * weight[token, None]
                self._toward[token, expert.index] = view.attribution.toward(written, rows[token.to(rows.device)])

    def update(self, view: LayerView) -> None:
        """What is observed of the experts of the drawn tokens."""
        if self._norm is None or view.routing is None or view.text is None:
            return
        drawn = DrawnTokens.of(view.text, self.options.tokens)
        self.arrays |= drawn.arrays() | {"metrics": np.array(list(METRICS), dtype=np.str_)}
        weight, norm = self._weight, self._norm
        self._norm = None
        token = torch.from_numpy(drawn.token).to(weight.device)
        index = view.routing.topk_index[token, : view.num_experts_per_tok]  # (n, K)
        observed = {
            **{name: of[index] for name, of in _of_experts(weight, norm).items()},
            "norm": norm[token].gather(1, index),
            "weight": weight[token].gather(1, index),
            # Over what the norms after it divide by, which is the same for all of a token's experts.
            "dla": self._toward[token].gather(1, index),
        }
        observed["weighted_norm"] = observed["norm"] * observed["weight"]
        values = torch.stack([observed[name].float() for name in METRICS], dim=2)
        gone = ~view.routing.assigned[token, : view.num_experts_per_tok]
        self.put("observed", view.index, values.masked_fill(gone.unsqueeze(2), torch.nan))

    def update_head(self, head: HeadView) -> None:
        """The loss without each of them."""
        layers = {n: of for n, of in by_layer(self.arrays, "observed").items() if of.shape[1] > 1}
        if head.under is None or not layers:
            return
        drawn = DrawnTokens.of(head.text, self.options.tokens)
        asked = {n: [self._silenced(place, n) for place in range(of.shape[1])] for n, of in layers.items()}
        nothing = self._nothing(min(layers))
        found = head.under([nothing, *(one for some in asked.values() for one in some)])
        noise = found[nothing.name].cpu().numpy()[drawn.token]
        self.put("noise", None, float(np.abs(noise).mean()) if len(noise) else 0.0)
        for layer, observed in layers.items():
            rise = np.stack([found[one.name].cpu().numpy()[drawn.token] for one in asked[layer]], axis=1)
            self.put("rise", layer, rise)
            self._compare(layer, observed, rise, drawn)

    def _compare(self, layer: int, observed: np.ndarray, rise: np.ndarray, drawn: DrawnTokens) -> None:
        pairs = [high_less_low(values, rise) for values in np.moveaxis(observed, 2, 0)]
        found = [standardised(values, drawn) for values in pairs]
        d, without = np.array([one.d for one in found]), np.stack([one.without for one in found], axis=1)
        self.put("high_low_d", layer, d)
        self.put(f"high_low_d{WITHOUT}", layer, without)
        self.put("high_low_interval", layer, jackknife(d, without, drawn.units.stratum))
        self.put("high_low_p", layer, np.array([one.p for one in found]))
        self.put("pairs", layer, np.array([np.isfinite(values).sum() for values in pairs]))

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """d by metric and layer, beside what would have been seen."""
        d = by_layer(arrays, "high_low_d")
        if not any(np.isfinite(of).any() for of in d.values()):
            return ProbeResult(arrays, notes=["no layer sends tokens to two experts or more that could be compared"])
        names, stratum = [str(name) for name in arrays["metrics"]], arrays["unit_stratum"]
        cells = adjusted(arrays)
        without = by_layer(arrays, f"high_low_d{WITHOUT}")
        scalars, headlines = {"noise": float(arrays["noise"])}, {}
        for at, name in enumerate(names):
            known = {layer: float(of[at]) for layer, of in d.items() if np.isfinite(of[at])}
            if not known:
                continue
            scalars |= per_layer(f"d_{name}", known)
            mean, of_mean = float(np.mean(list(known.values()))), np.mean([without[n][:, at] for n in known], axis=0)
            called = [layer for layer in known if cells[layer][at] < CALLED]
            power = power_said((without[n][:, at] for n in known), stratum, len(d) * len(names))
            headlines[f"d_{name}"] = Headline(
                mean,
                f"A token's loss rises by {mean:+.2g} standard deviations more without its expert of the highest than "
                f"without that of the lowest value of: {METRICS[name]}; called in {len(called)} of {len(known)} layers "
                f"(signs flipped over texts, Holm over {len(d) * len(names)}){power}.",
                as_interval(jackknife(mean, of_mean, stratum)),
            )
        return ProbeResult(arrays, scalars, headlines, {"high_low": partial(_draw, arrays)}, few_texts(stratum))


def high_less_low(observed: np.ndarray, rise: np.ndarray) -> np.ndarray:
    """Rise (n,) without the expert of the highest value less that without the one of the lowest; NaN where equal.

    Args:
        observed: (n, K) values of a token's experts, NaN where it has no further one.
        rise: (n, K) of its loss without each.
    """
    known = np.isfinite(observed) & np.isfinite(rise)
    high, low = np.where(known, observed, -np.inf), np.where(known, observed, np.inf)
    tokens, first, last = np.arange(len(rise)), first_of_largest(high), first_of_largest(-low)
    differ = (known.sum(axis=1) > 1) & rankable(np.stack([high[tokens, first], low[tokens, last]], axis=1))
    return np.where(differ, rise[tokens, first] - rise[tokens, last], np.nan)


def adjusted(arrays: Arrays) -> dict[int, np.ndarray]:
    """p (M,) by layer, adjusted for all metrics and layers; 1 where nothing was compared."""
    p, d = by_layer(arrays, "high_low_p"), by_layer(arrays, "high_low_d")
    every = np.concatenate([np.where(np.isfinite(d[layer]), of, 1.0) for layer, of in p.items()])
    parts = np.split(np.array(holm(every.tolist())), len(p))
    return dict(zip(p, parts, strict=True))


def _of_experts(weight: Tensor, norm: Tensor) -> dict[str, Tensor]:
    """What is observed of each expert (E,) over its own tokens, from weights and norms (T, E)."""
    chosen = weight != 0
    count = chosen.sum(dim=0)
    mean = (norm * chosen).sum(dim=0) / count.clamp_min(1)
    return {
        "use": count,
        "mean_weight": weight.sum(dim=0) / count.clamp_min(1),
        "mean_norm": mean,
        "std_norm": (((norm - mean) * chosen).square().sum(dim=0) / count.clamp_min(1)).sqrt(),
    }


def _draw(arrays: Arrays) -> Figure:
    from probes.figures import drawing

    d, ends, cells = by_layer(arrays, "high_low_d"), by_layer(arrays, "high_low_interval"), adjusted(arrays)
    names = [str(name) for name in arrays["metrics"]]
    fig = drawing.new_figure(
        9.5,
        4.2,
        "Does a token need the expert more that is ranked highest? Rise of its loss without that one,\n"
        "less the rise without the lowest, in standard deviations, 95 % over texts; filled: called (Holm)",
    )
    ax = fig.subplots()
    drawing.style_axes(ax)
    for at, name in enumerate(names):
        colour = drawing.MUTED if name == CONTROL else drawing.MANY[at % len(drawing.MANY)]
        places = [layer + (at - len(names) / 2) * 0.09 for layer in d]
        ax.plot(places, [of[at] for of in d.values()], "-", lw=0.7, color=colour, alpha=0.6)
        for place, layer in zip(places, d, strict=True):
            ax.plot([place, place], ends[layer][:, at], color=colour, lw=1.2)
            face = colour if cells[layer][at] < CALLED else "white"
            ax.plot([place], [d[layer][at]], "o", ms=4.5, color=colour, markerfacecolor=face)
        ax.plot([], [], "o", ms=4.5, color=colour, label=METRICS[name])
    ax.axhline(0, color=drawing.MUTED, lw=1, ls="--")
    drawing.layer_axis(ax)
    ax.set_ylabel("d, highest less lowest", fontsize=9)
    ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig
