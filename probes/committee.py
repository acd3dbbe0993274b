"""Committee: do the same few experts do the work in every domain?

What is said of a standing committee of experts, without what makes its published size unsound: no threshold decides who
is of it, the experts that are counted are chosen on other texts than they are counted on, and what finite text makes
two domains differ by is taken off.

B texts, E experts, K experts per token, D domains, U units, R draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moebed.views.layer import LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, finite, numbers, per_layer
from probes.measures.expert_scores import calibration_texts
from probes.measures.resampling import (
    interval_of,
    keep,
    p_value,
    sequence_units,
    shuffle_labels,
    unit_notes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKED = "no interval, as few texts rank experts badly, which lowers it: with more it would be higher"
LOWERED = "no interval, as few texts lower it: what as few texts show with the domains' names shuffled stands beside it"
FEW = "a domain of one text: what its experts vary by from text to text cannot be told, nor taken off"
ONE_DOMAIN = "the text has one domain"


class Committee(Probe):
    """How much work the most used experts do, and whether they are the same in all domains.

    A text's shares are those of its assignments; a domain's the mean of its texts', all domains weigh alike. Stored for
    each layer: ``top_mass (E,)``, the share of assignments to the m most used experts, m from 1 on, chosen on every
    other text of each domain and measured on the rest, mean of both ways round (even, m/E); ``top ()``, K, for which
    the mass is given in words; ``gini ()`` of that curve: 0 when even, (E − 1)/E when one expert does all;
    ``expert_part ()`` and ``domain_part ()``, squared coefficients of variation of the experts' shares that all domains
    have in common, and of what a domain adds, both less what texts of one domain vary by; ``interaction ()``, the
    latter's part of both, 0 where all domains use the same experts, 1 where what one uses others do not. Each of these
    three with ``..._without (U,)``. With two domains or more ``top_jaccard ()``, overlap of two domains' K most used
    experts (common over all of both), mean over pairs; ``top_jaccard_null (2,)``, mean and 5th percentile with the
    domains' names shuffled over texts; ``top_jaccard_p ()``, of so small an overlap. Stored once: ``unit_stratum
    (U,)``.

    Shuffled groups of texts are seldom of all domains alike, so that of two domains the overlap tells little: the
    interaction tells more.
    """

    name = "committee"
    question = "Do the same few experts do the work in every domain?"
    needs = frozenset({Need.ROUTING})
    sources = ("domain_share",)

    def update(self, view: LayerView) -> None:
        """Note how many experts a token has."""
        if view.routing is not None and view.text is not None and view.num_experts > view.num_experts_per_tok:
            self.put("top", view.index, view.num_experts_per_tok)

    def derive(self, found: Mapping[str, Arrays]) -> None:
        """All from the counts of each text's choices."""
        counted = by_layer(found["domain_share"], "count_any")
        for layer, top in numbers(self.arrays, "top").items():
            if layer not in counted:
                continue
            count, domain = np.asarray(counted[layer], np.float64), np.asarray(found["domain_share"]["domain"])
            filled = count.any(axis=1)
            self._measure(layer, count[filled] / count[filled].sum(axis=1, keepdims=True), domain[filled], int(top))

    def _measure(self, layer: int, share: np.ndarray, domain: np.ndarray, top: int) -> None:
        units = sequence_units(domain)
        self.arrays |= units.arrays()
        mass = held_out_mass(share, domain)
        for key, value in (("top_mass", mass), ("mass", mass[top - 1]), ("gini", gini(mass))):
            self.put(key, layer, value)
        whole = _parts(share, domain)
        left = [units.of_token != unit for unit in range(len(units.stratum))]
        without = [_parts(share[rest], domain[rest]) if rest.any() else whole for rest in left]
        for name, value in whole.items():
            keep(self, name, layer, value, np.array([one[name] for one in without]))
        if len(np.unique(domain)) > 1:
            labels = shuffle_labels(domain)
            null = overlap_of_top(share, labels, top)
            overlap = overlap_of_top(share, domain[None], top)[0]
            self.put("top_jaccard", layer, overlap)
            self.put("top_jaccard_null", layer, np.array([null.mean(), np.quantile(null, 0.05)]))
            self.put("top_jaccard_p", layer, p_value(1 - overlap, 1 - null))

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Mean over layers in words, and curves over depth."""
        if not numbers(arrays, "mass"):
            return ProbeResult(arrays, notes=["no layer has a choice of experts, and text"])
        mass, top = finite(numbers(arrays, "mass")), numbers(arrays, "top")
        scalars: dict[str, float] = {}
        headlines: dict[str, Headline] = {}
        notes: list[str] = []
        if mass:
            scalars |= per_layer("top_mass", mass) | per_layer("gini", finite(numbers(arrays, "gini")))
            even = {layer: top[layer] / len(curve) for layer, curve in by_layer(arrays, "top_mass").items()}
            value, chance = scalars["top_mass"], float(np.mean(list(even.values())))
            headlines["top_mass"] = Headline(
                value,
                f"The most used experts, as many as a token has, get {value:.1%} of the assignments of texts on which "
                f"they were not chosen ({chance:.1%} if all were used alike).",
                no_interval=RANKED,
            )
            headlines["gini"] = Headline(
                scalars["gini"],
                f"The experts' loads, on texts that did not rank them, are unequal by {scalars['gini']:.2f} (Gini).",
                no_interval=RANKED,
            )
        else:
            notes.append("experts are ranked on some texts of a domain and measured on others: give two or more of it")
        apart, overlap = finite(numbers(arrays, "interaction")), numbers(arrays, "top_jaccard")
        for name in ("expert_part", "domain_part", "interaction"):
            scalars |= per_layer(name, finite(numbers(arrays, name)))
        if apart:
            value = scalars["interaction"]
            headlines["interaction"] = Headline(
                value,
                f"Of what experts' shares vary by, {value:.0%} is that domains use other experts, and the rest that "
                "all use some more; less what texts of one domain vary by.",
                interval_of(arrays, "interaction", value, apart),
            )
        if overlap:
            p = numbers(arrays, "top_jaccard_p")
            by_chance = {layer: float(of[0]) for layer, of in by_layer(arrays, "top_jaccard_null").items()}
            scalars |= per_layer("top_jaccard", overlap) | per_layer("top_jaccard_null", by_chance)
            scalars |= per_layer("top_jaccard_p", p)
            value, shuffled = scalars["top_jaccard"], scalars["top_jaccard_null"]
            fewer = sum(one < 0.05 for one in p.values())
            headlines["top_jaccard"] = Headline(
                value,
                f"Of two domains' most used experts {value:.0%} are the same; {shuffled:.0%} with the domains' names "
                f"shuffled over the texts. Chance seldom makes it so few in {fewer} of {len(p)} layers (p below .05, "
                "not adjusted).",
                no_interval=LOWERED,
            )
            notes += [] if apart else [FEW]
        else:
            notes.append(f"{ONE_DOMAIN}: nothing to compare it with")
        pictures = {"over_depth": partial(_draw, arrays)}
        return ProbeResult(arrays, scalars, headlines, pictures, notes + unit_notes(arrays, headlines))


def domain_means(share: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Mean shares (D, E) of the domains that texts (B, E) are of."""
    return np.stack([share[domain == number].mean(axis=0) for number in np.unique(domain)])


def held_out_mass(share: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Share (E,) of the m most used experts, m from 1 on; ranked on every other text of a domain, measured on the rest.

    The mean of both ways round; of texts that are each alone in their domain, NaN.

    Args:
        share: (B, E) of each text's assignments.
        domain: (B,).
    """
    half = calibration_texts(domain)
    known = np.isin(domain, domain[half])
    if not half.any():
        return np.full(share.shape[1], np.nan)
    one, other = (domain_means(share[part], domain[part]).mean(axis=0) for part in (half, known & ~half))
    ways = [of[np.argsort(-by, kind="stable")].cumsum() for by, of in ((one, other), (other, one))]
    return np.mean(ways, axis=0)


def gini(mass: np.ndarray) -> float:
    """Gini's coefficient of cumulated shares (E,), the largest first; below 0 where they are not in order."""
    experts = len(mass)
    return float(2 / experts * (mass - np.arange(1, experts + 1) / experts).sum())


def parts(share: np.ndarray, domain: np.ndarray) -> tuple[float, float]:
    """Squared coefficients of variation: of what domains have in common, of what each adds; less the texts' own.

    Both may come out below 0, as their expectation is right: without any difference it is 0. NaN with one domain, or
    where a domain has one text.

    Args:
        share: (B, E) of each text's assignments.
        domain: (B,).
    """
    numbers, size = np.unique(domain, return_counts=True)
    if len(numbers) < 2 or size.min() < 2:
        return np.nan, np.nan
    experts, domains = share.shape[1], len(numbers)
    means = domain_means(share, domain)
    common = means.mean(axis=0)
    # Of a domain's mean, what it varies by for having so many texts, summed over experts and domains.
    noise = sum(share[domain == n].var(axis=0, ddof=1).sum() / count for n, count in zip(numbers, size, strict=True))
    of_experts = ((common - 1 / experts) ** 2).sum() - noise / domains**2
    of_domains = (((means - common) ** 2).sum() - noise * (1 - 1 / domains)) / domains
    return float(experts * of_experts), float(experts * of_domains)


def overlap_of_top(share: np.ndarray, labels: np.ndarray, top: int) -> np.ndarray:
    """Common over all of two domains' most used experts, mean over pairs of domains: (R,).

    Args:
        share: (B, E) of each text's assignments.
        labels: (R, B) domains of the texts, in each of several ways.
        top: How many experts.
    """
    chosen = []
    for number in np.unique(labels):
        mine = (labels == number).astype(np.float64)  # (R, B)
        order = np.argsort(-(mine @ share), axis=1, kind="stable")[:, :top]
        mask = np.zeros((len(labels), share.shape[1]), bool)
        np.put_along_axis(mask, order, True, axis=1)
        chosen.append(mask)
    pairs = [(a, b) for at, a in enumerate(chosen) for b in chosen[at + 1 :]]
    return np.mean([(a & b).sum(axis=1) / (a | b).sum(axis=1) for a, b in pairs], axis=0)


def _parts(share: np.ndarray, domain: np.ndarray) -> dict[str, float]:
    of_experts, of_domains = parts(share, domain)
    both = of_experts + of_domains
    interaction = of_domains / both if both > 0 else np.nan
    return {"expert_part": of_experts, "domain_part": of_domains, "interaction": interaction}


def _draw(arrays: Arrays) -> Figure:
    from probes.figures import drawing

    top, curves = numbers(arrays, "top"), by_layer(arrays, "top_mass")
    fig = drawing.new_figure(11.0, 3.5, "Do the same few experts do the work in every domain? Over depth")
    mass, apart, same = fig.subplots(1, 3)
    if measured := finite(numbers(arrays, "mass")):
        drawing.depth_line(mass, measured, drawing.SERIES[0], "as many as a token has")
        even = {layer: top[layer] / len(curve) for layer, curve in curves.items()}
        drawing.depth_line(mass, even, drawing.MUTED, "even", dashed=True)
    mass.set_title("share of the most used experts", fontsize=10)
    drawing.depth_line(apart, numbers(arrays, "expert_part"), drawing.SERIES[1], "in all domains")
    drawing.depth_line(apart, numbers(arrays, "domain_part"), drawing.SERIES[2], "what a domain adds")
    apart.set_title("squared variation of shares", fontsize=10)
    overlap = numbers(arrays, "top_jaccard")
    drawing.depth_line(same, overlap, drawing.SERIES[3], "measured")
    null = {layer: float(of[0]) for layer, of in by_layer(arrays, "top_jaccard_null").items()}
    drawing.depth_line(same, null, drawing.MUTED, "domains' names shuffled", dashed=True)
    same.set_title("overlap of domains' most used", fontsize=10)
    for ax in (mass, same):
        ax.set_ylim(0, 1.04)
    drawing.legend(mass, "no domain has two texts")
    drawing.legend(apart, "a domain has one text" if overlap else ONE_DOMAIN)
    drawing.legend(same, ONE_DOMAIN)
    return fig
