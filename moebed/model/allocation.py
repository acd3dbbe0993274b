"""How a budget of experts is spread over the layers, as plain numbers.

An allocation starts from one number of experts E for L layers and deals the same E·L experts out in another way, so
that total parameters, routers included, and active FLOPs stay as they were: exactly for shapes; ``dense_at`` says what
it leaves. The paper (2406.18219, sections 5.3 and 6) suggests more experts in deep layers, fewer in the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from moebed.errors import ConfigError

SHAPES = ("uniform", "ascending", "ascending_small_last", "descending")
FIRST, LAST = Fraction(1, 2), Fraction(3, 2)  # experts of the outer layers of a slope, in terms of the mean


class Allocated(NamedTuple):
    """What an allocation came to."""

    num_experts: list[int]  # one number a layer
    intermediate_size: int | None  # width of the layer that became dense, if one did


def allocate(
    allocation: Any, layers: int, experts: int, chosen: int, shared: int, width: int, dense_width: int | None
) -> Allocated:
    """Experts of each layer.

    Args:
        allocation: A name in ``SHAPES``; ``{"dense_at": i}``; or a list of relative sizes, one a layer, 0 for a dense
            layer of the width ``dense_width``.
        layers: Number of layers (L).
        experts: Mean number of routed experts of a layer (E).
        chosen: Routed experts that a token passes (K).
        shared: Shared experts of a layer.
        width: Width of an expert (F).
        dense_width: Width of a dense layer. If not given it is that of all the experts a token passes,
            (K + shared) · F, so that active FLOPs stay but for the router.

    Raises:
        ConfigError: There is no such allocation, or it does not fit the number of layers.
    """
    dense_width = dense_width or (chosen + shared) * width
    weights = _weights(allocation, layers)
    dense = sum(weight == 0 for weight in weights)
    # A dense layer has the parameters of (dense_width / F - shared) routed experts; the other layers get the rest.
    budget = layers * experts - round(dense * (Fraction(dense_width, width) - shared))
    counts = deal(weights, budget) if budget > 0 else [0] * layers
    for layer, (weight, count) in enumerate(zip(weights, counts, strict=True)):
        if weight and not count:
            raise ConfigError(
                f"model config: allocation {allocation!r} leaves no expert for layer {layer}; raise num_experts, or "
                "give a smaller intermediate_size to what is dense"
            )
    return Allocated(counts, dense_width if dense else None)


def _weights(allocation: Any, layers: int) -> list[Fraction]:
    """Relative sizes of the layers."""
    if isinstance(allocation, Mapping) and list(allocation) == ["dense_at"]:
        index = int(allocation["dense_at"])
        if not 0 <= index < layers:
            raise ConfigError(f"model config: allocation dense_at is {index}; the layers are 0 to {layers - 1}")
        if layers == 1:
            raise ConfigError("model config: allocation dense_at leaves no layer with experts; use num_experts 0")
        return [Fraction(layer != index) for layer in range(layers)]
    if isinstance(allocation, Sequence) and not isinstance(allocation, str):
        return _listed(allocation, layers)
    if allocation == "uniform":
        return [Fraction(1)] * layers
    if allocation == "ascending":
        return _slope(layers)
    if allocation == "descending":
        return _slope(layers)[::-1]
    if allocation == "ascending_small_last":
        return [*_slope(layers - 1), FIRST] if layers > 1 else [Fraction(1)]
    raise ConfigError(
        f"model config: allocation is {allocation!r}; choose one of {', '.join(SHAPES)}, {{dense_at: LAYER}}, or a "
        "list of relative sizes"
    )


def _listed(sizes: Sequence[Any], layers: int) -> list[Fraction]:
    if len(sizes) != layers:
        raise ConfigError(
            f"model config: allocation lists {len(sizes)} sizes for {layers} layers; give one number a layer"
        )
    weights = [Fraction(str(size)) for size in sizes]
    if min(weights) < 0 or max(weights) == 0:
        raise ConfigError(f"model config: allocation is {list(sizes)}; sizes must not be negative, nor all 0")
    return weights


def _slope(layers: int) -> list[Fraction]:
    """A straight line from ``FIRST`` to ``LAST``."""
    if layers == 1:
        return [Fraction(1)]
    return [FIRST + (LAST - FIRST) * Fraction(layer, layers - 1) for layer in range(layers)]


def deal(weights: Sequence[Fraction], budget: int) -> list[int]:
    """Whole numbers in proportion to weights that add up to budget exactly.

    By largest remainder, so that a larger weight never gets less; of equal remainders those in the middle come first.
    """
    total = sum(weights)
    shares = [weight * budget / total for weight in weights]
    counts = [int(share) for share in shares]
    middle = Fraction(len(weights) - 1, 2)
    order = sorted(range(len(weights)), key=lambda layer: (counts[layer] - shares[layer], abs(layer - middle), layer))
    for layer in order[: budget - sum(counts)]:
        counts[layer] += 1
    return counts
