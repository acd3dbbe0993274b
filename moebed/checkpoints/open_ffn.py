"""How weights that were read are looked at and used, and an FFN whose weights are at hand.

N rows, H hidden, F its width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moebed.machine.float32 import exact_products
from moebed.model.experts import bias_name
from moebed.model.fused import Gating

_ACTIVATIONS_AT_A_TIME = 1 << 25  # numbers


@dataclass
class Precision:
    """How weights are looked at, and how text is computed.

    Args:
        dtype: Weights are rounded to this; as they are stored if not given.
        device: Where everything is computed.
    """

    dtype: torch.dtype | None
    device: torch.device
    _scratch: dict[str, Tensor] = field(default_factory=dict)

    @property
    def compute(self) -> torch.dtype:
        """What products are computed in."""
        return self.dtype or torch.float32

    def seen(self, weights: Tensor) -> Tensor:
        """Weights as probes see them."""
        return weights.to(device=self.device, dtype=self.dtype or weights.dtype)

    def used(self, weights: Tensor, name: str = "") -> Tensor:
        """Weights (N, M) for a product; valid until the next ones of this name are asked for."""
        weights = self.seen(weights)
        if weights.dtype == self.compute:
            return weights
        scratch = self._scratch.get(name)
        if scratch is None or scratch.numel() != weights.numel():  # kept: new memory costs more than the conversion
            self._scratch.pop(name, None)
            scratch = torch.empty(weights.numel(), dtype=self.compute, device=self.device)
            self._scratch[name] = scratch
        return scratch.view(weights.shape).copy_(weights)

    def computing(self) -> AbstractContextManager[object]:
        """Autocast where products are computed in less than float32; the residual stream always is float32."""
        if self.compute == torch.float32:
            return exact_products()
        return torch.autocast(self.device.type, dtype=self.compute)


class OpenFfn:
    """An FFN whose weights are in memory, until those of another are asked for.

    Args:
        matrices: Each the product of its factors; biases, where there are some, by the names of their parameters.
        precision: How it is computed.
        gating: Of gate and up.
        runs: Rows of each run. For more than one block all weights are moved and cast once; for one block each is when
            it is needed, in the same memory.
    """

    def __init__(
        self, matrices: dict[str, list[Tensor]], precision: Precision, gating: Gating, runs: Sequence[int]
    ) -> None:
        self._precision, self._gating, self._matrices = precision, gating, matrices
        self.most = tokens_at_a_time(len(matrices["gate"][0]))  # rows at a time
        self._ready: dict[str, list[Tensor]] = {}
        if len(runs) > 1 or runs[0] > self.most:
            used = precision.used
            self._ready = {n: [used(f, f"{n}{i}") for i, f in enumerate(fs)] for n, fs in matrices.items()}

    def run(self, x: Tensor, watch: Callable[[slice, Tensor], None] | None = None) -> Tensor:
        """Output (N, H) for rows x (N, H), float32; its activations are shown, some rows at a time."""
        output = torch.empty_like(x)
        with self._precision.computing():
            for rows in torch.arange(len(x)).split(self.most):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                activated = self._gating.of_gate(self._through("gate", x[part]))
                if watch is not None:
                    watch(part, activated.float())
                entered = self._gating.entered(self._through("up", x[part]))
                output[part] = self._through("down", activated * entered).float()
        return output

    def _through(self, name: str, x: Tensor) -> Tensor:
        """x (N, ·) times the transpose of a matrix, which is the product of its factors, and its bias."""
        for factor in reversed(self._ready.get(name, self._matrices[name])):
            x = F.linear(x, factor if self._ready else self._precision.used(factor))
        bias = self._matrices.get(bias_name(name))
        return x if bias is None else x + self._precision.seen(bias[0]).flatten().to(x.dtype)


def tokens_at_a_time(width: int) -> int:
    """Tokens whose activations in an expert of this width are made at a time."""
    return max(1, _ACTIVATIONS_AT_A_TIME // width)
