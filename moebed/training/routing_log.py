"""What is logged of a step's routing: how the experts shared the work, and how decided the routers were.

L layers with experts, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moebed.machine.tags import LAYERS, TRAIN, layer_tag
from moebed.model.config import ModelConfig

COUNTS, ENTROPY = "counts", "router_entropy"  # names of the vectors in a step's log
MOST_LAYERS = 16  # that are logged one by one; of more, so many from the first to the last


@dataclass(frozen=True)
class StepRouting:
    """Of one optimizer step, over its micro-batches and all ranks, by layer.

    Args:
        counts: (E,) assignments to each expert, mean over micro-batches and ranks.
        entropy: Mean entropy of the tokens' router probabilities, in nats.
    """

    counts: Mapping[int, np.ndarray]
    entropy: Mapping[int, float]

    @classmethod
    def of(cls, layers: Sequence[int], sizes: Sequence[int], counts: np.ndarray, entropy: np.ndarray) -> StepRouting:
        """Taken apart: counts (sum of E,) and entropy (L,), both layer after layer; ``sizes`` are each layer's E."""
        parts = np.split(counts, np.cumsum(sizes)[:-1])
        return cls(dict(zip(layers, parts, strict=True)), dict(zip(layers, entropy.tolist(), strict=True)))

    @classmethod
    def read(cls, config: ModelConfig, vectors: Mapping[str, np.ndarray]) -> StepRouting | None:
        """From the vectors of a step's log; None of a dense model."""
        if COUNTS not in vectors:
            return None
        sizes = [config.layer(layer).num_experts for layer in config.moe_layers]
        return cls.of(config.moe_layers, sizes, vectors[COUNTS], vectors[ENTROPY])

    @property
    def violation(self) -> dict[int, float]:
        """Assignments of the busiest expert over the mean, less 1; 0 where nothing is assigned."""
        return {layer: float(count.max() / max(count.mean(), 1e-9) - 1) for layer, count in self.counts.items()}

    def numbers(self) -> dict[str, float]:
        """Of all layers together: experts without a token, the worst layer's max violation, mean entropy."""
        return {
            f"{TRAIN}/idle_experts": float(sum((count == 0).sum() for count in self.counts.values())),
            f"{TRAIN}/max_violation_worst": max(self.violation.values()),
            f"{TRAIN}/router_entropy": float(np.mean(list(self.entropy.values()))),
        }

    def by_layer(self) -> dict[str, float]:
        """Max violation and entropy of each layer, of at most ``MOST_LAYERS``."""
        layers = list(self.counts)
        shown = [layers[at] for at in spread(len(layers), MOST_LAYERS)]
        found = {"max_violation": self.violation, "router_entropy": self.entropy}
        return {
            f"{LAYERS}/{TRAIN}/{name}/{layer_tag(layer)}": values[layer]
            for name, values in found.items()
            for layer in shown
        }


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers from 0 to count − 1, evenly spread, the first and the last among them."""
    return sorted({round(at) for at in np.linspace(0, count - 1, min(count, most))})
