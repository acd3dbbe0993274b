"""AdamW with decay groups, and learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from moebed.errors import ConfigError


@dataclass
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay of matrices; norm scales and biases are not decayed.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator of the update.
        warmup_steps: Optimizer steps of linear warm-up from 0.
        schedule: After the warm-up: cosine, wsd (stable, then a linear decay over the last decay_fraction of the
            steps) or constant.
        decay_fraction: Share of all steps over which wsd decays.
        min_lr_ratio: Last learning rate as a share of the peak.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    warmup_steps: int = 50
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay_fraction: float = 0.2
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer: {name} is {getattr(self, name)}; it must not be negative")


def build_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW; parameters of two or more dimensions decay, the others do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=True)


def learning_rate_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of an optimizer step, as a share of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    decay_steps = max(1, round(config.decay_fraction * total_steps))
    progress = (step - (total_steps - decay_steps)) / decay_steps
    return 1.0 - (1 - config.min_lr_ratio) * min(1.0, max(0.0, progress))
