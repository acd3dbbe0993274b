"""Words that people and tokenizers gave, as a picture can write them: names of runs, arms and domains, tokens.

matplotlib takes what stands between dollars for mathematics, hides from legends what begins with ``_``, and frames each
letter that its font lacks, with a warning for each.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import takewhile

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from probes.measures.words import visible, word_of

BOX = "□"  # in place of a letter that no font here has
# Of a font in which letters are looked for last it does not matter that it is a little bolder than asked.
logging.getLogger("matplotlib.font_manager").addFilter(lambda record: "font weight" not in record.getMessage())
_OWN = ("sans-serif", "monospace")  # the fonts of pictures, in which letters are looked for first


def plain(name: str, most: int | None = None) -> str:
    """A name for a title, a tick or a legend: every letter of it can be seen, and none is taken for a command.

    Args:
        name: As it was given.
        most: Letters that there is room for; of a longer name the middle is left out, as names differ at their ends.
    """
    name = "".join(letter if font_with(letter) is not None else BOX for letter in visible(name))
    if most is not None and len(name) > most:
        name = f"{name[: most // 2]}…{name[len(name) - (most - 1 - most // 2) :]}"
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")


def apart(names: Iterable[str], most: int) -> dict[str, str]:
    """Names that stand beside each other, as ``plain`` writes them; those that would be one from where they differ on.

    All of each of them where even that does not tell them apart.
    """
    names = list(dict.fromkeys(names))
    alike = sum(1 for _ in takewhile(lambda letters: len({*letters}) == 1, zip(*names, strict=False)))
    start = max(0, alike - 8)
    for written in (lambda name: plain(name, most), lambda name: plain("…" + name[start:], most)):
        found = {name: written(name) for name in names}
        if len({*found.values()}) == len(names):
            return found
    return {name: plain(name) for name in names}


def token(words: Mapping[int, str], one: int, most: int) -> str:
    """What an id says, in at most so many letters; its number where no font here can write it."""
    said = plain(word_of(words, one)[:most])
    return said if said.strip(BOX) else f"#{one}"


def columns(text: str) -> int:
    """How many places a text takes in a grid of characters: letters of Chinese take two, accents none."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def give_fonts(fig: Figure) -> None:
    """Have each text fall back on fonts of the machine that have what its own lacks."""
    for text in fig.findobj(Text):
        if not (said := text.get_text()).isascii():
            others = {font: None for letter in said if (font := font_with(letter))}
            text.set_fontfamily([*text.get_fontfamily(), *others])


@lru_cache(maxsize=4096)
def font_with(letter: str) -> str | None:
    """The font that has a letter: "" where those of pictures do, another's name, or None."""
    if not letter.isprintable():
        return None
    if all(_has(findfont(FontProperties(family=[family])), letter) for family in _OWN):
        return ""
    return _elsewhere().get(ord(letter))


def _has(path: str, letter: str) -> bool:
    font = _opened(path)
    return font is not None and bool(font.get_char_index(ord(letter)))


@lru_cache(maxsize=1)
def _elsewhere() -> dict[int, str]:
    """Of each letter, by its number, the first font that has it: upright and of a usual weight before others.

    All in one pass: matplotlib keeps few fonts open, and to open hundreds for each letter takes part of a second.
    """
    found: dict[int, str] = {}
    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.style != "normal", abs(int(entry.weight) - 400))):
        if not entry.name.startswith(("Last Resort", "STIX", "cm")) and (font := _opened(entry.fname)):
            for code in font.get_charmap():
                found.setdefault(code, entry.name)
    return found


def _opened(path: str) -> FT2Font | None:
    """None of a file that is gone, or is no font whose letters have any size."""
    try:
        font = get_font(path)
    except (OSError, RuntimeError):
        return None
    return font if font.scalable else None
