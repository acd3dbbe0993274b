"""What planted sources are together: one alphabet, and a floor under the loss on all their text."""

from collections.abc import Sequence
from typing import Any

from moebed.data.sources import SourceConfig
from moebed.errors import ConfigError


def alphabet_of(sources: Sequence[SourceConfig]) -> tuple[int, int, bool]:
    """Returns the domains, symbols of each, and whether they share them, of the language that all sources are of.

    Raises:
        ConfigError: A source is not planted, or of another alphabet.
    """
    found = {
        None if s.planted is None else (s.planted.domains, s.planted.symbols, s.planted.shared_alphabet)
        for s in sources
    }
    alphabet = found.pop()
    if alphabet is None or found:
        raise ConfigError(
            "data.tokenizer.kind symbols needs planted sources alone, with the same domains, symbols and "
            "shared_alphabet; choose another tokenizer or make the sources agree"
        )
    return alphabet


def floors(sources: Sequence[SourceConfig], sizes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Returns of each planted source its settings, its ``entropy_rate`` and its ``floor`` in nats a token.

    Args:
        sources: Of a run.
        sizes: Tokens of each that are predicted in validation.

    Returns:
        A record by the source's name. If all sources are planted, ``all`` has the floor of the text of all together.
    """
    found = {source.name: source.language.record() for source in sources if source.language is not None}
    if len(found) < len(sources):
        return found
    total = sum(found[source.name]["floor"] * size for source, size in zip(sources, sizes, strict=True))
    return found | {"all": {"floor": total / sum(sizes)}}
