"""What routers' losses of a batch are made of, summed over all that belongs to the batch.

E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


class BatchSums:
    """Sums over ranks, and over the micro-batches of an optimizer step so far."""

    def __init__(self) -> None:
        self._window: Tensor | None = None  # of the micro-batches before; no gradient

    def forget(self) -> None:
        """The optimizer step ends."""
        self._window = None

    def of_all(self, sums: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Sums (E,) of each layer, by name, over all ranks; the gradient flows to each rank's part.

        All ranks call this together.
        """
        joined = torch.cat([value for layer in sums for value in layer.values()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from torch.distributed.nn.functional import all_reduce

            # Its backward pass adds up the gradients of all ranks, each of which has the one loss; they are averaged
            # later, so that it counts once.
            joined = all_reduce(joined)
        if self._window is not None:
            joined = joined + self._window
        self._window = joined.detach()
        parts = iter(joined.split([len(value) for layer in sums for value in layer.values()]))
        return [{name: next(parts) for name in layer} for layer in sums]
