"""Which domain and which window the i-th training sample is: pure functions of the seed, so any can be found."""

from collections.abc import Sequence

import numpy as np

from moebed.data.sources import SourceConfig

_CHUNK = 4096
_DOMAIN_DRAWS, _WINDOW_ORDER = 0, 1  # keep the two kinds of random numbers apart


def mixture_weights(configs: Sequence[SourceConfig], train_tokens: Sequence[int | None]) -> np.ndarray:
    """Returns each domain's chance to give the next sample.

    Args:
        configs: The sources.
        train_tokens: Training tokens of each domain, None where it is streaming.

    Returns:
        Probabilities ``(D,)``. With no weight given and every domain finite, in proportion to ``train_tokens``;
        otherwise in proportion to the weights, a missing one being 1.
    """
    sizes = [size for size in train_tokens if size is not None]
    if len(sizes) == len(configs) and all(config.weight is None for config in configs):
        weights = np.array(sizes, dtype=np.float64)
    else:
        weights = np.array([1.0 if config.weight is None else config.weight for config in configs], dtype=np.float64)
    return weights / weights.sum()


class DomainDraws:
    """The domain of every training sample, drawn independently by weight.

    Args:
        seed: Seed.
        weights: Probabilities ``(D,)``.
    """

    def __init__(self, seed: int, weights: np.ndarray) -> None:
        self._seed = seed
        self._cumulative = np.cumsum(weights)
        self._cumulative[-1] = 1.0
        self._counts = [np.zeros(len(weights), dtype=np.int64)]  # of each domain, before each chunk
        self._current = (-1, np.zeros(0, dtype=np.int64))

    def _chunk(self, chunk: int) -> np.ndarray:
        if self._current[0] != chunk:
            rng = np.random.default_rng([self._seed, _DOMAIN_DRAWS, chunk])
            self._current = (chunk, np.searchsorted(self._cumulative, rng.random(_CHUNK), side="right"))
        return self._current[1]

    def locate(self, sample: int) -> tuple[int, int]:
        """Returns the sample's domain, and how many samples before it are of that domain."""
        chunk, offset = divmod(sample, _CHUNK)
        while len(self._counts) <= chunk:
            drawn = np.bincount(self._chunk(len(self._counts) - 1), minlength=len(self._cumulative))
            self._counts.append(self._counts[-1] + drawn)
        domains = self._chunk(chunk)
        domain = int(domains[offset])
        return domain, int(self._counts[chunk][domain] + np.count_nonzero(domains[:offset] == domain))


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
