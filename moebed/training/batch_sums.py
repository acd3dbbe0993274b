"""What losses of a batch are made of, summed over all that belongs to the batch.

E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Sums = Sequence[dict[str, Tensor]]  # (E,) of each layer, by name


class BatchSums:
    """Sums over ranks, and over the micro-batches of an optimizer step: those so far, or all, where they are known.

    A gradient flows to what each rank and micro-batch adds. With all of them known it is that of one large batch: a
    loss is then the same function of the same sums in each of n micro-batches, whose gradients are averaged, so that
    what a micro-batch adds counts n times.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The optimizer step ends."""
        self._so_far: Tensor | None = None  # of the micro-batches before; no gradient
        self._whole: Tensor | None = None  # of all micro-batches; no gradient
        self._parts = 1

    @property
    def is_known(self) -> bool:
        """Whether all that the optimizer step will add is known."""
        return self._whole is not None

    @torch.no_grad()
    def know(self, micro_batches: Sequence[Sums]) -> None:
        """Say what each micro-batch of the optimizer step will add. All ranks call this together."""
        self._whole, self._parts = _over_ranks(sum(map(_joined, micro_batches))), len(micro_batches)  # type: ignore[arg-type]

    def of_all(self, sums: Sums) -> list[dict[str, Tensor]]:
        """Sums (E,) of each layer, by name, over all ranks; the gradient flows to each rank's part.

        All ranks call this together.
        """
        joined = _joined(sums)
        if self._whole is None:
            joined = _over_ranks(joined)
            if self._so_far is not None:
                joined = joined + self._so_far
            self._so_far = joined.detach()
        elif joined.requires_grad:
            joined = _over_ranks(joined)
            joined = self._whole + self._parts * (joined - joined.detach())
        else:
            joined = self._whole
        parts = iter(joined.split([len(value) for layer in sums for value in layer.values()]))
        return [{name: next(parts) for name in layer} for layer in sums]


def _joined(sums: Sums) -> Tensor:
    return torch.cat([value for layer in sums for value in layer.values()])


def _over_ranks(joined: Tensor) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return joined
    from torch.distributed.nn.functional import all_reduce

    # Its backward pass adds up the gradients of all ranks, each of which has the one loss; they are averaged later, so
    # that it counts once.
    return all_reduce(joined)
