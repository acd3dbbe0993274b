"""How sure is a number that was measured on a few texts?

Tokens of one text are anything but independent, so a text is the unit: what an interval says is how far the number of
as many other texts would be. Several texts are the units themselves, within their domain where each domain has two or
more; many are put together. Of one text, which cannot say what another would show, stretches are the units, and the
interval is of that text alone; of one short text there is none.

A statistic is computed anew without each unit in turn (the jackknife). The spread of these values is a standard error,
and with Student's t it makes an interval that holds what it says from two units on, where drawing units anew
(percentile bootstrap) holds 50 % at two and 90 % at eight. Nothing is drawn at random.

T tokens, U units, B sequences, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from moebed.views import ProbeText
from probes.base import Arrays, Headline, by_layer

DRAWS = 1000
SEED = 20240618
MOST_UNITS = 24  # by which Student's t is near the normal distribution; further ones cost time alone
STRETCHES, SHORTEST_STRETCH = 10, 32  # tokens
TAIL = 0.975  # of a two-sided 95 % interval
WITHOUT = "_without"  # ends the key of a statistic's values without each unit
ANY = (-math.inf, math.inf)
SHARE = (0.0, 1.0)


class Units(NamedTuple):
    """What a text is cut into.

    Args:
        of_token: (T,) the unit of each token.
        stratum: (U,) the group that each unit is compared within.
        texts: Sequences that have tokens.
    """

    of_token: np.ndarray
    stratum: np.ndarray
    texts: int

    def sums(self, values: np.ndarray, taken: np.ndarray | None = None) -> np.ndarray:
        """Sums (U, ...) over the tokens of each unit of values (T, ...), or of those of the tokens taken."""
        unit = self.of_token if taken is None else self.of_token[taken]
        flat = values.reshape(len(values), -1)
        found = np.stack([np.bincount(unit, column, len(self.stratum)) for column in flat.T], axis=1)
        return found.reshape(len(self.stratum), *values.shape[1:])

    def means_without(self, values: np.ndarray, taken: np.ndarray | None = None) -> np.ndarray:
        """Means (U, ...) of values (T, ...) without each unit in turn; what is NaN is no value."""
        known = np.isfinite(values)
        total = without(self.sums(np.where(known, values, 0.0), taken))
        count = without(self.sums(known.astype(np.float64), taken))
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0).astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored once of them: ``unit_stratum (U,)`` and ``unit_texts``."""
        return {"unit_stratum": self.stratum.astype(np.int16), "unit_texts": np.asarray(self.texts, np.int64)}


def units_of(text: ProbeText | None, tokens: int) -> Units:
    """The units of a text; without one, of so many tokens, all is one unit."""
    if text is None:
        return Units(np.zeros(tokens, np.int64), np.zeros(1, np.int64), 1)
    sequence = text.sequence.cpu().numpy()
    present, of_token = np.unique(sequence, return_inverse=True)
    if len(present) < 2:
        stretches = STRETCHES if tokens >= STRETCHES * SHORTEST_STRETCH else 1
        return Units(np.arange(tokens) * stretches // max(tokens, 1), np.zeros(stretches, np.int64), len(present))
    domain = text.domain.cpu().numpy()[present]
    unit, stratum = sequence_units(domain)
    return Units(unit[of_token], stratum, len(present))


def sequence_units(domain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Units of sequences of these domains (B,): each one's unit (B,), and the units' strata (U,)."""
    _, group, size = np.unique(domain, return_inverse=True, return_counts=True)
    if size.min() < 2:  # a domain of one text has no spread of its own
        group, size = np.zeros_like(group), np.array([len(domain)])
    unit, strata, start = np.zeros(len(domain), np.int64), [], 0
    for number, count in enumerate(size):
        units = min(count, max(2, round(MOST_UNITS * count / len(domain))))
        unit[np.flatnonzero(group == number)] = start + np.arange(count) * units // count
        strata += [number] * units
        start += units
    return unit, np.array(strata)


def without(sums: np.ndarray) -> np.ndarray:
    """Sums (U, ...) of all units but each."""
    return sums.sum(axis=0) - sums


def jackknife(
    value: float | np.ndarray,
    values_without: np.ndarray,
    stratum: np.ndarray | None = None,
    within: tuple[float, float] = ANY,
    by_stratum: bool = False,
) -> np.ndarray:
    """95 % intervals (2, ...) of statistics; NaN where there are too few units or a value is none.

    Args:
        value: (...) of all units.
        values_without: (U, ...) without each unit.
        stratum: (U,) units are compared within these; all of them with each other if not given.
        within: The least and the largest value that the statistic can have.
        by_stratum: The statistic is one of the strata's own means, so that a unit that is left out leaves its stratum
            the weight that it had; of a statistic over all units, the other strata gain what it loses.
    """
    from scipy.stats import t as student

    values = np.asarray(values_without, np.float64)
    stratum = np.zeros(len(values), np.int64) if stratum is None else np.asarray(stratum)
    nothing = np.full((2, *values.shape[1:]), np.nan)
    if len(values) < 2:
        return nothing
    variance, strata = np.zeros(values.shape[1:]), np.unique(stratum)
    for number in strata:
        mine = values[stratum == number]
        count = len(mine)
        gain = 1.0 if by_stratum else (count / max(count - 1, 1) * (len(values) - 1) / len(values)) ** 2
        variance = variance + gain * (count - 1) * mine.var(axis=0)
    reach = student.ppf(TAIL, len(values) - len(strata)) * np.sqrt(variance)
    ends = np.clip(np.stack([value - reach, value + reach]), *within)
    return np.where(np.isfinite(ends), ends, nothing)


def keep(arrays: dict[str, np.ndarray], key: str, value: float | np.ndarray, values_without: np.ndarray) -> None:
    """Store a statistic, ``<key>/<layer>``, with its values without each unit, ``<key>_without/<layer> (U, ...)``."""
    name, slash, rest = key.partition("/")
    arrays[key] = np.asarray(value, np.float32)
    arrays[f"{name}{WITHOUT}{slash}{rest}"] = np.asarray(values_without, np.float32)


def interval_of(
    arrays: Arrays, key: str, value: float, layers: Iterable[int] | None = None, within: tuple[float, float] = ANY
) -> tuple[float, float] | None:
    """The interval of a statistic's mean over layers, from what :func:`keep` stored; None where none can be had."""
    found = by_layer(arrays, key + WITHOUT) if key + WITHOUT not in arrays else {0: arrays[key + WITHOUT]}
    chosen = [values for layer, values in found.items() if layers is None or layer in layers]
    if not chosen or "unit_stratum" not in arrays:
        return None
    return as_interval(jackknife(value, np.mean(chosen, axis=0), arrays["unit_stratum"], within))


def as_interval(ends: np.ndarray) -> tuple[float, float] | None:
    """Two numbers, or None where they are not."""
    return (float(ends[0]), float(ends[1])) if np.isfinite(ends).all() else None


def unit_notes(arrays: Arrays, headlines: Mapping[str, Headline]) -> list[str]:
    """What must be known of the intervals of these headlines, in words."""
    if not headlines or "unit_stratum" not in arrays:
        return []
    if len(arrays["unit_stratum"]) < 2:
        why = "one short text" if int(arrays["unit_texts"]) == 1 else "no text"
        return [f"{why}: how far another would differ cannot be told, so there are no intervals; give several texts"]
    if int(arrays["unit_texts"]) == 1:
        return [
            f"one text: the intervals are from {len(arrays['unit_stratum'])} stretches of it, and say nothing of what "
            "another text would show"
        ]
    return []


def shuffle_labels(labels: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """(R, B) labels in random order: what the groups would be if they meant nothing."""
    return np.random.default_rng(seed + 1).permuted(np.tile(labels.astype(np.int16), (draws, 1)), axis=1)


def p_value(observed: float | np.ndarray, null: np.ndarray) -> np.ndarray:
    """How often draws (R, ...) under the null are at least as large as what was observed (...), itself counted."""
    # Sums in another order may differ in the last bits from what was observed.
    return (1 + (null >= np.asarray(observed) * (1 - 1e-6)).sum(axis=0)) / (1 + len(null))


def smallest_p(labels: np.ndarray) -> float:
    """The smallest p that shuffling these labels can give: 1 / number of different groupings of the sequences."""
    sizes = np.unique(labels, return_counts=True)[1]
    equal = np.unique(sizes, return_counts=True)[1]  # groups of one size may change places
    ways = math.lgamma(len(labels) + 1) - sum(math.lgamma(n + 1) for n in (*sizes, *equal))
    return math.exp(-min(ways, 700.0))
