"""Numbers of an optimizer step: kept where they were computed, averaged over ranks and read when they are logged."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class StepLog:
    """Means over the micro-batches of a step, and over ranks, by name.

    Noting a number costs no message and no wait; reading all of them costs one of each.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, list[Tensor]] = {}
        self._numbers: dict[str, float] = {}

    def note(self, name: str, value: Tensor | float) -> None:
        """Keep a number of this step: a tensor () of this rank, or what all ranks know alike."""
        if isinstance(value, Tensor):
            self._tensors.setdefault(name, []).append(value.detach())
        else:
            self._numbers[name] = value

    def clear(self) -> None:
        """A step begins."""
        self._tensors, self._numbers = {}, {}

    @torch.no_grad()
    def read(self, world_size: int) -> dict[str, float]:
        """What was noted since the step began; all ranks call this together, having noted the same names."""
        if not self._tensors:
            return dict(self._numbers)
        means = torch.stack([torch.stack([v.float() for v in values]).mean() for values in self._tensors.values()])
        if world_size > 1:
            torch.distributed.all_reduce(means)
            means /= world_size
        return {**dict(zip(self._tensors, means.tolist(), strict=True)), **self._numbers}


def is_logged(trainer: Trainer, step: int) -> bool:
    """Whether the numbers of an optimizer step are read: where they are logged, or where that costs nothing.

    Args:
        trainer: Of the run.
        step: Number of steps done with it, from 1 on.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    is_free = trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"
    return is_free or (every > 0 and step % every == 0) or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
