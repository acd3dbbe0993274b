"""The rotary embedding in a ``config.json``: read as transformers reads it, written where every version looks.

transformers takes ``rope_scaling`` as a whole where it is not empty, else ``rope_parameters``. The base is in the
block, or beside it, or the family's default; so is the share of a head that turns. The length of pretraining beside the
block comes before the one in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moebed.errors import ConfigError
from moebed.model.config import ModelConfig
from moebed.model.rope_config import KINDS, MAGNITUDES, ORIGINAL, Kind, kept, positive

BLOCKS = ("rope_scaling", "rope_parameters")
_BESIDE = ("rope_theta", "partial_rotary_factor")  # in a block of any kind
ROPE_KEYS = (*BLOCKS, *_BESIDE, ORIGINAL)
_PLAIN = Kind(kept)  # rope_type default
_SUPPORTED = "; ".join(f"{name!r} with {', '.join(kind.needed)}" for name, kind in KINDS.items())


@dataclass
class Rope:
    """What a ``config.json`` says of positions.

    Args:
        theta: The base.
        scaling: How it is stretched, as ModelConfig has it, where it is.
        partial: Share of a head's dimensions that turn.
        uncomputed: What the decoder does not compute of it.
        notes: What is passed over, as transformers does.
    """

    theta: float
    scaling: dict[str, Any] | None = None
    partial: float = 1.0
    uncomputed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def rope_block(settings: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], Any]:
    """Where a ``config.json`` says how positions are stretched, what it says there, and its rope_type.

    Raises:
        ConfigError: A block is none.
    """
    for key in BLOCKS:
        if not isinstance(settings.get(key) or {}, Mapping):
            raise ConfigError(f"{key} is {settings[key]!r}; it must be a block of settings, or null")
    key = next((key for key in BLOCKS if settings.get(key)), BLOCKS[-1])
    block: Mapping[str, Any] = settings.get(key) or {}
    return key, block, block.get("rope_type", block.get("type", "default"))


def read_rope(
    settings: Mapping[str, Any], theta: float, partial: float | None = None, magnitudes: bool = False
) -> Rope:
    """The rotary embedding of a ``config.json``.

    Args:
        settings: Its content.
        theta: The base where it names none.
        partial: The share of a head that turns where it names none; None of a family whose heads turn as a whole.
        magnitudes: Whether the family has LongRoPE's MAGNITUDES; to others they mean nothing.

    Raises:
        ConfigError: A base is no number, or a block is none.
    """
    key, block, name = rope_block(settings)
    rope = Rope(_theta(key, block, settings, theta))
    if settings.get("rope_theta") not in (None, rope.theta):
        rope.notes.append(f"{key}.rope_theta is taken and rope_theta beside it passed over, as transformers does")
    if all(map(settings.get, BLOCKS)) and _differ(settings, *(settings[one] for one in BLOCKS)):
        rope.notes.append("rope_scaling is taken and rope_parameters beside it passed over, as transformers does")
    _read_partial(rope, key, block, settings, partial)
    kind = {**KINDS, "default": _PLAIN}.get(name) if isinstance(name, str) else None
    if kind is not None and not magnitudes:
        kind = kind._replace(optional=tuple(name for name in kind.optional if name not in MAGNITUDES))
    values = _values(kind, block, settings, rope.partial) if kind is not None else None
    if kind is None or values is None or any(isinstance(value, Mapping) for value in block.values()):
        rope.uncomputed.append(f"{key} is {dict(block)!r}; supported are rope_type 'default'; {_SUPPORTED}")
    if rope.uncomputed:
        return rope
    assert kind is not None
    if values:
        rope.scaling = {"rope_type": name, **values}
    spare = sorted(set(block) - {"rope_type", "type", *_BESIDE, *kind.known})
    if spare:
        rope.notes.append(f"{key}.{', '.join(spare)} means nothing to rope_type {name!r} and is passed over")
    if settings.get(ORIGINAL) is not None and ORIGINAL not in kind.numbers:
        rope.notes.append(f"{ORIGINAL} means nothing to rope_type {name!r} and is passed over")
    return rope


def _differ(settings: Mapping[str, Any], one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two blocks say different things, where what one leaves out may stand beside it."""
    says = [{key: block.get(key, settings.get(key)) for key in {*one, *other}} for block in (one, other)]
    return says[0] != says[1]


def write_rope(config: ModelConfig, partial: bool = False) -> dict[str, Any]:
    """The settings of a model's rotary embedding, where transformers before version 5 looks and where it does since.

    Args:
        config: The model.
        partial: Whether the family's heads may turn in part.

    Returns:
        Settings of a ``config.json``. The length of pretraining is a whole number, as transformers wants it.
    """
    scaling = {name: _whole(value) for name, value in (config.rope_scaling or {"rope_type": "default"}).items()}
    share = {"partial_rotary_factor": config.partial_rotary_factor} if partial else {}
    settings: dict[str, Any] = {
        "rope_theta": config.rope_theta,
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta, **share},
        **share,
    }
    return settings | ({"rope_scaling": {**scaling, **share}} if config.rope_scaling else {})


def _read_partial(
    rope: Rope, key: str, block: Mapping[str, Any], settings: Mapping[str, Any], default: float | None
) -> None:
    inside = "partial_rotary_factor" in block
    name = f"{key}.partial_rotary_factor" if inside else "partial_rotary_factor"
    value = (block if inside else settings).get("partial_rotary_factor")
    if default is None:
        if value not in (None, 1):
            rope.uncomputed.append(f"{name} is {value!r}; only whole heads turn in this family")
    elif value is None and not inside:
        rope.partial = 1.0 if "partial_rotary_factor" in settings else default  # null is the whole
    elif positive(value) and value <= 1:
        rope.partial = float(value)
    else:
        raise ConfigError(f"{name} is {value!r}; it must be a number above 0 and 1 at most")


def _values(kind: Kind, block: Mapping[str, Any], settings: Mapping[str, Any], partial: float) -> dict[str, Any] | None:
    """What a kind has, as transformers finds it; None where something that it needs is missing or is no number."""
    found = {name: block[name] for name in kind.known if block.get(name) is not None}
    # 0 is none there, but of the factors.
    found = {name: value for name, value in found.items() if value != 0 or name in ("factor", "attention_factor")}
    longest = settings.get("max_position_embeddings")
    if ORIGINAL in kind.numbers:
        found[ORIGINAL] = settings.get(ORIGINAL) or found.get(ORIGINAL, longest)
        if "factor" not in found and ("factor" in block or kind.lists) and _both(longest, found[ORIGINAL]):
            found["factor"] = longest / found[ORIGINAL]
    for name in kind.flags:
        if name in block:
            found[name] = bool(block[name])  # null is false
    lists = all(isinstance(found.get(name), list) and all(map(positive, found[name])) for name in kind.lists)
    lists = lists and {len(found[name]) for name in kind.lists} <= {_pairs(settings, partial)}
    numbers = all(positive(found.get(name)) for name in kind.numbers)
    optional = all(positive(found[name]) for name in kind.optional if name in found)
    ordered = (
        "low_freq_factor" not in kind.numbers or not numbers or found["low_freq_factor"] < found["high_freq_factor"]
    )
    return found if lists and numbers and optional and ordered else None


def _pairs(settings: Mapping[str, Any], partial: float) -> int | None:
    """Pairs of dimensions that turn; None where the settings do not say."""
    width = settings.get("qk_rope_head_dim") or settings.get("head_dim")
    hidden, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    if width is None and positive(hidden) and positive(heads):
        width = hidden // heads
    return int(width * partial) // 2 if positive(width) else None


def _both(one: Any, other: Any) -> bool:
    return positive(one) and positive(other)


def _theta(key: str, block: Mapping[str, Any], settings: Mapping[str, Any], default: float) -> float:
    name, where = (f"{key}.rope_theta", block) if "rope_theta" in block else ("rope_theta", settings)
    value = where.get("rope_theta", default)
    if not positive(value):
        raise ConfigError(f"{name} is {value!r}; it must be a number above 0")
    return float(value)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
