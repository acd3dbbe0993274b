"""Grouped average pooling: logits are means of blocks of channels, and there is nothing to learn (LocMoE 2401.13920).

T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from moebed.errors import ConfigError
from moebed.model.config import LayerConfig, ModelConfig, RouterOptions, setting
from moebed.model.routers.contract import ExpertOutputs, Router
from moebed.model.routers.controls import mixed
from moebed.model.routing import Routing, TokenContext

_UNIT = 2**-30  # numbers of `mixed` times this lie in [0, 2)


class GrAP(Router):
    """G_i = ReLU(ω_i·x + ε), p = softmax(G / softmax_temperature), the K largest (the paper: 1), weight p.

    ω_i is E / H on the i-th block of H / E channels and 0 elsewhere, so that ω_i·x is the mean of a block. Where ReLU
    leaves several experts at 0, the mean before it decides. ``router_logits`` are the means before ReLU. The routing
    depends on the order of the channels, and only x can learn.

    ε is there in training alone, uniform in ±``jitter``. The paper gives neither its kind nor its size. It is drawn
    anew for each step, layer, token id and expert, as a function of these and the seed: a resumed run and all ranks see
    the same, and equal ids of a step share it.
    """

    @dataclass
    class Options(RouterOptions):
        """Settings of the logits."""

        softmax_temperature: float = setting("What the rectified logits are divided by.", 1.0, least=1e-6)
        jitter: float = setting("Reach of the noise on the logits in training; 0 turns it off.", 0.0, least=0)
        seed: int = setting("Of the noise of jitter.", 0, least=0)

    options: Options
    default_norm_topk_prob = False
    shift_invariant = False  # ReLU
    other_teacher = True  # no parameters
    has_plan_formula = True
    keeps_input = False  # a mean's backward pass knows its input's shape alone
    noise_step: Tensor

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.hidden_size = config.hidden_size
        self.salt = mixed(mixed(self.options.seed) ^ layer.index)
        # A tensor, so that a compiled graph holds for every step; float32 has whole numbers to 16 million.
        self.register_buffer("noise_step", torch.zeros((), dtype=torch.float32), persistent=False)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Every expert has a block of channels."""
        for index in config.moe_layers:
            experts = config.layer(index).num_experts
            if config.hidden_size % experts:
                raise ConfigError(
                    f"model config: router {config.router} averages hidden_size / num_experts channels for each "
                    f"expert, but hidden_size {config.hidden_size} is not divisible by the {experts} experts of layer "
                    f"{index}"
                )

    @classmethod
    def caution(cls, config: ModelConfig) -> str | None:
        """How small the first weights are, where they are probabilities."""
        assert isinstance(config.router_options, cls.Options)
        experts = config.layer(config.moe_layers[0]).num_experts if config.moe_layers else 1
        if config.norm_topk_prob or experts == 1:
            return None
        weight = first_weight(config.hidden_size, experts, config.router_options.softmax_temperature)
        return (
            f"router {config.router} averages {config.hidden_size // experts} channels for each expert, so that on "
            f"inputs of RMS 1 its first choice begins with a weight of about {weight * experts:.2f} / E = "
            f"{weight:.2f}, and the layer's output with as much of an expert's: "
            "router_options.softmax_temperature below 1, or norm_topk_prob: true, raises it"
        )

    def begin_step(self, step: int) -> None:
        """The noise is that of this step."""
        if self.options.jitter:
            self.noise_step.fill_(step)

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route hidden_states (T, H)."""
        return self.choose(self.means(hidden_states, context))

    def means(self, hidden_states: Tensor, context: TokenContext | None) -> Tensor:
        """ω_i·x + ε of hidden_states (T, H) of tokens of which a context (T,) is known, in float32: (T, E)."""
        means = hidden_states.float().unflatten(-1, (self.num_experts, -1)).mean(dim=-1)
        if not (self.training and self.options.jitter):
            return means
        if context is None:
            raise TypeError("the jitter of router grap needs a TokenContext: pass it to the block or MoE")
        expert = torch.arange(self.num_experts, device=context.ids.device)
        number = mixed(mixed(context.ids.unsqueeze(1) ^ mixed(self.noise_step.long() ^ self.salt)) ^ expert)  # (T, E)
        return means + self.options.jitter * (number.to(torch.float32) * _UNIT - 1)

    def choose(self, logits: Tensor) -> Routing:
        """The decision that follows from means of blocks, logits (T, E)."""
        rectified = torch.where(logits.isneginf(), logits, logits.relu() / self.options.softmax_temperature)
        probs = rectified.softmax(dim=-1)  # (T, E)
        index = logits.topk(self.num_experts_per_tok, dim=-1, sorted=True).indices  # (T, K), of ReLU's ties too
        weight = probs.gather(1, index)
        if self.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return Routing(logits, probs, index, weight)

    def gate(self) -> Tensor:
        """ω (E, H)."""
        place = "cpu" if self.noise_step.is_meta else self.noise_step.device
        return block_means(self.num_experts, self.hidden_size, place)


def block_means(num_experts: int, hidden_size: int, device: torch.device | str = "cpu") -> Tensor:
    """ω (E, H): x ωᵀ are the means of x over E blocks of channels; ω ωᵀ = (E / H)·I."""
    width = hidden_size // num_experts
    return torch.eye(num_experts, device=device).repeat_interleave(width, dim=1) / width


def first_weight(hidden_size: int, num_experts: int, temperature: float = 1.0) -> float:
    """About what the largest probability is where channels are independent and of RMS 1.

    Means of blocks then have standard deviation s = √(E / H), the largest of E is near Blom's median, and e^ReLU of one
    is ½ + e^(s²/2)·Φ(s) on average; over their sum stands the largest.
    """
    normal, spread = NormalDist(), math.sqrt(num_experts / hidden_size) / temperature
    largest = math.exp(spread * max(0.0, normal.inv_cdf((num_experts - 0.375) / (num_experts + 0.25))))
    mean = 0.5 + math.exp(spread**2 / 2) * normal.cdf(spread)
    return min(1.0, largest / (num_experts * mean))
