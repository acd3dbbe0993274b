"""What a plan depends on, and nothing else: the part of a recipe that decides memory and traffic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from moebed.errors import ConfigError
from moebed.model import native
from moebed.model.attention import Attention
from moebed.model.config import ModelConfig
from moebed.model.grouped import alignment
from moebed.model.routers import ROUTERS
from moebed.parallel.config import ParallelConfig
from moebed.parallel.traffic import even_trips


class Precision(NamedTuple):
    """Bytes of an element.

    Under autocast (``-mixed``) parameters and the residual stream stay in float32 and matrices are cast for each
    product; with ``-true`` everything but norms, router and loss is in the one dtype.
    """

    parameter: int
    compute: int

    @property
    def autocast(self) -> bool:
        """Whether parameters are wider than what products are computed in."""
        return self.parameter != self.compute


PRECISIONS = {"32-true": Precision(4, 4), "bf16-mixed": Precision(4, 2), "bf16-true": Precision(2, 2)}
_ALIASES = {"32": "32-true", "None": "32-true", "bf16": "bf16-mixed"}
_ALIASES |= {"16-mixed": "bf16-mixed", "16": "bf16-mixed", "16-true": "bf16-true"}


def precision_of(name: str | int | None) -> Precision:
    """What a name of ``trainer.precision`` means; raises ConfigError for one that cannot be planned."""
    name = _ALIASES.get(str(name), str(name))
    if name not in PRECISIONS:
        raise ConfigError(f"a plan does not know trainer.precision {name!r}; choose one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


@dataclass(frozen=True)
class Setup:
    """A run as the formulas see it.

    Args:
        config: The model.
        batch_size: Sequences of a micro-batch on each rank (B).
        sequence_length: Tokens of a sequence (S).
        precision: Bytes of parameters and of products.
        layout: Processes as D x X, with data filled in.
        accumulate: Micro-batches of an optimizer step.
        checkpointing: Each block is recomputed in the backward pass.
        device: Where it runs; a CPU pads the rows of experts, and keeps attention probabilities up to 1024 positions,
            where products are narrower than float32.
        max_steps: Optimizer steps of the run; unknown if not given.
        optimizer: What it trains with.
    """

    config: ModelConfig
    batch_size: int
    sequence_length: int
    precision: Precision = PRECISIONS["32-true"]
    layout: ParallelConfig = field(default_factory=lambda: ParallelConfig(data=1, shard=False))
    accumulate: int = 1
    checkpointing: bool = False
    device: Literal["cpu", "gpu"] = "gpu"
    max_steps: int | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"

    @property
    def world_size(self) -> int:
        """Ranks (W = D·X)."""
        return self.layout.data * self.layout.expert

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank (T = B·S)."""
        return self.batch_size * self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all ranks."""
        return self.tokens * self.world_size * self.accumulate

    @property
    def moves_tokens(self) -> bool:
        """Whether tokens are sent to experts on other ranks."""
        return self.layout.expert > 1

    @property
    def gathered_bytes(self) -> int:
        """Bytes of a gathered parameter's element."""
        return 2 if self.layout.gather_dtype == "bfloat16" else self.precision.parameter

    @property
    def stream(self) -> Precision:
        """Of activations: parameters that are gathered in bfloat16 leave the residual stream in it."""
        return PRECISIONS["bf16-true"] if self.gathers and self.layout.gather_dtype == "bfloat16" else self.precision

    @property
    def gathers(self) -> bool:
        """Whether parameters are sharded, so that a block is gathered for use (FSDP2)."""
        return self.layout.shard and self.world_size > 1

    @property
    def uses_ddp(self) -> bool:
        """Whether every rank holds the whole model."""
        return not self.layout.shard and self.layout.expert == 1 and self.world_size > 1

    @property
    def looks_ahead(self) -> bool:
        """Whether a step begins with a forward pass more over its micro-batches, for the balancing losses."""
        is_window = self.config.router_aux_loss_scope == "window" and bool(self.config.moe_layers)
        return is_window and self.accumulate > 1

    @property
    def router_keeps_input(self) -> bool:
        """Whether the router's backward pass needs what it was given."""
        return ROUTERS[self.config.router].keeps_input

    @property
    def keeps_attention_probabilities(self) -> bool:
        """Whether attention is plain products, whose (S, S) probabilities the backward pass needs (see attention)."""
        config = self.config
        if config.needs_attention_logits is not None or config.attention_backend == "math":
            return True
        narrow_on_cpu = self.device == "cpu" and self.precision.compute < 4
        return config.attention_backend != "sdpa" and narrow_on_cpu and self.sequence_length <= 1024

    @property
    def attention_is_compiled(self) -> bool:
        """Whether a CPU's compiled attention serves, which depends on the machine, in the first block as in all."""
        if self.device != "cpu" or self.stream.compute < 4:  # asked first: the other question may compile it
            return False
        with torch.device("meta"):
            attention = Attention(self.config)
        heads = (attention.num_heads, attention.num_kv_heads)
        sizes = (self.sequence_length, attention.head_dim)
        query, key = (torch.empty(1).expand(self.batch_size, of, *sizes) for of in heads)
        return attention.uses_native(query, key, key)

    @property
    def casts_experts(self) -> bool:
        """Whether autocast's copies of the experts' matrices are kept; a CPU's compiled experts need none."""
        if self.device != "cpu":  # asked first: the other question compiles the library, which takes seconds
            return True
        backend = self.config.experts_backend
        return not (backend == "native" or (backend == "auto" and native.is_fastest(torch.bfloat16)))

    def require_formulas(self) -> None:
        """Raise ConfigError for what no formula knows."""
        config = self.config
        if self.gathers and not self.layout.reshard_after_forward:
            raise ConfigError(
                "a plan has no formula for parallel.reshard_after_forward: false, with which every block's gathered "
                "parameters stay until the backward pass; plan it with true, or measure"
            )
        for index in config.moe_layers:
            layer = config.layer(index)
            ran = ROUTERS[config.router].experts_run(config, layer, training=True)
            if ran != layer.num_experts_per_tok:
                raise ConfigError(
                    f"a plan has no formula for router {config.router}, which runs {ran:g} experts a token in training "
                    f"to choose {layer.num_experts_per_tok}, and keeps their activations; choose another, or measure"
                )
        if not ROUTERS[config.router].has_plan_formula:
            known = ", ".join(name for name, rule in ROUTERS.items() if rule.has_plan_formula)
            raise ConfigError(f"a plan has no formula for router {config.router}; the ones it knows are {known}")

    def trips(self, index: int) -> float:
        """Rows that a rank sends for a layer in a micro-batch, itself among the receivers, if all is even (N)."""
        layer = self.config.layer(index)
        if not layer.num_experts:
            return 0.0
        split, exchange = self.layout.expert, self.layout.exchange
        return self.tokens * even_trips(layer.num_experts, layer.num_experts_per_tok, split, exchange)

    def choices(self, index: int) -> int:
        """Assignments of which a rank's experts are told in a micro-batch, whether they compute them or not.

        T·K; where X ranks gather all tokens, X·T·min(K, E/X), the most that can come, so that sizes are known before.
        """
        layer, split = self.config.layer(index), self.layout.expert
        if self.moves_tokens and self.layout.exchange == "all_gather":
            return split * self.tokens * min(layer.num_experts_per_tok, layer.num_experts // split)
        return self.tokens * layer.num_experts_per_tok

    def expert_rows(self, index: int, max_violation: float = 0.0) -> int:
        """Rows (R) that the experts of one rank have in a micro-batch, padding included.

        A rank's tokens make T·K rows. With experts split over X ranks, a rank sends T·K rows and receives as many on
        average; one whose experts all have (1 + max_violation) times the mean load receives that many more, but
        never more than all the rows of the X ranks. Where ranks gather all tokens there is a row for each choice,
        whatever the load, of which T·K are computed on average.
        """
        layer, split = self.config.layer(index), self.layout.expert
        rows = self.choices(index)
        if split > 1 and self.layout.exchange == "all_to_all":
            rows = min(round(rows * (1 + max_violation)), rows * split)
        align = alignment(self.device, self.precision.compute)
        return -(-(rows + layer.num_experts // split * (align - 1)) // align) * align
