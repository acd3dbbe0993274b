"""What one layer of a ModelConfig has after its attention, with per-layer lists resolved."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerConfig:
    """What one layer has after its attention: E routed experts of width F, K of them a token, and shared experts."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_shared_experts: int
    shared_width: int | None = None  # where it is no number of experts
    index: int = field(default=0, compare=False)  # of the layer

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts' one FFN; 0 where there is none."""
        if not self.num_shared_experts:
            return 0
        return self.shared_width or self.num_shared_experts * self.moe_intermediate_size
