"""Weighted sums of experts' outputs over several streams at a time, so that an expert's weights are at hand once.

T tokens, N rows, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moebed.model.routers import Routing


class Rows(NamedTuple):
    """Tokens of one stream at a layer.

    Args:
        x: (T, H) float32, the normalised input of router and experts.
        routing: Where they go; None at a layer without experts.
    """

    x: Tensor
    routing: Routing | None


class ExpertSums:
    """What the experts of a layer make of several streams, summed up while one expert after another is at hand.

    Args:
        parts: The streams.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = list(parts)
        self.totals: list[Tensor] = []  # (T, H) of each, once begun

    def begin(self) -> ExpertSums:
        """Nothing is summed up yet."""
        self.totals = [torch.zeros_like(part.x) for part in self.parts]
        return self

    @property
    def num_rows(self) -> int:
        """Of all streams."""
        return sum(len(part.x) for part in self.parts)

    def rows_of(self, expert: int) -> int:
        """How many tokens chose an expert."""
        return sum(len(token) for _, token, _ in self._chosen(expert))

    def add(self, expert: int, run: Callable[[Tensor], Tensor], most: int) -> None:
        """Add an expert's outputs for the tokens that it was chosen for.

        Args:
            expert: Its index.
            run: Makes of rows (N, H) its outputs (N, H).
            most: Rows at a time.
        """
        for block in _joined(self._chosen(expert), most):
            outputs = run(torch.cat([self.parts[part].x[token] for part, token, _ in block]))
            for (part, token, weight), output in zip(
                block, outputs.split([len(token) for _, token, _ in block]), strict=True
            ):
                self.totals[part].index_add_(0, token, output * weight)

    def add_to_all(self, run: Callable[[Tensor], Tensor], most: int) -> None:
        """Add what every token passes; as :meth:`add`."""
        for part, total in zip(self.parts, self.totals, strict=True):
            for rows, sums in zip(part.x.split(most), total.split(most), strict=True):
                sums += run(rows)

    def _chosen(self, expert: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Stream by stream the tokens (n,) that an expert was chosen for, and its weights (n, 1)."""
        for number, part in enumerate(self.parts):
            assert part.routing is not None
            token, choice = torch.where((part.routing.topk_index == expert) & part.routing.assigned)
            if len(token):
                yield number, token, part.routing.topk_weight[token, choice, None]


Piece = tuple[int, Tensor, Tensor]


def _joined(pieces: Iterator[Piece], most: int) -> Iterator[list[Piece]]:
    """Pieces of streams, cut and put together to blocks of so many rows."""
    block: list[Piece] = []
    room = most
    for number, token, weight in pieces:
        start = 0
        while start < len(token):
            stop = min(len(token), start + room)
            block.append((number, token[start:stop], weight[start:stop]))
            room -= stop - start
            start = stop
            if not room:
                yield block
                block, room = [], most
    if block:
        yield block
