"""Effects of interventions: the loss of a text under them less its loss as it is, kept as sums by text.

Tokens of one text depend on one another, so that a text is the unit of intervals and of signs that are flipped.

T tokens, B texts, S interventions, Q bins of the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from moebed.machine.float64 import double
from moebed.views.layer import ProbeText
from probes.measures.resampling import Units, as_interval, jackknife, sequence_units, without
from probes.measures.significance import sign_flip_p

BINS = 5


class TextSums(NamedTuple):
    """Of one intervention, sums over the predicted tokens of each text.

    Args:
        rise: (B,) of the loss's rise.
        size: (B,) of its size, whatever its sign.
        worse: (B,) of the tokens whose loss rises.
        by_bin: (B, Q) of the rise, by the loss of the text as it is: from the tokens that the model is sure of to those
            that it is not.
    """

    rise: np.ndarray
    size: np.ndarray
    worse: np.ndarray
    by_bin: np.ndarray


class Texts:
    """The predicted tokens of a text, by text and by how sure the model is of them.

    Args:
        text: Its sequences.
        loss: (T,) nats of each token as it is, NaN where none follows.
    """

    def __init__(self, text: ProbeText, loss: Tensor) -> None:
        known = ~loss.isnan()
        self.known = known.cpu().numpy()
        self.sequence = text.sequence.cpu().numpy()[self.known]
        self.count = len(text.token_mask)
        self.domain = text.domain.cpu().numpy()
        values = double(loss[known]).cpu().numpy()
        edges = np.quantile(values, np.arange(1, BINS) / BINS) if len(values) else np.zeros(BINS - 1)
        self.bin = np.searchsorted(edges, values, side="right")

    @property
    def tokens(self) -> np.ndarray:
        """(B,) predicted tokens of each text."""
        return np.bincount(self.sequence, minlength=self.count)

    @property
    def bin_tokens(self) -> np.ndarray:
        """(B, Q) the same of each bin."""
        return self._by_bin(np.ones(len(self.sequence)))

    def sums(self, rise: Tensor) -> TextSums:
        """Of a rise (T,) of the loss; NaN where there is none."""
        values = double(rise).cpu().numpy()[self.known]

        def by_text(of: np.ndarray) -> np.ndarray:
            return np.bincount(self.sequence, of, self.count)

        return TextSums(by_text(values), by_text(np.abs(values)), by_text(values > 0.0), self._by_bin(values))

    def _by_bin(self, values: np.ndarray) -> np.ndarray:
        cell = self.sequence * BINS + self.bin
        return np.bincount(cell, values, self.count * BINS).reshape(self.count, BINS)


class Effect(NamedTuple):
    """What an intervention does to the loss, over texts.

    Args:
        mean: Nats per token.
        interval: 95 %, of what endlessly many texts of the kind would show; None where too few tell.
        p: By signs flipped over texts.
    """

    mean: float
    interval: tuple[float, float] | None
    p: float


def effect_of(rise: np.ndarray, tokens: np.ndarray, domain: np.ndarray) -> Effect:
    """The effect of sums (B,) of a rise over so many tokens (B,), of texts of these domains (B,)."""
    there = tokens > 0
    rise, tokens = np.asarray(rise, np.float64)[there], np.asarray(tokens, np.float64)[there]
    mean = float(rise.sum() / tokens.sum())
    units: Units = sequence_units(np.asarray(domain)[there])
    left = without(units.sums(np.stack([rise, tokens], axis=1)), units.stratum)
    ends = jackknife(mean, left[:, 0] / left[:, 1], units.stratum)
    return Effect(mean, as_interval(ends), sign_flip_p(rise))
