"""How a model is laid out over processes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from moebed.errors import ConfigError
from moebed.model.config import ModelConfig
from moebed.model.routers import ROUTERS


@dataclass
class ParallelConfig:
    """Layout of a model over data × expert processes, each of which reads its own part of the global batch.

    Routed experts are spread over `expert` ranks by their first axis, and tokens travel to them. Everything else is on
    every rank, or sharded over all of them (FSDP2).

    Args:
        data: Groups of ranks that each have all experts of a layer; 0 stands for what the number of processes leaves.
        expert: Ranks that share the experts of a layer; must divide the number of experts of every layer that has any.
        shard: Shard parameters, gradients and optimizer state: of experts over `data` ranks, of all else over all
            ranks. Otherwise they are replicated.
        gather_dtype: What sharded parameters are gathered in; of no effect without `shard`. float32 leaves them as they
            are, which gives the results of a replicated model; bfloat16 halves the traffic of gathering (gradients are
            reduced in float32 either way), rounds norm scales (routers stay as they are), and leaves the residual
            stream between the blocks in bfloat16, as trainer.precision bf16-true has it.
        reshard_after_forward: Let a block's gathered parameters go after its forward pass and gather them again for
            the backward pass: less memory, half as much traffic again.
        exchange: How tokens travel. all_to_all: to the ranks of their experts, which waits for the device once a layer.
            all_gather: to all ranks of `expert`, which waits nowhere but sends more bytes and has more rows; for few
            ranks.
        checkpoint: sharded: each rank writes its parts into a folder; file: the first rank gathers all into one file,
            in its memory. Either is continued, probed and exported alike, whatever the layout then.
        timeout_minutes: A rank that waits longer than this for the others ends the run with an error.
    """

    data: int = 0
    expert: int = 1
    shard: bool = True
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    reshard_after_forward: bool = True
    exchange: Literal["all_to_all", "all_gather"] = "all_to_all"
    checkpoint: Literal["sharded", "file"] = "sharded"
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        if self.data < 0 or self.expert < 1:
            raise ConfigError(
                f"parallel: data is {self.data} and expert {self.expert}; data must be at least 1 (or 0 for what the "
                "processes leave) and expert at least 1"
            )
        if self.timeout_minutes <= 0:
            raise ConfigError(f"parallel: timeout_minutes is {self.timeout_minutes}; it must be above 0")

    def data_size(self, world_size: int) -> int:
        """Size of the data dimension for so many processes.

        Raises:
            ConfigError: data × expert is not the number of processes.
        """
        data = self.data or world_size // self.expert
        if data * self.expert != world_size or data == 0:
            wanted = f"data {data} × expert {self.expert} = {data * self.expert}" if self.data else f"{self.expert}"
            raise ConfigError(
                f"parallel asks for {wanted if self.data else 'a multiple of ' + wanted} processes but the trainer "
                f"starts {world_size}; set trainer.devices (times trainer.num_nodes) to fit, or change parallel"
            )
        return data

    def resolve(self, world_size: int) -> ParallelConfig:
        """The same with `data` filled in."""
        return dataclasses.replace(self, data=self.data_size(world_size))

    def check(self, world_size: int, config: ModelConfig) -> None:
        """Raise ConfigError in one line if a model cannot be laid out like this over so many processes."""
        data = self.data_size(world_size)
        asks = config.locality_loss_coef > 0 or config.expert_ranks > 1
        if self.expert > 1 and asks and config.expert_ranks != self.expert:
            raise ConfigError(
                f"parallel.expert is {self.expert} but model.config.expert_ranks is {config.expert_ranks}; experts lie "
                "where parallel puts them, so give the same number"
            )
        for index in config.moe_layers:
            layer = config.layer(index)
            if layer.num_experts % self.expert:
                raise ConfigError(
                    f"parallel.expert is {self.expert} but layer {index} has {layer.num_experts} experts; choose a "
                    "number that divides the experts of every layer"
                )
            for name, (_, rows, *_) in ROUTERS[config.router].experts_class.shapes(config, layer).items():
                if self.shard and rows % data:
                    raise ConfigError(
                        f"parallel.shard: the experts' {name} has {rows} rows in layer {index} (moe_intermediate_size "
                        f"of gate and of up, hidden_size of down), which {data} data ranks do not divide; "
                        "set parallel.shard false, or another parallel.data"
                    )
