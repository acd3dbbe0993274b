"""Attention of a text whose valid tokens lie side by side: padding exists here alone.

T valid tokens, B sequences, S positions, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebed.model.attention import KVCache
from moebed.model.config import ModelConfig
from moebed.model.decoder import Block
from moebed.model.rope import RotaryEmbedding

_ATTENDED_TOKENS = 8192  # at a time, padding included
_PADDED_SHARE = 1.25  # sequences attend together where that makes them no longer than this, on average


class TextAttention:
    """Every layer's attention for one text.

    Args:
        config: The model.
        lengths: (B,) valid tokens of each sequence.
        device: Where it is computed.
    """

    def __init__(self, config: ModelConfig, lengths: Tensor, device: torch.device) -> None:
        rotary = RotaryEmbedding(config)
        self._rope = rotary.table(int(lengths.max()), device)
        self._groups = [group.to(device) for group in attention_groups(lengths, rotary.boundary)]

    def attend(self, block: Block, hidden: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Residual stream after attention of a stream (T, H): whole, or sequences that have a token (T,) wanted."""
        attended = torch.empty_like(hidden)
        for group in self._groups:
            valid = group >= 0
            if wanted is not None:
                some = (wanted[group.clamp(min=0)] & valid).any(dim=1)
                group, valid = group[some], valid[some]
            if len(group):
                rope = self._rope(group.shape[1])
                attended[group[valid]] = block.attend(hidden[group.clamp(min=0)], rope)[valid].float()
        return attended

    def attend_alone(self, block: Block, hidden: Tensor, wanted: Tensor, text: Tensor) -> Tensor:
        """The same of the tokens wanted, each of which attends to itself and, before it, to the text (T, H) as it is.

        A token's key and value take the place of its own among those of the text; the last ones come first, so that
        what stands before a token is as it was.
        """
        attended = torch.empty_like(hidden)
        for group in self._groups:
            at_work = wanted[group.clamp(min=0)] & (group >= 0)
            group, at_work = group[at_work.any(dim=1)], at_work[at_work.any(dim=1)]
            if not len(group):
                continue
            cache, (cos, sin) = KVCache(group.shape[1]), self._rope(group.shape[1])
            block.attend(text[group.clamp(min=0)], (cos, sin), cache)
            for place in reversed(at_work.any(dim=0).nonzero().flatten().tolist()):
                token, some = group[:, place].clamp(min=0), at_work[:, place]
                cache.length = place
                turn = cos[place : place + 1], sin[place : place + 1]
                found = block.attend(hidden[token].unsqueeze(1), turn, cache)
                attended[token[some]] = found.squeeze(1)[some].float()
        return attended


def attention_groups(lengths: Tensor, boundary: int | None = None) -> list[Tensor]:
    """Which sequences attend together: of similar length, so that little padding is computed.

    Args:
        lengths: (B,) valid tokens of each sequence.
        boundary: Sequences up to this length are apart from longer ones (``RotaryEmbedding.boundary``).

    Returns:
        (b, s) int64 each: index among the T valid tokens, -1 where a shorter sequence has ended.
    """
    starts = (lengths.cumsum(0) - lengths).tolist()
    sizes = lengths.tolist()
    groups: list[list[int]] = []
    for row in sorted((row for row, size in enumerate(sizes) if size), key=lambda row: -sizes[row]):
        if groups:
            group, longest = groups[-1], sizes[groups[-1][0]]
            tokens = (len(group) + 1) * longest
            apart = boundary is not None and sizes[row] <= boundary < longest
            filled = sum(sizes[r] for r in group) + sizes[row]
            if not apart and tokens <= min(_ATTENDED_TOKENS, _PADDED_SHARE * filled):
                group.append(row)
                continue
        groups.append([row])
    found = []
    for group in groups:
        position = torch.arange(sizes[group[0]])
        rows = [torch.where(position < sizes[row], position + starts[row], -1) for row in sorted(group)]
        found.append(torch.stack(rows))
    return found
