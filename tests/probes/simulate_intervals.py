"""How often the headlines' intervals hold what they say: ``python tests/probes/simulate_intervals.py`` prints a table.

Texts are made up in which a token depends on the ones before it (its logits wander slowly) and every text has its
own preferences, so that tokens are anything but independent. What an interval is to hold is the headline's mean over
as many other texts; of one text, over other wordings of that text.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch

from moebed.routers import Routing
from moebed.views import LayerView, ProbeText
from probes.driver import run_probes
from probes.registry import PROBES

EXPERTS, CHOSEN, TOKENS, LAYERS = 8, 2, 120, 2
NAMES = ("balance", "router_state", "routing", "repeats", "coactivation", "domain_share")
TEXTS = (1, 2, 3, 5, 8, 12)
OF_TEXT, OF_TOKEN, KEPT = 0.5, 1.0, 0.8  # spreads of logits, and what a token keeps of the one before


def made_up(rng: np.random.Generator, texts: int, own: np.ndarray | None = None) -> list[LayerView]:
    """Views of some texts, of two domains in turn; one text is longer, and may be given its preferences."""
    length = TOKENS if texts > 1 else 8 * TOKENS
    ids = torch.from_numpy(rng.integers(0, 12, (texts, length)))
    text = ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(texts) % 2, ("a", "b"))
    views = []
    for layer in range(LAYERS):
        prefers = rng.normal(0, OF_TEXT, (texts, 1, EXPERTS)) if own is None else own[layer]
        noise, wanders = rng.normal(0, OF_TOKEN, (length, texts, EXPERTS)), np.zeros((length, texts, EXPERTS))
        wanders[0] = noise[0]
        for token in range(1, length):
            wanders[token] = KEPT * wanders[token - 1] + np.sqrt(1 - KEPT**2) * noise[token]
        logits = torch.from_numpy((prefers + wanders.transpose(1, 0, 2)).reshape(-1, EXPERTS)).float()
        probs = logits.softmax(dim=-1)
        weight, index = probs.topk(CHOSEN)
        views.append(
            LayerView(layer, LAYERS, EXPERTS, CHOSEN, None, routing=Routing(logits, probs, index, weight), text=text)
        )
    return views


def coverage(texts: int, simulated: int, names: tuple[str, ...] = NAMES) -> dict[str, tuple[float, float]]:
    """Headline -> how often its interval holds the mean over all simulations, and the median of its width."""
    rng = np.random.default_rng(texts)
    own = rng.normal(0, OF_TEXT, (LAYERS, 1, 1, EXPERTS)) if texts == 1 else None
    values, ends = defaultdict(list), defaultdict(list)
    for _ in range(simulated):
        found = run_probes(made_up(rng, texts, own), [PROBES[name]() for name in names])
        for name, result in found.items():
            for key, headline in result.headlines.items():
                if headline.interval is not None:
                    values[f"{name}/{key}"].append(headline.value)
                    ends[f"{name}/{key}"].append(headline.interval)
    return {key: _held(np.array(values[key]), np.array(ends[key])) for key in values}


def _held(values: np.ndarray, ends: np.ndarray) -> tuple[float, float]:
    held = (ends[:, 0] <= values.mean()) & (values.mean() <= ends[:, 1])
    return float(held.mean()), float(np.median(ends[:, 1] - ends[:, 0]))


def main(simulated: int = 1000) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    found: dict[int, Mapping[str, tuple[float, float]]] = {}
    for count in TEXTS:
        found[count] = coverage(count, simulated)
        print(f"{count} texts: {len(found[count])} headlines", file=sys.stderr, flush=True)
    print("| headline | " + " | ".join(f"{count} text{'s' if count > 1 else ''}" for count in TEXTS) + " |")
    print("|---|" + "---|" * len(TEXTS))
    for key in sorted({key for by_key in found.values() for key in by_key}):
        cells = (f"{found[n][key][0]:.1%}" if key in found[n] else "none" for n in TEXTS)
        print(f"| `{key}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
