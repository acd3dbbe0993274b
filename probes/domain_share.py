"""Shares by domain: does text of one kind go to other experts than text of another? (Mixtral, arXiv 2401.04088, section
5, Figures 7, 9, 10; OLMoE, arXiv 2409.02060, section 5)

T tokens, E experts, K experts per token, B sequences, D domains, R draws.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import entr

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, by_part, numbers, per_layer
from probes.measures.choices import (
    assignments,
    counts_by_sequence,
    domain_arrays,
    domain_keys,
    first_middle_last,
    names_by_key,
    sequence_of,
)
from probes.measures.resampling import (
    jackknife_of_share,
    p_value,
    sequence_units,
    shuffle_labels,
    smallest_p,
    unit_notes,
    without,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RAISED = (
    "no interval, as few texts raise it, and it cannot fall below 0: what as few texts would show with the domains' "
    "names shuffled stands beside it"
)
PLACES = {"first": "the first choices", "second": "the second choices", "any": "all choices"}


def shares_of_counts(counts: np.ndarray, tokens: int | np.ndarray | None = None) -> np.ndarray:
    """Share of each expert, from counts (..., E).

    Args:
        counts: How often each expert was chosen.
        tokens: (...) number of tokens to divide by (even: K/E); if not given, the number of choices (even: 1/E).
    """
    counts = np.asarray(counts, np.float64)
    total = counts.sum(axis=-1, keepdims=True) if tokens is None else np.asarray(tokens)[..., None]
    return np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)


def divergence(shares: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of D distributions (D, ..., E), in nats: (...), from 0 to ln D.

    The mixture is their plain mean: a domain with more text weighs no more.
    """
    return np.maximum(entr(shares.mean(axis=0)).sum(axis=-1) - entr(shares).sum(axis=-1).mean(axis=0), 0.0)


class DomainShare(Probe):
    """Share of each expert in each domain's choices, and how far the domains lie apart.

    Stored for each layer and domain: ``share_first``, ``share_second``, ``share_any (E,)``, of the first, the second
    and of all K choices (even: 1/E); ``share_tokens_any (E,)``, of the domain's tokens (even: K/E; OLMoE's domain
    specialisation); ``share_first_interval``, ``share_second_interval``, ``share_any_interval (2, E)``.
    Stored for each layer: ``count_first``, ``count_second``, ``count_any (B, E)``; with two domains or more
    ``divergence``, Jensen-Shannon in nats between the domains' ``share_any``; ``divergence_null (2,)``, mean and 95th
    percentile; ``divergence_p``. Stored once: ``domain (B,)``, ``domain_names``, and the divergence's mean over layers
    with the same company as ``mean_divergence``, ``mean_divergence_null``, ``mean_divergence_p``.

    A domain's key is its name, with ``/`` and the like as %2F. Sequences are the unit of the intervals (95 %; see
    ``probes.measures.resampling``), which are NaN for a domain of one sequence; the null comes from shuffling the
    domains' labels over the sequences. A divergence of finite counts is never 0, so it is to be read beside the null,
    which is raised by as much.
    """

    name = "domain_share"
    question = "Do experts specialise in domains?"
    needs = frozenset({Need.CHOICES})

    def update(self, view: LayerView) -> None:
        """Count the choices of each sequence and sum them by domain."""
        if view.routing is None or view.text is None:
            return
        if "domain" not in self.arrays:
            self.arrays |= domain_arrays(view.text)
        index = assignments(view)
        sequence, domain = sequence_of(view.text), self.arrays["domain"]
        keys = domain_keys(view.text.domains)
        chosen = {"first": index[:, :1], "second": index[:, 1:2], "any": index}
        tokens = np.bincount(sequence, minlength=len(domain))
        for place, choices in chosen.items():
            if choices.shape[1] == 0:
                continue
            counts = counts_by_sequence(choices, sequence, len(domain), view.num_experts)
            self.put(f"count_{place}", view.index, counts)
            for number in np.unique(domain[counts.any(axis=1)]):
                total = counts[domain == number].sum(axis=0)
                self.put(f"share_{place}", view.index, shares_of_counts(total), keys[number])
                if place == "any":
                    of_domain = tokens[domain == number].sum()
                    self.put("share_tokens_any", view.index, shares_of_counts(total, of_domain), keys[number])

    def compute(self) -> ProbeResult:
        """The result, with what leaving out sequences, or shuffling their labels, tells of its certainty."""
        counts = by_layer(self.arrays, "count_any")
        if counts:
            self._keep_intervals()
            domain, filled = self.arrays["domain"], next(iter(counts.values())).any(axis=1)
            if len(np.unique(domain[filled])) > 1:
                self._compare({layer: count[filled] for layer, count in counts.items()}, domain[filled])
        return self.describe(self.arrays)

    def _keep_intervals(self) -> None:
        """Intervals of every share."""
        domain, keys = self.arrays["domain"], domain_keys(list(self.arrays["domain_names"]))
        for place in PLACES:
            for layer, counts in by_layer(self.arrays, f"count_{place}").items():
                filled = counts.any(axis=1)
                for number in np.unique(domain[filled]):
                    mine = counts[filled & (domain == number)]  # (B of the domain, E)
                    units = sequence_units(np.zeros(len(mine)))
                    rest = shares_of_counts(without(units.sums(mine), units.stratum))
                    ends = jackknife_of_share(shares_of_counts(mine.sum(axis=0)), rest, units.stratum)
                    self.put(f"share_{place}_interval", layer, ends, keys[number])

    def _compare(self, counts: dict[int, np.ndarray], domain: np.ndarray) -> None:
        """Divergence between the domains of each layer, and under shuffled labels."""
        numbers = np.unique(domain)
        labels = shuffle_labels(domain)  # the same for all layers
        measured, null = [], []
        for layer, count in counts.items():
            count = count.astype(np.float32)  # (B, E)
            total = np.stack([count[domain == n].sum(axis=0) for n in numbers])  # (D, E)
            measured.append(divergence(shares_of_counts(total)))
            null.append(
                divergence(shares_of_counts(np.stack([(labels == n).astype(np.float32) @ count for n in numbers])))
            )
            self._store("divergence", layer, measured[-1], null[-1])
        self._store("mean_divergence", None, np.mean(measured, axis=0), np.mean(null, axis=0))

    def _store(self, key: str, layer: int | None, measured: np.ndarray, null: np.ndarray) -> None:
        self.put(key, layer, measured)
        self.put(f"{key}_null", layer, np.array([null.mean(), np.quantile(null, 0.95)], np.float32))
        self.put(f"{key}_p", layer, p_value(measured, null))

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """The divergence with its null, and the shares in pictures."""
        if not by_part(arrays, "share_first"):
            return ProbeResult(arrays, notes=["no layer has experts and text: no shares by domain"])
        pictures = {
            f"share_{place}": partial(_draw_shares, arrays, place)
            for place in PLACES
            if by_part(arrays, f"share_{place}")
        }
        if "mean_divergence" not in arrays:
            return ProbeResult(arrays, figures=pictures, notes=["the text has one domain: nothing to compare it with"])
        measured, p = numbers(arrays, "divergence"), numbers(arrays, "divergence_p")
        null = {layer: float(value[0]) for layer, value in by_layer(arrays, "divergence_null").items()}
        scalars = per_layer("divergence", measured) | per_layer("divergence_null", null) | per_layer("p", p)
        value, overall = float(arrays["mean_divergence"]), float(arrays["mean_divergence_p"])
        by_chance, high = (float(number) for number in arrays["mean_divergence_null"])
        sentence = (
            f"The domains' shares of experts lie {value:.3g} nats apart (Jensen–Shannon, mean over layers); "
            f"with the domains' names shuffled over the texts it would be {by_chance:.3g}, and below {high:.3g} in "
            f"95 % of cases (p = {overall:.2g})."
        )
        first = next(iter(by_layer(arrays, "count_any").values()))
        smallest = smallest_p(arrays["domain"][first.any(axis=1)])
        few = f"so few texts cannot give a p below {smallest:.2g}: probe on more sequences of each domain"
        headlines = {"divergence": Headline(value, sentence, no_interval=RAISED)}
        return ProbeResult(
            arrays,
            scalars | {"p": overall},  # of the mean, which is no mean of p
            headlines,
            pictures | {"divergence": partial(_draw_divergence, arrays)},
            ([few] if smallest > 0.01 else []) + unit_notes(arrays, headlines),
        )


def _draw_shares(arrays: Arrays, place: str) -> Figure:
    from probes.figures import domains

    shares, names = by_part(arrays, f"share_{place}"), names_by_key(arrays)
    spread = by_part(arrays, f"share_{place}_interval")
    every = sorted({layer for layers in shares.values() for layer in layers})
    return domains.share_panels(
        {names.get(key, key): layers for key, layers in shares.items()},
        {names.get(key, key): layers for key, layers in spread.items()},
        first_middle_last(every),
        f"Share of each expert in {PLACES[place]} of each domain's tokens",
    )


def _draw_divergence(arrays: Arrays) -> Figure:
    from probes.figures import drawing

    measured, null = numbers(arrays, "divergence"), by_layer(arrays, "divergence_null")
    fig = drawing.new_figure(6.5, 3.4, "How far apart are the domains' shares of experts? Over depth")
    ax = fig.subplots()
    drawing.depth_line(ax, measured, drawing.SERIES[0], "measured")
    for position, label in ((0, "labels shuffled: mean"), (1, "labels shuffled: 95th percentile")):
        line = {layer: float(value[position]) for layer, value in null.items()}
        drawing.depth_line(ax, line, (drawing.MUTED, drawing.SERIES[1])[position], label, dashed=True)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("Jensen–Shannon divergence (nats)", fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    return fig
