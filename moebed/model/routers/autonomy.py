"""Autonomy of experts: each expert's own first, low-rank projection tells whether it wants a token.

T tokens, E experts, K experts per token, H hidden, F expert intermediate, C = d_low.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from moebed.errors import ConfigError
from moebed.model.config import LayerConfig, ModelConfig, RouterOptions, setting
from moebed.model.experts import Experts, Product
from moebed.model.routers.contract import ExpertOutputs, Router, drawn
from moebed.model.routers.norms import norms, of_chosen
from moebed.model.routing import Routing, TokenContext


class FactorisedExperts(Experts):
    """Experts whose gates see c = x W_down (T, C) alone: E_e(x) = (act(c W_gateᵀ) ⊙ x W_upᵀ) W_outᵀ.

    ``gate_proj (E, F, C)``, ``up_proj (E, F, H)`` and ``down_proj (E, H, F)``; W_down is the router's ``low_proj``.
    What the router computed already is c of the chosen experts (T, K, C). A token's row is then another one for each of
    its experts, so that every choice goes through backends and all-to-all as a token of its own, [x, c] (T·K, H + C).
    """

    factors = MappingProxyType({"gate": ("experts.gate_proj", "router.low_proj"), "up": ("experts.up_proj",)})
    gate_proj: Tensor
    up_proj: Tensor

    def __init__(self, config: ModelConfig, layer: LayerConfig, router: Autonomy) -> None:
        super().__init__(config, layer)
        self._router = (router,)  # no child, or its parameters had two names

    @classmethod
    def shapes(cls, config: ModelConfig, layer: LayerConfig) -> dict[str, tuple[int, ...]]:
        """Of the parameters, by name."""
        experts, width, hidden = layer.num_experts, layer.moe_intermediate_size, config.hidden_size
        low = Autonomy.d_low(config)
        return {
            "gate_proj": (experts, width, low),
            "up_proj": (experts, width, hidden),
            "down_proj": (experts, hidden, width),
        }

    @property
    def low_proj(self) -> Tensor:
        """W_down (E, C, H)."""
        return self._router[0].low_proj

    def begin(self, x: Tensor, routing: Routing) -> Callable[[], Tensor]:
        """Start computing the layer's outputs (T, H); what it returns gives them."""
        low = routing.precomputed
        if low is None:
            low = of_chosen(self._router[0].project(x), routing.topk_index)
        rows = torch.cat([x.to(low.dtype).unsqueeze(1).expand(-1, low.shape[1], -1), low], dim=-1).flatten(0, 1)
        index, weight = routing.topk_index.reshape(-1, 1), routing.topk_weight.reshape(-1, 1)
        finish = super().begin(rows, Routing(weight, weight, index, weight))
        return lambda: finish().unflatten(0, low.shape[:2]).sum(dim=1)

    def known_outputs(self, routing: Routing) -> None:
        """The router runs no expert to its end."""

    def gate_and_up(self, rows: Tensor, product: Product) -> Tensor:
        """Both projections (R, 2F) of rows [x, c] (R, H + C), gate first, by a product of rows and matrices."""
        x, low = rows.split([rows.shape[-1] - self.gate_proj.shape[-1], self.gate_proj.shape[-1]], dim=-1)
        return torch.cat([product(low, self.local(self.gate_proj)), product(x, self.local(self.up_proj))], dim=-1)

    def matrix(self, name: str) -> Tensor:
        """One matrix of all experts here: ``gate`` is (E, F, C), ``up`` (E, F, H), ``down`` (E, H, F)."""
        return self.local(getattr(self, f"{name}_proj"))

    def expert_matrix(self, name: str, expert: int) -> Tensor:
        """One expert's ``gate``, a product, or ``up`` (F, H), or ``down`` (H, F)."""
        found = super().expert_matrix(name, expert)
        return found @ self.low_proj[expert] if name == "gate" else found

    def mean_neurons(self) -> dict[str, Tensor]:
        """Means (E, H) of each expert's rows of ``gate`` and of ``up``, and of its columns of ``down``; float32."""
        means = super().mean_neurons()
        # Not a matrix product, which autocast and TF32 would round.
        return means | {"gate": (means["gate"].unsqueeze(-1) * self.low_proj.float()).sum(dim=1)}

    def activate(self, expert: int, x: Tensor) -> Tensor:
        """act(x W_downᵀ W_gateᵀ) of one expert on tokens x (T, H): (T, F)."""
        return super().activate(expert, F.linear(x, self.low_proj[expert]))


def _a_third(config: ModelConfig) -> str:
    wide = max(1, round(config.hidden_size / 24)) * 8
    return f"about hidden_size / 3 was best, {wide} here, to a multiple of 8"


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

        d_low: int = setting(
            "Width of each expert's first projection, or of a gate as large.", least=1, advice=_a_third
        )

    default_norm_topk_prob = False
    experts_class = FactorisedExperts
    other_teacher = True  # the experts go on from what it projects

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raise ConfigError for experts that have biases."""
        if config.experts_bias:
            raise ConfigError("model config: experts_bias is true, but router autonomy's experts have no biases")

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.low_proj = drawn(layer.num_experts, self.d_low(config), config.hidden_size)  # (E, C, H)

    @classmethod
    def d_low(cls, config: ModelConfig) -> int:
        """C."""
        assert isinstance(config.router_options, cls.Options)
        return config.router_options.d_low

    def build_experts(self, config: ModelConfig, layer: LayerConfig) -> FactorisedExperts:
        """Experts that go on from its projections."""
        return FactorisedExperts(config, layer, self)

    @classmethod
    def width_of_equal_flops(cls, config: ModelConfig) -> int:
        """Gate and chosen experts, E·H + 3·K·F·H, against projections and chosen experts, E·C·H + K·F'·(C + 2H)."""
        layer, hidden, low = config.layer(0), config.hidden_size, cls.d_low(config)
        experts, top_k = layer.num_experts, layer.num_experts_per_tok
        plain = experts * hidden + 3 * top_k * layer.moe_intermediate_size * hidden
        return round((plain - experts * low * hidden) / (top_k * (low + 2 * hidden)))

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route hidden_states (T, H)."""
        low = self.project(hidden_states)
        with torch.autocast(hidden_states.device.type, enabled=False):
            routing = self.choose(norms(low))
        return routing._replace(precomputed=of_chosen(low, routing.topk_index))

    def project(self, hidden_states: Tensor) -> Tensor:
        """c of hidden_states (T, H) for every expert: (T, E, C)."""
        product = F.linear(hidden_states, self.low_proj.flatten(0, 1))  # (T, E·C)
        return product.unflatten(1, (self.num_experts, -1))


def matched_width(hidden_size: int, moe_intermediate_size: int, d_low: int) -> int:
    """Width of an expert with factorised gate that has as many parameters as a plain one (2501.13074, section 3.2).

    d_wide = (3·H·F − d_low·H) / (d_low + 2H), rounded; its share of the router is counted in.
    """
    plain = 3 * hidden_size * moe_intermediate_size
    return round((plain - d_low * hidden_size) / (d_low + 2 * hidden_size))
