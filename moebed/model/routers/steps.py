"""What routers do once an optimizer step, however many ranks and micro-batches take part in it.

E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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
        # Assignments of every layer one after another, the tokens, and what routers ask for beside, by layer and name.
        self._sums: Tensor | None = None
        self._asked: list[tuple[int, str, torch.Size]] = []
        self._step, self._micro_batch = -1, 0
        self._place = 0, 1  # rank, and of how many

    def begin(self, step: int, rank: int = 0, ranks: int = 1) -> None:
        """A micro-batch of an optimizer step begins on this rank, one of so many."""
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        self._place = rank, ranks
        self._tell(self._micro_batch)

    def _tell(self, micro_batch: int) -> None:
        number = torch.tensor(self._step)
        for router in self._routers:
            router.optimizer_step = number
            router.micro_batch, (router.rank, router.ranks) = micro_batch, self._place
            router.begin_step(self._step)

    def ahead(self, count: int) -> Iterator[int]:
        """Let the routers route as in this micro-batch and in those after it, so many in all; then as in this again.

        Yields:
            The number of each, from 0.
        """
        try:
            for number in range(count):
                self._tell(self._micro_batch + number)
                yield number
        finally:
            self._tell(self._micro_batch)

    def add(
        self, counts: Sequence[Tensor], num_tokens: Tensor, statistics: Sequence[Mapping[str, Tensor]] = ()
    ) -> None:
        """Count in a micro-batch: assignments (E,) of each layer, its tokens (), and each router's statistics."""
        if self._adaptive:
            asked = [(layer, name, value) for layer, found in enumerate(statistics) for name, value in found.items()]
            parts = [*counts, num_tokens.view(1), *(value.flatten() for *_, value in asked)]
            sums = torch.cat([part.detach().float() for part in parts])
            self._sums = sums if self._sums is None else self._sums + sums
            self._asked = [(layer, name, value.shape) for layer, name, value in asked]

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
        sizes = [router.num_experts for router in self._routers]
        *counts, tokens, asked = sums.split([*sizes, 1, len(sums) - sum(sizes) - 1])
        statistics: list[dict[str, Tensor]] = [{} for _ in self._routers]
        parts = asked.split([shape.numel() for *_, shape in self._asked])
        for (layer, name, shape), part in zip(self._asked, parts, strict=True):
            statistics[layer][name] = part.view(shape)
        meant = tokens.squeeze(0) * sum(router.num_experts_per_tok for router in self._routers)
        density = torch.cat(counts).sum() / meant.clamp(min=1)
        numbers: dict[str, list[Tensor]] = {}
        for router, count, found in zip(self._routers, counts, statistics, strict=True):
            router.end_step(Load(count, density, found))
            for name, value in router.numbers().items():
                numbers.setdefault(name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in numbers.items()}
