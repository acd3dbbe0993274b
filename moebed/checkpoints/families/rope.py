"""The rotary embedding in a ``config.json``: read as transformers reads it, written where every version looks.

transformers takes ``rope_scaling`` as a whole where it is not empty, else ``rope_parameters``. The base is in the
block, or beside it, or the family's default; the length of pretraining beside the block comes before the one in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moebed.errors import ConfigError
from moebed.model.config import ROPE_SCALING, ModelConfig

BLOCKS = ("rope_scaling", "rope_parameters")
ROPE_KEYS = (*BLOCKS, "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_ORIGINAL = "original_max_position_embeddings"
_KINDS = {"default": (), "llama3": ROPE_SCALING}  # rope_type -> what the block must have
_SUPPORTED = f"supported are rope_type 'default', and 'llama3' with {', '.join(ROPE_SCALING)}"


@dataclass
class Rope:
    """What a ``config.json`` says of positions.

    Args:
        theta: The base.
        scaling: Llama 3's stretching, where there is one.
        uncomputed: What the decoder does not compute of it.
        notes: What is passed over, as transformers does.
    """

    theta: float
    scaling: dict[str, float] | None = None
    uncomputed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_rope(settings: Mapping[str, Any], theta: float) -> Rope:
    """The rotary embedding of a ``config.json``.

    Args:
        settings: Its content.
        theta: The base where it names none.

    Raises:
        ConfigError: A base is no number, or a block is none.
    """
    for key in BLOCKS:
        if not isinstance(settings.get(key) or {}, Mapping):
            raise ConfigError(f"{key} is {settings[key]!r}; it must be a block of settings, or null")
    given = [key for key in BLOCKS if settings.get(key)]
    key = given[0] if given else "rope_parameters"
    block: Mapping[str, Any] = settings.get(key) or {}
    rope = Rope(_theta(key, block, settings, theta))
    if settings.get("rope_theta") not in (None, rope.theta):
        rope.notes.append(f"{key}.rope_theta is taken and rope_theta beside it passed over, as transformers does")
    if len(given) == 2 and settings["rope_scaling"] != settings["rope_parameters"]:
        rope.notes.append("rope_scaling is taken and rope_parameters beside it passed over, as transformers does")
    kind = block.get("rope_type", block.get("type", "default"))
    partial = block.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    values = {name: block[name] for name in ROPE_SCALING if name in block}
    if kind == "llama3":
        beside = settings.get(_ORIGINAL, settings.get("max_position_embeddings"))
        values[_ORIGINAL] = beside if settings.get(_ORIGINAL) is not None else values.get(_ORIGINAL, beside)
    nested = any(isinstance(value, Mapping) for value in block.values())
    needed = _KINDS.get(kind) if isinstance(kind, str) else None
    if partial not in (None, 1):
        name = f"{key}.partial_rotary_factor" if "partial_rotary_factor" in block else "partial_rotary_factor"
        rope.uncomputed.append(f"{name} is {partial!r}; only whole heads are rotated here")
    if nested or needed is None or not _complete(values, needed):
        rope.uncomputed.append(f"{key} is {dict(block)!r}; {_SUPPORTED}")
    if rope.uncomputed:
        return rope
    assert needed is not None
    if needed:
        rope.scaling = {name: values[name] for name in ROPE_SCALING}
    spare = sorted(set(block) - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *needed})
    if spare:
        rope.notes.append(f"{key}.{', '.join(spare)} means nothing to rope_type {kind!r} and is passed over")
    if settings.get(_ORIGINAL) is not None and not needed:
        rope.notes.append(f"{_ORIGINAL} means nothing to rope_type {kind!r} and is passed over")
    return rope


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The settings of a model's rotary embedding, where transformers before version 5 looks and where it does since.

    The length of pretraining is a whole number, as transformers wants it.
    """
    scaling = {name: _whole(value) for name, value in (config.rope_scaling or {}).items()}
    kind = {"rope_type": "llama3" if scaling else "default"}
    settings: dict[str, Any] = {
        "rope_theta": config.rope_theta,
        "rope_parameters": {**kind, "rope_theta": config.rope_theta, **scaling},
    }
    return settings | ({"rope_scaling": {**kind, **scaling}} if scaling else {})


def _theta(key: str, block: Mapping[str, Any], settings: Mapping[str, Any], default: float) -> float:
    name, where = (f"{key}.rope_theta", block) if "rope_theta" in block else ("rope_theta", settings)
    value = where.get("rope_theta", default)
    if not _positive(value):
        raise ConfigError(f"{name} is {value!r}; it must be a number above 0")
    return float(value)


def _complete(values: Mapping[str, Any], needed: Sequence[str]) -> bool:
    """Whether all that a kind needs is there, in order."""
    there = all(_positive(values.get(name)) for name in needed)
    return there and (not needed or values["low_freq_factor"] < values["high_freq_factor"])


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value
