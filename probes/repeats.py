"""Repeats: does a token go where the one before it went? (Mixtral, arXiv 2401.04088, section 5, Table 5)

T tokens, E experts, K experts per token, B sequences, D domains, R draws.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, per_layer
from probes.measures.choices import (
    ALL,
    NONE,
    assignments,
    by_part,
    chosen_mask,
    domain_arrays,
    domain_keys,
    first_middle_last,
    names_by_key,
    overlap_by_chance,
    sequence_of,
)
from probes.measures.resampling import SHARE, as_interval, few_texts, jackknife, sequence_units, without

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    needs = frozenset({Need.ROUTING})

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
        self.arrays |= {
            f"random_first/{view.index}": np.asarray(1 / experts, np.float32),
            f"random_any/{view.index}": np.asarray(overlap_by_chance(experts, chosen), np.float32),
            f"pairs/{view.index}": pairs,
        }
        parts = dict(enumerate(domain_keys(view.text.domains))) | {-1: ALL}
        for kind, equal in same.items():
            counts = np.bincount(sequence[1:][inside & equal], minlength=len(domain))
            self.arrays[f"same_{kind}/{view.index}"] = counts
            for number, key in parts.items():
                members = (domain == number) | (number < 0)
                if pairs[members].sum():
                    value = counts[members].sum() / pairs[members].sum()
                    self.arrays[f"repeat_{kind}/{view.index}/{key}"] = np.asarray(value, np.float32)
        sent = first != NONE
        cell = (domain[sequence] * experts + first)[sent]
        by_domain = np.bincount(cell, minlength=len(view.text.domains) * experts).reshape(-1, experts)
        for number, key in parts.items():
            load = by_domain[number] if number >= 0 else by_domain.sum(axis=0)
            if load.any():
                expected = np.square(load / load.sum()).sum()
                self.arrays[f"repeat_first_expected/{view.index}/{key}"] = np.asarray(expected, np.float32)
        self._measure_runs(view.index, inside & same["first"], len(first), int(inside.sum()))

    def _measure_runs(self, layer: int, joined: np.ndarray, tokens: int, pairs: int) -> None:
        """Lengths of the runs, which end where a token is not joined (T - 1,) to the next."""
        ends = np.append(np.flatnonzero(~joined), tokens - 1) if tokens else np.zeros(0, int)
        lengths = np.diff(ends, prepend=-1)
        repeat = float(self.arrays.get(f"repeat_first_expected/{layer}/{ALL}", 0.0))
        runs = max(tokens - pairs * repeat, 1.0)  # each pair that does not repeat begins a run, as each sequence does
        self.arrays |= {
            f"run_length/{layer}": np.bincount(np.minimum(lengths, LONGEST_RUN), minlength=LONGEST_RUN + 1)[1:],
            f"mean_run/{layer}": np.asarray(tokens / max(len(lengths), 1), np.float32),
            f"mean_run_expected/{layer}": np.asarray(tokens / runs, np.float32),
        }

    def compute(self) -> ProbeResult:
        """The result, with intervals."""
        pairs = by_layer(self.arrays, "pairs")
        if pairs:
            domain = self.arrays["domain"]
            parts = dict(enumerate(domain_keys(list(self.arrays["domain_names"])))) | {-1: ALL}
            known = next(iter(pairs.values())) > 0  # sequences of two tokens or more
            for kind in KINDS:
                whole: list[np.ndarray] = []
                for layer, same in by_layer(self.arrays, f"same_{kind}").items():
                    both = np.stack([same, pairs[layer]], axis=1)  # (B, 2)
                    for number, key in parts.items():
                        if f"repeat_{kind}/{layer}/{key}" in self.arrays:
                            members = ((domain == number) | (number < 0)) & known
                            unit, stratum = sequence_units(domain[members])
                            sums = np.zeros((len(stratum), 2))
                            np.add.at(sums, unit, both[members])
                            rest = without(sums, stratum)
                            share = rest[:, 0] / np.maximum(rest[:, 1], 1e-12)  # (U,)
                            value = float(self.arrays[f"repeat_{kind}/{layer}/{key}"])
                            ends = jackknife(value, share, stratum, SHARE)
                            self.arrays[f"repeat_{kind}_interval/{layer}/{key}"] = ends.astype(np.float32)
                    if f"repeat_{kind}/{layer}/{ALL}" in self.arrays:
                        whole.append(share)  # of the whole text, which comes last
                if whole:
                    layers = [float(self.arrays[f"repeat_{kind}/{layer}/{ALL}"]) for layer in pairs]
                    ends = jackknife(float(np.mean(layers)), np.mean(whole, axis=0), stratum, SHARE)
                    self.arrays[f"mean_{kind}_interval"] = ends.astype(np.float32)
        return self.describe(self.arrays)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Repeats beside chance: means over layers, and in a deep model of the first, the middle and the last layer."""
        repeat = {kind: by_part(arrays, f"repeat_{kind}").get(ALL, {}) for kind in KINDS}
        if not repeat["first"]:
            return ProbeResult(arrays, notes=["no layer has experts and a text of two tokens: nothing can repeat"])
        chance = {kind: by_layer(arrays, f"random_{kind}") for kind in KINDS}
        load = by_part(arrays, "repeat_first_expected")[ALL]
        runs, runs_expected = by_layer(arrays, "mean_run"), by_layer(arrays, "mean_run_expected")
        scalars = per_layer("mean_run", _floats(runs)) | per_layer("mean_run_expected", _floats(runs_expected))
        headlines = {}
        for kind, label in KINDS.items():
            value = per_layer(f"repeat_{kind}", _floats(repeat[kind]))
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
                value_here, blind = float(repeat[kind][layer]), float(chance[kind][layer])
                sentence = f"In layer {layer} {value_here:.1%} of consecutive tokens have {label}"
                ends = arrays[f"repeat_{kind}_interval/{layer}/{ALL}"]
                headlines[f"repeat_{kind}_layer_{layer}"] = Headline(
                    value_here, f"{sentence}; {blind:.1%} by chance.", as_interval(ends)
                )
        pictures = {"over_depth": partial(_draw_over_depth, arrays), "run_lengths": partial(_draw_runs, arrays)}
        paired = arrays["domain"][next(iter(by_layer(arrays, "pairs").values())) > 0]
        notes = few_texts(sequence_units(paired)[1])
        return ProbeResult(arrays, scalars, headlines, pictures, notes)


def _floats(values: dict[int, np.ndarray]) -> dict[int, float]:
    return {layer: float(value) for layer, value in values.items()}


def _draw_over_depth(arrays: Arrays) -> Figure:
    from probes.figures import domains, drawing

    names = names_by_key(arrays)
    fig = drawing.new_figure(11.0, 4.0, "How often does a token go where the one before it went? By domain, over depth")
    axes = fig.subplots(1, len(KINDS))
    for ax, (kind, label) in zip(axes, KINDS.items(), strict=True):
        values = by_part(arrays, f"repeat_{kind}")
        if len(values) > 1 and len(values) <= 2:
            values.pop(ALL)  # one domain is all there is
        spread = by_part(arrays, f"repeat_{kind}_interval")
        domains.domain_lines(
            ax,
            {names.get(key, key): _floats(layers) for key, layers in values.items() if key != ALL or len(values) == 1},
            {names.get(key, key): layers for key, layers in spread.items()},
        )
        chance = _floats(by_layer(arrays, f"random_{kind}"))
        drawing.depth_line(ax, chance, drawing.MUTED, "chance, all experts alike", dashed=True)
        if kind == "first":
            expected = _floats(by_part(arrays, "repeat_first_expected")[ALL])
            drawing.depth_line(ax, expected, drawing.INK, "chance, with the loads measured", dashed=True)
            handles = ax.get_legend_handles_labels()
        ax.set_ylim(0, min(1.05, 1.2 * max(ax.get_ylim()[1], max(chance.values()))))
        ax.set_title(f"share of consecutive tokens with {label}", fontsize=10)
    fig.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return fig


def _draw_runs(arrays: Arrays) -> Figure:
    from matplotlib.ticker import MaxNLocator

    from probes.figures import drawing

    lengths = by_layer(arrays, "run_length")
    expected = by_part(arrays, "repeat_first_expected")[ALL]
    layers = first_middle_last(list(lengths))
    fig = drawing.new_figure(4.0 * max(len(layers), 2), 3.5, "How many tokens in a row have the same first choice?")
    axes = fig.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    x = np.arange(1, LONGEST_RUN + 1)
    longest = max(int(np.flatnonzero(value)[-1]) + 1 for value in lengths.values() if value.any())
    for ax, layer in zip(axes, layers, strict=True):
        share = lengths[layer] / max(lengths[layer].sum(), 1)
        again = float(expected[layer])
        ax.bar(x, share, color=drawing.SERIES[0], label="measured")
        blind = (1 - again) * again ** (x - 1)
        ax.plot(x, blind, color=drawing.MUTED, ls="--", lw=1.2, label="in random order, loads as measured")
        drawing.style_axes(ax)
        ax.set_yscale("log")
        ax.set_ylim(max(0.5 / max(lengths[layer].sum(), 1), 1e-6), 1.3)
        ax.set_xlim(0.4, max(longest, 6) + 0.6)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(f"layer {layer}", fontsize=10)
        more = f" ({LONGEST_RUN}: or more)" if longest == LONGEST_RUN else ""
        ax.set_xlabel(f"tokens in a row{more}", fontsize=9)
    axes[0].set_ylabel("share of runs", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    return fig
