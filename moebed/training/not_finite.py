"""What happens when a training step is not finite: every rank does the same, and a person reads where it began."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from moebed.errors import DivergedError

MOST_IN_A_ROW = 10


class NotFinite:
    """Stops a run whose loss or gradient is NaN or Inf, or skips that step.

    A loss that is not finite makes the gradient's norm, which all ranks share, NaN. So they look at the norm alone,
    once a step, know at the same moment, and none waits for another; only then does each look at its own losses.

    Args:
        choice: ``stop`` or ``skip``.
        moe_layers: Layers of the model that have routers.
    """

    def __init__(self, choice: Literal["stop", "skip"], moe_layers: Sequence[int]) -> None:
        self.choice, self._moe_layers = choice, moe_layers
        self._seen: list[tuple[Tensor, list[Tensor]]] = []
        self._in_a_row = 0

    def watch(self, loss: Tensor, z_losses: list[Tensor]) -> None:
        """Keep what this rank may have to look at.

        Args:
            loss: The loss of a micro-batch.
            z_losses: () of each MoE layer; a router's logits are not finite if anything before them is not.
        """
        self._seen.append((loss.detach(), [z.detach() for z in z_losses]))

    def skips(self, trainer: Trainer, norm: Tensor) -> bool:
        """Whether this step is to be left out.

        Args:
            trainer: What trains: its step, and its ranks, all of which call this together.
            norm: Norm of the gradient over all ranks.

        Raises:
            DivergedError: The step is not finite and the choice is to stop, or too many in a row were skipped.
        """
        seen, self._seen = self._seen, []
        if bool(torch.isfinite(norm)):
            self._in_a_row = 0
            return False
        noted = _first_not_finite(seen, self._moe_layers)
        reports: list[str | None] = [noted]
        if trainer.world_size > 1:
            reports = [None] * trainer.world_size
            torch.distributed.all_gather_object(reports, noted)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scaled and not any(reports):  # a loss scaler looks for Inf by itself
            self._in_a_row = 0
            return False
        said = [f"{text} on rank {rank}" for rank, text in enumerate(reports) if text is not None]
        what = said[0] if said else f"the loss is finite but the gradient's norm is {norm.item()}"
        self._in_a_row += 1
        if self.choice == "stop" or self._in_a_row >= MOST_IN_A_ROW:
            raise DivergedError(
                f"{what}, at step {trainer.global_step}; lower the learning rate, lengthen the warm-up, or continue "
                "from an earlier checkpoint with --ckpt_path",
                trainer.global_rank,
            )
        if trainer.is_global_zero:
            print(f"step {trainer.global_step} is skipped: {what}", file=sys.stderr, flush=True)
        return True


def _first_not_finite(seen: list[tuple[Tensor, list[Tensor]]], moe_layers: Sequence[int]) -> str | None:
    """The last loss that is not finite, and where it began."""
    for loss, z_losses in reversed(seen):
        if not torch.isfinite(loss):
            found = [layer for layer, z in zip(moe_layers, z_losses, strict=True) if not torch.isfinite(z)]
            where = f"first seen at the router of layer {found[0]}" if found else "first seen after the last router"
            return f"the loss is {loss.item()}, {where if moe_layers else 'in a model without routers'}"
    return None
