"""What is written into the residual stream, as the head reads it: logits of the token that follows, and words.

A model whose layers are normalised before them alone adds what they write to the stream as it is, so that the logit of
a token is the sum of what each part adds to it (direct logit attribution), over the root mean square of the stream at
its end. A norm after a layer's FFN is held as it was.

T tokens, U ids, H hidden, N rows, G groups of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moebed.model.attention import RMSNorm


class Words(NamedTuple):
    """The ids whose logits rows raise most.

    Args:
        ids: (N, top) int64, the most raised first.
        gain: (N, top) by how much.
    """

    ids: Tensor
    gain: Tensor


# Of rows (N, H) of a residual stream, which group each is of (N,), and how many are wanted, the ids whose logits are
# most above the mean of the group's rows.
Reading = Callable[[Tensor, Tensor, int], Words]


def most_raised(bands: Iterable[Tensor], group: Tensor, top: int) -> Words:
    """See :data:`Reading`.

    Args:
        bands: Logits (N, v) of the rows over the vocabulary, a band at a time.
        group: (N,) from 0 on.
        top: How many.
    """
    rows, start = len(group), 0
    best = Words(torch.empty(rows, 0, dtype=torch.int64), torch.empty(rows, 0))
    size = torch.bincount(group).unsqueeze(1)  # (G, 1)
    for band in bands:
        logits = band.float()
        of_row = group.to(logits.device)
        mean = logits.new_zeros(len(size), logits.shape[1]).index_add_(0, of_row, logits) / size.to(logits.device)
        found = (logits - mean[of_row]).topk(min(top, logits.shape[1]), dim=1)
        ids = torch.cat([best.ids, found.indices.cpu() + start], dim=1)
        gain = torch.cat([best.gain, found.values.cpu()], dim=1)
        gain, order = gain.sort(dim=1, descending=True, stable=True)
        best = Words(ids.gather(1, order)[:, :top], gain[:, :top])
        start += logits.shape[1]
    return best


@dataclass(frozen=True)
class Following:
    """What the head makes the logits of the tokens that follow of.

    Args:
        rows: (U, H) float32, by which a stream over its root mean square is multiplied for the logits of U ids.
        of_token: (T,) which of them is of the token that follows; -1 where none does.
    """

    rows: Tensor
    of_token: Tensor

    @classmethod
    def of(cls, head_rows: Callable[[Tensor], Tensor], targets: Tensor, norm_type: str = "rms") -> Following:
        """For targets (T,), -1 where there is none, by what reads the head's rows of ids.

        A last norm that takes the mean of the stream away is the same as rows without their mean.
        """
        ids, of_token = targets.unique(return_inverse=True)
        none = int(bool(len(ids)) and int(ids[0]) < 0)  # the first id is then none
        rows = head_rows(ids[none:])
        return cls(rows if norm_type == "rms" else rows - rows.mean(dim=-1, keepdim=True), of_token - none)


@dataclass(frozen=True)
class Attribution:
    """How what a layer's experts write adds to logits.

    Args:
        following: The ids.
        multiplier: Of what is added to the stream.
        norm: That which follows the FFN, where there is one.
    """

    following: Following
    multiplier: float
    norm: nn.Module

    def toward(self, written: Tensor, row: Tensor) -> Tensor:
        """What parts (n, H) of a layer's output add to logits (n,), over the root mean squares that are not known yet.

        Args:
            written: The parts.
            row: (n,) of ``following.rows``.
        """
        scale = self.norm.weight if isinstance(self.norm, RMSNorm) else 1.0
        rows = self.following.rows[row.to(self.following.rows.device)]
        return (written * scale * rows).sum(dim=-1) * self.multiplier

    def held(self, output: Tensor) -> Tensor:
        """By what the norm that follows divides a layer's output (T, H): (T,), 1 without one."""
        if not isinstance(self.norm, RMSNorm):
            return torch.ones_like(output[:, 0])
        return root_mean_square(output, self.norm.eps)


def root_mean_square(x: Tensor, eps: float, norm_type: str = "rms") -> Tensor:
    """By what a norm of a type of ``ModelConfig.norm_type`` divides x (T, H): (T,)."""
    x = x.float()
    x = x if norm_type == "rms" else x - x.mean(dim=-1, keepdim=True)
    return (x.square().mean(dim=-1) + eps).sqrt()
