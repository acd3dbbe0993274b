"""Super experts: does one expert's output dwarf all others, and does the model need it? (super experts; REAP)

T tokens, B texts, E experts, n experts found, R others drawn.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from moebed.views.interventions import Intervention, chosen_experts, mask
from moebed.views.layer import ExpertKind, ExpertView, HeadView, LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, numbers, per_layer
from probes.figures import importance
from probes.measures.effects import Texts, effect_of
from probes.measures.ranks import first_of_largest
from probes.measures.resampling import SEED, few_texts, unit_notes

QUANTILE, OF_LARGEST = 99.5, 10  # above this percentile of all experts, and a tenth of the largest
MASSIVE, OVER_MEDIAN = 100.0, 1000.0  # a residual stream with such a number has massive activations
OTHERS = 20  # experts of the same layer that a found one is compared with
MOST = 8  # found experts that are removed, each by itself


class SuperExperts(Probe):
    """The largest number in each expert's outputs, and the loss without those that stand out.

    Stored for each layer, of an expert's own tokens and before its weight: ``max_abs (E,)``, the largest size of a
    number in its output, 0 without tokens; ``max_at (E, 3)``, where: place in the text and channel, with the place in
    its sequence between; ``max_abs_all (E,)``, the same over all tokens; ``residual_max ()`` and ``residual_median
    ()``, of the sizes in the residual stream that the layer's output is added to. Stored once: ``super (n, 2)``, layer
    and expert of those above the 99.5th percentile and a tenth of the largest; of the first eight ``super_rise (n, B)``
    and ``other_rise (n, R, B)``, sums by text of the loss's rise without it (its output 0), and without each of up to
    20 other experts of its layer, NaN where there are fewer; ``tokens (B,)``, ``text_domain (B,)``.

    The percentile of fewer than 200 experts always leaves exactly one: that something is found says nothing by itself.
    """

    name = "super_experts"
    question = "Does one expert's output dwarf all others, and does the model need it?"
    needs = frozenset({Need.ROUTING, Need.OUTPUTS, Need.PREDICTIONS})

    def begin_layer(self, view: LayerView) -> None:
        """Of this layer's experts."""
        self._own: list[float] = []
        self._all: list[float] = []
        self._at: list[tuple[int, int, int]] = []
        self._chosen = None if view.routing is None else chosen_experts(view.routing)

    def update_expert(self, view: LayerView, expert: ExpertView) -> None:
        """Look for the largest number."""
        if self._chosen is None or view.text is None or expert.kind is not ExpertKind.ROUTED:
            return
        sizes = expert.output.abs()
        tokens = torch.where(self._chosen[:, expert.index])[0]
        self._all.append(float(sizes.max()))
        most, channel = sizes[tokens].max(dim=1) if len(tokens) else (sizes.new_zeros(1), tokens.new_zeros(1))
        place = int(first_of_largest(most.cpu().numpy()[None])[0])
        token = int(tokens[place]) if len(tokens) else -1
        position = int(view.text.position[token]) if token >= 0 else -1
        self._own.append(float(most[place]))
        self._at.append((token, position, int(channel[place]) if token >= 0 else -1))

    def update(self, view: LayerView) -> None:
        """Keep one layer's."""
        if not self._own or view.residual is None:
            return
        sizes: Tensor = view.residual.abs()
        self.put("max_abs", view.index, np.array(self._own))
        self.put("max_abs_all", view.index, np.array(self._all))
        self.put("max_at", view.index, np.array(self._at, dtype=np.int64))
        self.put("residual_max", view.index, float(sizes.max()))
        self.put("residual_median", view.index, float(sizes.median()))

    def update_head(self, head: HeadView) -> None:
        """The loss without each that was found, beside others of its layer."""
        found = stand_out(by_layer(self.arrays, "max_abs"))
        if head.under is None or not len(found):
            return
        self.arrays["super"] = found
        texts = Texts(head.text, head.loss)
        groups = [self._compared(int(layer), int(expert)) for layer, expert in found[:MOST]]
        rises = head.under(list({one.name: one for group in groups for one in group}.values()))
        rest = np.full((len(groups), OTHERS, texts.count), np.nan)
        for row, (_, *others) in enumerate(groups):
            for column, other in enumerate(others):
                rest[row, column] = texts.sums(rises[other.name]).rise
        self.arrays |= {
            "super_rise": np.stack([texts.sums(rises[group[0].name]).rise for group in groups]).astype(np.float32),
            "other_rise": rest.astype(np.float32),
            "tokens": texts.tokens,
            "text_domain": texts.domain,
        }

    def _compared(self, layer: int, expert: int) -> list[Intervention]:
        """Without an expert; without each of some others of its layer."""
        count = len(by_layer(self.arrays, "max_abs")[layer])
        others = [other for other in range(count) if other != expert]
        if len(others) > OTHERS:
            others = sorted(np.random.default_rng((SEED, layer, expert)).choice(others, OTHERS, replace=False).tolist())
        return [mask(one, "zero", [layer]) for one in (expert, *others)]

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Which stand out, whether the residual stream has massive activations, and what their loss costs."""
        sizes = by_layer(arrays, "max_abs")
        if not sizes:
            return ProbeResult(arrays, notes=["no layer with routed experts has seen text"])
        found = arrays.get("super", stand_out(sizes))
        most, median = numbers(arrays, "residual_max"), numbers(arrays, "residual_median")
        massive = [n for n in most if most[n] > MASSIVE and most[n] > OVER_MEDIAN * median[n]]
        scalars = per_layer("max_abs", {n: float(of.max()) for n, of in sizes.items()})
        scalars |= per_layer("residual_max", most) | {"found": float(len(found))}
        count = sum(map(len, sizes.values()))
        named = ", ".join(f"{expert} of layer {layer}" for layer, expert in found[:MOST])
        named = f" ({named})" if named else ""
        first = sum(int(by_layer(arrays, "max_at")[int(n)][int(e), 1] == 0) for n, e in found)
        where = (
            f"massive activations in the residual stream from layer {massive[0]} on"
            if massive
            else "no massive activations in the residual stream, so that nothing is made of it"
        )
        headlines = {
            "found": Headline(
                float(len(found)),
                f"{len(found)} of {count} experts stand out{named}, {first} at the first token of a text; {where}.",
                no_interval="no interval, as it counts what is above a percentile of them all",
            )
        }
        notes = unit_notes(arrays, headlines)
        if 1 < count < 200:
            notes.append(f"the 99.5th percentile of {count} experts always leaves one above it")
        if "super_rise" in arrays and arrays["tokens"].any():
            tokens, domain = arrays["tokens"], arrays["text_domain"]
            without = effect_of(arrays["super_rise"].sum(axis=0), tokens, domain)
            others = arrays["other_rise"].sum(axis=2, dtype=np.float64) / tokens.sum()  # (n, R)
            others, each = others[np.isfinite(others)], len(arrays["super_rise"])
            scalars |= {"rise": without.mean / each} | ({"rise_others": float(others.mean())} if len(others) else {})
            beside = (
                f"without another of its layer by {float(others.mean()):+.3g}" if len(others) else "it has no other"
            )
            ends = None if without.interval is None else (without.interval[0] / each, without.interval[1] / each)
            headlines["rise"] = Headline(
                without.mean / each,
                f"Without one that stands out the loss changes by {without.mean / each:+.3g} nats per token on average "
                f"(p {without.p:.2g} by signs flipped over texts), {beside}.",
                ends,
            )
            notes += few_texts(np.unique(domain[tokens > 0], return_inverse=True)[1])
        figures = {"largest": partial(importance.draw_largest, sizes, found)}
        return ProbeResult(arrays, scalars, headlines, figures, notes)


def stand_out(sizes: dict[int, np.ndarray]) -> np.ndarray:
    """Layer and expert (n, 2) of those above the percentile and a tenth of the largest; the largest first."""
    if not sizes:
        return np.zeros((0, 2), np.int64)
    places = np.array([(layer, expert) for layer, of in sizes.items() for expert in range(len(of))])
    every = np.concatenate(list(sizes.values())).astype(np.float64)
    above = (every > np.percentile(every, QUANTILE)) & (every > every.max() / OF_LARGEST)
    order = np.argsort(-every, kind="stable")
    return places[order[above[order]]].astype(np.int64)
