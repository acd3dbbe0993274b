"""Rotary position embeddings (RoFormer 2104.09864).

S positions, d dimensions of a head that are turned, in pairs j < d / 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moebed.model.config import ModelConfig
from moebed.model.rope_config import KINDS, ORIGINAL, attention_factor, kept

Rope = tuple[Tensor, Tensor]  # cos and sin, (S, d) each, every angle twice


class RotaryEmbedding(nn.Module):
    """Cosines and sines of a model's rotary position embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width, self.theta, self.scaling = config.rotary_dim, config.rope_theta, config.rope_scaling
        self.frequencies = KINDS[self.scaling["rope_type"]].frequencies if self.scaling else kept

    def forward(self, start: int, length: int, device: torch.device) -> Rope:
        """Cos and sin of positions start to start + length: each (S, d), float32, pair j in columns j and j + d / 2."""
        return self._made(start, length, start + length, device)

    def table(self, longest: int, device: torch.device) -> Callable[[int], Rope]:
        """Cos and sin of sequences of any length up to the longest, each as if it were alone."""
        made: dict[bool, Rope] = {}

        def of(length: int) -> Rope:
            is_long = self.boundary is not None and length > self.boundary
            if is_long not in made:
                most = longest if is_long or self.boundary is None else min(longest, self.boundary)
                made[is_long] = self._made(0, most, most, device)
            cos, sin = made[is_long]
            return cos[:length], sin[:length]

        return of

    @property
    def boundary(self) -> int | None:
        """The length up to which sequences are turned otherwise than longer ones; None where it is all the same."""
        return self.scaling[ORIGINAL] if self.scaling is not None and KINDS[self.scaling["rope_type"]].lists else None

    def _made(self, start: int, length: int, longest: int, device: torch.device) -> Rope:
        exponent = torch.arange(0, self.width, 2, device=device, dtype=torch.float32) / self.width
        position = torch.arange(start, start + length, device=device, dtype=torch.float32)
        frequency = self.frequencies(self.scaling or {}, self.theta**-exponent, self.theta, longest)
        angle = torch.outer(position, frequency)
        angle = torch.cat([angle, angle], dim=-1)
        factor = attention_factor(self.scaling, longest)
        if factor == 1:
            return angle.cos(), angle.sin()
        return angle.cos() * factor, angle.sin() * factor
