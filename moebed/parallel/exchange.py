"""Tokens to the ranks that own their experts, and back (expert parallelism), in either of two ways.

``all_to_all``: a token goes once to each rank that has some of its experts, which sums what they give: a trip, whatever
the number. ``all_gather``: every token goes to every rank, so that all sizes are known beforehand and no rank waits for
its device.

T tokens of this rank, K experts per token, E experts of the layer, X ranks that share them, H hidden, N trips.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from moebed.errors import UserError
from moebed.model.experts import Experts
from moebed.model.grouped import compute_dtype, from_slots, to_slots
from moebed.model.routing import Routing

# The second names are those before torch 2.13, which warns of them.
_all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
_reduce_scatter = (
    getattr(collectives, "reduce_scatter_single_autograd", None) or collectives.reduce_scatter_tensor_autograd
)


class SpreadExperts:
    """Experts that are spread over ranks: rank r owns r·E/X to (r + 1)·E/X.

    Args:
        group: The ranks that share the experts.
    """

    static_shapes = False  # whether a routing has the same shape on all ranks, whatever it says

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def local(self, parameter: Tensor) -> Tensor:
        """This rank's part of a parameter (E, ...) that is spread over the group: (E/X, ...).

        Its gradient is a sum over what all X ranks sent, each of which takes the mean over its own tokens, so it is
        divided by X; what holds the same experts elsewhere is averaged by FSDP2.
        """
        assert isinstance(parameter, DTensor)
        return _GradientOver.apply(parameter.to_local(), self.size)

    def of_all(self, rows: Tensor) -> Tensor:
        """Rows (N, ·) of this rank, of its experts or its tokens, with those of all others in their order: (X·N, ·);
        differentiable.
        """
        return _all_gather(rows.contiguous(), gather_dim=0, group=self.group)


class AllToAll(SpreadExperts):
    """Sends each token to the ranks of its experts by one all-to-all, and what they make of it back by another.

    Nothing is dropped: how many tokens travel is agreed by an all-to-all of counts first. Backward passes travel the
    same ways in reverse.
    """

    def begin(self, experts: Experts, x: Tensor, routing: Routing) -> Callable[[], Tensor]:
        """Start sending the tokens x (T, H); what it returns waits for them and gives the layer's outputs (T, H).

        Rows travel while the caller computes something else, where the backend of the group can do both.
        """
        own, top_k = experts.num_local_experts, routing.topk_index.shape[1]
        rank = torch.where(routing.assigned, routing.topk_index // own, self.size)  # (T, K)
        at_rank = rank.unsqueeze(2) == torch.arange(self.size, device=x.device)  # (T, K, X)
        goes = at_rank.any(1)  # (T, X)
        columns = torch.full_like(goes[0], top_k, dtype=torch.int64)
        counts = torch.stack([goes.sum(0), at_rank.sum((0, 1)), columns], dim=1)  # (X, 3) trips, assignments, K
        received = self._swap(counts, None, None)  # the same from each rank
        # The one moment at which this rank waits for its device.
        leaving, coming = torch.stack([counts, received]).tolist()
        outward, inward = [trips for trips, *_ in leaving], [trips for trips, *_ in coming]
        # As many columns as the busiest token of any rank has experts, where their number differs.
        more = (0, max(columns for *_, columns in coming) - top_k)
        top_k += more[1]
        rank, weights = F.pad(rank, more, value=self.size), F.pad(routing.topk_weight, more)  # (T, K)
        trips = Slots.of(goes.T, sum(outward))
        goes_to, token = trips.order // len(x), trips.order % len(x)  # (N,)
        is_there = rank.index_select(0, token) == goes_to.unsqueeze(1)  # (N, K)
        chosen_there = F.pad(routing.topk_index, more).index_select(0, token) - own * goes_to.unsqueeze(1)
        index = torch.where(is_there, chosen_there, -1)

        def send(rows: Tensor, back: bool = False) -> Tensor:
            splits = (outward, inward) if back else (inward, outward)
            return collectives.all_to_all_single_autograd(rows.contiguous(), *splits, self.group)

        travelling = Slots(token, trips.slot.T.sort(dim=1).values[:, : min(top_k, self.size)])
        rows = send(travelling.spread(x.to(compute_dtype(x))))  # (N, H) of this rank's experts
        weight = send(weights.index_select(0, token) * is_there)  # (N, K)
        index = self._swap(index.int(), inward, outward)  # (N, K)

        def finish() -> Tensor:
            assigned = sum(number for _, number, _ in coming)
            # Where nothing came, a row of weight 0: the experts then have a gradient here as on other ranks.
            absent = (0, 0, 0, 0 if assigned else 1)
            given, scales, chosen = F.pad(rows, absent), F.pad(weight, absent).flatten(), F.pad(index, absent)
            choices = Slots.of(chosen >= 0, assigned or top_k)
            blank = scales.new_empty(0)
            here = Routing(blank, blank, _at(chosen.flatten().long(), choices), _at(scales, choices))
            of_trip = Slots(choices.order // top_k, choices.slot)
            outputs = experts.backend(experts, of_trip.spread(given), here)  # (assigned, H)
            came = send(of_trip.gather(outputs)[: len(rows)], back=True)  # (N, H)
            return _SumOfTrips.apply(came, travelling)

        return finish

    def _swap(self, rows: Tensor, inward: list[int] | None, outward: list[int] | None) -> Tensor:
        """Integers from each rank to each, as many rows as the lists say; as many to each where there are none."""
        received = rows.new_empty(len(rows) if inward is None else sum(inward), *rows.shape[1:])
        torch.distributed.all_to_all_single(received, rows.contiguous(), inward, outward, group=self.group)
        return received


class AllGather(SpreadExperts):
    """Sends each token to every rank by one all-gather, and sums what they make of it by one reduce-scatter.

    These are the all-to-alls of rows that are padded to T from each rank to each, the fewest for which nothing can be
    dropped. So all sizes are known beforehand: counts stay on the device, and the backends compute the rows of this
    rank's experts alone. A backward pass is a reduce-scatter for the one and an all-gather for the other.

    There is room for as many tokens of each rank as the rank with most had in the first pass; one that has fewer, as
    of a last batch, fills up. An assignment of weight 0 is none: it adds nothing, and its weight has no gradient.
    """

    static_shapes = True

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(group)
        self._most = 0  # tokens of a rank

    def begin(self, experts: Experts, x: Tensor, routing: Routing) -> Callable[[], Tensor]:
        """Start sending the tokens x (T, H); what it returns waits for them and gives the layer's outputs (T, H).

        Raises:
            UserError: There are more tokens than there is room for.
        """
        tokens, missing = len(x), self._room(x) - len(x)

        def to_all(of_each: Tensor) -> Tensor:
            return self.of_all(F.pad(of_each, (0, 0, 0, missing)) if missing else of_each)

        index, weight = to_all(routing.topk_index.int()), to_all(routing.topk_weight)  # (X·T, K)
        rows = to_all(x.to(compute_dtype(x)))  # (X·T, H)

        def finish() -> Tensor:
            outputs = experts.backend(experts, rows, self._here(index, weight, experts.num_local_experts))
            summed = _reduce_scatter(outputs.contiguous(), "sum", 0, self.group)
            return summed[:tokens] if missing else summed

        return finish

    def _here(self, index: Tensor, weight: Tensor, own: int) -> Routing:
        """What all ranks' routing, index and weight (X·T, K), is to the experts of this rank: min(K, E/X) columns."""
        index = index.long() - own * self.rank
        here = (index >= 0).logical_and(index < own)
        index, weight = index.masked_fill(~here, 0), weight.masked_fill(~here, 0.0)
        if index.shape[1] > own:  # a rank cannot have more of a token's experts; those it has keep their order
            first = here.byte().sort(dim=1, descending=True, stable=True).indices[:, :own]
            index, weight = index.gather(1, first), weight.gather(1, first)
        blank = weight.new_empty(0)
        return Routing(blank, blank, index, weight, ragged=True)

    def _room(self, x: Tensor) -> int:
        """Tokens of each rank that there is room for.

        Ranks agree on it in the first pass, which waits; later each knows it without the others. So one that has more
        can only refuse: it alone would ask, while the others send rows.
        """
        if torch.compiler.is_compiling():
            return max(len(x), self._most)
        if not self._most:
            most = torch.tensor(len(x), device=x.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=self.group)
            self._most = int(most)
        if len(x) > self._most:
            raise UserError(
                f"parallel.exchange is all_gather, but a rank has {len(x)} tokens, and in the first pass none had more "
                f"than {self._most}: let the first batch be the largest, or set parallel.exchange all_to_all"
            )
        return self._most


EXCHANGES: dict[str, type[AllToAll | AllGather]] = {"all_to_all": AllToAll, "all_gather": AllGather}


class Slots(NamedTuple):
    """Rows that some of many places have: how they are taken from what has the places, and summed again."""

    order: Tensor  # (N,) where each row comes from
    slot: Tensor  # (places, M) rows that come from each place; N for none

    @classmethod
    def of(cls, chosen: Tensor, number: int) -> Slots:
        """A row for each place of chosen (A, B), bool, that is true; they are so many, and keep their order."""
        flat = chosen.flatten()
        place = torch.where(flat, flat.cumsum(0) - 1, number).view_as(chosen)
        order = torch.empty(number + 1, dtype=torch.int64, device=flat.device)  # what has no row writes the last
        return cls(order.scatter_(0, place.flatten(), torch.arange(len(flat), device=flat.device))[:number], place)

    def spread(self, x: Tensor) -> Tensor:
        """x (places, H) -> rows (N, H)."""
        return to_slots(x, self._with_none())[: len(self.order)]

    def gather(self, rows: Tensor) -> Tensor:
        """rows (N, H) -> (places, H), the sum of each place's rows."""
        return from_slots(F.pad(rows, (0, 0, 0, 1)), self._with_none())

    def _with_none(self) -> tuple[Tensor, Tensor]:
        return F.pad(self.order, (0, 1)), self.slot  # the last row stands where there is none


def _at(values: Tensor, choices: Slots) -> Tensor:
    return values.index_select(0, choices.order).unsqueeze(1)


class _SumOfTrips(torch.autograd.Function):
    """rows (N, H) -> (T, H), the sum of each token's trips.

    It keeps itself where they go, 8·N bytes, and does not save it by autograd: where a block is recomputed, what is
    saved after the rows have come back would make them come back once more.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, trips: Slots) -> Tensor:
        ctx.token = trips.order
        return trips.gather(rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.token), None


class _GradientOver(torch.autograd.Function):
    """The same tensor, with a gradient divided by a number."""

    @staticmethod
    def forward(ctx, x: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad / ctx.divisor, None
