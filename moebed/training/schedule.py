"""The learning rates that a run is planned with: how many steps they are spread over, and what a checkpoint had."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

from moebed.errors import ConfigError
from moebed.training.optim import OptimizerConfig, learning_rate_factor


def last_step(trainer: Trainer) -> int | None:
    """The optimizer step that ends a run; None where no number of steps does.

    Training text has no end of its own, so that epochs end only where ``limit_train_batches`` ends them.
    """
    found = []
    if trainer.max_steps > 0:
        found.append(trainer.max_steps)
    limit, epochs = trainer.limit_train_batches, trainer.max_epochs
    if isinstance(limit, int) and epochs is not None and epochs > 0:
        found.append(epochs * math.ceil(limit / trainer.accumulate_grad_batches))
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return max(1, trainer.max_steps)
    return min(found) if found else None


@dataclass(frozen=True)
class SchedulePlan:
    """An optimizer's settings and the number of steps that its schedule is spread over; None where it needs none."""

    config: OptimizerConfig
    steps: int | None

    @classmethod
    def of(cls, config: OptimizerConfig, trainer: Trainer) -> SchedulePlan:
        """The plan of a run.

        Raises:
            ConfigError: The schedule is spread over all steps, and nothing says how many there are.
        """
        if config.schedule == "constant":
            return cls(config, None)
        steps = last_step(trainer)
        if steps is None:
            raise ConfigError(
                f"model.optimizer.schedule {config.schedule} needs to know how many steps the run has: set "
                "trainer.max_steps (trainer.max_time may still end it before), or model.optimizer.schedule constant"
            )
        return cls(config, steps)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        return {**dataclasses.asdict(self.config), "steps": self.steps}

    def factor(self, step: int) -> float:
        """Learning rate of a step, as a share of the peak."""
        return learning_rate_factor(self.config, step, self.steps or 0)

    def build(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """The schedule of an optimizer."""
        return LambdaLR(optimizer, self.factor)

    def changes(self, saved: Mapping[str, Any]) -> list[str]:
        """What is other than in a checkpoint, in words."""
        ours = self.to_dict()
        names = {"steps": f"the {self.config.schedule} schedule's number of steps"}
        return [
            f"{names.get(key, f'model.optimizer.{key}')} was {saved[key]} and is {value}"
            for key, value in ours.items()
            if key in saved and saved[key] != value
        ]

    def hold(self, optimizer: torch.optim.Optimizer, schedule: Any, new: torch.optim.Optimizer) -> None:
        """Have an optimizer that was restored from a checkpoint do what a new one of the same parameters would."""
        schedule.base_lrs = [group["lr"] for group in new.param_groups]
        for group, built in zip(optimizer.param_groups, new.param_groups, strict=True):
            group.update({name: value for name, value in built.items() if name != "params"})
            group["initial_lr"] = built["lr"]
            group["lr"] = built["lr"] * self.factor(schedule.last_epoch)
