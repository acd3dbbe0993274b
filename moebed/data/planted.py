"""Planted text: domains whose every rule is known, so that what a model could reach at best is known as well.

A domain is a second-order Markov chain over an alphabet of A symbols, by tables of its own that the seed decides. Each
pair of symbols has a few successors; nothing else is to be learned. The entropy rate follows from the tables and the
stationary distribution of pairs, without sampling.

D domains, A symbols of each, n documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import count
from typing import Any

import numpy as np

from moebed.errors import ConfigError

# Raised when text of equal settings changes, so that cached tokens of before are not reused.
PLANTED_VERSION = 1
DEFAULT_MAX_BYTES = 4_000_000
_SMOOTHING = 0.01  # chance that a symbol is drawn evenly from all: every pair can follow every other
_BLOCK = 256  # documents that are drawn at once
_TABLES, _TEXT = 0, 1  # keep the two kinds of random numbers apart
_COMMON = 0  # among the tables: those that domains have in common
_FIRST_ASCII, _NUM_ASCII, _FIRST_WIDE = 0x21, 94, 0x4E00
_MOST_CHARACTERS, _MOST_ENTRIES = 20_000, 1 << 25
_AT_REST, _MOST_STEPS = 1e-14, 100_000


@dataclass
class PlantedConfig:
    """A language of planted domains, and which of them a source is.

    Args:
        domain: Which domain the source's text is of, from 0; not read where domains switch within a document.
        domains: Number of domains of the language (D).
        symbols: Symbols of a domain's alphabet (A).
        shared_alphabet: All domains are written in the same A symbols; otherwise each has A of its own.
        branching: Successors that each context has.
        shared_tables: Share of the contexts whose successors are the same in all domains, from 0 to 1.
        switch: Chance of each symbol to be of another domain than the one before it, drawn evenly. Above 0 a source is
            of all domains, and tells the domain of each token.
        depth: 1 if a symbol follows from the two before it. 2 if it follows from the one before it and from what
            followed that one where it last stood in the document, which one layer of attention cannot look up.
        mean_document: Symbols of a document, on average.
        seed: Of the tables.
        text_seed: Of what is drawn from them: other text of the same language.
    """

    domain: int = 0
    domains: int = 4
    symbols: int = 23
    shared_alphabet: bool = False
    branching: int = 5
    shared_tables: float = 0.0
    switch: float = 0.0
    depth: int = 1
    mean_document: float = 512.0
    seed: int = 0
    text_seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot be drawn."""
        within: tuple[tuple[str, float, float], ...] = (
            ("domains", 1, _MOST_CHARACTERS // 2),
            ("domain", 0, self.domains - 1),
            ("symbols", 2, _MOST_CHARACTERS // max(1, self.domains)),
            ("branching", 1, self.symbols),
            ("shared_tables", 0, 1),
            ("switch", 0, 1),
            ("depth", 1, 2),
            ("mean_document", 3, 1e6),
            ("seed", 0, 2**63),
            ("text_seed", 0, 2**63),
        )
        for name, least, most in within:
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"planted.{name} is {getattr(self, name)}; it must be between {least:g} and {most:g}")
        if self.switch and self.domains < 2:
            raise ConfigError("planted.switch is above 0, but there is one domain; give planted.domains 2 or more")
        if self.switch and self.depth > 1:
            raise ConfigError("planted.switch and depth 2 do not go together: the entropy of both is not known exactly")
        if (entries := self.parts * self.symbols**3) > _MOST_ENTRIES:
            raise ConfigError(
                f"planted.symbols {self.symbols} make tables of {entries:,} entries; "
                f"at most {_MOST_ENTRIES:,} are allowed, so give fewer symbols"
            )

    @property
    def parts(self) -> int:
        """Domains that a source of this setting is drawn from."""
        return self.domains if self.switch else 1

    @property
    def characters(self) -> int:
        """Characters that the language's text is written in, A for each domain: they tell the domain of a symbol."""
        return self.domains * self.symbols


def code_points(characters: int) -> np.ndarray:
    """The characters (N,) of a language, as code points: ASCII where they fit, else all of three bytes."""
    first = _FIRST_ASCII if characters <= _NUM_ASCII else _FIRST_WIDE
    return np.arange(first, first + characters, dtype=np.uint32)


class PlantedLanguage:
    """What a :class:`PlantedConfig` says: its tables, its text, and how well the text can be predicted.

    Args:
        config: The settings.

    Attributes:
        tables: ``(parts, A, A, A)``: the chance of each symbol after each context, of each of the source's domains.
            A context is the symbols (second last, last); at depth 2 (what followed last time, last).
    """

    def __init__(self, config: PlantedConfig) -> None:
        self.config = config
        own = range(config.domains) if config.switch else (config.domain,)
        size = config.symbols
        rng = np.random.default_rng([config.seed, _TABLES, _COMMON])
        common, is_common = _sparse_table(rng, size, config.branching), rng.random((size, size)) < config.shared_tables
        self.tables = np.stack([self._own(common, is_common, domain) for domain in own])

    def _own(self, common: np.ndarray, is_common: np.ndarray, domain: int) -> np.ndarray:
        rng = np.random.default_rng([self.config.seed, _TABLES, 1 + domain])
        table = _sparse_table(rng, self.config.symbols, self.config.branching)
        return np.where(is_common[..., None], common, table)

    # ---- what is known of it -----------------------------------------------------------------------------------------

    @cached_property
    def _switching(self) -> np.ndarray:
        """Chance of each domain after each ``(parts, parts)``."""
        parts, switch = self.config.parts, self.config.switch
        away = switch / max(1, parts - 1)
        return np.full((parts, parts), away) + np.eye(parts) * (1 - switch - away)

    @cached_property
    def contexts(self) -> np.ndarray:
        """How often each context is met in the long run ``(parts, A, A)``, by the domain of its last symbol."""
        if self.config.depth == 2:
            return self._successor_contexts()[None]
        shape = self.tables.shape[:3]

        def step(chance: np.ndarray) -> np.ndarray:
            before = np.einsum("dab,de->eab", chance, self._switching)
            return np.einsum("eab,eabc->ebc", before, self.tables)

        return _stationary(np.full(shape, 1 / np.prod(shape)), step)

    def _successor_contexts(self) -> np.ndarray:
        """The same at depth 2: what follows one symbol, time after time, is a Markov chain of its own."""
        (table,) = self.tables
        size = len(table)
        follows = _stationary(np.full((size, size), 1 / size), lambda f: np.einsum("ba,abc->bc", f, table), -1)
        visits = _stationary(np.full(size, 1 / size), lambda v: v @ follows)
        return (visits[:, None] * follows).T

    @cached_property
    def entropy_rate(self) -> float:
        """Nats that a symbol takes to someone who knows all before it in an endless document, and its domain.

        Where domains switch, a symbol's domain is known here before the symbol is.
        """
        reached = np.einsum("dab,de->eab", self.contexts, self._switching)
        return float((reached * _entropy(self.tables)).sum())

    @property
    def floor(self) -> float:
        """Nats a token that no model can go below on the text's tokens, where each document ends with an EOS.

        It is that of a predictor that knows the language and sees the whole document before a token. At depth 1 it is
        exact for text of one domain, and for domains that switch and have alphabets of their own. Where domains switch
        and share an alphabet the domain is known to it before the symbol, and at depth 2 a symbol's first successor
        costs it no more than later ones: there it is a bound.
        """
        config, rate = self.config, self.entropy_rate
        turns = config.mean_document - 1  # a document may end after each of its symbols but the first
        ending = float(_entropy(np.array([1 / turns, 1 - 1 / turns])))
        beginning = 2 * rate
        if config.depth == 1:
            beginning = float(_entropy(self.contexts.ravel()))
            if config.switch and config.shared_alphabet:
                beginning -= float(_entropy(self.contexts.sum((1, 2))))
        if config.switch and not config.shared_alphabet:
            rate += float(_entropy(self._switching[0]))
        return (beginning + (config.mean_document - 2) * rate + turns * ending) / (config.mean_document + 1)

    def record(self) -> dict[str, Any]:
        """The settings and what follows from them, as plain data."""
        return {**asdict(self.config), "entropy_rate": self.entropy_rate, "floor": self.floor}

    # ---- text --------------------------------------------------------------------------------------------------------

    def blocks(self) -> Iterator[PlantedBlock]:
        """Endlessly many blocks of documents, each a function of the seeds and of its number; drawn when asked for."""
        return (PlantedBlock(self, number) for number in count())

    def draw(self, number: int) -> list[str]:
        """The documents of a block."""
        config = self.config
        part = config.domains if config.switch else config.domain
        rng = np.random.default_rng([config.seed, _TEXT, config.text_seed, part, number])
        lengths = np.sort(1 + rng.geometric(1 / (config.mean_document - 1), _BLOCK))[::-1]
        domains, symbols = self._walk(rng, lengths)
        characters = code_points(config.characters)[domains * config.symbols + symbols]
        texts = [row[:length].tobytes().decode("utf-32-le") for row, length in zip(characters, lengths, strict=True)]
        return [texts[index] for index in rng.permutation(_BLOCK)]

    def _walk(self, rng: np.random.Generator, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Domains and symbols ``(n, longest)`` of documents, the longest first."""
        config, size = self.config, self.config.symbols
        cumulative = self.tables.cumsum(-1)
        cumulative[..., -1] = 1
        # (parts, A, A), flat: where a document begins.
        start = rng.choice(self.contexts.size, len(lengths), p=self.contexts.ravel())
        part, first, last = (axis.copy() for axis in np.unravel_index(start, self.contexts.shape))
        symbols, domains = np.zeros((2, len(lengths), lengths[0]), dtype=np.int64)
        symbols[:, 0], symbols[:, 1], domains[:, :2] = first, last, part[:, None]
        memory = np.full((len(lengths), size), -1)  # depth 2: what followed each symbol last, -1 where nothing did
        if config.depth == 2:
            follows = (self.contexts[0].T / self.contexts[0].sum(0)[:, None]).cumsum(-1)
            symbols[:, 1] = last = _drawn(rng, follows[first])
            memory[np.arange(len(lengths)), first] = last
        for place in range(2, lengths[0]):
            n = np.searchsorted(-lengths, -place)  # of documents longer than this
            first, last, part = symbols[:n, place - 2], symbols[:n, place - 1], part[:n]
            if config.switch:
                away = rng.random(n) < config.switch
                part = np.where(away, (part + rng.integers(1, config.parts, n)) % config.parts, part)
            if config.depth == 2:
                first = memory[np.arange(n), last]
                fresh = first < 0
                first[fresh] = _drawn(rng, follows[last[fresh]])  # as if it had been there before
            symbols[:n, place] = _drawn(rng, cumulative[part, first, last])
            memory[np.arange(n), last] = symbols[:n, place]
            domains[:n, place] = part
        return (domains if config.switch else np.full_like(domains, config.domain)), symbols


class PlantedBlock:
    """Documents of a language that are drawn once one of them is asked for.

    Args:
        language: The language.
        number: Of the block.
    """

    def __init__(self, language: PlantedLanguage, number: int) -> None:
        self._language, self._number = language, number

    def __len__(self) -> int:
        """How many documents."""
        return _BLOCK

    @cached_property
    def documents(self) -> list[str]:
        """The documents."""
        return self._language.draw(self._number)


@lru_cache(maxsize=16)
def _language(settings: tuple[tuple[str, Any], ...]) -> PlantedLanguage:
    return PlantedLanguage(PlantedConfig(**dict(settings)))


def language_of(config: PlantedConfig) -> PlantedLanguage:
    """The language of these settings, made once."""
    return _language(tuple(asdict(config).items()))


def _sparse_table(rng: np.random.Generator, size: int, branching: int) -> np.ndarray:
    """Chances ``(A, A, A)``: of each context a few successors, weighed evenly at random, and a trace of all others."""
    successors = rng.random((size, size, size)).argpartition(branching - 1)[..., :branching]
    weights = rng.standard_exponential((size, size, branching))
    table = np.zeros((size, size, size))
    np.put_along_axis(table, successors, weights / weights.sum(-1, keepdims=True), -1)
    return (1 - _SMOOTHING) * table + _SMOOTHING / size


def _stationary(chance: np.ndarray, step: Callable[[np.ndarray], np.ndarray], axis: int | None = None) -> np.ndarray:
    """What a chain's chances come to, however it begins; they sum to 1 over an axis, or over all of them."""
    for _ in range(_MOST_STEPS):
        following = step(chance)
        following /= following.sum(axis, keepdims=True)
        if np.abs(following - chance).max() < _AT_REST:
            return following
        chance = following
    raise ConfigError("planted: the chain does not come to rest; give another planted.seed or more planted.branching")


def _entropy(chance: np.ndarray) -> np.ndarray:
    """In nats, over the last axis."""
    return -(chance * np.log(chance, where=chance > 0, out=np.zeros_like(chance))).sum(-1)


def _drawn(rng: np.random.Generator, cumulative: np.ndarray) -> np.ndarray:
    """An index ``(n,)`` for each row of cumulative chances ``(n, A)``."""
    index = (cumulative < rng.random((len(cumulative), 1))).sum(-1)
    return np.minimum(index, cumulative.shape[-1] - 1)
