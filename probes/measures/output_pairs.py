"""Cosines between experts' outputs at each token, in bounded memory.

T tokens, T' of them taken, E routed experts, E' with the shared expert and the dense reference, K experts per token,
H hidden, P = E' (E' − 1) / 2 pairs (i, j) with i > j, by i and then by j: pairs of the first E experts come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moebed.machine.float64 import double

_BLOCK_ELEMENTS = 1 << 20  # outputs compared at a time


def taken_tokens(tokens: int, experts: int, hidden: int, limit: int) -> Tensor:
    """Evenly spread tokens (T',) int64, as many as have all experts' float32 outputs within ``limit`` bytes."""
    count = max(1, min(tokens, limit // (4 * experts * hidden)))
    return torch.arange(count) * tokens // count


def pair_cosines(outputs: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Cosines of every two experts' outputs, a block of tokens at a time.

    Args:
        outputs: E' tensors (T', H).

    Yields:
        Which tokens, and their cosines (tokens, P), within −1 and 1; 0 where an output is zero. Equal outputs have
        cosine 1 exactly: the angle between them would show the least rounding.
    """
    tokens, hidden = outputs[0].shape
    experts = len(outputs)
    first, second = torch.tril_indices(experts, experts, -1, device=outputs[0].device)
    step = min(tokens, max(1, _BLOCK_ELEMENTS // (experts * max(hidden, experts))))
    # Written over and over: fresh memory for each block costs more than what is done with it.
    blocks = torch.empty((step, experts, hidden), dtype=torch.float32, device=outputs[0].device)
    grams = torch.empty((step, experts, experts), dtype=torch.float32, device=outputs[0].device)
    for start in range(0, tokens, step):
        part = slice(start, min(start + step, tokens))
        count = part.stop - part.start
        block = torch.stack([output[part].float() for output in outputs], dim=1, out=blocks[:count])  # (b, E', H)
        gram = torch.bmm(block, block.transpose(1, 2), out=grams[:count])  # (b, E', E')
        square = gram.diagonal(dim1=1, dim2=2)
        largest = square.amax(dim=1, keepdim=True)  # the product of two small squares would underflow
        gram = gram.flatten(1).mul_(torch.where(largest > 0, 1 / largest, 0.0))
        square = gram[:, :: experts + 1]
        size = (square[:, first] * square[:, second]).sqrt_()  # exactly the square where the two are equal
        cosine = gram.index_select(1, first * experts + second).div_(size)
        yield part, cosine.masked_fill_(size == 0, 0.0).clamp_(-1, 1)


def angular_similarity(cosine: Tensor) -> Tensor:
    """1 − arccos(cos)/π: 1 in the same direction, 0.5 at right angles, 0 in the opposite one."""
    return 1 - cosine.clamp(-1, 1).acos_().div_(math.pi)


def to_square(pairs: Tensor, experts: int) -> Tensor:
    """Values of pairs (..., P) as symmetric matrices (..., E', E') with a diagonal of 1."""
    first, second = torch.tril_indices(experts, experts, -1, device=pairs.device)
    square = torch.ones((*pairs.shape[:-1], experts, experts), dtype=pairs.dtype, device=pairs.device)
    square[..., first, second] = pairs
    square[..., second, first] = pairs
    return square


class ChosenMeans(NamedTuple):
    """Mean cosine (b,) over pairs of experts chosen for a token, of others, and of one of each.

    NaN for a token that has no such pair; None where no token has.
    """

    chosen: Tensor | None
    other: Tensor | None
    mixed: Tensor | None


def chosen_means(cosine: Tensor, chosen: Tensor, experts: int) -> ChosenMeans:
    """Average the cosines of pairs by whether the two experts were chosen.

    Args:
        cosine: (b, P), the pairs of the E routed experts first.
        chosen: (b, K) experts, -1 where a token has no further one.
        experts: E.
    """
    if experts < 2:
        return ChosenMeans(None, None, None)
    stands = chosen >= 0
    count = stands.sum(dim=1)  # (b,)
    rest, most = experts - count, chosen.shape[1]
    chosen = chosen.clamp(min=0)
    number = torch.arange(experts, device=cosine.device)
    high, low = torch.maximum(number, number.unsqueeze(1)), torch.minimum(number, number.unsqueeze(1))
    pair = (high * (high - 1) // 2 + low).fill_diagonal_(0)  # (E, E); an expert is no pair with itself
    rows = cosine.gather(1, pair[chosen].flatten(1)).view(len(cosine), most, experts)
    rows.scatter_(2, chosen.unsqueeze(2), 0.0)
    rows *= stands.unsqueeze(2)
    # Each pair of chosen experts is in two rows, a pair of a chosen one and another in one.
    # In float64, for what is left of a sum once others are taken off it.
    inner = rows.gather(2, chosen.unsqueeze(1).expand(-1, most, -1)) * stands.unsqueeze(1)
    twice = double(inner).sum(dim=(1, 2))
    both, mixed = twice / 2, double(rows).sum(dim=(1, 2)) - twice
    none = double(cosine[:, : math.comb(experts, 2)]).sum(dim=1) - both - mixed

    def mean(total: Tensor, pairs: Tensor) -> Tensor | None:
        pairs = pairs.to(total.device)
        return torch.where(pairs > 0, total / pairs, torch.nan).float() if bool((pairs > 0).any()) else None

    return ChosenMeans(
        mean(both, count * (count - 1) / 2), mean(none, rest * (rest - 1) / 2), mean(mixed, count * rest)
    )
