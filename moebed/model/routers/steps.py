"""What routers do once an optimizer step, however many ranks and micro-batches take part in it.

E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moebed.model.routers.contract import Load, Router


class RouterSteps:
    """Tells a model's routers when optimizer steps begin and end, and with what load.

    Counts come from what a forward pass gave back, not from hooks on it, so that activation recomputation, validation
    and the ranks' number leave them as they are.

    Args:
        routers: Of the MoE layers, in order.
    """

    def __init__(self, routers: Sequence[Router]) -> None:
        self._routers = list(routers)
        self._adaptive = any(router.adaptive for router in routers)
        self._sums: Tensor | None = None  # assignments of every layer one after another, then the tokens
        self._step, self._micro_batch = -1, 0

    def begin(self, step: int, rank: int = 0) -> None:
        """A micro-batch of an optimizer step begins on this rank."""
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        for router in self._routers:
            router.micro_batch, router.rank = self._micro_batch, rank
            router.begin_step(step)

    def add(self, counts: Sequence[Tensor], num_tokens: Tensor) -> None:
        """Count in a micro-batch: assignments (E,) of each layer, and its tokens ()."""
        if self._adaptive:
            sums = torch.cat([*(count.detach().float() for count in counts), num_tokens.detach().float().view(1)])
            self._sums = sums if self._sums is None else self._sums + sums

    def forget(self) -> None:
        """The optimizer step is not taken: what was counted is dropped, and the routers stay as they are."""
        self._sums = None

    def end(self) -> dict[str, Tensor]:
        """The optimizer step ends; numbers for the log, means over the layers."""
        if self._sums is None:
            return {}
        sums, self._sums = self._sums, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        *counts, tokens = sums.split([router.num_experts for router in self._routers] + [1])
        meant = tokens.squeeze(0) * sum(router.num_experts_per_tok for router in self._routers)
        density = torch.cat(counts).sum() / meant.clamp(min=1)
        numbers: dict[str, list[Tensor]] = {}
        for router, count in zip(self._routers, counts, strict=True):
            router.end_step(Load(count, density))
            for name, value in router.numbers().items():
                numbers.setdefault(name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in numbers.items()}
