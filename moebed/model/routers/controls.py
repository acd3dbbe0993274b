"""Controls: routers that learn nothing, look at something else, or have more parameters than they need.

T tokens, E experts, K experts per token, H hidden, C = d_low.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from moebed.machine.float32 import float32_linear
from moebed.model.config import LayerConfig, ModelConfig, RouterOptions, setting
from moebed.model.routers.autonomy import Autonomy
from moebed.model.routers.contract import ExpertOutputs, Router, drawn
from moebed.model.routers.softmax import GatedRouter
from moebed.model.routing import Routing, TokenContext

_BITS = 31
Number = TypeVar("Number", int, Tensor, int | Tensor)


class FrozenGate(GatedRouter):
    """``softmax_topk`` with a random gate that is never trained: does it matter that the router learns?"""

    has_plan_formula = True
    other_teacher = True  # nothing is taught

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.weight.requires_grad_(False)


class FactorisedGate(Router):
    """``softmax_topk`` on x W_a W_b, where W_a is as large as the projections of ``autonomy``: is it the size?"""

    Options = Autonomy.Options
    options: Autonomy.Options

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        inner = layer.num_experts * self.options.d_low
        self.low_proj = drawn(inner, config.hidden_size)  # W_a (E·C, H)
        self.high_proj = drawn(layer.num_experts, inner)  # W_b (E, E·C)

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route hidden_states (T, H)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            low = float32_linear(hidden_states, self.low_proj)  # (T, E·C)
            return self.choose(float32_linear(low, self.high_proj))

    def gate(self) -> Tensor:
        """The product (E, H)."""
        return float32_linear(self.high_proj, self.low_proj.t())


class EvenWeights(Router):
    """A rule that ranks the experts and weighs the first K alike, 1/K each."""

    has_plan_formula = True
    keeps_input = False
    other_teacher = True  # no parameters

    def choose(self, logits: Tensor) -> Routing:
        """The decision that follows from logits (T, E)."""
        index = logits.topk(self.num_experts_per_tok, dim=-1, sorted=True).indices
        weight = torch.full(index.shape, 1 / self.num_experts_per_tok, dtype=torch.float32, device=logits.device)
        return Routing(logits, logits.softmax(dim=-1), index, weight)


class Hash(EvenWeights):
    """The experts of a token follow from its id alone, at random for each id and layer (Roller 2106.04426)."""

    @dataclass
    class Options(RouterOptions):
        """Settings of the table."""

        seed: int = setting("Of the table of token ids and experts.", 0, least=0)

    options: Options

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        self.salt = mixed(mixed(self.options.seed) ^ layer.index)

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route tokens by their ids (T,)."""
        if context is None:
            raise TypeError("the hash router needs a TokenContext: pass it to the block or MoE that is called")
        return self.choose(self.numbers_of(context.ids))

    def numbers_of(self, ids: Tensor) -> Tensor:
        """A random number from 0 to 1 of each pair of an id (T,) and an expert, which is its logit (T, E)."""
        expert = torch.arange(self.num_experts, device=ids.device)
        number = mixed(mixed(ids.unsqueeze(1) ^ self.salt) ^ expert)  # (T, E)
        return number.to(torch.float32) / 2**_BITS


class Balanced(EvenWeights):
    """Round robin: K experts after another for one token after another, so that loads are equal; for benchmarks."""

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route hidden_states (T, H) by their position alone."""
        device = hidden_states.device
        first = torch.arange(len(hidden_states), device=device).unsqueeze(1) * self.num_experts_per_tok  # (T, 1)
        turns = (torch.arange(self.num_experts, device=device) - first) % self.num_experts  # (T, E) until its turn
        return self.choose(-turns.to(torch.float32) / self.num_experts)


def mixed(number: Number) -> Number:
    """A hash of 31 bits of each number, int64; no product exceeds 63 bits, so that every device agrees."""
    number = number & (2**_BITS - 1)
    for _ in range(2):
        number = ((number ^ (number >> 16)) * 0x45D9F3B) & (2**_BITS - 1)
    return number ^ (number >> 16)


def uniform_numbers(
    key: Sequence[int | Tensor], shape: Sequence[int], device: torch.device, first: int | Tensor = 0
) -> Tensor:
    """Numbers in (0, 1) of a matrix's shape (rows, columns), float32: the same for the same key, whoever asks.

    With ``first`` they are those of the rows from that one on. Tensors among the key have no dimension; what of it is
    on the host goes with the operations, since a copy would wait for the device.
    """
    number: int | Tensor = 0
    for part in key:
        number = mixed(number ^ mixed(part))
    rows, columns = (torch.arange(size, device=device) for size in shape)
    of_row = mixed((rows + first) ^ number)
    drawn_bits = mixed(mixed(of_row).unsqueeze(1) ^ mixed(columns))
    return ((drawn_bits >> (_BITS - 23)).to(torch.float32) + 0.5) / 2**23
