"""Reference routers: they are told the domain of each token, so that learned routers have something to be measured by.

A router that sends every domain to experts of its own is what specialisation would come to if nothing stood in its way
(2604.07030). Between it and a router that learns nothing lies what a learned router can gain.

T tokens, E experts, K experts per token, D domains, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import torch
from torch import Tensor

from moebed.errors import ConfigError, UserError
from moebed.machine.float32 import float32_linear
from moebed.model.config import LayerConfig, ModelConfig, RouterOptions, setting
from moebed.model.routers.contract import ExpertOutputs, Router
from moebed.model.routers.controls import Hash, mixed
from moebed.model.routers.softmax import GatedRouter
from moebed.model.routing import Routing, TokenContext

# Added to the logits of experts outside a token's block: their probability is 0 in float32, as of -inf, but who forbids
# all of the block can still choose.
OUTSIDE = -1e4
_NAMING = 8  # first tokens of a sequence that decide which block stands for which domain in anti_oracle


def block_sizes(num_experts: int, shares: Sequence[float]) -> list[int]:
    """How E experts are dealt to D domains in proportion to shares (D): at least one each, by largest remainder."""
    spare, total = num_experts - len(shares), sum(shares)
    wanted = [spare * share / total for share in shares]
    sizes = [1 + floor(size) for size in wanted]
    by_rest = sorted(range(len(shares)), key=lambda domain: floor(wanted[domain]) - wanted[domain])
    for domain in by_rest[: num_experts - sum(sizes)]:
        sizes[domain] += 1
    return sizes


class ByDomain(Router):
    """What the reference routers share: experts split into a block for each domain, in order."""

    needs_context = needs_domain = True
    options: Any

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        sizes = self.blocks(config, layer)
        self.later_blocks = [sum(sizes[:domain]) for domain in range(1, len(sizes))]  # where each begins but the first

    @classmethod
    def blocks(cls, config: ModelConfig, layer: LayerConfig) -> list[int]:
        """Experts of each domain (D)."""
        options: Any = config.router_options
        return block_sizes(layer.num_experts, options.domain_shares or [1.0] * options.num_domains)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Refuse a model whose blocks are too small."""
        options: Any = config.router_options
        shares = options.domain_shares
        if shares and (len(shares) != options.num_domains or min(shares) <= 0):
            raise ConfigError(
                f"model config: router_options.domain_shares is {list(shares)}; it must be {options.num_domains} "
                "positive numbers, one for each of num_domains"
            )
        for index in config.moe_layers:
            layer = config.layer(index)
            if layer.num_experts < options.num_domains:
                raise ConfigError(
                    f"model config: router {config.router} needs an expert for each of {options.num_domains} domains; "
                    f"layer {index} has {layer.num_experts}"
                )
            if (least := min(cls.blocks(config, layer))) < layer.num_experts_per_tok:
                raise ConfigError(
                    f"model config: router {config.router} gives a domain {least} of {layer.num_experts} experts in "
                    f"layer {index}, fewer than num_experts_per_tok {layer.num_experts_per_tok}; give more experts, or "
                    "fewer a token"
                )

    @classmethod
    def caution(cls, config: ModelConfig) -> str | None:
        """What a person should know who chose it."""
        return (
            f"router {config.router} is told the domain of each token: it measures other routers, in training and "
            "validation, and cannot generate text; a checkpoint of it needs domains to route by"
        )

    def within(self, logits: Tensor, context: TokenContext | None) -> Tensor:
        """Logits (T, E), moved out of reach where an expert is not of the token's block."""
        if context is None or context.domain is None:
            raise UserError("the router needs the domain of each token, which is known in training and validation only")
        expert = torch.arange(self.num_experts, device=logits.device)
        block = sum((expert >= first).long() for first in self.later_blocks) + torch.zeros_like(expert)  # (E,)
        return logits + OUTSIDE * (block != self.block_of(context).unsqueeze(1))

    def block_of(self, context: TokenContext) -> Tensor:
        """The block that each token goes to (T,)."""
        assert context.domain is not None
        return context.domain


def check_domains(config: ModelConfig, found: int) -> None:
    """Raise ConfigError where the data have another number of domains than a router is told."""
    told = getattr(config.router_options, "num_domains", found)
    if told != found:
        raise ConfigError(
            f"model config: router_options.num_domains is {told}, but the data have {found} domains; give {found}"
        )


@dataclass
class DomainOptions(RouterOptions):
    """Settings of the blocks."""

    num_domains: int = setting(
        "Domains of the data, each with a block of experts.", least=1, advice=lambda _: "it is how many the data have"
    )
    domain_shares: tuple[float, ...] | None = setting(
        "Tokens of each domain, to deal out experts in proportion; evenly if not given.", None
    )

    def __post_init__(self) -> None:
        """Files have no tuples."""
        super().__post_init__()
        if self.domain_shares is not None:
            self.domain_shares = tuple(float(share) for share in self.domain_shares)


class Oracle(ByDomain, GatedRouter):
    """Each domain has a block of experts; within it ``softmax_topk``."""

    Options = DomainOptions
    has_plan_formula = True

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route hidden_states (T, H) of tokens of known domains (T,)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.choose(self.within(float32_linear(hidden_states, self.weight), context))

    def choose(self, logits: Tensor) -> Routing:
        """The decision that follows from logits (T, E), which tell experts apart whose probabilities are 0."""
        probs, index = logits.softmax(dim=-1), logits.topk(self.num_experts_per_tok, dim=-1, sorted=True).indices
        weight = probs.gather(-1, index)
        if self.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return Routing(logits, probs, index, weight)


class AntiOracle(Oracle):
    """``oracle`` whose blocks are dealt to the domains anew in each sequence: as sparse, and without meaning.

    Which block is whose follows from the first tokens of the sequence up to the token, so from nothing that comes later
    and from nothing that a layout of processes changes. Each of D rotations of the blocks is as likely.
    """

    def block_of(self, context: TokenContext) -> Tensor:
        """The block that each token goes to (T,)."""
        assert context.domain is not None
        assert context.position is not None
        start = torch.arange(len(context.ids), device=context.ids.device) - context.position
        number = torch.zeros_like(context.ids)
        for place in range(_NAMING):
            known = context.position >= place
            named = mixed(number * 2 + 1 ^ mixed(context.ids[(start + place).clamp(max=len(start) - 1)]))
            number = torch.where(known, named, number)
        return (context.domain + number) % self.options.num_domains


class OracleHash(ByDomain, Hash):
    """Each domain has a block of experts; within it ``hash``: nothing is learned."""

    @dataclass
    class Options(Hash.Options, DomainOptions):
        """Settings of the blocks and of the table."""

    def forward(self, hidden_states: Tensor, experts: ExpertOutputs, context: TokenContext | None = None) -> Routing:
        """Route tokens by their ids and domains (T,)."""
        if context is None:
            return super().forward(hidden_states, experts, context)
        return self.choose(self.within(self.numbers_of(context.ids), context))
