"""Noisy top-K gating: noise on the logits in training, and losses of a whole batch that keep experts equally used.

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebed.machine.float32 import float32_linear
from moebed.model.config import LayerConfig, ModelConfig, RouterOptions, setting
from moebed.model.losses import squared_variation
from moebed.model.routers.contract import ExpertOutputs, Router, drawn
from moebed.model.routers.controls import mixed
from moebed.model.routing import Routing, TokenContext

_BITS = 23  # of a uniform number: with half of the last one more, float32 still holds it


class NoisyTopK(Router):
    """Noisy top-K gating (Shazeer 2017, section 2.1 and appendix A), with LLaMA-MoE's gate of two layers (2406.16554).

    In training the logits are W₂ tanh(W₁ x) + ξ · σ with ξ ~ N(0, 1) and σ = softplus(W_n x) + ε, where W_n starts at
    0: σ is .703, far above the first logits. The K largest are chosen, weight softmax over them. In evaluation there is
    no noise. With ``gate_layers`` 1 the gate is linear and begins at 0, as Shazeer's.

    Two losses of a batch, each the squared coefficient of variation over the experts: of their importance, the sum of
    their weights, and of their load, the sum of Φ((clean logit − threshold) / σ), where the threshold is the K-th
    largest of the other experts' noisy logits: the chance of being chosen if the expert's own noise were drawn anew.
    Where K is E every expert is, so that the load is constant.

    ξ is a function of seed, step, layer and the token's place in the batch of all ranks: it needs no state, is the same
    in a recomputed pass and in a resumed run, and whatever the number of ranks that share the batch.
    """

    @dataclass
    class Options(RouterOptions):
        """Settings of gate, noise and losses."""

        seed: int = setting("Of the noise on the logits.", 0, least=0)
        gate_layers: int = setting("Layers of the gate, with tanh between two.", 2, least=1, most=2)
        noise_epsilon: float = setting("Least standard deviation of the noise on the logits.", 0.01, least=0)
        importance_loss_coef: float = setting("Of the variation of the experts' importance.", 0.01, least=0)
        load_loss_coef: float = setting("Of the variation of the experts' load.", 0.01, least=0)

    options: Options
    has_plan_formula = True
    IMPORTANCE, LOAD = "importance", "load"

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        experts, hidden = layer.num_experts, config.hidden_size
        if self.options.gate_layers == 1:
            self.weight = nn.Parameter(torch.zeros(experts, hidden))  # W_g (E, H)
        else:
            self.input_proj = drawn(experts, hidden)  # W₁ (E, H)
            self.output_proj = drawn(experts, experts)  # W₂ (E, E)
        self.noise_proj = nn.Parameter(torch.zeros(experts, hidden))  # W_n (E, H)
        self.layer = layer.index
        # Of this step and layer, (); a tensor, so that a compiled pass is not compiled anew for each.
        self.key = torch.zeros((), dtype=torch.int64)

    def initial(self, name: str, parameter: Tensor) -> Tensor:
        """A linear gate and W_n begin at 0."""
        return torch.zeros(parameter.shape, dtype=parameter.dtype)

    def begin_step(self, step: int) -> None:
        """Noise of its own for each micro-batch."""
        key = 0
        for number in (self.options.seed, self.layer, step, self.micro_batch):
            key = mixed(key ^ mixed(number))
        self.key = torch.full((), key, device=self.noise_proj.device)  # filled there: a copy would wait

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route hidden_states (T, H)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            clean = self.logits(hidden_states)
            if not self.training:
                return self.choose(clean)
            std = F.softplus(float32_linear(hidden_states, self.noise_proj)) + self.options.noise_epsilon  # (T, E)
            routing = self.choose(clean + self.noise(len(clean)) * std)
            importance = torch.zeros_like(clean).scatter(1, routing.topk_index, routing.topk_weight)
            sums = {self.IMPORTANCE: importance, self.LOAD: self.chances(clean, std, routing)}
            return routing._replace(sums=sums)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """What the gate says of hidden_states (T, H) without noise: (T, E)."""
        if self.options.gate_layers == 1:
            return float32_linear(hidden_states, self.weight)
        return float32_linear(float32_linear(hidden_states, self.input_proj).tanh(), self.output_proj)

    def noise(self, num_tokens: int) -> Tensor:
        """ξ of this rank's tokens (T, E), float32."""
        token = self.rank * num_tokens + torch.arange(num_tokens, device=self.key.device)
        expert = torch.arange(self.num_experts, device=self.key.device)
        number = mixed(mixed(token ^ self.key).unsqueeze(1) ^ mixed(expert))  # (T, E)
        uniform = ((number >> (31 - _BITS)).to(torch.float32) + 0.5) / 2**_BITS
        return torch.erfinv(2 * uniform - 1) * math.sqrt(2)

    def chances(self, clean: Tensor, std: Tensor, routing: Routing) -> Tensor:
        """Chance (T, E) that each expert is chosen if its noise were drawn anew; 1 for every one where K is E."""
        top_k = self.num_experts_per_tok
        if top_k == self.num_experts:
            return torch.ones_like(clean)
        noisy = routing.router_logits
        best = noisy.topk(top_k + 1, dim=-1).values
        last, next_best = best[:, top_k - 1 : top_k], best[:, top_k:]
        threshold = torch.where(noisy >= last, next_best, last)  # of a chosen expert, what the others have left
        return torch.special.ndtr((clean - threshold) / std)

    def gate(self) -> Tensor | None:
        """Gate embeddings (E, H) of a linear gate."""
        return self.weight if self.options.gate_layers == 1 else None

    @classmethod
    def plan_bytes(cls, config: ModelConfig, layer: LayerConfig, is_narrow: bool) -> int:
        """4·E each: ξ, σ before softplus, tanh; σ and two more of the load, and E and 8·(K + 1) of its threshold."""
        assert isinstance(config.router_options, cls.Options)
        experts, top_k = layer.num_experts, layer.num_experts_per_tok
        kept = 4 * experts * (1 + config.router_options.gate_layers)
        if top_k < experts:
            kept += 13 * experts + 8 * (top_k + 1)
        return kept + (4 * config.hidden_size if is_narrow else 0)

    @classmethod
    def idle_parameters(cls, config: ModelConfig, layer: LayerConfig) -> int:
        """W_n."""
        return layer.num_experts * config.hidden_size

    def batch_losses(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Variation of importance and of load."""
        return {name: squared_variation(values) for name, values in sums.items()}

    def loss_coefficients(self) -> dict[str, float | Tensor]:
        """Of both."""
        return {self.IMPORTANCE: self.options.importance_loss_coef, self.LOAD: self.options.load_loss_coef}
