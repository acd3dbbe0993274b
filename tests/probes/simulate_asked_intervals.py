"""How often intervals hold what they say, of probes that run where they are asked for: prints a table.

``python tests/probes/simulate_asked_intervals.py N MODEL``, N times. As in ``simulate_intervals.py`` a small decoder
reads many made-up texts, once as it is and once under each intervention, and the probes are then shown a few of the
texts at a time. What they find in all of them is the truth; of predictors that are learned from the few texts
themselves, it is the mean of what all N draws of as many texts show.

Not among them: ``keep_k``, ``super_experts`` and ``moebed prune``, whose effects are those of ``interventions`` that
other texts have chosen.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import simulate_intervals as simulated
import torch
from torch import Tensor

from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder
from moebed.views.attribution import Following
from moebed.views.interventions import Intervention
from moebed.views.layer import HeadView, LayerView, Need, ProbeText
from moebed.views.live import intervene, walk
from probes.contract import Probe, ProbeResult
from probes.registry import PROBES
from probes.running.driver import run_probes

SIZES = {
    "few": {"num_hidden_layers": 2, "num_experts": 6, "num_experts_per_tok": 2},
    "many": {"num_hidden_layers": 4, "num_experts": 32, "num_experts_per_tok": 4},
}
POPULATION = 400  # texts
EVERY = 10**9  # tokens: none is left out
OPTIONS = {
    "interventions": {"apply": "mask 0; mask 1 zero @ layer 1; swap; keep 0,1,2; random_set 0; shift 2 by 1"},
    "observed_vs_needed": {"tokens": EVERY},
    "random_routes": {"tokens": EVERY},
}
BY_CHANGES = ("interventions", "observed_vs_needed", "random_routes", "expert_lens")
LEARNING = ("routing_ladder", "control_content")  # which take longer, and need three texts
LEARNED = ("share_", "recall_", "next_by_")  # headlines of predictors


def _decoder(size: str) -> Decoder:
    torch.manual_seed(0)
    widths = {"hidden_size": simulated.HIDDEN, "moe_intermediate_size": 8, "intermediate_size": 8}
    config = {"vocab_size": simulated.VOCABULARY, "num_attention_heads": 2, "num_shared_experts": 1}
    return Decoder(ModelConfig(**config, **widths, **SIZES[size], initializer_range=0.3))


@dataclass
class Read:
    """Texts, what a model made of them, and what its loss becomes under interventions, once they are asked for."""

    decoder: Decoder
    views: list[LayerView]
    head: HeadView
    rises: dict[str, Tensor] = field(default_factory=dict)

    def probed(self, chosen: np.ndarray, names: Sequence[str]) -> dict[str, ProbeResult]:
        """What probes find in the texts chosen, by their number."""
        text = self.head.text
        start, length = text.sequence_start, text.token_mask.sum(dim=1)
        tokens = torch.cat([torch.arange(int(start[n]), int(start[n] + length[n])) for n in chosen.tolist()])
        part = ProbeText(text.input_ids[chosen], text.token_mask[chosen], text.domain[chosen], text.domains)
        return run_probes(self._seen(tokens, part), [_made(name) for name in names])

    def _seen(self, tokens: Tensor, part: ProbeText) -> Iterator[LayerView | HeadView]:
        for view in self.views:
            yield _part(view, tokens, part)

        def under(interventions: Sequence[Intervention]) -> dict[str, Tensor]:
            missing = [replace(one, most=None) for one in interventions if one.name not in self.rises]
            if missing:
                self.rises |= intervene(self.decoder, self.head.text, missing)
            return {one.name: self.rises[one.name][tokens] for one in interventions}

        head = self.head
        yield replace(
            head, text=part, predicted=head.predicted[tokens], loss=head.loss[tokens], rms=head.rms[tokens], under=under
        )


def _made(name: str) -> Probe:
    probe = PROBES[name]()
    if name in OPTIONS:
        probe.options = PROBES[name].Options(**OPTIONS[name])
    return probe


def _part(view: LayerView, tokens: Tensor, text: ProbeText) -> LayerView:
    """Some tokens of a layer; of a decoder whose layers have no norm at their end."""
    routing, following, residual = view.routing, view.attribution.following, view.residual[tokens]
    taken = {key: value[tokens] for key, value in routing._asdict().items() if isinstance(value, torch.Tensor)}
    return replace(
        view,
        routing=routing._replace(**taken),
        moe_input=view.moe_input[tokens],
        residual=residual,
        text=text,
        attribution=replace(view.attribution, following=Following(following.rows, following.of_token[tokens])),
        leave=lambda output: residual + output,
        ablate=None,
    )


@lru_cache(maxsize=1)
def read(size: str) -> Read:
    """Many texts, as a decoder reads them."""
    simulated.POPULATION = POPULATION
    text, decoder = simulated._texts(np.random.default_rng(7), 1), _decoder(size)
    needs = frozenset({Need.ROUTING, Need.OUTPUTS, Need.PREDICTIONS, Need.ATTRIBUTION})
    *views, head = walk(decoder, text, needs)
    return Read(decoder, views, head)


def coverage(texts: int, draws: int, size: str, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Headline -> how often its interval holds the truth, and the share of draws that have one."""
    rng, whole = np.random.default_rng(texts), read(size)
    truth = {
        f"{name}/{key}": one.value
        for name, result in whole.probed(np.arange(POPULATION), [n for n in names if n not in LEARNING]).items()
        for key, one in result.headlines.items()
    }
    if "control_content" in names:  # what it learns is not asked of all
        arrays = [whole.views[n] for n in range(len(whole.views))]
        truth["control_content/control_share"] = float(np.mean([_control_share(view) for view in arrays]))
    values, ends = defaultdict(list), defaultdict(list)
    for _ in range(draws):
        for name, result in whole.probed(rng.choice(POPULATION, texts, replace=False), names).items():
            for key, one in result.headlines.items():
                values[f"{name}/{key}"].append(one.value)
                if one.interval is not None:
                    ends[f"{name}/{key}"].append(one.interval)
    found = {}
    for key, intervals in ends.items():
        learned = key.partition("/")[2].startswith(LEARNED)
        true = float(np.mean(values[key])) if learned else truth[key]
        low, high = np.array(intervals).T
        found[key] = float(((low <= true) & (true <= high)).mean()), len(intervals) / draws
    return found


def _control_share(view: LayerView) -> float:
    from probes.control_content import control_basis

    x = view.moe_input
    control = x @ control_basis(view.gate, view.shift_invariant)
    return float((control.square().sum(dim=1) / x.square().sum(dim=1)).mean())


def main(
    draws: int = 1000, size: str = "few", names: str = ",".join((*BY_CHANGES, *LEARNING)), texts: str = "3,5,8,12"
):
    """Print the table."""
    torch.set_num_threads(1)
    counts = [int(count) for count in texts.split(",")]
    found = {}
    for count in counts:
        found[count] = coverage(count, draws, size, names.split(","))
        print(f"{count} texts: {len(found[count])} headlines", file=sys.stderr, flush=True)
    simulated.print_table(found)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
