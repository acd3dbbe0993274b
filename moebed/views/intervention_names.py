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
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from moebed.errors import ConfigError, UserError, did_you_mean
from moebed.machine import provenance
from moebed.views import interventions
from moebed.views.interventions import DROP_NORM, REFILL, REMOVALS, ZERO, Intervention, Layers

_NUMBERS = re.compile(r"\d+(,\d+)*")


def parse(text: str) -> Intervention:
    """The intervention that a name says.

    Raises:
        ConfigError: It says none.
        UserError: A file that it names cannot be read.
    """
    stripped = text.strip()
    if stripped.endswith(" alone"):
        return interventions.alone(parse(stripped.removesuffix(" alone")))
    what, at, where = (part.strip() for part in stripped.partition("@"))
    word, *rest = re.sub(r"\s*,\s*", ",", what).split() or [""]
    if word not in _READERS:
        hint = did_you_mean(word, _READERS, f"the known ones are {', '.join(_READERS)}")
        raise ConfigError(f"intervention {text!r}: {word!r} is none; {hint}")
    try:
        return _READERS[word](rest, _layers(where) if at else None)
    except (ValueError, IndexError):
        raise ConfigError(f"intervention {text!r}: write it such as {_EXAMPLES[word]!r}") from None


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


def _mask(rest: list[str], layers: Layers) -> Intervention:
    return interventions.mask_set(_numbers(rest[0]), _removal(rest[1:], REMOVALS, REFILL), layers)


def _counted(
    make: Callable[..., Intervention], allowed: tuple[str, ...], rest: list[str], layers: Layers
) -> Intervention:
    (count,) = _numbers(rest[0])
    if count < 1:
        raise ValueError(count)
    return make(count, _removal(rest[1:], allowed, ZERO), layers)


def _of_experts(make: Callable[..., Intervention], rest: list[str], layers: Layers) -> Intervention:
    (experts,) = rest
    return make(_numbers(experts), layers)


def _alone(make: Callable[..., Intervention], rest: list[str], layers: Layers) -> Intervention:
    if rest:
        raise ValueError(rest)
    return make(layers)


def _shift(rest: list[str], layers: Layers) -> Intervention:
    experts, by, amount = rest
    if by != "by" or not math.isfinite(float(amount)):
        raise ValueError(rest)
    return interventions.shift(_numbers(experts), float(amount), layers)


def _random_set(rest: list[str], layers: Layers) -> Intervention:
    (seed,) = _numbers(rest[0])
    if len(rest) == 1:
        return interventions.random_set(seed, layers=layers)
    word, temperature = rest[1:]
    if word != "temperature" or not float(temperature) > 0:
        raise ValueError(rest)
    return interventions.random_set(seed, float(temperature), layers)


def _replay(rest: list[str], layers: Layers) -> Intervention:
    path = Path(" ".join(rest))
    try:
        with np.load(path, allow_pickle=False) as file:
            known = sorted(int(name.partition("/")[2]) for name in file.files if name.startswith("topk_index/"))
            if not known:
                raise KeyError("topk_index/<layer>")
            routings = {
                n: tuple(torch.from_numpy(file[f"{key}/{n}"]) for key in ("topk_index", "topk_weight")) for n in known
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"intervention replay: {path} has no choices to replay ({error}); give a results/routing.npz"
        ) from error
    content = provenance.fingerprint([[part.tolist() for part in pair] for pair in routings.values()])[:8]
    return interventions.replay(routings, layers, f"replay {path} ({content})")  # type: ignore[arg-type]


_READERS: dict[str, Callable[[list[str], Layers], Intervention]] = {
    "mask": _mask,
    "keep": partial(_of_experts, interventions.keep),
    "keep_top": partial(_counted, interventions.keep_top, (ZERO, DROP_NORM)),
    "drop_top": partial(_counted, interventions.drop_top, REMOVALS),
    "force": partial(_of_experts, interventions.force),
    "shift": _shift,
    "random_set": _random_set,
    "swap": partial(_alone, interventions.swap),
    "replay": _replay,
    "identity": partial(_alone, interventions.identity),
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
