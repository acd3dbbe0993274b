"""Repeats: does a token go where the one before it went? (Mixtral, arXiv 2401.04088, section 5, Table 5)

T tokens, E experts, K experts per token, B sequences, D domains, R draws.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, numbers, per_layer
from probes.figures.repeats import draw_over_depth, draw_runs
from probes.measures.choices import (
    ALL,
    NONE,
    assignments,
    chosen_mask,
    domain_arrays,
    domain_keys,
    first_middle_last,
    overlap_by_chance,
    sequence_of,
)
from probes.measures.resampling import SHARE, as_interval, few_texts, jackknife, sequence_units, without

LONGEST_RUN = 32
DEEP = 8  # layers with experts from which the first, the middle and the last are named beside the mean
KINDS = {"first": "the same first choice", "any": "an expert in common"}


class Repeats(Probe):
    """How often consecutive tokens of a sequence share an expert, and how long runs of one expert are.

    Stored for each layer and domain, and for ``all``: ``repeat_first``, P(first choice equals that of the token
    before); ``repeat_any``, P(the two tokens' top-K sets have an expert in common); ``repeat_first_interval``,
    ``repeat_any_interval (2,)``, 95 %, sequences being the unit (see ``probes.measures.resampling``), NaN of one
    sequence; ``repeat_first_expected``, Σ p² of the shares p of the first choice: what an uneven load alone makes.
    Stored for each layer: ``random_first``, 1/E, and ``random_any``, 1 − C(E−K, K)/C(E, K); ``pairs``, ``same_first``,
    ``same_any (B,)``, counts by sequence; ``run_length (32,)``, number of runs of 1, 2, ..., 32 or more tokens with
    one first choice; ``mean_run``, and ``mean_run_expected`` if the choices came in random order. Stored once:
    ``domain (B,)``, ``domain_names``, and ``mean_first_interval``, ``mean_any_interval (2,)`` of the mean over layers.

    Tokens on two sides of a sequence's border are not consecutive.
    """

    name = "repeats"
    question = "Do consecutive tokens go to the same experts?"
    needs = frozenset({Need.CHOICES, Need.NEIGHBOURS})

    def update(self, view: LayerView) -> None:
        """Compare each token of a layer with the one before it."""
        if view.routing is None or view.text is None:
            return
        if "domain" not in self.arrays:
            self.arrays |= domain_arrays(view.text)
        index = assignments(view)
        experts, chosen = view.num_experts, view.num_experts_per_tok
        sequence, domain = sequence_of(view.text), self.arrays["domain"]
        mask, first = chosen_mask(index, experts), index[:, 0]
        inside = sequence[1:] == sequence[:-1]  # (T - 1,)
        same = {"first": (first[1:] == first[:-1]) & (first[1:] != NONE), "any": (mask[1:] & mask[:-1]).any(axis=1)}
        pairs = np.bincount(sequence[1:][inside], minlength=len(domain))  # (B,)
        self.put("random_first", view.index, 1 / experts)
        self.put("random_any", view.index, overlap_by_chance(experts, chosen))
        self.put("pairs", view.index, pairs)
        parts = dict(enumerate(domain_keys(view.text.domains))) | {-1: ALL}
        for kind, equal in same.items():
            counts = np.bincount(sequence[1:][inside & equal], minlength=len(domain))
            self.put(f"same_{kind}", view.index, counts)
            for number, key in parts.items():
                members = (domain == number) | (number < 0)
                if pairs[members].sum():
                    value = counts[members].sum() / pairs[members].sum()
                    self.put(f"repeat_{kind}", view.index, value, key)
        sent = first != NONE
        cell = (domain[sequence] * experts + first)[sent]
        by_domain = np.bincount(cell, minlength=len(view.text.domains) * experts).reshape(-1, experts)
        for number, key in parts.items():
            load = by_domain[number] if number >= 0 else by_domain.sum(axis=0)
            if load.any():
                expected = np.square(load / load.sum()).sum()
                self.put("repeat_first_expected", view.index, expected, key)
        self._measure_runs(view.index, inside & same["first"], len(first), int(inside.sum()))

    def _measure_runs(self, layer: int, joined: np.ndarray, tokens: int, pairs: int) -> None:
        """Lengths of the runs, which end where a token is not joined (T - 1,) to the next."""
        ends = np.append(np.flatnonzero(~joined), tokens - 1) if tokens else np.zeros(0, int)
        lengths = np.diff(ends, prepend=-1)
        repeat = numbers(self.arrays, "repeat_first_expected", ALL).get(layer, 0.0)
        runs = max(tokens - pairs * repeat, 1.0)  # each pair that does not repeat begins a run, as each sequence does
        counts = np.bincount(np.minimum(lengths, LONGEST_RUN), minlength=LONGEST_RUN + 1)
        self.put("run_length", layer, counts[1:])
        self.put("mean_run", layer, tokens / max(len(lengths), 1))
        self.put("mean_run_expected", layer, tokens / runs)

    def compute(self) -> ProbeResult:
        """The result, with intervals."""
        pairs = by_layer(self.arrays, "pairs")
        if pairs:
            domain = self.arrays["domain"]
            parts = dict(enumerate(domain_keys(list(self.arrays["domain_names"])))) | {-1: ALL}
            known = next(iter(pairs.values())) > 0  # sequences of two tokens or more
            for kind in KINDS:
                whole: list[np.ndarray] = []
                repeat = {key: numbers(self.arrays, f"repeat_{kind}", key) for key in parts.values()}
                for layer, same in by_layer(self.arrays, f"same_{kind}").items():
                    both = np.stack([same, pairs[layer]], axis=1)  # (B, 2)
                    for number, key in parts.items():
                        if layer in repeat[key]:
                            members = ((domain == number) | (number < 0)) & known
                            units = sequence_units(domain[members])
                            rest = without(units.sums(both[members]), units.stratum)
                            share = rest[:, 0] / np.maximum(rest[:, 1], 1e-12)  # (U,)
                            ends = jackknife(repeat[key][layer], share, units.stratum, SHARE)
                            self.put(f"repeat_{kind}_interval", layer, ends, key)
                    if layer in repeat[ALL]:
                        whole.append(share)  # of the whole text, which comes last
                if whole:
                    mean = float(np.mean([repeat[ALL][layer] for layer in pairs]))
                    ends = jackknife(mean, np.mean(whole, axis=0), units.stratum, SHARE)
                    self.put(f"mean_{kind}_interval", None, ends)
        return self.describe(self.arrays)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Repeats beside chance: means over layers, and in a deep model of the first, the middle and the last layer."""
        repeat = {kind: numbers(arrays, f"repeat_{kind}", ALL) for kind in KINDS}
        if not repeat["first"]:
            return ProbeResult(arrays, notes=["no layer has experts and a text of two tokens: nothing can repeat"])
        chance = {kind: numbers(arrays, f"random_{kind}") for kind in KINDS}
        load = numbers(arrays, "repeat_first_expected", ALL)
        scalars: dict[str, float] = {}
        for key in ("mean_run", "mean_run_expected"):
            scalars |= per_layer(key, numbers(arrays, key))
        headlines = {}
        for kind, label in KINDS.items():
            value = per_layer(f"repeat_{kind}", repeat[kind])
            scalars |= value
            blind = float(np.mean([chance[kind][layer] for layer in repeat[kind]]))
            mean = value[f"repeat_{kind}"]
            uneven = float(np.mean([load[layer] for layer in repeat[kind]]))
            loaded = f" ({uneven:.1%} with loads as uneven as these)" if kind == "first" else ""
            headlines[f"repeat_{kind}"] = Headline(
                mean,
                f"{mean:.1%} of consecutive tokens have {label}, on average over layers; "
                f"{blind:.1%} would by chance{loaded}.",
                as_interval(arrays[f"mean_{kind}_interval"]),
            )
        for layer in first_middle_last(list(repeat["first"])) if len(repeat["first"]) >= DEEP else []:
            for kind, label in KINDS.items():
                value_here, blind = repeat[kind][layer], chance[kind][layer]
                sentence = f"In layer {layer} {value_here:.1%} of consecutive tokens have {label}"
                ends = by_layer(arrays, f"repeat_{kind}_interval", ALL)[layer]
                headlines[f"repeat_{kind}_layer_{layer}"] = Headline(
                    value_here, f"{sentence}; {blind:.1%} by chance.", as_interval(ends)
                )
        pictures = {"over_depth": partial(draw_over_depth, arrays, KINDS), "run_lengths": partial(draw_runs, arrays)}
        paired = arrays["domain"][next(iter(by_layer(arrays, "pairs").values())) > 0]
        notes = few_texts(sequence_units(paired).stratum)
        return ProbeResult(arrays, scalars, headlines, pictures, notes)
