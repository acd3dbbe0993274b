"""How often the headlines' intervals hold what they say: ``python tests/probes/simulate_intervals.py`` prints a table.

A small decoder reads many made-up texts: each has its own vocabulary, within that of its domain, and its own length,
and a token depends on the one before. What the probes find in all of them is the truth that an interval is to hold.
Then they are shown a few of the texts at a time.

``simulate_intervals.py N DOMAINS ROUTER`` is N times, of texts of so many domains, with another router. A last
argument, ``stretches``, shows them ten stretches of one long text as if they were texts; the truth is that of many long
texts of the same vocabulary. It is why one text has no interval.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.model.routers import Routing
from moebed.views.layer import HeadView, LayerView, Need, ProbeText
from moebed.views.live import walk
from probes.contract import Probe, ProbeResult, in_order
from probes.registry import BY_NAME_ONLY, PROBES, STATIC_PROBES
from probes.running.driver import ProbePass, needs_of

VOCABULARY, HIDDEN = 48, 16
SHORTEST, LONGEST = 30, 70  # tokens of a text
POPULATION = 1200  # texts of each domain
STRETCHES, STRETCH, LONG_POPULATION = 10, 40, 500  # stretches of a long text, their tokens, long texts
OF_DOMAIN, OF_TEXT, KEPT = 0.7, 1.0, 0.3  # spreads of an id's log frequency; how often a token is the one before
TEXTS = (1, 2, 3, 5, 8, 12)
WITH_TEXT = tuple(name for name in PROBES if name not in STATIC_PROBES and name not in BY_NAME_ONLY)
# The second one has logits that are norms, and layers enough for some to be named.
MODELS = {
    "softmax_topk": {"num_hidden_layers": 2, "num_shared_experts": 1},
    "expert_norm": {"num_hidden_layers": 8},
}
PROBES_OF = {"softmax_topk": WITH_TEXT, "expert_norm": ("repeats", "norm_vs_score", "norm_origin")}


@dataclass
class Population:
    """Texts, and what a model made of them.

    Args:
        views: Of the layers, all texts at once.
        head: What was predicted.
        earlier: What ``saturation`` stored at a probing before this one.
        known: Arrays of the probes that look at weights alone.
    """

    views: list[LayerView]
    head: HeadView
    earlier: dict[str, np.ndarray]
    known: dict[str, dict[str, np.ndarray]]

    def probed(self, chosen: np.ndarray, names: Sequence[str]) -> dict[str, ProbeResult]:
        """What probes find in the texts chosen, by their number."""
        text = self.head.text
        tokens = torch.cat([self._tokens(number) for number in chosen.tolist()])
        part = ProbeText(text.input_ids[chosen], text.token_mask[chosen], text.domain[chosen], text.domains)
        sources = {one for name in names for one in (*PROBES[name].sources, *PROBES[name].optional_sources)}
        static = [PROBES[name]() for name in STATIC_PROBES if name in sources]
        probes = [PROBES[name]() for name in names]
        for probe in static + probes:
            self._prepare(probe, tokens)
        one_pass = ProbePass(static + probes, shown=probes)
        for view in self.views:
            one_pass.show(_part(view, tokens, part))
        one_pass.show(HeadView(part, self.head.predicted[tokens], self.head.loss[tokens]))
        results = one_pass.results()
        return {name: results[name] for name in names}

    def _tokens(self, number: int) -> torch.Tensor:
        text = self.head.text
        start = int(text.sequence_start[number])
        return torch.arange(start, start + int(text.token_mask[number].sum()))

    def _prepare(self, probe: Probe, tokens: torch.Tensor) -> None:
        probe.arrays |= self.known.get(probe.name, {})
        of_token = {key: value[:, tokens] for key, value in self.earlier.items() if key.startswith("topk_index")}
        ids = {"token_ids": self.earlier["token_ids"][tokens], "steps": self.earlier["steps"]}
        probe.begin(20, of_token | ids)


def _part(view: LayerView, tokens: torch.Tensor, text: ProbeText) -> LayerView:
    def part(routing: Routing | None) -> Routing | None:
        return routing and routing._replace(
            **{key: value[tokens] for key, value in routing._asdict().items() if isinstance(value, torch.Tensor)}
        )

    x = view.moe_input[tokens]
    reference = torch.tanh(x @ torch.eye(HIDDEN).roll(1, 0))  # stands for what a dense model made of the text
    return replace(
        view,
        routing=part(view.routing),
        moe_input=x,
        text=text,
        reference_output=reference,
        ablate=None,
    )


def _decoder(router: str, seed: int) -> Decoder:
    torch.manual_seed(seed)
    settings = MODELS[router] | {"router": router, "vocab_size": VOCABULARY, "hidden_size": HIDDEN}
    sizes = {"num_attention_heads": 2, "moe_intermediate_size": 8, "intermediate_size": 8, "num_experts": 6}
    return Decoder(ModelConfig(**settings, **sizes, num_experts_per_tok=2, initializer_range=0.3))


def _texts(rng: np.random.Generator, domains: int) -> ProbeText:
    """Texts of these domains, one domain after the other."""
    domain = np.repeat(np.arange(domains), POPULATION)
    prefers = OF_DOMAIN * rng.normal(size=(domains, VOCABULARY))[domain]
    prefers = prefers + OF_TEXT * rng.normal(size=(len(domain), VOCABULARY))
    drawn = (prefers[:, None] + rng.gumbel(size=(len(domain), LONGEST, VOCABULARY))).argmax(axis=-1)
    again = rng.random(drawn.shape) < KEPT
    for token in range(1, LONGEST):
        drawn[:, token] = np.where(again[:, token], drawn[:, token - 1], drawn[:, token])
    mask = np.arange(LONGEST) < rng.integers(SHORTEST, LONGEST + 1, len(domain))[:, None]
    ids = torch.from_numpy(np.where(mask, drawn, 0))
    return ProbeText(ids, torch.from_numpy(mask), torch.from_numpy(domain), tuple("ab"[:domains]))


def _long_texts(rng: np.random.Generator) -> ProbeText:
    """Texts of one vocabulary, each as long as its stretches."""
    prefers = np.hypot(OF_DOMAIN, OF_TEXT) * rng.normal(size=VOCABULARY)
    share = np.exp(prefers) / np.exp(prefers).sum()
    ids = rng.choice(VOCABULARY, size=(LONG_POPULATION, STRETCHES * STRETCH), p=share)
    again = rng.random(ids.shape) < KEPT
    for token in range(1, ids.shape[1]):
        ids[:, token] = np.where(again[:, token], ids[:, token - 1], ids[:, token])
    mask, domain = torch.ones(ids.shape, dtype=torch.bool), torch.zeros(len(ids), dtype=torch.int64)
    return ProbeText(torch.from_numpy(ids), mask, domain)


@lru_cache(maxsize=1)
def population(router: str, domains: int, stretches: bool = False) -> Population:
    """Many texts of these domains, as a model reads them; or many long ones, whose stretches stand for texts."""
    text = _long_texts(np.random.default_rng(7)) if stretches else _texts(np.random.default_rng(7), domains)
    decoder = _decoder(router, 0)
    static = [PROBES[name]() for name in STATIC_PROBES]
    one_pass = ProbePass(static)
    for view in walk(decoder, None, needs_of(static)):
        one_pass.show(view)
    known = {name: dict(result.arrays) for name, result in one_pass.results().items()}
    *views, head = walk(decoder, text, frozenset({Need.ROUTING, Need.OUTPUTS, Need.PREDICTIONS}))
    before = _decoder(router, 0)
    with torch.no_grad():
        for parameter in before.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    saturation = PROBES["saturation"]()
    saturation.begin(10, {})
    for view in walk(before, text, frozenset({Need.ROUTING})):
        if isinstance(view, LayerView):
            saturation.update(view)
    if stretches:
        count = LONG_POPULATION * STRETCHES
        mask, domain = torch.ones(count, STRETCH, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
        head = replace(head, text=ProbeText(text.input_ids.view(count, STRETCH), mask, domain))
    return Population(views, head, saturation.arrays, known)


def coverage(
    texts: int, simulated: int, domains: int = 1, router: str = "softmax_topk", names: Sequence[str] = ()
) -> dict[str, tuple[float, float]]:
    """Headline -> how often its interval holds the truth, and the median of its width; of all that have one."""
    rng, whole, names = np.random.default_rng(texts), population(router, domains), names or PROBES_OF[router]
    of_domain = [np.flatnonzero(whole.head.text.domain.numpy() == number) for number in range(domains)]
    wanted = [len(range(number, texts, domains)) for number in range(domains)]
    # All texts, with the domains in the proportions of the few.
    every = [mine[: len(mine) * count // max(wanted)] for mine, count in zip(of_domain, wanted, strict=True)]
    some = [
        np.concatenate([rng.choice(mine, count, replace=False) for mine, count in zip(of_domain, wanted, strict=True)])
        for _ in range(simulated)
    ]
    return _held(whole, some, np.concatenate(every), names)


def _held(
    whole: Population, some: Sequence[np.ndarray], every: np.ndarray, names: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Of intervals from some texts each, of what every one shows."""
    truth = whole.probed(every, names)
    # The others only cost time: such as those that shuffle domains hundreds of times for a null.
    shown = [name for name in names if any(one.interval is not None for one in truth[name].headlines.values())]
    names = [name for name in in_order(shown, PROBES) if name in names]
    held, width = defaultdict(list), defaultdict(list)
    for chosen in some:
        for name, result in whole.probed(chosen, names).items():
            for key, headline in result.headlines.items():
                if headline.interval is not None:
                    low, high = headline.interval
                    held[f"{name}/{key}"].append(low <= truth[name].headlines[key].value <= high)
                    width[f"{name}/{key}"].append(high - low)
    return {key: (float(np.mean(found)), float(np.median(width[key]))) for key, found in held.items()}


def coverage_of_stretches(simulated: int) -> dict[str, tuple[float, float]]:
    """The same of one long text whose stretches stand for texts."""
    rng, whole = np.random.default_rng(1), population("softmax_topk", 1, True)
    rows = np.arange(LONG_POPULATION * STRETCHES).reshape(LONG_POPULATION, STRETCHES)
    return _held(whole, [rng.choice(rows) for _ in range(simulated)], rows.ravel(), WITH_TEXT)


def main(simulated: int = 1000, domains: int = 1, router: str = "softmax_topk", what: str = "texts") -> None:
    """Print the table."""
    torch.set_num_threads(1)
    found = {}
    if what == "stretches":
        for key, (held, _) in sorted(coverage_of_stretches(simulated).items()):
            print(f"| `{key}` | {held:.1%} |")
        return
    for count in TEXTS:
        found[count] = coverage(count, simulated if count > domains else 1, domains, router)
        print(f"{count} texts: {len(found[count])} headlines", file=sys.stderr, flush=True)
    print_table(found)


def print_table(found):
    """How often each headline's interval held, by number of texts: what ``coverage`` gave of each number."""
    print("| headline | " + " | ".join(f"{count} text{'s' if count > 1 else ''}" for count in found) + " |")
    print("|---|" + "---|" * len(found))
    for key in sorted({key for by_key in found.values() for key in by_key}):
        cells = (f"{by_key[key][0]:.1%}" if key in by_key else "none" for by_key in found.values())
        print(f"| `{key}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])
