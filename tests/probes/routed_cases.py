"""Routings with given choices, and texts with given sequences and domains."""

from __future__ import annotations

import torch

from moebed.model.routers import Routing
from moebed.views.layer import LayerView, ProbeText


def text_of(sequences: list[list[int]], domain: list[int], domains: tuple[str, ...], words: tuple[str, ...] = ()):
    """A text of these token ids, padded on the right with 63."""
    width = max(map(len, sequences)) + 1
    ids = torch.full((len(sequences), width), 63)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
    mask = torch.arange(width) < torch.tensor([len(sequence) for sequence in sequences])[:, None]
    return ProbeText(ids, mask, torch.tensor(domain), domains, words)


def chosen_view(choices, experts: int, text: ProbeText | None = None, index: int = 0, unsorted: bool = False):
    """A view whose tokens chose these experts, the first choice first; the indices come reversed if unsorted."""
    choice = torch.as_tensor(choices)
    choice = choice[:, None] if choice.ndim == 1 else choice
    weight = torch.arange(choice.shape[1], 0, -1.0).expand(choice.shape) / choice.shape[1]
    probs = torch.full((len(choice), experts), 0.01).scatter(1, choice, weight)
    probs = probs / probs.sum(dim=1, keepdim=True)
    if unsorted:
        choice, weight = choice.flip(1), weight.flip(1)
    return LayerView(
        index, 9, experts, choice.shape[1], None, routing=Routing(probs.log(), probs, choice, weight), text=text
    )
