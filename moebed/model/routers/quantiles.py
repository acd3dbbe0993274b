"""Quantiles of scores from counts, which add up over micro-batches and ranks: the same for any layout of processes.

A mean of the parts' own quantiles would be another number for each way to cut a batch. Bins are even in
asinh(x / τ), so that they are narrowest around 0 and never wider than 1 % of what lies in them.

T tokens, E experts, N bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_BINS = 2048
FINEST = 0.01  # τ: below it bins have one width, of about τ / 100
WIDEST = 100.0  # what lies beyond counts as this
_REACH = math.asinh(WIDEST / FINEST)


def histogram(values: Tensor, token_mask: Tensor) -> Tensor:
    """Counts (E, N) float32 of each expert's values (T, E) over the tokens of token_mask (T,) bool; no gradient."""
    with torch.no_grad():
        num_experts = values.shape[1]
        place = (torch.asinh(values.float() / FINEST) / _REACH + 1) * (NUM_BINS / 2)
        index = place.clamp(0, NUM_BINS - 1).long() + torch.arange(num_experts, device=values.device) * NUM_BINS
        counted = token_mask.to(torch.float32).unsqueeze(1).expand_as(index)
        counts = counted.new_zeros(num_experts * NUM_BINS)
        return counts.scatter_add(0, index.flatten(), counted.flatten()).view(num_experts, NUM_BINS)


def upper_quantile(counts: Tensor, share: float) -> Tensor:
    """What a share of each expert's values lies above: (E,), from counts (E, N); 0 where nothing was counted.

    Midway between the two values that it parts, of which each is known to a bin.
    """
    total = counts.sum(dim=1)
    rank = (total * share).round().clamp(min=1)
    return (_ranked(counts, rank, total) + _ranked(counts, rank + 1, total)) / 2


def _ranked(counts: Tensor, rank: Tensor, total: Tensor) -> Tensor:
    """The rank-th largest value (E,); those of one bin are thought to lie evenly in it."""
    rank = torch.minimum(rank, total)
    from_above = counts.flip(1)
    reached = from_above.cumsum(dim=1)
    place = torch.searchsorted(reached, rank.unsqueeze(1)).clamp(max=NUM_BINS - 1)  # (E, 1)
    here = from_above.gather(1, place)
    within = (rank.unsqueeze(1) - (reached.gather(1, place) - here) - 0.5) / here.clamp(min=1)
    value = FINEST * torch.sinh((1 - 2 * (place + within) / NUM_BINS) * _REACH)
    return torch.where(total > 0, value.squeeze(1), 0.0)
