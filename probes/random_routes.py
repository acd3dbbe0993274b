"""Random routes: is the route that a router chose better than random ones of equal compute? (2605.07260)

At one layer and one token at a time, the loss with as many experts drawn at random, their weights by the router's own
rule and scaled to the sum that the token had. The rank of the executed route among them is .5 on average if the router
might as well have drawn, whatever the losses' distribution.

Two ways to look at it mislead, and stand beside what does not. Tokens that are binned by the loss *as executed* are
binned by the luck of the executed route as well: a token is "fragile" where that was bad, and the router then seems to
know nothing of fragile tokens. Here the bins are by the mean loss over all routes, which no route is special for. And
the best of several routes is better than the executed one even where all are alike, since it is chosen by the answer:
the same gap of a random route stands beside it.

T tokens, n of them drawn, S routes, Q bins, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moebed.errors import ConfigError
from moebed.model.config import ModelConfig
from moebed.views.interventions import Intervention, alone, identity, random_set
from moebed.views.layer import HeadView, LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeOptions, ProbeResult, by_layer, numbers, per_layer
from probes.measures.effects import BINS
from probes.measures.ranks import EQUAL, ranks
from probes.measures.resampling import SHARE, WITHOUT, interval_of, jackknife, keep, unit_notes
from probes.measures.row_effects import DrawnTokens, asked_layers, power_said, require_layers
from probes.measures.significance import holm, sign_flip_p

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CALLED = 0.05
GAPS = ("gap", "gap_random")


class RandomRoutes(Probe):
    """The executed route of single tokens among random ones, at each layer.

    Tokens are drawn from the text, the same at each layer. Stored for each layer: ``route_rise (n, S)``, the loss with
    each random route less that with the executed one; ``percentile ()``, mean over tokens of the share of random
    routes that are better, equal ones by half, with ``percentile_without (U,)``; ``percentile_p ()``, of .5, by signs
    flipped over texts; ``by_mean_loss (Q,)``, the same by fifths of the mean loss over all S + 1 routes, from tokens
    that the model is sure of on, with ``by_mean_loss_interval (2, Q)``; ``by_loss (Q,)``, by fifths of the loss as
    executed, equal ones in one fifth, which do not give .5 where routes are alike;
    ``gap ()``, the loss as executed less the best of the S + 1,
    and ``gap_random ()``, that of a random route less the same, both in nats. Stored once: ``loss (n,)``, as executed;
    ``token (n,)``; ``token_sequence (n,)``; ``unit_stratum (U,)``; ``noise ()``, by how much a token's loss changes
    where nothing is changed.
    """

    name = "random_routes"
    question = "Is the route that a router chose better than a random one?"
    needs = frozenset({Need.ROUTING, Need.PREDICTIONS})

    @dataclass(frozen=True)
    class Options(ProbeOptions):
        """How many tokens and routes, and at which layers: numbers with commas between, all if empty."""

        tokens: int = 2000
        routes: int = 8
        layers: str = ""

        def __post_init__(self) -> None:
            super().__post_init__()
            require_layers(self.layers, "random_routes")
            if self.routes < 1 or self.tokens < 1:
                raise ConfigError("probes: random_routes needs at least 1 of routes and of tokens")

    options: Options

    def interventions(self, config: ModelConfig) -> Sequence[Intervention]:
        """The random routes of each layer, and nothing at all."""
        layers = [
            n
            for n in asked_layers(self.options.layers, config.moe_layers)
            if config.layer(n).num_experts > config.layer(n).num_experts_per_tok
        ]
        routes = [route for n in layers for route in self._routes(n)]
        return [self._nothing(layers[0]), *routes] if routes else []

    def _routes(self, layer: int) -> list[Intervention]:
        return [alone(random_set(seed, layers=[layer]), self.options.tokens) for seed in range(self.options.routes)]

    def _nothing(self, layer: int) -> Intervention:
        return alone(identity([layer]), self.options.tokens)

    def update(self, view: LayerView) -> None:
        """Note that a layer can be asked about."""
        asked = view.index in asked_layers(self.options.layers, [view.index])
        if view.routing is not None and view.text is not None and asked and view.num_experts > view.num_experts_per_tok:
            self.put("experts", view.index, view.num_experts)

    def update_head(self, head: HeadView) -> None:
        """The loss with each route."""
        layers = sorted(by_layer(self.arrays, "experts"))
        drawn = DrawnTokens.of(head.text, self.options.tokens)
        if head.under is None or not layers or not len(drawn.token):
            return
        nothing = self._nothing(layers[0])
        found = head.under([nothing, *(route for n in layers for route in self._routes(n))])
        loss = head.loss.cpu().numpy()[drawn.token]
        self.arrays |= drawn.arrays() | {"loss": loss}
        self.put("noise", None, float(np.abs(found[nothing.name].cpu().numpy()[drawn.token]).mean()))
        for layer in layers:
            rise = np.stack([found[one.name].cpu().numpy()[drawn.token] for one in self._routes(layer)], axis=1)
            self.put("route_rise", layer, rise)
            self._rank(layer, loss, rise, drawn)

    def _rank(self, layer: int, loss: np.ndarray, rise: np.ndarray, drawn: DrawnTokens) -> None:
        better = percentiles(rise)
        known = np.isfinite(better)
        if not known.any():
            return
        keep(self, "percentile", layer, float(better[known].mean()), drawn.units.means_without(better))
        self.put("percentile_p", layer, sign_flip_p(drawn.by_text(better - 0.5)))
        mean_loss = loss + rise.sum(axis=1) / (rise.shape[1] + 1)
        by_mean, without = _in_bins(better, mean_loss, drawn)
        self.put("by_mean_loss", layer, by_mean)
        self.put("by_mean_loss_interval", layer, jackknife(by_mean, without, drawn.units.stratum, SHARE))
        self.put("by_loss", layer, _in_bins(better, loss, drawn)[0])
        best = np.minimum(rise.min(axis=1), 0.0)
        for name, gap in zip(GAPS, (-best, rise.mean(axis=1) - best), strict=True):
            keep(self, name, layer, float(np.nanmean(gap)), drawn.units.means_without(gap))

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """The percentile by layer, and of tokens by how sure the model is of them."""
        found = numbers(arrays, "percentile")
        if not found:
            return ProbeResult(arrays, notes=["no layer has a choice of experts, with text that was predicted"])
        p = numbers(arrays, "percentile_p")
        called = [n for n, one in zip(found, holm([p[n] for n in found]), strict=True) if one < CALLED]
        scalars = per_layer("percentile", found) | {"noise": float(arrays["noise"])}
        for name in GAPS:
            scalars |= per_layer(name, numbers(arrays, name))
        value, stratum = scalars["percentile"], arrays["unit_stratum"]
        power = power_said(by_layer(arrays, f"percentile{WITHOUT}").values(), stratum, len(found))
        bins = np.mean(list(by_layer(arrays, "by_mean_loss").values()), axis=0)
        scalars |= {"sure": float(bins[0]), "unsure": float(bins[-1])}
        headlines = {
            "percentile": Headline(
                value,
                f"{value:.1%} of random routes of equal compute are better than the one that was chosen (50 % if the "
                f"router might as well have drawn; called in {len(called)} of {len(found)} layers, signs flipped over "
                f"texts, Holm{power}); {bins[0]:.1%} at the fifth of tokens that the model is surest of, "
                f"{bins[-1]:.1%} at the least sure, by their mean loss over all routes.",
                interval_of(arrays, "percentile", value, within=SHARE),
            ),
            "gap": Headline(
                scalars["gap"],
                f"The best of all routes would have {scalars['gap']:.3g} nats less than the chosen one, and "
                f"{scalars['gap_random']:.3g} less than a random one: it is picked by the answer.",
                interval_of(arrays, "gap", scalars["gap"]),
            ),
        }
        return ProbeResult(
            arrays, scalars, headlines, {"percentile": partial(_draw, arrays)}, unit_notes(arrays, headlines)
        )


def percentiles(rise: np.ndarray) -> np.ndarray:
    """Of rises (n, S) of the loss with random routes, the share (n,) of better ones, equal ones by half."""
    found = (rise < 0).mean(axis=1) + 0.5 * (rise == 0).mean(axis=1)
    return np.where(np.isfinite(rise).all(axis=1), found, np.nan)


def _in_bins(values: np.ndarray, by: np.ndarray, drawn: DrawnTokens) -> tuple[np.ndarray, np.ndarray]:
    """Means (Q,) of values (n,) in fifths by another number (n,), and those without each unit (U, Q)."""
    known = np.isfinite(by)
    place = np.zeros(len(by), np.int64)
    place[known] = ranks(by[known][None], within=EQUAL).shared[0] * BINS / max(known.sum() - 1, 1)
    within = np.minimum(place, BINS - 1)[:, None] == np.arange(BINS)  # (n, Q)
    each = np.where(within, values[:, None], np.nan)
    count = np.maximum(np.isfinite(each).sum(axis=0), 1)
    return np.nansum(each, axis=0) / count, drawn.units.means_without(each)


def _draw(arrays: Arrays) -> Figure:
    from probes.figures import drawing

    found, without = numbers(arrays, "percentile"), by_layer(arrays, f"percentile{WITHOUT}")
    fig = drawing.new_figure(
        10.5, 3.9, "How many random routes of equal compute are better than the chosen one? 95 % over texts"
    )
    left, right = fig.subplots(1, 2)
    drawing.depth_line(left, found, drawing.SERIES[0], "chosen")
    for layer, value in found.items():
        ends = jackknife(value, without[layer], arrays["unit_stratum"], SHARE)
        left.plot([layer, layer], ends, color=drawing.SERIES[0], lw=1.4)
    left.set_title("by layer", fontsize=10)
    places = range(1, BINS + 1)
    by_mean, by_loss = (np.mean(list(by_layer(arrays, key).values()), axis=0) for key in ("by_mean_loss", "by_loss"))
    right.plot(places, by_mean, "o-", ms=4, color=drawing.SERIES[0], label="by mean loss over all routes")
    right.plot(places, by_loss, "o--", ms=4, color=drawing.MUTED, label="by the chosen route's own loss (misleads)")
    right.set_xticks(list(places), ["surest", "2nd", "3rd", "4th", "least sure"], fontsize=8)
    right.set_title("by how sure the model is of the token", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    drawing.style_axes(right)
    for ax in (left, right):
        ax.axhline(0.5, color=drawing.MUTED, lw=1, ls=":")
        ax.set_ylim(0, 1)
    return fig
