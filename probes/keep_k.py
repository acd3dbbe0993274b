"""Keep k: how many experts does the model need, and does a score know which? (REAP, EASY-EP, EMO)

B texts, E experts, D shares of them that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from moebed.errors import ConfigError
from moebed.views.interventions import Intervention, assigned_weights, keep
from moebed.views.layer import ExpertView, HeadView, LayerView, Need
from probes.contract import Arrays, Headline, Probe, ProbeOptions, ProbeResult, by_layer, by_part
from probes.figures import effects as pictures
from probes.measures.effects import Effect, Texts, effect_of
from probes.measures.expert_scores import RANDOM, SCORES, LayerScores, best, calibration_texts, random_scores
from probes.measures.resampling import few_texts

DRAWS = 5  # random sets
DOMAIN = "domain"
ONE_TEXT = "every domain has one text alone, on which experts would be scored and judged: give several texts"


class KeepK(Probe):
    """The loss with some experts of each layer alone, chosen by scores on some texts and judged on the others.

    Every other text of a domain is scored on. Removed experts lose their logit, the next best move up, and of fewer
    than K all run. Stored for each layer: ``score (E,)`` by name; ``kept (D, E)`` by name, 1 of those that stay;
    ``count (D,)``. Stored once, of shares that leave another number in some layer: ``keep_loss (D, B)`` by name, sums
    of the loss over the predicted tokens of each text; ``share (D,)``. ``loss (B,)``, the same of the model as it is;
    ``tokens (B,)``; ``text_domain (B,)``; ``calibration (B,)``, 1 of texts that are scored on; ``domain_names``. Names
    are those of ``probes.measures.expert_scores``, ``random_0`` to ``random_4``, and where there are several domains
    ``domain_0``, ...: the frequency on that domain's texts alone.
    """

    name = "keep_k"
    question = "How many experts does the model need, and does a score know which?"
    needs = frozenset({Need.ROUTING, Need.OUTPUTS, Need.PREDICTIONS})

    @dataclass(frozen=True)
    class Options(ProbeOptions):
        """One of how many experts is kept, several with commas between."""

        one_of: str = "2,4,8,16"

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.shares():
                raise ConfigError(f"probes: keep_k's one_of is {self.one_of!r}; write numbers above 1, such as '2,4,8'")

        def shares(self) -> list[float]:
            """Of all experts, the largest first; none if what is asked is not understood."""
            try:
                numbers = sorted({float(part) for part in self.one_of.split(",")})
            except ValueError:
                return []
            return [1 / number for number in numbers] if all(number > 1 for number in numbers) else []

    options: Options

    def begin_layer(self, view: LayerView) -> None:
        """Scores of this layer."""
        self._scores: LayerScores | None = None
        if view.routing is not None and view.residual is not None and view.num_experts > 1:
            self._scores = LayerScores(view, _calibration_tokens(view))

    def update_expert(self, view: LayerView, expert: ExpertView) -> None:
        """See one expert."""
        if self._scores is not None:
            self._scores.add(expert)

    def update(self, view: LayerView) -> None:
        """Keep the scores of a layer."""
        if self._scores is None or view.text is None or view.routing is None:
            return
        scores = self._scores.found()
        self._scores = None
        scores |= {f"{RANDOM}_{draw}": random_scores(view.num_experts, view.index, draw) for draw in range(DRAWS)}
        if len(view.text.domains) > 1:
            chosen, domain = assigned_weights(view.routing) != 0, view.text.domain[view.text.sequence.cpu()]
            of_calibration = _calibration_tokens(view).cpu()
            for number in range(len(view.text.domains)):
                mine = ((domain.cpu() == number) & of_calibration).to(chosen.device)
                scores[f"{DOMAIN}_{number}"] = chosen[mine].sum(dim=0).cpu().numpy().astype(np.float64)
        counts = [max(1, round(share * view.num_experts)) for share in self.options.shares()]
        for name, score in scores.items():
            self.put("score", view.index, score, name)
            kept = np.zeros((len(counts), view.num_experts), np.int8)
            for row, count in enumerate(counts):
                kept[row, list(best(score, count))] = 1
            self.put("kept", view.index, kept, name)
        self.put("count", view.index, np.array(counts))

    def update_head(self, head: HeadView) -> None:
        """The loss with each set alone."""
        kept = by_part(self.arrays, "kept")
        if head.under is None or not kept:
            return
        rows = distinct_rows(by_layer(self.arrays, "count"))
        texts, calibration = Texts(head.text, head.loss), calibration_texts(head.text.domain.cpu().numpy())
        as_it_is = texts.sums(head.loss.nan_to_num()).rise
        rises = head.under([one for name in kept for one in self._sets(name, rows)])
        for name in kept:
            rise = np.stack([texts.sums(rises[one.name]).rise for one in self._sets(name, rows)])
            self.put("keep_loss", None, as_it_is + rise, name)
        self.arrays |= {
            "loss": as_it_is.astype(np.float32),
            "tokens": texts.tokens,
            "text_domain": texts.domain,
            "calibration": calibration.astype(np.int8),
            "domain_names": np.array(head.text.domains, dtype=np.str_),
            "share": np.array([self.options.shares()[row] for row in rows], dtype=np.float32),
        }

    def _sets(self, name: str, rows: list[int]) -> Iterator[Intervention]:
        """The interventions of a score, one for each of some shares."""
        for row in rows:
            sets = {n: np.flatnonzero(of[row]).tolist() for n, of in by_layer(self.arrays, "kept", name).items()}
            yield keep(sets, name=f"keep by {name} {row}")

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Curves of all scores beside random ones, and what lies between them."""
        if "share" not in arrays:
            return ProbeResult(arrays, notes=["no layer with two or more experts has seen text that was predicted"])
        if not (_apart(arrays).any() and arrays["calibration"].any()):
            return ProbeResult(arrays, notes=[ONE_TEXT])
        effects, notes = curves(arrays), few_texts(_strata(arrays))
        shares = [float(share) for share in arrays["share"]]
        middle = min(range(len(shares)), key=lambda row: abs(shares[row] - 0.25))
        scalars, headlines = dict[str, float](), dict[str, Headline]()
        chance = effects[RANDOM]
        for name, rows in effects.items():
            scalars |= {f"rise_{name}/one_of_{1 / share:g}": row.mean for share, row in zip(shares, rows, strict=True)}
        for name in effects.keys() & SCORES.keys():
            between = area(arrays, name)
            scalars[f"area_{name}"] = between.mean
        for name in (n for n in SCORES if n in effects):
            row, between = effects[name][middle], area(arrays, name)
            headlines[f"rise_{name}"] = Headline(
                row.mean,
                f"With one of {1 / shares[middle]:g} experts of each layer, chosen by {name} on other texts, the loss "
                f"changes by {row.mean:+.3g} nats per token; with random ones by {chance[middle].mean:+.3g}.",
                row.interval,
            )
            headlines[f"area_{name}"] = Headline(
                between.mean,
                f"Over all shares, experts chosen by {name} leave the loss {between.mean:+.3g} nats per token better "
                f"than random ones (p {between.p:.2g} by signs flipped over texts).",
                between.interval,
            )
        if DOMAIN in effects:
            own, other = effects[DOMAIN][middle].mean, effects["other_domain"][middle].mean
            headlines["rise_domain"] = Headline(
                own,
                f"With those that a domain uses most, it changes by {own:+.3g} on that domain and by {other:+.3g} on "
                "others.",
                effects[DOMAIN][middle].interval,
            )
        notes += ["with fewer experts than a token has, it also computes less"]
        figures = {"keep_k": partial(pictures.draw_keep_k, shares, effects)}
        return ProbeResult(arrays, scalars, headlines, figures, notes)


def distinct_rows(counts: dict[int, np.ndarray]) -> list[int]:
    """The shares that leave another number of experts than those before, from counts (D,) by layer."""
    columns = np.stack(list(counts.values()), axis=1)  # (D, layers)
    return [row for row in range(len(columns)) if row == 0 or (columns[row] != columns[row - 1]).any()]


def _calibration_tokens(view: LayerView) -> torch.Tensor:
    assert view.text is not None
    taken = torch.from_numpy(calibration_texts(view.text.domain.cpu().numpy()))
    return taken[view.text.sequence.cpu()]


def _apart(arrays: Arrays) -> np.ndarray:
    """Texts (B,) that are judged on."""
    return (arrays["calibration"] == 0) & (arrays["tokens"] > 0)


def _strata(arrays: Arrays) -> np.ndarray:
    return np.unique(arrays["text_domain"][_apart(arrays)], return_inverse=True)[1]


def _rises(arrays: Arrays) -> dict[str, np.ndarray]:
    """Sums (D, B) of the loss's rise by score; random ones are their mean, domains' ones of their own and of others."""
    found = {
        name.partition("/")[2]: np.asarray(loss, np.float64) - arrays["loss"]
        for name, loss in arrays.items()
        if name.startswith("keep_loss/")
    }
    rises = {name: rise for name, rise in found.items() if name in SCORES}
    rises[RANDOM] = np.mean([rise for name, rise in found.items() if name.startswith(f"{RANDOM}_")], axis=0)
    by_domain = [found[f"{DOMAIN}_{n}"] for n in range(len(arrays["domain_names"])) if f"{DOMAIN}_{n}" in found]
    if by_domain:
        own = np.arange(len(by_domain))[:, None] == arrays["text_domain"]  # (domains, B)
        rises[DOMAIN] = np.einsum("nb,ndb->db", own, by_domain)
        rises["other_domain"] = np.einsum("nb,ndb->db", ~own, by_domain) / (len(by_domain) - 1)
    return rises


def curves(arrays: Arrays) -> dict[str, list[Effect]]:
    """The effect at each share by score, on the texts that are judged on."""
    apart = _apart(arrays)
    tokens, domain = arrays["tokens"][apart], arrays["text_domain"][apart]
    return {name: [effect_of(row[apart], tokens, domain) for row in rise] for name, rise in _rises(arrays).items()}


def area(arrays: Arrays, name: str) -> Effect:
    """By how much a score's sets are better than random ones, mean over shares."""
    rises, apart = _rises(arrays), _apart(arrays)
    better = (rises[RANDOM] - rises[name]).mean(axis=0)[apart]
    return effect_of(better, arrays["tokens"][apart], arrays["text_domain"][apart])
