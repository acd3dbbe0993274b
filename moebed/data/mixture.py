"""Which domain and which window the i-th training sample is: pure functions of the seed and of the weights that domains
have had, so any can be found."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_CHUNK = 4096
_DOMAIN_DRAWS, _WINDOW_ORDER = 0, 1  # keep the two kinds of random numbers apart


class DomainDraws:
    """The domain of every training sample, drawn independently by weight.

    Every sample has a random number of its own, by the seed; the weights that hold where it lies say which domain that
    is. Weights may change at a sample; those before it are then over, and cannot be asked for again.

    Args:
        seed: Seed.
        weights: Probabilities ``(D,)``.
    """

    def __init__(self, seed: int, weights: np.ndarray) -> None:
        self._seed = seed
        self._has_changed = False
        self._begin(0, weights, np.zeros(len(weights), dtype=np.int64))

    def _begin(self, since: int, weights: np.ndarray, counts: np.ndarray) -> None:
        """Weights from a sample on, before which each domain had so many."""
        self.weights = np.asarray(weights, dtype=np.float64)
        self._since = since
        self._cumulative = np.cumsum(self.weights)
        self._cumulative[-1] = 1.0
        self._counts = [counts]  # of each domain, before each chunk, of the first before the weights hold
        self._current = (-1, np.zeros(0, dtype=np.int64))

    def _chunk(self, chunk: int) -> np.ndarray:
        """Domains of a chunk's samples; -1 of those before the weights hold."""
        if self._current[0] != chunk:
            rng = np.random.default_rng([self._seed, _DOMAIN_DRAWS, chunk])
            domains = np.searchsorted(self._cumulative, rng.random(_CHUNK), side="right")
            domains[: max(0, self._since - chunk * _CHUNK)] = -1
            self._current = (chunk, domains)
        return self._current[1]

    def _before(self, sample: int) -> np.ndarray:
        """Samples of each domain ``(D,)`` before this one."""
        chunk, offset = divmod(sample, _CHUNK)
        first = self._since // _CHUNK
        while len(self._counts) <= chunk - first:
            self._counts.append(self._counts[-1] + self._tally(self._chunk(first + len(self._counts) - 1)))
        return self._counts[chunk - first] + self._tally(self._chunk(chunk)[:offset])

    def _tally(self, domains: np.ndarray) -> np.ndarray:
        return np.bincount(domains[domains >= 0], minlength=len(self.weights))

    def domain(self, sample: int) -> int:
        """Returns the sample's domain."""
        return int(self._chunk(sample // _CHUNK)[sample % _CHUNK])

    def locate(self, sample: int) -> tuple[int, int]:
        """Returns the sample's domain, and how many samples before it are of that domain."""
        domain = self.domain(sample)
        return domain, int(self._before(sample)[domain])

    def change(self, sample: int, weights: np.ndarray) -> None:
        """Has this sample, and all after it, drawn by other weights ``(D,)``."""
        self._begin(sample, weights, self._before(sample))
        self._has_changed = True

    def state_dict(self) -> dict[str, Any]:
        """Returns the weights and since when they hold, as plain data; nothing where they never changed."""
        if not self._has_changed:
            return {}
        return {"since": self._since, "weights": self.weights.tolist(), "counts": self._counts[0].tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the weights that ``state_dict`` returned; with none, as it is."""
        if state:
            self._begin(state["since"], np.array(state["weights"]), np.array(state["counts"], dtype=np.int64))
            self._has_changed = True


class WindowOrder:
    """The order in which a finite domain's windows are taken.

    An epoch takes every window once, in a random order; each epoch also moves all windows by a random number of tokens
    below S, so that later epochs cut the text elsewhere. At most the two ends of the stream are left out of an epoch.

    Args:
        seed: Seed.
        domain: Index of the domain.
        num_tokens: Tokens of the stream (N), at least S + 1.
        sequence_length: Window stride (S).
    """

    def __init__(self, seed: int, domain: int, num_tokens: int, sequence_length: int) -> None:
        self._seed, self._domain, self._sequence_length = seed, domain, sequence_length
        self.windows_per_epoch = max(1, (num_tokens - sequence_length) // sequence_length)
        slack = num_tokens - 1 - self.windows_per_epoch * sequence_length
        self._num_offsets = min(sequence_length, slack + 1)
        self._current: tuple[int, int, np.ndarray] = (-1, 0, np.zeros(0, dtype=np.int64))

    def start(self, index: int) -> int:
        """Returns the position of the first token of the ``index``-th window ever taken from this domain."""
        epoch, place = divmod(index, self.windows_per_epoch)
        if self._current[0] != epoch:
            rng = np.random.default_rng([self._seed, _WINDOW_ORDER, self._domain, epoch])
            self._current = (epoch, int(rng.integers(self._num_offsets)), rng.permutation(self.windows_per_epoch))
        return self._current[1] + int(self._current[2][place]) * self._sequence_length
