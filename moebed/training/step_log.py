"""Numbers of an optimizer step: kept where they were computed, averaged over ranks and read when they are logged."""

from __future__ import annotations

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from moebed.machine.tags import TRAIN


class StepLog:
    """Means over the micro-batches of a step, and over ranks, by name.

    Noting a number costs no message and no wait; reading all of them costs one of each.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, list[Tensor]] = {}
        self._numbers: dict[str, float] = {}

    def note(self, name: str, value: Tensor | float) -> None:
        """Keep a number of this step: a tensor () of this rank, or what all ranks know alike; or a vector (N,).

        Args:
            name: Its tag, without ``train/``.
            value: What it is in this micro-batch.
        """
        if isinstance(value, Tensor):
            self._tensors.setdefault(name, []).append(value.detach())
        else:
            self._numbers[name] = value

    def clear(self) -> None:
        """A step begins."""
        self._tensors, self._numbers = {}, {}

    @torch.no_grad()
    def read(self, world_size: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """What was noted since the step began; all ranks call this together, having noted the same names.

        Returns:
            The numbers by tag, and the vectors (N,) by name.
        """
        alike = {f"{TRAIN}/{name}": value for name, value in self._numbers.items()}
        if not self._tensors:
            return alike, {}
        means = [torch.stack([value.float() for value in values]).mean(dim=0) for values in self._tensors.values()]
        joined = torch.cat([mean.flatten() for mean in means])
        if world_size > 1:
            torch.distributed.all_reduce(joined)
            joined /= world_size
        parts = np.split(np.array(joined.tolist(), np.float32), np.cumsum([mean.numel() for mean in means])[:-1])
        found = [(name, part, mean.dim()) for (name, part, mean) in zip(self._tensors, parts, means, strict=True)]
        numbers = {f"{TRAIN}/{name}": float(part[0]) for name, part, dim in found if dim == 0}
        return numbers | alike, {name: part for name, part, dim in found if dim}


def is_logged(trainer: Trainer, step: int) -> bool:
    """Whether the numbers of an optimizer step are read: where they are logged, or where that costs nothing.

    Args:
        trainer: Of the run.
        step: Number of steps done with it, from 1 on.
    """
    is_free = trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"
    return is_free or is_due(trainer, step)


def is_due(trainer: Trainer, step: int) -> bool:
    """Whether ``log_every_n_steps`` names an optimizer step, from 1 on."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return (every > 0 and step % every == 0) or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
