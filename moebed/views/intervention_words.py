"""Interventions as a person writes them: ``mask 3 @ layer 5``, ``drop_top 1 zero @ layers 4,5``, ``swap``.

    mask 3[,4] [zero|refill|drop_norm]      these experts are removed; refill if it is not said
    keep 0,1,2                              all but these are removed, refill
    keep_top 1 [zero|drop_norm]             a token's first experts alone; zero
    drop_top 1 [zero|refill|drop_norm]      without its first, second, ... one; zero
    force 3[,4]                             chosen by every token, with the largest weights
    shift 3[,4] by 1.5                      logits raised, or lowered
    random_set 0 [temperature 1]            as many experts, drawn with this seed
    swap                                    the last chosen for the first that was not
    replay FILE.npz                         what a probe ``routing`` stored of another text or model
    identity                                nothing: the noise of the machinery

``@ layer 5``, ``@ layers 4,5``; at all layers with experts if it is not said. ``alone`` at the end: at each token by
itself, none of which sees another's change.

Needs no PyTorch: what is misspelt is refused before that is loaded.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moebed.errors import ConfigError, UserError, did_you_mean

ZERO, REFILL, DROP_NORM = "zero", "refill", "drop_norm"
REMOVALS = (ZERO, REFILL, DROP_NORM)
CHOICES = "topk_index"  # of a routing that is replayed, by layer
_NUMBERS = re.compile(r"\d+(,\d+)*")


class Said(NamedTuple):
    """What a name says.

    Args:
        what: The function of :mod:`moebed.views.interventions` that makes it.
        arguments: Of it, but the layers; of ``replay`` the file.
        layers: Where; everywhere if not said.
        is_alone: Whether each token is changed by itself.
    """

    what: str
    arguments: tuple[Any, ...]
    layers: list[int] | None
    is_alone: bool


def read(text: str) -> Said:
    """What a name says.

    Raises:
        ConfigError: It says nothing.
        UserError: There is no such file as it names, or none with choices in it.
    """
    stripped = text.strip()
    is_alone = stripped.endswith(" alone")
    what, at, where = (part.strip() for part in stripped.removesuffix(" alone").partition("@"))
    word, *rest = re.sub(r"\s*,\s*", ",", what).split() or [""]
    if word not in _READERS:
        hint = did_you_mean(word, _READERS, f"the known ones are {', '.join(_READERS)}")
        raise ConfigError(f"intervention {text!r}: {word!r} is none; {hint}")
    try:
        return Said(
            "mask_set" if word == "mask" else word, _READERS[word](rest), _layers(where) if at else None, is_alone
        )
    except (ValueError, IndexError):
        raise ConfigError(f"intervention {text!r}: write it such as {_EXAMPLES[word]!r}") from None


def split(text: str) -> list[str]:
    """Several in one text, with a semicolon between."""
    return [part.strip() for part in text.split(";") if part.strip()]


def _layers(where: str) -> list[int]:
    word, _, numbers = where.partition(" ")
    if word not in ("layer", "layers"):
        raise ValueError(where)
    return _numbers(numbers)


def _numbers(text: str) -> list[int]:
    joined = re.sub(r"\s*,\s*", ",", text.strip())
    if not _NUMBERS.fullmatch(joined):
        raise ValueError(text)
    return [int(number) for number in joined.split(",")]


def _removal(rest: list[str], allowed: tuple[str, ...], default: str) -> str:
    (how,) = rest or [default]
    if how not in allowed:
        raise ValueError(how)
    return how


def _mask(rest: list[str]) -> tuple[list[int], str]:
    return _numbers(rest[0]), _removal(rest[1:], REMOVALS, REFILL)


def _counted(allowed: tuple[str, ...], rest: list[str]) -> tuple[int, str]:
    (count,) = _numbers(rest[0])
    if count < 1:
        raise ValueError(count)
    return count, _removal(rest[1:], allowed, ZERO)


def _of_experts(rest: list[str]) -> tuple[list[int]]:
    (experts,) = rest
    return (_numbers(experts),)


def _plain(rest: list[str]) -> tuple[()]:
    if rest:
        raise ValueError(rest)
    return ()


def _shift(rest: list[str]) -> tuple[list[int], float]:
    experts, by, amount = rest
    if by != "by" or not math.isfinite(float(amount)):
        raise ValueError(rest)
    return _numbers(experts), float(amount)


def _random_set(rest: list[str]) -> tuple[int] | tuple[int, float]:
    (seed,) = _numbers(rest[0])
    if len(rest) == 1:
        return (seed,)
    word, temperature = rest[1:]
    if word != "temperature" or not float(temperature) > 0:
        raise ValueError(rest)
    return seed, float(temperature)


def _replay(rest: list[str]) -> tuple[Path]:
    path = Path(" ".join(rest))
    stored_choices(path)
    return (path,)


def stored_choices(path: Path) -> list[int]:
    """The layers whose choices a file has; raises UserError where it has none."""
    try:
        with zipfile.ZipFile(path) as file:
            names = [name.removesuffix(".npy").partition("/") for name in file.namelist()]
        known = sorted(int(layer) for key, _, layer in names if key == CHOICES)
        if not known:
            raise KeyError(f"{CHOICES}/<layer>")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"intervention replay: {path} has no choices to replay ({error}); give a results/routing.npz"
        ) from error
    return known


_READERS: dict[str, Callable[[list[str]], tuple[Any, ...]]] = {
    "mask": _mask,
    "keep": _of_experts,
    "keep_top": partial(_counted, (ZERO, DROP_NORM)),
    "drop_top": partial(_counted, REMOVALS),
    "force": _of_experts,
    "shift": _shift,
    "random_set": _random_set,
    "swap": _plain,
    "replay": _replay,
    "identity": _plain,
}
_EXAMPLES = {
    "mask": "mask 3 refill @ layer 5",
    "keep": "keep 0,1,2 @ layer 5",
    "keep_top": "keep_top 1 zero @ layer 5",
    "drop_top": "drop_top 1 zero @ layer 5",
    "force": "force 3 @ layer 5",
    "shift": "shift 3 by 1.5 @ layer 5",
    "random_set": "random_set 0 @ layer 5",
    "swap": "swap @ layer 5",
    "replay": "replay results/routing.npz @ layer 5",
    "identity": "identity",
}
