"""Ways in which rotary position embeddings are stretched to longer texts: what a config says of them, and the angles.

d dimensions of a head that are turned, in pairs j < d / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from moebed.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Scaling = Mapping[str, Any]  # rope_type and its settings
ORIGINAL = "original_max_position_embeddings"
MAGNITUDES = (
    "short_mscale",
    "long_mscale",
)  # of LongRoPE's cos and sin, in place of a number for all lengths (Phi-3.5)


def kept(scaling: Scaling, frequency: Tensor, theta: float, longest: int) -> Tensor:
    """As they are; beyond max_position_embeddings, where `dynamic` would change the base, the decoder does not go."""
    return frequency


def _linear(scaling: Scaling, frequency: Tensor, theta: float, longest: int) -> Tensor:
    """All divided by the factor."""
    return frequency / scaling["factor"]


def _llama3(scaling: Scaling, frequency: Tensor, theta: float, longest: int) -> Tensor:
    """Slow ones divided by the factor, fast ones kept, between them blended.

    A dimension is slow that turns fewer than low_freq_factor times within the original positions, and fast that turns
    more than high_freq_factor times (The Llama 3 Herd of Models 2407.21783; the released reference code).
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling[ORIGINAL] * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / scaling["factor"]


def _yarn(scaling: Scaling, frequency: Tensor, theta: float, longest: int) -> Tensor:
    """As Llama 3's, but blended evenly over the dimensions between beta_fast and beta_slow turns (YaRN 2309.00071)."""
    import torch  # not before: a config needs none

    width = 2 * len(frequency)

    def dimension(turns: float) -> float:
        return width * math.log(scaling[ORIGINAL] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast", 32)), dimension(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    place = torch.arange(len(frequency), dtype=torch.float32, device=frequency.device)
    slow = ((place - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return (1 - slow) * frequency + slow * frequency / scaling["factor"]


def _longrope(scaling: Scaling, frequency: Tensor, theta: float, longest: int) -> Tensor:
    """Each divided by its own number, of which there are two sets, for short texts and for long (LongRoPE 2402.13753).

    Which one depends on the longest position of a call.
    """
    import torch

    which = "long_factor" if longest > scaling[ORIGINAL] else "short_factor"
    return frequency / torch.tensor(scaling[which], dtype=torch.float32, device=frequency.device)


class Kind(NamedTuple):
    """One way to stretch the embedding.

    Args:
        frequencies: The angles a position (d / 2,) of settings, of those that are not stretched, of the base and of the
            longest position of a call.
        numbers: Settings that it must have, numbers above 0.
        optional: Numbers above 0 that it may have.
        lists: Settings that it must have, d / 2 numbers above 0.
        flags: Settings that it may have, true or false.
    """

    frequencies: Callable[[Scaling, Tensor, float, int], Tensor]
    numbers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """What it must have."""
        return (*self.numbers, *self.lists)

    @property
    def known(self) -> tuple[str, ...]:
        """What it may have."""
        return (*self.needed, *self.optional, *self.flags)


# rope_type -> how; what they are called, and what each has, as in transformers.
KINDS = {
    "linear": Kind(_linear, ("factor",)),
    "dynamic": Kind(kept, ("factor",)),
    "llama3": Kind(_llama3, ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)),
    "yarn": Kind(
        _yarn,
        ("factor", ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        flags=("truncate",),
    ),
    "longrope": Kind(
        _longrope, ("factor", ORIGINAL), ("attention_factor", *MAGNITUDES), ("short_factor", "long_factor")
    ),
}


def positive(value: Any) -> TypeGuard[float]:
    """Whether it is a number above 0; JSON's true is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def scaling_of(given: Scaling | None, width: int, theta: float) -> dict[str, Any] | None:
    """The stretching that a config asks for, with its rope_type; None where there is none.

    Args:
        given: Of a config. Without a rope_type it is Llama 3's, as configs of moebed once had it.
        width: Dimensions that are turned (d).
        theta: The base.

    Raises:
        ConfigError: It is not known, or lacks something, or has something that is not its kind's.
    """
    if given is None:
        return None
    scaling = {"rope_type": "llama3", **given}
    kind = KINDS.get(scaling["rope_type"]) if isinstance(scaling["rope_type"], str) else None
    if kind is None:
        raise ConfigError(f"model config: rope_scaling is {given!r}; its rope_type must be one of {', '.join(KINDS)}")
    settings = {key: value for key, value in scaling.items() if key != "rope_type"}
    needs = f"{scaling['rope_type']} has {', '.join(kind.known)}"
    if not (set(kind.needed) <= set(settings) <= set(kind.known)):
        raise ConfigError(f"model config: rope_scaling is {given!r}; {needs}")
    for key, value in settings.items():
        if key in kind.flags:
            good, wanted = isinstance(value, bool), "true or false"
        elif key in kind.lists:
            good = isinstance(value, list) and len(value) == width // 2 and all(map(positive, value))
            wanted = f"a list of {width // 2} numbers above 0, one for two of the {width} dimensions that turn"
        else:
            good, wanted = positive(value) and (key != ORIGINAL or value > 1), "a number above 0"
        if not good:
            raise ConfigError(f"model config: rope_scaling.{key} is {value!r}; it must be {wanted}")
    if 0 < len(set(MAGNITUDES) & set(settings)) < len(MAGNITUDES):
        raise ConfigError(f"model config: rope_scaling is {given!r}; {' and '.join(MAGNITUDES)} go together")
    if kind.frequencies is _llama3 and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise ConfigError(f"model config: rope_scaling is {given!r}; low_freq_factor must be below high_freq_factor")
    if kind.frequencies is _yarn and theta <= 1:
        raise ConfigError(f"model config: rope_theta is {theta}; with rope_type yarn it must be above 1")
    return scaling


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """What YaRN's logits grow by, its square root, for texts that are so many times longer: .1·m·ln s + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_factor(scaling: Scaling | None, longest: int) -> float:
    """What cos and sin are multiplied by, and so the attention logits by its square, for a stretching.

    Args:
        scaling: It.
        longest: The longest position of a call.
    """
    if scaling is not None and MAGNITUDES[0] in scaling:
        return scaling[MAGNITUDES[longest > scaling[ORIGINAL]]]
    if scaling is None or "attention_factor" in scaling:
        return 1.0 if scaling is None else scaling["attention_factor"]
    factor = scaling.get("factor", 1.0)
    if scaling["rope_type"] == "yarn":
        if "mscale" in scaling and "mscale_all_dim" in scaling:
            return yarn_magnitude(factor, scaling["mscale"]) / yarn_magnitude(factor, scaling["mscale_all_dim"])
        return yarn_magnitude(factor)
    if scaling["rope_type"] == "longrope" and factor > 1:
        return math.sqrt(1 + math.log(factor) / math.log(scaling[ORIGINAL]))
    return 1.0
