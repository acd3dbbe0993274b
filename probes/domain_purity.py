"""Purity of experts: does each expert belong to one domain, and each domain have experts of its own?

A learned router may give any expert to any domain, so the names of experts mean nothing: purity and normalised mutual
information (as of clusterings: Manning, Raghavan and Schütze 2008, section 16.3) ask whether there is some naming, and
the best matching which one.

T tokens, E experts, K experts per token, D domains, R draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import entr

from moebed.model.routers.reference import block_sizes
from moebed.views.layer import LayerView, Need, ProbeText
from probes.contract import Arrays, Headline, Probe, ProbeResult, by_layer, numbers, per_layer
from probes.measures.choices import NONE, assignments, sequence_of
from probes.measures.resampling import SEED, p_value, unit_notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWS = 200
MOST_DOMAINS = 12  # in a picture
RAISED = "no interval, as few texts raise it: what as few texts show with their domains shuffled stands beside it"
LOWERED = "no interval, as few texts lower it where the load is even, and it cannot rise above 1"
MEASURES = {
    "purity": "Of all assignments, {value:.3g} lie in the domain that their expert has most of",
    "nmi": "Expert and domain of an assignment share {value:.3g} of what they could (mutual information)",
    "matched": "With experts dealt to domains as suits best, {value:.3g} of all assignments go to their own domain's",
}

PANELS = {
    "purity": "assignments in their\nexpert's own domain (purity)",
    "nmi": "mutual information over\nthe most possible (nmi)",
    "matched": "assignments in the domain\ndealt to their expert (matched)",
}


def purity(counts: np.ndarray) -> np.ndarray:
    """Share of assignments in the domain that their expert has most of, from counts (..., E, D): (...)."""
    return counts.max(axis=-1).sum(axis=-1) / counts.sum(axis=(-2, -1))


def mutual_information(counts: np.ndarray) -> np.ndarray:
    """Mutual information of expert and domain over the smaller of their entropies, from counts (..., E, D): (...).

    It is 1 where one tells the other, so also where a domain has several experts; 0 where either is constant.
    """
    joint = counts / counts.sum(axis=(-2, -1), keepdims=True)
    experts, domains = entr(joint.sum(axis=-1)).sum(axis=-1), entr(joint.sum(axis=-2)).sum(axis=-1)
    shared = experts + domains - entr(joint).sum(axis=(-2, -1))
    most = np.minimum(experts, domains)
    return np.clip(np.divide(shared, most, out=np.zeros_like(most), where=most > 1e-12), 0.0, 1.0)


def matching(counts: np.ndarray) -> tuple[float, np.ndarray]:
    """The best dealing of E experts to D domains, as many to each, from counts (E, D).

    Returns:
        The share of assignments that go to an expert of their domain, and the domain of each expert (E,); with fewer
        experts than domains each expert has one domain, and some domains none.
    """
    experts, domains = counts.shape
    sizes = block_sizes(experts, [1.0] * domains) if experts >= domains else [1] * domains
    place = np.repeat(np.arange(domains), sizes)  # the domain of each place
    rows, columns = linear_sum_assignment(counts[:, place], maximize=True)
    return float(counts[rows, place[columns]].sum() / counts.sum()), place[columns]


def utilisation(share: np.ndarray) -> np.ndarray:
    """Σ min(f, 1/E) of the shares f (..., E) of assignments: 1 when even, 1/E when one expert has all (2604.07030)."""
    return np.minimum(share, 1 / share.shape[-1]).sum(axis=-1)


def token_domains(text: ProbeText) -> np.ndarray:
    """The domain of each token (T,): its own where it is known, else that of its sequence."""
    if text.token_domain is not None:
        return text.token_domain[text.token_mask].cpu().numpy()
    return text.domain.cpu().numpy()[sequence_of(text)]


class DomainPurity(Probe):
    """Whether experts belong to domains: purity, mutual information, best matching; and whether all are used.

    Stored for each layer: ``count (E, D)``, assignments; ``purity``, ``nmi`` (over the smaller entropy), ``matched``
    (under the best matching) with ``expert_domain (E,)``; each of the three with ``_null (2,)``, its mean and 95th
    percentile over R shufflings of the domains, and ``_p``; and ``utilisation``. Stored once: ``domain_names (D,)``.

    Domains are shuffled by whole texts: each text takes the domains of another. With domains that switch within a text
    that keeps how long they stay.
    """

    name = "domain_purity"
    question = "Do experts belong to domains?"
    needs = frozenset({Need.CHOICES})

    def update(self, view: LayerView) -> None:
        """Count assignments by expert and domain, and again with the domains shuffled."""
        if view.routing is None or view.text is None:
            return
        index, domain = assignments(view), token_domains(view.text)
        domains = max(len(view.text.domains), int(domain.max()) + 1)
        names = [*map(str, view.text.domains)] if domains == len(view.text.domains) else map(str, range(domains))
        self.arrays["domain_names"] = np.array([*names], dtype=np.str_)
        assigned = index != NONE
        token = np.repeat(np.arange(len(index)), assigned.sum(axis=1))
        experts, shape = index[assigned], (view.num_experts, domains)
        counts = _counted(experts, domain[token], shape)
        null = np.stack([_counted(experts, other[token], shape) for other in _shuffled(view.text, domain)])
        self.put("count", view.index, counts.astype(np.int64))
        best, of_expert = matching(counts)
        self.put("expert_domain", view.index, of_expert.astype(np.int16))
        found: dict[str, float | np.ndarray] = {
            "purity": purity(counts),
            "nmi": mutual_information(counts),
            "matched": best,
        }
        by_chance: dict[str, np.ndarray] = {
            "purity": purity(null),
            "nmi": mutual_information(null),
            "matched": np.array([matching(one)[0] for one in null]),
        }
        for key, value in found.items():
            self.put(key, view.index, float(value))
            self.put(f"{key}_null", view.index, np.array([by_chance[key].mean(), np.quantile(by_chance[key], 0.95)]))
            self.put(f"{key}_p", view.index, p_value(value, by_chance[key]))
        used = counts.sum(axis=1)
        self.put("utilisation", view.index, float(utilisation(used / used.sum())))

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Each measure beside its null, over depth."""
        if not by_layer(arrays, "count"):
            return ProbeResult(arrays, notes=["no layer has experts and text: no purity"])
        if len(arrays["domain_names"]) < 2:
            return ProbeResult(arrays, notes=["the text has one domain: experts cannot belong to any other"])
        scalars: dict[str, float] = {}
        headlines: dict[str, Headline] = {}
        for key, sentence in MEASURES.items():
            measured = numbers(arrays, key)
            null = {layer: float(value[0]) for layer, value in by_layer(arrays, f"{key}_null").items()}
            high = np.mean([value[1] for value in by_layer(arrays, f"{key}_null").values()])
            scalars |= per_layer(key, measured) | per_layer(f"{key}_null", null)
            value = float(np.mean([*measured.values()]))
            said = f"{sentence.format(value=value)}; with the texts' domains shuffled {np.mean([*null.values()]):.3g}"
            headlines[key] = Headline(value, f"{said}, and below {high:.3g} in 95 % of cases.", no_interval=RAISED)
        used = numbers(arrays, "utilisation")
        mean = float(np.mean([*used.values()]))
        said = f"Experts are used to {mean:.3g} of what an even load would be (Σ min(share, 1/E), mean over layers)."
        headlines["utilisation"] = Headline(mean, said, no_interval=LOWERED)
        scalars |= per_layer("utilisation", used)
        figures = {"measures": partial(_draw_measures, arrays), "counts": partial(_draw_counts, arrays)}
        return ProbeResult(arrays, scalars, headlines, figures, unit_notes(arrays, headlines))


def _counted(experts: np.ndarray, domain: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Counts (E, D) of pairs."""
    return np.bincount(experts * shape[1] + domain, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


def _shuffled(text: ProbeText, domain: np.ndarray) -> Iterator[np.ndarray]:
    """Domains (T,) of tokens whose texts have each taken those of another; R draws, one at a time."""
    sequence, place = sequence_of(text), text.position.cpu().numpy()
    start, length = text.sequence_start.cpu().numpy(), text.token_mask.sum(dim=1).cpu().numpy()
    present = np.flatnonzero(length)
    rng = np.random.default_rng(SEED)
    for _ in range(DRAWS):
        other = np.arange(len(length))
        other[present] = rng.permutation(present)
        taken = other[sequence]
        yield domain[start[taken] + place % length[taken]]  # a longer text goes through a shorter one's again


def _draw_measures(arrays: Arrays) -> Figure:
    from probes.figures import drawing

    # A panel each: purity and matched are often the same, and one line would hide the other.
    fig, axes = drawing.panel_grid(len(MEASURES), "Do experts belong to domains? Over depth")
    for ax, colour, key in zip(axes, drawing.SERIES, MEASURES, strict=False):
        drawing.depth_line(ax, numbers(arrays, key), colour, "measured")
        null = {layer: float(value[1]) for layer, value in by_layer(arrays, f"{key}_null").items()}
        drawing.depth_line(ax, null, drawing.MUTED, "domains shuffled: 95th percentile", dashed=True)
        ax.set_ylim(0, 1.05)
        ax.set_title(PANELS[key], fontsize=10)
        ax.legend(fontsize=7, frameon=False)
    return fig


def _draw_counts(arrays: Arrays) -> Figure:
    from probes.figures import drawing
    from probes.figures.letters import plain

    counts, names = by_layer(arrays, "count"), [plain(str(name), 22) for name in arrays["domain_names"]]
    layers, rows = drawing.pick(sorted(counts), 3), slice(0, MOST_DOMAINS)
    title = "Where each domain's assignments go, as a multiple of an even share"
    title += f"; {MOST_DOMAINS} of {len(names)} domains" if len(names) > MOST_DOMAINS else ""
    fig, axes = drawing.panel_grid(len(layers), title)
    shares = {layer: (counts[layer] / np.maximum(1, counts[layer].sum(axis=0))).T[rows] for layer in layers}  # (D, E)
    relative = {layer: share * share.shape[1] for layer, share in shares.items()}
    norm, image = drawing.ratio_norm([*relative.values()]), None
    for ax, layer in zip(axes, layers, strict=True):
        image = drawing.heat_map(ax, relative[layer], "RdBu_r", norm=norm, aspect="auto")
        if relative[layer].shape[1] <= 8:
            drawing.write_values(ax, relative[layer], norm)
        ax.set_title(f"layer {layer}", fontsize=10)
        drawing.index_ticks(ax.xaxis, range(relative[layer].shape[1]))
        ax.set_yticks(range(len(relative[layer])), names[rows] if ax is axes[0] else [""] * len(names[rows]))
        ax.set_xlabel("expert", fontsize=9)
    drawing.colour_bar(fig, image, axes, "share / even share (1 = even)")
    return fig
