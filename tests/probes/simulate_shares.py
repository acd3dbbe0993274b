"""How often intervals of experts' shares hold them: ``python tests/probes/simulate_shares.py N`` prints a table.

N times, texts of two domains draw their experts, each text with shares of its own around its domain's, which are known:
what ``domain_share`` keeps of each expert's share, and ``committee`` of what domains add, at sizes that users have.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from probes.committee import Committee, parts
from probes.domain_share import shares_of_counts
from probes.measures.resampling import jackknife_of_share, sequence_units, without

TOKENS = (50, 150)  # of a text
SPREAD = 4.0  # times the experts: texts' own shares of an expert differ by half of what is even
CASES = ((8, 2, 4), (64, 8, 4), (64, 1, 4))  # experts, those of a token, layers


@dataclass
class Held:
    """What was found.

    Args:
        interaction: How often its interval holds it.
        common: How often those of shares above half an even one do.
        rare: How often those of smaller ones do.
        given: Share of the draws that have an interval of the interaction.
    """

    interaction: float
    common: float
    rare: float
    given: float


def planted(rng: np.random.Generator, experts: int, layers: int) -> np.ndarray:
    """Shares (layers, 2, E) of two domains that have something in common."""
    share = rng.dirichlet(np.full(experts, 2.0), size=layers)[:, None] * np.exp(
        rng.normal(0, 0.5, (layers, 2, experts))
    )
    return share / share.sum(axis=2, keepdims=True)


def drawn(rng: np.random.Generator, share: np.ndarray, texts: int, chosen: int) -> dict[str, np.ndarray]:
    """Counts (B, E) of each layer's assignments, as ``domain_share`` keeps them."""
    domain, tokens = np.arange(texts) % 2, rng.integers(*TOKENS, texts)
    counts = {"domain": domain}
    for layer, of in enumerate(share):
        own = [rng.dirichlet(SPREAD * len(of[number]) * of[number]) for number in domain]
        counts[f"count_any/{layer}"] = np.stack(
            [rng.multinomial(n * chosen, p) for n, p in zip(tokens, own, strict=True)]
        )
    return counts


def coverage(experts: int, chosen: int, layers: int, texts: int, draws: int, seed: int = 0) -> Held:
    """Of so many draws of so many texts."""
    rng = np.random.default_rng(seed)
    share = planted(rng, experts, layers)
    apart = [parts(np.repeat(of, 2, axis=0), np.array([0, 0, 1, 1])) for of in share]
    true = float(np.mean([of_domains / (of_experts + of_domains) for of_experts, of_domains in apart]))
    held, inside = [], []
    for _ in range(draws):
        found = drawn(rng, share, texts, chosen)
        committee = Committee()
        for layer in range(layers):
            committee.put("top", layer, chosen)
        committee.derive({"domain_share": found})
        headline = committee.describe(committee.arrays).headlines.get("interaction")
        if headline is not None and headline.interval is not None:
            held.append(headline.interval[0] <= true <= headline.interval[1])
        mine = found["count_any/0"][found["domain"] == 0]
        units = sequence_units(np.zeros(len(mine)))
        rest = shares_of_counts(without(units.sums(mine), units.stratum))
        low, high = jackknife_of_share(shares_of_counts(mine.sum(axis=0)), rest, units.stratum)
        known = np.isfinite(low)
        inside.append(np.where(known, (low <= share[0, 0]) & (share[0, 0] <= high), np.nan))
    rare = share[0, 0] < 0.5 / experts
    by_expert = np.array(inside)  # (draws, E)
    ends = [
        float(np.nanmean(part)) if np.size(part) else np.nan for part in (held, by_expert[:, ~rare], by_expert[:, rare])
    ]
    return Held(*ends, len(held) / draws)


def main(draws: int = 1000) -> None:
    """Print the table."""
    print("| experts, chosen, layers | texts | interaction (draws that have one) | shares | rare shares |")
    print("|---|---|---|---|---|")
    for sizes in CASES:
        for texts in (4, 6, 10, 16):
            found = coverage(*sizes, texts, draws)
            print(
                f"| {', '.join(map(str, sizes))} | {texts} | {found.interaction:.1%} ({found.given:.0%}) | "
                f"{found.common:.1%} | {found.rare:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
