"""Interventions: what does the loss become where the router decides otherwise?

B texts, S interventions, Q bins of the loss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from moebed.model.config import ModelConfig
from moebed.views.branches import require_different
from moebed.views.intervention_names import parse
from moebed.views.intervention_words import split
from moebed.views.interventions import Intervention, alone, identity
from moebed.views.layer import HeadView, Need
from probes.contract import Arrays, Headline, Probe, ProbeOptions, ProbeResult
from probes.figures import effects as pictures
from probes.measures.effects import Effect, Texts, effect_of
from probes.measures.resampling import few_texts
from probes.measures.significance import holm

HEADLINES = 12  # interventions up to which each has one
CALLED = 0.05


class Interventions(Probe):
    """The loss under interventions less the loss as it is, beside what the machinery itself makes of it (identity).

    Stored once, sums over the predicted tokens of each text: ``delta (S, B)``, of the loss's rise in nats; ``size (S,
    B)``, of its size; ``worse_share (S, B)``, the share of tokens whose loss rises; ``delta_by_bin (S, B, Q)`` and
    ``bin_tokens (B, Q)``, by fifths of the loss as it is, from the tokens that the model is surest of; ``tokens (B,)``;
    ``text_domain (B,)``; ``names (S,)``, which say where each is made. Of one under which the text did not come
    through, as its numbers overflow, all are NaN.
    """

    name = "interventions"
    question = "What does the loss become where the router decides otherwise?"
    needs = frozenset({Need.PREDICTIONS})

    @dataclass(frozen=True)
    class Options(ProbeOptions):
        """What is changed, as :mod:`moebed.views.intervention_names` reads it; several with a semicolon between."""

        apply: str = ""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.interventions()

        def interventions(self) -> list[Intervention]:
            """Those that are asked for, and with them nothing at all, in the same layers."""
            asked = [parse(part) for part in split(self.apply)]
            require_different(asked)
            changes = [one for one in asked if not _is_noise(one.name)] or asked
            everywhere = any(one.layers is None for one in changes)
            layers = None if everywhere else frozenset().union(*(one.layers or () for one in changes))
            nothing = [identity(layers), alone(identity(layers))]
            kinds = {one.is_alone for one in changes}
            return [*(one for one in nothing if one.is_alone in kinds), *(c for c in changes if not _is_noise(c.name))]

    options: Options

    def interventions(self, config: ModelConfig) -> Sequence[Intervention]:
        """All of them are known before."""
        return self.options.interventions()

    def update_head(self, head: HeadView) -> None:
        """Keep the effects."""
        asked = self.options.interventions()
        if head.under is None or not asked:
            return
        found, texts = head.under(asked), Texts(head.text, head.loss)
        sums = [texts.sums(found[one.name]) for one in asked]
        tokens = texts.tokens
        self.arrays |= {
            "names": np.array([one.name for one in asked], dtype=np.str_),
            "delta": np.stack([one.rise for one in sums]).astype(np.float32),
            "size": np.stack([one.size for one in sums]).astype(np.float32),
            "worse_share": (np.stack([one.worse for one in sums]) / np.maximum(tokens, 1)).astype(np.float32),
            "delta_by_bin": np.stack([one.by_bin for one in sums]).astype(np.float32),
            "bin_tokens": texts.bin_tokens.astype(np.int64),
            "tokens": tokens,
            "text_domain": texts.domain,
        }

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """A row for each intervention: mean, interval, p, and what nothing at all makes of the loss."""
        if "names" not in arrays:
            return ProbeResult(arrays, notes=["no intervention was asked for: give --intervene 'mask 3 @ layer 5'"])
        if not arrays["tokens"].any():
            return ProbeResult(arrays, notes=["no token is followed by another: there is no loss that could change"])
        rows, notes = table(arrays), few_texts_of(arrays)
        noise = max(row.size for row in rows if _is_noise(row.name))
        failed = [row.name for row in rows if not np.isfinite(row.effect.mean)]
        notes += [f"{name}: hidden states overflow, and nothing is known of the loss" for name in failed]
        told = [row for row in rows if not _is_noise(row.name) and row.name not in failed]
        scalars = {f"effect/{slug(row.name)}": row.effect.mean for row in told} | {"noise": noise}
        largest = sorted(told, key=lambda row: -abs(row.effect.mean))[:HEADLINES]
        if len(told) > HEADLINES:
            notes.append(f"{HEADLINES} of {len(told)} interventions are named here, those of the largest effects")
        headlines = {
            slug(row.name): Headline(row.effect.mean, sentence(row, noise), row.effect.interval)
            for row in told
            if row in largest
        }
        figures = {
            "effects": partial(pictures.draw_effects, [(row.name, row.effect, row.called) for row in told], noise),
            "by_confidence": partial(pictures.draw_by_confidence, by_confidence(arrays, [row.name for row in largest])),
        }
        return ProbeResult(arrays, scalars, headlines, figures if told else {}, notes)


class Row(NamedTuple):
    """One intervention of a table.

    Args:
        name: Its name.
        effect: On the loss.
        holm: p, adjusted for all interventions of the table.
        worse: Share of tokens whose loss rises.
        size: Mean size of a token's change.
    """

    name: str
    effect: Effect
    holm: float
    worse: float
    size: float

    @property
    def called(self) -> bool:
        """Whether p and interval both say that the loss changes."""
        within = self.effect.interval
        return self.holm < CALLED and within is not None and not within[0] <= 0 <= within[1]


def table(arrays: Arrays) -> list[Row]:
    """All interventions of stored arrays, in their order."""
    tokens, domain = arrays["tokens"], arrays["text_domain"]
    names = [str(name) for name in arrays["names"]]
    effects = [effect_of(rise, tokens, domain) for rise in arrays["delta"]]
    asked = [at for at, name in enumerate(names) if not _is_noise(name) and np.isfinite(effects[at].mean)]
    adjusted = dict(zip(asked, holm([effects[at].p for at in asked]), strict=True))
    share = tokens / tokens.sum()
    return [
        Row(
            name,
            effects[at],
            adjusted.get(at, 1.0),
            float(arrays["worse_share"][at] @ share),
            float(arrays["size"][at].sum(dtype=np.float64) / tokens.sum()),
        )
        for at, name in enumerate(names)
    ]


def sentence(row: Row, noise: float) -> str:
    """What a row says; a change that chance or the machinery makes as well is called none."""
    effect = row.effect
    said = (
        f"Under '{row.name}' the loss changes by {effect.mean:+.3g} nats per token, and rises for {row.worse:.0%} of "
        f"them (p {effect.p:.2g} by signs flipped over texts, {row.holm:.2g} with all that were tried; nothing at all "
        f"changes a token by {noise:.1g})"
    )
    if row.size <= 3 * noise:
        return said + ": no more than the rounding of the pass."
    return said + ("." if row.called else ": no more than texts differ by chance.")


def by_confidence(arrays: Arrays, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Mean rise (Q,) of the interventions of these names, by fifths of the loss as it is."""
    tokens = np.maximum(arrays["bin_tokens"].sum(axis=0), 1)
    known = [str(name) for name in arrays["names"]]
    return {name: arrays["delta_by_bin"][known.index(name)].sum(axis=0, dtype=np.float64) / tokens for name in names}


def few_texts_of(arrays: Arrays) -> list[str]:
    """Why there are no intervals, if there are none."""
    domain = arrays["text_domain"][arrays["tokens"] > 0]
    return few_texts(np.unique(domain, return_inverse=True)[1])


def _is_noise(name: str) -> bool:
    return name.startswith("identity")


def slug(name: str) -> str:
    """A name as part of a tag or a file's name."""
    return re.sub(r"[^0-9A-Za-z.-]+", "_", name).strip("_")
