"""Autonomy of experts: each expert's own first, low-rank projection tells whether it wants a token.

T tokens, E experts, K experts per token, H hidden, F expert intermediate, C = d_low.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from moebed.config import LayerConfig, ModelConfig, RouterOptions, setting
from moebed.routers.contract import ExpertOutputs, Router, Routing, drawn
from moebed.routers.norms import norms, of_chosen


class Autonomy(Router):
    """c_i = x W_down^i (d_low wide), s_i = ‖c_i‖₂, p = softmax(s) over all experts, the K largest (2501.13074, eq. 5).

    Only the chosen go on, from c_i: E_i(x) = (act(c_i W_up^i) ⊙ x W_p^i) W_o^i. Weight p, or p / Σ_topK p where
    norm_topk_prob asks for it, which the paper does not. There is no gate: W_down is the first factor of the experts'
    own gate projections. It stands here, because every expert's is applied to every token, in one product; the product
    is computed in what the experts compute in, norms and decision in float32.
    """

    @dataclass
    class Options(RouterOptions):
        """Settings of the projections."""

        d_low: int = setting("Width C of each expert's first projection; about hidden_size / 3 was best.", least=1)

    options: Options
    default_norm_topk_prob = False
    refused_backends = MappingProxyType({"triton": "has no kernel for the factorised gates"})
    carries = True
    other_teacher = True  # the experts go on from what it projects

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.low_proj = drawn(layer.num_experts, self.options.d_low, config.hidden_size)  # (E, C, H)

    @classmethod
    def gate_width(cls, config: ModelConfig) -> int:
        """d_low."""
        assert isinstance(config.router_options, cls.Options)
        return config.router_options.d_low

    @classmethod
    def width_of_equal_flops(cls, config: ModelConfig) -> int:
        """Gate and chosen experts, E·H + 3·K·F·H, against projections and chosen experts, E·C·H + K·F'·(C + 2H)."""
        layer, hidden, low = config.layer(0), config.hidden_size, cls.gate_width(config)
        experts, top_k = layer.num_experts, layer.num_experts_per_tok
        plain = experts * hidden + 3 * top_k * layer.moe_intermediate_size * hidden
        return round((plain - experts * low * hidden) / (top_k * (low + 2 * hidden)))

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, token_ids: Tensor | None = None) -> Routing:
        """Route hidden_states (T, H)."""
        low = self._low(hidden_states)
        with torch.autocast(hidden_states.device.type, enabled=False):
            routing = self.choose(norms(low))
        return routing._replace(carried=of_chosen(low, routing.topk_index))

    def _low(self, hidden_states: Tensor) -> Tensor:
        product = F.linear(hidden_states, self.low_proj.flatten(0, 1))  # (T, E·C)
        return product.unflatten(1, (self.num_experts, -1))  # (T, E, C)

    def basis(self) -> Tensor:
        """W_down (E, C, H)."""
        return self.low_proj

    def carry(self, hidden_states: Tensor, routing: Routing) -> Routing:
        """The routing with c of the chosen experts."""
        if routing.carried is not None:
            return routing
        return routing._replace(carried=of_chosen(self._low(hidden_states), routing.topk_index))


def matched_width(hidden_size: int, moe_intermediate_size: int, d_low: int) -> int:
    """Width of an expert with factorised gate that has as many parameters as a plain one (2501.13074, section 3.2).

    d_wide = (3·H·F − d_low·H) / (d_low + 2H), rounded; its share of the router is counted in.
    """
    plain = 3 * hidden_size * moe_intermediate_size
    return round((plain - d_low * hidden_size) / (d_low + 2 * hidden_size))
