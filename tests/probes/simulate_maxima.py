"""Why the largest of several has no interval: what was tried, by ``python tests/probes/simulate_maxima.py``.

Each made-up text has 16 independent tokens a layer, each with two of E experts; an expert is liked more or less by all
texts (a spread of 0, .5 or 1.5 of its logit), and by each text (.5). What an interval is to hold is the number of
10,000 texts. Statistics: ``balance/max_violation`` and ``coactivation/partner``, means over layers of maxima;
``domain_share/divergence`` of two domains that are alike, or whose logits differ by a spread of .3 or 1.

What is held, in %, of the models the least and the most, with 2, 5 and 12 texts of a domain, each 200 times (two
standard errors are 3 at 95):

    method                     max_violation          partner               divergence, alike      divergence, apart
    jackknife                  47–92 0–98 0–96        3–92 0–97 0–97        27–82 0–74 0–71        38–91 16–94 39–89
    jackknife, less 1/n        74–94 27–96 20–93      0–90 0–92 0–90        94–96 98–99 98–100     93–95 95–98 91–96
    jackknife, less 1/√n       72–84 56–86 58–92      0–88 6–72 0–70        4–57 0–46 0–52         12–84 10–86 32–90
    bootstrap t, less its bias 96–100 70–99 19–99     92–100 0–100 0–100    100–100 99–100 100–100 96–100 97–100 91–100
    bootstrap, percentile      0–48 0–87 0–94         0–45 0–92 0–86        0–0 0–0 0–0            0–18 0–49 0–78
    bootstrap, basic           1–63 28–94 18–96       0–54 0–96 0–100       89–92 99–100 100–100   74–91 94–99 89–98
    bootstrap, BCa             0–40 0–80 0–90         0–32 0–66 0–73        0–0 0–0 0–0            0–18 0–65 0–82
    n/2 of n                   0–30 70–96 56–92       0–23 0–88 0–100       31–70 95–98 99–100     38–64 90–94 88–96
    chosen by the others       78–94 58–88 60–92      53–96 0–91 0–85

Few texts raise the largest of equals by an amount of the order 1/√n, which is many times what its mean over layers
varies; how near to equal experts are is what few texts do not tell. What is taken off 1/n mends the divergence where
domains differ, and holds too much where they do not: a number that cannot fall below 0 has another spread there.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import numpy as np
from scipy.special import entr
from scipy.stats import norm
from scipy.stats import t as student

TOKENS, CHOSEN, OF_TEXT = 16, 2, 0.5
TEXTS, DRAWS, TRUE = (2, 5, 12), 200, 10_000
Statistic = Callable[[np.ndarray], np.ndarray]  # sums of units (..., D, L, E, E) -> (...)


def pairs(rng: np.random.Generator, simulated: int, texts: int, liked: np.ndarray) -> np.ndarray:
    """How often two experts are chosen together, and one at all, by text: (simulated, texts, L, E, E). liked (L, E)."""
    layers, experts = liked.shape
    taste = liked + OF_TEXT * rng.normal(size=(simulated, texts, layers, experts))
    logits = (taste[..., None, :] + rng.normal(size=(*taste.shape[:-1], TOKENS, experts))).astype(np.float32)
    chosen = (logits >= np.partition(logits, -CHOSEN, axis=-1)[..., -CHOSEN, None]).astype(np.float32)
    return chosen.swapaxes(-1, -2) @ chosen


def max_violation(sums: np.ndarray) -> np.ndarray:
    """As ``balance`` has it."""
    count = np.diagonal(sums[..., 0, :, :, :], axis1=-2, axis2=-1)
    return (count.max(axis=-1) / count.mean(axis=-1) - 1).mean(axis=-1)


def partner(sums: np.ndarray) -> np.ndarray:
    """As ``coactivation`` has it."""
    both = sums[..., 0, :, :, :]
    count = np.diagonal(both, axis1=-2, axis2=-1)
    most = (both * (1 - np.eye(both.shape[-1], dtype=np.float32))).max(axis=-1)
    return (most / np.maximum(count, 1)).sum(axis=-1).mean(axis=-1) / both.shape[-1]


def divergence(sums: np.ndarray) -> np.ndarray:
    """As ``domain_share`` has it."""
    count = np.diagonal(sums, axis1=-2, axis2=-1).astype(np.float64)
    share = count / count.sum(axis=-1, keepdims=True)
    return (entr(share.mean(axis=-3)).sum(axis=-1) - entr(share).sum(axis=-1).mean(axis=-2)).mean(axis=-1)


def intervals(statistic: Statistic, units: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Method -> ends (2, simulated), from sums of units (simulated, n of a domain, D, L, E, E)."""
    texts, domains = units.shape[1:3]
    total, freedom = units.sum(axis=1), domains * (texts - 1)
    value, added, variance = statistic(total), 0.0, 0.0
    every = []
    for domain, text in itertools.product(range(domains), range(texts)):
        left = total.copy()
        left[:, domain] += (total[:, domain] - texts * units[:, text, domain]) / (texts - 1)
        every.append(statistic(left))
        if text == texts - 1:
            mine = np.stack(every[-texts:])
            added = added + (texts - 1) * (mine.mean(axis=0) - value)
            variance = variance + (texts - 1) * mine.var(axis=0)
    quantile, wide = student.ppf(0.975, freedom), np.sqrt(texts / (texts - 1))
    reach = quantile * np.sqrt(variance)
    # If few texts add something of the order 1 / √n, as they do to the largest of equals.
    slowly = added / (texts - 1) / (np.sqrt(texts / (texts - 1)) - 1)

    def drawn(size: int) -> np.ndarray:
        weight = [rng.multinomial(size, np.full(texts, 1 / texts), DRAWS).astype(np.float32) for _ in range(domains)]
        return np.stack(  # (simulated, DRAWS)
            [
                statistic(np.stack([np.tensordot(w, one[:, d], 1) for d, w in enumerate(weight)], axis=1) + 1e-6)
                for one in units
            ]
        )

    again, part = drawn(texts), drawn(half := max(1, texts // 2))
    bias, spread = again.mean(axis=1) - value, quantile * wide * again.std(axis=1)
    low, high = np.quantile(again, (0.025, 0.975), axis=1)
    scale = np.sqrt(half / texts)
    part_low, part_high = np.quantile(part, (0.025, 0.975), axis=1)
    return {
        "jackknife": np.stack([value - reach, value + reach]),
        "jackknife, less 1/n": np.stack([value - added - reach, value - added + reach]),
        "jackknife, less 1/√n": np.stack([value - slowly - reach, value - slowly + reach]),
        "bootstrap t, less its bias": np.stack([value - bias - spread, value - bias + spread]),
        "bootstrap, percentile": np.stack([low, high]),
        "bootstrap, basic": np.stack([2 * value - high, 2 * value - low]),
        "bootstrap, BCa": _bca(value, again, np.stack(every)),
        "n/2 of n": np.stack([value - scale * (part_high - value), value - scale * (part_low - value)]),
    }


def _bca(value: np.ndarray, again: np.ndarray, left: np.ndarray) -> np.ndarray:
    below = ((again < value[:, None]).mean(axis=1) + (again <= value[:, None]).mean(axis=1)) / 2
    shift = norm.ppf(below.clip(1 / DRAWS, 1 - 1 / DRAWS))
    away = left.mean(axis=0) - left
    skew = (away**3).sum(axis=0) / np.maximum(6 * (away**2).sum(axis=0) ** 1.5, 1e-30)
    ends = []
    for z in norm.ppf((0.025, 0.975)):
        place = norm.cdf(shift + (shift + z) / (1 - skew * (shift + z)))
        ends.append([np.quantile(mine, at) for mine, at in zip(again, place, strict=True)])
    return np.array(ends)


def split(units: np.ndarray, statistic: Statistic, liked: np.ndarray) -> np.ndarray:
    """Ends (2, simulated): the largest is chosen by the other texts, and measured in each; Student's t of those."""
    both = units[:, :, 0]  # (simulated, n, L, E, E)
    rest, texts = both.sum(axis=1, keepdims=True) - both, both.shape[1]
    count, other = (np.diagonal(one, axis1=-2, axis2=-1) for one in (both, rest))
    if statistic is max_violation:
        found = np.take_along_axis(count, other.argmax(axis=-1)[..., None], axis=-1)[..., 0]
        each = (found / count.mean(axis=-1) - 1).mean(axis=-1)
    else:
        off = rest * (1 - np.eye(both.shape[-1], dtype=np.float32))
        found = np.take_along_axis(both, off.argmax(axis=-1)[..., None], axis=-1)[..., 0]
        each = (found / np.maximum(count, 1)).sum(axis=-1) / np.maximum((count > 0).sum(axis=-1), 1)
        each = each.mean(axis=-1)
    reach = student.ppf(0.975, texts - 1) * each.std(axis=1, ddof=1) / np.sqrt(texts)
    return np.stack([each.mean(axis=1) - reach, each.mean(axis=1) + reach])


def coverage(
    statistic: Statistic, layers: int, experts: int, liked: float, apart: float, simulated: int
) -> dict[tuple[str, int], float]:
    """(Method, number of texts) -> how often the interval holds the number of many texts."""
    rng = np.random.default_rng(0)
    base = liked * rng.normal(size=(layers, experts))
    domains = 2 if statistic is divergence else 1
    of_domain = [base + apart * rng.normal(size=base.shape) if domains > 1 else base for _ in range(domains)]
    many = np.stack([sum(pairs(rng, 1, TRUE // 20, one)[0].sum(axis=0) for _ in range(20)) for one in of_domain])
    truth, found = float(statistic(many)), {}
    for texts in TEXTS:
        units = np.stack([pairs(rng, simulated, texts, one) for one in of_domain], axis=2)
        ends = intervals(statistic, units, rng)
        if statistic is not divergence:
            ends["chosen by the others"] = split(units, statistic, base)
        for method, (low, high) in ends.items():
            found[method, texts] = float(((low <= truth) & (truth <= high)).mean())
    return found


def main(simulated: int = 200) -> None:
    """Print the least and the most that each method holds, over models."""
    models = list(itertools.product((2, 12), (8, 32), (0.0, 0.5, 1.5)))
    cases: dict[str, list[tuple[Statistic, int, int, float, float]]] = {
        "max_violation": [(max_violation, *model, 0.0) for model in models],
        "partner": [(partner, *model, 0.0) for model in models],
        "divergence, alike": [(divergence, layers, 8, 0.5, 0.0) for layers in (2, 12)],
        "divergence, apart": [(divergence, layers, 8, 0.5, apart) for layers in (2, 12) for apart in (0.3, 1.0)],
    }
    lines: dict[str, dict[tuple[str, int], list[float]]] = {}
    for name, settings in cases.items():
        for setting in settings:
            for (method, texts), held in coverage(*setting, simulated).items():
                lines.setdefault(method, {}).setdefault((name, texts), []).append(held)
            print(name, *setting[1:], file=sys.stderr, flush=True)
    heads = [(name, texts) for name in cases for texts in TEXTS]
    print("| method | " + " | ".join(f"{name}, {texts}" for name, texts in heads) + " |")
    print("|---|" + "---|" * len(heads))
    for method, cells in lines.items():
        told = (f"{100 * min(cells[h]):.0f}–{100 * max(cells[h]):.0f}" if h in cells else "" for h in heads)
        print(f"| {method} | " + " | ".join(told) + " |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
