"""Metrics whose state is summed over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from moebed.machine.float32 import keeping_dtype
from moebed.machine.float64 import double, has_float64


class TextLoss(Metric):
    """Cross entropy of text, of all and by domain: nats a token, perplexity (of all alone), and bits per byte.

    Perplexities cannot be compared between tokenizers; bits per byte can: all nats, in bits, over all bytes of text
    that the predicted tokens stand for. Special tokens cost bits and stand for no byte.

    Args:
        num_domains: Number of domains (D).
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, num_domains: int) -> None:
        super().__init__()
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros(num_domains, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *arguments: Any, **options: Any) -> torch.nn.Module:
        """Move the sums, in float64 in any case; where the device has no float64 they stay where they are."""
        keeping = keeping_dtype(fn)  # Lightning casts modules to the run's precision

        def moved(tensor: Tensor) -> Tensor:
            return keeping(tensor) if has_float64(fn(torch.zeros(1)).device) else tensor

        return super()._apply(moved, *arguments, **options)

    def update(self, nats: Tensor, tokens: Tensor, num_bytes: Tensor, domain: Tensor) -> None:
        """Add sequences: summed nats (B,), predicted tokens (B,), bytes (B,), index of the domain (B,)."""
        domain = domain.to(self.nats.device)
        self.nats.index_add_(0, domain, double(nats))
        self.tokens.index_add_(0, domain, double(tokens))
        self.bytes.index_add_(0, domain, double(num_bytes))

    def compute(self) -> dict[str, Tensor]:
        """``loss``, ``perplexity`` and ``bits_per_byte`` over all domains, (); of each ``loss_by_domain`` and
        ``bits_per_byte_by_domain`` (D,).

        All float32, and NaN where there is no text (bits per byte also inf, where tokens stand for no byte).
        """
        total_nats, total_tokens, total_bytes = self.nats.sum(), self.tokens.sum(), self.bytes.sum()
        loss = total_nats / total_tokens
        return {
            "loss": loss.float(),
            "perplexity": loss.exp().float(),
            "bits_per_byte": bits_per_byte(total_nats, total_bytes).float(),
            "loss_by_domain": (self.nats / self.tokens).float(),
            "bits_per_byte_by_domain": bits_per_byte(self.nats, self.bytes).float(),
        }


def bits_per_byte(nats: Tensor, num_bytes: Tensor) -> Tensor:
    """Nats over a text of num_bytes, in bits per byte."""
    return nats / math.log(2) / num_bytes
