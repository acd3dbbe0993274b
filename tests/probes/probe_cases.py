"""Texts, hand-made views and calls that the probe tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from moebed.model.routers import Routing
from moebed.views.layer import LayerView, ProbeText
from probes.contract import ProbeResult
from probes.registry import PROBES
from probes.running.driver import needs_of, run_probes


def make_text(lengths: list[int], width: int) -> ProbeText:
    ids = torch.randint(64, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    padded = torch.full((len(lengths), width), 63)
    padded[:, : ids.shape[1]] = ids
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    domain = torch.arange(len(lengths)) % 2
    return ProbeText(padded.masked_fill(~mask, 63), mask, domain, ("books", "mathematics"))


def probe(views, *names: str) -> dict[str, ProbeResult]:
    return run_probes(views, [PROBES[name]() for name in names])


def all_needs():
    return needs_of(p() for p in PROBES.values())


def routed_view(logits: Tensor, chosen: int, index: int = 0, text: ProbeText | None = None) -> LayerView:
    """A view of a softmax router that saw these logits (T, E); it has no weights."""
    probs = logits.softmax(dim=-1)
    weight, choice = probs.topk(chosen)
    routing = Routing(logits, probs, choice, weight / weight.sum(dim=-1, keepdim=True))
    return LayerView(index, 1, logits.shape[1], chosen, None, routing=routing, text=text)
