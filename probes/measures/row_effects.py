"""Effects of changing single tokens: some tokens of a text, each by itself, and what varies over texts.

T tokens, n of them drawn that are followed by another, U units of texts, M questions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from moebed.errors import ConfigError
from moebed.views.interventions import drawn_tokens
from moebed.views.layer import ProbeText
from probes.measures.resampling import TAIL, Units, standard_error, units_of
from probes.measures.significance import sign_flip_p

POWER = 0.8  # with which the smallest effect that is named would be seen


class DrawnTokens(NamedTuple):
    """The tokens of a text that are changed.

    Args:
        token: (n,) which of the T tokens.
        sequence: (n,) which sequence each is of.
        units: Of these tokens.
    """

    token: np.ndarray
    sequence: np.ndarray
    units: Units

    @classmethod
    def of(cls, text: ProbeText, most: int) -> DrawnTokens:
        """Those that an intervention reaches which is made ``alone`` at so many tokens at most; all followed by one."""
        sequence, followed = text.sequence.cpu(), (text.targets >= 0).cpu()
        token = (drawn_tokens(len(sequence), most) & followed).nonzero().squeeze(1).numpy()
        units = units_of(text, len(sequence))
        return cls(token, sequence.numpy()[token], Units(units.of_token[token], units.stratum))

    def by_text(self, values: np.ndarray) -> np.ndarray:
        """Sums by sequence of values (n,), what is NaN left out."""
        return np.bincount(self.sequence, np.nan_to_num(values))

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored once of them: ``token (n,)``, ``token_sequence (n,)`` and the units' own."""
        found = {"token": self.token.astype(np.int64), "token_sequence": self.sequence.astype(np.int64)}
        return found | self.units.arrays()


class Standardised(NamedTuple):
    """A mean over tokens by its standard deviation over them (Cohen's d), and how sure it is.

    Args:
        d: It; NaN where nothing is known.
        without: (U,) the same without each unit.
        p: By signs flipped over texts.
    """

    d: float
    without: np.ndarray
    p: float


def standardised(values: np.ndarray, tokens: DrawnTokens) -> Standardised:
    """Of values (n,) of drawn tokens; what is NaN is no value."""
    known = values[np.isfinite(values)]
    spread = float(known.std()) if len(known) else 0.0
    if not spread:
        return Standardised(np.nan, np.full(len(tokens.units.stratum), np.nan), 1.0)
    scaled = values / spread  # float32 keeps what is left out of sums near 1
    mean, square = (tokens.units.means_without(part).astype(np.float64) for part in (scaled, scaled**2))
    without = mean / np.sqrt(np.maximum(square - mean**2, 1e-12))
    return Standardised(float(known.mean()) / spread, without, sign_flip_p(tokens.by_text(values)))


def smallest_seen(values_without: np.ndarray, stratum: np.ndarray, questions: int = 1) -> np.ndarray:
    """The smallest effect (...) that would be called with 80 % probability, at 5 % over so many questions (Bonferroni).

    Args:
        values_without: (U, ...) of the statistic, as :func:`probes.measures.resampling.jackknife` takes them.
        stratum: (U,).
        questions: How many are asked at a time.
    """
    from scipy.stats import t as student

    error, freedom = standard_error(values_without, stratum)
    if not freedom:
        return error
    return (student.ppf(1 - (1 - TAIL) / questions, freedom) + student.ppf(POWER, freedom)) * error


def power_said(values_without: Iterable[np.ndarray], stratum: np.ndarray, questions: int) -> str:
    """What would have been seen in a layer, in words, mean over layers; empty where too few texts tell."""
    seen = [float(smallest_seen(values, stratum, questions)) for values in values_without]
    known = [value for value in seen if np.isfinite(value)]
    return f"; {np.mean(known):.2g} would be seen in a layer with {POWER:.0%} power" if known else ""


def require_layers(layers: str, probe: str) -> None:
    """Raise ConfigError where a setting names no layers."""
    if not all(part.strip().isdecimal() for part in layers.split(",") if layers.strip()):
        raise ConfigError(f"probes: {probe}'s layers is {layers!r}; write numbers with commas between, or nothing")


def asked_layers(layers: str, known: Iterable[int]) -> list[int]:
    """Those of the known layers that a setting names; all of them if it names none."""
    named = {int(part) for part in layers.split(",") if layers.strip()}
    return [layer for layer in known if not named or layer in named]
