"""How sure is a number that was measured on a few texts?

Tokens of one text are anything but independent, so a text is the unit: an interval says where the number of endlessly
many texts of the same kind lies, with the domains in the same proportions. Several texts are the units themselves,
compared within their domain; many are put together. One text cannot say what another would show, and has no interval.
Nor can stretches of it stand for texts: attention carries its beginning into all of them (of a long text ten stretches
hold 30 to 95 %, not 95, as ``tests/probes/simulate_intervals.py`` finds).

A statistic is computed anew without each unit in turn (the jackknife). The spread of these values is a standard error,
and with Student's t it makes an interval that holds what it says from two units on, for whatever is smooth in the
units' sums and is raised or lowered by few texts by less than it varies. Nothing is drawn at random, as
``scipy.stats.bootstrap`` would, which knows no strata and resamples too few texts to hold 95 %.

The largest of several is not smooth, and few texts raise it by more than it varies. No interval is given for such a
number: of those tried none holds it, whatever the model (``tests/probes/simulate_maxima.py`` has the table).

T tokens, U units, B sequences, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from moebed.views.layer import ProbeText
from probes.contract import Arrays, Headline, Probe, by_layer

DRAWS = 1000
SEED = 20240618
MOST_UNITS = 24  # by which Student's t is near the normal distribution; further ones cost time alone
TAIL = 0.975  # of a two-sided 95 % interval
LARGEST = (
    "no interval, as it is the largest of several, which few texts raise: with more it would be lower, and by how "
    "much cannot be told"
)
WITHOUT = "_without"  # ends the key of a statistic's values without each unit
ANY = (-math.inf, math.inf)
SHARE = (0.0, 1.0)


class Units(NamedTuple):
    """What a text is cut into.

    Args:
        of_token: (T,) the unit of each token.
        stratum: (U,) the domain that each unit is compared within.
    """

    of_token: np.ndarray
    stratum: np.ndarray

    def sums(self, values: np.ndarray, taken: np.ndarray | None = None) -> np.ndarray:
        """Sums (U, ...) over the tokens of each unit of values (T, ...), or of those of the tokens taken."""
        unit = self.of_token if taken is None else self.of_token[taken]
        flat = values.reshape(len(values), -1)
        found = np.stack([np.bincount(unit, column, len(self.stratum)) for column in flat.T], axis=1)
        return found.reshape(len(self.stratum), *values.shape[1:])

    def means_without(self, values: np.ndarray, taken: np.ndarray | None = None) -> np.ndarray:
        """Means (U, ...) of values (T, ...) without each unit in turn; what is NaN is no value."""
        known = np.isfinite(values)
        total = without(self.sums(np.where(known, values, 0.0), taken), self.stratum)
        count = without(self.sums(known.astype(np.float64), taken), self.stratum)
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0).astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored once of them: ``unit_stratum (U,)``."""
        return {"unit_stratum": self.stratum.astype(np.int16)}


def units_of(text: ProbeText | None, tokens: int) -> Units:
    """The units of a text; without one, of so many tokens, all is one unit."""
    if text is None:
        return Units(np.zeros(tokens, np.int64), np.zeros(1, np.int64))
    present, of_token = np.unique(text.sequence.cpu().numpy(), return_inverse=True)
    units = sequence_units(text.domain.cpu().numpy()[present])
    return Units(units.of_token[of_token], units.stratum)


def sequence_units(domain: np.ndarray) -> Units:
    """Units of sequences of these domains (B,), which stand where the tokens do: ``of_token`` is (B,)."""
    _, group, size = np.unique(domain, return_inverse=True, return_counts=True)
    unit, strata, start = np.zeros(len(domain), np.int64), [], 0
    for number, count in enumerate(size):
        units = min(count, max(2, round(MOST_UNITS * count / len(domain))))
        unit[np.flatnonzero(group == number)] = start + np.arange(count) * units // count
        strata += [number] * units
        start += units
    return Units(unit, np.array(strata, np.int64))


def without(sums: np.ndarray, stratum: np.ndarray) -> np.ndarray:
    """Sums (U, ...) with the mean of its stratum's others (U,) in the place of each unit in turn.

    So every stratum keeps its weight, and what differs between strata is no spread. One that is alone in its stratum
    stays.
    """
    left = np.repeat(sums.sum(axis=0, keepdims=True), len(sums), axis=0)
    for number in np.unique(stratum):
        mine = stratum == number
        if (count := int(mine.sum())) > 1:
            left[mine] += (sums[mine].sum(axis=0) - count * sums[mine]) / (count - 1)
    return left


def jackknife(
    value: float | np.ndarray, values_without: np.ndarray, stratum: np.ndarray, within: tuple[float, float] = ANY
) -> np.ndarray:
    """95 % intervals (2, ...) of statistics; NaN where no stratum has two units or a value is none.

    A unit that is alone in its stratum is taken to vary as the others do.

    Args:
        value: (...) of all units.
        values_without: (U, ...) without each unit, as from :func:`without`.
        stratum: (U,) units are compared within these.
        within: The least and the largest value that the statistic can have.
    """
    from scipy.stats import t as student

    error, freedom = standard_error(values_without, stratum)
    if not freedom:
        return np.full((2, *error.shape), np.nan)
    reach = student.ppf(TAIL, freedom) * error
    ends = np.clip(np.stack([value - reach, value + reach]), *within)
    return np.where(np.isfinite(ends), ends, np.nan)


def jackknife_of_share(value: np.ndarray, values_without: np.ndarray, stratum: np.ndarray) -> np.ndarray:
    """The same of shares (...) of counts, as far in logits as the standard error reaches: (2, ...).

    A share near 0 varies upwards more than downwards. Of one that is 0 or 1 few texts tell nothing: NaN.
    """
    inside = (value > 0) & (value < 1)
    slope = np.where(inside, value * (1 - value), np.nan)
    logit = np.log(np.where(inside, value, np.nan)) - np.log1p(-np.where(inside, value, np.nan))
    ends = jackknife(logit, np.asarray(values_without, np.float64) / slope, stratum)
    return 1 / (1 + np.exp(-ends))


def standard_error(values_without: np.ndarray, stratum: np.ndarray) -> tuple[np.ndarray, int]:
    """The standard errors (...) of such statistics, and the degrees of freedom of these; NaN where those are 0."""
    values, stratum = np.asarray(values_without, np.float64), np.asarray(stratum)
    groups = _compared(values, stratum)
    freedom = sum(len(mine) - 1 for mine in groups)
    if not freedom:
        return np.full(values.shape[1:], np.nan), 0
    variance = sum((len(mine) - 1) * mine.var(axis=0) for mine in groups) * len(values) / sum(map(len, groups))
    return np.sqrt(variance), freedom


def _compared(values: np.ndarray, stratum: np.ndarray) -> list[np.ndarray]:
    """The values (U, ...) by stratum, of those that have two units or more."""
    groups = [values[stratum == number] for number in np.unique(stratum)]
    return [mine for mine in groups if len(mine) > 1]


def keep(probe: Probe, key: str, layer: int, value: Tensor | np.ndarray | float, values_without: np.ndarray) -> None:
    """Store a statistic, ``<key>/<layer>``, with its values without each unit, ``<key>_without/<layer> (U, ...)``."""
    probe.put(key, layer, value)
    probe.put(key + WITHOUT, layer, values_without)


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
    """What must be known of the intervals of these headlines, in words, and why some never have one."""
    never = {why: [key for key, h in headlines.items() if h.no_interval == why] for why in _reasons(headlines)}
    notes = [f"{', '.join(keys)}: {why}" for why, keys in never.items()]
    if "unit_stratum" not in arrays or all(headline.no_interval for headline in headlines.values()):
        return notes
    return notes + few_texts(arrays["unit_stratum"])


def few_texts(stratum: np.ndarray) -> list[str]:
    """Why units of these strata (U,) give no interval, if they give none."""
    if len(np.unique(stratum)) < len(stratum):
        return []
    what = "one text" if len(stratum) < 2 else "one text of each domain"
    return [f"{what}: how far another would differ cannot be told, so there are no intervals; give several"]


def _reasons(headlines: Mapping[str, Headline]) -> list[str]:
    return list(dict.fromkeys(headline.no_interval for headline in headlines.values() if headline.no_interval))


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
