"""What ids say: kept beside what names them, and shown on one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # what pictures write needs no PyTorch
    from moebed.views.layer import ProbeText
    from probes.contract import Arrays

# Where ids are stored that something is told of, and what they say: those of a text, those that a model predicted.
WORDS = {"text_ids": "text_of_ids", "text_ids_predicted": "text_of_ids_predicted"}
_SHOWN = {"\n": "⏎", "\t": "⇥"}


def keep_words(arrays: dict[str, np.ndarray], text: ProbeText, ids: Iterable[int], key: str = "text_ids") -> None:
    """Store what ids say, as far as it is known, under one of ``WORDS``; nothing where nothing is known."""
    if said := text.words(sorted(set(ids))):
        arrays |= {key: np.array(list(said)), WORDS[key]: np.array(list(said.values()), dtype=np.str_)}


def words_of(arrays: Arrays) -> dict[int, str]:
    """What is known of the text of ids."""
    known: dict[int, str] = {}
    for ids, words in WORDS.items():
        known |= dict(zip(arrays.get(ids, np.zeros(0)).tolist(), arrays.get(words, ()), strict=True))
    return known


def word_of(words: Mapping[int, str], one: int) -> str:
    """What an id says, on one line and all of it visible; ``#7`` where it is not known."""
    return visible(str(words.get(one, ""))).replace(" ", "␣") or f"#{one}"


def visible(text: str) -> str:
    """A text on one line, with what has no shape of its own written as Python does: ``\\x07``, ``\\u200b``."""
    shown = (_SHOWN.get(letter, letter) for letter in text)
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown)
